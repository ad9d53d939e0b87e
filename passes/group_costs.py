"""The cost of many possible groups at once, in numpy.

    cost(group) = min over shapes that fit of  mean over samples of ceil(rows / T) * empty + rows * spared  + own + switch

with `empty` and `spared` of the price of the union of extras in that shape: rows of padding cost less than those of tasks.

A group is a few numbers: its rows in each sample [S], its tasks' own cost [P] and the most one of them holds [P] by shape, and the
union of its tasks' extras. A union is known by its row in a table of prices [unions, P], filled as unions are met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.loads import Known, Load

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# No cap at all. A shape that a task cannot take holds infinitely many bytes, which is more.
ALL = float(np.finfo(np.float64).max)
# Numbers of a temporary array that stays in the caches: 1 MB.
_PIECE = 1 << 17
# With no more classes than this, the row of each set of them is looked up in an array: 256 KB.
_LOOKED_UP = 16


@dataclass(frozen=True, slots=True)
class Stack:
    """B possible groups: rows [B, S], own [B, P], held [B, P]; sets [B], the classes in each, a bit for each class."""

    rows: Floats
    own: Floats
    held: Floats
    sets: NDArray[Any]

    def __getitem__(self, index: Any) -> Stack:
        return Stack(self.rows[index], self.own[index], self.held[index], self.sets[index])

    def __or__(self, other: Stack) -> Stack:
        """Each group joined with its counterpart."""
        held = np.maximum(self.held, other.held)
        return Stack(self.rows + other.rows, self.own + other.own, held, self.sets | other.sets)

    def __len__(self) -> int:
        return len(self.sets)

    @staticmethod
    def over(parts: Sequence[Stack]) -> Stack:
        """One stack on top of the other."""
        return Stack(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.own for part in parts]),
            np.concatenate([part.held for part in parts]),
            np.concatenate([part.sets for part in parts]),
        )


class Costs:
    """Loads and prices as arrays.

    A class is a set of tasks with the same extras: to a union they are one.

    Attributes:
        tasks: each task as a group of its own.
        kind: [N] the class of each task.
        unions: how many unions may be priced; one met later is not considered (without a price no group can have it). Each class
            and all of them together are always priced: the fixed policies are.
        evaluated: how many possible groups were priced so far, to bound a search by its work and not by the clock.
    """

    def __init__(self, loads: Sequence[Load], prices: Known, *, room: float, switch: float, unions: int) -> None:
        self.prices = prices
        self.room = min(room, ALL)
        self.switch = switch
        self.evaluated = 0
        self.tokens = np.array([shape.tokens for shape in prices.shapes], dtype=np.float64)
        self._inverse = 1.0 / self.tokens
        self.samples = len(loads[0].rows)
        self.classes = list(dict.fromkeys(load.extras for load in loads))
        place = {extras: index for index, extras in enumerate(self.classes)}
        self.kind: Ints = np.array([place[load.extras] for load in loads], dtype=np.int64)
        own = np.zeros((len(loads), len(self.tokens)))
        held = np.zeros_like(own)
        for index, load in enumerate(loads):
            for position, price in enumerate(load.own):
                own[index, position], held[index, position] = (price.cost, price.bytes) if price else (0.0, np.inf)
        rows = np.array([load.rows for load in loads], dtype=np.float64)
        # Python's own integers where the bits are too many for one of numpy's.
        bits = np.array([1 << int(kind) for kind in self.kind], dtype=np.int64 if len(self.classes) < 63 else object)
        self.tasks = Stack(rows, own, held, bits)
        self._rows_of: dict[int, int] = {}
        self._rows_of_union: dict[frozenset[str], int] = {}
        self._lookup = np.full(1 << len(self.classes), -1, dtype=np.int32) if len(self.classes) <= _LOOKED_UP else None
        self.unions = unions + len(self.classes) + 1
        # Row 0 is the union without a price.
        self._priced = 1
        self._empty = np.full((self.unions + 1, len(self.tokens)), np.inf)
        self._bytes = np.full_like(self._empty, np.inf)
        self._spared = np.zeros_like(self._empty)
        for classes in [*(1 << kind for kind in range(len(self.classes))), (1 << len(self.classes)) - 1]:
            self.price(classes)

    def __len__(self) -> int:
        return len(self.kind)

    def extras(self, classes: int) -> frozenset[str]:
        """The union of a set of classes."""
        found, left = [], int(classes)
        while left:
            found.append(self.classes[(left & -left).bit_length() - 1])
            left &= left - 1
        return frozenset().union(*found)

    def price(self, classes: int) -> int:
        """The row of a union in the tables; 0, whose prices are infinite, where there is none."""
        if (row := self._rows_of.get(classes)) is not None:
            return row
        union = self.extras(classes)
        if (row := self._rows_of_union.get(union)) is None:
            if self._priced > self.unions:
                self._rows_of[classes] = 0
                return 0
            found = [self.prices.chunk(union, shape) for shape in self.prices.shapes]
            row = self._rows_of_union[union] = self._priced
            self._empty[row] = [price.empty(shape.tokens) for price, shape in zip(found, self.prices.shapes, strict=True)]
            self._bytes[row] = [price.bytes for price in found]
            self._spared[row] = [price.spared for price in found]
            self._priced += 1
        self._rows_of[classes] = row
        return row

    def _rows(self, sets: NDArray[Any]) -> NDArray[Any]:
        """[B] the rows of sets of classes in the tables."""
        if self._lookup is None:
            found, inverse = np.unique(sets, return_inverse=True)
            return np.array([self.price(int(classes)) for classes in found], dtype=np.int64)[inverse]
        rows = self._lookup[sets]
        if (rows < 0).any():
            for classes in np.unique(sets[rows < 0]):
                self._lookup[classes] = self.price(int(classes))
            rows = self._lookup[sets]
        return rows

    def by_shape(self, stack: Stack, room: float | None = None) -> Floats:
        """[B, P] the cost of each group in each shape; infinite where it does not fit (in `room`, if given)."""
        rows = self._rows(stack.sets)
        self.evaluated += len(stack)
        chunks = np.zeros((len(stack), len(self.tokens)))
        # Rows are whole numbers: half of one less leaves ceil(R / T) as it is, and is further from a whole number of chunks than a
        # product with 1 / T is wrong (below 2**50 rows). A small stack goes in one piece, a large one sample by sample: its
        # quotients would not stay in the caches.
        counted, step = stack.rows.T - 0.5, max(1, _PIECE // chunks.size)
        for sample in range(0, self.samples, step):
            quotient = counted[sample : sample + step, :, None] * self._inverse
            chunks += np.ceil(quotient, out=quotient).sum(axis=0)
        fits = self._bytes[rows] + stack.held <= (self.room if room is None else room)
        chunks *= np.where(fits, self._empty[rows], 0.0) / self.samples
        chunks += stack.rows.mean(axis=1)[:, None] * self._spared[rows]
        return np.where(fits, chunks + stack.own + self.switch, np.inf)

    def best(self, stack: Stack) -> Floats:
        """[B] the cost of each group in its best shape."""
        return self.by_shape(stack).min(axis=1)

    def join(self, groups: Sequence[Sequence[int]], of: Stack | None = None) -> Stack:
        """Groups of tasks (or of the groups in `of`) as one stack; none of them is empty."""
        stack = (of or self.tasks)[np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])]
        first = np.cumsum([0, *(len(group) for group in groups[:-1])])
        return Stack(
            np.add.reduceat(stack.rows, first),
            np.add.reduceat(stack.own, first),
            np.maximum.reduceat(stack.held, first),
            np.bitwise_or.reduceat(stack.sets, first),
        )

    def chunks(self, classes: int) -> tuple[Floats, Floats, Floats]:
        """[P] cost of an empty chunk that runs a union, its bytes, and what each row of a task's adds to the cost."""
        row = self.price(classes)
        return self._empty[row], self._bytes[row], self._spared[row]

    def rate(self, classes: int) -> float:
        """Cost of a row of a full chunk, at the best shape; infinite where the union has no price."""
        empty, _, spared = self.chunks(classes)
        return float((empty / self.tokens + spared).min())

    def useful(self) -> list[int]:
        """The shapes that no other beats, for each class alone and for all tasks together.

        One shape beats another if it holds the same rows for no more: ceil(R/T) <= ceil(R/T') * ceil(T'/T) for any rows R, and a
        row itself costs no more. It has to fit with all extras, and so with any. Where tasks have costs and bytes of their own by
        shape, all shapes are useful.
        """
        everyone = range(len(self.tokens))
        if self.tasks.own.any() or self.tasks.held.any():
            return list(everyone)
        cost, spared = self._empty[1 : self._priced], self._spared[1 : self._priced]
        largest = self._bytes[self.price((1 << len(self.classes)) - 1)]
        kept: list[int] = []
        for shape in everyone:
            ratio = np.ceil(self.tokens[shape] / self.tokens)
            beaten = (cost * ratio <= cost[:, shape, None]).all(axis=0) & (spared <= spared[:, shape, None]).all(axis=0)
            beaten &= largest <= self.room
            equal = (cost == cost[:, shape, None]).all(axis=0) & (self.tokens == self.tokens[shape])
            equal &= (spared == spared[:, shape, None]).all(axis=0)
            # Of equal ones the first stays.
            beaten[equal] &= np.arange(len(self.tokens))[equal] < shape
            if not beaten.any():
                kept.append(shape)
        return kept

    def total(self, groups: Sequence[Sequence[int]]) -> float:
        """Cost of a partition."""
        return float(self.best(self.join(groups)).sum())
