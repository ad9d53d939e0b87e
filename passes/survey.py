"""survey: one compilation of all tasks, as numbers that predict a chunk of any size and of any of the tasks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from codegen import tiling
from codegen.lower import Target
from codegen.ops import ATTENTION, PREFIXED_ATTENTION
from codegen.spec import Body, Head, Template
from passes.adapters import Adapter
from passes.capture import capture
from passes.differentiate import differentiate, trace
from passes.graph import MuxGraph, lazily, val
from passes.loss import differentiate_head
from passes.needs import ALWAYS, NEVER, Clauses, Extras, Needs, either, needs, union
from passes.partition import partition, share
from passes.pipeline import passes, run_passes
from passes.records import Amount, Phase, Scale, records, storages
from runtime.pack import Geometry
from runtime.region import RegionSpec, value_of

# T = tile * p of a survey; larger ones first: their chunks do not pass the positions of a small model, nor equal a weight's size.
_PRIMES = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7)


@dataclass(frozen=True, slots=True)
class Part:
    """Regions that share a template and whose adapters are those of the same tasks.

    `key` is a digest of the template's text in which sizes of the chunk are left open: what measurements are filed under. `weights`
    are the bytes of those that one of the regions reads.
    """

    template: str
    key: str
    regions: tuple[str, ...]
    forward: Phase
    backward: Phase | None
    weights: int


@dataclass(frozen=True, slots=True)
class Held:
    """A value between regions, from action `born` to action `dies`: forwards are 0 .. n - 1, the loss n, backwards n + 1 .. 2n."""

    name: str
    born: int
    dies: int
    nbytes: Amount


@dataclass(frozen=True, slots=True)
class Tenant:
    """What belongs to one task: its extras, and bytes and tensors of its tables, optimizer and encodings."""

    extras: Extras
    nbytes: int
    tensors: int
    tables: int
    encodings: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The numbers of a compilation.

    Args:
        tokens: the chunk that they were taken at.
        geometry: of that chunk.
        parts: by whether layers are checkpointed.
        order: for every region, in running order, its place in `parts` (the same for both).
        held: the values between regions.
        head: of one block of the loss, with its backward.
        head_row: bytes of a row of the hidden value that the loss reads.
        head_weights: bytes of the weights that the loss reads.
        tasks: by name.
        backbone: bytes of the weights.
        carried_row: bytes of a row's keys and values in all layers, with float32 sums of their gradients.
        cuda: whether it is for CUDA.
    """

    tokens: int
    geometry: Geometry
    parts: Mapping[bool, tuple[Part, ...]]
    order: tuple[int, ...]
    held: tuple[Held, ...]
    head: Phase
    head_row: int
    head_weights: int
    tasks: Mapping[str, Tenant]
    backbone: int
    carried_row: int
    cuda: bool

    def extras(self, tasks: Sequence[str]) -> Extras:
        """What the chunks of these tasks must run."""
        return union(self.tasks[task].extras for task in tasks) or frozenset()


@dataclass(frozen=True, slots=True)
class Bodies:
    """A graph after all passes, cut into regions."""

    graph: MuxGraph
    geometry: Geometry
    bodies: list[Body]
    head: Body


def bodies(model: nn.Module, adapters: Sequence[Adapter], tokens: int, *, device: torch.device, target: Target | None) -> Bodies:
    """The straight path up to the regions, for chunks of `tokens` rows."""
    geometry = tiling.geometry(device, tokens)
    graph = capture(model, tokens=geometry.tokens, tile=geometry.tile, max_sequences=geometry.sequences)
    graph, _ = run_passes(graph, passes(adapters=adapters, reserve=0, previous={}, target=target))
    return Bodies(graph, geometry, *partition(graph))


def frozen(known: Survey) -> dict[tuple[int, int], bool]:
    """The products by frozen matrices (K, N) that the regions and the loss run in 16 bits; whether they are of a chunk's rows."""
    parts = [part for own in known.parts.values() for part in own]
    phases = [phase for part in parts for phase in (part.forward, part.backward) if phase is not None]
    rows = [row for phase in (known.head, *phases) for row in phase.records]
    return {row.weight: row.elements.row > 0 for row in rows if row.weight is not None}


@lazily()
def survey(
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    device: torch.device,
    target: Target | None,
    checkpoint: Sequence[bool] = (False, True),
    optimizers: Mapping[str, str] | None = None,
) -> Survey:
    """Compile all tasks once, on fake tensors, and note what every node does.

    Args:
        model: the backbone; its tensors may be fake ones.
        device: the kind of device that it will run on, which decides the tile.
        target: as for `passes.lower`.
        checkpoint: whether layers are checkpointed: the variants that can be priced.
        optimizers: "adamw" or "sgd" by task; AdamW where it is not said.
    """
    tile = tiling.TILE["cuda" if device.type == "cuda" else "cpu"]
    sizes = {size for tensor in [*model.parameters(), *model.buffers()] for size in tensor.shape}
    for prime in _PRIMES:
        if any(size % prime == 0 for size in sizes if size):
            continue
        built = bodies(model, adapters, prime * tile, device=device, target=target)
        tables = {size for table in built.graph.tables.values() for size in table.shape}
        if not any(size % prime == 0 for size in tables if size):
            return of_bodies(built, prime, cuda=device.type == "cuda", checkpoint=checkpoint, optimizers=optimizers or {})
    raise ValueError(f"backbone: every prime of {_PRIMES} divides the size of one of its weights or of an adapter's tables")


def of_bodies(built: Bodies, prime: int, *, cuda: bool, checkpoint: Sequence[bool], optimizers: Mapping[str, str]) -> Survey:
    """Numbers of regions that were captured for a multiple of `prime` rows; 0: a survey of that chunk alone."""
    geometry, graph = built.geometry, built.graph
    scale = Scale(geometry.tokens, prime)
    upstream = _upstream(graph, built.bodies)
    groups = _bindings(graph, built.bodies, upstream)
    parts: dict[bool, tuple[Part, ...]] = {}
    shared = share(built.bodies)
    owner = {body.spec.name: name for name, own in shared.items() for body in own}
    traced = {name: trace(own[0]) for name, own in shared.items()}
    for variant in checkpoint:
        templates = {
            name: differentiate(name, own[0], checkpoint=variant, traced=traced[name], fused=cuda) for name, own in shared.items()
        }
        parts[variant] = tuple(_part(graph, templates[owner[own[0].spec.name]], own, upstream, scale, cuda) for own in groups)
    place = {body.spec.name: index for index, own in enumerate(groups) for body in own}
    head = differentiate_head(built.head, rows=geometry.head_rows, tile=geometry.head_tile, fused=cuda)
    hidden = val(built.head.gm.graph.find_nodes(op="placeholder")[0])
    return Survey(
        geometry.tokens,
        geometry,
        parts,
        tuple(place[body.spec.name] for body in built.bodies),
        _held(built.bodies, head, upstream, scale),
        _head(graph, built.head, head, upstream, cuda),
        hidden.shape[-1] * hidden.element_size(),
        _weights(graph, built.head.spec.inputs),
        _tenants(graph, optimizers),
        _bytes(graph.weights.values()),
        _carried_row(graph),
        cuda,
    )


def _carried_row(graph: MuxGraph) -> int:
    """Of a row's keys and values: themselves, and the sum of their gradients."""
    read = [node.args[1:3] for node in graph.gm.graph.nodes if node.target in (ATTENTION, PREFIXED_ATTENTION)]
    return sum(val(own).shape[1:].numel() * (val(own).element_size() + 4) for pair in read for own in pair)


def _upstream(graph: MuxGraph, regions: Sequence[Body]) -> dict[str, Extras]:
    """For every value the extras with trainable tables that it depends on: who wants its gradient."""
    found: dict[str, Extras] = {}
    for body in regions:
        own: dict[fx.Node, Extras] = {}
        for node, reference in zip(body.gm.graph.find_nodes(op="placeholder"), body.spec.inputs, strict=True):
            kind, _, name = reference.partition(":")
            trained = kind == "table" and graph.tables[name].trainable
            own[node] = frozenset({graph.tables[name].route}) if trained else found.get(value_of(reference) or "", frozenset())
        for node in body.gm.graph.nodes:
            if node.op == "call_function":
                value = val(node)
                floats = not isinstance(value, Tensor) or value.is_floating_point()
                own[node] = frozenset().union(*map(own.__getitem__, node.all_input_nodes)) if floats else frozenset()
        found.update(zip(body.spec.outputs, (own[node] for node in body.gm.graph.output_node().args[0]), strict=True))
    return found


def _given(graph: MuxGraph, reference: str) -> Extras | None:
    """The extras that an input of a region belongs to."""
    kind, _, name = reference.partition(":")
    if kind == "table":
        return frozenset({graph.tables[name].route})
    return frozenset({name}) if kind in ("route", "drop") else None


def _bindings(graph: MuxGraph, regions: Sequence[Body], upstream: Mapping[str, Extras]) -> list[list[Body]]:
    """Regions of one template whose inputs belong to the same extras, and are wanted by the same."""
    found: dict[Any, list[Body]] = {}
    for body in regions:
        given = tuple(_given(graph, reference) for reference in body.spec.inputs)
        wanted = tuple(upstream.get(value_of(reference) or "") for reference in body.spec.inputs)
        found.setdefault((body.spec.template, given, wanted), []).append(body)
    return list(found.values())


def _part(
    graph: MuxGraph, template: Template, own: Sequence[Body], upstream: Mapping[str, Extras], scale: Scale, cuda: bool
) -> Part:
    spec = own[0].spec
    names = tuple(body.spec.name for body in own)
    key = digest(template, scale)
    given = [_given(graph, reference) for reference in spec.inputs]
    inputs = dict(zip(template.forward.graph.find_nodes(op="placeholder"), given, strict=True))
    outputs = list(template.forward.graph.output_node().args[0])
    made, saved = outputs[: template.spec.outputs], outputs[template.spec.outputs :]
    sinks: dict[fx.Node, Clauses] = dict.fromkeys(made, ALWAYS)
    backward, wants = None, [NEVER] * len(saved)
    if template.backward is not None:
        # Who needs a saved tensor is known once the backward is; whether it is there, once the forward is.
        alone = needs(template.forward, inputs, dict.fromkeys(outputs, ALWAYS))
        backward, wants = _backward(graph, template, spec, given, [alone.present[node] for node in saved], upstream, scale, cuda)
    for node, want in zip(saved, wants, strict=True):
        if node not in sinks:
            sinks[node] = want
    found = needs(template.forward, inputs, sinks)
    held = storages(template.forward, found, scale, given={}, outputs=made, saved=dict(zip(saved, wants, strict=True)), cuda=cuda)
    forward = Phase(records(template.forward, found, scale), held, _calls(template.forward))
    return Part(template.spec.name, key, names, forward, backward, _weights(graph, spec.inputs))


def _backward(
    graph: MuxGraph,
    template: Template,
    spec: RegionSpec,
    given: Sequence[Extras | None],
    saved: Sequence[Extras | None],
    upstream: Mapping[str, Extras],
    scale: Scale,
    cuda: bool,
) -> tuple[Phase, list[Clauses]]:
    """The backward's phase, and for every saved tensor who needs it."""
    gm = template.backward
    assert gm is not None
    assert template.spec.backward is not None
    inputs: dict[fx.Node, Extras | None] = {}
    kept: dict[int, fx.Node] = {}
    for node, reference in zip(gm.graph.find_nodes(op="placeholder"), template.spec.backward, strict=True):
        kind, _, text = reference.partition(":")
        inputs[node] = {"input": given, "grad": given, "saved": saved}[kind][int(text)] if kind != "tangent" else None
        if kind == "saved":
            kept[int(text)] = node
    returned = gm.graph.output_node().args[0]
    sinks: dict[fx.Node, Clauses] = {}
    for node, index in zip(returned, template.spec.input_grads, strict=True):
        want = upstream[spec.inputs[index].removeprefix("value:")]
        sinks[node] = either(sinks.get(node, NEVER), (want,))
    found = needs(gm, inputs, sinks)
    sizes = {node: scale.memory(val(node)) for node in kept.values()}
    held = storages(gm, found, scale, given=sizes, outputs=returned, saved={}, cuda=cuda)
    wants = [found.wanted[kept[index]] if index in kept else NEVER for index in range(template.spec.saved)]
    return Phase(records(gm, found, scale), held, _calls(gm)), wants


def _head(graph: MuxGraph, body: Body, head: Head, upstream: Mapping[str, Extras], cuda: bool) -> Phase:
    gm, inputs = head.backward, {}
    places = gm.graph.find_nodes(op="placeholder")
    for position, node in enumerate(places):
        if node.name.startswith("grad_"):
            inputs[node] = _given(graph, body.spec.inputs[int(node.name.removeprefix("grad_"))])
        else:
            inputs[node] = _given(graph, body.spec.inputs[position]) if position < len(body.spec.inputs) else None
    nll, rows = gm.graph.output_node().args[0]
    found: Needs = needs(gm, inputs, {nll: ALWAYS, rows: (upstream.get(head.value, frozenset()),)})
    scale = Scale(1, 0)
    held = storages(gm, found, scale, given={}, outputs=(nll, rows), saved={}, cuda=cuda)
    return Phase(records(gm, found, scale), held, _calls(gm))


def _calls(gm: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in gm.graph.nodes)


def _held(regions: Sequence[Body], head: Head, upstream: Mapping[str, Extras], scale: Scale) -> tuple[Held, ...]:
    """Values live to their last reader, forwards or backwards; gradients from their first reader's backward to their maker's."""
    count, sizes, born, dies = len(regions), {}, {}, {}
    for index, body in enumerate(regions):
        for name, node in zip(body.spec.outputs, body.gm.graph.output_node().args[0], strict=True):
            sizes[name], born[name], dies[name] = scale.memory(val(node)), index, index
    dies[head.value] = count
    grads = {head.value: count} if upstream.get(head.value) else {}
    for index, body in enumerate(regions):
        for name in filter(None, map(value_of, body.spec.inputs)):
            dies[name] = max(dies[name], index, 2 * count - index if any(body.has_grad) else 0)
            if upstream.get(name):
                grads[name] = min(grads.get(name, 2 * count), 2 * count - index)
    found = [Held(name, born[name], dies[name], size) for name, size in sizes.items()]
    return (*found, *(Held(f"d.{name}", first, 2 * count - born[name], sizes[name]) for name, first in grads.items()))


def _tenants(graph: MuxGraph, optimizers: Mapping[str, str]) -> dict[str, Tenant]:
    """Masters, gradients and copies of a task's rows, the optimizer's moments, and tensors of encodings."""
    found = {}
    for task in dict.fromkeys(task for task, _ in (*graph.params, *graph.encodings)):
        moments = 8 if optimizers.get(task, "adamw") == "adamw" else 4
        tables = [table for table in graph.tables.values() if task in table.rows]
        total = 0
        for table in tables:
            size = torch.Size(table.shape[1:]).numel()
            copy = 0 if table.dtype == "float32" else getattr(torch, table.dtype).itemsize
            total += size * (8 + copy if table.trainable else getattr(torch, table.dtype).itemsize)
        own = [encoding for encoding in graph.encodings.values() if encoding.task == task]
        inputs = [given for encoding in own for given in encoding.inputs]
        params = [param for param in graph.params.values() if param.task == task and graph.tables[param.table].trainable]
        # The optimizer keeps moments for a task's own ranks, not for those that its bucket has beyond them.
        total += sum(moments * (param.stop - param.start) * graph.tables[param.table].shape[-1] for param in params)
        total += sum((8 + moments if given.trainable else 4) * torch.Size(given.shape).numel() for given in inputs)
        tensors = len(params) + sum(given.trainable for given in inputs)
        extras = frozenset(table.route for table in tables)
        found[task] = Tenant(extras, total, tensors, sum(table.trainable for table in tables), len(own))
    return found


def _weights(graph: MuxGraph, references: Sequence[str]) -> int:
    """Bytes of the weights among a body's inputs."""
    pairs = (reference.partition(":") for reference in references)
    return _bytes(graph.weights[name] for kind, _, name in pairs if kind == "weight")


def _bytes(tensors: Any) -> int:
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def digest(template: Template, scale: Scale) -> str:
    """A template's name in tables of measurements: its text, with the sizes of the chunk left open."""

    def opened(match: re.Match[str]) -> str:
        number = int(match[0])
        return f"{number // scale.prime}p" if scale.prime and number and number % scale.prime == 0 else match[0]

    texts = []
    for gm in (template.forward, template.backward):
        if gm is not None:
            values = [getattr(node.meta.get("val"), "shape", None) for node in gm.graph.find_nodes(op="placeholder")]
            dtypes = [getattr(node.meta.get("val"), "dtype", None) for node in gm.graph.find_nodes(op="placeholder")]
            texts.append(f"{[tuple(own) if own is not None else None for own in values]} {dtypes}")
            texts += [f"{node.target} {node.args} {dict(node.kwargs)}" for node in gm.graph.nodes if node.op == "call_function"]
    text = re.sub(r"(?<![\w.])\d+(?![\w.])", opened, "\n".join(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
