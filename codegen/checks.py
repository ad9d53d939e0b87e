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


def check_route(op: str, name: str, rows: Tensor, route: Tensor, scale: Tensor | None, slots: int, label: str = "route") -> None:
    """`rows` [T, features] in whole blocks of `route` [B] int32; `scale` is None or [slots] float32."""
    check(rows.dim() == 2, f"{op}: {name} must be [T, features], got {describe(rows)}")
    right = route.dim() == 1 and route.dtype == torch.int32 and route.is_contiguous()
    check(right, f"{op}: {label} must be contiguous int32 [blocks], got {describe(route)}")
    blocks = route.shape[0]
    check(
        blocks > 0 and rows.shape[0] % blocks == 0,
        f"{op}: {name} has {rows.shape[0]} rows, not a multiple of {label}'s {blocks} blocks",
    )
    if scale is not None:
        right = scale.shape == (slots,) and scale.dtype == torch.float32 and scale.is_contiguous()
        check(right, f"{op}: scale must be contiguous torch.float32 ({slots},), got {describe(scale)}")


def check_device(op: str, first: Tensor, **others: Tensor | Sequence[Tensor | None] | None) -> None:
    """All on one device; a list's member is named by its index."""
    for name, given in others.items():
        tensors = [(name, given)] if isinstance(given, Tensor) else [(f"{name}[{i}]", t) for i, t in enumerate(given or ())]
        for label, tensor in tensors:
            if tensor is not None:
                check(tensor.device == first.device, f"{op}: {label} is on {tensor.device}, the first argument on {first.device}")


def check_counters(op: str, tokens: int, **counters: Tensor | None) -> None:
    """What dropout counts: one int32 for each row."""
    for name, given in counters.items():
        right = given is not None and given.numel() == tokens and given.dtype == torch.int32 and given.is_contiguous()
        found = "None" if given is None else describe(given)
        check(right, f"{op}: {name} must be contiguous torch.int32 of {tokens} rows where elements are dropped, got {found}")


def check_keys(op: str, name: str, keys: Tensor, slots: int) -> None:
    """Dropout keys: [slots, 3] int32."""
    right = keys.shape == (slots, 3) and keys.dtype == torch.int32 and keys.is_contiguous()
    check(right, f"{op}: {name} must be contiguous torch.int32 ({slots}, 3), got {describe(keys)}")


def check_sites(op: str, name: str, sites: Tensor, count: int) -> None:
    """The keys of places, and which column of theirs is the first: [count, 2] int32."""
    right = sites.shape == (count, 2) and sites.dtype == torch.int32 and sites.is_contiguous()
    check(right, f"{op}: {name} must be contiguous torch.int32 ({count}, 2), got {describe(sites)}")


def check_blocks(op: str, rows: int, blocks: int) -> None:
    """What the device kernels need of a block: whole fragments of matrix instructions."""
    size = rows // blocks
    check(size % 16 == 0 and size & (size - 1) == 0, f"{op}: route: blocks of {size} rows; on CUDA a power of two of at least 16")
