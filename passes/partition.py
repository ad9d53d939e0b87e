"""partition: MuxGraph -> region bodies. Layers are found by the backbone's module lists; equal bodies will share one template."""

from __future__ import annotations

import operator
import re
from collections import Counter
from typing import Any

import torch
from torch import fx

from codegen.spec import Body
from passes.carry import carried
from passes.graph import MuxGraph, graph_module, hidden_of, module_of, val
from runtime.carry import Carried
from runtime.region import RegionSpec

EMBED, FINAL, HEAD = "embed", "final", "head"


def partition(graph: MuxGraph) -> tuple[list[Body], Body]:
    """Cut the graph into regions and the head.

    Before: level "fused" (or "attached"). After: every node is in exactly one body. Regions are `embed` (all before the first
    layer), one for each layer, `final` (what follows the last), in the order in which they run; the head is the output's linear
    with what follows it. Values cross borders by name; a value is read by later regions only. Keys and values that later pieces of
    a sequence see (`carry`) are outputs too.

    Returns:
        The regions and the head (its output is the logits). Bodies' `spec.template` is their structural identity.
    """
    head = _head_nodes(graph)
    order, place = _places(graph, head)
    names = dict(enumerate(order))
    members: dict[int, list[fx.Node]] = {index: [] for index in names}
    for node, index in place.items():
        members[index].append(node)
    pieces = carried(graph)
    kept = {node for pair in pieces.values() for node in pair}
    outputs = {
        index: [node for node in nodes if node in kept or any(place.get(user, -1) != index for user in node.users)]
        for index, nodes in members.items()
    }
    values = {node: f"{names[index]}/{position}" for index, nodes in outputs.items() for position, node in enumerate(nodes)}
    grads: set[fx.Node] = {
        node for source, node in graph.inputs.items() if source.kind == "table" and graph.tables[source.key].trainable
    }
    tables = set(grads)
    _spread(graph, grads)
    grads |= {before for before, pair in pieces.items() if any(node in grads for node in pair)}
    bodies = [_body(graph, names[index], nodes, outputs[index], values, grads, tables) for index, nodes in members.items() if nodes]
    logits = _output(graph)
    return bodies, _body(graph, HEAD, head, [logits], values, grads, tables, own=False)


def _output(graph: MuxGraph) -> fx.Node:
    return next(node for node in reversed(graph.gm.graph.nodes) if node.op == "output").args[0][0]


def _head_nodes(graph: MuxGraph) -> list[fx.Node]:
    """The linear of the logits and all that is computed from its input, in order; it reads one hidden value, tables and weights."""
    hidden = hidden_of(graph)
    found: set[fx.Node] = set()
    for node in graph.gm.graph.nodes:
        if node.op == "call_function" and any(arg is hidden or arg in found for arg in node.all_input_nodes):
            found.add(node)
    # What the head's adapters compute from routes and tables alone is made where it is read.
    waiting = list(found)
    while waiting:
        for arg in waiting.pop().all_input_nodes:
            if arg in found or arg is hidden or arg.op == "placeholder" or _view_of_weight(arg):
                continue
            if not _of_tables(graph, arg) or any(user not in found for user in arg.users):
                module = module_of(arg) or "(the model itself)"
                raise ValueError(f"backbone: module {module!r}: the logits do not come from one linear head")
            found.add(arg)
            waiting.append(arg)
    if _output(graph) not in found:
        module = module_of(_output(graph)) or "(the model itself)"
        raise ValueError(f"backbone: module {module!r}: the logits do not come from one linear head")
    return sorted(found)


def _of_tables(graph: MuxGraph, node: fx.Node) -> bool:
    """Whether a node computes from tables, routes and weights: nothing of a chunk's rows."""
    if node.op == "placeholder":
        source = next(source for source, known in graph.inputs.items() if known is node)
        return source.kind in ("table", "route", "weight")
    return all(_of_tables(graph, arg) for arg in node.all_input_nodes)


def _places(graph: MuxGraph, head: list[fx.Node]) -> tuple[list[str], dict[fx.Node, int]]:
    """The names of the regions in running order, and the region of every node."""
    layers = _layers(graph)
    order = [EMBED, *layers, FINAL]
    index = {name: position for position, name in enumerate(order)}
    place: dict[fx.Node, int] = {}
    outside = set(head)
    for node in graph.gm.graph.nodes:
        if node.op != "call_function" or node in outside or _view_of_weight(node):
            continue
        before = max((place[arg] for arg in node.all_input_nodes if arg in place), default=0)
        own = _layer_of(node, layers)
        if node.target is operator.getitem:
            place[node] = place[node.args[0]]
        elif own is not None:
            place[node] = max(before, index[own])
        else:
            # Work outside the layers belongs to the embedding until a layer has run, and behind the last one to the end.
            place[node] = len(order) - 1 if before >= len(layers) > 0 else before
    return order, place


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value may be another's memory: by its schema, or a reshape (which copies only if it must)."""
    schema = getattr(node.target, "_schema", None)
    views = schema is not None and any(
        result.alias_info is not None and not result.alias_info.is_write for result in schema.returns
    )
    return views or node.target is torch.ops.aten.reshape.default


def _view_of_weight(node: fx.Node) -> bool:
    """A weight's transpose and the like cross no border: every region that reads one makes it again."""
    while node.op == "call_function" and _is_view(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _layers(graph: MuxGraph) -> list[str]:
    """Elements of the module list that holds most of the graph, as "model.layers.0", in running order."""
    found: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    for node in graph.gm.graph.nodes:
        if node.op == "call_function" and (match := re.match(r"(.*?\.?)(\d+)(?:\.|$)", module_of(node))):
            stem, name = match[1], match[1] + match[2]
            found[stem] += 1
            if name not in first.setdefault(stem, []):
                first[stem].append(name)
    return first[found.most_common(1)[0][0]] if found else []


def _layer_of(node: fx.Node, layers: list[str]) -> str | None:
    match = re.match(r"(.*?\.?\d+)(?:\.|$)", module_of(node))
    return match[1] if match and match[1] in layers else None


def _spread(graph: MuxGraph, grads: set[fx.Node]) -> None:
    """Mark every node that depends on a trainable table through floating-point values."""
    for node in graph.gm.graph.nodes:
        if node.op == "call_function" and any(arg in grads for arg in node.all_input_nodes):
            value = val(node)
            if isinstance(value, tuple | list) or value.is_floating_point():
                grads.add(node)


def _body(
    graph: MuxGraph,
    name: str,
    nodes: list[fx.Node],
    outputs: list[fx.Node],
    values: dict[fx.Node, str],
    grads: set[fx.Node],
    tables: set[fx.Node],
    own: bool = True,
) -> Body:
    """`own`: outputs have memory of their own, since others read them when this body is over."""
    nodes = _with_views(nodes)
    inside = set(nodes)
    inputs = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside))
    # Values first, then earlier pieces, the chunk, routes, dropout keys, tables, weights, each in order of first use: one
    # signature for all layers.
    sources = {node: source for source, node in graph.inputs.items()}
    inputs.sort(
        key=lambda node: ("value", "carry", "chunk", "route", "drop", "table", "weight").index(
            sources[node].kind if node in sources else "value"
        )
    )
    body = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(inputs):
        copied[node] = body.placeholder(f"a{position}")
        copied[node].meta = {"val": val(node)}
    for node in nodes:
        copied[node] = body.node_copy(node, lambda arg: copied[arg])
    body.output(tuple(_real(body, copied[node]) if own else copied[node] for node in outputs))
    gm = graph_module(body)
    references = tuple(str(sources[node]) if node in sources else f"value:{values[node]}" for node in inputs)
    wants = tuple(node in grads for node in inputs)
    has = tuple(node in grads for node in outputs)
    spec = RegionSpec(
        name, _identity(gm, references, wants, has), references, tuple(values.get(node, f"{name}/0") for node in outputs)
    )
    return Body(spec, gm, tuple(node in tables for node in inputs), wants, has)


def _with_views(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes and, before them, the views of weights that they read."""
    found: dict[fx.Node, None] = {}
    waiting = [arg for node in nodes for arg in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and _view_of_weight(node) and node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return sorted({*found, *nodes})


# Operators that make fresh memory. Others may return a view, whatever their schema says: `linear` of three dimensions does.
_FRESH = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "pow",
    "cos",
    "sin",
    "silu",
    "gelu",
    "relu",
    "embedding",
    "layer_norm",
    "rms_norm",
    "to",
    "_to_copy",
    "tile_affine",
    "tile_mm",
    "tile_sparse",
}


def _real(body: fx.Graph, node: fx.Node) -> fx.Node:
    """An output that may be a view is copied: a region hands on memory of its own."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None and packet.__name__ in _FRESH:
        return node
    copy = body.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta = {"val": val(node).clone()}
    return copy


def _identity(gm: fx.GraphModule, references: tuple[str, ...], wants: tuple[bool, ...], has: tuple[bool, ...]) -> str:
    """A text that is equal for bodies that may share code: structure, shapes, strides, dtypes, devices, and which gradients."""
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    lines = []
    for node, reference, wanted in zip(gm.graph.find_nodes(op="placeholder"), references, wants, strict=True):
        value = val(node)
        kind = reference.partition(":")[0]
        lines.append(f"{kind} {tuple(value.shape)} {value.stride()} {value.dtype} {value.device} {wanted}")
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda arg: _Numbered(number[arg]))
            lines.append(f"{node.op} {node.target} {args}")
    return "\n".join([*lines, str(has)])


class _Numbered:
    """Prints a node by its place, whatever its name."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def handed_on(bodies: list[Body]) -> tuple[Carried, ...]:
    """For every input of earlier pieces, the values that later pieces see of the chunk itself; in order of their numbers.

    Raises:
        ValueError: naming the layer whose attention reads keys that are not its own.
    """
    found: dict[int, Carried] = {}
    taken: set[str] = set()
    for body in bodies:
        outputs = body.gm.graph.output_node().args[0]
        # An output that may be a view is a copy of what the attention reads.
        made = {node.args[0] if node.target is torch.ops.aten.clone.default else node: index for index, node in enumerate(outputs)}
        inputs = dict(zip(body.gm.graph.find_nodes(op="placeholder"), body.spec.inputs, strict=True))
        for node, reference in inputs.items():
            kind, _, number = reference.partition(":")
            if kind == "carry":
                (reader,) = node.users
                pair = reader.args[1:3]
                names = [body.spec.outputs[made[own]] for own in pair if own in made]
                if len({*names} - taken) < 2:
                    raise ValueError(
                        f"backbone: the attention of {body.spec.name!r} shares its keys or values: sequences longer than a chunk "
                        "cannot be cut (raise Options.chunk_tokens)"
                    )
                taken.update(names)
                shape, dtype = tuple(val(node).shape[2:]), str(val(node).dtype).removeprefix("torch.")
                keys, values = names
                found[int(number)] = Carried(number, keys, values, shape, dtype)
    return tuple(found[number] for number in sorted(found))


def share(bodies: list[Body]) -> dict[str, list[Body]]:
    """Bodies by template name: those of one structural identity share a template, named after its first region."""
    found: dict[str, list[Body]] = {}
    for body in bodies:
        found.setdefault(body.spec.template, []).append(body)
    return {group[0].spec.name: group for group in found.values()}


def summary(bodies: list[Body]) -> str:
    """Which regions there are and which share a template, one line each."""
    lines = []
    for name, group in share(bodies).items():
        body = group[0]
        kinds: Counter[Any] = Counter(reference.partition(":")[0] for reference in body.spec.inputs)
        reads = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(
            f"template {name}: {len(group)} region(s) {body.spec.name} .. {group[-1].spec.name}; reads {reads}; "
            f"gradient {any(body.has_grad)}"
        )
    return "\n".join(lines) + "\n"
