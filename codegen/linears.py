"""mux::linears: the frozen linears of one input with everyone's low-rank adapters, forward and backward.

One node whatever the number of tasks: which products run, in which order, is the lowering's choice (`codegen.lower`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.checks import check, check_blocks, check_counters, check_device, check_keys, check_route, check_sites, describe
from codegen.layout import check_banks


def _check_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
) -> None:
    check(x.dim() >= 2, f"linears: x must be [..., T, K], got {describe(x)}")
    features, tokens = x.shape[-1], x.shape[:-1].numel()
    check(len(weights) > 0, "linears: weights is empty")
    check(len(biases) == len(weights), f"linears: biases has {len(biases)} entries, weights has {len(weights)}")
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        right = weight.dim() == 2 and weight.shape[1] == features and weight.dtype == x.dtype
        check(right, f"linears: weights[{index}] must be {x.dtype} [N, {features}], got {describe(weight)}")
        dense = 1 in weight.stride()
        check(dense, f"linears: weights[{index}] has strides {weight.stride()}, one of them must be 1")
        if bias is not None:
            right = bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()
            check(right, f"linears: biases[{index}] must be contiguous {x.dtype} ({weight.shape[0]},), got {describe(bias)}")
    check(len(route) == len(a), f"linears: route has {len(route)} entries, a has {len(a)} tables")
    check(len(scale) == len(b), f"linears: scale has {len(scale)} entries, b has {len(b)} tables")
    for name, tables in (("a", a), ("b", b)):
        for index, table in enumerate(tables):
            right = table.dim() == 3 and table.dtype == x.dtype and table.is_contiguous()
            check(right, f"linears: {name}[{index}] must be contiguous {x.dtype} [S, R, F], got {describe(table)}")
    banks = check_banks(a, b, len(weights), members)
    check(len(drops) == len(a), f"linears: drops has {len(drops)} entries, a has {len(a)} tables")
    for index, (table, own, places) in enumerate(zip(a, route, banks, strict=True)):
        check(table.shape[2] == features, f"linears: a[{index}] has {table.shape[2]} features, x has {features}")
        check_route("linears", "x", x.reshape(tokens, features), own, None, table.shape[0], f"route[{index}]")
        check(own.shape == route[0].shape, f"linears: route[{index}] has {own.shape[0]} blocks, route[0] has {route[0].shape[0]}")
        for place in places:
            shape = (table.shape[0], b[places.start].shape[1], weights[members[place]].shape[0])
            check(b[place].shape == shape, f"linears: b[{place}] must be {shape}, got {describe(b[place])}")
            own = scale[place]
            right = own.shape == shape[:1] and own.dtype == torch.float32 and own.is_contiguous()
            check(right, f"linears: scale[{place}] must be contiguous torch.float32 ({shape[0]},), got {describe(own)}")
    dropping = [index for index, own in enumerate(drops) if own]
    check(len(drop) == len(dropping), f"linears: drop has {len(drop)} entries, {len(dropping)} banks drop")
    check(len(sites) == len(dropping), f"linears: sites has {len(sites)} entries, {len(dropping)} banks drop")
    for index, (bank, keys, own) in enumerate(zip(dropping, drop, sites, strict=True)):
        check_keys("linears", f"drop[{index}]", keys, a[bank].shape[0])
        check_sites("linears", f"sites[{index}]", own, len(banks[bank]))
    if dropping:
        check_counters("linears", tokens, sequences=sequences, positions=positions)
    given = {"a": a, "b": b, "scale": scale, "route": route, "drop": drop, "sites": sites}
    check_device("linears", x, weights=weights, biases=biases, **given, sequences=sequences, positions=positions)
    if x.is_cuda and route:
        check_blocks("linears", tokens, route[0].shape[0])


@torch.library.custom_op("mux::linears", mutates_args=())
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> list[Tensor]:
    """See `reference.linears`. `forms` is `codegen.lower.Forms` as text; "" lets the operator choose."""
    _check_linears(x, weights, biases, a, b, scale, route, drop, sites, sequences, positions, members, drops)
    run = device.linears if x.is_cuda else host.linears
    return run(x, weights, biases, a, b, scale, route, drop, sites, sequences, positions, members, drops, forms)


@linears.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> list[Tensor]:
    _check_linears(x, weights, biases, a, b, scale, route, drop, sites, sequences, positions, members, drops)
    width = max((table.shape[1] for table in a), default=0)
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(x.shape[:-1].numel(), width)]


@torch.library.custom_op("mux::linears_backward", mutates_args=())
def linears_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    wants_dx: bool,
    forms: str,
) -> list[Tensor]:
    """[*da, *db, dx if wanted]: `linears_backward_` from zero."""
    grads = [table.new_zeros(table.shape, dtype=torch.float32) for table in (*a, *b)]
    dx = x.new_empty(x.shape) if wants_dx else None
    linears_backward_(
        grads, dx, dy, x, narrow, weights, a, b, scale, route, drop, sites, sequences, positions, members, drops, forms
    )
    return [*grads, *([] if dx is None else [dx])]


@linears_backward.register_fake
def _(
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    wants_dx: bool,
    forms: str,
) -> list[Tensor]:
    grads = [table.new_empty(table.shape, dtype=torch.float32) for table in (*a, *b)]
    return [*grads, *([x.new_empty(x.shape)] if wants_dx else [])]


@torch.library.custom_op("mux::linears_backward_", mutates_args=("grads", "dx"))
def linears_backward_(
    grads: Sequence[Tensor],
    dx: Tensor | None,
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> None:
    """Add to the float32 gradients of the tables [*a, *b]; write dx if it is there."""
    _check_backward(grads, dx, dy, x, narrow, weights, a, b)
    _check_linears(x, weights, [None] * len(weights), a, b, scale, route, drop, sites, sequences, positions, members, drops)
    run = device.linears_backward if x.is_cuda else host.linears_backward
    run(grads, dx, dy, x, narrow, weights, a, b, scale, route, drop, sites, sequences, positions, members, drops, forms)


@linears_backward_.register_fake
def _(
    grads: Sequence[Tensor],
    dx: Tensor | None,
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> None:
    _check_backward(grads, dx, dy, x, narrow, weights, a, b)


def _check_backward(
    grads: Sequence[Tensor],
    dx: Tensor | None,
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> None:
    check(len(dy) == len(weights), f"linears_backward: dy has {len(dy)} entries, weights has {len(weights)}")
    for index, (own, weight) in enumerate(zip(dy, weights, strict=True)):
        shape = (*x.shape[:-1], weight.shape[0])
        right = own.shape == shape and own.dtype == x.dtype
        check(right, f"linears_backward: dy[{index}] must be {x.dtype} {tuple(shape)}, got {describe(own)}")
    shape = (x.shape[:-1].numel(), max((table.shape[1] for table in a), default=0))
    right = narrow.shape == shape and narrow.dtype == x.dtype and narrow.is_contiguous()
    check(right, f"linears_backward: narrow must be contiguous {x.dtype} {shape}, got {describe(narrow)}")
    tables = [*a, *b]
    check(len(grads) == len(tables), f"linears_backward: grads has {len(grads)} entries, there are {len(tables)} tables")
    for index, (grad, table) in enumerate(zip(grads, tables, strict=True)):
        right = grad.shape == table.shape and grad.dtype == torch.float32 and grad.is_contiguous()
        check(
            right, f"linears_backward: grads[{index}] must be contiguous torch.float32 {tuple(table.shape)}, got {describe(grad)}"
        )
    if dx is not None:
        right = dx.shape == x.shape and dx.dtype == x.dtype and dx.is_contiguous()
        check(right, f"linears_backward: dx must be contiguous {x.dtype} {tuple(x.shape)}, got {describe(dx)}")
    check_device("linears_backward", x, grads=grads, dx=dx, dy=dy, narrow=narrow)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, a, b, scale, route, drop, sites, sequences, positions, members, drops, forms = inputs
    ctx.save_for_backward(x, output[-1], *weights, *a, *b, *scale, *route, *drop, *sites, sequences, positions)
    ctx.lengths = [len(given) for given in (weights, a, b, scale, route, drop, sites)]
    ctx.static = (members, drops, forms)
    # torch wants Nones in the structure that it sees in the inputs: a list is one if it holds tensors alone, or nothing.
    ctx.like_biases = [None] * len(biases) if all(bias is not None for bias in biases) else None
    ctx.like_lists = [None if given else [] for given in (members, drops)]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, narrow, *rest = ctx.saved_tensors
    lists = []
    for length in ctx.lengths:
        lists.append(rest[:length])
        rest = rest[length:]
    weights, a, b, scale, route, drop, sites = lists
    members, drops, forms = ctx.static
    dy = [
        x.new_zeros(*x.shape[:-1], weight.shape[0]) if grad is None else grad
        for grad, weight in zip(grads[:-1], weights, strict=True)
    ]
    wants_dx = ctx.needs_input_grad[0]
    found = torch.ops.mux.linears_backward(
        dy, x, narrow, weights, a, b, scale, route, drop, sites, *rest, members, drops, wants_dx, forms
    )
    # Gradients are float32 whatever x is; autograd wants them in the table's dtype.
    tables = [grad.to(x.dtype) for grad in found[: len(a) + len(b)]]
    nothing = [[None] * length for length in ctx.lengths]
    dx = found[-1] if wants_dx else None
    return dx, nothing[0], ctx.like_biases, tables[: len(a)], tables[len(a) :], *nothing[3:], None, None, *ctx.like_lists, None


torch.library.register_autograd("mux::linears", _backward, setup_context=_setup)


def _adapter_flops(tokens: int, a_shapes: Sequence[Any], b_shapes: Sequence[Any]) -> int:
    """One product of every row with the A and the B tables of the widest bank: a block is in one bank at most."""
    found, start = 0, 0
    for shape in a_shapes:
        count = shape[1] // b_shapes[start][1]
        found = max(found, shape[1] * shape[2] + sum(own[1] * own[2] for own in b_shapes[start : start + count]))
        start += count
    return 2 * tokens * found


@register_flop_formula(torch.ops.mux.linears)
def _linears_flops(x: Any, weights: Any, biases: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    tokens = torch.Size(x[:-1]).numel()
    return 2 * tokens * sum(shape[0] * shape[1] for shape in weights) + _adapter_flops(tokens, a, b)


@register_flop_formula(torch.ops.mux.linears_backward)
def _linears_backward_flops(dy: Any, x: Any, narrow: Any, weights: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    *_, wants_dx, _forms = args
    return _backward_flops(x, weights, a, b, wants_dx)


@register_flop_formula(torch.ops.mux.linears_backward_)
def _linears_backward_into_flops(
    grads: Any, dx: Any, dy: Any, x: Any, narrow: Any, weights: Any, a: Any, b: Any, *args: Any, **kwargs: Any
) -> int:
    return _backward_flops(x, weights, a, b, dx is not None)


def _backward_flops(x: Any, weights: Any, a: Any, b: Any, wants_dx: bool) -> int:
    tokens = torch.Size(x[:-1]).numel()
    frozen = 2 * tokens * sum(shape[0] * shape[1] for shape in weights) if wants_dx else 0
    return frozen + 2 * _adapter_flops(tokens, a, b)


LINEARS = torch.ops.mux.linears.default
LINEARS_BACKWARD = torch.ops.mux.linears_backward.default
LINEARS_BACKWARD_ = torch.ops.mux.linears_backward_.default
