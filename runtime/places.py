"""places: where on the board each unit's figures are posted, so that nobody writes over what another rank has yet to read."""

from __future__ import annotations

from collections.abc import Sequence


def places(tasks: Sequence[Sequence[str]], closed: Sequence[int], there: Sequence[bool]) -> list[int]:
    """The place of each unit, as few as may be.

    Ranks read a unit's figures when they close it, all of them in one order, one after another. A unit's forward waits on every
    rank until the units before it that share a task with it are closed there, and its figures come behind all of these forwards:
    so it may have the place of whatever is closed no later than those. Units that share no task with any before, and those of which
    this replica has no chunk, wait for nobody: they have places that nobody had.

    Args:
        tasks: of each unit, in the order in which their forwards may begin.
        closed: the units in the order in which they are closed.
        there: of each unit, whether this replica has a chunk of it.
    """
    turn = {unit: at for at, unit in enumerate(closed)}
    latest: dict[str, int] = {}
    found: list[int] = []
    last: list[int] = []  # of each place, the turn of whoever has it
    for unit, own in enumerate(tasks):
        before = max((latest[task] for task in own if task in latest), default=-1) if there[unit] else -1
        place = next((place for place, at in enumerate(last) if at <= before), len(last))
        last[place : place + 1] = [turn[unit]]
        found.append(place)
        latest |= {task: max(turn[unit], latest.get(task, -1)) for task in own}
    return found
