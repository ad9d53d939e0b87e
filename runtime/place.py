"""place: which chunk every sequence goes to. Lengths in, places out: no tensor is built and no token is looked at.

The unit of placement is a bundle: whole sequences of one task, packed to whole blocks. A sequence longer than a chunk is a chain of
pieces: the first has what is left over by whole chunks and stands at the head of its own, each later one fills a chunk.

A task's rows have one order, that of the chunks' backwards, and it follows from the task's own lengths and the geometry alone:
its chains in the order of its examples, each from its last piece to its first and then the bundles that the task itself puts
beside the first piece; behind all chains the rest of its bundles. Neighbours only move the rest to earlier or later chunks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

# The least that kernels take as a block.
HEAD_TILE = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    """Static sizes. `tokens`: rows of a chunk; `tile`: rows of a block; `sequences`: entries of cu_seqlens less one;
    `bundle_tokens`, `bundle_sequences`: what a bundle takes; one that begins with a longer sequence fills this one's blocks;
    `head_rows`: rows of a block of the loss."""

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

    @property
    def room(self) -> Room:
        """What an empty chunk holds; every free block is an entry of its own in cu_seqlens."""
        return Room(self.tokens, self.sequences - self.tokens // self.tile)

    def blocks(self, tokens: int) -> int:
        """Rows of the whole blocks that hold these."""
        return -(-tokens // self.tile) * self.tile


@dataclass(frozen=True, slots=True)
class Room:
    """Rows, and entries of cu_seqlens: free ones, or those that something takes."""

    rows: int
    entries: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """Whole sequences of one task that share blocks: its examples by index, ascending, and what they take of a chunk."""

    examples: tuple[int, ...]
    size: Room


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a sequence that a chunk holds in its first rows.

    Args:
        index: the sequence among its task's examples.
        begin: rows of the sequence before these; 0 in the first piece.
        rows: rows of the piece.
        total: rows of the whole sequence; begin + rows in the last piece.
    """

    task: str
    index: int
    begin: int
    rows: int
    total: int


@dataclass(slots=True)
class Place:
    """A chunk's bundles, with their tasks. With a `chain`, (task, example), it is the chunk of that sequence's first piece, and
    stands for the chunks of the other pieces too, which hold nothing else."""

    chain: tuple[str, int] | None
    bundles: list[tuple[str, Bundle]]

    @property
    def rows(self) -> int:
        """Of the bundles, in whole blocks."""
        return sum(bundle.size.rows for _, bundle in self.bundles)


@dataclass(frozen=True, slots=True)
class Packing:
    """One task's packing by its own data: its chains, the bundles beside the first piece of each and what room is left there, and
    the rest of the bundles in their order."""

    chains: tuple[int, ...]
    beside: tuple[tuple[Bundle, ...], ...]
    left: tuple[Room, ...]
    rest: tuple[Bundle, ...]

    def share(self, index: int, count: int) -> Packing:
        """What one of `count` replicas has: every `count`-th chain with what is beside it, and so of the other bundles."""
        own = slice(index, None, count)
        return Packing(self.chains[own], self.beside[own], self.left[own], self.rest[own])


def pieces(task: str, index: int, total: int, geometry: Geometry) -> Iterator[Piece]:
    """A sequence longer than a chunk, cut: the first piece has what whole chunks leave over, at least a row."""
    begin, rows = 0, (total - 1) % geometry.tokens + 1
    while begin < total:
        yield Piece(task, index, begin, rows, total)
        begin, rows = begin + rows, geometry.tokens


def packing(lengths: Sequence[int], geometry: Geometry) -> Packing:
    """Sequences into bundles, and these into chunks of the task alone, those of its chains first.

    The order of the bundles is that of these chunks: so the task alone needs no more of them, and no neighbour reorders it.
    """
    chains = tuple(index for index, length in enumerate(lengths) if length > geometry.tokens)
    bundles, room = _bundles(lengths, geometry), geometry.room
    firsts = [geometry.blocks((lengths[index] - 1) % geometry.tokens + 1) for index in chains]
    # The padding behind a piece is a sequence too.
    free = _Free([*(Room(room.rows - first, room.entries - 2) for first in firsts), *[room] * len(bundles)])
    chunks: list[list[Bundle]] = [[] for _ in [*chains, *bundles]]
    for bundle in sorted(bundles, key=lambda bundle: -bundle.size.rows):
        chunks[free.take(0, bundle.size)].append(bundle)
    beside, rest = chunks[: len(chains)], chunks[len(chains) :]
    left = tuple(free.room(place) for place in range(len(chains)))
    return Packing(chains, tuple(map(tuple, beside)), left, tuple(bundle for chunk in rest for bundle in chunk))


def rows(lengths: Sequence[int], geometry: Geometry) -> int:
    """Computed rows, in whole blocks, of one task's step. Only a chain's first piece has less than whole chunks."""
    chains = sum(geometry.blocks(length) for length in lengths if length > geometry.tokens)
    return chains + sum(bundle.size.rows for bundle in _bundles(lengths, geometry))


def place(lengths: Mapping[str, Sequence[int]], geometry: Geometry, share: tuple[int, int] = (0, 1)) -> list[Place]:
    """The chunks of every sequence of every task, in the order in which they run; of one replica's share of them, see `pack`.

    First fit: a bundle goes to the first chunk that holds it, from that of its task's bundle before it on. Tasks with larger
    bundles go first, the order of tasks being free. So of chunks without a piece all but the last lack less than the largest
    bundle has, and no two that follow one another would fit into one.
    """
    own = {task: packing(given, geometry).share(*share) for task, given in lengths.items()}
    places: list[Place] = []
    rooms: list[Room] = []
    start = dict.fromkeys(lengths, 0)
    for task, packed in own.items():
        for index, beside in zip(packed.chains, packed.beside, strict=True):
            start[task] = len(places)
            places.append(Place((task, index), [(task, bundle) for bundle in beside]))
        rooms += packed.left
    free = _Free([*rooms, *[geometry.room] * sum(len(packed.rest) for packed in own.values())])
    largest = {task: max((bundle.size.rows for bundle in packed.rest), default=0) for task, packed in own.items()}
    for task in sorted(own, key=lambda task: -largest[task]):
        at = start[task]
        for bundle in own[task].rest:
            at = free.take(at, bundle.size)
            if at == len(places):
                places.append(Place(None, []))
            places[at].bundles.append((task, bundle))
    return places


def _bundles(lengths: Sequence[int], geometry: Geometry) -> list[Bundle]:
    """Best-fit decreasing: from the longest sequence down, each goes to the bundle with the least room for it, of equals to the
    earliest. The rows that fill up a long sequence's last block are room as well."""
    held: list[list[int]] = []
    # Bundles by the tokens that they still take: these in ascending order, those as heaps.
    rooms: list[int] = []
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if (length := lengths[index]) > geometry.tokens:
            continue
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            bundle = heappop(by_room[room])
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room = max(geometry.bundle_tokens, geometry.blocks(length))
            bundle = len(held)
            held.append([])
        held[bundle].append(index)
        room -= length
        if room and len(held[bundle]) < geometry.bundle_sequences:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            heappush(by_room[room], bundle)
    # The padding behind a bundle is a sequence too.
    return [
        Bundle(tuple(sorted(found)), Room(geometry.blocks(sum(lengths[index] for index in found)), len(found) + 1))
        for found in held
    ]


class _Free:
    """Free rooms in a fixed order, under a tree of what the largest have: the first that holds a bundle is found in log n."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._leaves = 1 << len(rooms).bit_length()
        self._rows = self._tree([room.rows for room in rooms])
        self._entries = self._tree([room.entries for room in rooms])

    def _tree(self, values: list[int]) -> list[int]:
        """[1] the root, [2 n] and [2 n + 1] below [n], the values in the last places."""
        tree = [0] * (2 * self._leaves)
        tree[self._leaves : self._leaves + len(values)] = values
        level = self._leaves
        while level := level // 2:
            tree[level : 2 * level] = map(max, tree[2 * level : 4 * level : 2], tree[2 * level + 1 : 4 * level : 2])
        return tree

    def room(self, place: int) -> Room:
        return Room(self._rows[self._leaves + place], self._entries[self._leaves + place])

    def take(self, at: int, size: Room) -> int:
        """Take this from the first place that has it, `at` or later, and return the place."""
        node = self._leaves + at
        while node < self._leaves or not self._holds(node, size):
            if self._holds(node, size):
                node *= 2
            else:
                node = _right_of(node)
        for tree, taken in ((self._rows, size.rows), (self._entries, size.entries)):
            tree[node] -= taken
            above = node // 2
            while above and tree[above] != (largest := max(tree[2 * above], tree[2 * above + 1])):
                tree[above] = largest
                above //= 2
        return node - self._leaves

    def _holds(self, node: int, size: Room) -> bool:
        return self._rows[node] >= size.rows and self._entries[node] >= size.entries


def _right_of(node: int) -> int:
    """The largest subtree that begins where this one ends."""
    while node % 2:
        node //= 2
    assert node, "a bundle fits no empty chunk"
    return node + 1
