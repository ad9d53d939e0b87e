"""pack: examples -> chunks. Fixed rows, no padding but the last rows of a task's blocks; a block belongs to one task.

Which chunk a sequence goes to is said by `place`; here one chunk at a time gets its tensors.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.examples import IGNORE, Example
from runtime.place import Geometry, Piece, pieces, place

__all__ = ["Chunk", "Geometry", "Piece", "bounds", "pack"]

# The fewest sequences that chunks are told apart by.
_FEWEST = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch, on the host.

    Args:
        tensors: `input_ids`, `position_ids` [1, T] int64, `cu_seqlens` [C + 1] int32, `bounds` [2] int32 (no
            sequence is longer than the first, and of so many entries the rest are empty), and what dropout counts:
            `sequences` (the row's example among its task's own in this call) and `positions` in it, [T] int32; `virtual` [T] int32
            says which of its task's virtual tokens a row is, -1: none.
        block_tasks: the task of every block, "" for a block of padding.
        rows, targets: [n, R] int64, the labelled rows in blocks of R, task by task, where a block may have to be one task's alone;
            row T is nobody's. A bundle's rows begin at a multiple of `head_tile`, and so no such tile begins with a row of nobody
            before the last block's end.
        weights: [n, R] float32: 1 / (the task's labelled tokens in the whole call), 0 in rows that are nobody's.
        head_tasks: the task that each of these n blocks begins with.
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

    @property
    def full(self) -> float:
        """The fraction of its blocks that are some task's."""
        return sum(map(bool, self.block_tasks)) / len(self.block_tasks)


class Chunks:
    """Every example of every task, a chunk at a time in the order in which they run; a sequence longer than a chunk is cut.

    The chunks of a cut sequence follow one another, its first piece first. Where everything goes is settled at once; a chunk is
    filled when it is asked for.
    """

    def __init__(self, batches: Mapping[str, Sequence[Example]], geometry: Geometry, share: tuple[int, int], shared: bool) -> None:
        self._batches, self._geometry, self._shared = batches, geometry, shared
        self._lengths = {task: [len(example) for example in examples] for task, examples in batches.items()}
        self._placed = [(found, self._chain(found.chain)) for found in place(self._lengths, geometry, share)]

    def __len__(self) -> int:
        return sum(max(1, len(chain)) for _, chain in self._placed)

    @property
    def filled(self) -> list[int]:
        """Of each chunk the rows, in whole blocks, that are some task's."""
        found, geometry = [], self._geometry
        for placed, chain in self._placed:
            first, *rest = [geometry.blocks(piece.rows) for piece in chain] or [0]
            found += [first + placed.rows, *rest]
        return found

    def __iter__(self) -> Iterator[Chunk]:
        batches, geometry = self._batches, self._geometry
        counts = {task: sum(example.labelled for example in examples) for task, examples in batches.items()}
        for placed, chain in self._placed:
            cut = [
                (piece.task, [Span(batches[piece.task][piece.index], piece.index, piece.begin, piece.begin + piece.rows)])
                for piece in chain
            ]
            whole = [
                (task, [Span(batches[task][index], index, 0, self._lengths[task][index]) for index in bundle.examples])
                for task, bundle in placed.bundles
            ]
            yield _chunk([*cut[:1], *whole], counts, geometry, chain[0] if chain else None, self._shared)
            for piece, bundle in zip(chain[1:], cut[1:], strict=True):
                yield _chunk([bundle], counts, geometry, piece, self._shared)

    def _chain(self, cut: tuple[str, int] | None) -> list[Piece]:
        return list(pieces(*cut, self._lengths[cut[0]][cut[1]], self._geometry)) if cut else []


def pack(
    batches: Mapping[str, Sequence[Example]], geometry: Geometry, share: tuple[int, int] = (0, 1), *, shared: bool = False
) -> Chunks:
    """The chunks of some tasks' examples.

    Args:
        share: (i, n): of n replicas' chunks those of replica i. Bundle k of a task is replica k % n's, whoever else is there.
        shared: blocks of the loss may hold rows of several tasks; otherwise each is one task's.
    """
    return Chunks(batches, geometry, share, shared)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start..stop of a sequence; `index` is its place among its task's examples."""

    example: Example
    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def targets(self) -> NDArray[np.int64]:
        """The id that each row predicts, IGNORE where none: the last row predicts the next span's first id."""
        found = self.example.labels[self.start + 1 : self.stop + 1]
        return found if len(found) == len(self) else np.append(found, IGNORE)


def _chunk(
    bundles: Sequence[tuple[str, list[Span]]], counts: Mapping[str, int], geometry: Geometry, piece: Piece | None, shared: bool
) -> Chunk:
    """Bundles, with their tasks, whose first is `piece` if there is one."""
    # A task's stand together, in their order.
    placed: dict[str, list[list[Span]]] = {}
    for task, bundle in bundles:
        placed.setdefault(task, []).append(bundle)
    block_tasks = [""] * (geometry.tokens // geometry.tile)
    borders, starts = [0], []
    ranges: dict[str, list[tuple[int, int]]] = {}  # of each task's bundles: the first span, and the one behind the last
    at = 0
    for task, own in placed.items():
        for bundle in own:
            stop = at + geometry.blocks(sum(map(len, bundle)))
            block_tasks[at // geometry.tile : stop // geometry.tile] = [task] * ((stop - at) // geometry.tile)
            for span in bundle:
                starts.append(at)
                at += len(span)
                borders.append(at)
            if at < stop:
                # Padding is a sequence of its own: every row is defined, and no row of it is seen by a real one.
                at = stop
                borders.append(at)
            ranges.setdefault(task, []).append((len(starts) - len(bundle), len(starts)))
    spans = [span for own in placed.values() for bundle in own for span in bundle]
    columns = _Columns(spans, starts)
    borders += range(at + geometry.tile, geometry.tokens + 1, geometry.tile)
    found = bounds(borders, geometry)
    borders += [geometry.tokens] * (geometry.sequences + 1 - len(borders))
    tensors = {
        "input_ids": columns.filled(columns.ids, geometry.tokens, np.int64)[None],
        "position_ids": columns.filled(columns.positions + columns.each("offset"), geometry.tokens, np.int64)[None],
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "bounds": torch.tensor(found, dtype=torch.int32),
        "sequences": columns.filled(np.repeat([span.index for span in spans], columns.lengths), geometry.tokens, np.int32),
        "positions": columns.filled(columns.positions, geometry.tokens, np.int32),
        "virtual": columns.filled(
            np.where(columns.positions < columns.each("virtual"), columns.positions, -1), geometry.tokens, np.int32, fill=-1
        ),
    }
    heads = {task: (columns.labelled(own, geometry), 1.0 / counts[task]) for task, own in ranges.items() if counts[task]}
    return Chunk(tensors, tuple(block_tasks), *_head_blocks(heads, geometry, shared), piece)


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


class _Columns:
    """What is known of every row of some spans, one after another; `starts`: the row of a chunk that each begins in."""

    def __init__(self, spans: Sequence[Span], starts: Sequence[int]) -> None:
        self.spans = spans
        self.lengths = np.array([len(span) for span in spans], dtype=np.int64)
        self.ends = np.concatenate([[0], np.cumsum(self.lengths)])
        within = np.arange(self.ends[-1]) - np.repeat(self.ends[:-1], self.lengths)
        self.rows = within + np.repeat(np.array(starts, dtype=np.int64), self.lengths)
        self.positions = within + np.repeat(np.array([span.start for span in spans], dtype=np.int64), self.lengths)
        self.ids = _joined([span.example.input_ids[span.start : span.stop] for span in spans])
        self.targets = _joined([span.targets() for span in spans])

    def each(self, field: str) -> NDArray[np.int64]:
        """A number of the spans' examples, for every row."""
        return np.repeat(np.array([getattr(span.example, field) for span in self.spans], dtype=np.int64), self.lengths)

    def filled(self, values: NDArray[Any], rows: int, dtype: Any, fill: int = 0) -> Tensor:
        """[rows] of a chunk: the values in the spans' rows, `fill` in all others."""
        found = np.full(rows, fill, dtype=dtype)
        found[self.rows] = values
        return torch.from_numpy(found)

    def labelled(self, bundles: Sequence[tuple[int, int]], geometry: Geometry) -> NDArray[np.int64]:
        """[2, n] rows of some bundles (the first span of each, and the one behind the last) that predict an id, and the ids.

        Each bundle's are filled up with rows of nobody.
        """
        found = []
        for first, last in bundles:
            span = slice(self.ends[first], self.ends[last])
            real = self.targets[span] != IGNORE
            count = np.count_nonzero(real)
            own = np.zeros((2, count + -count % geometry.head_tile), dtype=np.int64)
            own[0] = geometry.tokens
            own[0, :count], own[1, :count] = self.rows[span][real], self.targets[span][real]
            found.append(own)
        return np.concatenate(found, 1)


def bounds(borders: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """Of the sequences' lengths, the next power of two tiles; of their number, the next power of two or one and a half times one.

    A record is of one pair of these: they are few.
    """
    longest, length = max(stop - start for start, stop in itertools.pairwise(borders)), geometry.tile
    while length < longest:
        length *= 2
    count = _FEWEST
    while count < len(borders) - 1:
        count += count // 2 if count & (count - 1) == 0 else count // 3
    return min(length, geometry.tokens), min(count, geometry.sequences)


def _head_blocks(
    heads: Mapping[str, tuple[NDArray[np.int64], float]], geometry: Geometry, shared: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """`rows`, `targets`, `weights` and `head_tasks` of a chunk, from each task's labelled rows with their ids, and its weight."""
    size = geometry.head_rows
    starts, at = [], 0
    for own, _ in heads.values():
        starts.append(at)
        at += own.shape[1] if shared else -(-own.shape[1] // size) * size
    shape = -(-at // size), size
    rows, targets = np.full(shape, geometry.tokens, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for start, (own, weight) in zip(starts, heads.values(), strict=True):
        place = slice(start, start + own.shape[1])
        rows.reshape(-1)[place], targets.reshape(-1)[place] = own
        weights.reshape(-1)[place] = np.where(own[0] < geometry.tokens, weight, 0.0)
    first = [bisect_right(starts, block * size) - 1 for block in range(shape[0])]
    tasks = tuple(list(heads)[index] for index in first)
    return torch.from_numpy(rows), torch.from_numpy(targets), torch.from_numpy(weights), tasks
