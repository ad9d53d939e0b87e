"""Why a grouping is as it is, in short lines with figures: what it costs, and what each alternative would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from passes.group_costs import ALL, Costs, Floats
from passes.loads import Grouping, HTask


def explained(
    found: Grouping, partition: Sequence[Sequence[int]], searched: Costs, fine: Costs, table: Floats, unit: str
) -> Grouping:
    """The grouping with its reasons.

    Args:
        searched: what the partition was searched by. Other partitions are held against it by these, and the difference is added to
            what was chosen, as `fine` prices that: it would be long to price them all in all sizes.
        table: what each group costs by shape.
    """
    base = searched.best(searched.join(partition))
    htasks = []
    for index, htask in enumerate(found.groups):
        members = partition[index]
        reasons = [_itself(htask, fine, members, unit)]
        if len(members) > 1:
            more = searched.best(searched.tasks[members]).sum() - base[index]
            reasons.append(f"each alone: {_than(htask.cost + more, htask.cost, unit)}")
        reasons += _shapes(htask, fine, members, table[index], unit)
        reasons += _joined(found, index, searched, base, partition, unit)
        htasks.append(replace(htask, reasons=tuple(reasons)))
    everyone = list(range(len(fine)))
    reasons = [f"{len(htasks)} group{'s' if len(htasks) > 1 else ''}: {_figure(found.cost, unit)} a step of all tasks"]
    for name, groups in (("all in one group", [everyone]), ("each alone", [[task] for task in everyone])):
        if len(groups) != len(htasks):
            more = fine.total(groups) - fine.total(partition)
            reasons.append(f"{name}: " + (_than(found.cost + more, found.cost, unit) if np.isfinite(more) else "does not fit"))
    return replace(found, groups=tuple(htasks), reasons=tuple(reasons))


def _itself(htask: HTask, costs: Costs, members: Sequence[int], unit: str) -> str:
    rows = costs.tasks.rows[list(members)].sum(axis=0).mean()
    full = rows / (htask.chunks * htask.shape.tokens) if htask.chunks else 0.0
    return f"{htask.chunks:.3g} chunks of {htask.shape}, {full:.0%} full: {_figure(htask.cost, unit)} a step"


def _shapes(htask: HTask, costs: Costs, members: Sequence[int], fitting: Floats, unit: str) -> list[str]:
    """The next best shape, and the best one if memory forbids it."""
    stack, shapes = costs.join([members]), costs.prices.shapes
    others = np.where(np.arange(len(shapes)) == shapes.index(htask.shape), np.inf, fitting)
    too_large = np.where(np.isfinite(fitting), np.inf, costs.by_shape(stack, room=ALL)[0])
    reasons = []
    if np.isfinite(others.min()):
        reasons.append(f"next best shape, {shapes[_first(others)]}: {_than(others.min(), htask.cost, unit)}")
    if too_large.min() < htask.cost:
        shape = _first(too_large)
        size = int(costs.chunks(stack.sets[0])[1][shape] + stack.held[0, shape])
        figure = _than(too_large.min(), htask.cost, unit)
        reasons.append(f"{shapes[shape]}: {figure}, but it holds {size:,} bytes in flight and {int(costs.room):,} are left")
    return reasons


def _joined(found: Grouping, index: int, costs: Costs, base: Floats, partition: Sequence[Sequence[int]], unit: str) -> list[str]:
    """The group it would best share chunks with, and what that would cost."""
    others = [other for other in range(len(partition)) if other != index]
    if not others:
        return []
    joint = costs.best(costs.join([[*partition[index], *partition[other]] for other in others]))
    more = joint - base[index] - base[others]
    best = _first(more)
    if not np.isfinite(joint[best]):
        return []
    apart = found.groups[index].cost + found.groups[others[best]].cost
    return [f"one group with group {others[best]}: {_than(apart + more[best], apart, unit)}"]


def _first(values: Floats) -> int:
    return int(values.argmin())


def _than(other: float, chosen: float, unit: str) -> str:
    return _figure(other, unit) + (f" ({other / chosen - 1:+.1%})" if chosen else "")


def _figure(cost: float, unit: str) -> str:
    return f"{cost * 1e3:.4g} ms" if unit == "s" else f"{cost:.4g} {unit}"
