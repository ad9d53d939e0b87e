"""mux::tile_gather and mux::tile_scatter: every form against the plain reference, in the order of a task's own rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import ahead, device, host, reference
from codegen.kernels import build, scatter
from codegen.kernels.affine import Config, Shape
from codegen.ops import TILE_AFFINE, TILE_GATHER, TILE_SCATTER, TILE_SCATTER_
from tests.golden import check_golden

ROUTE = [1, -1, 0, 1, -1, 2]
TILE, FEATURES, SLOTS, ROWS = 16, 37, 4, 11  # slot 3 has no block


class Case:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = len(ROUTE) * TILE
        self.table = torch.randn(SLOTS, ROWS, FEATURES, generator=generator).to(dtype)
        self.dy = torch.randn(tokens, FEATURES, generator=generator).to(dtype)
        self.index = torch.randint(ROWS, (tokens,), generator=generator)
        self.index[50:60] = 3  # a place that many rows of a block share
        self.route = torch.tensor(ROUTE, dtype=torch.int32)
        self.begin = torch.randn(SLOTS, ROWS, FEATURES, generator=generator)

    def sums(self) -> Tensor:
        found = self.begin.clone()
        reference.tile_scatter(found, self.dy, self.index, self.route)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_form_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    assert torch.equal(TILE_GATHER(case.table, case.index, case.route), reference.tile_gather(case.table, case.index, case.route))
    grad = case.begin.clone()
    TILE_SCATTER_(grad, case.dy, case.index, case.route)
    assert torch.equal(grad, case.sums())
    assert torch.equal(grad[3], case.begin[3])
    assert not torch.equal(grad[0], case.begin[0])


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_device_form_has_the_bits_of_the_reference(dtype: torch.dtype, columns: int, interpreted: None) -> None:
    case = Case(dtype=dtype)
    assert torch.equal(device.tile_gather(case.table, case.index, case.route), host.tile_gather(case.table, case.index, case.route))
    places, order = device._places(case.table.shape, case.index, case.route).sort(stable=True)
    text = scatter.source(Shape(len(ROUTE) * TILE, TILE, FEATURES, str(dtype).removeprefix("torch.")), Config(columns=columns))
    grad = case.begin.clone()
    build.load(text)(case.dy, places, order, grad, SLOTS * ROWS)
    assert torch.equal(grad, case.sums())


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    found, expected = Case(), Case()
    for case, call in ((found, TILE_GATHER), (expected, reference.tile_gather)):
        case.table.requires_grad_()
        call(case.table, case.index, case.route).backward(case.dy)
    assert torch.allclose(found.table.grad, expected.table.grad, rtol=1e-6, atol=1e-6)


def test_sums_run_row_after_row_whatever_lies_between() -> None:
    case = Case()
    together = TILE_SCATTER(case.dy, case.index, case.route, [SLOTS, ROWS])
    alone = torch.zeros(SLOTS, ROWS, FEATURES)
    for block in (0, 3):  # slot 1, each of its blocks in a chunk of its own
        rows = slice(block * TILE, (block + 1) * TILE)
        TILE_SCATTER_(alone, case.dy[rows], case.index[rows], torch.tensor([1], dtype=torch.int32))
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_one_slot_holds_reaches_no_other(poison: float) -> None:
    clean, dirty = Case(), Case()
    dirty.table[1] = poison
    dirty.dy.view(len(ROUTE), TILE, -1)[[0, 3]] = poison
    outputs = [TILE_GATHER(case.table, case.index, case.route).view(len(ROUTE), TILE, -1) for case in (clean, dirty)]
    sums = [TILE_SCATTER(case.dy, case.index, case.route, [SLOTS, ROWS]) for case in (clean, dirty)]
    assert torch.equal(outputs[0][[1, 2, 4, 5]], outputs[1][[1, 2, 4, 5]])
    assert torch.equal(sums[0][[0, 2, 3]], sums[1][[0, 2, 3]])
    assert not torch.isfinite(sums[1][1]).all()


def test_rows_of_nobody_may_have_any_index() -> None:
    case = Case()
    case.index.view(len(ROUTE), TILE)[[1, 4]] = 10**9
    y = TILE_GATHER(case.table, case.index, case.route).view(len(ROUTE), TILE, -1)
    assert not y[[1, 4]].any()
    plain = Case()
    sums = [TILE_SCATTER(one.dy, one.index, one.route, [SLOTS, ROWS]) for one in (case, plain)]
    assert torch.equal(*sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_finds_nothing(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    torch.library.opcheck(TILE_GATHER, (case.table.requires_grad_(), case.index, case.route))
    torch.library.opcheck(TILE_SCATTER, (case.dy, case.index, case.route, [SLOTS, ROWS]))
    torch.library.opcheck(TILE_SCATTER_, (case.begin, case.dy, case.index, case.route))


WRONG: dict[str, Any] = {
    "table must be contiguous": {"table": torch.ones(SLOTS, ROWS)},
    "index must be torch.int64": {"index": torch.zeros(96, dtype=torch.int32)},
    "route must be contiguous int32": {"route": torch.zeros(6)},
    "not a multiple of route's 5 blocks": {"route": torch.zeros(5, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=f"tile_gather: .*{message}"):
        TILE_GATHER(**({"table": case.table, "index": case.index, "route": case.route} | WRONG[message]))


def test_a_gradient_of_the_wrong_shape_is_named() -> None:
    case = Case()
    with pytest.raises(ValueError, match="tile_scatter_: grad must be"):
        TILE_SCATTER_(torch.zeros(SLOTS, ROWS), case.dy, case.index, case.route)
    with pytest.raises(ValueError, match="tile_scatter: rows must be"):
        TILE_SCATTER(case.dy[:3], case.index, case.route, [SLOTS, ROWS])


def test_the_emitted_text_is_the_accepted_one() -> None:
    check_golden("kernel.scatter", scatter.source(Shape(512, 128, 200, "bfloat16"), Config(columns=128)))


def test_a_chunk_may_have_more_rows_than_cuda_launches_along_y() -> None:
    rows = 1 << 17
    assert f"grid=({rows}, 2)" in scatter.source(Shape(rows, 128, 200, "bfloat16"), Config(columns=128))


def test_what_the_device_launches_is_known_ahead() -> None:
    table = torch.empty(SLOTS, ROWS, FEATURES, dtype=torch.bfloat16, device="meta")
    index = torch.empty(len(ROUTE) * TILE, dtype=torch.int64, device="meta")
    route = torch.empty(len(ROUTE), dtype=torch.int32, device="meta")
    ((launch, tensors),) = ahead.calls(TILE_GATHER, (table, index, route))
    assert launch.name.startswith("scatter_")
    assert [own.shape for own in tensors[:1]] == [(len(ROUTE) * TILE, FEATURES)]
    rows = torch.empty(2, TILE, FEATURES, device="meta")
    (chosen,) = ahead.calls(TILE_AFFINE, (rows[0], None, None, None, torch.empty(1, dtype=torch.int32, device="meta"), rows[1]))
    assert chosen[0].name.startswith("affine_")
