"""shard: collectives become nodes around what each rank of a tensor-parallel group has a part of; and whose gradients are parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from codegen.ops import REDUCE, SPREAD
from passes.graph import LINEAR, MuxGraph, after, call, module_of, val
from passes.split import COLUMN, ROW, Split
from runtime.tables import Encoding, Input, Param, Shard

GROUP = "tp"
_ADD = torch.ops.aten.add.Tensor


def shard(graph: MuxGraph, *, how: Split) -> MuxGraph:
    """Write `mux::spread` before the column-parallel linears, one for each input, and `mux::reduce` behind each row-parallel one.

    Before: level "normal", of a module that `split` made: every shape is the rank's own. After: between the two every rank has its
    own features, everywhere else all have the same values, bit for bit. The bias of a row-parallel linear is added behind the sum.
    Left alone: all others.

    Where `how.head` is split, the logits are a part of the vocabulary (`differentiate_head`).

    Raises:
        ValueError: a rank's features reach the logits without a sum.
    """
    gm = graph.gm
    spreads: dict[fx.Node, fx.Node] = {}
    columns: dict[str, int] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=LINEAR)):
        way = how.ways.get(module_of(node))
        if way == COLUMN:
            x = node.args[0]
            if x not in spreads:
                with gm.graph.inserting_before(after(x)):
                    spreads[x] = call(gm, SPREAD, (x, GROUP), node)
            node.replace_input_with(x, spreads[x])
        elif way == ROW:
            columns[module_of(node)] = how.index * val(node.args[0]).shape[-1]
            _sum(gm, node)
    apart = between(graph)
    output = gm.graph.output_node().args[0][0]
    if output in apart and not how.head:
        raise ValueError("backbone: its tensor-parallel plan leaves split features unsummed at the logits")
    gm.recompile()
    return replace(graph, columns=columns)


def _sum(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, *bias = node.args
    readers = list(node.users)
    node.args = (x, weight)
    with gm.graph.inserting_before(node.next):
        out = call(gm, REDUCE, (node, GROUP), node)
    if bias and bias[0] is not None:
        with gm.graph.inserting_before(out.next):
            out = call(gm, _ADD, (out, bias[0]), node)
        out.meta["mux_bias"] = True
    for reader in readers:
        reader.replace_input_with(node, out)


def between(graph: MuxGraph) -> set[fx.Node]:
    """The nodes from a `spread` on, up to the `reduce` that ends its part: what differs from rank to rank."""
    found: set[fx.Node] = set()
    for node in graph.gm.graph.nodes:
        if node.target is SPREAD or (node.target is not REDUCE and any(arg in found for arg in node.all_input_nodes)):
            found.add(node)
    return found


def share(graph: MuxGraph, *, how: Split, wholes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> MuxGraph:
    """Say of every trained tensor whether a rank has a piece of it, and of every table whether a rank's gradient is a part.

    Before: level "attached" or "fused". After: `Param.shard`, `Input.shard` and `Table.partial` are set. A tensor that all ranks
    have and that is read where they differ gets from each the gradient of its own features. Left alone: the nodes.

    Args:
        wholes: PEFT's shapes by task and key, of the whole model.
    """
    params = {name: _param(own, wholes[own.task], graph, how) for name, own in graph.params.items()}
    encodings = {name: _encoding(own, wholes[own.task], how) for name, own in graph.encodings.items()}
    pieces = {own.table for own in params.values() if own.shard is not None}
    for encoding in encodings.values():
        if any(given.shard is not None for given in encoding.inputs):
            pieces.update(place.table for place in encoding.outputs)
    apart = between(graph)
    tables = dict(graph.tables)
    for source, node in graph.inputs.items():
        if source.kind == "table" and tables[source.key].trainable and source.key not in pieces:
            tables[source.key] = replace(tables[source.key], partial=_reaches(node, apart))
    return replace(graph, tables=tables, params=params, encodings=encodings)


def _reaches(node: fx.Node, apart: set[fx.Node]) -> bool:
    """Whether a table is read where ranks differ, itself or through what is computed from it alone."""
    reached: set[bool] = set()
    waiting, known = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user not in apart and all(arg in known for arg in user.all_input_nodes):
                known.add(user)
                waiting.append(user)
            else:
                reached.add(user in apart)
    assert len(reached) <= 1, f"{node.name}: read both where ranks differ and where they do not"
    return True in reached


def _param(own: Param, wholes: Mapping[str, tuple[int, ...]], graph: MuxGraph, how: Split) -> Param:
    rows, features = own.stop - own.start, graph.tables[own.table].shape[-1]
    shape = (features, rows) if own.transposed else (rows, features)
    return replace(own, shard=_piece(own.key, wholes[own.key], shape[1:] if own.flat else shape, how))


def _encoding(own: Encoding, wholes: Mapping[str, tuple[int, ...]], how: Split) -> Encoding:
    def marked(given: Input) -> Input:
        whole = wholes.get(given.key, given.shape)
        return replace(given, shard=_piece(given.key, whole, given.shape, how))

    return replace(own, inputs=tuple(marked(given) for given in own.inputs))


def _piece(key: str, whole: tuple[int, ...], part: tuple[int, ...], how: Split) -> Shard | None:
    differ = [dim for dim, (all_, own) in enumerate(zip(whole, part, strict=True)) if all_ != own]
    if not differ:
        return None
    (dim,) = differ
    found = Shard(dim, how.index, how.count)
    assert found.whole(part) == tuple(whole), f"{key}: {part} is no piece of {whole}"
    return found


def ended(node: fx.Node) -> fx.Node:
    """Where the value of a linear, or of what adapters add to it, is whole: behind the sum over ranks and its bias.

    That is the node itself wherever there is no sum.
    """
    reached, module = node, module_of(node)
    while reached.target is not REDUCE:
        following = [user for user in reached.users if user.target is REDUCE or (user.target is _ADD and module_of(user) == module)]
        if len(following) != 1 or not module:
            return node
        (reached,) = following
    return next((user for user in reached.users if "mux_bias" in user.meta), reached)
