"""Attention of a later piece natively: its rounding against the reference, and its bits beside other neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import muxcompile
from codegen import reference_attention
from codegen.attention import behind
from codegen.ops import ATTENTION
from tests.muxcompile.peft_reference import examples, llama

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
    return ends.int().cuda(), torch.tensor([max(lengths), len(lengths)], dtype=torch.int32)


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


@pytest.mark.parametrize("heads", [1, 2, 4, 32])
def test_gradients_keep_their_bits_however_many_sequences_are_beside(heads: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(2048, heads, SIZE, generator=generator, device="cuda").bfloat16() for _ in range(4)]
    found = []
    for lengths in ([700, 1348], [700, *[8] * 168, 4], [700, *[2] * 674]):
        ends = torch.tensor([0, *lengths, *[0] * (800 - len(lengths))]).cumsum(0).int().cuda()
        count = next(most for most in (64, 192, 768) if most >= len(lengths))
        q, k, v = (x.clone().requires_grad_() for x in leaves[:3])
        out, _ = ATTENTION(q, k, v, ends, torch.tensor([2048, count], dtype=torch.int32), 0.2, 0)
        found.append([x[:700] for x in (out, *torch.autograd.grad(out, (q, k, v), leaves[3]))])
    for mine in zip(*found, strict=True):
        assert torch.equal(mine[0], mine[1])
        assert torch.equal(mine[0], mine[2])


def model_of(dtype: torch.dtype, tokens: int, names: tuple[str, ...] = ("ann", "ben")) -> Any:
    backbone = llama(5, hidden_size=128, intermediate_size=256, max_position_embeddings=4096).to("cuda", dtype)
    config = LoraConfig(r=8, target_modules="all-linear")
    model = muxcompile.compile(backbone, dict.fromkeys(names, config), muxcompile.Options(chunk_tokens=tokens))
    for name in names:
        for key, value in model.state_dict(name).items():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key)))
            model.state.write(name, key, (value + 0.02 * noise).bfloat16().float())
    return model


def data_of(names: tuple[str, ...] = ("ann", "ben")) -> dict[str, Any]:
    lengths = {"ann": (2000, 70), "ben": (300, 1500, 40)}
    return {name: examples(len(lengths[name]), lengths[name]) for name in names}


def gradients_of(model: Any, names: tuple[str, ...] = ("ann", "ben")) -> dict[str, Tensor]:
    losses = model.forward_backward(data_of(names)).losses
    return {f"{name} {key}": grad for name in names for key, grad in model.gradients(name).items()} | losses


def test_a_sequence_in_many_pieces_trains_as_the_uncut_one_does() -> None:
    exact = gradients_of(model_of(torch.float32, 2048))
    whole, cut = (gradients_of(model_of(torch.bfloat16, tokens)) for tokens in (2048, 512))
    for key, value in exact.items():
        error, own = (float((found[key].float() - value).norm()) for found in (cut, whole))
        assert error <= 2 * own + 1e-3 * float(value.norm()), key


def test_a_task_with_cut_sequences_has_the_bits_beside_others_that_it_has_alone() -> None:
    beside, alone = gradients_of(model_of(torch.bfloat16, 512)), gradients_of(model_of(torch.bfloat16, 512, ("ann",)), ("ann",))
    for key, value in alone.items():
        assert torch.equal(beside[key], value), key
