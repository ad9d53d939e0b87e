"""Sizes of chunks: which of many a search for groups looks at, and the best of all for the groups that it found.

A search prices every union of extras that it meets in every shape: where there are many unions it looks at few sizes, each about a
quarter larger than the one before. The few groups of its answer are then tried in all of them, over more steps (`Steps`): a chunk
that just holds the steps that were seen and overflows in every fourth to come is dear, and few steps do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from passes.group_costs import Costs, Floats
from passes.loads import HTask, Known, Load, held

# A search looks at this many sizes at least: with 12 its groups cost up to 4% more, with all of 35 up to 1.6% less.
SEARCHED = 16
# Chunks that tasks need in a size beyond their rows over its rows.
Overflow = Callable[[Sequence[str], int], float]


def searched_shapes(loads: Sequence[Load], prices: Known, kept: Sequence[int], *, most: int, capped: bool) -> list[int]:
    """Of the shapes that are kept at most so many, of sizes by equal ratios, but no fewer sizes than `SEARCHED`.

    The shape in which a task holds least is among them where that may be its only one: who is admitted has one.
    """
    sizes = np.array(sorted({prices.shapes[index].tokens for index in kept}))
    count = max(SEARCHED, most * len(sizes) // len(kept))
    if len(sizes) <= count:
        return sorted(kept)
    wanted = np.geomspace(sizes[0], sizes[-1], count)
    chosen = {int(sizes[np.abs(sizes - size).argmin()]) for size in wanted}
    found = {index for index in kept if prices.shapes[index].tokens in chosen}
    alike = {(load.extras, load.own): load for load in loads if capped or None in load.own}
    return sorted(found | {int(np.argmin(held(load, prices))) for load in alike.values()})


def only(loads: Sequence[Load], prices: Known, kept: Sequence[int]) -> tuple[list[Load], Known]:
    """The loads and prices of some of the shapes."""
    shapes = [prices.shapes[index] for index in kept]
    loads = [replace(load, own=tuple(load.own[index] for index in kept)) if load.own else load for load in loads]
    return loads, Known(prices, shapes)


def sized(
    partition: Sequence[Sequence[int]], names: Sequence[str], costs: Costs, overflow: Overflow | None
) -> tuple[list[HTask], Floats]:
    """Each group in the best of all shapes, and what it costs in each [groups, shapes].

    Without an overflow a cost is by rows, the least that there can be. With one, shapes are tried from the cheapest by rows on,
    until that alone is no less than the best found; the others' costs stay by rows.
    """
    stack, shapes = costs.join(partition), costs.prices.shapes
    table = costs.by_shape(stack)
    htasks = []
    for index, members in enumerate(partition):
        tasks = tuple(names[task] for task in members)
        price, size, _ = costs.chunks(stack.sets[index])
        best, more = int(table[index].argmin()), 0.0
        if overflow is not None:
            best, more = _tried(table[index], price, [shape.tokens for shape in shapes], partial(overflow, tasks))
        htasks.append(
            HTask(
                tasks=tasks,
                shape=shapes[best],
                chunks=float(np.ceil(stack.rows[index] / shapes[best].tokens).mean()) + more,
                cost=float(table[index, best]),
                bytes=int(size[best] + stack.held[index, best]),
            )
        )
    return htasks, table


def _tried(costs: Floats, price: Floats, tokens: Sequence[int], overflow: Callable[[int], float]) -> tuple[int, float]:
    """The best shape and its overflow; what was tried is added to the costs."""
    best, most, least = int(costs.argmin()), 0.0, np.inf
    for shape in map(int, np.argsort(costs, kind="stable")):
        if not costs[shape] < least:
            break
        more = overflow(tokens[shape])
        costs[shape] += more * price[shape]
        if costs[shape] < least:
            best, most, least = shape, more, costs[shape]
    return best, most
