"""place: which chunk every sequence goes to. Lengths in, places out: no tensor is built and no token is looked at.

The unit of placement is a bundle: whole sequences of one task, packed to whole blocks. A sequence longer than a chunk is a chain of
pieces: the first has what is left over by whole chunks and stands at the head of its own, each later one fills a chunk.

A task's rows have one order, that of the chunks' backwards, and it follows from the task's own lengths and the geometry alone:
its chains in the order of its examples, each from its last piece to its first and then the bundles that the task itself puts
beside the first piece; behind all chains the rest of its bundles. Neighbours only move the rest to earlier or later chunks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# The least that kernels take as a block.
HEAD_TILE = 16

# Whole sequences of one task that share blocks: the indices of its examples, ascending.
Bundle = tuple[int, ...]


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

    def __sub__(self, taken: Room) -> Room:
        return Room(self.rows - taken.rows, self.entries - taken.entries)


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


@dataclass(frozen=True, slots=True)
class Packing:
    """One task's packing by its own data: its chains, the bundles beside the first piece of each, and the rest in their order."""

    chains: tuple[int, ...]
    beside: tuple[tuple[Bundle, ...], ...]
    rest: tuple[Bundle, ...]


def pieces(task: str, index: int, total: int, geometry: Geometry) -> Iterator[Piece]:
    """A sequence longer than a chunk, cut: the first piece has what whole chunks leave over, at least a row."""
    begin, rows = 0, (total - 1) % geometry.tokens + 1
    while begin < total:
        yield Piece(task, index, begin, rows, total)
        begin, rows = begin + rows, geometry.tokens


def packing(lengths: Sequence[int], geometry: Geometry) -> Packing:
    """Best-fit decreasing twice: sequences into bundles, and these into chunks of the task alone, those of its chains first.

    The order of the bundles is that of the chunks, so that the task alone needs no more of them and no neighbour reorders it.
    """
    chains = tuple(index for index, length in enumerate(lengths) if length > geometry.tokens)
    whole = [index for index, length in enumerate(lengths) if length <= geometry.tokens]
    found = _best_fit(
        [Room(lengths[index], 1) for index in whole],
        # The rows that fill up a long sequence's last block are free.
        lambda first: Room(max(geometry.bundle_tokens, geometry.blocks(first.rows)), geometry.bundle_sequences),
    )
    bundles = [tuple(sorted(whole[item] for item in bundle)) for bundle in found]
    taken = [_taken(bundle, lengths, geometry) for bundle in bundles]
    chunks = _best_fit(taken, lambda _: geometry.room, [_beside(lengths[index], geometry) for index in chains])
    placed = [tuple(bundles[item] for item in chunk) for chunk in chunks]
    return Packing(chains, tuple(placed[: len(chains)]), tuple(bundle for chunk in placed[len(chains) :] for bundle in chunk))


def rows(lengths: Sequence[int], geometry: Geometry) -> int:
    """Computed rows, in whole blocks, of one task's step."""
    own = packing(lengths, geometry)
    bundles = [*own.rest, *(bundle for beside in own.beside for bundle in beside)]
    chains = sum(geometry.blocks(piece.rows) for index in own.chains for piece in pieces("", index, lengths[index], geometry))
    return chains + sum(_taken(bundle, lengths, geometry).rows for bundle in bundles)


def place(lengths: Mapping[str, Sequence[int]], geometry: Geometry) -> list[Place]:
    """The chunks of every sequence of every task, in the order in which they run.

    First fit: a bundle goes to the first chunk that holds it, from that of its task's bundle before it on. Tasks with larger
    bundles go first, the order of tasks being free. So of chunks without a piece all but the last lack less than the largest
    bundle has, and no two that follow one another would fit into one.
    """
    own = {task: packing(given, geometry) for task, given in lengths.items()}
    places: list[Place] = []
    rooms: list[Room] = []
    start = dict.fromkeys(lengths, 0)
    for task, packed in own.items():
        for index, beside in zip(packed.chains, packed.beside, strict=True):
            start[task] = len(places)
            places.append(Place((task, index), [(task, bundle) for bundle in beside]))
            room = _beside(lengths[task][index], geometry)
            for bundle in beside:
                room -= _taken(bundle, lengths[task], geometry)
            rooms.append(room)
    sizes = {task: [_taken(bundle, lengths[task], geometry) for bundle in packed.rest] for task, packed in own.items()}
    free = _Free([*rooms, *[geometry.room] * sum(map(len, sizes.values()))])
    for task in sorted(own, key=lambda task: -max((size.rows for size in sizes[task]), default=0)):
        at = start[task]
        for bundle, size in zip(own[task].rest, sizes[task], strict=True):
            at = free.take(at, size)
            if at == len(places):
                places.append(Place(None, []))
            places[at].bundles.append((task, bundle))
    return places


def _taken(bundle: Bundle, lengths: Sequence[int], geometry: Geometry) -> Room:
    # The padding behind a bundle is a sequence too.
    return Room(geometry.blocks(sum(lengths[index] for index in bundle)), len(bundle) + 1)


def _beside(total: int, geometry: Geometry) -> Room:
    """What the first piece of a sequence leaves free in its chunk."""
    return geometry.room - Room(geometry.blocks((total - 1) % geometry.tokens + 1), 2)


def _best_fit(sizes: Sequence[Room], opened: Callable[[Room], Room], bins: Sequence[Room] = ()) -> list[list[int]]:
    """The items of each bin, from the largest down: each goes where the fewest rows are left, of equals to the earliest.

    Args:
        opened: the room of a new bin that begins with an item of this size.
        bins: the rooms of bins to begin with; they stay first.
    """
    held: list[list[int]] = [[] for _ in bins]
    left = list(bins)
    order = sorted((room.rows, index) for index, room in enumerate(bins))
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item].rows):
        size = sizes[item]
        at = bisect_left(order, (size.rows, 0))
        while at < len(order) and left[order[at][1]].entries < size.entries:
            at += 1
        if at < len(order):
            _, index = order.pop(at)
        else:
            index = len(held)
            held.append([])
            left.append(opened(size))
        held[index].append(item)
        left[index] -= size
        # A full one is looked at no more.
        if left[index].rows > 0 and left[index].entries > 0:
            insort(order, (left[index].rows, index))
    return held


class _Free:
    """Free rooms in a fixed order. A tree of what the largest below has, so that the first to hold something is found in log n."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._leaves = 1 << len(rooms).bit_length()
        nodes = [Room(0, 0)] * (2 * self._leaves)
        nodes[self._leaves : self._leaves + len(rooms)] = rooms
        self._nodes = nodes
        for node in range(self._leaves - 1, 0, -1):
            self._join(node)

    def _join(self, node: int) -> None:
        one, other = self._nodes[2 * node : 2 * node + 2]
        self._nodes[node] = Room(max(one.rows, other.rows), max(one.entries, other.entries))

    def take(self, at: int, size: Room) -> int:
        """Take the room from the first place that has it, `at` or later, and return the place."""
        node = self._leaves + at
        while True:
            if self._nodes[node].rows >= size.rows and self._nodes[node].entries >= size.entries:
                if node >= self._leaves:
                    break
                node *= 2
            else:
                while node % 2:
                    node //= 2
                assert node, "a bundle fits no empty chunk"
                node += 1
        found = node - self._leaves
        self._nodes[node] -= size
        while node := node // 2:
            self._join(node)
        return found
