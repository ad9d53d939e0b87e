"""refit: two groups whose chunks are full, found by choosing the chunks first and then filling them.

A move that leaves two groups' chunk counts as they were gains nothing, so moves alone do not find two groups that just fill their
chunks. Here a plan names the unions, shapes and chunk counts of two groups; to fill it is to choose a set of tasks whose rows lie
between two borders in every sample, and how far a choice is from that tells which swap is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from passes.group_costs import Costs, Floats

# More classes than this have too many unions to plan with.
_CLASSES = 4
# Chunks of the first group; plans looked at (many sizes make many that are nearly alike) and tried, the cheapest first; starts of
# each, and swaps of each start.
_CHUNKS, _LOOKED_AT, _PLANS, _STARTS, _SWAPS = 8, 2048, 6, 3, 40


@dataclass(frozen=True, slots=True)
class _Plan:
    """The first group may hold classes `one`, the second `two`; the first one's rows [S] lie between low and high."""

    one: int
    two: int
    low: Floats
    high: Floats


def refit(costs: Costs, tasks: Sequence[int], below: float) -> Iterator[list[list[int]]]:
    """Partitions of the tasks into two groups, by plans that cost less than `below`."""
    kinds = costs.kind[list(tasks)]
    if len(np.unique(kinds)) > _CLASSES or len(tasks) < 2:
        return
    rows = costs.tasks.rows[list(tasks)]
    # No plan is cheaper than full chunks of each class alone.
    least = sum(float(mean) * costs.rate(1 << int(kind)) for mean, kind in zip(rows.mean(axis=1), kinds, strict=True))
    if least >= below:
        return
    for plan in _plans(costs, rows, kinds, below):
        may_one = np.array([plan.one >> int(kind) & 1 for kind in kinds], dtype=bool)
        may_two = np.array([plan.two >> int(kind) & 1 for kind in kinds], dtype=bool)
        inside = _filled(rows, may_one, may_two, plan)
        costs.evaluated += len(tasks) * _STARTS
        if inside is not None and 0 < inside.sum() < len(tasks):
            yield [[task for task, here in zip(tasks, inside, strict=True) if here == side] for side in (True, False)]


def _plans(costs: Costs, rows: Floats, kinds: np.ndarray, below: float) -> list[_Plan]:
    """The cheapest plans that their classes' rows may fit."""
    total = rows.sum(axis=0)  # [S]
    of_kind = {int(kind): rows[kinds == kind].sum(axis=0) for kind in np.unique(kinds)}
    sets, price, spared, tokens = _columns(costs, sorted(of_kind))
    if not len(sets):
        return []
    everything = sum(1 << kind for kind in of_kind)
    chunks = np.arange(1, _CHUNKS + 1)
    # The first group takes the same number of chunks in every sample, the second what is left: [first, second, chunks, S].
    left = np.maximum(0, total - (chunks[:, None] * tokens[:, None, None])[:, None])
    second = np.ceil(left / tokens[None, :, None, None])
    value = chunks * price[:, None, None] + second.mean(axis=3) * price[None, :, None] + 2 * costs.switch
    # Which of the rows are in which group is open: they cost about the same in both.
    value += (total.mean() * np.minimum(spared[:, None], spared))[..., None]
    value[(sets[:, None] | sets[None, :]) != everything] = np.inf
    costs.evaluated += value.size // 32
    cheap = np.flatnonzero(value < below)
    cheap = cheap[np.argsort(value.ravel()[cheap], kind="stable")][:_LOOKED_AT]
    first, other, count = np.unravel_index(cheap, value.shape)
    low = total - second[first, other, count] * tokens[other, None]  # [plans, S]
    high = np.broadcast_to((chunks[count] * tokens[first])[:, None], low.shape)
    # What only the first group may hold, and what it may hold at most.
    holds = sets[:, None] >> np.array(list(of_kind)) & 1  # [columns, classes]
    of_class = np.stack(list(of_kind.values()))  # [classes, S]
    must, most = (1 - holds[other]) @ of_class, holds[first] @ of_class
    may = ((must <= high) & (most >= low) & (low <= high)).all(axis=1)
    return [_Plan(int(sets[first[plan]]), int(sets[other[plan]]), low[plan], high[plan]) for plan in np.flatnonzero(may)[:_PLANS]]


def _columns(costs: Costs, kinds: Sequence[int]) -> tuple[np.ndarray, Floats, Floats, Floats]:
    """Unions of the classes with the shapes that are of use to them: sets of classes; of a chunk the price when it is empty, what
    each row of a task's adds, and its rows."""
    found: list[tuple[int, float, float, float]] = []
    for bits in range(1, 1 << len(kinds)):
        classes = sum(1 << kind for place, kind in enumerate(kinds) if bits >> place & 1)
        price, size, spared = (own.tolist() for own in costs.chunks(classes))
        kept: list[tuple[float, float, float]] = []
        for one, row, tokens, held in zip(price, spared, costs.tokens.tolist(), size, strict=True):
            if (
                math.isfinite(one)
                and held <= costs.room
                and not any(math.ceil(tokens / other) * least <= one and less <= row for least, less, other in kept)
            ):
                kept.append((one, row, tokens))
        found += [(classes, *own) for own in kept]
    sets = np.array([classes for classes, *_ in found], dtype=costs.tasks.sets.dtype)
    empty, row, tokens = (np.array([own[place] for own in found]) for place in (1, 2, 3))
    return sets, empty, row, tokens


def _filled(rows: Floats, may_one: np.ndarray, may_two: np.ndarray, plan: _Plan) -> np.ndarray | None:
    """Which tasks the first group takes, if a choice between the borders is found."""
    free = np.flatnonzero(may_one & may_two)
    weight = rows.sum(axis=1)
    for start in range(_STARTS):
        inside = ~may_two
        # Large tasks first, then every other one of them first, then small ones.
        order = free[np.argsort(-weight[free], kind="stable")]
        order = (order, np.concatenate([order[::2], order[1::2]]), order[::-1])[start]
        sums = rows[inside].sum(axis=0)
        for task in order:
            if (sums + rows[task] <= plan.high).all():
                inside[task], sums = True, sums + rows[task]
        for _ in range(_SWAPS):
            far = _distance(sums, plan)
            if far == 0:
                return inside
            taken, out = free[inside[free]], free[~inside[free]]
            # Take one in, leave one out, or both: row 0 and column 0 stand for none.
            more = np.concatenate([np.zeros((1, rows.shape[1])), rows[out]])
            less = np.concatenate([np.zeros((1, rows.shape[1])), rows[taken]])
            table = _distance(sums + more[None] - less[:, None], plan)
            leaves, comes = (int(place) for place in np.unravel_index(table.argmin(), table.shape))
            if not table[leaves, comes] < far:
                break
            sums = sums + more[comes] - less[leaves]
            if comes:
                inside[out[comes - 1]] = True
            if leaves:
                inside[taken[leaves - 1]] = False
    return None


def _distance(sums: Floats, plan: _Plan) -> Floats:
    """[...] how far sums [..., S] are outside the borders, over all samples."""
    outside: Floats = (np.maximum(0, sums - plan.high) + np.maximum(0, plan.low - sums)).sum(axis=-1)
    return outside
