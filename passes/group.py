"""group: which tasks share chunks (an hTask each), which take turns, and in what shape of chunk.

One optimizer step of all tasks costs, for each group, its chunks times the price of one, and a `switch` from group to group. A
chunk costs its whole T whatever is in it, and runs the union of its group's extras over all of it: tasks of like adapters are
nearly free to fuse, unlike ones may be better apart, and few rows waste less in small chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from passes.admit import Admission, admit, refuse, room
from passes.group_costs import Costs, Floats
from passes.group_reasons import explained
from passes.group_search import Partition, exactly, searched
from passes.group_sizes import only, searched_shapes, sized
from passes.loads import Grouping, HTask, Known, Load, Objective, Price, Prices, Shape, Steps, check, flight

__all__ = [
    "Admission",
    "Grouping",
    "HTask",
    "Load",
    "Objective",
    "Price",
    "Prices",
    "Shape",
    "Steps",
    "admit",
    "fused",
    "group",
    "interleaved",
    "room",
]

# Up to this many tasks, if they have no more unions than EXACT_UNIONS, the answer is exact: 8 tasks have 255 at most.
EXACT_TASKS, EXACT_UNIONS = 12, 256
# A search prices no more unions than this: 16 classes alone have 65,535.
SEARCH_UNIONS = 512
# And in no more shapes than make so many prices, each of 0.2 ms, unless these are too few to choose from.
SEARCH_PRICES = 9216
# Seconds between two groups of a step: another program's graph starts.
SWITCH = 2e-5
# What a cost is counted in.
UNITS = {"time": "s", "energy": "J", "memory": "s"}


def group(
    loads: Sequence[Load],
    prices: Prices,
    *,
    cap: int | None = None,
    base_bytes: int = 0,
    objective: Objective = "time",
    switch: float = SWITCH,
    steps: Steps | None = None,
) -> Grouping:
    """The cheapest partition of the tasks, under a memory cap.

    Args:
        cap: bytes of the device; None: no limit.
        base_bytes: what is held before any task: the backbone.
        objective: "time" and "energy" differ by the prices given, and by the unit that reasons print; "memory" takes the least peak
            that any partition has, then the least cost at it.
        switch: cost of one group more in a step.
        steps: what the sizes of the groups are chosen by, and what costs are of; None: the loads.

    Returns:
        Exact up to 8 tasks, and up to 12 of few classes; of many sizes a part may be looked at for it (`group_sizes`), but each
        group has the best of all. Beyond, never worse than `fused` and `interleaved`. Deterministic.

    Raises:
        ValueError: a task, or the tasks together, do not fit (see `refuse`); a field of a load is wrong.
    """
    if objective not in UNITS:
        raise ValueError(f"objective: {objective!r}; it is one of {', '.join(UNITS)}")
    known, room = _admitted(loads, prices, cap, base_bytes)
    if objective == "memory":
        # No partition holds less than its widest task does alone, and each alone holds just that.
        room = max(flight(load, known) for load in loads)
    everyone = list(range(len(loads)))
    alone = [[task] for task in everyone]
    unions = _unions(loads)
    exact = len(loads) <= EXACT_TASKS and unions <= EXACT_UNIONS
    kept = list(range(len(known.shapes)))
    if not exact:
        # Those that are surely worse are left out.
        kept = Costs(loads, known, room=room, switch=switch, unions=0).useful()
    kept = searched_shapes(loads, known, kept, most=SEARCH_PRICES // unions, capped=math.isfinite(room))
    costs = Costs(*only(loads, known, kept), room=room, switch=switch, unions=SEARCH_UNIONS)
    partition = exactly(costs, alone) if exact else searched(costs)
    fine = Costs(steps.loads if steps else loads, known, room=room, switch=switch, unions=len(loads))
    partition = min((sorted(sorted(members) for members in partition), [everyone], alone), key=fine.total)
    found, table = _grouping(fine, partition, loads, base_bytes, steps)
    return explained(found, partition, costs, fine, table, UNITS[objective])


def fused(
    loads: Sequence[Load],
    prices: Prices,
    *,
    cap: int | None = None,
    base_bytes: int = 0,
    switch: float = SWITCH,
    shape: Shape | None = None,
) -> Grouping:
    """All tasks in one group, in its best shape or in a given one.

    Raises:
        ValueError: as `group`; or one group does not fit.
    """
    return _fixed([list(range(len(loads)))], loads, prices, cap, base_bytes, switch, shape)


def interleaved(
    loads: Sequence[Load],
    prices: Prices,
    *,
    cap: int | None = None,
    base_bytes: int = 0,
    switch: float = SWITCH,
    shape: Shape | None = None,
) -> Grouping:
    """Each task alone, in its best shape or in a given one.

    Raises:
        ValueError: as `group`.
    """
    return _fixed([[index] for index in range(len(loads))], loads, prices, cap, base_bytes, switch, shape)


def _fixed(
    partition: Partition,
    loads: Sequence[Load],
    prices: Prices,
    cap: int | None,
    base_bytes: int,
    switch: float,
    shape: Shape | None,
) -> Grouping:
    if shape is not None:
        if shape not in prices.shapes:
            raise ValueError(f"shape: {shape} is none of the prices'")
        place = list(prices.shapes).index(shape)
        loads = [replace(load, own=load.own[place : place + 1]) for load in loads]
        prices = Known(prices, shapes=(shape,))
    return as_groups(partition, loads, prices, cap=cap, base_bytes=base_bytes, switch=switch)


def as_groups(
    partition: Partition,
    loads: Sequence[Load],
    prices: Prices,
    *,
    cap: int | None,
    base_bytes: int,
    switch: float,
    steps: Steps | None = None,
) -> Grouping:
    """A given partition (indices of loads), each group in its best shape.

    Raises:
        ValueError: as `group`; or a group of it does not fit.
    """
    known, room = _admitted(loads, prices, cap, base_bytes)
    costs = Costs(steps.loads if steps else loads, known, room=room, switch=switch, unions=len(loads))
    for members, cost in zip(partition, costs.best(costs.join(partition)), strict=True):
        if not math.isfinite(cost):
            names = ", ".join(loads[task].task for task in members)
            raise ValueError(f"memory: {len(members)} tasks in one group ({names}): no shape of chunks takes them")
    return _grouping(costs, partition, loads, base_bytes, steps)[0]


def _admitted(loads: Sequence[Load], prices: Prices, cap: int | None, base_bytes: int) -> tuple[Known, float]:
    """The prices, and the bytes that are left for chunks."""
    check(loads, prices)
    known = Known(prices)
    refuse(loads, known, cap, base_bytes)
    return known, math.inf if cap is None else cap - base_bytes - sum(load.resident for load in loads)


def _unions(loads: Sequence[Load]) -> int:
    """How many unions of extras the tasks have; `SEARCH_UNIONS` where there are more."""
    unions: set[frozenset[str]] = {frozenset()}
    for extras in {load.extras for load in loads}:
        unions |= {union | extras for union in unions}
        if len(unions) > SEARCH_UNIONS:
            return SEARCH_UNIONS
    return len(unions)


def _grouping(
    costs: Costs, partition: Partition, loads: Sequence[Load], base_bytes: int, steps: Steps | None
) -> tuple[Grouping, Floats]:
    """The partition, each group in its best shape, and what each costs by shape."""
    names = [load.task for load in loads]
    htasks, table = sized(partition, names, costs, steps.overflow if steps else None)
    found = Grouping(
        groups=tuple(htasks),
        cost=math.fsum(htask.cost for htask in htasks),
        bytes=base_bytes + sum(load.resident for load in loads) + max(htask.bytes for htask in htasks),
    )
    return found, table
