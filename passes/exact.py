"""exact: grouping as a mixed-integer linear program, for scipy's HiGHS: the optimum, or a bound, to hold `group` against.

A column is a possible group's kind: a union of extras and a shape. Two groups of one column are never better than one, so each is
used at most once.

    minimise   sum over columns c of  empty(c) * mean over samples of y[c, s]  +  switch * z[c]  +  what rows and tasks cost in x
    where      sum over c of x[i, c] = copies of load i        equal loads are one, with a count; c's extras hold those of i
               sum over i of rows[i, s] * x[i, c] <= T(c) * y[c, s]
               x[i, c] <= copies * z[c]                        a column with a task is used, and
               y[c, s] >= z[c]                                 has a chunk in every sample (where every load has rows)

Columns that another one beats for any rows are left out: that changes no optimum. Where the unions of the classes are too many,
classes are priced by their intersection until they are few: prices grow with extras, so what results is a bound, and a relaxation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from passes.admit import refuse
from passes.group import SWITCH, Grouping, as_groups
from passes.loads import Known, Load, Price, Prices, check


@dataclass(frozen=True, slots=True)
class Exact:
    """
    Attributes:
        cost: of the best partition found, by the real prices; infinite if none was found in time.
        bound: no partition costs less.
        grouping: that partition.
        relaxed: whether the bound comes from fewer classes than there are (it is valid, and may be low).
    """

    cost: float
    bound: float
    grouping: Grouping | None
    seconds: float
    relaxed: bool


@dataclass(frozen=True, slots=True)
class _Column:
    extras: frozenset[str]
    shape: int
    tokens: int
    price: Price

    @property
    def empty(self) -> float:
        return self.price.empty(self.tokens)


def exact(
    loads: Sequence[Load],
    prices: Prices,
    *,
    cap: int | None = None,
    base_bytes: int = 0,
    switch: float = SWITCH,
    seconds: float = 60.0,
    gap: float = 1e-4,
    unions: int = 64,
) -> Exact:
    """Solve it.

    Args:
        seconds: the solver's limit; then the bound so far holds.
        gap: between cost and bound, where the solver may stop.
        unions: most unions of extras among the columns.

    Raises:
        ValueError: as `group`.
        ImportError: scipy is not installed.
    """
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError("the exact solver is scipy's: pip install 'muxcompile[exact]'") from None
    start = time.perf_counter()
    problem = _Problem(loads, prices, cap, base_bytes, unions)
    answer = optimize.milp(
        c=problem.objective(switch),
        constraints=problem.constraints(optimize),
        integrality=problem.integrality,
        bounds=optimize.Bounds(0, problem.upper),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    bound = answer.mip_dual_bound if answer.mip_dual_bound is not None else 0.0
    grouping = None
    if answer.x is not None:
        partition = problem.partition(answer.x)
        grouping = as_groups(partition, loads, prices, cap=cap, base_bytes=base_bytes, switch=switch)
    cost = grouping.cost if grouping else math.inf
    return Exact(cost, min(float(bound), cost), grouping, time.perf_counter() - start, problem.relaxed)


class _Rows:
    """Rows of a linear program: lower <= values . variables <= upper."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, float]] = []  # (row, variable, value)
        self.lower: list[float] = []
        self.upper: list[float] = []

    def add(self, values: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        self.entries += [(len(self.lower), place, value) for place, value in values]
        self.lower.append(lower)
        self.upper.append(upper)


class _Problem:
    """The variables in one vector: x [loads, columns] where allowed, then y [columns, samples], then z [columns]."""

    def __init__(self, loads: Sequence[Load], prices: Prices, cap: int | None, base_bytes: int, unions: int) -> None:
        known = Known(prices)
        check(loads, known)
        refuse(loads, known, cap, base_bytes)
        room = math.inf if cap is None else cap - base_bytes - sum(load.resident for load in loads)
        reduced = _reduced([load.extras for load in loads], known, unions)
        self.relaxed = any(reduced[load.extras] != load.extras for load in loads)
        # Equal loads are one variable with a count.
        keys = [(load.rows, reduced[load.extras], load.own) for load in loads]
        self.members = {key: [index for index, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)}
        self.kinds = list(self.members)
        self.copies = np.array([len(members) for members in self.members.values()], dtype=np.float64)
        self.rows = np.array([rows for rows, _, _ in self.kinds], dtype=np.float64)  # [loads, S]
        plain = not any(own for _, _, own in self.kinds)
        self.columns = _columns(_closure(set(reduced.values())), known, room, plain)
        self.pairs = [
            (kind, column)
            for kind, (_, extras, own) in enumerate(self.kinds)
            for column, made in enumerate(self.columns)
            if extras <= made.extras and _takes(own, made, room)
        ]
        self.samples = self.rows.shape[1]
        self.first_y = len(self.pairs)
        self.first_z = self.first_y + len(self.columns) * self.samples
        self.size = self.first_z + len(self.columns)
        self.integrality = np.ones(self.size)
        total = (self.rows * self.copies[:, None]).sum(axis=0)
        most = [math.ceil(rows / column.tokens) for column in self.columns for rows in total]
        self.upper = np.concatenate([self.copies[[kind for kind, _ in self.pairs]], most, np.ones(len(self.columns))])

    def objective(self, switch: float) -> Any:
        mean = self.rows.mean(axis=1)
        x = [mean[kind] * self.columns[column].price.spared for kind, column in self.pairs]
        x = [cost if (own := self._own(*pair)) is None else cost + own.cost for cost, pair in zip(x, self.pairs, strict=True)]
        y = [column.empty / self.samples for column in self.columns for _ in range(self.samples)]
        return np.array([*x, *y, *[switch] * len(self.columns)])

    def _own(self, kind: int, column: int) -> Price | None:
        own = self.kinds[kind][2]
        return own[self.columns[column].shape] if own else None

    def constraints(self, optimize: Any) -> list[Any]:
        from scipy.sparse import csr_array

        rows = _Rows()
        of_kind: dict[int, list[int]] = {kind: [] for kind in range(len(self.kinds))}
        of_column: dict[int, list[int]] = {column: [] for column in range(len(self.columns))}
        for place, (kind, column) in enumerate(self.pairs):
            of_kind[kind].append(place)
            of_column[column].append(place)
            rows.add([(place, 1.0), (self.first_z + column, -self.copies[kind])], -np.inf, 0.0)
        for kind, places in of_kind.items():
            rows.add([(place, 1.0) for place in places], self.copies[kind], self.copies[kind])
        for column, places in of_column.items():
            for sample in range(self.samples):
                held = [(place, self.rows[self.pairs[place][0], sample]) for place in places]
                y, tokens = self._y(column, sample), float(self.columns[column].tokens)
                rows.add([*held, (y, -tokens)], -np.inf, 0.0)
                if self.rows[:, sample].min() > 0:
                    rows.add([(y, 1.0), (self.first_z + column, -1.0)], 0.0, np.inf)
        self._add_room(rows)
        at, place_of, value = zip(*rows.entries, strict=True)
        matrix = csr_array((value, (at, place_of)), shape=(len(rows.lower), self.size))
        return [optimize.LinearConstraint(matrix, rows.lower, rows.upper)]

    def _add_room(self, rows: _Rows) -> None:
        """The loads of each union need room in the columns that may hold one of them.

        The other rows imply these, but these speak of whole chunks alone, and the solver rounds what they leave: the bound of a
        hard instance rises by several percent.
        """
        for extras in sorted(_closure({extras for _, extras, _ in self.kinds}), key=sorted):
            inside = [kind for kind, (_, own, _) in enumerate(self.kinds) if own <= extras]
            among = set(inside)
            holding = sorted({column for kind, column in self.pairs if kind in among})
            for sample in range(self.samples):
                need = float((self.rows[inside, sample] * self.copies[inside]).sum())
                rows.add([(self._y(column, sample), float(self.columns[column].tokens)) for column in holding], need, np.inf)

    def _y(self, column: int, sample: int) -> int:
        return self.first_y + column * self.samples + sample

    def partition(self, answer: Any) -> list[list[int]]:
        """The tasks of each column of a solution; copies of a load are dealt out in order."""
        waiting = [list(members) for members in self.members.values()]
        groups: dict[int, list[int]] = {}
        for place, (kind, column) in enumerate(self.pairs):
            for _ in range(round(answer[place])):
                groups.setdefault(column, []).append(waiting[kind].pop(0))
        return [sorted(group) for group in groups.values()]


def _closure(classes: set[frozenset[str]]) -> set[frozenset[str]]:
    unions: set[frozenset[str]] = set()
    for extras in sorted(classes, key=sorted):
        unions |= {union | extras for union in unions} | {extras}
    return unions


def _reduced(classes: Sequence[frozenset[str]], prices: Known, most: int) -> dict[frozenset[str], frozenset[str]]:
    """Each class, or what it is priced as where the unions are more than `most`: the like-priced ones by what they share."""
    answer = {extras: extras for extras in classes}

    def cost(extras: frozenset[str]) -> float:
        return min(prices.chunk(extras, shape).cost / shape.tokens for shape in prices.shapes)

    # A closure can double with each class: beyond 20 of them it is not even counted.
    while len(kept := set(answer.values())) > 20 or len(_closure(kept)) > most:
        # What is lost is what both were dearer than their intersection; the pair that loses least is joined.
        one, other = min(
            combinations(sorted(kept, key=sorted), 2), key=lambda pair: cost(pair[0]) + cost(pair[1]) - 2 * cost(pair[0] & pair[1])
        )
        answer = {extras: one & other if now in (one, other) else now for extras, now in answer.items()}
    return answer


def _takes(own: tuple[Price | None, ...], column: _Column, room: float) -> bool:
    if not own:
        return True
    price = own[column.shape]
    return price is not None and column.price.bytes + price.bytes <= room


def _columns(unions: set[frozenset[str]], prices: Known, room: float, plain: bool) -> list[_Column]:
    """The columns that fit and that no other beats: where tasks have costs and bytes of their own by shape, all that fit."""
    made = [
        _Column(extras, index, shape.tokens, price)
        for extras in sorted(unions, key=lambda extras: (len(extras), sorted(extras)))
        for index, shape in enumerate(prices.shapes)
        if (price := prices.chunk(extras, shape)).bytes <= room
    ]
    if not plain:
        return made
    kept: list[_Column] = []
    for column in made:
        if not any(_beats(other, column) for other in kept):
            kept = [other for other in kept if not _beats(column, other)]
            kept.append(column)
    return kept


def _beats(one: _Column, other: _Column) -> bool:
    """Whether `one` holds whatever `other` does at no more cost: ceil(R/T) <= ceil(R/T') * ceil(T'/T) for any rows R."""
    fewer = math.ceil(other.tokens / one.tokens) * one.empty <= other.empty and one.price.spared <= other.price.spared
    return one.extras >= other.extras and fewer
