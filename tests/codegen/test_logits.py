"""mux::lse: cross entropy of rows of logits, by torch and by the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegen import device
from codegen.kernels import lse as kernel
from codegen.ops import LSE, LSE_BACKWARD
from tests.golden import check_golden

ROWS = 7


def drawn(features: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(features)
    logits = (torch.randn(ROWS, features, generator=generator) * scale).to(dtype)
    return logits, torch.randint(features, (ROWS,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    logits, index = drawn(50, dtype)
    leaf, other = logits.clone().requires_grad_(), logits.double().requires_grad_()
    sums, nll = LSE(leaf, index)
    exact = torch.nn.functional.cross_entropy(other, index, reduction="none")
    assert sums.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.double(), other.logsumexp(1), rtol=1e-6, atol=1e-6)
    seeds = torch.rand(2, ROWS, dtype=torch.float64)
    ((sums * seeds[0]) + (nll * seeds[1])).sum().backward()
    ((other.logsumexp(1) * seeds[0]) + (exact * seeds[1])).sum().backward()
    size = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=size, atol=size)


def test_a_place_that_is_no_column_picks_nothing() -> None:
    logits, index = drawn(50, torch.float32)
    index[0], index[1] = -3, 50
    leaf = logits.clone().requires_grad_()
    sums, nll = LSE(leaf, index)
    assert torch.allclose(nll[:2], sums[:2])
    nll[:2].sum().backward()
    torch.testing.assert_close(leaf.grad[:2], logits[:2].softmax(1))


def test_a_likely_place_keeps_the_digits_of_its_loss() -> None:
    logits = torch.zeros(1, 9)
    logits[0, 4] = 900.0
    logits[0, 5] = 890.0
    _, nll = LSE(logits, torch.tensor([4]))
    exact = torch.log1p(torch.tensor(-10.0, dtype=torch.float64).exp())
    assert abs(float(nll) - float(exact)) < 1e-7, "of a logit of 900, float32 has no place behind the point but four"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("features", [5, 4096, 10001])
def test_the_kernels_compute_it(features: int, dtype: torch.dtype, interpreted: None) -> None:
    logits, index = drawn(features, dtype)
    index[0], index[1] = -1, features
    expected = LSE(logits, index)
    found = device.lse(logits, index)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
    grads = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(1))
    exact = LSE_BACKWARD(*grads, logits, index, expected[0])
    mine = device.lse_backward(grads[0], grads[1], logits, index, expected[0])
    size = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(mine, exact, rtol=size, atol=size)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_text_is_what_was_accepted(phase: str) -> None:
    check_golden(f"kernel.lse-{phase}", getattr(kernel, phase)(kernel.Shape(256, 50257, "bfloat16")))


def test_what_is_not_finite_stays_in_its_row(interpreted: None) -> None:
    logits, index = drawn(40, torch.float32)
    logits[1, 3], logits[2, 0] = float("inf"), float("nan")
    for found in (device.lse(logits, index), LSE(logits, index)):
        for own in found:
            assert own.isfinite().tolist() == [True, False, False, *[True] * (ROWS - 3)]


@pytest.mark.parametrize(
    ("logits", "index", "message"),
    [
        (torch.zeros(3, 4).t(), torch.zeros(4, dtype=torch.int64), "contiguous"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), "int64"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), r"\[3\]"),
    ],
)
def test_arguments_of_other_shapes_are_refused(logits: Tensor, index: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^lse: .*{message}"):
        LSE(logits, index)
