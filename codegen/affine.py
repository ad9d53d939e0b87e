"""mux::tile_affine and mux::tile_sum: a scale and a shift of each task's own rows, which learned vectors are applied by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.checks import check, check_device, check_route, describe


def _check_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> None:
    op = "tile_affine"
    check(x.dim() >= 2, f"{op}: x must be [..., N], got {describe(x)}")
    rows = x.reshape(-1, x.shape[-1])
    check(scale is not None or shift is not None or otherwise is not None, f"{op}: there is neither scale, shift nor otherwise")
    check(base is None or shift is not None, f"{op}: base is what a shift replaces: there is no shift")
    slots = 0  # without a table every slot is one
    for name, table in (("scale", scale), ("shift", shift)):
        if table is not None:
            slots = table.shape[0]
            right = table.dim() == 3 and table.shape[1:] == (1, x.shape[-1]) and table.dtype == x.dtype and table.is_contiguous()
            check(right, f"{op}: {name} must be contiguous {x.dtype} [S, 1, {x.shape[-1]}], got {describe(table)}")
    if scale is not None and shift is not None:
        check(scale.shape == shift.shape, f"{op}: scale is {tuple(scale.shape)}, shift is {tuple(shift.shape)}")
    check_route(op, "x", rows, route, None, slots)
    if base is not None:
        right = base.shape == (x.shape[-1],) and base.is_contiguous()
        check(right, f"{op}: base must be contiguous [{x.shape[-1]}], got {describe(base)}")
    if otherwise is not None:
        right = otherwise.shape == x.shape and otherwise.dtype == x.dtype
        check(right, f"{op}: otherwise is {describe(otherwise)}, x is {describe(x)}")
    check_device(op, x, scale=scale, shift=shift, base=base, route=route, otherwise=otherwise)


@torch.library.custom_op("mux::tile_affine", mutates_args=())
def tile_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> Tensor:
    _check_affine(x, scale, shift, base, route, otherwise)
    return (device if x.is_cuda else host).tile_affine(x, scale, shift, base, route, otherwise)


@tile_affine.register_fake
def _(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> Tensor:
    _check_affine(x, scale, shift, base, route, otherwise)
    return x.new_empty(x.shape)


def _check_sum(op: str, a: Tensor, b: Tensor | None, route: Tensor, slots: int) -> None:
    check(a.dim() >= 2, f"{op}: a must be [..., N], got {describe(a)}")
    check_route(op, "a", a.reshape(-1, a.shape[-1]), route, None, slots)
    right = b is None or (b.shape == a.shape and b.dtype == a.dtype)
    check(right, f"{op}: b is {'None' if b is None else describe(b)}, a is {describe(a)}")
    check_device(op, a, b=b, route=route)


@torch.library.custom_op("mux::tile_sum", mutates_args=())
def tile_sum(a: Tensor, b: Tensor | None, route: Tensor, slots: int) -> Tensor:
    """[slots, 1, N] float32: `tile_sum_` from zero."""
    _check_sum("tile_sum", a, b, route, slots)
    grad = a.new_zeros(slots, 1, a.shape[-1], dtype=torch.float32)
    (device if a.is_cuda else host).tile_sum(grad, a, b, route)
    return grad


@tile_sum.register_fake
def _(a: Tensor, b: Tensor | None, route: Tensor, slots: int) -> Tensor:
    _check_sum("tile_sum", a, b, route, slots)
    return a.new_empty(slots, 1, a.shape[-1], dtype=torch.float32)


def _check_grad(grad: Tensor, a: Tensor) -> None:
    shape = (grad.shape[0], 1, a.shape[-1])
    right = grad.shape == shape and grad.dtype == torch.float32 and grad.is_contiguous()
    check(right, f"tile_sum_: grad must be contiguous torch.float32 {shape}, got {describe(grad)}")
    check_device("tile_sum_", a, grad=grad)


@torch.library.custom_op("mux::tile_sum_", mutates_args=("grad",))
def tile_sum_(grad: Tensor, a: Tensor, b: Tensor | None, route: Tensor) -> None:
    """Add to `grad` in place: what a backward region calls."""
    _check_sum("tile_sum_", a, b, route, grad.shape[0])
    _check_grad(grad, a)
    (device if a.is_cuda else host).tile_sum(grad, a, b, route)


@tile_sum_.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor | None, route: Tensor) -> None:
    _check_sum("tile_sum_", a, b, route, grad.shape[0])
    _check_grad(grad, a)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, _, route, otherwise = inputs
    ctx.save_for_backward(x if scale is not None else None, scale, route)
    ctx.slots = next((own.shape[0] for own in (scale, shift) if own is not None), 0)
    ctx.dtype, ctx.otherwise = x.dtype, otherwise is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, route = ctx.saved_tensors
    wants_x, wants_scale, wants_shift, _, _, wants_otherwise = ctx.needs_input_grad
    dx = dscale = dshift = dotherwise = None
    if wants_x:
        # Rows that came from `otherwise` have nothing to do with x.
        rest = torch.zeros_like(dy) if ctx.otherwise else None
        if scale is not None:
            dx = torch.ops.mux.tile_affine(dy, scale, None, None, route, rest)
        else:
            dx = dy if rest is None else _others(dy, route, owned=True)
    if wants_scale:
        dscale = torch.ops.mux.tile_sum(dy, x, route, ctx.slots)
        dscale = dscale if ctx.dtype == dscale.dtype else dscale.to(ctx.dtype)
    if wants_shift:
        dshift = torch.ops.mux.tile_sum(dy, None, route, ctx.slots)
        dshift = dshift if ctx.dtype == dshift.dtype else dshift.to(ctx.dtype)
    if wants_otherwise:
        dotherwise = _others(dy, route, owned=False)
    return dx, dscale, dshift, None, None, dotherwise


def _others(dy: Tensor, route: Tensor, *, owned: bool) -> Tensor:
    """dy in the rows that have a slot, or in those that have none; zero in the rest."""
    rows = dy.reshape(route.shape[0], -1, dy.shape[-1])
    kept = (route >= 0) if owned else (route < 0)
    return torch.where(kept[:, None, None], rows, torch.zeros_like(rows)).reshape(dy.shape)


torch.library.register_autograd("mux::tile_affine", _backward, setup_context=_setup)


@register_flop_formula([torch.ops.mux.tile_affine])
def _affine_flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x_shape).numel()


@register_flop_formula([torch.ops.mux.tile_sum])
def _sum_flops(a_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(a_shape).numel()


@register_flop_formula([torch.ops.mux.tile_sum_])
def _sum_into_flops(grad_shape: Any, a_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(a_shape).numel()


TILE_AFFINE = torch.ops.mux.tile_affine.default
TILE_SUM = torch.ops.mux.tile_sum.default
TILE_SUM_ = torch.ops.mux.tile_sum_.default
