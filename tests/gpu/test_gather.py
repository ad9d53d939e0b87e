"""mux::tile_gather and mux::tile_scatter natively: the sums of the reference, in one order whoever else is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegen import reference
from codegen.ops import TILE_GATHER, TILE_SCATTER_

pytestmark = pytest.mark.gpu

TILE, SLOTS, ROWS, FEATURES = 128, 3, 50, 200
ROUTE = [1, -1, 0, 1, 1, -1, 0]


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, ids (each many times), the route and rows to add."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = TILE * len(ROUTE)
    table = torch.randn(SLOTS, ROWS, FEATURES, generator=generator, device="cuda").to(dtype)
    rows = torch.randn(tokens, FEATURES, generator=generator, device="cuda").to(dtype)
    index = torch.randint(0, ROWS, (tokens,), generator=generator, device="cuda")
    return table, index, torch.tensor(ROUTE, dtype=torch.int32, device="cuda"), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_and_added_as_the_reference_says(dtype: torch.dtype) -> None:
    table, index, route, rows = case(dtype)
    assert torch.equal(TILE_GATHER(table, index, route), reference.tile_gather(table, index, route))
    found = torch.ones(table.shape, device="cuda")
    wanted = found.cpu()
    TILE_SCATTER_(found, rows, index, route)
    reference.tile_scatter(wanted, rows.cpu(), index.cpu(), route.cpu())
    # One row after another, in float32, by both.
    assert torch.equal(found.cpu(), wanted)


def test_a_sum_does_not_depend_on_neighbours_or_on_the_chunk_that_a_block_lies_in() -> None:
    table, index, route, rows = case(torch.bfloat16)
    whole, parts = (torch.zeros(table.shape, device="cuda") for _ in range(2))
    TILE_SCATTER_(whole, rows, index, route)
    noise = torch.where((route == 1).repeat_interleave(TILE)[:, None], rows, torch.full_like(rows, torch.nan))
    for first in (True, False):
        mine = torch.where((route == 1) & ((torch.arange(len(ROUTE), device="cuda") < 2) == first), route, -1)
        TILE_SCATTER_(parts, noise, index, mine)
    assert torch.equal(parts[1], whole[1])
    assert not parts[0].any()
