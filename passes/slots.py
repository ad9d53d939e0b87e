"""Which task is in which slot of a joint table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from urllib.parse import quote

from torch import fx

from passes.graph import MuxGraph
from runtime.tables import Table


def slots_of(tasks: Sequence[str], reserve: int, previous: Table | None) -> tuple[str, ...]:
    """Those of the previous table stay, newcomers take free slots, then new ones; a fresh table has `reserve` free ones.

    Slots of tasks that are not among `tasks` stay too: they are in another group, and the table is everybody's.
    """
    if previous is None:
        return (*tasks, *[""] * reserve)
    rows = list(previous.rows)
    for task in tasks:
        if task not in rows:
            if "" in rows:
                rows[rows.index("")] = task
            else:
                rows.append(task)
    return tuple(rows)


def route_key(slots: Sequence[str]) -> str:
    """The key of the routing row that tables with these slots share."""
    return "+".join(quote(row, safe="") for row in slots)


def in_order(graph: MuxGraph, tasks: Iterable[str]) -> list[str]:
    """Tasks in the order in which they were attached."""
    known = (task for task, _ in (*graph.params, *graph.encodings))
    order = {task: index for index, task in enumerate(dict.fromkeys(known))}
    return sorted(tasks, key=order.__getitem__)


def at_one_place(found: Iterable[tuple[Hashable, str, fx.Node]]) -> dict[tuple[Hashable, int], list[fx.Node]]:
    """Nodes of several tasks, given in graph order as (place, task, node), by place and use: a module that runs twice has two."""
    uses: Counter[tuple[Hashable, str]] = Counter()
    joined: dict[tuple[Hashable, int], list[fx.Node]] = {}
    for place, task, node in found:
        joined.setdefault((place, uses[place, task]), []).append(node)
        uses[place, task] += 1
    return joined
