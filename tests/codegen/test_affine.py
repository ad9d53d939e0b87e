"""mux::tile_affine and mux::tile_sum: every form against the plain reference, and what a row owes its neighbours: nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import host, reference
from codegen.kernels import affine, build, drop
from codegen.kernels.affine import Config, Shape
from codegen.ops import TILE_AFFINE, TILE_SUM, TILE_SUM_
from tests.golden import check_golden

ROUTE = [1, -1, 0, 1, -1, 2]
TILE, FEATURES, SLOTS = 16, 37, 4  # slot 3 has no block

OPERANDS = [
    given
    for given in itertools.product((False, True), repeat=4)
    if (given[0] or given[1] or given[3]) and (given[1] or not given[2])
]


class Case:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        tokens = len(ROUTE) * TILE
        self.x, self.otherwise, self.dy = (normal(1, tokens, FEATURES) for _ in range(3))
        self.scale, self.shift = normal(SLOTS, 1, FEATURES), normal(SLOTS, 1, FEATURES)
        self.base = normal(FEATURES)
        self.route = torch.tensor(ROUTE, dtype=torch.int32)

    def operands(self, given: tuple[bool, ...]) -> list[Any]:
        scale, shift, base, otherwise = given
        return [
            self.x, self.scale if scale else None, self.shift if shift else None, self.base if base else None, self.route,
            self.otherwise if otherwise else None,
        ]  # fmt: skip


def rows(x: Tensor, block: int) -> Tensor:
    return x.reshape(len(ROUTE), TILE, -1)[block]


@pytest.mark.parametrize("given", OPERANDS)
def test_the_cpu_form_means_what_the_reference_says(given: tuple[bool, ...]) -> None:
    args = Case().operands(given)
    assert torch.equal(host.tile_affine(*args), reference.tile_affine(*args))
    assert torch.equal(TILE_AFFINE(*args), reference.tile_affine(*args))


@pytest.mark.parametrize("given", OPERANDS)
@pytest.mark.parametrize("columns", [16, 64])
def test_the_kernel_means_what_the_reference_says(given: tuple[bool, ...], columns: int, interpreted: None) -> None:
    case = Case()
    shape = Shape(len(ROUTE) * TILE, TILE, FEATURES, "float32")
    scale, shift, base, otherwise = given
    text = affine.source(shape, Config(rows=8, columns=columns), scale=scale, shift=shift, base=base, otherwise=otherwise)
    y = torch.full_like(case.x, torch.nan)
    x, *operands = case.operands(given)
    own_scale, own_shift, own_base, route, own_otherwise = operands
    tensors = [own for own in (own_scale, own_shift, own_base, own_otherwise) if own is not None]
    build.load(text)(x, y, *tensors, route, SLOTS)
    assert torch.allclose(y, reference.tile_affine(x, *operands), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("columns", [16, 64])
def test_the_kernel_of_sums_adds_to_what_its_table_holds(product: bool, columns: int, interpreted: None) -> None:
    case = Case()
    begin = torch.randn(SLOTS, 1, FEATURES, generator=torch.Generator().manual_seed(3))
    grad, expected = begin.clone(), begin.clone()
    text = affine.total(Shape(len(ROUTE) * TILE, TILE, FEATURES, "float32"), Config(columns=columns), product=product)
    build.load(text)(case.dy, *([case.x] if product else []), grad, case.route)
    reference.tile_sum(expected, case.dy, case.x if product else None, case.route)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad[3], begin[3])
    assert not torch.equal(grad[0], begin[0])


@pytest.mark.parametrize("given", OPERANDS)
def test_every_gradient_is_that_of_the_plain_formula(given: tuple[bool, ...]) -> None:
    found, expected = Case(), Case()
    leaves = ("x", "scale", "shift", "otherwise")
    for case, call in ((found, TILE_AFFINE), (expected, reference.tile_affine)):
        for name in leaves:
            getattr(case, name).requires_grad_()
        call(*case.operands(given)).backward(case.dy)
    for name in leaves:
        got, want = getattr(found, name).grad, getattr(expected, name).grad
        assert (got is None) == (want is None), name
        if want is not None:
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), name


def test_rows_without_a_slot_keep_their_bits() -> None:
    case = Case()
    y = TILE_AFFINE(case.x, case.scale, case.shift, case.base, case.route, None)
    for block, slot in enumerate(ROUTE):
        assert torch.equal(rows(y, block), rows(case.x, block)) == (slot < 0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_one_slot_holds_reaches_no_other(poison: float) -> None:
    clean, dirty = Case(), Case()
    dirty.x.view(len(ROUTE), TILE, -1)[[0, 3]] = poison
    dirty.dy.view(len(ROUTE), TILE, -1)[[0, 3]] = poison
    dirty.scale[1], dirty.shift[1] = poison, poison
    results = []
    for case in (clean, dirty):
        leaves = [case.x.requires_grad_(), case.scale.requires_grad_(), case.shift.requires_grad_()]
        y = TILE_AFFINE(case.x, case.scale, case.shift, case.base, case.route, None)
        y.backward(case.dy)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for block in (1, 2, 4, 5):
        assert torch.equal(rows(results[0][0], block), rows(results[1][0], block))
        assert torch.equal(rows(results[0][1], block), rows(results[1][1], block))
    for slot in (0, 2, 3):
        assert torch.equal(results[0][2][slot], results[1][2][slot])
        assert torch.equal(results[0][3][slot], results[1][3][slot])
    assert not torch.isfinite(results[1][2][1]).all()


def test_sums_run_block_after_block_whatever_lies_between() -> None:
    case = Case()
    together = TILE_SUM(case.dy, case.x, case.route, SLOTS)
    alone = torch.zeros(SLOTS, 1, FEATURES)
    for block in (0, 3):  # slot 1, one block in a chunk of its own
        TILE_SUM_(alone, rows(case.dy, block), rows(case.x, block), torch.tensor([1], dtype=torch.int32))
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_finds_nothing(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    for given in OPERANDS:
        args = [arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dim() == 3 else arg
                for arg in case.operands(given)]  # fmt: skip
        torch.library.opcheck(TILE_AFFINE, args)
    torch.library.opcheck(TILE_SUM, (case.dy.detach(), case.x.detach(), case.route, SLOTS))
    torch.library.opcheck(TILE_SUM_, (torch.zeros(SLOTS, 1, FEATURES), case.dy.detach(), None, case.route))


WRONG: dict[str, Any] = {
    "scale must be contiguous": {"scale": torch.ones(SLOTS, FEATURES)},
    "there is neither scale, shift nor otherwise": {"scale": None, "shift": None, "base": None},
    "there is no shift": {"shift": None},
    "base must be contiguous": {"base": torch.ones(3)},
    "otherwise is": {"otherwise": torch.ones(2, 2)},
    "route must be contiguous int32": {"route": torch.zeros(6)},
    "not a multiple of route's 5 blocks": {"route": torch.zeros(5, dtype=torch.int32)},
    "scale is": {"scale": torch.ones(2, 1, FEATURES)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    case = Case()
    given = {"x": case.x, "scale": case.scale, "shift": case.shift, "base": case.base, "route": case.route, "otherwise": None}
    with pytest.raises(ValueError, match=f"tile_affine: .*{message}"):
        TILE_AFFINE(**(given | WRONG[message]))


def test_a_gradient_of_the_wrong_shape_is_named() -> None:
    case = Case()
    with pytest.raises(ValueError, match="tile_sum_: grad must be"):
        TILE_SUM_(torch.zeros(SLOTS, FEATURES), case.dy, None, case.route)
    with pytest.raises(ValueError, match="tile_sum: b is"):
        TILE_SUM(case.dy, case.x[..., :3], case.route, SLOTS)


TEXTS = {
    "affine": lambda: affine.source(Shape(512, 128, 200, "bfloat16"), Config(), scale=True, shift=True, base=True, otherwise=True),
    "affine-scale": lambda: affine.source(
        Shape(512, 128, 256, "float16"), Config(), scale=True, shift=False, base=False, otherwise=False
    ),
    "drop": lambda: drop.source(Shape(512, 128, 200, "bfloat16"), Config()),
    "total": lambda: affine.total(Shape(512, 128, 200, "bfloat16"), Config(columns=32), product=True),
}


@pytest.mark.parametrize("family", TEXTS)
def test_the_emitted_text_is_the_accepted_one(family: str) -> None:
    check_golden(f"kernel.{family}", TEXTS[family]())
