"""mux::tile_sparse and mux::tile_sparse_sum: products of each task's rows with a sparse matrix of its own, which few values make.

The matrix itself, [K, N], would be as large as a frozen weight for every task and site. It exists dense for one slot at a time
only, and only while the operator runs: the values are scattered into zeros, and the slot's rows take an ordinary product with it.

What that costs on a device, for each of S slots, free ones among them (the host does not know the route): writing and reading K x N
elements of the compute dtype forwards and for dx, and two products of 2 K N FLOP a token of the slot's own; for the gradient of the
values a float32 K x N that is written twice and read twice, and one more such product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.checks import check, check_device, check_route, describe


def _check_places(op: str, places: Tensor) -> None:
    right = places.dim() == 3 and places.shape[1] == 2 and places.dtype == torch.int32 and places.is_contiguous()
    check(right, f"{op}: places must be contiguous torch.int32 [S, 2, n], got {describe(places)}")


def _check_sparse(
    y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool
) -> None:
    op = "tile_sparse"
    check(x.dim() >= 2, f"{op}: x must be [..., K], got {describe(x)}")
    _check_places(op, places)
    shape = (places.shape[0], 1, places.shape[2])
    right = values.shape == shape and values.dtype == x.dtype and values.is_contiguous()
    check(right, f"{op}: values must be contiguous {x.dtype} {shape}, got {describe(values)}")
    check_route(op, "x", x.reshape(-1, x.shape[-1]), route, None, places.shape[0])
    check(features > 0, f"{op}: features is {features}")
    if y is not None:
        right = y.shape == (*x.shape[:-1], features) and y.dtype == x.dtype
        check(right, f"{op}: y must be {x.dtype} {(*x.shape[:-1], features)}, got {describe(y)}")
    check_device(op, x, y=y, values=values, places=places, route=route)


@torch.library.custom_op("mux::tile_sparse", mutates_args=())
def tile_sparse(
    y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool
) -> Tensor:
    """See `reference.tile_sparse`."""
    _check_sparse(y, x, values, places, route, features, transpose)
    return (device if x.is_cuda else host).tile_sparse(y, x, values, places, route, features, transpose)


@tile_sparse.register_fake
def _(y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool) -> Tensor:
    _check_sparse(y, x, values, places, route, features, transpose)
    return x.new_empty(*x.shape[:-1], features)


def _check_sum(op: str, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    check(a.dim() >= 2, f"{op}: a must be [..., K], got {describe(a)}")
    right = b.shape[:-1] == a.shape[:-1] and b.dtype == a.dtype
    check(right, f"{op}: b must be {a.dtype} {(*a.shape[:-1], 'N')}, got {describe(b)}")
    _check_places(op, places)
    check_route(op, "a", a.reshape(-1, a.shape[-1]), route, None, places.shape[0])
    check_device(op, a, b=b, places=places, route=route)


@torch.library.custom_op("mux::tile_sparse_sum", mutates_args=())
def tile_sparse_sum(a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> Tensor:
    """[S, 1, n] float32: `tile_sparse_sum_` from zero."""
    _check_sum("tile_sparse_sum", a, b, places, route)
    grad = a.new_zeros(places.shape[0], 1, places.shape[2], dtype=torch.float32)
    (device if a.is_cuda else host).tile_sparse_sum(grad, a, b, places, route)
    return grad


@tile_sparse_sum.register_fake
def _(a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> Tensor:
    _check_sum("tile_sparse_sum", a, b, places, route)
    return a.new_empty(places.shape[0], 1, places.shape[2], dtype=torch.float32)


def _check_grad(grad: Tensor, a: Tensor, places: Tensor) -> None:
    shape = (places.shape[0], 1, places.shape[2])
    right = grad.shape == shape and grad.dtype == torch.float32 and grad.is_contiguous()
    check(right, f"tile_sparse_sum_: grad must be contiguous torch.float32 {shape}, got {describe(grad)}")
    check_device("tile_sparse_sum_", a, grad=grad)


@torch.library.custom_op("mux::tile_sparse_sum_", mutates_args=("grad",))
def tile_sparse_sum_(grad: Tensor, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    """Add to `grad` in place: what a backward region calls."""
    _check_sum("tile_sparse_sum_", a, b, places, route)
    _check_grad(grad, a, places)
    (device if a.is_cuda else host).tile_sparse_sum(grad, a, b, places, route)


@tile_sparse_sum_.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    _check_sum("tile_sparse_sum_", a, b, places, route)
    _check_grad(grad, a, places)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, values, places, route, _, transpose = inputs
    ctx.save_for_backward(x, values, places, route)
    ctx.transpose = transpose


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, places, route = ctx.saved_tensors
    wants_y, wants_x, wants_values, *_ = ctx.needs_input_grad
    dx = dvalues = None
    if wants_x:
        dx = torch.ops.mux.tile_sparse(None, dy, values, places, route, x.shape[-1], not ctx.transpose)
    if wants_values:
        a, b = (dy, x) if ctx.transpose else (x, dy)
        dvalues = torch.ops.mux.tile_sparse_sum(a, b, places, route)
        dvalues = dvalues if values.dtype == dvalues.dtype else dvalues.to(values.dtype)
    return dy if wants_y else None, dx, dvalues, None, None, None, None


torch.library.register_autograd("mux::tile_sparse", _backward, setup_context=_setup)


@register_flop_formula([torch.ops.mux.tile_sparse])
def _sparse_flops(y: Any, x: Any, values: Any, places: Any, route: Any, features: int, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x).numel() * features


@register_flop_formula([torch.ops.mux.tile_sparse_sum])
def _sum_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(a).numel() * b[-1]


@register_flop_formula([torch.ops.mux.tile_sparse_sum_])
def _sum_into_flops(grad: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(a).numel() * b[-1]


TILE_SPARSE = torch.ops.mux.tile_sparse.default
TILE_SPARSE_SUM = torch.ops.mux.tile_sparse_sum.default
TILE_SPARSE_SUM_ = torch.ops.mux.tile_sparse_sum_.default
