"""pack: examples -> chunks. Fixed rows, no padding but the last rows of a task's blocks; a block belongs to one task.

Which chunk a sequence goes to is said by `place`; here one chunk at a time gets its tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.examples import IGNORE, Example
from runtime.place import Geometry, Piece, pieces, place

__all__ = ["Chunk", "Geometry", "Piece", "pack"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch, on the host.

    Args:
        tensors: `input_ids`, `position_ids` [1, T] int64, `cu_seqlens` [C + 1] int32, `longest` [] int32 (no
            sequence is longer), and what dropout counts:
            `sequences` (the row's example among its task's own in this call) and `positions` in it, [T] int32; `virtual` [T] int32
            says which of its task's virtual tokens a row is, -1: none.
        block_tasks: the task of every block, "" for a block of padding.
        rows, targets: [n, R] int64, the labelled rows of each task in blocks of R, one task a block; row T is nobody's. A
            block begins with a row of its task's, and a bundle's rows begin at a multiple of `head_tile`.
        weights: [n, R] float32: 1 / (the task's labelled tokens in the whole call), 0 in rows that are nobody's.
        head_tasks: the task of each of these n blocks.
        piece: of a sequence that is cut, what stands in the first rows; the rows of its other pieces stand in other chunks.
    """

    tensors: dict[str, Tensor]
    block_tasks: tuple[str, ...]
    rows: Tensor
    targets: Tensor
    weights: Tensor
    head_tasks: tuple[str, ...]
    piece: Piece | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for task in self.block_tasks if task))


def pack(batches: Mapping[str, Sequence[Example]], geometry: Geometry) -> Iterator[Chunk]:
    """Every example of every task, a chunk at a time in the order in which they run; a sequence longer than a chunk is cut.

    The chunks of a cut sequence follow one another, its first piece first.
    """
    counts = {task: sum(example.labelled for example in examples) for task, examples in batches.items()}
    lengths = {task: [len(example) for example in examples] for task, examples in batches.items()}
    for found in place(lengths, geometry):
        chain = list(pieces(*found.chain, lengths[found.chain[0]][found.chain[1]], geometry)) if found.chain else []
        cut = [
            (piece.task, [Span(batches[piece.task][piece.index], piece.index, piece.begin, piece.begin + piece.rows)])
            for piece in chain
        ]
        whole = [
            (task, [Span(batches[task][index], index, 0, lengths[task][index]) for index in bundle.examples])
            for task, bundle in found.bundles
        ]
        yield _chunk([*cut[:1], *whole], counts, geometry, chain[0] if chain else None)
        for piece, bundle in zip(chain[1:], cut[1:], strict=True):
            yield _chunk([bundle], counts, geometry, piece)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start..stop of a sequence; `index` is its place among its task's examples."""

    example: Example
    index: int
    start: int
    stop: int

    def labelled(self) -> tuple[Tensor, Tensor]:
        """The rows, counted from the span's first, that predict an id, and that id: of its last row the next span's first."""
        targets = self.example.labels[self.start + 1 : self.stop + 1]
        predicting = (targets != IGNORE).nonzero().flatten()
        return predicting, targets[predicting]


def _chunk(bundles: Sequence[tuple[str, list[Span]]], counts: Mapping[str, int], geometry: Geometry, piece: Piece | None) -> Chunk:
    """Bundles, with their tasks, whose first is `piece` if there is one."""
    # A task's stand together, in their order.
    placed: dict[str, list[list[Span]]] = {}
    for task, bundle in bundles:
        placed.setdefault(task, []).append(bundle)
    ids = torch.zeros(geometry.tokens, dtype=torch.long)
    sequences = torch.zeros(geometry.tokens, dtype=torch.int32)
    positions, position_ids = (torch.zeros(geometry.tokens, dtype=torch.long) for _ in range(2))
    virtual = torch.full((geometry.tokens,), -1, dtype=torch.int32)
    block_tasks = [""] * (geometry.tokens // geometry.tile)
    borders = [0]
    heads: dict[str, tuple[Tensor, Tensor, float]] = {}
    at = 0
    for task, own in placed.items():
        rows, targets = [], []
        for bundle in own:
            stop = at + geometry.blocks(sum(span.stop - span.start for span in bundle))
            block_tasks[at // geometry.tile : stop // geometry.tile] = [task] * ((stop - at) // geometry.tile)
            found: list[Tensor] = [torch.empty(2, 0, dtype=torch.long)]
            for span in bundle:
                here, example = slice(at, at + span.stop - span.start), span.example
                ids[here] = example.input_ids[span.start : span.stop]
                positions[here] = torch.arange(span.start, span.stop)
                position_ids[here] = positions[here] + example.offset
                virtual[here] = torch.where(positions[here] < example.virtual, positions[here], -1).int()
                sequences[here] = span.index
                predicting, predicted = span.labelled()
                found.append(torch.stack([at + predicting, predicted]))
                at = here.stop
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
    longest = _bound(max(stop - start for start, stop in itertools.pairwise(borders)), geometry)
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
    return Chunk(tensors, tuple(block_tasks), *_head_blocks(heads, geometry), piece)


def _bound(longest: int, geometry: Geometry) -> int:
    """Up to the next power of two tiles: a kernel's grid is bound by few different numbers."""
    bound = geometry.tile
    while bound < longest:
        bound *= 2
    return min(bound, geometry.tokens)


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
