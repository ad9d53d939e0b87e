"""MuxGraph: the FX graph that passes rewrite, with what each of its inputs is fed from."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from codegen.ops import LINEARS, TILE_AFFINE, TILE_SPARSE
from runtime.tables import Encoding, Param, Table

LEVELS = ("captured", "normal", "attached", "fused")

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default


class Source(NamedTuple):
    """What feeds a graph input. Kinds:

    - `weight`: a parameter, buffer or constant of the backbone, by its full name;
    - `chunk`: a tensor of the packed chunk (`input_ids`, `position_ids`, `cu_seqlens`, `bounds`, `sequences`, `positions`,
      `virtual`);
    - `route`: the slot of every block of tokens, by the key of the route;
    - `drop`: the dropout key and threshold of every slot, by the key of the route;
    - `table`: a slot table, by its name;
    - `carry`: keys and values of a sequence's earlier pieces, by the number of the attention that reads them.
    """

    kind: str
    key: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.key}"

    @classmethod
    def parse(cls, text: str) -> Source:
        kind, _, key = text.partition(":")
        return cls(kind, key)


@dataclass(frozen=True, slots=True)
class MuxGraph:
    """A forward graph from a chunk to its logits.

    Args:
        gm: the graph; every tensor node carries its fake value in `meta["val"]`, every placeholder is in `inputs`.
        inputs: the placeholders, in their order, by what feeds them.
        tokens: T, the static row count of a chunk.
        tile: rows of a block; T is a multiple of it.
        weights: the backbone's own tensors by name, never copies.
        level: which checks hold (LEVELS).
        tables: slot tables by name (from `attach` on).
        params: where each task's PEFT tensors live, by task and PEFT key (from `attach` on).
        encodings: what fills rows of tables from tensors that lie in none, by task and name (from `attach` on).
        columns: of linears whose input is a part of the features, the number of the first, by module (from `shard` on).
        mixed: modules that compute a linear and more, each with an operator of that.
        notes: what a reader of the plan should know: why something was left undone, what costs more than it seems.
    """

    gm: fx.GraphModule
    inputs: dict[Source, fx.Node]
    tokens: int
    tile: int
    weights: dict[str, Tensor]
    level: str = "captured"
    tables: dict[str, Table] = field(default_factory=dict)
    params: dict[tuple[str, str], Param] = field(default_factory=dict)
    encodings: dict[tuple[str, str], Encoding] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    mixed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        return self.tokens // self.tile

    def copy(self) -> MuxGraph:
        """A graph to rewrite; tensors are shared."""
        gm, copied = copy_module(self.gm)
        inputs = {source: copied[node] for source, node in self.inputs.items()}
        return replace(
            self, gm=gm, inputs=inputs, tables=dict(self.tables), params=dict(self.params), encodings=dict(self.encodings)
        )

    def constants(self, model: nn.Module) -> tuple[str, ...]:
        """Weights that are neither parameters nor buffers of the model: what the export lifted from its code."""
        owned = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        return tuple(name for name, tensor in self.weights.items() if id(tensor) not in owned)

    def sites(self) -> dict[str, list[fx.Node]]:
        """Linear nodes by the full name of their module, in graph order (a module used twice has two); not those of adapters."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.gm.graph.find_nodes(op="call_function", target=LINEAR):
            if "mux_added" not in node.meta and (name := module_of(node)):
                found.setdefault(name, []).append(node)
        return found

    def text(self) -> str:
        """The graph as readable Python, with what feeds each input."""
        feeds = "".join(f"# {node.name} = {source}\n" for source, node in self.inputs.items())
        return f"# level: {self.level}, tokens: {self.tokens}\n{feeds}{self.gm.graph.python_code('self').src.strip()}\n"


def head_of(graph: MuxGraph) -> fx.Node | None:
    """The linear that the logits come from: nothing behind it is one (adapters are other operators)."""
    linears = [node for node in graph.gm.graph.nodes if node.target in (LINEAR, LINEARS)]
    return linears[-1] if linears else None


def hidden_of(graph: MuxGraph) -> fx.Node | None:
    """The value that the head and its adapters read."""
    linear = head_of(graph)
    if linear is None:
        return None
    hidden = linear.args[0]
    assert isinstance(hidden, fx.Node)
    # Unfused, tasks' scales of the head's input are a chain of which other tasks' adapters read some.
    while "mux_vector" in hidden.meta and hidden.args[5] is None:
        hidden = hidden.args[0]
    return hidden


def origin(node: fx.Node) -> fx.Node:
    """The backbone's linear or lookup under what adapters have written behind it."""
    while node.target not in (LINEAR, EMBEDDING):
        place = _BEHIND[node.target]
        node = node.args[place] if node.args[place] is not None else node.args[0]
    return node


# Which argument of an adapter's last node is what the adapter was written behind.
_BEHIND = {TILE_AFFINE: 5, TILE_SPARSE: 0, torch.ops.aten.where.self: 2, torch.ops.aten.add.Tensor: 0}


def lazily() -> Any:
    """A context in which a graph module writes its Python when it is first run or read, not at each rewrite.

    Most are rewritten again or never run: their texts took a third of a small model's compilation.
    """
    return _use_lazy_graph_module(True)


def graph_module(graph: fx.Graph) -> fx.GraphModule:
    """A module around a graph that needs none of its own tensors."""
    return _make_graph_module({}, graph)


def copy_module(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy the graph and share the fake values in `meta` (a deep copy would copy those as well); also old node -> new node."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    graph.output(output)
    for old, new in copied.items():
        new.meta = copy.copy(old.meta)
    return graph_module(graph), copied


def module_of(node: fx.Node) -> str:
    """Full name of the innermost module that made a node, "" for the model itself."""
    stack = node.meta.get("mux_module")
    return stack or ""


def val(node: fx.Node) -> Any:
    """The fake value of a node: its shape, dtype and device."""
    return node.meta["val"]


def add_input(graph: MuxGraph, source: Source, value: Tensor) -> fx.Node:
    """A new placeholder after the others."""
    *_, last = graph.inputs.values()
    with graph.gm.graph.inserting_before(last.next):
        node = graph.gm.graph.placeholder(re.sub(r"\W", "_", f"{source.kind}_{source.key}"))
    node.meta["val"] = value
    graph.inputs[source] = node
    return node


def after(node: fx.Node) -> fx.Node:
    """The place behind a node where computed nodes may stand: placeholders come first."""
    place = node.next
    while place.op == "placeholder":
        place = place.next
    return place


def drop_dead(graph: MuxGraph) -> None:
    """Erase what computes nothing that is read, the inputs and tables among it."""
    graph.gm.graph.eliminate_dead_code()
    for source, node in list(graph.inputs.items()):
        if not node.users:
            graph.gm.graph.erase_node(node)
            del graph.inputs[source]
    for name in [name for name in graph.tables if Source("table", name) not in graph.inputs]:
        del graph.tables[name]


def fake_like(node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> Tensor:
    """A fake tensor in the mode of another node's value."""
    mode = val(node).fake_mode
    with mode:
        return torch.empty(shape, dtype=dtype, device=device or val(node).device)


def call(gm: fx.GraphModule, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """A call node at the current insertion point; its value is inferred, its module is that of `like`."""
    node = gm.graph.call_function(target, args, kwargs)
    node.meta["val"] = _infer(target, args, kwargs, val(like).fake_mode)
    node.meta["mux_module"] = module_of(like)
    return node


def _infer(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """The fake value of a call. Tasks of one rank at one kind of site ask the same again: an answer lives as long as its mode."""
    signature = repr((target, fx.map_arg(args, lambda arg: _Shown(val(arg))), kwargs))
    known = mode.__dict__.setdefault("mux_inferred", {})
    if signature not in known:
        with mode, torch.no_grad():
            known[signature] = target(*fx.map_arg(args, val), **kwargs)
    return known[signature]


class _Shown:
    """Prints a fake tensor by all that an answer may depend on."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        if not isinstance(self.value, Tensor):
            return repr(self.value)
        own = self.value
        return f"{tuple(own.shape)} {own.stride()} {own.storage_offset()} {own.dtype} {own.device}"


def check(graph: MuxGraph) -> None:
    """What holds at every level, and at this one.

    Raises:
        AssertionError: naming the node; a fault of a pass, not of a user.
    """
    graph.gm.graph.lint()
    nodes = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    assert nodes == list(graph.inputs.values()), "the placeholders are not those of `inputs`, in their order"
    for node in graph.gm.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            assert "val" in node.meta, f"{node.name}: no value in meta"
    for source in graph.inputs:
        if source.kind == "weight":
            assert source.key in graph.weights, f"{source}: no such weight"
        if source.kind == "table":
            assert source.key in graph.tables, f"{source}: no such table"
    weights = {node for source, node in graph.inputs.items() if source.kind == "weight"}
    if LEVELS.index(graph.level) >= LEVELS.index("normal"):
        for node in _calls(graph):
            assert node.target is not torch.ops.aten.dropout.default, f"{node.name}: {node.target} is not normal"
            weight = node.args[2] if node.target is torch.ops.aten.addmm.default and not node.kwargs else None
            assert weight not in weights, f"{node.name}: addmm with a weight is not normal"
    if graph.level == "attached" or graph.level == "fused":
        for param in graph.params.values():
            table = graph.tables.get(param.table)
            held = table.rows[param.row] if table is not None else None
            assert held == param.task, f"{param.key} of {param.task}: not at {param.table}[{param.row}]"
        for encoding in graph.encodings.values():
            _check_encoding(graph, encoding)


def _check_encoding(graph: MuxGraph, encoding: Encoding) -> None:
    whose = f"{encoding.name} of {encoding.task}"
    for place in encoding.outputs:
        table = graph.tables.get(place.table)
        assert table is not None, f"{whose}: no table {place.table}"
        assert table.trainable, f"{whose}: {place.table} is given no gradient"
        assert table.rows[place.row] == encoding.task, f"{whose}: not at {place.table}[{place.row}]"
    for name in encoding.weights.values():
        assert name in graph.weights, f"{whose}: no weight {name}"
    keys = {key for task, key in graph.params if task == encoding.task}
    keys |= {given.key for other in graph.encodings.values() if other.task == encoding.task for given in other.inputs}
    assert keys.issuperset(encoding.reads.values()), (
        f"{whose}: reads {sorted(set(encoding.reads.values()) - keys)}, which is no key"
    )


def _calls(graph: MuxGraph) -> Iterator[fx.Node]:
    return (node for node in graph.gm.graph.nodes if node.op == "call_function")
