"""The frozen product of dropped inputs: y += scale * (W dropped(x)) in a task's rows, a second product beside the linear's own.

DoRA with dropout is this. The mask is the one under which the task's low-rank adapter at the same place reads x. Tasks at one place
share the product; rows of others go through it as well, and come out of it as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import fx

from codegen.ops import DROP, TILE_AFFINE
from passes.graph import MuxGraph, after, call, val
from passes.linears import Inputs
from passes.slots import at_one_place, in_order, route_key, slots_of
from runtime.tables import Place, Table

_MM = torch.ops.aten.mm.default


class Site(Protocol):
    """One task's scale at one linear."""

    @property
    def name(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

    def bind_scale(self, graph: MuxGraph, task: str, scale: Place) -> None:
        """Say what fills the row of the scale [1, N]."""


def attach(graph: MuxGraph, task: str, site: Site, node: fx.Node, behind: fx.Node) -> fx.Node:
    """Right behind the node `behind`, for all its readers; `node` is the linear. Returns the sum."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    with graph.gm.graph.inserting_before(after(behind)):
        rows = call(graph.gm, torch.ops.aten.reshape.default, (x, [-1, site.in_features]), node)
    users = list(behind.users)
    with graph.gm.graph.inserting_before(rows.next):
        out = _write(graph, f"{site.name}@{task}", {task: site}, (task,), rows, node.args[1], behind, node)
    for user in users:
        user.replace_input_with(behind, out)
    # The record by which `fuse` finds the nodes again in its own copy of the graph.
    out.meta["mux_dropped"] = (task, site)
    return out


def fuse(graph: MuxGraph, *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The products of all tasks at one place become one. Their rows are disjoint: the order of a chain does not matter."""
    written = [node for node in graph.gm.graph.nodes if "mux_dropped" in node.meta]
    places = at_one_place((site.name, task, node) for node in written for task, site in [node.meta["mux_dropped"]])
    for outs in places.values():
        first, *later = outs
        name = first.meta["mux_dropped"][1].name
        sites = dict(out.meta["mux_dropped"] for out in outs)
        slots = slots_of(in_order(graph, sites), reserve, previous.get(_table_name(name)))
        rows, weight = _parts(first)
        for out in later:
            out.replace_all_uses_with(out.args[0])
            graph.gm.graph.erase_node(out)
        with graph.gm.graph.inserting_before(first):
            joint = _write(graph, name, sites, slots, rows, weight, first.args[0], first)
        first.replace_all_uses_with(joint)
        graph.gm.graph.erase_node(first)


def notes(graph: MuxGraph, task: str) -> tuple[str, ...]:
    """For the plan: what a task's second products cost."""
    marks = [node.meta["mux_dropped"] for node in graph.gm.graph.nodes if "mux_dropped" in node.meta]
    sites = [site for owner, site in marks if owner == task]
    products = sum(2 * graph.tokens * site.in_features * site.out_features for site in sites)
    if not sites:
        return ()
    return (
        f"task {task!r}: dropout before a scaled frozen product (DoRA): a second product of the whole chunk at "
        f"{len(sites)} places, "
        f"{products:.3g} FLOPs a chunk forward and as many backward, shared by the tasks that have one there; "
        "its result is kept for the backward",
    )


def _parts(out: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The rows [T, K] that a written sum drops elements of, and the weight [N, K]."""
    delta = out.args[1]
    (scaled, *_) = delta.args
    product = scaled.args[0]
    dropped, turned = product.args
    return dropped.args[0], turned.args[0]


def _write(
    graph: MuxGraph,
    name: str,
    sites: Mapping[str, Site],
    slots: Sequence[str],
    rows: fx.Node,
    weight: fx.Node,
    behind: fx.Node,
    like: fx.Node,
) -> fx.Node:
    gm, inputs, value = graph.gm, Inputs(graph, like), val(behind)
    slots = tuple(slots)
    shape, dtype = (len(slots), 1, value.shape[-1]), str(value.dtype).removeprefix("torch.")
    table = Table(_table_name(name), shape, slots, True, route_key(slots), dtype)
    graph.tables[table.name] = table
    for task, site in sites.items():
        site.bind_scale(graph, task, Place(table.name, slots.index(task), 0, 1))
    route, counters = inputs.route(table), (inputs.counter("sequences"), inputs.counter("positions"))
    places = inputs.sites(table, [next(iter(sites.values())).name])
    dropped = call(gm, DROP, (rows, inputs.drop(table), places, route, *counters), like)
    product = call(gm, _MM, (dropped, call(gm, torch.ops.aten.t.default, (weight,), like)), like)
    nothing = call(gm, torch.ops.aten.zeros_like.default, (product,), like)
    # Zeros, whatever the product of others' rows is: they are routed, not multiplied.
    scaled = call(gm, TILE_AFFINE, (product, inputs.table(table), None, None, route, nothing), like)
    # Of the head a part of the rows will run: shapes name no number of them.
    delta = call(gm, torch.ops.aten.reshape.default, (scaled, [*value.shape[:-2], -1, value.shape[-1]]), like)
    return call(gm, torch.ops.aten.add.Tensor, (behind, delta), like)


def _table_name(name: str) -> str:
    return f"{name}.dropped.scale"
