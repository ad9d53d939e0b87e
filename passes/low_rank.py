"""Low-rank adapters of linears: y += scale * (dropout(x) A^T) B^T. A kind says where and what A and B are.

LoRA and VeRA are these; this file writes the nodes of one task, and makes the banks that those of all tasks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import fx

from codegen.ops import DROP, TILE_MM
from passes.graph import MuxGraph, after, call, origin, val
from passes.linears import Bank, Group, Inputs
from passes.slots import in_order, route_key, slots_of
from runtime.tables import Place, Table


class Site(Protocol):
    """One task's adapter at one linear: A [rank, in_features] and B [out_features, rank]."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def bucket(self) -> int: ...
    @property
    def scaling(self) -> float: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dropout(self) -> float: ...

    def bind(self, graph: MuxGraph, task: str, a: Place, b: Place) -> None:
        """Say what fills the rows of A, and of B transposed: params or an encoding."""


def attach(graph: MuxGraph, task: str, site: Site, node: fx.Node, views: dict[fx.Node, fx.Node]) -> fx.Node:
    """Behind the linear: its input as rows [T, K], dropout, down, up, add. Tables of one slot, routed to this task alone.

    `views` remembers the [T, K] view of each input. Returns the sum, which the linear's readers read now.
    """
    gm, x = graph.gm, node.args[0]
    assert isinstance(x, fx.Node)
    if x not in views:
        # Right behind x: another site may read it earlier than this one.
        with gm.graph.inserting_before(after(x)):
            views[x] = call(gm, torch.ops.aten.reshape.default, (x, [-1, site.in_features]), node)
    bank = _bank(graph, f"{site.name}@{task}", (task,), site.bucket, [{task: site}], val(x).dtype)
    inputs = Inputs(graph, node)
    rows, route = views[x], inputs.route(bank.a)
    users = list(node.users)
    with gm.graph.inserting_before(node.next):
        if bank.drops:
            counters = inputs.counter("sequences"), inputs.counter("positions")
            rows = call(gm, DROP, (rows, inputs.drop(bank.a), inputs.sites(bank.a, bank.sites), route, *counters), node)
        down = call(gm, TILE_MM, (rows, inputs.table(bank.a), route, None, True), node)
        up = call(gm, TILE_MM, (down, inputs.table(bank.b[0]), route, inputs.table(bank.scale[0]), False), node)
        # Of the head a part of the rows will run: shapes name no number of them.
        delta = call(gm, torch.ops.aten.reshape.default, (up, [*val(node).shape[:-2], -1, site.out_features]), node)
        out = call(gm, torch.ops.aten.add.Tensor, (node, delta), node)
    for user in users:
        user.replace_input_with(node, out)
    # The record by which `fuse` finds the nodes again in its own copy of the graph.
    down.meta["mux_low_rank"] = (task, site)
    return out


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Take the attached nodes out again and give each group of linears its banks. The first kind that calls it does it for all.
    What is behind a linear of no group stays as it is attached.

    What shares a bank follows from each task's own configuration, so that no neighbour changes its arithmetic: tasks of one rank
    bucket that adapt the same linears of an input, with dropout or without.
    """
    adapted: dict[fx.Node, dict[str, Site]] = {}
    grouped = {node for group in groups for node in group.linears}
    for down in list(graph.gm.graph.nodes):
        if "mux_low_rank" in down.meta and (base := origin(_sum_behind(down))) in grouped:
            task, site = down.meta["mux_low_rank"]
            _detach(graph, down)
            adapted.setdefault(base, {})[task] = site
    for group in groups:
        banks: dict[tuple[int, bool, tuple[str, ...]], dict[str, list[Site]]] = {}
        sites = [adapted.get(node, {}) for node in group.linears]
        for task in in_order(graph, {task for own in sites for task in own}):
            mine = [own[task] for own in sites if task in own]
            # A task's rows are in one bank: where its own ranks differ (rank_pattern), the largest decides.
            bucket = max(site.bucket for site in mine)
            banks.setdefault((bucket, mine[0].dropout > 0, tuple(site.name for site in mine)), {})[task] = mine
        for (bucket, drops, names), tasks in sorted(banks.items()):
            name = _joint_name(names) + (".dropout" if drops else "")
            slots = slots_of(list(tasks), reserve, previous.get(f"{name}.r{bucket}.A"))
            members = [{task: own[index] for task, own in tasks.items()} for index in range(len(names))]
            group.banks.append(_bank(graph, name, slots, bucket, members, val(group.x).dtype))


def _sum_behind(down: fx.Node) -> fx.Node:
    """Where an attached adapter is added to what it stands behind."""
    (up,) = down.users
    (delta,) = up.users
    (out,) = delta.users
    return out


def _detach(graph: MuxGraph, down: fx.Node) -> None:
    """Take one attached adapter out of the chain of additions."""
    out = _sum_behind(down)
    delta = out.args[1]
    out.replace_all_uses_with(out.args[0])
    for node in (out, delta, delta.args[0], down):
        graph.gm.graph.erase_node(node)


def _joint_name(names: tuple[str, ...]) -> str:
    """ "layers.0.q_proj+k_proj": the first name, and what distinguishes the others from their common beginning."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return "+".join([names[0], *(".".join(part[common:]) for part in parts[1:])])


# --- tables ----------------------------------------------------------------------------------------------------------


def _bank(
    graph: MuxGraph, name: str, rows: tuple[str, ...], bucket: int, members: list[dict[str, Site]], dtype: torch.dtype
) -> Bank:
    sites = [next(iter(tasks.values())) for tasks in members]
    slots, route = len(rows), route_key(rows)
    name, text = f"{name}.r{bucket}", str(dtype).removeprefix("torch.")
    a = Table(f"{name}.A", (slots, bucket * len(sites), sites[0].in_features), rows, True, route, text)
    b = tuple(
        Table(f"{name}.B{index}", (slots, bucket, site.out_features), rows, True, route, text) for index, site in enumerate(sites)
    )
    scale = tuple(
        Table(
            f"{name}.scale{index}",
            (slots,),
            rows,
            False,
            route,
            values=tuple(tasks[row].scaling if row in tasks else 0.0 for row in rows),
        )
        for index, tasks in enumerate(members)
    )
    graph.tables.update({table.name: table for table in (a, *b, *scale)})
    for index, tasks in enumerate(members):
        for task, site in tasks.items():
            slot, first = rows.index(task), index * bucket
            site.bind(graph, task, Place(a.name, slot, first, first + site.rank), Place(b[index].name, slot, 0, site.rank))
    names = tuple(site.name for site in sites)
    return Bank(bucket, a, b, scale, names, sites[0].dropout > 0)
