"""pack: examples -> chunks. Fixed rows, no padding but the last rows of a task's blocks; a block belongs to one task.

The unit of placement is a bundle: whole sequences of one task, in their order, cut by that task's data alone. Bundles begin on
block borders, so what stands in a block, and the order of a task's blocks, is the same whoever else is in the chunk.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.examples import IGNORE, Example

# The least that kernels take as a block.
HEAD_TILE = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    """Static sizes. `tokens`: rows of a chunk; `tile`: rows of a block; `sequences`: entries of cu_seqlens less one;
    `bundle_tokens`, `bundle_sequences`: a bundle is closed before it would pass these; `head_rows`: rows of a block of the loss."""

    tokens: int
    tile: int
    sequences: int
    bundle_tokens: int
    bundle_sequences: int
    head_rows: int

    @property
    def head_tile(self) -> int:
        """Rows of a block of the head's adapters: few, since every bundle's labelled rows are filled up to whole ones."""
        return min(HEAD_TILE, self.head_rows)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch, on the host.

    Args:
        tensors: `input_ids`, `position_ids` [1, T] int64, `cu_seqlens` [C + 1] int32, `longest` [] int32, and what dropout counts:
            `sequences` (the row's example among its task's own in this call) and `positions` in it, [T] int32; `virtual` [T] int32
            says which of its task's virtual tokens a row is, -1: none.
        block_tasks: the task of every block, "" for a block of padding.
        rows, targets: [n, R] int64, the labelled rows of each task in blocks of R, one task a block; row T is nobody's. A
            block begins with a row of its task's, and a bundle's rows begin at a multiple of `head_tile`.
        weights: [n, R] float32: 1 / (the task's labelled tokens in the whole call), 0 in rows that are nobody's.
        head_tasks: the task of each of these n blocks.
    """

    tensors: dict[str, Tensor]
    block_tasks: tuple[str, ...]
    rows: Tensor
    targets: Tensor
    weights: Tensor
    head_tasks: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for task in self.block_tasks if task))


def pack(batches: Mapping[str, Sequence[Example]], geometry: Geometry) -> list[Chunk]:
    """Place every example of every task. Sequences are never cut; each fits a chunk (the caller has checked)."""
    waiting = {task: _bundles(examples, geometry) for task, examples in batches.items()}
    counts = {task: sum(example.labelled for example in examples) for task, examples in batches.items()}
    chunks: list[dict[str, list[list[Example]]]] = []
    before: Counter[str] = Counter()
    while any(waiting.values()):
        # A task's bundles keep their order over chunks, so its sums run in one order wherever they land.
        free, slots = geometry.tokens, geometry.sequences - geometry.tokens // geometry.tile
        placed: dict[str, list[list[Example]]] = {}
        for task, bundles in waiting.items():
            while bundles and _rows(bundles[0], geometry.tile) <= free and len(bundles[0]) + 1 <= slots:
                bundle = bundles.pop(0)
                free -= _rows(bundle, geometry.tile)
                slots -= len(bundle) + 1
                placed.setdefault(task, []).append(bundle)
        assert placed, "a bundle fits no empty chunk"
        chunks.append(placed)
    return [_chunk(placed, counts, geometry, before) for placed in chunks]


def _rows(bundle: Sequence[Example], tile: int) -> int:
    return -(-sum(len(example) for example in bundle) // tile) * tile


def _bundles(examples: Sequence[Example], geometry: Geometry) -> list[list[Example]]:
    bundles: list[list[Example]] = []
    tokens = geometry.bundle_tokens + 1
    for example in examples:
        if tokens + len(example) > geometry.bundle_tokens or len(bundles[-1]) >= geometry.bundle_sequences:
            bundles.append([])
            tokens = 0
        bundles[-1].append(example)
        tokens += len(example)
    return bundles


def _chunk(placed: Mapping[str, list[list[Example]]], counts: Mapping[str, int], geometry: Geometry, before: Counter[str]) -> Chunk:
    """`before`: examples of each task that stand in earlier chunks; those of this one are added."""
    ids = torch.zeros(geometry.tokens, dtype=torch.long)
    sequences = torch.zeros(geometry.tokens, dtype=torch.int32)
    positions, position_ids = (torch.zeros(geometry.tokens, dtype=torch.long) for _ in range(2))
    virtual = torch.full((geometry.tokens,), -1, dtype=torch.int32)
    block_tasks = [""] * (geometry.tokens // geometry.tile)
    borders = [0]
    heads: dict[str, tuple[Tensor, Tensor, float]] = {}
    at = 0
    for task, bundles in placed.items():
        rows, targets = [], []
        for bundle in bundles:
            stop = at + _rows(bundle, geometry.tile)
            block_tasks[at // geometry.tile : stop // geometry.tile] = [task] * ((stop - at) // geometry.tile)
            found: list[Tensor] = [torch.empty(2, 0, dtype=torch.long)]
            for example in bundle:
                length = len(example)
                ids[at : at + length] = example.input_ids
                positions[at : at + length] = torch.arange(length)
                position_ids[at : at + length] = positions[at : at + length] + example.offset
                virtual[at : at + example.virtual] = torch.arange(example.virtual)
                sequences[at : at + length] = before[task]
                before[task] += 1
                predicted = (example.labels[1:] != IGNORE).nonzero().flatten()
                found.append(torch.stack([at + predicted, example.labels[1:][predicted]]))
                at += length
                borders.append(at)
            if at < stop:
                # Padding is a sequence of its own: every row is defined, and no row of it is seen by a real one.
                at = stop
                borders.append(at)
            labelled = torch.cat(found, 1)
            unfilled = -labelled.shape[1] % geometry.head_tile
            rows.append(torch.nn.functional.pad(labelled[0], (0, unfilled), value=geometry.tokens))
            targets.append(torch.nn.functional.pad(labelled[1], (0, unfilled)))
        if counts[task]:
            heads[task] = torch.cat(rows), torch.cat(targets), 1.0 / counts[task]
    borders += range(at + geometry.tile, geometry.tokens + 1, geometry.tile)
    longest = max(stop - start for start, stop in itertools.pairwise(borders))
    borders += [geometry.tokens] * (geometry.sequences + 1 - len(borders))
    tensors = {
        "input_ids": ids[None],
        "position_ids": position_ids[None],
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "longest": torch.tensor(longest, dtype=torch.int32),
        "sequences": sequences,
        "positions": positions.int(),
        "virtual": virtual,
    }
    return Chunk(tensors, tuple(block_tasks), *_head_blocks(heads, geometry))


def _head_blocks(
    heads: Mapping[str, tuple[Tensor, Tensor, float]], geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    size = geometry.head_rows
    blocks = {task: -(-len(rows) // size) for task, (rows, _, _) in heads.items()}
    shape = (sum(blocks.values()), size)
    rows, targets, weights = torch.full(shape, geometry.tokens), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    at = 0
    for task, (own_rows, own_targets, weight) in heads.items():
        place = slice(at * size, at * size + len(own_rows))
        rows.view(-1)[place], targets.view(-1)[place] = own_rows, own_targets
        weights.view(-1)[place] = torch.where(own_rows < geometry.tokens, weight, 0.0)
        at += blocks[task]
    return rows, targets, weights, tuple(task for task, count in blocks.items() for _ in range(count))
