"""What grouping reads and what it answers: loads of tasks, prices of chunks, hTasks. Plain values; the arithmetic is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Objective = Literal["time", "energy", "memory"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a chunk: its rows, and whether it runs its forwards again instead of keeping activations."""

    tokens: int
    checkpoint: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} rows" + (" checkpointed" if self.checkpoint else "")


@dataclass(frozen=True, slots=True)
class Price:
    """Of one full chunk: seconds (or joules), and the bytes of activations and workspace in flight; and what each row of padding
    spares of the cost."""

    cost: float
    bytes: int
    spared: float = 0.0

    def empty(self, tokens: int) -> float:
        """The cost of a chunk of so many rows that are all padding; each row of a task's adds what it would have spared."""
        return self.cost - tokens * self.spared


@dataclass(frozen=True, slots=True)
class Load:
    """What one optimizer step of a task asks for.

    Attributes:
        rows: computed rows of a step, in each of S sampled steps; S is the same for all tasks of a call.
        extras: what its adapters make a chunk do beyond the frozen backbone.
        resident: bytes of its tables and optimizer, held whatever runs.
        own: for each of the prices' shapes, what a step of this task costs beside its chunks and what it holds beside one of
            them (a long sequence: keys and values that it carries from chunk to chunk, forwards that run twice); None where
            the task cannot run in that shape. Empty: nothing in any shape.
    """

    task: str
    rows: tuple[int, ...]
    extras: frozenset[str]
    resident: int = 0
    own: tuple[Price | None, ...] = ()

    def held(self, shape: int) -> float:
        """Bytes that it holds beside a chunk of this one of the shapes; infinite where it cannot run in that."""
        price = self.own[shape] if self.own else Price(0.0, 0)
        return math.inf if price is None else price.bytes


@dataclass(frozen=True, slots=True)
class Steps:
    """More sampled steps than a search for groups looks at: the sizes of the groups that it found are chosen by these.

    Attributes:
        loads: of the same tasks, over these steps; all but the rows is as in the search.
        overflow: chunks of so many rows that a step of some tasks needs beyond their rows over those of a chunk, rounded up, on
            average: what does not fill a chunk to its end is behind it. None: no more.
    """

    loads: tuple[Load, ...]
    overflow: Callable[[Sequence[str], int], float] | None = None


class Prices(Protocol):
    """What a chunk costs. More extras never cost less, in seconds (full or empty, or for a row) or in bytes: admission and the
    bounds of `exact` rest on it."""

    @property
    def shapes(self) -> Sequence[Shape]: ...

    def chunk(self, extras: frozenset[str], shape: Shape) -> Price: ...


class Known:
    """Prices that are asked once: a search comes back to the same chunk many times."""

    def __init__(self, prices: Prices, shapes: Sequence[Shape] | None = None) -> None:
        self.shapes = tuple(shapes or prices.shapes)
        self._prices = prices
        self._found: dict[tuple[frozenset[str], Shape], Price] = {}

    def chunk(self, extras: frozenset[str], shape: Shape) -> Price:
        if (extras, shape) not in self._found:
            self._found[extras, shape] = self._prices.chunk(extras, shape)
        return self._found[extras, shape]


@dataclass(frozen=True, slots=True)
class HTask:
    """Tasks that share chunks of one shape.

    Attributes:
        chunks: of one optimizer step of all its tasks, mean over the sampled steps.
        cost: of that step, in seconds or joules.
        bytes: in flight while one of its chunks runs.
        reasons: why these tasks and this shape, with what the alternatives cost.
    """

    tasks: tuple[str, ...]
    shape: Shape
    chunks: float
    cost: float
    bytes: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grouping:
    """A partition of the tasks into hTasks, which take turns.

    Attributes:
        cost: of one optimizer step of every task.
        bytes: the peak: the backbone, everything resident, and the largest hTask's chunk.
        reasons: what the fixed policies cost beside it.
    """

    groups: tuple[HTask, ...]
    cost: float
    bytes: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for index, htask in enumerate(self.groups):
            lines.append(f"group {index}: {' '.join(htask.tasks)}")
            lines += [f"  {reason}" for reason in htask.reasons]
        return "\n".join([*lines, *self.reasons])


def check(loads: Sequence[Load], prices: Prices) -> None:
    """
    Raises:
        ValueError: naming the task and the field.
    """
    if not loads:
        raise ValueError("loads: there is no task to group")
    if not prices.shapes:
        raise ValueError("prices: there is no shape of chunks to choose from")
    names: set[str] = set()
    for load in loads:
        where = f"task {load.task!r}"
        if load.task in names:
            raise ValueError(f"{where}: given twice")
        names.add(load.task)
        if not load.rows or len(load.rows) != len(loads[0].rows):
            raise ValueError(f"{where}: rows: {len(load.rows)} sampled steps, where {loads[0].task!r} has {len(loads[0].rows)}")
        if min(load.rows) < 0 or load.resident < 0:
            raise ValueError(f"{where}: rows and resident bytes are not negative")
        if load.own and len(load.own) != len(prices.shapes):
            raise ValueError(f"{where}: own: {len(load.own)} prices for {len(prices.shapes)} shapes")


def held(load: Load, prices: Prices) -> list[float]:
    """Bytes in flight while the task runs alone, in each shape; infinite where that does not take it."""
    return [prices.chunk(load.extras, shape).bytes + load.held(index) for index, shape in enumerate(prices.shapes)]


def flight(load: Load, prices: Prices) -> float:
    """The fewest bytes in which the task runs alone; infinite where no shape takes it."""
    return min(held(load, prices))
