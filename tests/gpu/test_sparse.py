"""mux::tile_sparse natively: the sums of the reference, the same bits alone and beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import reference
from codegen.ops import TILE_SPARSE, TILE_SPARSE_SUM, TILE_SPARSE_SUM_

pytestmark = pytest.mark.gpu

TILE, K, N, COUNT, SLOTS = 128, 1000, 520, 3040, 4
ROUTE = [1, -1, 0, 1, -1, 2, 1, 1]


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    def drawn() -> Tensor:
        flat = torch.randperm(K * N, generator=generator, device="cuda")[:COUNT]
        return torch.stack([flat % N, flat // N]).int()

    tokens = len(ROUTE) * TILE
    route = torch.tensor(ROUTE, dtype=torch.int32, device="cuda")
    places = torch.stack([drawn() for _ in range(SLOTS)])
    return normal(tokens, K), normal(tokens, N), normal(tokens, N), normal(SLOTS, 1, COUNT), places, route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transpose", [False, True])
def test_products_are_those_of_the_reference(transpose: bool, dtype: torch.dtype) -> None:
    x, y, dy, values, places, route = tensors(dtype)
    args: tuple[Any, ...] = (None, dy, values, places, route, K, True) if transpose else (y, x, values, places, route, N, False)
    found = TILE_SPARSE(*args)
    exact = reference.tile_sparse(*(own.float() if isinstance(own, Tensor) and own.is_floating_point() else own for own in args))
    # About ten terms a sum.
    assert torch.allclose(found.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4e-6)
    if not transpose:
        nobody = (route < 0).repeat_interleave(TILE)
        assert torch.equal(found[nobody], y[nobody])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_reference_and_have_one_order(dtype: torch.dtype) -> None:
    x, _, dy, _, places, route = tensors(dtype)
    runs = [TILE_SPARSE_SUM(x, dy, places, route) for _ in range(3)]
    wanted = torch.zeros(SLOTS, 1, COUNT, device="cuda")
    reference.tile_sparse_sum(wanted, x, dy, places, route)
    assert torch.allclose(runs[0], wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    alone = torch.zeros(1, 1, COUNT, device="cuda")
    first = torch.zeros(1, dtype=torch.int32, device="cuda")
    for block in [index for index, slot in enumerate(ROUTE) if slot == 1]:
        rows = slice(block * TILE, (block + 1) * TILE)
        TILE_SPARSE_SUM_(alone, x[rows], dy[rows], places[1:2].contiguous(), first)
    assert torch.equal(alone[0], runs[0][1])


def test_a_step_may_be_captured_in_a_graph() -> None:
    x, y, _, values, places, route = tensors(torch.bfloat16)
    wanted = TILE_SPARSE(y, x, values, places, route, N, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = TILE_SPARSE(y, x, values, places, route, N, False)
    graph.replay()
    assert torch.equal(found, wanted)
