"""differentiate: region bodies -> templates with explicit forward and backward graphs; no autograd engine at run time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode

from codegen.ops import (
    LINEARS_BACKWARD,
    LINEARS_BACKWARD_,
    PREFIX_GRAD,
    PREFIX_GRAD_,
    SPREAD,
    TILE_OUTER,
    TILE_OUTER_,
    TILE_SCATTER,
    TILE_SCATTER_,
    TILE_SPARSE_SUM,
    TILE_SPARSE_SUM_,
    TILE_SUM,
    TILE_SUM_,
)
from codegen.spec import Body, Template
from passes.graph import copy_module, val
from passes.needs import supply
from passes.rowwise import rowwise
from runtime.region import TemplateSpec

aten = torch.ops.aten

_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_VIEWS = (
    aten.t.default,
    aten.permute.default,
    aten.view.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
)

# Sums over a slot's rows, and the forms that add to a table in place; what says the table's size comes last.
_INTO = {
    TILE_OUTER: TILE_OUTER_,
    TILE_SUM: TILE_SUM_,
    TILE_SCATTER: TILE_SCATTER_,
    TILE_SPARSE_SUM: TILE_SPARSE_SUM_,
    PREFIX_GRAD: PREFIX_GRAD_,
}

Decompositions = dict[Any, Callable[..., Any]] | None


def differentiate(
    name: str,
    body: Body,
    *,
    decompositions: Decompositions = None,
    checkpoint: bool = False,
    traced: fx.GraphModule | None = None,
    fused: bool | None = None,
) -> Template:
    """The forward and backward of one template.

    The joint graph is cut by min-cut rematerialisation: what is cheap is recomputed, what is dear is saved; with `checkpoint`
    nothing is, and the backward begins with the forward. Gradients exist for trainable tables and for values that depend on one;
    a table's gradient is added in place to its float32 gradient table.

    Args:
        traced: what `trace` gave for this body, to be cut in more than one way; it is left as it was.
        fused: whether what works on rows alone is joined (`passes.rowwise`); None: on CUDA, where torch's calls are run.
    """
    template = _cut(name, body, decompositions, checkpoint, traced)
    cuda = any(val(node).device.type == "cuda" for node in body.gm.graph.find_nodes(op="placeholder"))
    if cuda and decompositions is None if fused is None else fused:
        _join_rows(template, body)
    return template


def _cut(name: str, body: Body, decompositions: Decompositions, checkpoint: bool, traced: fx.GraphModule | None) -> Template:
    graph = trace(body, decompositions) if traced is None else copy_module(traced)[0]
    if not any(body.has_grad):
        return Template(TemplateSpec(name, len(body.has_grad), 0, None, ()), graph, None)
    with torch._functorch.config.patch(activation_memory_budget=0 if checkpoint else 1):
        forward, backward = min_cut_rematerialization_partition(graph, None, num_fwd_outputs=len(body.has_grad))
    return _template(name, body, forward, backward)


def _join_rows(template: Template, body: Body) -> None:
    """In both graphs; what is there for some tasks alone is left as it is."""
    own = [reference if reference.partition(":")[0] in ("table", "route", "drop") else "" for reference in body.spec.inputs]
    given = [frozenset({reference}) if reference else None for reference in own]
    inputs = dict(zip(template.forward.graph.find_nodes(op="placeholder"), given, strict=True))
    _, present = supply(template.forward, inputs)
    outputs = template.forward.graph.output_node().args[0]
    saved = [present[node] for node in outputs[template.spec.outputs :]]
    rowwise(template.forward, {node for node, extras in present.items() if extras is not None})
    if template.backward is None:
        return
    assert template.spec.backward is not None
    known = {"input": given, "grad": given, "saved": saved}
    inputs = {}
    for node, reference in zip(template.backward.graph.find_nodes(op="placeholder"), template.spec.backward, strict=True):
        kind, _, index = reference.partition(":")
        inputs[node] = known[kind][int(index)] if kind in known else None
    _, present = supply(template.backward, inputs)
    rowwise(template.backward, {node for node, extras in present.items() if extras is not None})


def trace(body: Body, decompositions: Decompositions = None) -> fx.GraphModule:
    """The forward and the backward of a body as one graph; the forward alone where nothing has a gradient."""
    return exported(body.gm.forward, _fakes(body), any(body.has_grad), decompositions)


def saved_bytes(template: Template) -> int:
    """What one run of the forward keeps for the backward, beside the template's own inputs."""
    outputs = list(template.forward.graph.output_node().args[0])
    kept = outputs[len(outputs) - template.spec.saved :]
    return sum(val(node).numel() * val(node).element_size() for node in kept)


def _fakes(body: Body) -> list[torch.Tensor]:
    mode = FakeTensorMode()
    fakes = []
    with mode:
        for node, wanted in zip(body.gm.graph.find_nodes(op="placeholder"), body.wants_grad, strict=True):
            value = val(node)
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            fakes.append(fake.requires_grad_(wanted))
    return fakes


def exported(call: Callable[..., Any], args: Sequence[torch.Tensor], joint: bool, decompositions: Decompositions) -> fx.GraphModule:
    traced = aot_export_joint_simple(call, tuple(args), trace_joint=joint, decompositions=decompositions)
    assert isinstance(traced, fx.GraphModule)
    # Inputs and outputs as a flat list, in the order of the placeholders: primals, then tangents.
    traced.graph.set_codegen(fx.graph.CodeGen())
    _tidy(traced)
    if decompositions is None:
        _fold_silu_backward(traced)
    return traced


def _tidy(gm: fx.GraphModule) -> None:
    """Take out what tracing left behind: assertions, aliases, a transpose of a transpose; `spread`, once its gradient is there."""
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif node.target in (aten.detach.default, aten.alias.default, SPREAD):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _fold_silu_backward(gm: fx.GraphModule) -> None:
    """grad * (s * (1 + x * (1 - s))) with s = sigmoid(x) -> aten.silu_backward(grad, x).

    Autograd spells silu's gradient out so that it can be differentiated again; run eagerly, that is seven passes over memory
    for one. A spelling that differs is left as it is.
    """
    for node in list(gm.graph.nodes):
        x = _silu_input(node.args[1]) if node.target is aten.mul.Tensor else None
        if x is not None:
            with gm.graph.inserting_before(node):
                folded = gm.graph.call_function(aten.silu_backward.default, (node.args[0], x))
            folded.meta = dict(node.meta)
            node.replace_all_uses_with(folded)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _silu_input(node: Any) -> fx.Node | None:
    """x if the node is s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    sigmoid, sum_ = _arguments(node, aten.mul.Tensor)
    (x,) = _arguments(sigmoid, aten.sigmoid.default, 1)
    product, one = _arguments(sum_, aten.add.Scalar)
    factor, difference = _arguments(product, aten.mul.Tensor)
    ones, subtracted = _arguments(difference, aten.sub.Tensor)
    _, filled = _arguments(ones, aten.fill.Scalar)
    return x if x is not None and factor is x and one == 1 and subtracted is sigmoid and filled == 1 else None


def _arguments(node: Any, target: Any, count: int = 2) -> tuple[Any, ...]:
    """The node's arguments if it calls `target`, else Nones."""
    return node.args if isinstance(node, fx.Node) and node.target is target and len(node.args) == count else (None,) * count


def _template(name: str, body: Body, forward: fx.GraphModule, backward: fx.GraphModule) -> Template:
    inputs = forward.graph.find_nodes(op="placeholder")
    # The partitioner keeps the names of joint inputs (primals_1, ...); an input that the forward does not read is absent from it.
    position = {node.name: int(node.name.removeprefix("primals_")) - 1 for node in inputs}
    _complete_inputs(forward, position, body)
    outputs = list(forward.graph.output_node().args[0])
    count = len(body.has_grad)
    saved = _drop_views_of_inputs(forward, backward, outputs, count)
    binding: dict[str, str] = {}
    kept = [node for node in saved if node.op != "placeholder"]
    for node in saved:
        binding[node.name] = f"input:{position[node.name]}" if node.op == "placeholder" else f"saved:{kept.index(node)}"
    forward.graph.output_node().args = ((*outputs[:count], *kept),)
    forward.recompile()
    grads = _accumulate_tables(backward, body, binding)
    arguments = tuple(_argument(node, binding, body) for node in backward.graph.find_nodes(op="placeholder"))
    backward.graph.eliminate_dead_code()
    backward.recompile()
    return Template(TemplateSpec(name, count, len(kept), arguments, grads), forward, backward)


def _complete_inputs(forward: fx.GraphModule, position: dict[str, int], body: Body) -> None:
    """The forward takes every input of the region, read or not."""
    present = {index: node for node, index in zip(forward.graph.find_nodes(op="placeholder"), position.values(), strict=True)}
    assert list(present) == sorted(present), "the partitioner reordered the inputs"
    missing = set(range(len(body.wants_grad))) - set(present)
    assert not missing, f"inputs {sorted(missing)} are not read by the forward"


def _drop_views_of_inputs(forward: fx.GraphModule, backward: fx.GraphModule, outputs: list[fx.Node], count: int) -> list[fx.Node]:
    """Saved views of an input (a weight's transpose) are made again in the backward: a saved tensor is then a real one."""
    saved: list[fx.Node] = []
    places = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    for node in outputs[count:]:
        chain = [node]
        while chain[-1].target in _VIEWS:
            chain.append(chain[-1].args[0])
        if len(chain) == 1 or chain[-1].op != "placeholder":
            saved.append(node)
            continue
        root = chain.pop()
        old = places[node.name]
        if root.name not in places:
            with backward.graph.inserting_before(old):
                places[root.name] = backward.graph.placeholder(root.name)
            places[root.name].meta = dict(root.meta)
        if root not in saved and root not in outputs[count:]:
            saved.append(root)
        *_, last = backward.graph.find_nodes(op="placeholder")
        current = places[root.name]
        with backward.graph.inserting_before(last.next):
            for view in reversed(chain):
                current = backward.graph.node_copy(view, lambda _arg, current=current: current)
        old.replace_all_uses_with(current)
        backward.graph.erase_node(old)
    return saved


def _accumulate_tables(backward: fx.GraphModule, body: Body, binding: dict[str, str]) -> tuple[int, ...]:
    """Turn every returned table gradient into additions to a gradient table; returns the inputs whose gradient remains."""
    output = backward.graph.output_node()
    returned, inputs = [], []
    tables: dict[fx.Node, fx.Node] = {}
    for index, grad in enumerate(output.args[0]):
        if not body.wants_grad[index]:
            assert grad is None, f"input {index} got a gradient nobody wants"
        elif body.trainable[index]:
            accumulate(backward, index, grad, binding, tables)
        else:
            assert grad is not None, f"input {index} got no gradient"
            returned.append(grad)
            inputs.append(index)
    output.args = (tuple(returned),)
    in_place(backward, tables)
    return tuple(inputs)


def accumulate(
    backward: fx.GraphModule, index: int, grad: fx.Node, binding: dict[str, str], tables: dict[fx.Node, fx.Node]
) -> None:
    """A gradient table for input `index`; `tables` notes which results of `linears_backward` are added to which table."""
    assert grad is not None, f"table input {index} got no gradient"
    name = f"grad_{index}"
    *_, last = backward.graph.find_nodes(op="placeholder")
    with backward.graph.inserting_before(last.next):
        table = backward.graph.placeholder(name)
    binding[name] = f"grad:{index}"
    terms = _terms(grad)
    table.meta["val"] = val(terms[0]).view(val(grad).shape)
    for term in terms:
        place = _viewed(backward, table, val(term))
        if term.target is operator.getitem:
            tables[term] = place
            continue
        into = _INTO[term.target]
        given = term.args[: len(into._schema.arguments) - 1]
        with backward.graph.inserting_before(backward.graph.output_node()):
            node = backward.graph.call_function(into, (place, *given))
        node.meta["val"] = None


def _terms(grad: fx.Node) -> list[fx.Node]:
    """The products that a table's gradient is the sum of (several where a module runs more than once), under views and casts."""
    if grad.target in _INTO or (grad.target is operator.getitem and grad.args[0].target is LINEARS_BACKWARD):
        return [grad]
    if grad.target in _CASTS or grad.target in _RESHAPES:
        return _terms(grad.args[0])
    assert grad.target is aten.add.Tensor, f"{grad.name}: {grad.target} is not a sum of tile products"
    return [term for arg in grad.args for term in _terms(arg)]


def _viewed(backward: fx.GraphModule, table: fx.Node, product: torch.Tensor) -> fx.Node:
    """The gradient table in its product's shape: where an operator reads a view of its table, so does the addition."""
    if val(table).shape == product.shape:
        return table
    *_, last = backward.graph.find_nodes(op="placeholder")
    with backward.graph.inserting_before(last.next):
        view = backward.graph.call_function(aten.view.default, (table, list(product.shape)))
    view.meta["val"] = product
    return view


def in_place(backward: fx.GraphModule, tables: dict[fx.Node, fx.Node]) -> None:
    """linears_backward -> linears_backward_: gradients are added to the tables, dx is written to memory made for it."""
    graph = backward.graph
    for node in graph.find_nodes(op="call_function", target=LINEARS_BACKWARD):
        dy, x, narrow, weights, a, b, *rest, wants_dx, forms = node.args
        results = {user.args[1]: user for user in node.users}
        grads = [tables[results[index]] for index in range(len(a) + len(b))]
        with graph.inserting_before(node):
            dx = None
            if wants_dx:
                dx = graph.call_function(aten.empty_like.default, (x,), {"memory_format": torch.contiguous_format})
                dx.meta["val"] = val(x)
                result = results.get(len(grads))
                if result is not None:
                    result.replace_all_uses_with(dx)
            call = graph.call_function(LINEARS_BACKWARD_, (grads, dx, dy, x, narrow, weights, a, b, *rest, forms))
            call.meta["val"] = None
    graph.eliminate_dead_code()


def _argument(node: fx.Node, binding: dict[str, str], body: Body) -> str:
    if node.name.startswith("tangents_"):
        # One tangent for each output that has a gradient, in their order.
        with_grad = [index for index, has in enumerate(body.has_grad) if has]
        return f"tangent:{with_grad[int(node.name.removeprefix('tangents_')) - 1]}"
    return binding[node.name]
