"""Tile and chunk sizes for a device."""

from __future__ import annotations

import torch

from runtime.pack import Geometry

# Blocks of 128 rows fill Hopper's matrix instructions; on the CPU 16 rows keep padding small, and rows of a product keep
# their bits for 16 to 256 rows (measured with torch 2.13).
TILE = {"cuda": 128, "cpu": 16}
CHUNK_TOKENS = {"cuda": 8192, "cpu": 512}
# Rows of one block of the loss: logits of 256 x 128,256 in float32 are 131 MB, of 64 x 49,152 on the CPU 13 MB. The last block of a
# chunk is half full, or of each of its tasks where they share none; on an H200 the products of Llama-3-8B's head took 539 us for
# 128 rows, 747 for 256 and 1402 for 512 (bfloat16, one run).
HEAD_ROWS = {"cuda": 256, "cpu": 64}
# Chunks that the planner chooses from: small ones waste less of a light load, large ones run faster for a heavy one. In steps of
# a few percent: a size between them would save no more than a step's rows vary by. Of 4224 and 8448 rows tiles of 128 fill waves of
# 132 multiprocessors evenly, which is worth 2 and 4% (`codegen.products`).
CHUNK_SIZES = {
    "cuda": tuple(sorted({*range(512, 1537, 128), 1792, 2304, 4224, 8448, *range(2048, 16385, 512)})),
    "cpu": (*range(64, 256, 64), *range(256, 512, 128), *range(512, 1025, 256)),
}
BUNDLE_TILES = 8
BUNDLE_SEQUENCES = 64


def chunk_tokens(device: torch.device, asked: int | None, longest: int) -> int:
    """Rows of a chunk: what was asked for, or the device's default, raised to hold `longest`; whole tiles."""
    kind = _kind(device)
    wanted = asked if asked is not None else max(CHUNK_TOKENS[kind], longest)
    return -(-wanted // TILE[kind]) * TILE[kind]


def chunk_sizes(device: torch.device) -> tuple[int, ...]:
    """The sizes of chunks that are worth choosing from, ascending."""
    return CHUNK_SIZES[_kind(device)]


def geometry(device: torch.device, tokens: int) -> Geometry:
    """Static sizes of chunks of `tokens` rows, whole tiles, on a device."""
    kind = _kind(device)
    tile = TILE[kind]
    assert tokens % tile == 0 < tokens, f"a chunk of {tokens} rows is not whole tiles of {tile}"
    blocks = tokens // tile
    # Every entry of cu_seqlens costs a kernel's grid; on the CPU empty ones cost nothing, so there all rows may be sequences of
    # their own, with the padding of each bundle and of each free block.
    sequences = tokens + 2 * blocks if kind == "cpu" else max(tokens // 16, 2 * BUNDLE_SEQUENCES) + blocks
    bundle = min(BUNDLE_TILES * tile, tokens)
    return Geometry(tokens, tile, sequences, bundle, BUNDLE_SEQUENCES, HEAD_ROWS[kind])


def holds(geometry: Geometry, rows: int, sequences: int) -> bool:
    """Whether one chunk surely holds so many rows, in whole blocks, whatever their order and with a bundle for each sequence."""
    return rows <= geometry.tokens >= BUNDLE_TILES * geometry.tile and 2 * sequences <= geometry.room.entries


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"
