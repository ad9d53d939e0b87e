"""Prefixed attention means what the reference's loop over sequences says, and a task's results do not depend on its neighbours.

Shape letters are those of `codegen.reference`; P prefix rows of each slot and key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codegen import ops, prefix, reference_attention, tuning
from codegen.kernels import prefix as kernels
from tests.golden import check_golden

mux = torch.ops.mux


def table_of(pk: Tensor, pv: Tensor) -> Tensor:
    """A table as the operator reads it: a slot's keys and behind them its values."""
    return torch.cat([pk, pv], 1)


def prefixed_attention(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, lengths: Tensor, route: Tensor, *rest: Any) -> Any:
    """The operator over one table."""
    return mux.prefixed_attention(q, k, v, [table_of(pk, pv)], [lengths], [route], *rest)


def by_reference(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, lengths: Tensor, route: Tensor, *rest: Any) -> Any:
    return reference_attention.prefixed_attention(q, k, v, [table_of(pk, pv)], [lengths], [route], *rest)


POISONS = (math.nan, math.inf, -math.inf)


class Case(NamedTuple):
    """Arguments of the operator but scale and window, and the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    pk: Tensor
    pv: Tensor
    lengths: Tensor
    route: Tensor
    cu_seqlens: Tensor
    bounds: Tensor
    grad: Tensor

    def __repr__(self) -> str:
        shapes = f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, pk {tuple(self.pk.shape)}"
        return f"{shapes}, lengths {self.lengths.tolist()}, route {self.route.tolist()}, borders {self.cu_seqlens.tolist()}"

    @property
    def learned(self) -> tuple[Tensor, ...]:
        return self[:5]

    @property
    def rest(self) -> tuple[Tensor, ...]:
        return self[5:9]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case_of(
    route: list[int],
    lengths: list[int],
    *,
    seed: int = 0,
    tile: int = 16,
    groups: int = 2,
    share: int = 2,
    size: int = 8,
    rows: int = 5,
    cuts: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Normal values; a sequence ends with each run of blocks of one slot, and at the `cuts`."""
    generator, tokens = seeded(seed), tile * len(route)
    ends = {tile * block for block in range(1, len(route)) if route[block] != route[block - 1]}
    borders = sorted({0, tokens} | ends | {cut for cut in cuts if cut < tokens})

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Case(
        q=normal(tokens, groups * share, size),
        k=normal(tokens, groups, size),
        v=normal(tokens, groups, size),
        pk=normal(len(lengths), groups * rows, size),
        pv=normal(len(lengths), groups * rows, size),
        lengths=torch.tensor(lengths, dtype=torch.float32),
        route=torch.tensor(route, dtype=torch.int32),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        bounds=torch.tensor([max(stop - start for start, stop in pairwise(borders)), len(borders) - 1], dtype=torch.int32),
        grad=normal(tokens, groups * share, size),
    )


# Three tasks and blocks of nobody; slot 2 has no block, slot 3 no live row.
ROUTE, LENGTHS, CUTS = [1, 1, -1, 0, 3, -1, 1], [5, 3, 4, 0], (7, 18, 20, 41, 60, 85)


def mixed(**kwargs: Any) -> Case:
    return case_of(ROUTE, LENGTHS, cuts=CUTS, **kwargs)


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dpk: Tensor
    dpv: Tensor


def run(case: Case, op: Callable[..., tuple[Tensor, Tensor]] = prefixed_attention, scale: float = 0.35, window: int = 0) -> Results:
    leaves = [x.clone().requires_grad_() for x in case.learned]
    out, lse = op(*leaves, *case.rest, scale, window)
    return Results(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, case.grad))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry, or to 1: the terms of a sum that cancels are of that size."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def errors(found: Results, expected: Results) -> dict[str, float]:
    return {name: error(mine, theirs) for name, mine, theirs in zip(Results._fields, found, expected, strict=True)}


# --- meaning ----------------------------------------------------------------------------------------------------------


@st.composite
def packed(draw: st.DrawFn) -> Case:
    slots, rows = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return case_of(
        draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=6)),
        draw(st.lists(st.integers(0, rows), min_size=slots, max_size=slots)),
        seed=draw(st.integers(0, 99)),
        tile=draw(st.integers(1, 17)),
        groups=draw(st.integers(1, 3)),
        share=draw(st.integers(1, 3)),
        size=draw(st.sampled_from([1, 8, 13])),
        rows=rows,
        cuts=tuple(draw(st.lists(st.integers(1, 100), max_size=6))),
    )


@given(case=packed(), scale=st.sampled_from([0.3, 1.0]), window=st.sampled_from([0, 1, 4, 100]))
def test_results_and_gradients_are_those_of_the_reference(case: Case, scale: float, window: int) -> None:
    found = run(case, scale=scale, window=window)
    expected = run(case, by_reference, scale=scale, window=window)
    assert all(bound <= 1e-5 for bound in errors(found, expected).values())


@pytest.mark.parametrize(("groups", "share"), [(2, 1), (2, 3), (1, 4)], ids=["one to one", "grouped by three", "one for all"])
def test_a_prefix_is_what_tokens_before_the_sequence_would_be(groups: int, share: int) -> None:
    case = mixed(groups=groups, share=share)
    for op in (prefixed_attention, by_reference):
        out, lse = op(*case.learned, *case.rest, 0.35, 0)
        for start, stop in pairwise(case.cu_seqlens.tolist()):
            slot = ROUTE[start // 16]
            live = LENGTHS[slot] if slot >= 0 else 0
            k, v = (
                torch.cat([table[slot].view(groups, -1, 8)[:, :live].transpose(0, 1), own[start:stop]])
                for table, own in ((case.pk, case.k), (case.pv, case.v))
            )
            q = torch.cat([torch.zeros(live, groups * share, 8), case.q[start:stop]])
            whole = torch.tensor([0, live + stop - start], dtype=torch.int32)
            expected, top = mux.attention(q, k, v, whole, torch.tensor([live + stop - start, 1], dtype=torch.int32), 0.35, 0)
            assert error(out[start:stop], expected[live:]) <= 1e-5
            assert error(lse[:, start:stop], top[:, live:]) <= 1e-5


def test_a_window_of_one_leaves_the_prefix_and_the_row_itself() -> None:
    case = case_of([0], [3], groups=1, share=1, rows=3)
    out, _ = prefixed_attention(*case.learned, *case.rest, 0.35, 1)
    keys, values = (torch.cat([table.expand(16, 3, 8), own], 1) for table, own in ((case.pk, case.k), (case.pv, case.v)))
    expected = (0.35 * case.q @ keys.mT).softmax(-1) @ values
    assert error(out, expected) <= 1e-5


def test_a_wrong_length_is_seen_in_every_result() -> None:
    case = mixed()
    wrong = case._replace(lengths=torch.tensor([4.0, 2.0, 4.0, 1.0]))
    assert all(bound > 1e-2 for bound in errors(run(wrong), run(case, by_reference)).values())


def test_lengths_are_numbers_of_either_dtype() -> None:
    case = mixed()
    assert all(map(torch.equal, run(case), run(case._replace(lengths=case.lengths.int()))))


def test_dead_rows_of_a_prefix_change_nothing_and_get_exact_zeros() -> None:
    case = mixed()
    dead = torch.arange(5) >= case.lengths[:, None]  # [S, P]
    dead = dead[:, None].expand(4, 2, 5).flatten(1)
    other = case._replace(pk=case.pk.clone(), pv=case.pv.clone())
    other.pk[dead], other.pv[dead] = 1e4, -1e4
    found = run(case)
    assert all(map(torch.equal, found, run(other)))
    assert not found.dpk[dead].any()
    assert not found.dpv[dead].any()
    assert found.dpk[:2][~dead[:2]].all()
    assert found.dpv[:2][~dead[:2]].all()


def test_a_slot_without_blocks_gets_a_gradient_of_exact_zeros() -> None:
    found = run(mixed())
    assert not found.dpk[2].any()
    assert not found.dpv[2].any()


@pytest.mark.parametrize("window", [0, 3])
def test_rows_of_nobody_and_of_an_empty_prefix_have_the_bits_of_plain_attention(window: int) -> None:
    case = mixed()
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = mux.attention(*leaves, case.cu_seqlens, case.bounds, 0.35, window)
    expected = (out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, case.grad))
    found = run(case, window=window)
    plain = torch.tensor([slot in (-1, 3) for slot in ROUTE]).repeat_interleave(16)
    for mine, theirs in zip((found.out, found.lse.t(), *found[2:5]), expected, strict=True):
        assert torch.equal(mine[plain], theirs[plain])
        assert not torch.equal(mine[~plain], theirs[~plain])


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    def counted(wanted: set[int]) -> set[str]:
        leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(mixed().learned)]
        out, _ = prefixed_attention(*leaves, *mixed().rest, 0.35, 0)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return {str(op) for op in counter.get_flop_counts()["Global"]}

    assert counted({0, 1, 2}) == {"mux.prefixed_attention_backward"}
    assert counted({3, 4}) == {"mux.prefix_grad"}


# --- rounding ---------------------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """One sequence of one task by torch's own attention."""
    groups, tokens = k.shape[1], q.shape[0]
    keys, values = (
        torch.cat([table[0].unflatten(0, (groups, -1)), own.transpose(0, 1)], 1) for table, own in ((pk, k), (pv, v))
    )  # [G, P + T, D]
    seen = torch.ones(tokens, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - tokens)
    heads = (x.repeat_interleave(q.shape[1] // groups, 0)[None] for x in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], *heads, attn_mask=seen)
    return out[0].transpose(0, 1), torch.zeros(q.shape[1], tokens)


@pytest.mark.parametrize("sharpness", [1, 6])
def test_bfloat16_is_at_most_twice_as_far_from_float32_as_torchs_attention(sharpness: int) -> None:
    exact = case_of([0, 0], [32], tile=64, size=64, rows=32)
    half = Case(*(x.bfloat16() if x.dtype == torch.float32 and x.dim() == 3 else x for x in exact._replace(q=exact.q * sharpness)))
    exact = Case(*(x.float() if x.dtype == torch.bfloat16 else x for x in half))
    expected, mine, theirs = run(exact, by_reference, scale=0.125), run(half, scale=0.125), run(half, sdpa)
    for name in ("out", "dq", "dk", "dv", "dpk", "dpv"):
        own, torchs = (float((getattr(x, name) - getattr(expected, name)).norm()) for x in (mine, theirs))
        assert own <= 2 * torchs, name


# --- the device's kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rows"), [(8, 5), (13, 8), (16, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_mean_what_the_reference_says(
    dtype: torch.dtype, size: int, rows: int, interpreted_device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [rows, 3, 0, rows - 1]
    case = case_of([1, -1, 0, 2, 1, 1], lengths, share=3, cuts=(7,), size=size, rows=rows, dtype=dtype)
    expected = run(
        case._replace(**{name: getattr(case, name).float() for name in ("q", "k", "v", "pk", "pv", "grad")}), by_reference
    )
    monkeypatch.setattr(prefix, "host", interpreted_device)
    found = run(case)
    assert not found.dpk[3].any()
    bound = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    for name in Results._fields:
        assert error(getattr(found, name).float(), getattr(expected, name)) <= bound, name


def test_the_kernels_leave_rows_without_a_prefix_their_bits(
    interpreted_device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = mixed()
    plain = torch.tensor([slot in (-1, 3) for slot in ROUTE]).repeat_interleave(16)
    expected = run(case)
    monkeypatch.setattr(prefix, "host", interpreted_device)
    case.pk[3] = case.pv[3] = math.nan
    found = run(case)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(found, name)[plain], getattr(expected, name)[plain])
    assert not found.dpk[3].any()
    assert not found.dpv[3].any()


@pytest.mark.parametrize("poison", POISONS)
def test_in_the_kernels_a_poisoned_task_stays_within_itself(
    poison: float, interpreted_device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "host", interpreted_device)
    test_a_poisoned_task_stays_within_itself(poison)


def test_in_the_kernels_a_gradient_goes_on_from_what_its_table_holds(interpreted_device: SimpleNamespace) -> None:
    case = mixed()
    out, lse = prefixed_attention(*case.learned, *case.rest, 0.35, 0)
    table = table_of(case.pk, case.pv)
    args = (case.grad, case.q, out, lse, table, case.lengths)
    whole = torch.zeros(table.shape)
    interpreted_device.prefix_tables(whole, *args, case.route, 0.35, 2)
    # The same blocks in two parts: the same sum to the bit.
    parts = torch.zeros(table.shape)
    for first in (True, False):
        mine = torch.where((torch.arange(len(ROUTE)) < 2) == first, case.route, -1)
        interpreted_device.prefix_tables(parts, *args, mine, 0.35, 2)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("family", ["join", "queries", "tables"])
def test_the_kernels_text(family: str) -> None:
    shape = kernels.Shape(4096, 128, 32, 8, 128, 32, "bfloat16")
    check_golden(f"kernel.prefix-{family}", kernels.source(family, shape, tuning.of_prefix(family, shape)))


# --- containment and invariance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_task_stays_within_itself(poison: float) -> None:
    case = mixed()
    clean = run(case)
    rows = torch.tensor(ROUTE).repeat_interleave(16)
    for x in (case.q, case.k, case.v, case.grad):
        x[rows == 1] = poison
    case.pk[1] = case.pv[1] = poison
    found = run(case)
    others, slots = rows != 1, [0, 2, 3]
    for name in ("out", "dq", "dk", "dv"):
        assert not getattr(found, name)[~others].isfinite().any()
        assert torch.equal(getattr(found, name)[others], getattr(clean, name)[others])
    assert torch.equal(found.lse[:, others], clean.lse[:, others])
    for name in ("dpk", "dpv"):
        assert not getattr(found, name)[1].isfinite().all()
        assert torch.equal(getattr(found, name)[slots], getattr(clean, name)[slots])


@pytest.mark.parametrize("poison", POISONS)
def test_poisoned_rows_of_nobody_reach_no_task(poison: float) -> None:
    case = mixed()
    clean = run(case)
    rows = torch.tensor(ROUTE).repeat_interleave(16)
    for x in (case.q, case.k, case.v, case.grad):
        x[rows < 0] = poison
    found = run(case)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(found, name)[rows >= 0], getattr(clean, name)[rows >= 0])
    assert torch.equal(found.dpk, clean.dpk)
    assert torch.equal(found.dpv, clean.dpv)


@pytest.mark.parametrize("tile", [16, 32, 128])
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize(("size", "rows"), [(8, 5), (64, 30)])
def test_a_task_keeps_its_bits_among_any_neighbours(tile: int, share: int, size: int, rows: int) -> None:
    lengths = [rows - 1, rows, 1]
    alone = case_of([0, 0, 0, -1, -1, -1], lengths, tile=tile, share=share, size=size, rows=rows, cuts=(9, tile + 3))
    first = run(alone)
    for route in ([0, 0, 0, 1, 2, -1], [2, 0, 0, 0, 1, 1], [1, 1, -1, 0, 0, 0]):
        start = tile * route.index(0)
        own = slice(start, start + 3 * tile)
        cuts = (start + 9, start + tile + 3)
        crowd = case_of(route, lengths, seed=1, tile=tile, share=share, size=size, rows=rows, cuts=cuts)
        for name in ("q", "k", "v", "grad"):
            getattr(crowd, name)[own] = getattr(alone, name)[: 3 * tile]
        crowd.pk[0], crowd.pv[0] = alone.pk[0], alone.pv[0]
        second = run(crowd)
        assert torch.equal(second.lse[:, own], first.lse[:, : 3 * tile])
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(getattr(second, name)[own], getattr(first, name)[: 3 * tile])
        assert torch.equal(second.dpk[0], first.dpk[0])
        assert torch.equal(second.dpv[0], first.dpv[0])


# --- several tables ---------------------------------------------------------------------------------------------------


class Banks(NamedTuple):
    """Three tables of other widths and slots over the blocks of one chunk, and what a first part of `Case` has beside them."""

    case: Case
    kv: list[Tensor]
    lengths: list[Tensor]
    route: list[Tensor]


def banks() -> Banks:
    """Block by block: table 0, nobody, table 1, table 1, table 2 (of which another slot is free), table 0."""
    cases = [
        case_of([0, -1, -1, -1, -1, 1], [5, 2], seed=1),
        case_of([-1, -1, 0, 0, -1, -1], [8], seed=2, rows=8),
        case_of([-1, -1, -1, -1, 1, -1], [0, 17], seed=3, rows=17),
    ]
    case = case_of([0, -1, 1, 1, 2, 3], [1, 1, 1, 1], cuts=(7, 40))
    tables = [table_of(one.pk, one.pv) for one in cases]
    return Banks(case, tables, [one.lengths for one in cases], [one.route for one in cases])


def over_banks(
    given: Banks, chosen: list[int], op: Callable[..., Any] = mux.prefixed_attention
) -> tuple[list[Tensor], list[Tensor]]:
    """Results by row of the chunk, and gradients of the chosen tables."""
    leaves = [x.clone().requires_grad_() for x in given.case[:3]]
    kv = [given.kv[index].clone().requires_grad_() for index in chosen]
    rest = ([table[index] for index in chosen] for table in (given.lengths, given.route))
    out, lse = op(*leaves, kv, *rest, given.case.cu_seqlens, given.case.bounds, 0.35, 0)
    dq, dk, dv, *tables = torch.autograd.grad(out, [*leaves, *kv], given.case.grad)
    return [out.detach(), lse.detach().t(), dq, dk, dv], tables


def test_every_block_sees_the_prefix_of_its_own_table() -> None:
    found, expected = over_banks(banks(), [0, 1, 2]), over_banks(banks(), [0, 1, 2], reference_attention.prefixed_attention)
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_table_keeps_its_bits_beside_wider_ones(index: int) -> None:
    given = banks()
    rows, tables = over_banks(given, [2, 0, 1])
    alone, own = over_banks(given, [index])
    at = [2, 0, 1].index(index)
    routed = (given.route[index] >= 0).repeat_interleave(16)
    assert all(torch.equal(mine[routed], theirs[routed]) for mine, theirs in zip(rows, alone, strict=True))
    assert torch.equal(tables[at], own[0])


def test_torch_finds_no_fault_with_several_tables_or_none() -> None:
    given = banks()
    for count in (0, 3):
        tables = [x[:count] for x in given[1:]]
        leaves = [x.clone().requires_grad_() for x in given.case[:3]]
        torch.library.opcheck(ops.PREFIXED_ATTENTION, (*leaves, *tables, given.case.cu_seqlens, given.case.bounds, 0.35, 0))
    plain = mux.attention(*given.case[:3], given.case.cu_seqlens, given.case.bounds, 0.35, 0)
    assert all(map(torch.equal, mux.prefixed_attention(*leaves, [], [], [], *given.case[7:9], 0.35, 0), plain))


# --- as a torch operator ----------------------------------------------------------------------------------------------


def op_cases() -> list[Any]:
    case = mixed()
    leaves = [x.requires_grad_() for x in case.learned]
    counted = (case.lengths.int(), *case.rest[1:])
    return [
        pytest.param((*leaves, *case.rest, 0.35, 0), id="lengths of float32"),
        pytest.param((*leaves, *counted, 0.35, 3), id="lengths of int32, in a window"),
    ]


@pytest.mark.parametrize("args", op_cases())
def test_torch_finds_no_fault_with_the_operator(args: tuple[Any, ...]) -> None:
    q, k, v, *tables = args[:7]
    pk, pv, *rest = tables
    kv = table_of(pk, pv).detach().requires_grad_()
    torch.library.opcheck(ops.PREFIXED_ATTENTION, (q, k, v, [kv], *([table] for table in rest), *args[7:]))
    groups = k.shape[1]
    out, lse = prefixed_attention(*(x.detach() if isinstance(x, Tensor) else x for x in args))
    given = (torch.ones_like(q), q, out, lse, kv, *rest, 0.35, groups)
    given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(ops.PREFIX_GRAD, (*given, kv.shape[0]))
    torch.library.opcheck(ops.PREFIX_GRAD_, (torch.ones(kv.shape), *given))
    lists = ([kv.detach()], *([table] for table in rest))
    borders = (out, lse, *args[7:])
    given = (torch.ones_like(q).detach(), q.detach(), k.detach(), v.detach(), *lists, *borders)
    torch.library.opcheck(torch.ops.mux.prefixed_attention_backward.default, given)


@pytest.mark.parametrize("args", op_cases())
def test_results_are_contiguous_as_the_fakes_promise(args: tuple[Any, ...]) -> None:
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, Tensor) and x.dim() == 3 else x for x in args]
    for found, expected in zip(prefixed_attention(*turned), prefixed_attention(*args), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def test_flops_are_counted() -> None:
    case = mixed()
    tokens, heads, size, rows = 112, 4, 8, 5
    with FlopCounterMode(display=False) as counter:
        prefixed_attention(*case.learned, *case.rest, 0.35, 0)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts == {"mux.prefixed_attention": 2 * tokens * tokens * heads * size + 2 * 2 * tokens * heads * rows * size}


# --- wrong arguments --------------------------------------------------------------------------------------------------

GOOD = mixed()
TABLE = table_of(GOOD.pk, GOOD.pv)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "q in four dimensions": ({"q": GOOD.q[None]}, r"q, k, v .*\(1, 112, 4, 8\)"),
    "no query heads": ({"q": GOOD.q[:, :0]}, r"0 query heads"),
    "heads that are no multiple": ({"q": GOOD.q[:, :3]}, r"3 query heads .* 2 key"),
    "k of other rows": ({"k": GOOD.k[:16], "v": GOOD.v[:16]}, r"q is \(112, 4, 8\), k is \(16, 2, 8\)"),
    "kv in two dimensions": ({"kv": TABLE[0]}, r"kv must be \[S, 2 \* 2 \* P, 8\], got torch.float32 \(20, 8\)"),
    "kv of another head size": ({"kv": TABLE[..., :7]}, r"kv .*\(4, 20, 7\)"),
    "kv of rows that are no multiple of the heads": ({"kv": TABLE[:, :18]}, r"kv .*\(4, 18, 8\)"),
    "kv without rows": ({"kv": TABLE[:, :0]}, r"kv .*\(4, 0, 8\)"),
    "kv without slots": ({"kv": TABLE[:0]}, r"kv .*\(0, 20, 8\)"),
    "kv of another dtype": ({"kv": TABLE.bfloat16()}, r"kv is torch.bfloat16, q is torch.float32"),
    "lengths of other slots": ({"lengths": GOOD.lengths[:3]}, r"lengths .*\(4,\), got .*\(3,\)"),
    "lengths of int64": ({"lengths": GOOD.lengths.long()}, r"lengths .*int64"),
    "route of int64": ({"route": GOOD.route.long()}, r"route .*int64"),
    "rows that are no whole blocks": ({"route": GOOD.route[:5]}, r"q has 112 rows, not a multiple of route's 5 blocks"),
    "borders of int64": ({"cu_seqlens": GOOD.cu_seqlens.long()}, r"cu_seqlens .*int64"),
    "a negative window": ({"window": -1}, r"window is -1"),
}


def arguments(changes: dict[str, Any]) -> list[Any]:
    """Of the operator, each list's one member in its place."""
    case = GOOD._replace(**{name: value for name, value in changes.items() if name not in ("window", "kv")})
    return [case.q, case.k, case.v, changes.get("kv", TABLE), *case.rest, 0.35, changes.get("window", 0)]


def called(*args: Any) -> Any:
    return mux.prefixed_attention(*([arg] if 3 <= index < 6 else arg for index, arg in enumerate(args)))


@pytest.mark.parametrize(("place", "name"), [(4, "lengths"), (5, "route")])
def test_lists_of_other_lengths_are_named(place: int, name: str) -> None:
    given: list[Any] = [[arg] if 3 <= index < 6 else arg for index, arg in enumerate(arguments({}))]
    given[place] = given[place] * 2
    with pytest.raises(ValueError, match=f"prefixed_attention: {name} has 2 entries, kv has 1 tables"):
        mux.prefixed_attention(*given)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=f"prefixed_attention: .*{message}"):
        called(*arguments(changes))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_while_tracing(name: str) -> None:
    from torch._subclasses import FakeTensorMode

    changes, message = WRONG[name]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in arguments(changes)]
    with mode, pytest.raises(ValueError, match=f"prefixed_attention: .*{message}"):
        called(*fakes)
