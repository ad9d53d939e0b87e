"""Own parts: in a task's rows its own copy of a module, or of rows of an embedding, computes instead of the backbone's.

A kind says which parts there are; this file writes their nodes and joins those of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import fx

from codegen.ops import TILE_AFFINE, TILE_GATHER, TILE_MM
from passes.graph import MuxGraph, call, origin, val
from passes.linears import Inputs
from passes.slots import in_order, route_key, slots_of
from runtime.tables import Encoding, Input, Param, Place, Table

aten = torch.ops.aten


class Part(Protocol):
    """What one task has of its own at one module. Parts of one `place` share tables and nodes."""

    @property
    def place(self) -> str: ...
    def write(self, tables: Tables, base: fx.Node) -> fx.Node:
        """The output of the module `base` if every row were the task's own, in base's shape."""


# Says what fills a place: task, part, place.
Bind = Callable[[str, Part, Place], None]


@dataclass(frozen=True, slots=True)
class Tables:
    """Makes the tables of the parts of one place, `parts` by task, and their inputs."""

    graph: MuxGraph
    name: str
    parts: Mapping[str, Part]
    slots: tuple[str, ...]
    like: fx.Node

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.graph, self.like)

    @property
    def route(self) -> fx.Node:
        # Any table will do: those of one place have the same slots.
        return self.inputs.route(Table("", (), self.slots, False, route_key(self.slots)))

    def trained(self, name: str, shape: tuple[int, ...], bind: Bind) -> fx.Node:
        """A table [S, *shape] in the module's dtype; `bind` says what fills a task's slot."""
        dtype = str(val(self.like).dtype).removeprefix("torch.")
        table = Table(f"{self.name}.{name}", (len(self.slots), *shape), self.slots, True, route_key(self.slots), dtype)
        self.graph.tables[table.name] = table
        for task, part in self.parts.items():
            bind(task, part, Place(table.name, self.slots.index(task), 0, shape[0]))
        return self.inputs.table(table)

    def constants(self, name: str, shape: tuple[int, ...], value: Callable[[Part], object], free: object) -> fx.Node:
        """A float32 table [S, *shape] of numbers that are not trained, `free` in a free slot."""
        values = tuple(value(self.parts[task]) if task in self.parts else free for task in self.slots)
        table = Table(f"{self.name}.{name}", (len(self.slots), *shape), self.slots, False, route_key(self.slots), values=values)
        self.graph.tables[table.name] = table
        return self.inputs.table(table)


def attach(graph: MuxGraph, task: str, part: Part, node: fx.Node) -> None:
    """Behind the module's node: what its readers see in the task's rows is the part's."""
    readers = list(node.users)
    out = _write(graph, f"{part.place}@{task}", {task: part}, (task,), node, node)
    for reader in readers:
        reader.replace_input_with(node, out)
    # The record by which `fuse` finds the node again in its own copy of the graph.
    out.meta["mux_own"] = (task, part)


def fuse(graph: MuxGraph, *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The nodes of all tasks at one place become one. The first kind that calls it does it for all."""
    found: dict[tuple[str, fx.Node], list[fx.Node]] = {}
    for node in graph.gm.graph.find_nodes(op="call_function", target=TILE_AFFINE):
        if "mux_own" in node.meta:
            found.setdefault((node.meta["mux_own"][1].place, origin(node)), []).append(node)
    for (place, _), nodes in found.items():
        parts = dict(node.meta["mux_own"] for node in nodes)
        first, *later = nodes
        for node in later:
            node.replace_all_uses_with(node.args[5])
            graph.gm.graph.erase_node(node)
        known = next((table for name, table in previous.items() if name.startswith(f"{place}.")), None)
        slots = slots_of(in_order(graph, parts), reserve, known)
        joint = _write(graph, place, parts, slots, first.args[5], first)
        first.replace_all_uses_with(joint)
        graph.gm.graph.erase_node(first)


def _write(
    graph: MuxGraph, name: str, parts: Mapping[str, Part], slots: tuple[str, ...], base: fx.Node, behind: fx.Node
) -> fx.Node:
    with graph.gm.graph.inserting_before(behind.next):
        tables = Tables(graph, name, parts, slots, base)
        own = next(iter(parts.values())).write(tables, base)
        # Rows of a slot are those of `own`, all others base's: chosen, not added, so that they keep their bits.
        return call(graph.gm, TILE_AFFINE, (own, None, None, None, tables.route, base), base)


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """A whole embedding [V, D] of the task's own, under `key` in PEFT's file."""

    name: str
    count: int
    features: int
    padding: int | None
    key: str

    @property
    def place(self) -> str:
        return f"{self.name}.own"

    def write(self, tables: Tables, base: fx.Node) -> fx.Node:
        def bind(task: str, part: Part, at: Place) -> None:
            assert isinstance(part, Rows)
            tables.graph.params[task, part.key] = Param(task, part.key, at.table, at.row, 0, self.count, False)

        table = tables.trained("rows", (self.count, self.features), bind)
        found = call(tables.graph.gm, TILE_GATHER, (table, _flat(tables, origin(base).args[1]), tables.route), base)
        return _trained_unless_padding(tables, base, _shaped(tables, found, base), self.padding)


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """LoRA of an embedding: its rows + scaling * (A^T[ids]) B^T, A [r, V] and B [D, r] under `keys`."""

    name: str
    count: int
    features: int
    rank: int
    scaling: float
    padding: int | None
    keys: tuple[str, str]
    fresh: bool

    @property
    def place(self) -> str:
        # A's rows are as wide as the rank itself: a wider table would be that much longer in every of V rows.
        return f"{self.name}.lora.r{self.rank}"

    def write(self, tables: Tables, base: fx.Node) -> fx.Node:
        gm = tables.graph.gm

        def bind(which: int, std: float) -> Bind:
            def own(task: str, part: Part, at: Place) -> None:
                assert isinstance(part, LowRankRows)
                key = part.keys[which]
                # PEFT begins with A = 0 and a normal B, or with both normal.
                drawn = std if part.fresh else 1.0
                tables.graph.params[task, key] = Param(task, key, at.table, at.row, 0, at.stop, True, std=drawn)

            return own

        a = tables.trained("A", (self.count, self.rank), bind(0, 0.0))
        b = tables.trained("B", (self.rank, self.features), bind(1, 1.0))
        scale = tables.constants("scale", (), lambda part: part.scaling, 0.0)  # type: ignore[attr-defined]
        down = call(gm, TILE_GATHER, (a, _flat(tables, origin(base).args[1]), tables.route), base)
        down = _trained_unless_padding(tables, base, down, self.padding)
        up = call(gm, TILE_MM, (down, b, tables.route, scale, False), base)
        return call(gm, aten.add.Tensor, (base, _shaped(tables, up, base)), base)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The rows of some tokens, [n, D] under `key`, of an embedding, or of a linear (the head) if `head`.

    Args:
        bucket: rows of the table.
        tied: the tensor fills both; each has a gradient of its own, and their sum is the tensor's.
    """

    name: str
    tokens: tuple[int, ...]
    bucket: int
    features: int
    padding: int | None
    key: str
    head: bool = False
    tied: bool = False

    @property
    def place(self) -> str:
        return f"{self.name}.tokens{self.bucket}"

    def write(self, tables: Tables, base: fx.Node) -> fx.Node:
        table = tables.trained("rows", (self.bucket, self.features), lambda task, part, at: part.bind(tables.graph, task, at))  # type: ignore[attr-defined]
        return self._columns(tables, base, table) if self.head else self._rows(tables, base, table)

    def bind(self, graph: MuxGraph, task: str, at: Place) -> None:
        count = len(self.tokens)
        if not self.tied:
            graph.params[task, self.key] = Param(task, self.key, at.table, at.row, 0, count, False)
            return
        delta = Input("value", self.key, (count, self.features))
        name = f"{self.key}.copies"
        known = graph.encodings.get((task, name), Encoding(task, name, "copies", (delta,)))
        # First the embedding's place, then the head's.
        places, index = known.outputs, int(self.head)
        outputs = (*places[:index], replace(at, stop=count), *places[index + 1 :])
        graph.encodings[task, name] = replace(known, outputs=outputs, settings={"places": len(outputs)})

    def _ids(self, tables: Tables, rows: fx.Node) -> fx.Node:
        """[rows, bucket] float32: the tokens of each row's task, each more by 1; 0: none."""
        gm, blank = tables.graph.gm, (0.0,) * self.bucket

        def numbers(part: Part) -> object:
            assert isinstance(part, Tokens)
            return ((*(token + 1.0 for token in part.tokens), *blank[len(part.tokens) :]),)

        known = tables.constants("ids", (1, self.bucket), numbers, (blank,))
        # A product with 1 hands every row the numbers of its own block's slot, whatever the number of rows.
        first = call(gm, aten.slice.Tensor, (rows, 1, 0, 1), rows)
        ones = call(gm, aten.ones_like.default, (first,), rows, dtype=torch.float32)
        return call(gm, TILE_MM, (ones, known, tables.route, None, False), rows)

    def _rows(self, tables: Tables, base: fx.Node, table: fx.Node) -> fx.Node:
        gm = tables.graph.gm
        index = call(gm, aten.unsqueeze.default, (_flat(tables, origin(base).args[1]), 1), base)
        wanted = call(gm, aten.to.dtype, (call(gm, aten.add.Tensor, (index, 1), base), torch.float32), base)
        chosen = call(gm, aten.eq.Tensor, (self._ids(tables, wanted), wanted), base)
        weights = call(gm, aten.to.dtype, (chosen, val(base).dtype), base)
        found = call(gm, TILE_MM, (weights, table, tables.route, None, False), base)
        found = _trained_unless_padding(tables, base, found, self.padding)
        here = call(gm, aten.any.dim, (chosen, 1, True), base)
        rows = call(gm, aten.reshape.default, (base, [-1, self.features]), base)
        return _shaped(tables, call(gm, aten.where.self, (here, found, rows), base), base)

    def _columns(self, tables: Tables, base: fx.Node, table: fx.Node) -> fx.Node:
        gm, vocabulary = tables.graph.gm, val(base).shape[-1]
        hidden = call(gm, aten.reshape.default, (origin(base).args[0], [-1, self.features]), base)
        found = call(gm, TILE_MM, (hidden, table, tables.route, None, True), base)
        # Columns of nobody are written behind the last one, which is cut off.
        ids = call(gm, aten.to.dtype, (self._ids(tables, found), torch.int64), base)
        nobody = call(gm, aten.eq.Scalar, (ids, 0), base)
        ids = call(gm, aten.masked_fill.Scalar, (call(gm, aten.sub.Tensor, (ids, 1), base), nobody, vocabulary), base)
        logits = call(gm, aten.reshape.default, (base, [-1, vocabulary]), base)
        logits = call(gm, aten.constant_pad_nd.default, (logits, [0, 1]), base)
        logits = call(gm, aten.scatter.src, (logits, 1, ids, found), base)
        return _shaped(tables, call(gm, aten.slice.Tensor, (logits, 1, 0, vocabulary), base), base)


@dataclass(frozen=True, slots=True)
class Linear:
    """A whole linear [N, K] of the task's own ([K, N] if `transposed`), and its bias."""

    name: str
    in_features: int
    out_features: int
    transposed: bool
    weight: str
    bias: str | None

    @property
    def place(self) -> str:
        return f"{self.name}.own"

    def write(self, tables: Tables, base: fx.Node) -> fx.Node:
        gm = tables.graph.gm

        def bind(bias: bool) -> Bind:
            def own(task: str, part: Part, at: Place) -> None:
                assert isinstance(part, Linear)
                key = part.bias if bias else part.weight
                assert key is not None
                flipped = not bias and not part.transposed
                tables.graph.params[task, key] = Param(task, key, at.table, at.row, 0, at.stop, flipped, flat=bias)

            return own

        rows = call(gm, aten.reshape.default, (origin(base).args[0], [-1, self.in_features]), base)
        weight = tables.trained("weight", (self.in_features, self.out_features), bind(False))
        out = _shaped(tables, call(gm, TILE_MM, (rows, weight, tables.route, None, False), base), base)
        if self.bias is None:
            return out
        shift = tables.trained("bias", (1, self.out_features), bind(True))
        return call(gm, TILE_AFFINE, (out, None, shift, None, tables.route, None), base)


def _flat(tables: Tables, ids: object) -> fx.Node:
    assert isinstance(ids, fx.Node)
    return call(tables.graph.gm, aten.reshape.default, (ids, [-1]), tables.like)


def _shaped(tables: Tables, rows: fx.Node, base: fx.Node) -> fx.Node:
    """Rows [T, N] in base's shape, whatever T is: of the head a part of the rows will run."""
    return call(tables.graph.gm, aten.reshape.default, (rows, [*val(base).shape[:-2], -1, val(base).shape[-1]]), base)


def _trained_unless_padding(tables: Tables, base: fx.Node, rows: fx.Node, padding: int | None) -> fx.Node:
    """torch gives the row of an embedding's padding token no gradient."""
    if padding is None:
        return rows
    gm = tables.graph.gm
    is_padding = call(gm, aten.eq.Scalar, (origin(base).args[1], padding), base)
    shape = [*val(rows).shape[:-1], 1]
    is_padding = call(gm, aten.reshape.default, (is_padding, shape), base)
    return call(gm, aten.where.self, (is_padding, call(gm, aten.detach.default, (rows,), base), rows), base)
