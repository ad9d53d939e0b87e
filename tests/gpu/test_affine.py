"""mux::tile_affine and mux::tile_sum natively: as near to float32 as one rounding, the same bits alone and beside others."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from codegen import reference
from codegen.ops import DROP, TILE_AFFINE, TILE_SUM, TILE_SUM_

pytestmark = pytest.mark.gpu

TILE, FEATURES, SLOTS = 128, 1000, 4
ROUTE = [1, -1, 0, 1, -1, 2, 1, 1]
OPERANDS = [given for given in itertools.product((False, True), repeat=4) if (given[0] or given[1]) and (given[1] or not given[2])]


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    tokens = len(ROUTE) * TILE
    x, otherwise = normal(tokens, FEATURES), normal(tokens, FEATURES)
    route = torch.tensor(ROUTE, dtype=torch.int32, device="cuda")
    return x, normal(SLOTS, 1, FEATURES), normal(SLOTS, 1, FEATURES), normal(FEATURES), route, otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", OPERANDS)
def test_rows_are_scaled_and_shifted_in_float32_and_rounded_once(given: tuple[bool, ...], dtype: torch.dtype) -> None:
    x, scale, shift, base, route, otherwise = tensors(dtype)
    operands = [own if present else None for own, present in zip((scale, shift, base), given[:3], strict=True)]
    args = (x, *operands, route, otherwise if given[3] else None)
    found, wanted = TILE_AFFINE(*args), reference.tile_affine(*args)
    # A fused multiply-add rounds once where the reference rounds twice, in float32.
    assert torch.allclose(found.float(), wanted.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    nobody = (route < 0).repeat_interleave(TILE)
    assert torch.equal(found[nobody], (otherwise if given[3] else x)[nobody])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", [False, True])
def test_sums_are_those_of_the_reference_and_have_one_order(product: bool, dtype: torch.dtype) -> None:
    x, *_, route, dy = tensors(dtype)
    other = x if product else None
    runs = [TILE_SUM(dy, other, route, SLOTS) for _ in range(3)]
    wanted = torch.zeros(SLOTS, 1, FEATURES, device="cuda")
    reference.tile_sum(wanted, dy, other, route)
    assert torch.allclose(runs[0], wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    alone = torch.zeros(SLOTS, 1, FEATURES, device="cuda")
    mine = torch.where(route == 1, route, -1)
    TILE_SUM_(alone, dy, other, mine)
    assert torch.equal(alone[1], runs[0][1])
    assert not alone[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_as_the_reference_drops_them(dtype: torch.dtype) -> None:
    x, *_, route, _ = tensors(dtype)
    keys = torch.tensor([[1, -2, 2**30], [3, 4, -(2**31)], [5, 6, 0]], dtype=torch.int32, device="cuda")
    site = torch.tensor([[7, 2]], dtype=torch.int32, device="cuda")
    index = torch.arange(x.shape[0], dtype=torch.int32, device="cuda")
    counters = (index // 200, index % 200)
    found = DROP(x, keys, site, route, *counters)
    factor = reference.dropout_factor(keys, site[0], route, *counters, FEATURES)
    assert torch.equal(found == 0, factor == 0)
    torch.testing.assert_close(found, (x * factor).to(dtype), rtol=3e-7 if dtype == torch.float32 else 8e-3, atol=0)
    nobody = (route < 0).repeat_interleave(TILE)
    assert torch.equal(found[nobody], x[nobody])
