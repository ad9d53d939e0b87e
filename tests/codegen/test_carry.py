"""Attention of a sequence that is cut: a later piece sees the keys and values of the earlier ones, which get their gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codegen import ops, reference_attention

mux = torch.ops.mux


class Cut(NamedTuple):
    """A chunk whose first sequence is the last `lengths[0]` rows of one with `before` rows more; all of its rows are here."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    before: int
    lengths: list[int]
    scale: float
    window: int

    def __repr__(self) -> str:
        return f"k {tuple(self.k.shape)}, {self.before} rows before {self.lengths}, scale {self.scale:.3f}, window {self.window}"


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    groups, share, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 13]))
    before = draw(st.sampled_from([0, 1, 5, 16, 40]))
    lengths = [draw(st.sampled_from([1, 2, 5, 17, 33])), *draw(st.lists(st.sampled_from([0, 1, 2, 17]), max_size=3))]
    scale, window = draw(st.sampled_from([0.3, size**-0.5])), draw(st.sampled_from([0, 1, 4, 20, 100]))
    return cut(groups, share, size, before, lengths, scale, window, draw(st.integers(0, 99)))


def cut(
    groups: int, share: int, size: int, before: int, lengths: list[int], scale: float = 0.3, window: int = 0, seed: int = 0
) -> Cut:
    generator = torch.Generator().manual_seed(seed)
    rows = before + sum(lengths)
    q, grad = (torch.randn(rows, groups * share, size, generator=generator) for _ in range(2))
    k, v = (torch.randn(rows, groups, size, generator=generator) for _ in range(2))
    return Cut(q, k, v, grad, before, lengths, scale, window)


def borders(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(), torch.tensor(
        [max(lengths), len(lengths)], dtype=torch.int32
    )


def whole(case: Cut, dtype: torch.dtype) -> list[Tensor]:
    """Out, log-sum-exp, dq, dk, dv of the uncut sequences, in plain torch; the piece's earlier queries have no loss."""
    q, k, v = (x.to(dtype).requires_grad_() for x in case[:3])
    share, outs, tops = q.shape[1] // k.shape[1], [], []
    for start, stop in pairwise([0, *(case.before + int(border) for border in borders(case.lengths)[0][1:])]):
        keys, values = (x[start:stop].repeat_interleave(share, 1) for x in (k, v))
        scores = case.scale * torch.einsum("qhd,lhd->hql", q[start:stop], keys)
        place = torch.arange(stop - start)
        distance = place[:, None] - place[None, :]
        hidden = (distance < 0) | (distance >= (case.window or stop - start + 1))
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hql,lhd->qhd", scores.softmax(-1), values))
        tops.append(scores.logsumexp(-1))
    out, top, rows = torch.cat(outs), torch.cat(tops, 1), slice(case.before, None)
    grads = torch.autograd.grad(out[rows], (q, k, v), case.grad.to(dtype)[rows])
    return [x.detach() for x in (out[rows], top[:, rows], grads[0][rows], *grads[1:])]


def parts(case: Cut) -> list[Tensor]:
    """q, k, v of the chunk and what came before."""
    rows = slice(case.before, None)
    return [case.q[rows], case.k[rows], case.v[rows], torch.stack([case.k[: case.before], case.v[: case.before]])]


def chunk(case: Cut) -> list[Tensor]:
    """The same by the operator, from the chunk's rows and the keys and values before them."""
    *leaves, before = (x.clone().requires_grad_() for x in parts(case))
    out, top = mux.attention(*leaves, *borders(case.lengths), case.scale, case.window, before)
    dq, dk, dv, given = torch.autograd.grad(out, (*leaves, before), case.grad[case.before :])
    return [out.detach(), top, dq, torch.cat([given[0], dk]), torch.cat([given[1], dv])]


def close(found: Tensor, expected: Tensor, terms: float = 1.0) -> None:
    assert found.shape == expected.shape
    bound = 2e-6 * max(terms, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= bound


@given(case=cuts())
def test_a_later_piece_sees_what_it_would_see_uncut_and_all_gradients_are_those(case: Cut) -> None:
    for found, expected in zip(chunk(case), whole(case, torch.float64), strict=True):
        close(found, expected, terms=10)


@given(case=cuts())
def test_the_reference_does_too(case: Cut) -> None:
    q, k, v, before = parts(case)
    k, v = (torch.cat([early, own]) for early, own in zip(before, (k, v), strict=True))
    rest = (*borders(case.lengths), case.scale, case.window)
    out, top = reference_attention.attention(q, k, v, *rest)
    grads = reference_attention.attention_backward(case.grad[case.before :], q, k, v, out, top, *rest)
    for found, expected in zip((out, top, *grads), whole(case, torch.float64), strict=True):
        close(found, expected, terms=10)


@pytest.mark.parametrize("window", [0, 6])
def test_nothing_before_has_the_bits_of_no_piece(window: int) -> None:
    case = cut(2, 2, 8, 0, [9, 20], window=window)
    *leaves, _ = (x.clone().requires_grad_() for x in parts(case))
    out, top = mux.attention(*leaves, *borders(case.lengths), case.scale, case.window)
    expected = [out, top, *torch.autograd.grad(out, leaves, case.grad)]
    assert all(map(torch.equal, chunk(case), expected))


@pytest.mark.parametrize("window", [0, 6])
def test_neighbours_keep_their_bits_beside_a_piece_and_a_poisoned_one_reaches_nobody(window: int) -> None:
    case = cut(2, 2, 8, 30, [10, 7, 15], window=window)
    poisoned = case._replace(q=case.q.clone(), k=case.k.clone(), v=case.v.clone(), grad=case.grad.clone())
    for x in poisoned[:4]:
        x[:40] = float("nan")
    alone = case._replace(q=case.q[40:], k=case.k[40:], v=case.v[40:], grad=case.grad[40:], before=0, lengths=case.lengths[1:])
    clean, dirty, plain = chunk(case), chunk(poisoned), chunk(alone)
    for index, (one, other, own) in enumerate(zip(clean, dirty, plain, strict=True)):
        rows = (slice(None), slice(-22, None)) if index == 1 else (slice(-22, None),)
        assert torch.equal(one[rows], own)
        assert torch.equal(other[rows], own)
    assert dirty[3][:40].isnan().all()  # the poison was there


@pytest.mark.parametrize("window", [0, 12])
def test_a_piece_keeps_its_bits_beside_other_neighbours(window: int) -> None:
    case = cut(2, 2, 8, 30, [10, 7, 15], window=window)
    alone = case._replace(q=case.q[:40], k=case.k[:40], v=case.v[:40], grad=case.grad[:40], lengths=[10])
    for found, expected in zip(chunk(case), chunk(alone), strict=True):
        rows = slice(0, expected.shape[-1]) if found.dim() == 2 else slice(0, expected.shape[0])
        assert torch.equal(found[..., rows] if found.dim() == 2 else found[rows], expected)


@pytest.mark.parametrize("window", [0, 9])
def test_a_prefix_joins_a_later_piece_as_it_joins_a_whole_sequence(window: int) -> None:
    # 48 rows in blocks of 16, the last 16 a piece of their own with 32 before them.
    case, generator = cut(2, 2, 8, 32, [16], window=window), torch.Generator().manual_seed(1)
    table, lengths = torch.randn(1, 2 * 2 * 3, 8, generator=generator), torch.tensor([3], dtype=torch.int32)

    def run(leaves: list[Tensor], length: int, rows: slice, *before: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*leaves, table, *before)]
        route = torch.zeros(length // 16, dtype=torch.int32)
        given = ([leaves[3]], [lengths], [route], *borders([length]), case.scale, case.window)
        out, top = mux.prefixed_attention(*leaves[:3], *given, *leaves[4:])
        grads = torch.autograd.grad(out[rows], leaves, case.grad[32:])
        return [out[rows].detach(), top[:, rows], grads[0][rows], *grads[1:]]

    expected = run([*case[:3]], 48, slice(32, None))
    *chunked, before = parts(case)
    *found, given = run(chunked, 16, slice(0, None), before)
    found[3:5] = [torch.cat([early, own]) for early, own in zip(given, found[3:5], strict=True)]
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs.double(), terms=10)


def test_torch_finds_no_fault_with_the_operators_of_a_piece() -> None:
    case = cut(2, 2, 8, 16, [20, 12])
    q, k, v, before = (x.requires_grad_() for x in parts(case))
    rest = (*borders(case.lengths), case.scale, case.window)
    torch.library.opcheck(ops.ATTENTION, (q, k, v, *rest, before))
    route, lengths = torch.tensor([0, -1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    tables = ([torch.randn(1, 8, 8, requires_grad=True)], [lengths], [route])
    torch.library.opcheck(ops.PREFIXED_ATTENTION, (q, k, v, *tables, *rest, before))
    plain, grad = [x.detach() for x in (q, k, v)], case.grad[16:]
    out, top = (x.detach() for x in mux.attention(*plain, *rest, before.detach()))
    torch.library.opcheck(mux.attention_backward.default, (grad, *plain, out, top, *rest, before.detach()))
    given = ([table.detach() for table in tables[0]], *tables[1:])
    torch.library.opcheck(mux.prefixed_attention_backward.default, (grad, *plain, *given, out, top, *rest, before.detach()))


@pytest.mark.parametrize(
    "before", [torch.zeros(2, 4, 8), torch.zeros(3, 4, 2, 8), torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 2, 8).bfloat16()]
)
def test_keys_before_of_another_shape_are_refused(before: Any) -> None:
    q, k, v, _ = parts(cut(2, 2, 8, 0, [8]))
    with pytest.raises(ValueError, match=r"attention: before must be torch\.float32 \[2, C, 2, 8\]"):
        mux.attention(q, k, v, *borders([8]), 0.3, 0, before)
