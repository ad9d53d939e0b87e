"""mux::prefixed_attention: causal attention over packed sequences, each of which also sees its task's learned keys and values.

Prefix tuning (arXiv 2101.00190). A sequence's own part is what `mux::attention` computes, and its softmax goes on over the prefix
of its slot. Rows without a prefix are left as they are; nothing grows with the number of tasks but the tables.

Prefixes of several lengths come as several tables, each padded to a number of rows of its own. One width for all would depend on
who else is there, and a task's bits with it: a product's loops and the order of a sum follow from its columns, hidden or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.attention import apart, attention_form, behind, check_attention
from codegen.checks import check, check_device, check_route, describe

_OP = "prefixed_attention"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    cu_seqlens: Tensor,
    bounds: Tensor,
    window: int,
    before: Tensor | None,
) -> None:
    check_attention(_OP, q, k, v, cu_seqlens, bounds, window, before)
    for name, given in (("lengths", lengths), ("route", route)):
        check(len(given) == len(kv), f"{_OP}: {name} has {len(given)} entries, kv has {len(kv)} tables")
    for table, live, own in zip(kv, lengths, route, strict=True):
        _check_table(_OP, q, table, live, own, k.shape[1])
    check_device(_OP, q, k=k, v=v, kv=kv, lengths=lengths, route=route, cu_seqlens=cu_seqlens)


def _check_table(op: str, q: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, groups: int) -> None:
    size = q.shape[2]
    right = kv.dim() == 3 and kv.shape[0] > 0 and kv.shape[2] == size and kv.shape[1] > 0 and kv.shape[1] % (2 * groups) == 0
    check(right, f"{op}: kv must be [S, 2 * {groups} * P, {size}], got {describe(kv)}")
    check(kv.dtype == q.dtype, f"{op}: kv is {kv.dtype}, q is {q.dtype}")
    right = lengths.shape == kv.shape[:1] and lengths.dtype in (torch.float32, torch.int32)
    check(right, f"{op}: lengths must be torch.float32 or torch.int32 ({kv.shape[0]},), got {describe(lengths)}")
    check_route(op, "q", q[:, 0], route, None, kv.shape[0])


@torch.library.custom_op("mux::prefixed_attention", mutates_args=())
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
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference_attention.prefixed_attention`; `before` as in `mux::attention`.

    `window` bounds what a position sees of its own sequence; the prefix is always seen.
    """
    _check(q, k, v, kv, lengths, route, cu_seqlens, bounds, window, before)
    out, lse = attention_form(q.device, q.dtype).forward(q, *behind(before, k, v), cu_seqlens, bounds, scale, window)
    for tables in zip(kv, lengths, route, strict=True):
        (device if q.is_cuda else host).prefix_join(out, lse, q, *tables, scale, k.shape[1])
    return out, lse


@prefixed_attention.register_fake
def _(
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
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, kv, lengths, route, cu_seqlens, bounds, window, before)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


# With the log-sum-exp over all that a row sees, each part's gradients are those of attention over that part alone:
# P = exp(scale * Q K^T - lse);  delta = rowsum(dO * O);  dS = scale * P (dO V^T - delta);  dQ = dS K;  dK = dS^T Q;  dV = P^T dO
# (FlashAttention-2, arXiv 2307.08691, section 2.3).


@torch.library.custom_op("mux::prefixed_attention_backward", mutates_args=())
def prefixed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> list[Tensor]:
    """See `mux::attention_backward`."""
    _check(q, k, v, kv, lengths, route, cu_seqlens, bounds, window, before)
    dq, *rest = attention_form(q.device, q.dtype).backward(
        grad, q, *behind(before, k, v), out, lse, cu_seqlens, bounds, scale, window
    )
    for tables in zip(kv, lengths, route, strict=True):
        (device if q.is_cuda else host).prefix_queries(dq, grad, q, out, lse, *tables, scale, k.shape[1])
    return apart(before, dq, *rest)


@prefixed_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Sequence[Tensor],
    lengths: Sequence[Tensor],
    route: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> list[Tensor]:
    _check(q, k, v, kv, lengths, route, cu_seqlens, bounds, window, before)
    return [x.new_empty(x.shape) for x in (q, k, v, before) if x is not None]


def _check_rows(op: str, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, given in (("grad", grad), ("out", out)):
        right = given.shape == q.shape and given.dtype == q.dtype
        check(right, f"{op}: {name} is {describe(given)}, q is {describe(q)}")
    right = lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
    check(right, f"{op}: lse must be torch.float32 [H, T], got {describe(lse)}")


@torch.library.custom_op("mux::prefix_grad", mutates_args=())
def prefix_grad(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    kv: Tensor,
    lengths: Tensor,
    route: Tensor,
    scale: float,
    groups: int,
    slots: int,
) -> Tensor:
    """[slots, 2 * G * P, D] float32: `prefix_grad_` from zero."""
    table = kv.new_zeros(kv.shape, dtype=torch.float32)
    torch.ops.mux.prefix_grad_(table, grad, q, out, lse, kv, lengths, route, scale, groups)
    return table


@prefix_grad.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    kv: Tensor,
    lengths: Tensor,
    route: Tensor,
    scale: float,
    groups: int,
    slots: int,
) -> Tensor:
    return kv.new_empty(kv.shape, dtype=torch.float32)


@torch.library.custom_op("mux::prefix_grad_", mutates_args=("table",))
def prefix_grad_(
    table: Tensor,
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    kv: Tensor,
    lengths: Tensor,
    route: Tensor,
    scale: float,
    groups: int,
) -> None:
    """Add the gradient of the slots' keys and values to `table` in place, block after block: what a backward region calls."""
    _check_grad(table, grad, q, out, lse, kv, lengths, route, groups)
    (device if q.is_cuda else host).prefix_tables(table, grad, q, out, lse, kv, lengths, route, scale, groups)


@prefix_grad_.register_fake
def _(
    table: Tensor,
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    kv: Tensor,
    lengths: Tensor,
    route: Tensor,
    scale: float,
    groups: int,
) -> None:
    _check_grad(table, grad, q, out, lse, kv, lengths, route, groups)


def _check_grad(
    table: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, groups: int
) -> None:
    op = "prefix_grad_"
    _check_table(op, q, kv, lengths, route, groups)
    _check_rows(op, grad, q, out, lse)
    right = table.shape == kv.shape and table.dtype == torch.float32 and table.is_contiguous()
    check(right, f"{op}: table must be contiguous torch.float32 {tuple(kv.shape)}, got {describe(table)}")
    check_device(op, q, table=table, grad=grad, out=out, lse=lse, kv=kv, lengths=lengths, route=route)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv, lengths, route, cu_seqlens, bounds, scale, window, *before = inputs
    before = [x for x in before if x is not None]
    ctx.save_for_backward(q, k, v, cu_seqlens, bounds, *output, *kv, *lengths, *route, *before)
    ctx.scale, ctx.window, ctx.banks = scale, window, len(kv)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, bounds, out, lse, *tables = ctx.saved_tensors
    kv, lengths, route, before = (tables[start * ctx.banks : (start + 1) * ctx.banks] for start in range(4))
    dq = dk = dv = None
    dbefore: list[Tensor | None] = [None]
    dkv: list[Tensor | None] = [None] * ctx.banks
    if any(ctx.needs_input_grad[:3]):
        dq, dk, dv, *found = torch.ops.mux.prefixed_attention_backward(
            grad, q, k, v, kv, lengths, route, out, lse, cu_seqlens, bounds, ctx.scale, ctx.window, *before
        )
        dbefore = found or dbefore
    wanted = ctx.needs_input_grad[3]
    if wanted if isinstance(wanted, bool) else any(wanted):
        dkv = []
        for table, live, blocks in zip(kv, lengths, route, strict=True):
            found = torch.ops.mux.prefix_grad(grad, q, out, lse, table, live, blocks, ctx.scale, k.shape[1], table.shape[0])
            dkv.append(found if found.dtype == table.dtype else found.to(table.dtype))
    none = [None] * ctx.banks
    # As many as inputs were given: a `before` left out is none of them.
    return (dq, dk, dv, dkv, none, none, None, None, None, None, *dbefore)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("mux::prefixed_attention", _backward, setup_context=_setup)


def _rows(shapes: Any, k_shape: Any) -> int:
    """P of all tables."""
    return sum(shape[1] // (2 * k_shape[1]) for shape in shapes)


# Upper bounds of attention's part, as there; and of the prefix two products forwards, three for dq, four for its own gradient.


@register_flop_formula(torch.ops.mux.prefixed_attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, kv_shapes: Any, *args: Any, **kwargs: Any) -> int:
    tokens, heads, size = q_shape
    return 2 * tokens * heads * size * (tokens + 2 * _rows(kv_shapes, k_shape))


@register_flop_formula(torch.ops.mux.prefixed_attention_backward)
def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, kv_shapes: Any, *args: Any, **kwargs: Any) -> int:
    tokens, heads, size = q_shape
    return tokens * heads * size * (5 * tokens + 6 * _rows(kv_shapes, k_shape))


@register_flop_formula([torch.ops.mux.prefix_grad])
def _grad_flops(grad_shape: Any, q_shape: Any, seen_shape: Any, lse_shape: Any, kv_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _table_flops(q_shape, kv_shape, args[3])  # lengths, route, scale, groups, slots


@register_flop_formula([torch.ops.mux.prefix_grad_])
def _grad_into_flops(
    table_shape: Any, grad_shape: Any, q_shape: Any, seen_shape: Any, lse_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return _table_flops(q_shape, args[0], args[4])  # kv, lengths, route, scale, groups


def _table_flops(q_shape: Any, kv_shape: Any, groups: int) -> int:
    tokens, heads, size = q_shape
    return 8 * tokens * heads * size * (kv_shape[1] // (2 * groups))


PREFIXED_ATTENTION = torch.ops.mux.prefixed_attention.default
PREFIX_GRAD = torch.ops.mux.prefix_grad.default
PREFIX_GRAD_ = torch.ops.mux.prefix_grad_.default
