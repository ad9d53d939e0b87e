"""carry: every attention may see the keys and values of a sequence's earlier pieces, which stood in earlier chunks."""

from __future__ import annotations

import torch
from torch import fx

from codegen.ops import ATTENTION, PREFIXED_ATTENTION
from passes.graph import MuxGraph, Source, add_input, val

# What their place among an attention's arguments is, where there is none; q, k and v come first.
_BEFORE = {ATTENTION: 7, PREFIXED_ATTENTION: 10}


def carry(graph: MuxGraph) -> MuxGraph:
    """Give every attention its `before`.

    Before: every attention stands as it will run (`attach` has made the prefixed ones). After: the n-th reads the input `carry:n`,
    [2, C, G, D], the keys and values of all earlier pieces of the chunk's first sequence; C differs from chunk to chunk and is 0
    without such pieces. What C says here is a placeholder's.
    """
    nodes = [node for node in graph.gm.graph.nodes if node.target in _BEFORE]
    for number, node in enumerate(nodes):
        assert len(node.args) == _BEFORE[node.target], f"{node.name}: carries keys already"
        key = val(node.args[1])
        with key.fake_mode:
            before = torch.empty(2, graph.tile, *key.shape[1:], dtype=key.dtype, device=key.device)
        node.args = (*node.args, add_input(graph, Source("carry", str(number)), before))
    graph.gm.recompile()
    return graph


def carried(graph: MuxGraph) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """The keys and values that each input of earlier pieces goes on with in the chunk itself."""
    found = {}
    for source, node in graph.inputs.items():
        if source.kind == "carry":
            (reader,) = node.users
            found[node] = reader.args[1], reader.args[2]
    return found
