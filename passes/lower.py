"""lower: every group of linears gets the lowering of its products, with the reasons noted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from codegen import ahead
from codegen.kernels.build import Call
from codegen.layout import Layout, layout_of
from codegen.lower import Choice, Forms, Target, explain
from codegen.ops import LINEARS, TILE_SPARSE
from passes.graph import MuxGraph, head_of, hidden_of, module_of, val


def lower(graph: MuxGraph, *, target: Target | None) -> MuxGraph:
    """Choose the form of every `mux::linears`.

    Before: level "fused". After: the node's last argument says the lowering of each output and of its input's gradient.
    Left alone: the head, whose forms are given; everything where `target` is None (a device without choices).
    """
    if target is None:
        return graph
    for node in graph.gm.graph.find_nodes(op="call_function", target=LINEARS):
        if node.args[-1]:
            continue
        *y, dx = explain(*_shapes(node), target)
        node.args = (*node.args[:-1], str(Forms(tuple(choice.form for choice in y), dx.form)))
    graph.gm.recompile()
    return replace(graph)


def choices(graph: MuxGraph, target: Target | None) -> dict[str, str]:
    """For the plan: each kind of group once, by its first place, with the lowering of every product and why not the others."""
    found: dict[tuple[Layout, tuple[bool, ...]], list[str]] = {}
    head: dict[str, str] = {}
    for node in graph.gm.graph.find_nodes(op="call_function", target=LINEARS):
        if _is_head(graph, node):
            head = {"linear of the head": f"{node.args[-1]}: who has no adapter of the head has the frozen product's bits"}
            continue
        found.setdefault(_shapes(node), []).append(module_of(node))
    answer = _sparse(graph)
    if target is None:
        cpu = {"linears": "on the CPU torch's own products, each task's part added in place to its rows"}
        return (cpu if found else {}) | answer
    answer |= head
    for (layout, biases), places in found.items():
        lines: list[Choice] = explain(layout, biases, target)
        answer[f"linears of {places[0]} ({len(places)} places)"] = " | ".join(str(choice) for choice in lines)
    return answer


def _sparse(graph: MuxGraph) -> dict[str, str]:
    """What sparse matrices cost, each kind of place once."""
    found: dict[tuple[tuple[int, ...], int, int, int], list[str]] = {}
    for node in graph.gm.graph.find_nodes(op="call_function", target=TILE_SPARSE):
        _, x, values, _, _, features, _ = node.args
        size = val(x).element_size()
        found.setdefault((tuple(val(values).shape), val(x).shape[-1], features, size), []).append(module_of(node))
    answer = {}
    for ((slots, _, count), inputs, outputs, size), places in found.items():
        megabytes = inputs * outputs * size / 1e6
        answer[f"sparse matrices of {count} values at {places[0]} ({len(places)} places)"] = (
            f"[{inputs}, {outputs}], dense for one of {slots} slots at a time ({megabytes:.1f} MB, its gradient "
            f"{inputs * outputs * 4 / 1e6:.1f} MB); a slot's rows take the products of a whole linear"
        )
    return answer


def kernels(graph: MuxGraph, target: Target | None, head: fx.GraphModule | None = None) -> list[Call]:
    """Every kernel that the graph and its backward launch, once, with arguments like its own; none where `target` is None.

    Args:
        head: the loss, which works on fewer rows than the graph's own head.
    """

    hidden = hidden_of(graph)
    regions = [node for node in graph.gm.graph.nodes if hidden not in node.all_input_nodes]
    return launched((*regions, *(head.graph.nodes if head is not None else ()))) if target is not None else []


def launched(nodes: Iterable[fx.Node]) -> list[Call]:
    """Every kernel that these nodes and their backwards launch, once, with arguments like its own."""

    def bare(node: fx.Node) -> Tensor:
        own = val(node)
        return torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta")

    found: dict[str, Call] = {}
    for node in nodes:
        if node.target in ahead.OPERATORS:
            for launch, tensors in ahead.calls(node.target, fx.map_arg(node.args, bare)):
                found.setdefault(launch.name, (launch, tensors))
    return list(found.values())


def _is_head(graph: MuxGraph, node: fx.Node) -> bool:
    return node is head_of(graph)


def _shapes(node: fx.Node) -> tuple[Layout, tuple[bool, ...]]:
    x, weights, biases, a, b, _, route, _, _, _, _, members, drops, _ = node.args
    frozen, tables_a, tables_b = ([val(given) for given in own] for own in (weights, a, b))
    blocks = val(route[0]).shape[0] if route else 1
    return layout_of(val(x), frozen, tables_a, tables_b, blocks, members, drops), tuple(bias is not None for bias in biases)
