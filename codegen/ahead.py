"""ahead: the kernels that operators of a forward graph and their backwards launch, known before anything runs.

The device's own code is run over tensors of the device "meta", where a launch is only noted (`codegen.kernels.build.noted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from codegen import device
from codegen.kernels import build
from codegen.ops import DROP, LINEARS, LSE, PREFIXED_ATTENTION, ROWWISE, TILE_AFFINE, TILE_GATHER, TILE_MM, TILE_SPARSE
from codegen.rowwise import Program


def calls(op: Any, args: Sequence[Any]) -> list[build.Call]:
    """Every launch of one of OPERATORS and of its backward, with arguments like its own.

    Args:
        args: the operator's, with tensors on the device "meta".
    """
    with build.noted() as found:
        OPERATORS[op](*args)
    return found


def _linears(x: Tensor, weights: Any, biases: Any, a: Any, b: Any, *rest: Any) -> None:
    *dys, narrow = device.linears(x, weights, biases, a, b, *rest)
    grads = [_grad(table) for table in (*a, *b)]
    device.linears_backward(grads, torch.empty_like(x), dys, x, narrow, weights, a, b, *rest)


def _affine(x: Tensor, scale: Any, shift: Any, base: Any, route: Tensor, otherwise: Any) -> None:
    y = device.tile_affine(x, scale, shift, base, route, otherwise)
    if scale is not None:
        device.tile_affine(y, scale, None, None, route, otherwise)
        device.tile_sum(_grad(scale), y, x, route)
    if shift is not None:
        device.tile_sum(_grad(shift), y, None, route)


def _mm(x: Tensor, w: Tensor, route: Tensor, scale: Any, transpose: bool) -> None:
    y = device.tile_mm(x, w, route, scale, transpose)
    device.tile_mm(y, w, route, scale, not transpose)
    device.tile_outer(_grad(w), *((y, x) if transpose else (x, y)), route, scale)


def _prefixed(q: Tensor, k: Tensor, v: Tensor, kv: Any, lengths: Any, route: Any, cu: Tensor, bounds: Tensor, *rest: Any) -> None:
    # Attention itself is torch's.
    scale, *_ = rest
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for table, live, blocks in zip(kv, lengths, route, strict=True):
        given = table, live, blocks, scale, k.shape[1]
        device.prefix_join(out, lse, q, *given)
        device.prefix_queries(out, q, q, out, lse, *given)
        device.prefix_tables(_grad(table), q, q, out, lse, *given)


def _sparse(y: Tensor, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool) -> None:
    out = device.tile_sparse(y, x, values, places, route, features, transpose)
    device.tile_sparse(None, out, values, places, route, x.shape[-1], not transpose)
    device.tile_sparse_sum(_grad(values), *((out, x) if transpose else (x, out)), places, route)


def _gather(table: Tensor, index: Tensor, route: Tensor) -> None:
    device.tile_scatter(_grad(table), device.tile_gather(table, index, route), index, route)


def _rowwise(given: Sequence[Tensor], program: str) -> None:
    """In forwards and backwards alike: it has no backward of its own."""
    device.rowwise(given, Program.parse(program), program)


def _lse(logits: Tensor, index: Tensor) -> None:
    sums, nll = device.lse(logits, index)
    device.lse_backward(sums, nll, logits, index, sums)


def _grad(table: Tensor) -> Tensor:
    return torch.empty_like(table, dtype=torch.float32)


# Operators that launch kernels of ours, with what runs them forwards and backwards.
OPERATORS: dict[Any, Callable[..., None]] = {
    DROP: device.drop,
    ROWWISE: _rowwise,
    LINEARS: _linears,
    LSE: _lse,
    PREFIXED_ATTENTION: _prefixed,
    TILE_AFFINE: _affine,
    TILE_GATHER: _gather,
    TILE_MM: _mm,
    TILE_SPARSE: _sparse,
}
