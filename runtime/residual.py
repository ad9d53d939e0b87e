"""LoRA that starts as a part of the backbone's weight: y = W x + s (B A - B0 A0) x, where A and B begin as A0 and B0.

PiSSA and OLoRA take s B0 A0 out of W and train A and B beside what is left. Here W is only read: the tables hold 2 r ranks, those
of A and B and those of A0 and B0 with their sign turned. A0 and B0 are constants of the task, in checkpoints alone.

A start `start(shape, generator, reads, weights, scaling=s, rank=r, fan_in_fan_out=, ...)` makes all four: `weights` has `weight`
[N, K], or [K, N] if `fan_in_fan_out`. It computes in float32, as PEFT does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.encoders import Tensors, register, register_file, register_start


@register("residual")
def residual(inputs: Tensors, reads: Tensors, weights: Tensors, **settings: int | float | str) -> list[Tensor]:
    """The tables of B A - B0 A0.

    Args:
        inputs: `A` [r, K], `B` [N, r].
        reads: `A0`, `B0`, what they began as.

    Returns:
        [A; A0] [2 r, K] and [B, -B0]^T [2 r, N].
    """
    return [torch.cat([inputs["A"], reads["A0"]]), torch.cat([inputs["B"].T, -reads["B0"].T])]


register("residual_joined")(residual)


@register_file("residual_joined")
def joined_file(
    inputs: Tensors, reads: Tensors, weights: Tensors, *, stem: str, **settings: int | float | str
) -> dict[str, Tensor]:
    """The same as a LoRA of rank 2 r, where A0 and B0 cannot be computed again from W: [A; A0] and [B, -B0] under PEFT's keys.

    Args:
        stem: the beginning of the keys.
    """
    a, b = residual(inputs, reads, weights)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b.T}


@register_start("pissa")
def pissa(
    shape: tuple[int, ...],
    generator: torch.Generator,
    reads: Tensors,
    weights: Tensors,
    *,
    scaling: float,
    rank: int,
    fan_in_fan_out: bool = False,
    niter: int = -1,
    stem: str = "",
) -> dict[str, Tensor]:
    """PiSSA (arXiv 2404.02948): the r largest singular values of W, halved between A and B: s B A = U_r S_r V_r^T.

    Args:
        niter: subspace iterations of a randomised SVD (Halko et al., 2011, algorithms 4.4 and 5.1), as torch.svd_lowrank's, but
            drawn from `generator`; -1: the whole SVD.
    """
    weight = _weight(weights, fan_in_fan_out)
    if niter < 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = _svd_lowrank(weight, rank, niter, generator)
    root = (s[:rank] / scaling).sqrt()
    return _both(root[:, None] * vh[:rank], u[:, :rank] * root)


def _svd_lowrank(weight: Tensor, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.mH if wide else weight
    basis = torch.linalg.qr(tall @ torch.randn(tall.shape[1], rank, dtype=torch.float32, generator=generator).to(tall)).Q
    for _ in range(niter):
        basis = torch.linalg.qr(tall.mH @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mH @ tall, full_matrices=False)
    u = basis @ u
    return (vh.mH, s, u.mH) if wide else (u, s, vh)


@register_start("olora")
def olora(
    shape: tuple[int, ...],
    generator: torch.Generator,
    reads: Tensors,
    weights: Tensors,
    *,
    scaling: float,
    rank: int,
    fan_in_fan_out: bool = False,
    stem: str = "",
) -> dict[str, Tensor]:
    """OLoRA (arXiv 2406.01775): B A = Q_r R_r, the first r columns and rows of W = Q R; PEFT takes s times it out of W."""
    q, r = torch.linalg.qr(_weight(weights, fan_in_fan_out))
    return _both(r[:rank], q[:, :rank])


def orthogonal(shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with B A = 0 and neither of them zero, by PEFT's formula: random products with the odd and with the
    even rows of one random orthogonal matrix (datta0.github.io/posts/rethink-lora-init). W stays whole.

    Args:
        shape: r (even), K, N.
    """
    rank, features, outputs = shape
    assert rank % 2 == 0, f"the rank {rank} is odd"
    q = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float32, generator=generator)).Q
    a = torch.randn(features, rank // 2, dtype=torch.float32, generator=generator) @ q[0::2]
    b = torch.randn(rank // 2, outputs, dtype=torch.float32, generator=generator).T @ q[1::2]
    return a.T.contiguous() / 10, b / 10


def _weight(weights: Tensors, fan_in_fan_out: bool) -> Tensor:
    weight = weights["weight"].float()
    return weight.T if fan_in_fan_out else weight


def _both(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"A0": a, "B0": b, "A": a, "B": b}
