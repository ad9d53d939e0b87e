"""mux::tile_gather and mux::tile_scatter: rows of each task's own table by index, which embeddings of its own are read by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import device, host
from codegen.checks import check, check_device, describe


def _check_index(op: str, index: Tensor, route: Tensor) -> None:
    right = index.dim() == 1 and index.dtype == torch.int64
    check(right, f"{op}: index must be torch.int64 [T], got {describe(index)}")
    right = route.dim() == 1 and route.dtype == torch.int32 and route.is_contiguous()
    check(right, f"{op}: route must be contiguous int32 [blocks], got {describe(route)}")
    whole = route.shape[0] > 0 and index.shape[0] % route.shape[0] == 0
    check(whole, f"{op}: index has {index.shape[0]} rows, not a multiple of route's {route.shape[0]} blocks")


def _check_gather(table: Tensor, index: Tensor, route: Tensor) -> None:
    check(table.dim() == 3 and table.is_contiguous(), f"tile_gather: table must be contiguous [S, V, F], got {describe(table)}")
    _check_index("tile_gather", index, route)
    check_device("tile_gather", table, index=index, route=route)


@torch.library.custom_op("mux::tile_gather", mutates_args=())
def tile_gather(table: Tensor, index: Tensor, route: Tensor) -> Tensor:
    _check_gather(table, index, route)
    return (device if table.is_cuda else host).tile_gather(table, index, route)


@tile_gather.register_fake
def _(table: Tensor, index: Tensor, route: Tensor) -> Tensor:
    _check_gather(table, index, route)
    return table.new_empty(index.shape[0], table.shape[2])


def _check_scatter(op: str, rows: Tensor, index: Tensor, route: Tensor) -> None:
    _check_index(op, index, route)
    right = rows.dim() == 2 and rows.shape[0] == index.shape[0]
    check(right, f"{op}: rows must be [T, F] with index's {index.shape[0]} rows, got {describe(rows)}")
    check_device(op, rows, index=index, route=route)


@torch.library.custom_op("mux::tile_scatter", mutates_args=())
def tile_scatter(rows: Tensor, index: Tensor, route: Tensor, size: Sequence[int]) -> Tensor:
    """[*size, F] float32, with size [S, V]: `tile_scatter_` from zero."""
    _check_scatter("tile_scatter", rows, index, route)
    grad = rows.new_zeros(*size, rows.shape[1], dtype=torch.float32)
    (device if rows.is_cuda else host).tile_scatter(grad, rows, index, route)
    return grad


@tile_scatter.register_fake
def _(rows: Tensor, index: Tensor, route: Tensor, size: Sequence[int]) -> Tensor:
    _check_scatter("tile_scatter", rows, index, route)
    return rows.new_empty(*size, rows.shape[1], dtype=torch.float32)


def _check_grad(grad: Tensor, rows: Tensor) -> None:
    right = grad.dim() == 3 and grad.shape[2] == rows.shape[1] and grad.dtype == torch.float32 and grad.is_contiguous()
    check(right, f"tile_scatter_: grad must be contiguous torch.float32 [S, V, {rows.shape[1]}], got {describe(grad)}")
    check_device("tile_scatter_", rows, grad=grad)


@torch.library.custom_op("mux::tile_scatter_", mutates_args=("grad",))
def tile_scatter_(grad: Tensor, rows: Tensor, index: Tensor, route: Tensor) -> None:
    """Add to `grad` in place: what a backward region calls, so that a gradient as large as its table exists once."""
    _check_scatter("tile_scatter_", rows, index, route)
    _check_grad(grad, rows)
    (device if rows.is_cuda else host).tile_scatter(grad, rows, index, route)


@tile_scatter_.register_fake
def _(grad: Tensor, rows: Tensor, index: Tensor, route: Tensor) -> None:
    _check_scatter("tile_scatter_", rows, index, route)
    _check_grad(grad, rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, index, route = inputs
    ctx.save_for_backward(index, route)
    ctx.size, ctx.dtype = list(table.shape[:2]), table.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    index, route = ctx.saved_tensors
    found = torch.ops.mux.tile_scatter(dy, index, route, ctx.size)
    # Gradients are float32 whatever the table is; autograd wants them in the table's dtype.
    return found if found.dtype == ctx.dtype else found.to(ctx.dtype), None, None


torch.library.register_autograd("mux::tile_gather", _backward, setup_context=_setup)


@register_flop_formula([torch.ops.mux.tile_gather])
def _gather_flops(table_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula([torch.ops.mux.tile_scatter])
def _scatter_flops(rows_shape: Any, *args: Any, **kwargs: Any) -> int:
    return torch.Size(rows_shape).numel()


@register_flop_formula([torch.ops.mux.tile_scatter_])
def _scatter_into_flops(grad_shape: Any, rows_shape: Any, *args: Any, **kwargs: Any) -> int:
    return torch.Size(rows_shape).numel()


TILE_GATHER = torch.ops.mux.tile_gather.default
TILE_SCATTER = torch.ops.mux.tile_scatter.default
TILE_SCATTER_ = torch.ops.mux.tile_scatter_.default
