"""Attention of a later piece natively: its rounding against the reference, and its bits beside other neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegen import reference_attention
from codegen.attention import behind
from codegen.ops import ATTENTION

pytestmark = pytest.mark.gpu

HEADS, GROUPS, SIZE = 8, 2, 64


def tensors(dtype: torch.dtype, rows: int, before: int) -> list[Tensor]:
    """q, k, v of a chunk, the keys and values before it, and the output's gradient; rows of a longer chunk begin with these."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, grad, k, v = (
        torch.randn(2048, heads, SIZE, generator=generator, device="cuda").to(dtype)[:rows]
        for heads in (HEADS, HEADS, GROUPS, GROUPS)
    )
    early = torch.randn(2, 4096, GROUPS, SIZE, generator=generator, device="cuda").to(dtype)[:, :before]
    return [q, k, v, early, grad]


# Entries of cu_seqlens less one: fixed, as in chunks of one geometry. The ordered dQ is split by their number.
ENTRIES = 8


def borders(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([0, *lengths, *[0] * (ENTRIES - len(lengths))]).cumsum(0)
    return ends.int().cuda(), torch.tensor(max(lengths), dtype=torch.int32)


def chunk(dtype: torch.dtype, before: int, lengths: list[int], window: int) -> list[Tensor]:
    q, k, v, early, grad = tensors(dtype, sum(lengths), before)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, early)]
    out, lse = ATTENTION(*leaves[:3], *borders(lengths), 0.2, window, leaves[3])
    return [out.detach(), lse.T, *torch.autograd.grad(out, leaves, grad)]


def exact(dtype: torch.dtype, before: int, lengths: list[int], window: int) -> list[Tensor]:
    q, k, v, early, grad = (x.float() for x in tensors(dtype, sum(lengths), before))
    k, v = behind(early, k, v)
    rest = (*borders(lengths), 0.2, window)
    out, lse = reference_attention.attention(q, k, v, *rest)
    dq, dk, dv = reference_attention.attention_backward(grad, q, k, v, out, lse, *rest)
    return [out, lse.T, dq, dk[before:], dv[before:], torch.stack([dk[:before], dv[:before]])]


@pytest.mark.parametrize("window", [0, 100, 700])
@pytest.mark.parametrize("before", [0, 1, 384, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_those_of_the_reference(dtype: torch.dtype, before: int, window: int) -> None:
    lengths = [500, 12, 300, 212]
    wanted, found = exact(dtype, before, lengths, window), chunk(dtype, before, lengths, window)
    allowed = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, mine, its in zip(("out", "lse", "dq", "dk", "dv", "before"), found, wanted, strict=True):
        assert mine.shape == its.shape
        assert float((mine.float() - its).norm()) <= allowed * float(its.norm()), name


@pytest.mark.parametrize("window", [0, 700])
def test_a_piece_and_its_neighbours_keep_their_bits(window: int) -> None:
    piece = chunk(torch.bfloat16, 3000, [384, 128], window)
    for _ in range(2):
        beside = chunk(torch.bfloat16, 3000, [384, 128, 1000, 24], window)
        for mine, its in zip(piece, beside, strict=True):
            own = slice(0, 384)
            assert torch.equal(mine[own] if mine.shape[0] != 2 else mine, its[own] if its.shape[0] != 2 else its)
    plain, carried = (chunk(torch.bfloat16, before, [384, 128, 1000, 24], window) for before in (0, 3000))
    for mine, its in zip(plain[:5], carried[:5], strict=True):
        assert torch.equal(mine[384:], its[384:])
