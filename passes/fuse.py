"""fuse: adapters of one kind, of all tasks, become multi-task nodes; sites of one input read it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from passes.adapters import KINDS
from passes.graph import MuxGraph, drop_dead
from passes.linears import gather, write
from runtime.tables import Table


def fuse(graph: MuxGraph, *, reserve: int, previous: Mapping[str, Table] | None = None) -> MuxGraph:
    """The linears of one input become one node, and every kind merges its own nodes, into it where it can.

    Before: level "attached". After: level "fused": the number of nodes does not grow with the number of tasks; tables
    hold a slot for each task and `reserve` free ones. A table that is in `previous` keeps its size and its tasks' slots where the
    tasks fit, so that regions compiled for it serve again. Left alone: what a kind does not know how to merge. Results are equal to
    rounding, and keep their bits for a task whatever others share the tables.
    """
    groups = gather(graph)
    for kind in KINDS.values():
        kind.fuse(graph, groups, reserve=reserve, previous=previous or {})
    for group in groups:
        write(graph, group)
    drop_dead(graph)
    graph.gm.recompile()
    return replace(graph, level="fused")
