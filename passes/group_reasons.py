"""Why a grouping is as it is, in short lines with figures: what it costs, and what each alternative would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from passes.group_costs import ALL, Costs, Floats
from passes.loads import Grouping, HTask


def explained(found: Grouping, partition: Sequence[Sequence[int]], costs: Costs, unit: str) -> Grouping:
    """The grouping with its reasons."""
    htasks = []
    for index, htask in enumerate(found.groups):
        reasons = [_itself(htask, costs, partition[index], unit)]
        if len(htask.tasks) > 1:
            alone = costs.best(costs.tasks[partition[index]]).sum()
            reasons.append(f"each alone: {_than(alone, htask.cost, unit)}")
        reasons += _shapes(htask, costs, partition[index], unit)
        reasons += _joined(found, index, costs, partition, unit)
        htasks.append(replace(htask, reasons=tuple(reasons)))
    everyone = list(range(len(costs)))
    reasons = [f"{len(htasks)} group{'s' if len(htasks) > 1 else ''}: {_figure(found.cost, unit)} a step of all tasks"]
    for name, groups in (("all in one group", [everyone]), ("each alone", [[task] for task in everyone])):
        if len(groups) != len(htasks):
            total = costs.total(groups)
            reasons.append(f"{name}: " + (_than(total, found.cost, unit) if np.isfinite(total) else "does not fit"))
    return replace(found, groups=tuple(htasks), reasons=tuple(reasons))


def _itself(htask: HTask, costs: Costs, members: Sequence[int], unit: str) -> str:
    rows = costs.tasks.rows[list(members)].sum(axis=0).mean()
    full = rows / (htask.chunks * htask.shape.tokens) if htask.chunks else 0.0
    return f"{htask.chunks:.3g} chunks of {htask.shape}, {full:.0%} full: {_figure(htask.cost, unit)} a step"


def _shapes(htask: HTask, costs: Costs, members: Sequence[int], unit: str) -> list[str]:
    """The next best shape, and the best one if memory forbids it."""
    stack, shapes = costs.join([members]), costs.prices.shapes
    chosen = list(shapes).index(htask.shape)
    fitting, any_room = costs.by_shape(stack)[0], costs.by_shape(stack, room=ALL)[0]
    fitting[chosen] = np.inf
    reasons = []
    if np.isfinite(fitting.min()):
        reasons.append(f"next best shape, {shapes[_first(fitting)]}: {_than(fitting.min(), htask.cost, unit)}")
    if any_room.min() < htask.cost:
        shape = _first(any_room)
        size = costs.prices.chunk(costs.extras(stack.sets[0]), shapes[shape]).bytes + int(stack.held[0, shape])
        figure = _than(any_room.min(), htask.cost, unit)
        reasons.append(f"{shapes[shape]}: {figure}, but it holds {size:,} bytes in flight and {int(costs.room):,} are left")
    return reasons


def _joined(found: Grouping, index: int, costs: Costs, partition: Sequence[Sequence[int]], unit: str) -> list[str]:
    """The group it would best share chunks with, and what that would cost."""
    others = [other for other in range(len(partition)) if other != index]
    if not others:
        return []
    joint = costs.best(costs.join([[*partition[index], *partition[other]] for other in others]))
    apart = np.array([found.groups[index].cost + found.groups[other].cost for other in others])
    best = _first(joint - apart)
    if not np.isfinite(joint[best]):
        return []
    return [f"one group with group {others[best]}: {_than(joint[best], apart[best], unit)}"]


def _first(values: Floats) -> int:
    return int(values.argmin())


def _than(other: float, chosen: float, unit: str) -> str:
    return _figure(other, unit) + (f" ({other / chosen - 1:+.1%})" if chosen else "")


def _figure(cost: float, unit: str) -> str:
    return f"{cost * 1e3:.4g} ms" if unit == "s" else f"{cost:.4g} {unit}"
