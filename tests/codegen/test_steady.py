"""Rows of a product at other places and beside others: products whose bits follow either are found out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from codegen.steady import steady

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (499, 96), (1000, 40)])
def test_products_of_this_cpu_are_steady(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    with FakeTensorMode():
        fake = torch.empty(shape, dtype=dtype)
    # A weight that is there, and such as are not yet.
    for weight in (torch.full(shape, 0.5, dtype=dtype), fake, torch.nn.Parameter(fake), torch.empty(shape, device="meta")):
        assert steady(64, 16, weight, dtype, CPU, lambda x, w: x @ w)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_values_of_a_weight_that_is_there_are_taken_and_a_shape_is_looked_at_once() -> None:
    calls: list[Tensor] = []

    def product(x: Tensor, w: Tensor) -> Tensor:
        calls.append(w)
        return x @ w

    weight = torch.randn(32, 24)
    assert steady(32, 16, weight, torch.float32, CPU, product)
    assert {own.data_ptr() for own in calls} == {weight.data_ptr()}
    seen = len(calls)
    assert steady(32, 16, torch.randn(32, 24), torch.float32, CPU, product)
    assert len(calls) == seen
    assert steady(32, 16, torch.empty(32, 24, device="meta"), torch.bfloat16, CPU, product)
    assert len(calls) == 2 * seen
    assert calls[-1].dtype == torch.bfloat16


def by_place(x: Tensor, w: Tensor) -> Tensor:
    """The second half of the rows has its sum in two parts."""
    half, middle = x.shape[0] // 2, x.shape[1] // 2
    parts = x[half:, :middle] @ w[:middle] + x[half:, middle:] @ w[middle:]
    return torch.cat([x[:half] @ w, parts])


def by_neighbour(x: Tensor, w: Tensor) -> Tensor:
    """A row's result is rounded in the scale of the largest beside it, as with one scale for a tensor."""
    scale = x.abs().amax() / 127
    return (x / scale).round() * scale @ w


def backwards_alone(x: Tensor, w: Tensor) -> Tensor:
    """As `by_place`, but only where the sum is over the 499 places of the vocabulary."""
    return by_place(x, w) if x.shape[1] == 499 else x @ w


@pytest.mark.parametrize("product", [by_place, by_neighbour, backwards_alone])
def test_bits_that_follow_place_or_neighbours_are_seen(product: object) -> None:
    assert not steady(64, 16, torch.empty(499, 96, device="meta"), torch.float32, CPU, product)  # type: ignore[arg-type]
