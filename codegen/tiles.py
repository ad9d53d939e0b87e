"""mux::tile_mm and mux::tile_outer: products of blocks of rows with their own slot's matrix, which adapters are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.checks import check, check_counters, check_device, check_keys, check_route, check_sites, describe


def _check_tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> None:
    check(w.dim() == 3, f"tile_mm: w must be [S, K, N], got {describe(w)}")
    check_route("tile_mm", "x", x, route, scale, w.shape[0])
    fits = w.shape[2 if transpose else 1] == x.shape[1]
    check(fits, f"tile_mm: x has {x.shape[1]} features, w is {tuple(w.shape)} (transpose={transpose})")
    check(w.dtype == x.dtype, f"tile_mm: w is {w.dtype}, x is {x.dtype}")
    check_device("tile_mm", x, w=w, route=route, scale=scale)


def _check_tile_outer(op: str, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> None:
    check_route(op, "a", a, route, scale, slots)
    check(b.dim() == 2 and b.shape[0] == a.shape[0], f"{op}: b must be [T, N] with a's {a.shape[0]} rows, got {describe(b)}")
    check(b.dtype == a.dtype, f"{op}: b is {b.dtype}, a is {a.dtype}")
    check_device(op, a, b=b, route=route, scale=scale)


def _check_grad(grad: Tensor, a: Tensor, b: Tensor) -> None:
    shape = (grad.shape[0], a.shape[1], b.shape[1])
    right = grad.shape == shape and grad.dtype == torch.float32
    check(right, f"tile_outer_: grad is {tuple(grad.shape)} {grad.dtype}, must be {shape} torch.float32")
    check(grad.is_contiguous(), f"tile_outer_: grad has strides {grad.stride()}, must be contiguous")
    check_device("tile_outer_", a, grad=grad)


@torch.library.custom_op("mux::tile_mm", mutates_args=())
def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    _check_tile_mm(x, w, route, scale, transpose)
    return (device if x.is_cuda else host).tile_mm(x, w, route, scale, transpose)


@tile_mm.register_fake
def _(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    _check_tile_mm(x, w, route, scale, transpose)
    return x.new_empty(x.shape[0], w.shape[1] if transpose else w.shape[2])


@torch.library.custom_op("mux::tile_outer", mutates_args=())
def tile_outer(a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> Tensor:
    """[slots, K, N] float32: `tile_outer_` from zero."""
    _check_tile_outer("tile_outer", a, b, route, scale, slots)
    grad = a.new_zeros(slots, a.shape[1], b.shape[1], dtype=torch.float32)
    (device if a.is_cuda else host).tile_outer(grad, a, b, route, scale)
    return grad


@tile_outer.register_fake
def _(a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> Tensor:
    _check_tile_outer("tile_outer", a, b, route, scale, slots)
    return a.new_empty(slots, a.shape[1], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("mux::tile_outer_", mutates_args=("grad",))
def tile_outer_(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """Add to `grad` in place: what a backward region calls, so that a gradient exists once."""
    _check_tile_outer("tile_outer_", a, b, route, scale, grad.shape[0])
    _check_grad(grad, a, b)
    (device if a.is_cuda else host).tile_outer(grad, a, b, route, scale)


@tile_outer_.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    _check_tile_outer("tile_outer_", a, b, route, scale, grad.shape[0])
    _check_grad(grad, a, b)


def _tile_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, route, scale, transpose = inputs
    ctx.save_for_backward(x, w, route, scale)
    ctx.transpose = transpose


def _tile_mm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, route, scale = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.mux.tile_mm(dy, w, route, scale, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        a, b = (dy, x) if ctx.transpose else (x, dy)
        dw = torch.ops.mux.tile_outer(a, b, route, scale, w.shape[0])
        # `tile_outer` is float32 whatever x is; autograd wants the gradient in the weight's dtype.
        dw = dw if w.dtype == dw.dtype else dw.to(w.dtype)
    return dx, dw, None, None, None


torch.library.register_autograd("mux::tile_mm", _tile_mm_backward, setup_context=_tile_mm_setup)


@register_flop_formula(torch.ops.mux.tile_mm)
def _tile_mm_flops(x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula([torch.ops.mux.tile_outer])
def _tile_outer_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@register_flop_formula([torch.ops.mux.tile_outer_])
def _tile_outer_into_flops(grad_shape: Any, a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@torch.library.custom_op("mux::drop", mutates_args=())
def drop(x: Tensor, keys: Tensor, sites: Tensor, route: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """x [T, K] with each row's elements dropped as its own slot says (`reference.dropout_factor`); sites [1, 2]."""
    _check_drop(x, keys, sites, route, sequences, positions)
    return (device if x.is_cuda else host).drop(x, keys, sites, route, sequences, positions)


@drop.register_fake
def _(x: Tensor, keys: Tensor, sites: Tensor, route: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    _check_drop(x, keys, sites, route, sequences, positions)
    return x.new_empty(x.shape)


def _check_drop(x: Tensor, keys: Tensor, sites: Tensor, route: Tensor, sequences: Tensor, positions: Tensor) -> None:
    check(keys.dim() == 2, f"drop: keys must be torch.int32 [S, 3], got {describe(keys)}")
    check_route("drop", "x", x, route, None, keys.shape[0])
    check_keys("drop", "keys", keys, keys.shape[0])
    check_sites("drop", "sites", sites, 1)
    check_counters("drop", x.shape[0], sequences=sequences, positions=positions)
    check_device("drop", x, keys=keys, sites=sites, route=route, sequences=sequences, positions=positions)


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _drop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.mux.drop(grad, *ctx.saved_tensors), None, None, None, None, None


torch.library.register_autograd("mux::drop", _drop_backward, setup_context=_drop_setup)

DROP = torch.ops.mux.drop.default
TILE_MM = torch.ops.mux.tile_mm.default
TILE_OUTER = torch.ops.mux.tile_outer.default
TILE_OUTER_ = torch.ops.mux.tile_outer_.default
