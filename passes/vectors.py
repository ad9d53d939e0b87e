"""Learned vectors: a scale and a shift of one task's rows, wherever a value of the graph has features.

IA3, norm tuning and bias tuning are these: a kind says where, this file writes the node, and joins those of all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from codegen.ops import TILE_AFFINE
from passes.graph import MuxGraph, call, val
from passes.linears import Inputs
from passes.shard import ended
from passes.slots import at_one_place, in_order, route_key, slots_of
from runtime.tables import Encoding, Param, Place, Table


@dataclass(frozen=True, slots=True)
class Learned:
    """A vector of N features as PEFT stores it, [N], [1, N] or [N, 1]; a fresh one is `fill`, or normal with `std`."""

    key: str
    shape: tuple[int, ...]
    fill: float = 0.0
    std: float = 0.0

    def param(self, task: str, table: str, slot: int) -> Param:
        flat, column = len(self.shape) == 1, len(self.shape) == 2 and self.shape[1] == 1
        return Param(task, self.key, table, slot, 0, 1, column, std=self.std, fill=self.fill, flat=flat)


@dataclass(frozen=True, slots=True)
class Filled:
    """A vector that the encoding of its `Vector` computes."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One task's vectors at one place; those of one place are joined. `encoding` lacks its outputs: first scale, then shift."""

    task: str
    place: str
    scale: Learned | Filled | None = None
    shift: Learned | Filled | None = None
    encoding: Encoding | None = None


def attach(
    graph: MuxGraph,
    vector: Vector,
    x: fx.Node,
    *,
    behind: fx.Node,
    users: Sequence[fx.Node] | None = None,
    base: fx.Node | None = None,
    otherwise: fx.Node | None = None,
) -> fx.Node:
    """Right behind the node `behind`: x, scaled and shifted in the task's rows, for those who read `behind`.

    Args:
        users: the readers who get it; None: all.
        base: the weight that the shift stands in place of.
        otherwise: what other rows are; None: x's own.
    """
    # What is not linear in the value needs the whole of it, not a rank's part.
    whole = ended(behind)
    x, behind = (whole if x is behind else x), whole
    readers = list(behind.users) if users is None else list(users)
    with graph.gm.graph.inserting_before(behind.next):
        node = _write(graph, f"{vector.place}@{vector.task}", {vector.task: vector}, (vector.task,), x, base, otherwise, behind)
    for reader in readers:
        reader.replace_input_with(behind, node)
    # The record by which `fuse` finds the node again in its own copy of the graph.
    node.meta["mux_vector"] = vector
    return node


def fuse(graph: MuxGraph, *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The nodes of all tasks at one place become one. Their rows are disjoint: the order of a chain does not matter."""
    written = [node for node in graph.gm.graph.find_nodes(op="call_function", target=TILE_AFFINE) if "mux_vector" in node.meta]
    marks: list[tuple[Vector, fx.Node]] = [(node.meta["mux_vector"], node) for node in written]
    places = at_one_place(((own.place, own.scale is None, own.shift is None), own.task, node) for own, node in marks)
    for nodes in places.values():
        vectors = {node.meta["mux_vector"].task: node.meta["mux_vector"] for node in nodes}
        place, scales = nodes[0].meta["mux_vector"].place, nodes[0].meta["mux_vector"].scale is not None
        first, *later = nodes
        x, _, _, base, _, otherwise = first.args
        for node in later:
            assert node.args[3] is base, f"{node.name}: another base at one place"
            # In a chain it reads the earlier one as x, or as what other rows are.
            node.replace_all_uses_with(node.args[0] if node.args[5] is None else node.args[5])
            graph.gm.graph.erase_node(node)
        slots = slots_of(in_order(graph, vectors), reserve, previous.get(_table_name(place, scales)))
        with graph.gm.graph.inserting_before(first):
            joint = _write(graph, place, vectors, slots, x, base, otherwise, first)
        first.replace_all_uses_with(joint)
        graph.gm.graph.erase_node(first)


def _write(
    graph: MuxGraph,
    name: str,
    vectors: Mapping[str, Vector],
    slots: tuple[str, ...],
    x: fx.Node,
    base: fx.Node | None,
    otherwise: fx.Node | None,
    like: fx.Node,
) -> fx.Node:
    inputs, value = Inputs(graph, like), val(x)
    shape, dtype = (len(slots), 1, value.shape[-1]), str(value.dtype).removeprefix("torch.")
    given: list[fx.Node | None] = []
    route = None
    filled: dict[str, list[Place]] = {}
    for scales in (True, False):
        learned = {task: own for task, vector in vectors.items() if (own := vector.scale if scales else vector.shift) is not None}
        if not learned:
            given.append(None)
            continue
        table = Table(_table_name(name, scales), shape, slots, True, route_key(slots), dtype)
        graph.tables[table.name] = table
        for task, own in learned.items():
            if isinstance(own, Learned):
                graph.params[task, own.key] = own.param(task, table.name, slots.index(task))
            else:
                filled.setdefault(task, []).append(Place(table.name, slots.index(task), 0, 1))
        given.append(inputs.table(table))
        route = inputs.route(table)
    for task, places in filled.items():
        encoding = vectors[task].encoding
        assert encoding is not None
        graph.encodings[task, encoding.name] = replace(encoding, outputs=tuple(places))
    return call(graph.gm, TILE_AFFINE, (x, *given, base, route, otherwise), like)


def _table_name(name: str, scales: bool) -> str:
    return f"{name}.{'scale' if scales else 'shift'}"
