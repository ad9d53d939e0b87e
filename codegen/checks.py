"""Argument checks that the operators share: a ValueError names the operator and the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def check_route(op: str, name: str, rows: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> None:
    """`rows` [T, features] in whole blocks of `route` [B] int32; `scale` is None or [slots] float32."""
    check(rows.dim() == 2, f"{op}: {name} must be [T, features], got {describe(rows)}")
    check(route.dim() == 1 and route.dtype == torch.int32, f"{op}: route must be int32 [blocks], got {describe(route)}")
    blocks = route.shape[0]
    check(
        blocks > 0 and rows.shape[0] % blocks == 0,
        f"{op}: {name} has {rows.shape[0]} rows, not a multiple of route's {blocks} blocks",
    )
    if scale is not None:
        right = scale.shape == (slots,) and scale.dtype == torch.float32
        check(right, f"{op}: scale must be torch.float32 ({slots},), got {describe(scale)}")


def check_device(op: str, first: Tensor, **others: Tensor | Sequence[Tensor] | None) -> None:
    """All on one device; a list's member is named by its index."""
    for name, given in others.items():
        tensors = [(name, given)] if isinstance(given, Tensor) else [(f"{name}[{i}]", t) for i, t in enumerate(given or ())]
        for label, tensor in tensors:
            check(tensor.device == first.device, f"{op}: {label} is on {tensor.device}, the first argument on {first.device}")


def check_blocks(op: str, rows: int, blocks: int) -> None:
    """What the device kernels need of a block: whole fragments of matrix instructions."""
    size = rows // blocks
    check(size % 16 == 0 and size & (size - 1) == 0, f"{op}: route: blocks of {size} rows; on CUDA a power of two of at least 16")
