"""normalise: one spelling for every operator, and nothing that does nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from passes.graph import LINEAR, MuxGraph, call, drop_dead, val

aten = torch.ops.aten

_RESHAPES = (aten.slice.Tensor, aten.expand.default, aten.view.default, aten.reshape.default)
_NOTHING_KEPT = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def normalise(graph: MuxGraph) -> MuxGraph:
    """Rewrite to normal form.

    Before: level "captured". After: a product of tokens with a weight is `aten.linear` (addmm and Conv1D included, through
    a transposed view of the weight), no dropout, no assertion, no cast to the same dtype, no full slice, no dead node.
    Left alone: everything that computes something; results keep their bits.
    """
    gm = graph.gm
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif (same := _does_nothing(node)) is not None:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
        elif node.target in (aten.addmm.default, aten.mm.default, aten.matmul.default):
            _to_linear(gm, node)
    drop_dead(graph)
    gm.recompile()
    return replace(graph, level="normal")


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The node whose value this one repeats, if it does no more than that."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    before, after = val(source), val(node)
    if node.target in _NOTHING_KEPT:
        return source
    if node.target is aten.dropout.default and (node.args[1] == 0 or node.args[2] is False):
        return source
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default):
        copies = node.args[3] if node.target is aten.to.dtype and len(node.args) > 3 else node.kwargs.get("copy", False)
        return source if before.dtype == after.dtype and before.device == after.device and not copies else None
    if node.target in _RESHAPES and before.shape == after.shape and before.stride() == after.stride():
        return source
    if node.target is aten.contiguous.default and before.is_contiguous():
        return source
    return None


def _to_linear(gm: fx.GraphModule, node: fx.Node) -> None:
    bias, x, w = (node.args[0], *node.args[1:3]) if node.target is aten.addmm.default else (None, *node.args[:2])
    scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if scaled or w.op != "placeholder" or val(w).dim() != 2 or (bias is not None and val(bias).dim() != 1):
        return
    with gm.graph.inserting_before(node):
        turned = call(gm, aten.t.default, (w,), node)
        linear = call(gm, LINEAR, (x, turned) if bias is None else (x, turned, bias), node)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)
