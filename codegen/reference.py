"""The meaning of every mux op in plain torch: what every other form is tested against.

Shape letters: T tokens of a chunk, H query heads, G key/value heads (H a multiple of G), D head size, S slots of a table,
R adapter rank, K and N features, B = T / tile blocks of `tile` rows.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """Multiply every block of rows with the matrix of its own slot.

    y[b] = scale[route[b]] * x[b] @ w[route[b]]      (w transposed if `transpose`)

    Args:
        x: [T, K]; `T` is a multiple of the number of blocks.
        w: [S, K, N], or [S, N, K] with `transpose`; x's dtype.
        route: [B] int32, the slot of each block; -1: the block has none and its rows are 0.
        scale: [S] float32 or None.
        transpose: use w[s]^T.

    Returns:
        [T, N] in x's dtype. Rows of one block depend on that block and its slot alone, whatever the others hold.
    """
    blocks = []
    for rows, slot in zip(x.unflatten(0, (route.shape[0], -1)), route.tolist(), strict=True):
        if slot < 0:
            blocks.append(x.new_zeros(rows.shape[0], w.shape[1 if transpose else 2]))
        else:
            y = rows @ (w[slot].T if transpose else w[slot])
            blocks.append(y if scale is None else (y * scale[slot]).to(x.dtype))
    return torch.cat(blocks)


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """The weight gradient of `tile_mm`, added to `grad` in place.

    grad[s] += scale[s] * a[b]^T b[b], for the blocks b of slot s one after another

    The sum is strictly sequential, so it depends on a slot's own blocks and their order, not on where in the chunk, or in
    which of several chunks, they lie.

    Args:
        grad: [S, K, N] float32.
        a: [T, K].
        b: [T, N].
        route, scale: as in `tile_mm`.
    """
    size = a.shape[0] // route.shape[0]
    for block, slot in enumerate(route.tolist()):
        if slot >= 0:
            rows = slice(block * size, (block + 1) * size)
            product = a[rows].float().T @ b[rows].float()
            grad[slot] += product if scale is None else scale[slot] * product


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of every packed sequence over itself.

    Args:
        q: [T, H, D]; k, v: [T, G, D]: query head h reads key/value head h // (H / G).
        cu_seqlens: [C + 1] int32, the ascending borders of the sequences; it begins with 0 and ends with T.
        longest: [] int32 on the CPU, an upper bound of the sequences' lengths (this form has no use for it).
        scale: factor of the scores.
        window: a position sees itself and the `window - 1` before it; 0: all before it.

    Returns:
        out [T, H, D] and the log-sum-exp of the scaled scores [H, T] float32.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for start, stop in _sequences(cu_seqlens):
        scores = _scores(q[start:stop], k[start:stop], scale, window)  # [G, H/G, L, L]
        top = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - top[..., None])
        out[start:stop] = _join(weights @ _split(v[start:stop], k.shape[1]).float()).to(q.dtype)
        lse[:, start:stop] = top.flatten(0, 1)
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` with respect to q, k and v, in closed form (FlashAttention-2, arXiv 2307.08691, section 2.3)."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = k.shape[1]
    for start, stop in _sequences(cu_seqlens):
        rows = slice(start, stop)
        weights = torch.exp(_scores(q[rows], k[rows], scale, window) - lse[:, rows].unflatten(0, (groups, -1))[..., None])
        do = _split(grad[rows], groups).float()  # [G, H/G, L, D]
        delta = (do * _split(out[rows], groups).float()).sum(-1, keepdim=True)
        dscores = weights * (do @ _split(v[rows], groups).float().mT - delta) * scale
        dq[rows] = _join(dscores @ _split(k[rows], groups).float()).to(q.dtype)
        dk[rows] = (dscores.mT @ _split(q[rows], groups).float()).sum(1).transpose(0, 1).to(k.dtype)
        dv[rows] = (weights.mT @ do).sum(1).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


def _sequences(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    borders = cu_seqlens.tolist()
    return [(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


def _split(x: Tensor, groups: int) -> Tensor:
    """[L, H, D] -> [G, H/G, L, D]."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _join(x: Tensor) -> Tensor:
    """[G, H/G, L, D] -> [L, H, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    groups, length = k.shape[1], q.shape[0]
    scores = _split(q, groups).float() @ _split(k, groups).float().mT * scale  # [G, H/G, L, L]
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return scores.masked_fill(hidden, -math.inf)
