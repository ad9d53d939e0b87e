"""mux::tile_sparse: every form against the plain reference, and what a task's rows owe its neighbours: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codegen import device, host, reference
from codegen.kernels import put
from codegen.ops import TILE_SPARSE, TILE_SPARSE_SUM, TILE_SPARSE_SUM_

ROUTE = [1, -1, 0, 1, -1, 2]
TILE, K, N, COUNT, SLOTS = 16, 37, 70, 55, 4  # slot 3 is free: all its places are the first, its values zeros


class Case:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        tokens = len(ROUTE) * TILE
        self.x, self.y, self.dy = normal(1, tokens, K), normal(1, tokens, N), normal(1, tokens, N)
        self.values = normal(SLOTS, 1, COUNT)
        self.places = torch.stack([self.drawn(generator) for _ in range(SLOTS)])
        self.values[3], self.places[3] = 0, 0
        self.route = torch.tensor(ROUTE, dtype=torch.int32)

    @staticmethod
    def drawn(generator: torch.Generator) -> Tensor:
        """The corners, and others."""
        inner = torch.randperm(K * N - 2, generator=generator)[: COUNT - 2] + 1
        flat = torch.cat([inner, torch.tensor([0, K * N - 1])])
        return torch.stack([flat % N, flat // N]).int()

    def operands(self, form: str) -> tuple[Any, ...]:
        if form == "transposed":
            return self.x, self.dy, self.values, self.places, self.route, K, True
        return self.y if form == "added" else None, self.x, self.values, self.places, self.route, N, False


FORMS = ["added", "alone", "transposed"]


def rows(x: Tensor, block: int) -> Tensor:
    return x.reshape(len(ROUTE), TILE, -1)[block]


def test_the_reference_is_a_product_with_the_dense_matrix() -> None:
    case = Case()
    y = reference.tile_sparse(*case.operands("added"))
    for block, slot in enumerate(ROUTE):
        delta = torch.zeros(K, N)
        for value, out, into in zip(case.values[slot, 0], *case.places[slot], strict=True):
            delta[into, out] = value
        own = rows(case.y, block) + (rows(case.x, block) @ delta if slot >= 0 else 0)
        torch.testing.assert_close(rows(y, block), own)


@pytest.mark.parametrize("form", FORMS)
def test_the_cpu_form_means_what_the_reference_says(form: str) -> None:
    args = Case().operands(form)
    torch.testing.assert_close(host.tile_sparse(*args), reference.tile_sparse(*args), rtol=1e-5, atol=1e-5)
    assert torch.equal(TILE_SPARSE(*args), host.tile_sparse(*args))


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_mean_what_the_reference_says(form: str, interpreted: None) -> None:
    args = Case().operands(form)
    torch.testing.assert_close(device.tile_sparse(*args), reference.tile_sparse(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["host", "device"])
def test_the_sum_adds_to_what_its_table_holds(where: str, interpreted: None) -> None:
    case = Case()
    begin = torch.randn(SLOTS, 1, COUNT, generator=torch.Generator().manual_seed(3))
    begin[3] = 0
    grad, expected = begin.clone(), begin.clone()
    {"host": host, "device": device}[where].tile_sparse_sum(grad, case.x, case.dy, case.places, case.route)
    reference.tile_sparse_sum(expected, case.x, case.dy, case.places, case.route)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad[3], begin[3])
    assert not torch.equal(grad[0], begin[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_is_that_of_the_plain_formula(form: str) -> None:
    found, expected = Case(), Case()
    for case, call in ((found, TILE_SPARSE), (expected, reference.tile_sparse)):
        for leaf in (case.x, case.y, case.values):
            leaf.requires_grad_()
        call(*case.operands(form)).backward(case.x.detach() if form == "transposed" else case.dy)
    for name in ("x", "y", "values"):
        got, want = getattr(found, name).grad, getattr(expected, name).grad
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_slot_has_the_same_bits_alone_and_in_whatever_chunks_its_blocks_lie(where: str, interpreted: None) -> None:
    case, form = Case(), {"host": host, "device": device}[where]
    y = form.tile_sparse(*case.operands("added"))
    together = torch.zeros(SLOTS, 1, COUNT)
    form.tile_sparse_sum(together, case.x, case.dy, case.places, case.route)
    alone = torch.zeros(1, 1, COUNT)
    values, places, first = case.values[1:2].clone(), case.places[1:2].clone(), torch.tensor([0], dtype=torch.int32)
    for block in (0, 3):  # slot 1, one block in a chunk of its own
        x, own_y, dy = (rows(own, block).clone() for own in (case.x, case.y, case.dy))
        assert torch.equal(form.tile_sparse(own_y, x, values, places, first, N, False), rows(y, block))
        form.tile_sparse_sum(alone, x, dy, places, first)
    assert torch.equal(alone[0], together[1])


def test_rows_without_a_slot_keep_their_bits() -> None:
    case = Case()
    y = TILE_SPARSE(*case.operands("added"))
    for block, slot in enumerate(ROUTE):
        assert torch.equal(rows(y, block), rows(case.y, block)) == (slot < 0)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_one_slot_holds_reaches_no_other(poison: float, where: str, interpreted: None) -> None:
    form = {"host": host, "device": device}[where]
    clean, dirty = Case(), Case()
    for given in (dirty.x, dirty.y, dirty.dy):
        given.view(len(ROUTE), TILE, -1)[[0, 3]] = poison
    dirty.values[1] = poison
    results = []
    for case in (clean, dirty):
        grad = torch.zeros(SLOTS, 1, COUNT)
        form.tile_sparse_sum(grad, case.x, case.dy, case.places, case.route)
        results.append((form.tile_sparse(*case.operands("added")), form.tile_sparse(*case.operands("transposed")), grad))
    for block in (1, 2, 4, 5):
        assert torch.equal(rows(results[0][0], block), rows(results[1][0], block))
        if ROUTE[block] >= 0:
            assert torch.equal(rows(results[0][1], block), rows(results[1][1], block))
    for slot in (0, 2, 3):
        assert torch.equal(results[0][2][slot], results[1][2][slot])
    assert not torch.isfinite(results[1][2][1]).all()


def test_slots_may_hold_more_values_together_than_int32_counts() -> None:
    assert "grad + slot.to(tl.int64) * 1000 + at" in put.source(1000, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_finds_nothing(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    for form in FORMS:
        args = [arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in case.operands(form)]
        torch.library.opcheck(TILE_SPARSE, args)
    x, dy = case.x.detach(), case.dy.detach()
    torch.library.opcheck(TILE_SPARSE_SUM, (x, dy, case.places, case.route))
    torch.library.opcheck(TILE_SPARSE_SUM_, (torch.zeros(SLOTS, 1, COUNT), x, dy, case.places, case.route))


def test_its_flops_are_those_of_the_dense_products_that_run() -> None:
    case = Case()
    with FlopCounterMode(display=False) as counter:
        TILE_SPARSE(*case.operands("added"))
        TILE_SPARSE_SUM(case.x, case.dy, case.places, case.route)
        TILE_SPARSE_SUM_(torch.zeros(SLOTS, 1, COUNT), case.x, case.dy, case.places, case.route)
    assert counter.get_total_flops() == 3 * 2 * len(ROUTE) * TILE * K * N


WRONG: dict[str, Any] = {
    "places must be contiguous torch.int32": {"places": torch.zeros(SLOTS, 2, COUNT)},
    "values must be contiguous": {"values": torch.ones(SLOTS, COUNT)},
    "y must be": {"y": torch.ones(2, 2)},
    "route must be contiguous int32": {"route": torch.zeros(6)},
    "features is 0": {"features": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    case = Case()
    names = ("y", "x", "values", "places", "route", "features", "transpose")
    given = dict(zip(names, case.operands("added"), strict=True))
    with pytest.raises(ValueError, match=f"tile_sparse: .*{message}"):
        TILE_SPARSE(**(given | WRONG[message]))


def test_a_gradient_of_the_wrong_shape_is_named() -> None:
    case = Case()
    with pytest.raises(ValueError, match="tile_sparse_sum_: grad must be"):
        TILE_SPARSE_SUM_(torch.zeros(SLOTS, COUNT), case.x, case.dy, case.places, case.route)
    with pytest.raises(ValueError, match="tile_sparse_sum: b must be"):
        TILE_SPARSE_SUM(case.x, case.dy[:, :3], case.places, case.route)
