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
# What must hold: one of the extras of every set. Nothing: always; an empty set: never.
Clauses = tuple[Extras, ...]
ALWAYS: Clauses = ()
NEVER: Clauses = (frozenset(),)
# Alternatives of several clauses each would multiply out; those left out make a node seem to be there more often than it is.
_MOST = 6
PREFIXED_BACKWARD = torch.ops.mux.prefixed_attention_backward.default

# Operators that hand on one argument where their adapters are absent, with that argument's place.
_PASSING = {TILE_AFFINE: 0, aten.where.self: 2, aten.add.Tensor: 0}


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one graph: for every node its clauses; and which extras, if any, each value is there for."""

    clauses: Mapping[fx.Node, Clauses]
    present: Mapping[fx.Node, Extras | None]
    wanted: Mapping[fx.Node, Clauses]


def needs(gm: fx.GraphModule, given: Mapping[fx.Node, Extras | None], sinks: Mapping[fx.Node, Clauses]) -> Needs:
    """Ask both questions of every node.

    Args:
        given: for every placeholder the extras that it belongs to; None: the chunk, weights, and values of other regions.
        sinks: for every node that is returned when it is wanted.
    """
    supplied, present = supply(gm, given)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    wanted: dict[fx.Node, Clauses] = {}
    clauses: dict[fx.Node, Clauses] = {}
    demands: dict[fx.Node, list[Clauses]] = {node: [] for node in gm.graph.nodes}
    for node, want in sinks.items():
        demands[node].append(want)
    for node in (*reversed(calls), *given):
        if node.target is LINEARS_BACKWARD_:
            # dx is made before the call that fills it, and read behind it.
            back = either(*demands[node.args[1]]) if node.args[1] is not None else NEVER
            wanted[node] = clauses[node] = either(back, both(union(routes(node, present))))
            for arg in node.all_input_nodes:
                demands[arg].append(_demand_of_linears(node, arg, back, present))
            continue
        wanted[node] = either(*demands[node])
        if not node.users and node not in sinks and node.op == "call_function":
            # What returns nothing adds to tables of its own.
            wanted[node] = both(union([own for own in map(present.get, node.all_input_nodes) if own is not None]))
        clauses[node] = both(*supplied[node], *wanted[node])
        for arg in node.all_input_nodes:
            # Where this node is absent, its readers read the argument that it hands on.
            demands[arg].append(wanted[node] if passed(node, present) is arg else clauses[node])
    return Needs(clauses, present, wanted)


def supply(
    gm: fx.GraphModule, given: Mapping[fx.Node, Extras | None]
) -> tuple[dict[fx.Node, Clauses], dict[fx.Node, Extras | None]]:
    """For every node the clauses that follow from what it reads, and which extras, if any, its value is there for."""
    present: dict[fx.Node, Extras | None] = dict(given)
    supplied: dict[fx.Node, Clauses] = {node: both(own) for node, own in given.items()}
    for node in (node for node in gm.graph.nodes if node.op == "call_function"):
        supplied[node], present[node] = _supply(node, present, supplied)
    return supplied, present


def union(sets: Iterable[Extras | None]) -> Extras | None:
    """Whoever wants it of several; one who always does is enough."""
    found: set[str] = set()
    for own in sets:
        if own is None:
            return None
        found |= own
    return frozenset(found)


def both(*sets: Extras | None) -> Clauses:
    """Clauses that all must hold, without those that follow from others."""
    given = sorted({own for own in sets if own is not None}, key=lambda own: (len(own), sorted(own)))
    return tuple(own for own in given if not any(other < own for other in given))


def either(*alternatives: Clauses) -> Clauses:
    """What holds where one of these does."""
    found = NEVER
    for own in alternatives:
        found = both(*(one | other for one in found for other in own))[:_MOST]
    return found


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
    node: fx.Node, present: Mapping[fx.Node, Extras | None], supplied: Mapping[fx.Node, Clauses]
) -> tuple[Clauses, Extras | None]:
    """The clauses of a node by its inputs, and the extras that its value is there for."""
    if node.target in (LINEARS, LINEARS_BACKWARD_, PREFIXED_ATTENTION, PREFIXED_BACKWARD):
        return (), None
    if node.target is operator.getitem:
        source, index = node.args
        if source.target is LINEARS and index == len(source.args[1]):
            narrow = union(routes(source, present))
            return both(narrow), narrow
        return supplied[source], present[source]
    if node.target is aten.clone.default and passed(node.args[0], present) is not None:
        # A region hands on memory of its own, so what an adapter may have left as a view is copied.
        return supplied[node.args[0]], present[node.args[0]]
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
    if node.target is aten.clone.default:
        return node.args[0] if passed(node.args[0], present) is not None else None
    if node.target not in _PASSING:
        return None
    if node.target is aten.where.self and node.args[2].target is aten.zeros_like.default:
        # Rows without a slot, and zeros; or rows with a slot: then nothing is handed on.
        return node.args[1] if _compared(node.args[0]) is aten.lt.Scalar else None
    if node.target is TILE_AFFINE and node.args[5] is not None:
        # Beside zeros it hands on nothing.
        return node.args[5] if node.args[5].target is not aten.zeros_like.default else None
    if node.target is aten.add.Tensor:
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return next((arg for arg in terms if present.get(arg) is None), terms[0])
    return node.args[_PASSING[node.target]]


def _demand_of_linears(node: fx.Node, arg: fx.Node, back: Clauses, present: Mapping[fx.Node, Extras | None]) -> Clauses:
    """dY serves dX and the tables of its own banks, x and the narrow tensor serve the tables alone; `back`: who wants dX."""
    _, dx, dy, x, narrow, weights, a, b, *_, members, _drops, _forms = node.args
    own = routes(node, present)
    if arg is dx:
        return NEVER
    if arg in weights:
        return back
    if arg in dy:
        banks = (bank for bank, places in enumerate(places_of(a, b)) for place in places if dy[members[place]] is arg)
        return either(back, *((own[bank],) for bank in banks))
    return both(union(own)) if arg in (x, narrow) else both(present.get(arg), union(own))


def _compared(node: fx.Node) -> Any:
    """What a mask was made by, under views."""
    while node.op == "call_function" and node.target not in (aten.lt.Scalar, aten.ge.Scalar) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.target


def places_of(a: Any, b: Any) -> list[range]:
    """Each bank's places in `b`: A has the rows of all its members."""
    found, start = [], 0
    for table in a:
        rank = b[start].meta["val"].shape[1]
        count = table.meta["val"].shape[1] // rank
        found.append(range(start, start + count))
        start += count
    return found
