"""compile(): the straight path from a backbone and tasks to a model that trains."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codegen import emit, lower, tiling
from codegen.kernels import build
from codegen.spec import Body, Head, Template, flops
from muxcompile.model import CompiledModel, TaskEntry
from muxcompile.options import Options
from muxcompile.plan import Plan, Step
from passes import limits
from passes import lower as lowered
from passes.adapters import Adapter, live, resolve
from passes.capture import capture, is_peft_model, unwrap
from passes.differentiate import differentiate, differentiate_head, saved_bytes
from passes.graph import MuxGraph
from passes.partition import handed_on, partition, share, summary
from passes.pipeline import Snapshot, passes, run_passes
from passes.schedule import schedule
from passes.task import as_tasks
from runtime.executor import Compiled, HeadSpec
from runtime.pack import Geometry
from runtime.region import RegionSpec, TemplateSpec
from runtime.simulate import simulate
from runtime.state import State, Training
from runtime.tables import Encoding, Param, Table


def compile(backbone: nn.Module, tasks: Any = None, options: Options | None = None) -> CompiledModel:
    """Compile a frozen backbone and the adapters of many tasks into one model that trains them together.

    Args:
        backbone: a causal language model with its weights loaded, on the device to train on (see `passes.capture`); or a
            `PeftModel`, whose adapters are then the tasks if `tasks` is None. It is read, never written.
        tasks: `{"alice": peft.LoraConfig(...), "bob": "folder/of/an/adapter"}` or a list of `muxcompile.Task`.
        options: how to compile.

    Returns:
        The compiled model: `step`, `evaluate`, `save_pretrained`, `plan` and more.

    Raises:
        ValueError: naming the task and the field, or the module of the backbone and the reason. Nothing was changed then.
    """
    options = options or Options()
    compiler = Compiler(backbone, options)
    adapters = compiler.resolve(tasks)
    compiler.adapters = {adapter.task.name: adapter for adapter in adapters}
    build = compiler.build(adapters, chunk_tokens=options.chunk_tokens, previous={})
    trainings = {adapter.task.name: training(adapter) for adapter in adapters}
    state = State(build.tables, build.params, trainings, compiler.device, build.encodings, build.weights)
    model = CompiledModel(build, state, {a.task.name: compiler.entry(a) for a in adapters}, compiler)
    for adapter in adapters:
        load_weights(state, adapter)
    return model


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation: what runs, over which tables, and its plan."""

    compiled: Compiled
    tables: dict[str, Table]
    params: tuple[Param, ...]
    encodings: tuple[Encoding, ...]
    weights: dict[str, Tensor]
    constants: tuple[str, ...]
    plan: Plan
    vocabulary: int
    positions: int | None


class Lowered(NamedTuple):
    """A template: its spec, its texts by callable, FLOPs and saved bytes of one run."""

    spec: TemplateSpec
    texts: dict[str, str]
    flops: int
    saved: int = 0


@dataclass(slots=True)
class Compiler:
    """A backbone with its options, and the templates compiled so far: a region met again is not compiled again."""

    model: nn.Module
    options: Options
    lowered: dict[str, Lowered] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)

    @property
    def backbone(self) -> nn.Module:
        return unwrap(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def resolve(self, tasks: Any) -> list[Adapter]:
        """The tasks' adapters; those of a PeftModel start from its live weights."""
        if tasks is None and is_peft_model(self.model):
            found = as_tasks(dict(self.model.peft_config))
            return [resolve(task, self.model, live(self.model, task.name)) for task in found]
        if tasks is None:
            raise ValueError("tasks is empty: give at least one task")
        return [resolve(task, self.model) for task in as_tasks(tasks)]

    def resolve_new(self, task: Any, names: Sequence[str]) -> Adapter:
        """Check one more task beside those there are."""
        (found,) = as_tasks(task)
        if found.name.casefold() in {name.casefold() for name in names}:
            raise ValueError(f"task {found.name!r}: name is used already")
        return resolve(found, self.model)

    def longer(self, tokens: int) -> tuple[int | None, bool]:
        """What holds an example that no chunk of today holds: the size of a chunk, and whether sequences are cut."""
        asked = self.options.chunk_tokens
        return (tokens, False) if asked is None else (asked, True)

    def build(
        self, adapters: Sequence[Adapter], *, chunk_tokens: int | None, previous: Mapping[str, Table], carried: bool = False
    ) -> Build:
        """The straight path.

        Args:
            carried: sequences longer than a chunk are cut, whether such are announced or not.
        """
        longest = max(((a.task.max_length or 0) + training(a).virtual_tokens for a in adapters), default=0)
        geometry = tiling.geometry(self.device, chunk_tokens, longest)
        carried = carried or (longest > geometry.tokens and self.longer(longest)[1])
        lowering = lower.choose(self.options.regions, self.device, invariant=self.options.invariant, carried=carried)
        graph = capture(self.model, tokens=geometry.tokens, tile=geometry.tile, max_sequences=geometry.sequences)
        target = lower.Target.of(self.device)
        rows = passes(adapters=adapters, reserve=self.options.reserve_slots, previous=previous, target=target, carried=carried)
        graph, trail = run_passes(graph, rows, skip=self.options.skip_passes)
        bodies, head_body = partition(graph)
        regions, templates, sources, costs, saved = self._lower(bodies, lowering.form)
        head = self._lower_head(head_body, geometry, lowering.form, sources)
        names = tuple(adapter.task.name for adapter in adapters)
        trains = bool(head.trained)
        pieces = handed_on(bodies)
        kept = [name for own in pieces for name in (own.keys, own.values)]
        train, evaluate = (
            schedule(
                regions, templates, head.value, tasks=names, train=train, head_reads=head.inputs, head_trains=trains, kept=kept
            )
            for train in (True, False)
        )
        head_spec = _head_spec(head, head_body)
        launches = lowered.kernels(graph, target, head.forward)
        kernels = {launch.key: launch.source for launch, _ in launches}
        build.compile_all(launches)
        places = {region.name: region for region in regions}
        compiled = Compiled(geometry, templates, places, head_spec, train, evaluate, sources, kernels, pieces)
        by_name = {launch.name: launch.source for launch, _ in launches}
        plan = _plan(graph, trail, bodies, compiled, lowering, costs, saved, names, geometry, target, by_name)
        found = limits.positions(graph, self.backbone)
        return Build(
            compiled,
            graph.tables,
            tuple(graph.params.values()),
            tuple(graph.encodings.values()),
            graph.weights,
            graph.constants(self.backbone),
            plan,
            limits.vocabulary(graph),
            found,
        )

    def _lower(
        self, bodies: Sequence[Body], form: str
    ) -> tuple[list[RegionSpec], dict[str, TemplateSpec], dict[str, str], dict[str, int], int]:
        """Differentiate and emit one template for each kind of body; returns the regions bound to them, in order.

        Behind these the FLOPs of each region, and the bytes that all of them save.
        """
        templates: dict[str, TemplateSpec] = {}
        sources: dict[str, str] = {}
        costs: dict[str, int] = {}
        named: dict[str, str] = {}
        saved, checkpoint = 0, self.options.gradient_checkpointing
        for name, group in share(list(bodies)).items():
            identity = f"{form}\n{group[0].spec.template}"
            if identity not in self.lowered:
                decompositions = emit.decompositions(form)
                template = differentiate(self._fresh_name(name), group[0], decompositions=decompositions, checkpoint=checkpoint)
                self.lowered[identity] = Lowered(template.spec, *_emit(template, form), saved_bytes(template))
            spec, texts, cost, bytes_ = self.lowered[identity]
            # A template met before keeps the name that its text was emitted under.
            templates[spec.name] = spec
            sources.update(texts)
            for body in group:
                named[body.spec.name] = spec.name
                costs[body.spec.name] = cost
                saved += bytes_
        regions = [RegionSpec(body.spec.name, named[body.spec.name], body.spec.inputs, body.spec.outputs) for body in bodies]
        return regions, templates, sources, costs, saved

    def _fresh_name(self, name: str) -> str:
        """A template keeps its name for good: another of a later compilation that begins at the same region is numbered."""
        taken = {spec.name for spec, *_ in self.lowered.values()}
        return next(fresh for fresh in (name, *(f"{name}.{number}" for number in range(2, len(taken) + 3))) if fresh not in taken)

    def _lower_head(self, body: Body, geometry: Geometry, form: str, sources: dict[str, str]) -> Head:
        head = differentiate_head(body, rows=geometry.head_rows, tile=geometry.head_tile, decompositions=emit.decompositions(form))
        identity = f"{form}\nhead {geometry.head_rows}\n{body.spec.template}"
        if identity not in self.lowered:
            texts = {f"head.{phase}": _source(getattr(head, phase), f"head.{phase}", form) for phase in ("forward", "backward")}
            self.lowered[identity] = Lowered(TemplateSpec("head", 1, 0, None, ()), texts, flops(head.backward))
        sources.update(self.lowered[identity].texts)
        return head

    def entry(self, adapter: Adapter) -> TaskEntry:
        """What the model keeps of a task once it is compiled."""
        with tempfile.TemporaryDirectory() as folder:
            adapter.config.save_pretrained(folder)
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = (
            config.get("base_model_name_or_path") or getattr(self.backbone, "name_or_path", None) or None
        )
        return TaskEntry(adapter.task.max_length, config, adapter.kind.layout)


def training(adapter: Adapter) -> Training:
    """A task's numbers, as the runtime knows them."""
    asked: dict[str, Any] = {
        name: max(getattr(site, name, 0) for site in adapter.sites) for name in ("dropout", "virtual_tokens", "position_offset")
    }
    if adapter.task.loraplus_lr_ratio is not None and adapter.kind.loraplus is not None:
        asked["fast"], asked["undecayed"] = adapter.kind.loraplus(adapter.sites)
    numbers: dict[str, Any] = {n: getattr(adapter.task, n) for n in Training.__dataclass_fields__ if hasattr(adapter.task, n)}
    return Training(**numbers, **asked)


def load_weights(state: State, adapter: Adapter) -> None:
    """Start a task from the tensors that its adapter brings."""
    for key, value in adapter.weights.items():
        state.write(adapter.task.name, key, value)


def _source(gm: Any, title: str, form: str) -> str:
    return emit.inductor_source(gm, title) if form == "inductor" else emit.eager_source(gm, title)


def _emit(template: Template, form: str) -> tuple[dict[str, str], int]:
    name = template.spec.name
    texts = {f"{name}.forward": _source(template.forward, f"{name}.forward", form)}
    cost = flops(template.forward)
    if template.backward is not None:
        texts[f"{name}.backward"] = _source(template.backward, f"{name}.backward", form)
        cost += flops(template.backward)
    return texts, cost


def _head_spec(head: Head, body: Body) -> HeadSpec:
    hidden = body.gm.graph.find_nodes(op="placeholder")[0].meta["val"]
    logits = body.gm.graph.output_node().args[0][0].meta["val"]
    return HeadSpec(
        head.inputs, head.value, tuple(hidden.shape), str(hidden.dtype).removeprefix("torch."), logits.shape[-1], head.trained
    )


# Dense matrix rates that predicted seconds are figured with, in FLOP/s: bf16 of an H200 (measured 7.2e14 to 7.9e14 on layers of
# an 8B model), float32 of two CPU cores (measured 1e11). They rank plans; they promise no time.
_RATES = {"cuda": 7.5e14, "cpu": 1e11}


def _plan(
    graph: MuxGraph,
    trail: Sequence[Snapshot],
    bodies: Sequence[Body],
    compiled: Compiled,
    lowering: lower.Lowering,
    costs: Mapping[str, int],
    saved: int,
    names: tuple[str, ...],
    geometry: Geometry,
    target: lower.Target | None,
    kernels: Mapping[str, str],
) -> Plan:
    weights = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in graph.weights.values()}
    adapters = sum(torch.Size(table.shape).numel() for table in graph.tables.values() if table.trainable)
    rate = _RATES.get(next(iter(graph.weights.values())).device.type, _RATES["cpu"])
    # A forward is a third of a frozen region's arithmetic less its missing weight gradient: forward and dgrad are equal.
    timeline = simulate(
        compiled.train,
        seconds=lambda action: costs.get(action.region, 0) / 2 / rate,
        nbytes=_sizes(bodies, compiled),
        resident=sum(weights.values()),
    )
    estimates = {
        "backbone bytes": sum(weights.values()),
        "adapter parameters in tables": adapters,
        "adapter bytes (masters, gradients, AdamW state)": 16 * adapters,
        "chunk tokens": geometry.tokens,
        "FLOPs of a chunk, layers, forward and backward": float(sum(costs.values())),
        "bytes that a chunk's layers save for the backward": saved,
        "predicted seconds of a chunk": timeline.seconds,
        "predicted peak bytes (values between regions and the backbone; saved tensors not counted)": timeline.peak_bytes.get(0, 0),
    }
    choices = {
        "regions": f"{lowering.form}: {lowering.reason}",
        "chunk": f"{geometry.tokens} tokens in blocks of {geometry.tile}; bundles of up to {geometry.bundle_tokens} tokens; "
        f"loss in blocks of {geometry.head_rows} rows",
        "grouping": "all tasks share every chunk",
        "schedule": "one rank, one stream: forwards in order, loss, backwards in reverse",
        **lowered.choices(graph, target),
        "attention": "torch varlen attention on CUDA in bf16/fp16, the plain reference elsewhere",
    }
    if compiled.carried:
        choices["longer sequences"] = (
            f"cut into pieces of {geometry.tokens} tokens, keys and values carried through {len(compiled.carried)} attentions; "
            f"{compiled.chains}"
        )
    # A pass begins with the graph that the one before it left: each is printed once.
    texts = {id(snapshot.before): snapshot.before.text() for snapshot in trail[:1]}
    for snapshot in trail:
        texts[id(snapshot.after)] = snapshot.after.text()
    steps = [Step(s.name, s.seconds, texts[id(s.before)], texts[id(s.after)], s.difference()) for s in trail]
    return Plan(
        steps,
        summary(list(bodies)),
        compiled.train,
        (names,),
        choices,
        estimates,
        graph.notes,
        compiled.sources,
        str(timeline),
        timeline.chrome_trace(),
        dict(kernels),
    )


def _sizes(bodies: Sequence[Body], compiled: Compiled) -> dict[str, int]:
    """Bytes of the values that regions exchange."""
    sizes: dict[str, int] = {}
    for body in bodies:
        for name, node in zip(body.spec.outputs, body.gm.graph.output_node().args[0], strict=True):
            value = node.meta["val"]
            sizes[name] = value.numel() * value.element_size()
    for action in compiled.train:
        for name in action.writes:
            if name.startswith("d."):
                sizes[name] = sizes.get(name[2:].rsplit("@", 1)[0], 0)
    return sizes
