"""The meaning of mux::attention and mux::prefixed_attention in plain torch. Shape letters: see `codegen.reference`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of every packed sequence over itself.

    Args:
        q: [T, H, D]; k, v: [C + T, G, D]: query head h reads key/value head h // (H / G). The C rows before those of q's own
            positions come before the first sequence and are seen by it alone, as its own.
        cu_seqlens: [C + 1] int32, the ascending borders of the sequences; it begins with 0 and ends with T.
        bounds: [2] int32 on the CPU, upper bounds of the sequences' lengths and of how many there are: empty ones at the end need
            not count (this form has no use for either).
        scale: factor of the scores.
        window: a position sees itself and the `window - 1` before it; 0: all before it.

    Returns:
        out [T, H, D] and the log-sum-exp of the scaled scores [H, T] float32.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for rows, keys in sequences(cu_seqlens, k.shape[0] - q.shape[0]):
        scores = _scores(q[rows], k[keys], scale, window)  # [G, H/G, L, keys]
        top = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - top[..., None])
        out[rows] = join_heads(weights @ split_heads(v[keys], k.shape[1]).float()).to(q.dtype)
        lse[:, rows] = top.flatten(0, 1)
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` with respect to q, k and v, in closed form (FlashAttention-2, arXiv 2307.08691, section 2.3)."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = k.shape[1]
    for rows, keys in sequences(cu_seqlens, k.shape[0] - q.shape[0]):
        weights = torch.exp(_scores(q[rows], k[keys], scale, window) - lse[:, rows].unflatten(0, (groups, -1))[..., None])
        do = split_heads(grad[rows], groups).float()  # [G, H/G, L, D]
        delta = (do * split_heads(out[rows], groups).float()).sum(-1, keepdim=True)
        dscores = weights * (do @ split_heads(v[keys], groups).float().mT - delta) * scale
        dq[rows] = join_heads(dscores @ split_heads(k[keys], groups).float()).to(q.dtype)
        dk[keys] = (dscores.mT @ split_heads(q[rows], groups).float()).sum(1).transpose(0, 1).to(k.dtype)
        dv[keys] = (weights.mT @ do).sum(1).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


def prefixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """`attention`, where every position of a sequence also sees the prefix of its task (prefix tuning, arXiv 2101.00190).

    Args:
        q, k, v, cu_seqlens, bounds, scale: as in `attention`.
        kv: tables [S, 2 * G * P, D] in q's dtype, a slot's learned keys and behind them its values: P rows for key/value head
            0, then those of head 1, ...; each table has S and P of its own.
        lengths: for each table [S] float32 or int32, how many of these P rows are live.
        route: for each table [B] int32, see `tile_mm`; all rows of a sequence lie in blocks of one slot of one table.
        window: hides a sequence's own positions, as in `attention`; its prefix is always visible.

    Returns:
        out [T, H, D] and the log-sum-exp [H, T] float32 of the scaled scores, both over prefix and own positions.
    """
    groups = k.shape[1]
    outs, tops = [], []
    for rows, own_keys in sequences(cu_seqlens, k.shape[0] - q.shape[0]):
        slots = [int(own[rows.start * own.shape[0] // q.shape[0]]) for own in route]
        table = next((index for index, slot in enumerate(slots) if slot >= 0), 0)
        slot = slots[table]
        live = int(lengths[table][slot]) if slot >= 0 else 0
        keys, values = kv[table][slot].unflatten(0, (2, groups, 1, -1))[..., :live, :].float()  # [G, 1, live, D]
        before = split_heads(q[rows], groups).float() @ keys.mT * scale  # [G, H/G, L, live]
        scores = torch.cat([before, _scores(q[rows], k[own_keys], scale, window)], -1)
        top = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - top[..., None])
        seen = weights[..., :live] @ values + weights[..., live:] @ split_heads(v[own_keys], groups).float()
        outs.append(join_heads(seen).to(q.dtype))
        tops.append(top.flatten(0, 1))
    return torch.cat(outs), torch.cat(tops, 1)


def sequences(cu_seqlens: Tensor, before: int) -> Iterator[tuple[slice, slice]]:
    """The rows of every sequence, and those of its keys, where `before` rows of keys come before the first sequence's."""
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if stop > start:
            yield slice(start, stop), slice(start + before if start else 0, stop + before)


def split_heads(x: Tensor, groups: int) -> Tensor:
    """[L, H, D] -> [G, H/G, L, D]."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def join_heads(x: Tensor) -> Tensor:
    """[G, H/G, L, D] -> [L, H, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    scores = split_heads(q, k.shape[1]).float() @ split_heads(k, k.shape[1]).float().mT * scale  # [G, H/G, L, keys]
    return scores.masked_fill(hidden(q.shape[0], k.shape[0], window, q.device), -math.inf)


def hidden(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: what the last `queries` positions of a sequence of `keys` do not see."""
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return (distance < 0) | (distance >= window) if window else distance < 0
