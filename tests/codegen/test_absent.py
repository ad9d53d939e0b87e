"""Kernels that add to a table write the rows of slots that have blocks, and no others: somebody else may be writing those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import device

TILE, SLOTS, FEATURES, RANK = 16, 4, 40, 8
ROUTE = [1, -1, 3, 1]
ABSENT = sorted(set(range(SLOTS)) - set(ROUTE))


@pytest.fixture
def stored(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that kernels wrote."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[int] = []
    original = InterpreterBuilder.create_masked_store

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.extend(ptrs.data[mask.data.astype(bool)].reshape(-1).tolist())
        return original(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return found


def products(grad: Tensor, route: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(len(ROUTE) * TILE, size, generator=generator) for size in (RANK, FEATURES))
    device.tile_outer(grad, a, b, route, None)


def sums(grad: Tensor, route: Tensor) -> None:
    device.tile_sum(grad, torch.randn(1, len(ROUTE) * TILE, FEATURES, generator=torch.Generator().manual_seed(0)), None, route)


def prefixes(grad: Tensor, route: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, width = len(ROUTE) * TILE, 2, 16
    q, out, dout = (torch.randn(tokens, heads, width, generator=generator) for _ in range(3))
    kv = torch.randn(SLOTS, grad.shape[1], width, generator=generator)
    lengths = torch.full((SLOTS,), 4, dtype=torch.int32)
    device.prefix_tables(grad, dout, q, out, torch.zeros(heads, tokens), kv, lengths, route, 0.3, 1)


def places(grad: Tensor, route: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, len(ROUTE) * TILE, size, generator=generator) for size in (RANK, FEATURES))
    where = torch.stack([torch.arange(grad.shape[2]), torch.randint(RANK, (grad.shape[2],), generator=generator)])
    device.tile_sparse_sum(grad, a, b, where.int().repeat(SLOTS, 1, 1), route)


@pytest.mark.parametrize(
    ("adds", "shape"),
    [(places, (SLOTS, 1, 24)), (products, (SLOTS, RANK, FEATURES)), (sums, (SLOTS, 1, FEATURES)), (prefixes, (SLOTS, 8, 16))],
)
def test_a_slot_without_blocks_is_not_written(
    adds: Callable[[Tensor, Tensor], None], shape: tuple[int, ...], stored: list[int]
) -> None:
    grad = torch.zeros(shape)
    adds(grad, torch.tensor(ROUTE, dtype=torch.int32))
    rows = {(address - grad.data_ptr()) // grad[0].nbytes for address in stored}
    assert grad[sorted(set(ROUTE) - {-1})].abs().sum() > 0
    assert set(ROUTE) - {-1} <= rows
    assert not rows & set(ABSENT)
