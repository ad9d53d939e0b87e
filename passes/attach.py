"""attach: every task's adapters become nodes at their sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from passes.adapters import Adapter
from passes.graph import MuxGraph


def attach(graph: MuxGraph, *, adapters: Sequence[Adapter]) -> MuxGraph:
    """Write the nodes of every task's adapter.

    Before: level "normal". After: level "attached": behind each site one chain of nodes for each task, reading tables of that
    task alone; `tables` and `params` say where its tensors are, `notes` what costs more than it seems. Left alone: the backbone's
    own nodes.

    Raises:
        ValueError: a task's site that the graph does not have.
    """
    notes: list[str] = []
    for adapter in adapters:
        notes += adapter.kind.attach(graph, adapter.task.name, adapter.sites) or ()
    graph.gm.recompile()
    return replace(graph, level="attached", notes=(*graph.notes, *notes))
