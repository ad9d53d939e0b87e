"""needs: which tasks' adapters a node of a template is there for.

An extra is what adapters of one set of tasks do beyond the frozen backbone; it is named by the key of the route that sends these
tasks' blocks to their slots, since all nodes that read this route are there together or not at all. A node has clauses, sets of
extras; it is there where every clause holds one of the extras that are on. No clause: the frozen backbone needs it.

Two questions are asked of every node. Has it something to work on (`supply`)? What is computed from an absent adapter is absent,
down to where it joins the frozen backbone's own value. And does anybody want what it makes (`demand`)? A gradient of the frozen
backbone is wanted as far down as the first adapter that is on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from codegen.ops import LINEARS, LINEARS_BACKWARD_, PREFIXED_ATTENTION, TILE_AFFINE, TILE_SPARSE

aten = torch.ops.aten
Extras = frozenset[str]
ALWAYS = None
PREFIXED_BACKWARD = torch.ops.mux.prefixed_attention_backward.default

# Operators that hand on one argument where their adapters are absent, with that argument's place.
_PASSING = {TILE_AFFINE: 0, aten.where.self: 2, aten.add.Tensor: 0}


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one graph: for every node its clauses; and which extras, if any, each value is there for."""

    clauses: Mapping[fx.Node, tuple[Extras, ...]]
    present: Mapping[fx.Node, Extras | None]
    wanted: Mapping[fx.Node, Extras | None]


def needs(gm: fx.GraphModule, given: Mapping[fx.Node, Extras | None], sinks: Mapping[fx.Node, Extras | None]) -> Needs:
    """Ask both questions of every node.

    Args:
        given: for every placeholder the extras that it belongs to; None: the chunk, weights, and values of other regions.
        sinks: for every node that is returned who wants it; None: everybody.
    """
    present: dict[fx.Node, Extras | None] = dict(given)
    supplied: dict[fx.Node, tuple[Extras, ...]] = {node: () if own is None else (own,) for node, own in given.items()}
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    for node in calls:
        supplied[node], present[node] = _supply(node, present, supplied)
    wanted: dict[fx.Node, Extras | None] = {}
    clauses: dict[fx.Node, tuple[Extras, ...]] = {}
    demands: dict[fx.Node, list[Extras | None]] = {node: [] for node in gm.graph.nodes}
    for node, want in sinks.items():
        demands[node].append(want)
    for node in (*reversed(calls), *given):
        if node.target is LINEARS_BACKWARD_:
            # dx is made before the call that fills it, and read behind it.
            back = union(demands[node.args[1]]) if node.args[1] is not None else frozenset()
            wanted[node] = union([back, *routes(node, present)])
            for arg in node.all_input_nodes:
                demands[arg].append(_demand_of_linears(node, arg, back, present))
            clauses[node] = both(wanted[node])
            continue
        wanted[node] = union(demands[node])
        if not node.users and node not in sinks and node.op == "call_function":
            # What returns nothing adds to tables of its own.
            wanted[node] = union([own for own in map(present.get, node.all_input_nodes) if own is not None])
        clauses[node] = both(*supplied[node], wanted[node])
        for arg in node.all_input_nodes:
            # Where this node is absent, its readers read the argument that it hands on.
            own = wanted[node] if passed(node, present) is arg else min(clauses[node], key=len, default=wanted[node])
            demands[arg].append(own)
    return Needs(clauses, present, wanted)


def union(sets: Iterable[Extras | None]) -> Extras | None:
    """Whoever wants it of several; one who always does is enough."""
    found: set[str] = set()
    for own in sets:
        if own is None:
            return None
        found |= own
    return frozenset(found)


def both(*sets: Extras | None) -> tuple[Extras, ...]:
    """Clauses that all must hold, without those that follow from others."""
    given = list(dict.fromkeys(own for own in sets if own is not None))
    return tuple(own for own in given if not any(other < own for other in given))


def routes(node: fx.Node, present: Mapping[fx.Node, Extras | None]) -> list[Extras]:
    """Of an operator over banks of several routes: the extras of each bank."""
    place = {LINEARS: 6, LINEARS_BACKWARD_: 9, PREFIXED_ATTENTION: 5, PREFIXED_BACKWARD: 6}[node.target]
    found = []
    for route in node.args[place]:
        own = present[route]
        assert own is not None, f"{node.name}: {route.name} is no route"
        found.append(own)
    return found


def _supply(
    node: fx.Node, present: Mapping[fx.Node, Extras | None], supplied: Mapping[fx.Node, tuple[Extras, ...]]
) -> tuple[tuple[Extras, ...], Extras | None]:
    """The clauses of a node by its inputs, and the extras that its value is there for."""
    if node.target in (LINEARS, LINEARS_BACKWARD_, PREFIXED_ATTENTION, PREFIXED_BACKWARD):
        return (), None
    if node.target is operator.getitem:
        source, index = node.args
        if source.target is LINEARS and index == len(source.args[1]):
            narrow = union(routes(source, present))
            return both(narrow), narrow
        return supplied[source], present[source]
    conditional = [own for own in map(present.get, node.all_input_nodes) if own is not None]
    flow = passed(node, present)
    if flow is not None:
        # The value is there wherever one of its terms is; there is something to do where the other one is as well.
        own = present.get(flow)
        rest = [present.get(arg) for arg in node.all_input_nodes if arg is not flow]
        sum_ = node.target is aten.add.Tensor
        return both(*conditional), union([own, *rest]) if sum_ else own
    return both(*conditional), None if not conditional else min(conditional, key=len)


def passed(node: fx.Node, present: Mapping[fx.Node, Extras | None]) -> fx.Node | None:
    """The argument that readers of a node read where its adapters are absent."""
    if node.target is TILE_SPARSE:
        return node.args[0]
    if node.target not in _PASSING:
        return None
    if node.target is TILE_AFFINE and node.args[5] is not None:
        return node.args[5]
    if node.target is aten.add.Tensor:
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return next((arg for arg in terms if present.get(arg) is None), terms[0])
    return node.args[_PASSING[node.target]]


def _demand_of_linears(node: fx.Node, arg: fx.Node, back: Extras | None, present: Mapping[fx.Node, Extras | None]) -> Extras | None:
    """dY serves dX and the tables of its own banks, x and the narrow tensor serve the tables alone; `back`: who wants dX."""
    _, dx, dy, x, narrow, weights, a, b, *_, members, _drops, _forms = node.args
    own = routes(node, present)
    if arg is dx:
        return frozenset()
    if arg in (x, narrow):
        return union(own)
    if arg in weights:
        return back
    if arg in dy:
        banks = (bank for bank, places in enumerate(places_of(a, b)) for place in places if dy[members[place]] is arg)
        return union([back, *(own[bank] for bank in banks)])
    return present.get(arg) or union(own)


def places_of(a: Any, b: Any) -> list[range]:
    """Each bank's places in `b`: A has the rows of all its members."""
    found, start = [], 0
    for table in a:
        rank = b[start].meta["val"].shape[1]
        count = table.meta["val"].shape[1] // rank
        found.append(range(start, start + count))
        start += count
    return found
