"""The mux operators mean what a plain loop over blocks or sequences says, and what one task gets does not depend on its neighbours.

Shape letters are those of `codegen.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codegen import device, host, ops, reference, reference_attention
from runtime import comm

mux = torch.ops.mux


class Form(NamedTuple):
    """One implementation of the products by block.

    Args:
        ops: has `tile_mm` and `tile_outer`.
        tiles: rows of a block that it takes.
        half: a 16-bit dtype that it takes.
        share: of the usual number of examples.
    """

    ops: Any
    tiles: tuple[int, ...]
    half: torch.dtype
    share: float

    def examples(self, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
        """Run the decorated function at once on as many examples as suit the form."""
        most = max(1, int(settings.default.max_examples * self.share)) if settings.default else 1

        def run(holds: Callable[..., None]) -> None:
            settings(max_examples=most)(given(**strategies)(holds))()

        return run


@pytest.fixture(params=["reference", "host", "device"])
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == "device":
        # Triton's interpreter is slow, and has no product of bfloat16; the kernels want whole fragments of matrix instructions.
        return Form(request.getfixturevalue("interpreted_device"), (16, 32), torch.float16, 0.3)
    ops = {"reference": reference, "host": host}[request.param]
    return Form(ops, tuple(range(1, 18)), torch.bfloat16, 1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, terms: float = 1.0) -> None:
    """`expected` is computed in float64; the error is measured against its largest entry, or the `terms` of a sum that cancels."""
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if expected.numel() == 0:
        return
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype] * max(terms, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= bound


# --- products by block ------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """x [T, K] in blocks of `tile` rows, w [S, K, N] (or [S, N, K]), dy [T, N]."""

    x: Tensor
    w: Tensor
    route: Tensor
    scale: Tensor | None
    transpose: bool
    dy: Tensor

    def __repr__(self) -> str:
        shapes = f"x {tuple(self.x.shape)}, w {tuple(self.w.shape)}, route {self.route.tolist()}"
        return f"{shapes}, scale {self.scale}, transpose {self.transpose}"


@st.composite
def blocks(draw: st.DrawFn, tiles: tuple[int, ...] = tuple(range(1, 18)), dtype: torch.dtype = torch.float32) -> Blocks:
    size = st.integers(1, 9)
    tile, slots, k, n = draw(st.sampled_from(tiles)), draw(st.integers(1, 4)), draw(size), draw(size)
    route = draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=6))
    transpose, scaled = draw(st.booleans()), draw(st.booleans())
    generator = seeded(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = tile * len(route)
    return Blocks(
        normal(rows, k),
        normal(slots, n, k) if transpose else normal(slots, k, n),
        torch.tensor(route, dtype=torch.int32),
        normal(slots).float() if scaled else None,
        transpose,
        normal(rows, n),
    )


def loop_product(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """Block after block, in the dtype it is given, differentiable."""
    out = []
    for rows, slot in zip(x.chunk(len(route)), route.tolist(), strict=True):
        if slot < 0:
            out.append(rows.new_zeros(len(rows), w.shape[1 if transpose else 2]))
        else:
            factor = 1.0 if scale is None else scale[slot].to(rows.dtype)
            out.append(factor * (rows @ (w[slot].T if transpose else w[slot])))
    return torch.cat(out)


def loop_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> Tensor:
    grad = grad.clone()
    for left, right, slot in zip(a.chunk(len(route)), b.chunk(len(route)), route.tolist(), strict=True):
        if slot >= 0:
            grad[slot] += (1.0 if scale is None else scale[slot]) * (left.T @ right)
    return grad


def doubled(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.double()


def test_every_form_of_tile_mm_is_a_loop_over_blocks(form: Form) -> None:
    @form.examples(case=blocks(form.tiles))
    def holds(case: Blocks) -> None:
        expected = loop_product(case.x.double(), case.w.double(), case.route, doubled(case.scale), case.transpose)
        close(form.ops.tile_mm(case.x, case.w, case.route, case.scale, case.transpose), expected)


def test_every_form_of_tile_mm_keeps_a_dtype_of_16_bits(form: Form) -> None:
    @form.examples(case=blocks(form.tiles, form.half))
    def holds(case: Blocks) -> None:
        expected = loop_product(case.x.double(), case.w.double(), case.route, doubled(case.scale), case.transpose)
        close(form.ops.tile_mm(case.x, case.w, case.route, case.scale, case.transpose), expected, form.half)


def test_every_form_of_tile_outer_is_a_loop_over_blocks(form: Form) -> None:
    @form.examples(case=blocks(form.tiles))
    def holds(case: Blocks) -> None:
        slots = case.w.shape[0]
        grad = torch.randn(slots, case.x.shape[1], case.dy.shape[1], generator=seeded(7))
        expected = loop_outer(grad.double(), case.x.double(), case.dy.double(), case.route, doubled(case.scale))
        form.ops.tile_outer(grad, case.x, case.dy, case.route, case.scale)
        close(grad, expected)


def test_every_form_of_tile_outer_sums_rows_of_16_bits_in_float32(form: Form) -> None:
    @form.examples(case=blocks(form.tiles, form.half))
    def holds(case: Blocks) -> None:
        grad = torch.zeros(case.w.shape[0], case.x.shape[1], case.dy.shape[1])
        expected = loop_outer(grad.double(), case.x.double(), case.dy.double(), case.route, doubled(case.scale))
        form.ops.tile_outer(grad, case.x, case.dy, case.route, case.scale)
        close(grad, expected)


@given(case=blocks())
def test_the_gradients_of_tile_mm_are_those_of_the_loop(case: Blocks) -> None:
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
    y = mux.tile_mm(x, w, case.route, case.scale, case.transpose)
    found = torch.autograd.grad(y, (x, w), case.dy)
    exact_x, exact_w = case.x.double().requires_grad_(), case.w.double().requires_grad_()
    exact = loop_product(exact_x, exact_w, case.route, doubled(case.scale), case.transpose)
    assume(exact.requires_grad)  # without a single routed block the loop has nothing to differentiate
    expected = torch.autograd.grad(exact, (exact_x, exact_w), case.dy.double(), allow_unused=True)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, torch.zeros_like(mine).double() if theirs is None else theirs)


def test_a_table_in_bfloat16_gets_its_gradient_in_bfloat16() -> None:
    w = torch.randn(2, 4, 3, generator=seeded(0)).bfloat16().requires_grad_()
    x = torch.randn(8, 4, generator=seeded(1)).bfloat16().requires_grad_()
    y = mux.tile_mm(x, w, torch.tensor([0, 1], dtype=torch.int32), None, False)
    dx, dw = torch.autograd.grad(y.float().sum(), (x, w))
    assert dx.dtype == dw.dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["input", "table"])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted: tuple[bool, bool]) -> None:
    x, w = torch.randn(8, 4).requires_grad_(wanted[0]), torch.randn(2, 4, 3).requires_grad_(wanted[1])
    y = mux.tile_mm(x, w, torch.tensor([0, 1], dtype=torch.int32), None, False)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    one = "mux.tile_mm" if wanted[0] else "mux.tile_outer"
    assert {str(op) for op in counter.get_flop_counts()["Global"]} == {one}


# --- containment: what another task holds reaches nobody ----------------------------------------------------------------

POISONS = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("transpose", [False, True])
def test_unrouted_rows_are_exact_zeros_whatever_they_and_every_slot_hold(form: Form, poison: float, transpose: bool) -> None:
    rows = 3 * form.tiles[0]
    x, w = torch.full((rows, 5), poison), torch.full((2, 5, 5), poison)
    scale = torch.full((2,), poison)
    y = form.ops.tile_mm(x, w, torch.full((3,), -1, dtype=torch.int32), scale, transpose)
    assert torch.equal(y, torch.zeros(rows, 5))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("transpose", [False, True])
def test_a_poisoned_block_and_slot_stay_within_their_own_rows(form: Form, poison: float, transpose: bool) -> None:
    generator, tile = seeded(3), max(form.tiles[0], 4)
    x, w, scale = (
        torch.randn(4 * tile, 5, generator=generator),
        torch.randn(3, *((6, 5) if transpose else (5, 6)), generator=generator),
        torch.rand(3, generator=generator),
    )
    route = torch.tensor([1, 0, -1, 2], dtype=torch.int32)
    clean = form.ops.tile_mm(x, w, route, scale, transpose).split(tile)
    x[tile : 3 * tile], w[0], scale[0] = poison, poison, poison  # block 1 with its slot, and the block of nobody
    y = form.ops.tile_mm(x, w, route, scale, transpose).split(tile)
    assert torch.equal(y[0], clean[0])
    assert not y[1].isfinite().any()
    assert torch.equal(y[2], torch.zeros(tile, 6))
    assert torch.equal(y[3], clean[3])


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_block_stays_within_its_own_gradient(form: Form, poison: float) -> None:
    generator, tile = seeded(4), max(form.tiles[0], 4)
    a, b, scale = (
        torch.randn(4 * tile, 5, generator=generator),
        torch.randn(4 * tile, 6, generator=generator),
        torch.rand(3, generator=generator),
    )
    route = torch.tensor([1, 0, -1, 2], dtype=torch.int32)
    clean, found = torch.zeros(3, 5, 6), torch.zeros(3, 5, 6)
    form.ops.tile_outer(clean, a, b, route, scale)
    own = slice(tile, 3 * tile)
    a[own], b[own], scale[0], found[0] = poison, poison, poison, poison
    form.ops.tile_outer(found, a, b, route, scale)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], clean[1:])


def test_the_gradient_of_an_unrouted_poisoned_block_is_exactly_zero() -> None:
    x, w = torch.full((8, 3), math.inf, requires_grad=True), torch.full((2, 3, 4), math.nan, requires_grad=True)
    y = mux.tile_mm(x, w, torch.full((2,), -1, dtype=torch.int32), None, False)
    dx, dw = torch.autograd.grad(y, (x, w), torch.full_like(y, math.nan))
    assert torch.equal(dx, torch.zeros(8, 3))
    assert torch.equal(dw, torch.zeros(2, 3, 4))


def test_a_slot_without_blocks_keeps_what_its_gradient_held() -> None:
    grad = torch.randn(3, 2, 2, generator=seeded(5))
    before = grad.clone()
    mux.tile_outer_(grad, torch.ones(4, 2), torch.ones(4, 2), torch.tensor([1, -1], dtype=torch.int32), None)
    assert torch.equal(grad[[0, 2]], before[[0, 2]])
    assert not torch.equal(grad[1], before[1])


# --- invariance: bits depend on a task's own blocks alone ---------------------------------------------------------------

TILES = (16, 32, 128)  # smaller blocks than 16 rows the compiler never makes


@st.composite
def layouts(draw: st.DrawFn, tiles: tuple[int, ...] = TILES) -> tuple[int, list[int], list[int]]:
    """A tile, and two routes in which the blocks of slot 0 keep their order among those of slots 1, 2 and of nobody."""
    own = draw(st.integers(1, 5))
    first = draw(st.permutations([0] * own + draw(st.lists(st.integers(-1, 2).filter(bool), max_size=5))))
    second = draw(st.permutations([0] * own + draw(st.lists(st.integers(-1, 2).filter(bool), max_size=5))))
    return draw(st.sampled_from(tiles)), list(first), list(second)


def places(form: Form) -> dict[str, st.SearchStrategy[Any]]:
    """Layouts and feature sizes that the form goes through in reasonable time."""
    slow = form.share < 1
    return {
        "layout": layouts(TILES[:1] if slow else TILES),
        "k": st.sampled_from([7, 40] if slow else [7, 64, 333]),
        "n": st.sampled_from([5, 33] if slow else [5, 8, 65]),
    }


def placed(route: list[int], tile: int, own: list[Tensor], generator: torch.Generator) -> Tensor:
    """Rows of a chunk: the blocks of slot 0 in their order, and random neighbours."""
    waiting = iter(own)
    return torch.cat([next(waiting) if slot == 0 else torch.randn(tile, own[0].shape[1], generator=generator) for slot in route])


def test_the_rows_of_a_block_keep_their_bits_wherever_it_lies(form: Form) -> None:
    @form.examples(**places(form), transpose=st.booleans())
    def holds(layout: tuple[int, list[int], list[int]], k: int, n: int, transpose: bool) -> None:
        tile, *routes = layout
        generator = seeded(11)
        own = [torch.randn(tile, k, generator=generator) for _ in range(routes[0].count(0))]
        table = torch.randn(3, *((n, k) if transpose else (k, n)), generator=generator)
        scale = torch.rand(3, generator=generator)
        found = []
        for route in routes:
            x, slots = placed(route, tile, own, generator), torch.tensor(route, dtype=torch.int32)
            y = form.ops.tile_mm(x, table, slots, scale, transpose)
            found.append([rows for rows, slot in zip(y.split(tile), route, strict=True) if slot == 0])
        assert torch.equal(torch.cat(found[0]), torch.cat(found[1]))


def test_tile_outer_does_not_depend_on_where_the_blocks_lie(form: Form) -> None:
    @form.examples(**places(form))
    def holds(layout: tuple[int, list[int], list[int]], k: int, n: int) -> None:
        tile, *routes = layout
        generator = seeded(12)
        count = routes[0].count(0)
        left = [torch.randn(tile, k, generator=generator) for _ in range(count)]
        right = [torch.randn(tile, n, generator=generator) for _ in range(count)]
        start, scale = torch.randn(3, k, n, generator=generator), torch.rand(3, generator=generator)
        found = []
        for route in routes:
            grad = start.clone()
            a, b = placed(route, tile, left, generator), placed(route, tile, right, generator)
            form.ops.tile_outer(grad, a, b, torch.tensor(route, dtype=torch.int32), scale)
            found.append(grad[0])
        assert torch.equal(*found)


def test_tile_outer_over_two_chunks_in_order_is_tile_outer_over_one(form: Form) -> None:
    @form.examples(layout=places(form)["layout"], cut=st.integers(1, 9))
    def holds(layout: tuple[int, list[int], list[int]], cut: int) -> None:
        tile, route, _ = layout
        assume(0 < cut < len(route))
        generator = seeded(13)
        a, b = torch.randn(tile * len(route), 24, generator=generator), torch.randn(tile * len(route), 9, generator=generator)
        slots, scale = torch.tensor(route, dtype=torch.int32), torch.rand(3, generator=generator)
        once, twice = torch.zeros(3, 24, 9), torch.zeros(3, 24, 9)
        form.ops.tile_outer(once, a, b, slots, scale)
        form.ops.tile_outer(twice, a[: cut * tile], b[: cut * tile], slots[:cut], scale)
        form.ops.tile_outer(twice, a[cut * tile :], b[cut * tile :], slots[cut:], scale)
        assert torch.equal(once, twice)


def test_tile_outer_adds_strictly_in_block_order(form: Form) -> None:
    # In float32 1e8 + 1 is 1e8: only from left to right do these sum to 1 after the large terms have met.
    values = torch.tensor([1e8, 1.0, -1e8, 1.0, 1e8, -1e8, 1.0, 1.0])
    grad, tile = torch.zeros(1, 1, 1), form.tiles[0]
    rows = torch.zeros(8, tile)
    rows[:, 0] = values  # one row of each block counts
    form.ops.tile_outer(grad, rows.view(-1, 1), torch.ones(8 * tile, 1), torch.zeros(8, dtype=torch.int32), None)
    expected = torch.zeros(())
    for value in values:
        expected = expected + value
    assert grad.item() == expected.item()
    assert expected.item() == 2.0


def test_a_gradient_begins_with_what_the_table_already_held(form: Form) -> None:
    grad, tile = torch.full((1, 1, 1), 1e8), form.tiles[0]
    rows = torch.zeros(2, tile)
    rows[:, 0] = torch.tensor([-1e8, 1.0])
    form.ops.tile_outer(grad, rows.view(-1, 1), torch.ones(2 * tile, 1), torch.zeros(2, dtype=torch.int32), None)
    assert grad.item() == 1.0


# --- dropout ------------------------------------------------------------------------------------------------------------


def dropping(rows: int = 48) -> tuple[Tensor, ...]:
    """keys, sites, route, sequences and positions of three blocks, one of nobody."""
    keys = torch.tensor([[1, -2, 2**30], [3, 4, -(2**31)]], dtype=torch.int32)  # a quarter and half are dropped
    index = torch.arange(rows, dtype=torch.int32)
    return keys, torch.tensor([[5, 2]], dtype=torch.int32), torch.tensor([1, -1, 0], dtype=torch.int32), index // 7, index % 7


def test_drop_is_a_product_with_the_factor_of_the_reference_and_so_is_its_gradient() -> None:
    x, (keys, sites, route, sequences, positions) = torch.randn(48, 9, generator=seeded(8)).requires_grad_(), dropping()
    factor = reference.dropout_factor(keys, sites[0], route, sequences, positions, 9)
    y = mux.drop(x, *dropping())
    assert torch.equal(y, x * factor)
    assert torch.equal(y[16:32], x[16:32])  # the block of nobody
    grad = torch.randn(48, 9, generator=seeded(9))
    assert torch.equal(*torch.autograd.grad(y, x, grad), grad * factor)


def test_a_part_of_the_columns_has_its_part_of_the_mask() -> None:
    keys, _, route, sequences, positions = dropping()
    whole, part = (
        reference.dropout_factor(keys, torch.tensor([5, first], dtype=torch.int32), route, sequences, positions, 9 - first)
        for first in (0, 4)
    )
    assert torch.equal(part, whole[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_devices_drop_is_the_cpus_and_draws_from_no_rows_of_others(
    dtype: torch.dtype, interpreted_device: SimpleNamespace
) -> None:
    x = torch.randn(48, 9, generator=seeded(8)).to(dtype)
    x[16:32] = math.nan
    found, wanted = interpreted_device.drop(x, *dropping()), mux.drop(x, *dropping())
    torch.testing.assert_close(found, wanted, rtol=3e-7 if dtype == torch.float32 else 1e-3, atol=0, equal_nan=True)
    assert not found[16:32].isfinite().any()


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_row_stays_within_itself_under_drop(poison: float) -> None:
    x = torch.randn(48, 9, generator=seeded(8))
    clean = mux.drop(x, *dropping())
    x[:16] = poison
    assert torch.equal(mux.drop(x, *dropping())[16:], clean[16:])


# --- attention ----------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: list[int]
    scale: float
    window: int
    grad: Tensor

    def __repr__(self) -> str:
        shapes = f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, lengths {self.lengths}"
        return f"{shapes}, scale {self.scale:.3f}, window {self.window}"


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    groups, share, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 13]))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=1, max_size=5).filter(any))
    scale, window = draw(st.sampled_from([0.3, size**-0.5])), draw(st.sampled_from([0, 1, 4, 100]))
    generator = seeded(draw(st.integers(0, 99)))
    rows = sum(lengths)
    q, grad = (torch.randn(rows, groups * share, size, generator=generator) for _ in range(2))
    k, v = (torch.randn(rows, groups, size, generator=generator) for _ in range(2))
    return Packed(q, k, v, lengths, scale, window, grad)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([max(lengths), len(lengths)], dtype=torch.int32)


def loop_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Softmax over the visible positions, one query at a time; differentiable, in the dtype it is given."""
    share = q.shape[1] // k.shape[1]
    rows, tops = [], []
    for start, stop in pairwise(borders(lengths).tolist()):
        for row in range(start, stop):
            first = max(start, row - window + 1) if window else start
            keys, values = (x[first : row + 1].repeat_interleave(share, 1) for x in (k, v))
            scores = scale * torch.einsum("hd,lhd->hl", q[row], keys)
            rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), values))
            tops.append(scores.logsumexp(-1))
    return torch.stack(rows), torch.stack(tops, 1)


@given(case=packed())
def test_attention_is_a_softmax_over_the_visible_positions_of_one_sequence(case: Packed) -> None:
    out, lse = mux.attention(case.q, case.k, case.v, borders(case.lengths), bounds(case.lengths), case.scale, case.window)
    expected = loop_attention(case.q.double(), case.k.double(), case.v.double(), case.lengths, case.scale, case.window)
    close(out, expected[0])
    close(lse, expected[1])


@given(case=packed())
def test_the_gradients_of_attention_are_those_of_the_loop(case: Packed) -> None:
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, _ = mux.attention(*leaves, borders(case.lengths), bounds(case.lengths), case.scale, case.window)
    found = torch.autograd.grad(out, leaves, case.grad)
    exact = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = exact
    expected = torch.autograd.grad(loop_attention(q, k, v, case.lengths, case.scale, case.window)[0], exact, case.grad.double())
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, terms=10)  # P (dP - delta): the difference of two sums of that size


@given(case=packed())
def test_the_reference_of_attention_is_the_loop_too(case: Packed) -> None:
    args = (borders(case.lengths), bounds(case.lengths), case.scale, case.window)
    out, lse = reference_attention.attention(case.q, case.k, case.v, *args)
    grads = reference_attention.attention_backward(case.grad, case.q, case.k, case.v, out, lse, *args)
    exact = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = exact
    expected, tops = loop_attention(q, k, v, case.lengths, case.scale, case.window)
    close(out, expected.detach())
    close(lse, tops.detach())
    for mine, theirs in zip(grads, torch.autograd.grad(expected, exact, case.grad.double()), strict=True):
        close(mine, theirs, terms=10)


def test_a_window_hides_whole_blocks_of_keys_of_a_long_sequence() -> None:
    # Long enough that torch's CPU kernel meets blocks of keys of which a row sees nothing.
    generator = seeded(21)
    q, k, v, grad = (torch.randn(1100, 1, 8, generator=generator) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = mux.attention(*leaves, borders([1100]), bounds([1100]), 0.35, 6)
    found = torch.autograd.grad(out, leaves, grad)
    args = (borders([1100]), bounds([1100]), 0.35, 6)
    expected, top = reference_attention.attention(q, k, v, *args)
    close(out.detach(), expected.double())
    close(lse, top.double())
    for mine, theirs in zip(found, reference_attention.attention_backward(grad, q, k, v, expected, top, *args), strict=True):
        close(mine, theirs.double())


def test_attention_in_bfloat16_rounds_its_result_once() -> None:
    generator = seeded(22)
    q, k, v = (torch.randn(40, 2, 16, generator=generator).bfloat16() for _ in range(3))
    out, lse = mux.attention(q, k, v, borders([25, 15]), bounds([25, 15]), 0.25, 0)
    expected, tops = loop_attention(q.double(), k.double(), v.double(), [25, 15], 0.25, 0)
    close(out, expected, torch.bfloat16)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse.double(), tops, atol=2e-2)


@given(
    length=st.sampled_from([1, 2, 15, 16, 40, 130]),
    neighbours=st.tuples(*[st.lists(st.sampled_from([0, 1, 7, 16, 50]), max_size=3)] * 4),
    window=st.sampled_from([0, 5]),
    share=st.integers(1, 2),
)
def test_the_rows_of_a_sequence_keep_their_bits_at_other_offsets_and_among_other_neighbours(
    length: int, neighbours: tuple[list[int], ...], window: int, share: int
) -> None:
    generator = seeded(23)
    own = [torch.randn(length, heads, 16, generator=generator) for heads in (2 * share, 2, 2, 2 * share)]
    found = []
    for before, after in (neighbours[:2], neighbours[2:]):
        lengths, rows = [*before, length, *after], slice(sum(before), sum(before) + length)
        q, k, v, grad = (torch.randn(sum(lengths), x.shape[1], 16, generator=generator) for x in own)
        for whole, part in zip((q, k, v, grad), own, strict=True):
            whole[rows] = part
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = mux.attention(*leaves, borders(lengths), bounds(lengths), 0.25, window)
        grads = torch.autograd.grad(out, leaves, grad)
        found.append([out[rows], lse[:, rows], *(x[rows] for x in grads)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_sequence_stays_within_itself(poison: float) -> None:
    generator = seeded(24)
    q, k, v, grad = (torch.randn(30, 2, 8, generator=generator) for _ in range(4))
    lengths, others = [10, 10, 10], [*range(10), *range(20, 30)]
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = mux.attention(*leaves, borders(lengths), bounds(lengths), 0.3, 0)
        results.append([x[others] for x in (out, *torch.autograd.grad(out, leaves, grad))])
        for x in (q, k, v, grad):
            x[10:20] = poison
    for clean, found in zip(*results, strict=True):
        assert torch.equal(clean, found)


def test_a_sequence_of_one_token_returns_its_own_value() -> None:
    q, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    out, _ = mux.attention(q, torch.randn(3, 2, 4), v, borders([1, 0, 1, 0, 1]), bounds([1, 0, 1, 0, 1]), 0.5, 0)
    assert torch.allclose(out, v, rtol=0, atol=1e-7)


# --- as torch operators ---------------------------------------------------------------------------------------------------


def op_cases() -> list[Any]:
    generator = seeded(31)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w = normal(32, 6).requires_grad_(), normal(3, 5, 6).requires_grad_()
    route, scale = torch.tensor([0, 2, -1, 0], dtype=torch.int32), torch.tensor([0.5, 1.0, 2.0])
    a, b = normal(32, 6), normal(32, 5)
    q, k, v = normal(32, 4, 8).requires_grad_(), normal(32, 2, 8).requires_grad_(), normal(32, 2, 8).requires_grad_()
    cu, most = borders([7, 0, 1, 24]), bounds([7, 0, 1, 24])
    out, lse = reference_attention.attention(q.detach(), k.detach(), v.detach(), cu, most, 0.3, 0)
    plain = tuple(x.detach() for x in (q, k, v))
    return [
        pytest.param(ops.TILE_MM, (x, w, route, scale, True), id="tile_mm transposed"),
        pytest.param(ops.TILE_MM, (x, normal(3, 6, 2).requires_grad_(), route, None, False), id="tile_mm"),
        pytest.param(ops.TILE_OUTER, (a, b, route, scale, 3), id="tile_outer"),
        pytest.param(ops.TILE_OUTER_, (torch.zeros(3, 6, 5), a, b, route, None), id="tile_outer_"),
        # Its result was seen to take over x's strides, where the fake promises a contiguous one.
        pytest.param(ops.DROP, (normal(48, 9).requires_grad_(), *dropping()), id="drop"),
        pytest.param(ops.ATTENTION, (q, k, v, cu, most, 0.3, 0), id="attention"),
        pytest.param(ops.ATTENTION, (q, k, v, cu, most, 0.3, 3), id="attention in a window"),
        pytest.param(
            mux.attention_backward.default, (normal(32, 4, 8), *plain, out, lse, cu, most, 0.3, 0), id="attention_backward"
        ),
    ]


@pytest.mark.parametrize(("op", "args"), op_cases())
def test_torch_finds_no_fault_with_the_operator(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args)


class Alone:
    """A group of one rank."""

    def total(self, tensor: Tensor, group: str) -> Tensor:
        assert group == "tp"
        return tensor.clone(memory_format=torch.contiguous_format)


@pytest.fixture
def alone() -> Iterator[None]:
    comm._JOINED[:] = [cast("Any", Alone())]
    yield
    comm.join(None)


@pytest.mark.parametrize("op", [ops.REDUCE, ops.SPREAD])
def test_torch_finds_no_fault_with_the_collectives(op: Any, alone: None) -> None:
    x = torch.randn(6, 4, generator=seeded(3)).requires_grad_()
    torch.library.opcheck(op, (x, "tp"))
    torch.library.opcheck(op, (torch.randn(4, 6).T.requires_grad_(), "tp"))
    assert op(x.T, "tp").is_contiguous()


def test_a_collective_outside_of_a_mesh_says_so() -> None:
    with pytest.raises(AssertionError, match="outside of a mesh"):
        mux.reduce(torch.ones(2), "tp")


@pytest.mark.parametrize(("op", "args"), op_cases())
def test_results_are_contiguous_as_the_fakes_promise(op: Any, args: tuple[Any, ...]) -> None:
    # Inputs of other strides, as a transposed view has them: the result's layout must not follow.
    # What is written in place, and dropout's keys, stay contiguous, as they must be.
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 1 else x for x in args]
    if op is ops.TILE_OUTER_:
        turned[0] = args[0]
    if op is ops.DROP:
        turned[1] = args[1]
    results = op(*turned)
    for result in results if isinstance(results, tuple | list) else [results]:
        assert result is None or result.is_contiguous()


def test_flops_are_counted_for_every_operator() -> None:
    x, w, route = (
        torch.randn(32, 6, requires_grad=True),
        torch.randn(3, 6, 5, requires_grad=True),
        torch.zeros(4, dtype=torch.int32),
    )
    with FlopCounterMode(display=False) as counter:
        mux.tile_mm(x, w, route, None, False).sum().backward()
        mux.tile_outer_(torch.zeros(3, 6, 5), x.detach(), torch.randn(32, 5), route, None)
    product = 2 * 32 * 6 * 5
    assert {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()} == {
        "mux.tile_mm": 2 * product,  # the product, and the input's gradient
        "mux.tile_outer": product,
        "mux.tile_outer_": product,
    }
    q = torch.randn(32, 2, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        mux.attention(q, q, q, borders([32]), bounds([32]), 1.0, 0)[0].sum().backward()
    forward, backward = (counter.get_flop_counts()["Global"][op] for op in (mux.attention, mux.attention_backward))
    assert forward == 2 * 32 * 32 * 2 * 8  # two products over the lower triangle
    assert backward == 5 * 32 * 32 * 2 * 8


# --- wrong arguments ------------------------------------------------------------------------------------------------------

X, W, ROUTE = torch.zeros(32, 6), torch.zeros(3, 6, 5), torch.zeros(4, dtype=torch.int32)
Q, K, CU, MOST = (
    torch.zeros(32, 4, 8),
    torch.zeros(32, 2, 8),
    torch.tensor([0, 32], dtype=torch.int32),
    torch.tensor([32, 1], dtype=torch.int32),
)

WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "x in three dimensions": (mux.tile_mm, (X[None], W, ROUTE, None, False), r"x .*\(1, 32, 6\)"),
    "w in two dimensions": (mux.tile_mm, (X, W[0], ROUTE, None, False), r"w .*\(6, 5\)"),
    "w of other features": (mux.tile_mm, (X, W, ROUTE, None, True), r"6 features.*w is \(3, 6, 5\)"),
    "w of another dtype": (mux.tile_mm, (X, W.double(), ROUTE, None, False), r"w is torch.float64"),
    "route of int64": (mux.tile_mm, (X, W, ROUTE.long(), None, False), r"route .*int64"),
    "route in two dimensions": (mux.tile_mm, (X, W, ROUTE[None], None, False), r"route .*\(1, 4\)"),
    "an empty route": (mux.tile_mm, (X, W, ROUTE[:0], None, False), r"route"),
    "rows that are no whole blocks": (mux.tile_mm, (X[:31], W, ROUTE, None, False), r"x has 31 rows.*4 blocks"),
    "scale of another length": (mux.tile_mm, (X, W, ROUTE, torch.ones(2), False), r"scale .*\(2,\)"),
    "scale of float64": (mux.tile_mm, (X, W, ROUTE, torch.ones(3).double(), False), r"scale .*float64"),
    "a that is no whole blocks": (mux.tile_outer, (X[:31], X[:31], ROUTE, None, 3), r"\ba has 31 rows"),
    "a in one dimension": (mux.tile_outer, (X[:, 0], X, ROUTE, None, 3), r"\ba\b.*\(32,\)"),
    "b of other rows": (mux.tile_outer, (X, X[:16], ROUTE, None, 3), r"\bb\b.*16"),
    "grad of another shape": (mux.tile_outer_, (torch.zeros(3, 6, 4), X, X, ROUTE, None), r"grad is \(3, 6, 4\)"),
    "grad of bfloat16": (mux.tile_outer_, (torch.zeros(3, 6, 6).bfloat16(), X, X, ROUTE, None), r"grad .*bfloat16"),
    "grad of other strides": (mux.tile_outer_, (torch.zeros(3, 6, 6).mT, X, X, ROUTE, None), r"grad .*contiguous"),
    "q in four dimensions": (mux.attention, (Q[None], K, K, CU, MOST, 1.0, 0), r"\(1, 32, 4, 8\)"),
    "v unlike k": (mux.attention, (Q, K, K[:, :1], CU, MOST, 1.0, 0), r"k is \(32, 2, 8\), v is \(32, 1, 8\)"),
    "k of other rows": (mux.attention, (Q, K[:16], K[:16], CU, MOST, 1.0, 0), r"q is \(32, 4, 8\), k is \(16, 2, 8\)"),
    "heads that are no multiple": (mux.attention, (Q[:, :3], K, K, CU, MOST, 1.0, 0), r"3 query heads .* 2 key"),
    "no key heads": (mux.attention, (Q, K[:, :0], K[:, :0], CU, MOST, 1.0, 0), r"key"),
    "k of another dtype": (mux.attention, (Q, K.bfloat16(), K.bfloat16(), CU, MOST, 1.0, 0), r"k is .*bfloat16"),
    "borders of int64": (mux.attention, (Q, K, K, CU.long(), MOST, 1.0, 0), r"cu_seqlens .*int64"),
    "one bound": (mux.attention, (Q, K, K, CU, MOST[0], 1.0, 0), r"bounds must be int32 \[2\] on the CPU"),
    "bounds of int64": (mux.attention, (Q, K, K, CU, MOST.long(), 1.0, 0), r"bounds .*int64"),
    "a negative window": (mux.attention, (Q, K, K, CU, MOST, 1.0, -1), r"window"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    op, args, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        op(*args)


@pytest.mark.parametrize("rows", [8, 48])
def test_the_device_refuses_blocks_that_its_kernels_do_not_take(rows: int) -> None:
    x, route = torch.zeros(2 * rows, 6), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"tile_mm: route: blocks of {rows} rows"):
        device.tile_mm(x, torch.zeros(3, 6, 5), route, None, False)
    with pytest.raises(ValueError, match=rf"tile_outer: route: blocks of {rows} rows"):
        device.tile_outer(torch.zeros(3, 6, 6), x, x, route, None)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_while_tracing(name: str) -> None:
    from torch._subclasses import FakeTensorMode

    op, args, message = WRONG[name]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
    with mode, pytest.raises(ValueError, match=message):
        op(*fakes)
