"""lookup: a rank of a tensor-parallel group looks up the tokens whose rows it has; the sum over ranks has all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from codegen.ops import REDUCE
from passes.graph import EMBEDDING, MuxGraph, call, module_of, val
from passes.shard import GROUP
from passes.split import VOCABULARY, Split

aten = torch.ops.aten


def lookup(graph: MuxGraph, *, how: Split) -> MuxGraph:
    """Write the lookups of a split embedding as those of the rank's own rows, zeros elsewhere, and `mux::reduce`.

    One rank has a token's row and the others add zeros: the sum has the bits of the whole table's. Adapters are written behind it,
    and read the ids as they were.

    Before: level "attached" or "fused"; lookups of ids of the whole vocabulary in the rank's part of the table. After: the values
    that readers saw, whole on every rank. Left alone: lookups in tables that are whole.

    Raises:
        ValueError: another module reads the table.
    """
    gm = graph.gm
    for node in list(gm.graph.find_nodes(op="call_function", target=EMBEDDING)):
        name, table = module_of(node), node.args[0]
        if how.ways.get(name) != VOCABULARY:
            continue
        # A head that is tied to it has the same part of the vocabulary.
        other = next((module_of(user) for user in table.users if module_of(user) not in (name, how.head)), None)
        if other is not None:
            where = other or "(the model itself)"
            raise ValueError(f"mesh tp={how.count}: backbone: module {where!r} reads {name}.weight, whose rows are split")
        _own_rows(gm, node, how)
    gm.recompile()
    return replace(graph)


def _own_rows(gm: fx.GraphModule, node: fx.Node, how: Split) -> None:
    table, ids = node.args[:2]
    rows, readers = val(table).shape[0], list(node.users)
    with gm.graph.inserting_before(node):
        index = call(gm, aten.sub.Tensor, (ids, how.index * rows), node)
        foreign = call(gm, aten.lt.Scalar, (index, 0), node)
        foreign = call(gm, aten.logical_or.default, (foreign, call(gm, aten.ge.Scalar, (index, rows), node)), node)
        index = call(gm, aten.clamp.default, (index, 0, rows - 1), node)
        found = call(gm, EMBEDDING, (table, index), node)
        found = call(gm, aten.masked_fill.Scalar, (found, call(gm, aten.unsqueeze.default, (foreign, -1), node), 0), node)
        out = call(gm, REDUCE, (found, GROUP), node)
    for reader in readers:
        reader.replace_input_with(node, out)
    gm.graph.erase_node(node)
