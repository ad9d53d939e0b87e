"""The linears of one input as one node, with the banks of adapters that the kinds bring."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from codegen.lower import Forms
from codegen.ops import LINEARS
from passes.graph import LINEAR, MuxGraph, Source, add_input, call, fake_like, head_of, module_of, val
from runtime.tables import Table


@dataclass(frozen=True, slots=True)
class Bank:
    """The tables of the tasks of one rank bucket R that adapt the same linears of an input (`codegen.layout.Bank`).

    `a` is [S, members * R, K], the members below each other; `b[i]` is [S, R, N_i] (B transposed: a task's ranks are whole rows);
    `scale[i]` is [S]; `sites` are the members' names; `drops`: elements of the input are dropped.
    """

    rank: int
    a: Table
    b: tuple[Table, ...]
    scale: tuple[Table, ...]
    sites: tuple[str, ...]
    drops: bool


@dataclass(slots=True)
class Group:
    """Linears of one layer that read the same input, in graph order."""

    linears: list[fx.Node]
    banks: list[Bank] = field(default_factory=list)
    # `codegen.lower.Forms` as text, where they are not the lowering's to choose.
    forms: str = ""

    @property
    def x(self) -> fx.Node:
        x = self.linears[0].args[0]
        assert isinstance(x, fx.Node)
        return x

    def index(self, site: str) -> int:
        return next(index for index, node in enumerate(self.linears) if module_of(node) == site)


def gather(graph: MuxGraph) -> list[Group]:
    """Every frozen linear, by its input and its layer; the head if somebody adapts it.

    Whether anybody adapts the others does not matter: a sum over them would otherwise depend on who does. The head alone is a
    group of its own, and its adapters are added to the frozen products: who has none gets these, with them or without. So are the
    calls of a linear that runs more than once: a task's tensors for it lie in one place, whatever stands beside it there.
    """
    weights = {node for source, node in graph.inputs.items() if source.kind == "weight"}
    found: dict[tuple[fx.Node, Any], Group] = {}
    head = head_of(graph)
    adapted = {node.meta["mux_low_rank"][1].name for node in graph.gm.graph.nodes if "mux_low_rank" in node.meta}
    calls = Counter(_root(node.args[1]) for nodes in graph.sites().values() for node in nodes)
    for node in graph.gm.graph.find_nodes(op="call_function", target=LINEAR):
        x, weight, *bias = node.args
        frozen = all(given is None or _root(given) in weights for given in (weight, *bias))
        if not frozen or val(weight).dim() != 2 or val(x).shape[:-1].numel() != graph.tokens:
            continue
        if node is head:
            if module_of(node) in adapted:
                found[x, "head"] = Group([node], forms=str(Forms(("epilogue",), "epilogue")))
            continue
        layer = re.match(r"(.*?\.?\d+)(?:\.|$)", module_of(node))
        place = node if calls[_root(weight)] > 1 else layer[1] if layer else ""
        found.setdefault((x, place), Group([])).linears.append(node)
    return list(found.values())


def _root(node: fx.Node) -> fx.Node:
    """What a chain of views of one input begins with."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def write(graph: MuxGraph, group: Group) -> None:
    """Put the group's node where the first of its linears stood."""
    gm, first = graph.gm, group.linears[0]
    inputs: list[list[fx.Node | None]] = [[], []]
    with gm.graph.inserting_before(first):
        for node in group.linears:
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            inputs[0].append(_again(gm, weight))
            inputs[1].append(None if bias is None else _again(gm, bias))
    tables = Inputs(graph, first)
    a = [tables.table(bank.a) for bank in group.banks]
    b = [tables.table(table) for bank in group.banks for table in bank.b]
    scale = [tables.table(table) for bank in group.banks for table in bank.scale]
    route = [tables.route(bank.a) for bank in group.banks]
    members = [group.index(site) for bank in group.banks for site in bank.sites]
    dropping = [bank for bank in group.banks if bank.drops]
    counters = [tables.counter("sequences"), tables.counter("positions")] if dropping else [None, None]
    drop, sites = [tables.drop(bank.a) for bank in dropping], [tables.sites(bank.a, bank.sites) for bank in dropping]
    args = (
        group.x,
        *inputs,
        a,
        b,
        scale,
        route,
        drop,
        sites,
        *counters,
        members,
        [int(bank.drops) for bank in group.banks],
        group.forms,
    )
    with gm.graph.inserting_before(first):
        joint = call(gm, LINEARS, args, first)
        outputs = [call(gm, operator.getitem, (joint, index), node) for index, node in enumerate(group.linears)]
    for node, output in zip(group.linears, outputs, strict=True):
        node.replace_all_uses_with(output)
        gm.graph.erase_node(node)


def _again(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A view of a weight, made at the insertion point."""
    if node.op == "placeholder":
        return node
    (source,) = node.all_input_nodes
    base = _again(gm, source)
    return gm.graph.node_copy(node, lambda _: base)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The placeholders that adapters read, made where they do not exist yet."""

    graph: MuxGraph
    like: fx.Node

    def _get(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        known = self.graph.inputs.get(source)
        return known if known is not None else add_input(self.graph, source, fake_like(self.like, shape, dtype))

    def table(self, table: Table) -> fx.Node:
        return self._get(Source("table", table.name), table.shape, getattr(torch, table.dtype))

    def route(self, table: Table) -> fx.Node:
        return self._get(Source("route", table.route), (self.graph.blocks,), torch.int32)

    def drop(self, table: Table) -> fx.Node:
        return self._get(Source("drop", table.route), (len(table.rows), 3), torch.int32)

    def counter(self, name: str) -> fx.Node:
        return self._get(Source("chunk", name), (self.graph.tokens,), torch.int32)

    def sites(self, table: Table, places: Sequence[str]) -> fx.Node:
        """The dropout keys and first columns of places that share a table: inputs, so that equal layers share their code."""
        name = f"{table.name}.sites"
        rows = [[site_key(place), self.graph.columns.get(place, 0)] for place in places]
        keys = torch.tensor(rows, dtype=torch.int32, device=val(self.like).device)
        self.graph.weights.setdefault(name, keys)
        return self._get(Source("weight", name), (len(places), 2), torch.int32)


def site_key(site: str) -> int:
    """A place's dropout key, by its name alone."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "little") >> 1
