"""Sizes of the tile kernels: what each family runs with, by the shapes of a site and the chunk, never by who shares the batch.

Chosen on an H200 with bf16 at ranks 8 to 64 (docs/kernels.md). Sizes never change a sum: the long dimension is always added up in
the same order. The one size that would, the rows that `outer` multiplies at a time, is a block for every number of slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from codegen.kernels import affine, contract, expand, gemm, outer, prefix
from codegen.kernels.pattern import Pattern, padded

# One program on every multiprocessor of an H200 (132), near enough.
_PROGRAMS = 96


def of_contract(pattern: Pattern) -> contract.Config:
    """Few ranks are served by the largest tile of rows that still gives every multiprocessor a program; more of them by the largest
    tile, since every program reads all of their rows. What is in flight fits 99 KiB, which most GPUs have.
    """
    widest = max(padded(link.rank) for link in pattern.merged(contract.MOST_RANKS).links)
    parts = len(pattern.wides)
    rows = next((rows for rows in (64, 32) if pattern.tokens // rows * parts >= _PROGRAMS), 16)
    rows, most = min(rows, pattern.tile), min(64, pattern.tile)
    if pattern.dtype == "float32":
        return contract.Config(rows, 32, 4, 2)
    if widest > 128:
        return contract.Config(rows, 64, 8, 3)
    if widest > 32:
        return contract.Config(most, 128, 4, 3 if widest > 64 else 4)
    return contract.Config(rows, 128, 4, 5) if rows == 64 else contract.Config(rows, 256, 4, 4)


def of_expand(pattern: Pattern) -> expand.Config:
    rows = min(64, pattern.tile)
    return expand.Config(rows, 64 if pattern.dtype == "float32" else 128, 4, 2)


def of_outer(patterns: Sequence[Pattern], slots: int) -> outer.Config:
    """Few long walks need many loads in flight, many short ones little memory each."""
    pattern = patterns[0]
    if pattern.dtype == "float32":
        return outer.Config(32, min(32, pattern.tile), 4, 2)
    programs = max(sum(own.wides) for own in patterns) // 64 * slots
    stages = 5 if programs < 2 * _PROGRAMS else 3 if programs < 10 * _PROGRAMS else 2
    return outer.Config(64, min(128, pattern.tile), 4, stages)


def of_affine(shape: affine.Shape) -> affine.Config:
    return affine.Config(rows=min(32, shape.tile), columns=128)


def of_total(shape: affine.Shape) -> affine.Config:
    return affine.Config(columns=32)


def of_prefix(family: str, shape: prefix.Shape) -> prefix.Config:
    if shape.dtype == "float32":
        return prefix.Config(min(16, shape.tile), 16, 4, 1)
    if family == "tables":
        # It holds two sums of that many rows and has few programs, each a long walk: 157 us at 1024 rows of a prefix of 32, the
        # best of the sizes tried (H200); `join` takes 40 us there and `queries` 25.
        return prefix.Config(min(64, shape.tile), 16, 4, 3)
    return prefix.Config(min(64, shape.tile), 16 if shape.rows <= 16 else 32)


def of_scatter(shape: affine.Shape) -> affine.Config:
    return affine.Config(columns=min(256, 1 << (shape.features - 1).bit_length()))


def of_gemm(pattern: Pattern) -> gemm.Config:
    exact = pattern.dtype == "float32"
    most = 64 if exact else 128
    # A tile of the product lies in one block; without any adapter a block is the whole chunk, of any size.
    rows = min(most, pattern.tile) if pattern.tile & (pattern.tile - 1) == 0 else most
    return gemm.Config(rows, 64, 32, 8, 1, 1, False, 4, 2) if exact else gemm.Config(rows)
