"""mux::prefixed_attention: causal attention over packed sequences, each of which also sees its task's learned keys and values.

Prefix tuning (arXiv 2101.00190). A sequence's own part is what `mux::attention` computes; the prefix's part is a product of each
block of rows with its slot's table; their log-sum-exps join them. Nothing grows with the number of tasks but the tables.

Prefixes of several lengths come as several tables, each padded to a number of rows of its own. One width for all would depend on
who else is there, and a task's bits with it: a product's loops and the order of a sum follow from its columns, hidden or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen.attention import attention_form, check_attention
from codegen.checks import check, check_device, check_route, describe

_OP = "prefixed_attention"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Sequence[Tensor],
    pv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    cu_seqlens: Tensor,
    window: int,
) -> None:
    check_attention(_OP, q, k, v, cu_seqlens, window)
    groups, size = k.shape[1:]
    for name, given in (("pv", pv), ("lengths", lengths), ("route", route)):
        check(len(given) == len(pk), f"{_OP}: {name} has {len(given)} entries, pk has {len(pk)} tables")
    for keys, values, live, own in zip(pk, pv, lengths, route, strict=True):
        for name, table in (("pk", keys), ("pv", values)):
            right = table.dim() == 3 and table.shape[0] > 0 and table.shape[2] == size
            right = right and table.shape[1] > 0 and table.shape[1] % groups == 0
            check(right, f"{_OP}: {name} must be [S, {groups} * P, {size}], got {describe(table)}")
            check(table.dtype == q.dtype, f"{_OP}: {name} is {table.dtype}, q is {q.dtype}")
        check(keys.shape == values.shape, f"{_OP}: pk is {tuple(keys.shape)}, pv is {tuple(values.shape)}")
        right = live.shape == keys.shape[:1] and live.dtype in (torch.float32, torch.int32)
        check(right, f"{_OP}: lengths must be torch.float32 or torch.int32 ({keys.shape[0]},), got {describe(live)}")
        check_route(_OP, "q", q[:, 0], own, None, keys.shape[0])
    check_device(_OP, q, k=k, v=v, pk=pk, pv=pv, lengths=lengths, route=route, cu_seqlens=cu_seqlens)


@torch.library.custom_op("mux::prefixed_attention", mutates_args=())
def prefixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Sequence[Tensor],
    pv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    cu_seqlens: Tensor,
    longest: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefixed_attention`. `window` bounds what a position sees of its own sequence; the prefix is always seen."""
    _check(q, k, v, pk, pv, lengths, route, cu_seqlens, window)
    own, own_lse = attention_form(q).forward(q, k, v, cu_seqlens, longest, scale, window)
    heads, groups = q.shape[1], k.shape[1]
    out, lse = own, own_lse
    for keys, values, live, blocks in zip(pk, pv, lengths, route, strict=True):
        slots, hidden = _slots(blocks, heads, groups), _hidden(live, blocks, keys.shape[1] // groups)
        scores = _scores(_by_block(q, blocks), _tables(keys, groups), slots, heads, scale).masked_fill(hidden, -math.inf)
        top = torch.logsumexp(scores, -1)  # [B, H, tile]
        joint = torch.logaddexp(own_lse, top.transpose(0, 1).flatten(1))
        weights = torch.exp(scores - _of_rows(joint, blocks)).to(q.dtype)
        seen = torch.ops.mux.tile_mm(weights.flatten(0, 2), _tables(values, groups), slots, None, False)
        share = torch.exp(own_lse - joint).t()[..., None]  # [T, H, 1]
        both = (own.float() * share + _by_token(seen, heads, blocks).float()).to(q.dtype)
        # Rows of nobody keep attention's own bits, and those of other tables what these gave them.
        routed = (blocks >= 0).repeat_interleave(q.shape[0] // blocks.shape[0])
        out, lse = torch.where(routed[:, None, None], both, out), torch.where(routed, joint, lse)
    return out.contiguous(), lse.contiguous()


@prefixed_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Sequence[Tensor],
    pv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    cu_seqlens: Tensor,
    longest: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, pk, pv, lengths, route, cu_seqlens, window)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, pk, pv, lengths, route, cu_seqlens, longest, scale, window = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, longest, *output, *pk, *pv, *lengths, *route)
    ctx.scale, ctx.window, ctx.banks = scale, window, len(pk)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    """With the log-sum-exp over all that a row sees, each part's gradients are those of attention over that part alone.

    P = exp(scale * Q K^T - lse);  delta = rowsum(dO * O);  dS = scale * P (dO V^T - delta);  dQ = dS K;  dK = dS^T Q;  dV = P^T dO
    (FlashAttention-2, arXiv 2307.08691, section 2.3).
    """
    q, k, v, cu_seqlens, longest, out, lse, *tables = ctx.saved_tensors
    pk, pv, lengths, route = (tables[start * ctx.banks : (start + 1) * ctx.banks] for start in range(4))
    wants_q, wants_k, wants_v, wants_pk, wants_pv = (_any(wanted) for wanted in ctx.needs_input_grad[:5])
    dq = dk = dv = None
    if wants_q or wants_k or wants_v:
        dq, dk, dv = torch.ops.mux.attention_backward(grad, q, k, v, out, lse, cu_seqlens, longest, ctx.scale, ctx.window)
    heads, groups = q.shape[1], k.shape[1]
    products = (grad.float() * out.float()).sum(-1).t()  # [H, T]
    dpk, dpv = [], []
    for own_keys, own_values, live, blocks in zip(pk, pv, lengths, route, strict=True):
        slots, hidden = _slots(blocks, heads, groups), _hidden(live, blocks, own_keys.shape[1] // groups)
        queries, dout, keys = _by_block(q, blocks), _by_block(grad, blocks), _tables(own_keys, groups)
        scores = _scores(queries, keys, slots, heads, ctx.scale)
        # What is hidden is exactly 0, whatever its row holds.
        weights = torch.exp(scores - _of_rows(lse, blocks)).masked_fill(hidden, 0.0)  # [B, H, tile, P]
        delta = _of_rows(products, blocks)
        dscores = weights * (_products(dout, _tables(own_values, groups), slots, heads) - delta) * ctx.scale
        ds = dscores.masked_fill(hidden, 0.0).to(q.dtype).flatten(0, 2)
        if dq is not None:
            dq = dq + _by_token(torch.ops.mux.tile_mm(ds, keys, slots, None, False), heads, blocks)
        if wants_pk:
            found = torch.ops.mux.tile_outer(ds, queries, slots, None, keys.shape[0])
            dpk.append(found.view(own_keys.shape).to(own_keys.dtype))
        if wants_pv:
            p = weights.to(q.dtype).flatten(0, 2)
            found = torch.ops.mux.tile_outer(p, dout, slots, None, keys.shape[0])
            dpv.append(found.view(own_values.shape).to(own_values.dtype))
    none = [None] * ctx.banks
    return dq, dk, dv, dpk if wants_pk else none, dpv if wants_pv else none, none, none, None, None, None, None


def _any(wanted: bool | Sequence[bool]) -> bool:
    return wanted if isinstance(wanted, bool) else any(wanted)


torch.library.register_autograd("mux::prefixed_attention", _backward, setup_context=_setup)


# The products run over blocks of `tile` rows of one query head: [T, H, D] -> [B, H, tile, D]. So a block has as many rows as in
# any other operator, whatever H / G is, and its slot is the P rows of the prefix that belong to its key/value head.


def _by_block(x: Tensor, route: Tensor) -> Tensor:
    """[T, H, D] -> [B * H * tile, D]."""
    return x.unflatten(0, (route.shape[0], -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _by_token(rows: Tensor, heads: int, route: Tensor) -> Tensor:
    """[B * H * tile, D] -> [T, H, D]."""
    return rows.unflatten(0, (route.shape[0], heads, -1)).transpose(1, 2).flatten(0, 1)


def _of_rows(x: Tensor, route: Tensor) -> Tensor:
    """[H, T] -> [B, H, tile, 1]."""
    return x.unflatten(1, (route.shape[0], -1)).transpose(0, 1)[..., None]


def _tables(table: Tensor, groups: int) -> Tensor:
    """[S, G * P, D] -> [S * G, P, D]."""
    return table.reshape(table.shape[0] * groups, -1, table.shape[2])


def _slots(route: Tensor, heads: int, groups: int) -> Tensor:
    """[B * H] int32: the slot of `_tables` that a block of one query head reads, or -1."""
    group = torch.arange(heads, dtype=torch.int32, device=route.device) // (heads // groups)
    return (route[:, None] * groups + group).masked_fill(route[:, None] < 0, -1).flatten()


def _hidden(lengths: Tensor, route: Tensor, rows: int) -> Tensor:
    """[B, 1, 1, P] bool: which prefix rows a block does not see: those past its slot's length, and all if it has no slot."""
    live = lengths.index_select(0, route.clamp(min=0)).masked_fill(route < 0, 0)
    return (torch.arange(rows, device=route.device) >= live[:, None])[:, None, None]


def _scores(rows: Tensor, table: Tensor, slots: Tensor, heads: int, scale: float) -> Tensor:
    """Scaled products with the keys, [B, H, tile, P]; multiplied in float32, as flash attention keeps its scores.

    Where scores deviate by 6, rounding them to bfloat16 put dpk 2.5 times as far from float32 as torch's sdpa is, dq 2.3 times;
    this way it is 1.3 and 1.4 times.
    """
    return _products(rows.float(), table.float(), slots, heads) * scale


def _products(rows: Tensor, table: Tensor, slots: Tensor, heads: int) -> Tensor:
    """[B * H * tile, D] times the transposed tables [S * G, P, D]: [B, H, tile, P] float32."""
    products = torch.ops.mux.tile_mm(rows, table, slots, None, True).float()
    return products.view(-1, heads, rows.shape[0] // slots.shape[0], table.shape[1])


@register_flop_formula(torch.ops.mux.prefixed_attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, pk_shapes: Any, *args: Any, **kwargs: Any) -> int:
    # An upper bound of attention's part, as there, and two products with every prefix row.
    tokens, heads, size = q_shape
    return 2 * tokens * heads * size * (tokens + 2 * sum(shape[1] // k_shape[1] for shape in pk_shapes))


PREFIXED_ATTENTION = torch.ops.mux.prefixed_attention.default
