"""compile(): the straight path from a backbone and tasks to a model that trains."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from codegen import lower, tiling
from codegen.kernels import build
from codegen.lower import Target
from codegen.spec import Body, Head
from codegen.steady import steady
from muxcompile import planner
from muxcompile.entry import TaskEntry
from muxcompile.explain import Explained, explain
from muxcompile.forecast import records
from muxcompile.heap import uncollected
from muxcompile.model import CompiledModel
from muxcompile.numbers import check_positions, training
from muxcompile.options import Options
from muxcompile.plan import Plan
from muxcompile.planner import Group, Planned
from muxcompile.stages import own_part, received, stages, summed
from muxcompile.templates import Templates, head_spec
from muxcompile.weights import Given, Source, Unloaded, Weights
from passes import limits, split
from passes import lower as lowered
from passes.adapters import Adapter, live, part_of, resolve
from passes.bare import bare, nbytes
from passes.capture import capture, check_loaded, is_peft_model, unwrap
from passes.graph import MuxGraph, lazily
from passes.partition import handed_on, partition
from passes.pipeline import Snapshot, passes, run_passes
from passes.schedule import schedule
from passes.split import Split
from passes.survey import Survey
from passes.task import Task, as_tasks
from runtime.comm import Mesh, Ranks
from runtime.executor import Compiled
from runtime.order import Stage
from runtime.pack import Geometry
from runtime.pipeline import flight
from runtime.state import State
from runtime.tables import Encoding, Param, Table
from runtime.unmixed import unmixed

T = TypeVar("T")


@uncollected()
@unmixed()
@torch.enable_grad()  # backwards are traced
def compile(backbone: nn.Module | Unloaded, tasks: Any = None, options: Options | None = None) -> CompiledModel:
    """Compile a frozen backbone and the adapters of many tasks into one model that trains them together.

    Args:
        backbone: a causal language model with its weights loaded, on the device to train on (see `passes.capture`); or a
            `PeftModel`, whose adapters are then the tasks if `tasks` is None; or what `muxcompile.stored.open_parts(...)` returns
            of a model's folder, of which this process reads what it computes with. It is read, never written. Of a model that is no
            `PeftModel` a rank of several stages or shards keeps its part alone.
        tasks: `{"alice": peft.LoraConfig(...), "bob": "folder/of/an/adapter"}` or a list of `muxcompile.Task`.
        options: how to compile.

    Returns:
        The compiled model: `step`, `evaluate`, `save_pretrained`, `plan` and more.

    Raises:
        ValueError: naming the task and the field, or the module of the backbone and the reason. Nothing was changed then.
    """
    if not isinstance(backbone, nn.Module | Unloaded):
        known = "a model with its weights, a PeftModel, or what muxcompile.stored.open_parts(...) returns"
        raise ValueError(f"backbone: must be {known}, got {type(backbone).__name__}")
    if not isinstance(options, Options | None):
        raise ValueError(f"options: must be muxcompile.Options(...) or None, got {type(options).__name__}")
    options = options or Options()
    compiler = Compiler.of(backbone, options)
    adapters = compiler.by_all(lambda: compiler.resolve(tasks))
    compiler.adapters = {adapter.task.name: replace(adapter, weights={}) for adapter in adapters}
    planned = compiler.by_all(lambda: planner.plan(compiler.model, compiler.device, adapters, options, there=compiler.there))
    compiler.planned = compiler.agreed(planned)
    if compiler.planned.forecast is not None:
        compiler.rounds = compiler.planned.forecast.turns.rounds
        compiler.cap, compiler.survey = compiler.planned.forecast.cap, compiler.planned.forecast.model.survey
    build = compiler.build(adapters, compiler.planned, previous={})
    trainings = {adapter.task.name: training(adapter) for adapter in adapters}
    state = State(build.tables, build.params, trainings, compiler.device, build.encodings, build.weights, compiler.ranks)
    model = CompiledModel(build, state, {a.task.name: compiler.entry(a) for a in adapters}, compiler)
    for adapter in adapters:
        load_weights(state, adapter)
    return model


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation: what runs on this rank, group by group, over which tables, and the plan of all."""

    groups: tuple[Compiled, ...]
    tables: dict[str, Table]
    params: tuple[Param, ...]
    encodings: tuple[Encoding, ...]
    weights: dict[str, Tensor]
    constants: tuple[str, ...]
    plan: Plan
    vocabulary: int
    positions: int | None
    flight: tuple[int, ...] = ()


class Attached(NamedTuple):
    """A backbone captured for one chunk size with some tasks' adapters in it, and what the passes did."""

    geometry: Geometry
    graph: MuxGraph
    trail: list[Snapshot]


@dataclass(slots=True)
class Compiler:
    """A backbone with its options, what it was compiled for last, and what was captured and compiled so far.

    `cap` and `survey` are of the forecast by which tasks are admitted, `rounds` are its turns; None: none was made. `ranks`: those
    of `Options.mesh`, if there are others; `ends`: where the stages end among the regions; `layout`: the tables of all stages.
    `model` is what is captured: the backbone, or this rank's part of it by `split`. `weights`: what this rank holds of a backbone
    that has no memory itself; `whole` is then what tasks are resolved against, `adapted` the part that their adapters see
    (`Split.adapted`), and `there` the bytes that stay on the device anyway (None: all).
    """

    model: nn.Module
    options: Options
    planned: Planned = field(default_factory=lambda: Planned([]))
    templates: Templates = field(default_factory=Templates)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    cap: int | None = None
    survey: Survey | None = None
    rounds: tuple[tuple[str, ...], ...] | None = None
    captures: dict[Geometry, MuxGraph] = field(default_factory=dict)
    layout: dict[str, Table] = field(default_factory=dict)
    ranks: Ranks | None = None
    ends: tuple[int, ...] = ()
    split: Split | None = None
    weights: Weights | None = None
    whole: nn.Module | None = None
    adapted: nn.Module | None = None
    there: int | None = None

    @classmethod
    def of(cls, backbone: nn.Module | Unloaded, options: Options) -> Compiler:
        """A compiler of the backbone, or of the part that this rank of `Options.mesh` has.

        Raises:
            ValueError: the processes are not those of the mesh; the backbone cannot be split so.
        """
        compiler = cls(backbone.model if isinstance(backbone, Unloaded) else backbone, options)
        mesh = Mesh() if options.mesh is None else Mesh.of(options.mesh)
        if options.mesh is not None and mesh.size > 1:
            # Refused, if it is, before anything is asked of other ranks.
            if mesh.tp > 1:
                split.plan(compiler.model, mesh.tp)
            compiler.ranks = Ranks(options.mesh, compiler.device, options.timeout)
        if isinstance(backbone, Unloaded):
            compiler._hold(backbone.model, backbone.source, mesh, 0)
        elif mesh.pp * mesh.tp > 1 and not is_peft_model(backbone):
            check_loaded(backbone)
            # A stage shares the tensors of the model that was given, a shard has copies.
            there = nbytes(backbone) // mesh.pp if mesh.tp == 1 else 0
            compiler._hold(bare(backbone, compiler.device), Given(backbone), mesh, there)
        return compiler

    def _hold(self, whole: nn.Module, source: Source, mesh: Mesh, there: int) -> None:
        """Compile a model without memory, of which this rank holds what it computes with."""
        self.model = self.whole = whole
        self.there = there
        if mesh.tp > 1 and self.ranks is not None:
            how = self.split = Split.of(whole, index=self.ranks.shard, count=mesh.tp)
            self.model, self.adapted = split.split(whole, how), split.split(whole, how.adapted)
            self.templates.vocabulary = how.shard(how.head, "weight") if how.head else None
        self.weights = Weights(whole, source, self.split)

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
        return [self._resolve(task) for task in as_tasks(tasks)]

    def _resolve(self, task: Task) -> Adapter:
        """A task's adapter, as this rank has it."""
        if self.whole is None or self.weights is None:
            return resolve(task, self.model)
        found = resolve(task, self.whole, values=self.weights.whole)
        return found if self.split is None or self.adapted is None else part_of(found, self.adapted, self.split.adapted)

    def resolve_new(self, task: Any, names: Sequence[str]) -> Adapter:
        """Check one more task beside those there are."""
        (found,) = as_tasks(task)
        if found.name.casefold() in {name.casefold() for name in names}:
            raise ValueError(f"task {found.name!r}: name is used already")
        return self.by_all(lambda: self._resolve(found))

    def by_all(self, work: Callable[[], T]) -> T:
        """What this rank's work comes to, which may depend on its files, its memory, its measurements: what one refuses, all do."""
        return work() if self.ranks is None else self.ranks.by_all(work)

    def agreed(self, planned: Planned) -> Planned:
        """The first rank's plan: other ranks' free memory or measurements may differ.

        Raises:
            ValueError: a sequence would be cut, which no mesh runs.
        """
        if self.ranks is None:
            return planned
        groups, flight = self.ranks.objects((planned.groups, planned.flight))[0]
        planned = replace(planned, groups=groups, flight=flight)
        if cut := next((group for group in planned.groups if group.carried), None):
            raise ValueError(
                f"Options: chunk_tokens={cut.tokens} would cut sequences of tasks {', '.join(cut.tasks)}, which mesh "
                f"{self.ranks.mesh} cannot: choose larger chunks or a shorter Task.max_length"
            )
        return planned

    def admit(self, adapters: Sequence[Adapter]) -> None:
        """Refuse the last of these tasks where memory has a limit and it would not fit beside the others (`planner.admit`)."""
        if self.cap is not None and self.survey is not None:
            groups, cap, survey = self.planned.groups, self.cap, self.survey
            self.survey = self.by_all(lambda: planner.admit(self.model, self.device, adapters, groups, self.options, cap, survey))

    @lazily()
    def build(self, adapters: Sequence[Adapter], planned: Planned, *, previous: Mapping[str, Table]) -> Build:
        """The straight path, once for each group; all groups read one layout of tables.

        Args:
            adapters: of all tasks.
            planned: who shares chunks of which size; every task is in one group.
            previous: the tables that there are, whose sizes and slots stay where they can.
        """
        target, groups = Target.of(self.device), planned.groups
        whole = self._attach(adapters, groups[0], previous, target)
        positions = limits.positions(whole.graph, self.backbone)
        check_positions(adapters, positions)
        found = []
        for group in groups:
            own = [adapter for adapter in adapters if adapter.task.name in group.tasks]
            attached = whole if len(groups) == 1 else self._attach(own, group, whole.graph.tables, target)
            _check_layout(whole.graph, attached.graph)
            found.append(self._compile(attached, group, target, planned))
            whole.graph.weights.update(attached.graph.weights)
        build.compile_all([launch for own in found for launch in own.launches])
        self.layout = dict(whole.graph.tables)
        graph, part = whole.graph, own_part([one.compiled for one in found], whole.graph, self.ranks)
        return Build(
            tuple(one.compiled for one in found),
            part.tables,
            part.params,
            part.encodings,
            part.weights if self.weights is None else self.weights.hold(part.weights),
            graph.constants(self.backbone),
            explain(found, graph, planned),
            limits.vocabulary(next(iter(self.captures.values())), self.split),
            positions,
            planned.flight or flight(Mesh() if self.ranks is None else self.ranks.mesh),
        )

    def turns(self, tasks: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Who of these steps in each round of a period: as was planned at first, and a newcomer in every round."""
        planned = {name for names in self.rounds or () for name in names}
        found = [tuple(name for name in tasks if name in names or name not in planned) for names in self.rounds or ()]
        return tuple(names for names in found if names) or (tasks,)

    def warn_of_turns(self, newcomer: str) -> None:
        """Its share was not asked for, or would be another plan for all."""
        if self.options.fairness != "equal" and self.rounds is not None and newcomer not in {n for own in self.rounds for n in own}:
            warnings.warn(
                f"task {newcomer!r}: Options: fairness={self.options.fairness!r} was planned without it: it steps in every round, "
                "the others as before",
                stacklevel=5,
            )

    def cuts(self, task: str) -> bool:
        """Whether an example longer than the task's chunks is cut, or its chunks grow."""
        return next(group.fixed for group in self.planned.groups if task in group.tasks)

    def forget(self, name: str) -> None:
        """A task is gone, its slots are free."""
        self.adapters.pop(name, None)
        for key, table in self.layout.items():
            if name in table.rows:
                self.layout[key] = table.with_row(table.rows.index(name), "")

    @uncollected()
    @unmixed()
    @torch.enable_grad()
    def rebuild(
        self, adapters: Sequence[Adapter], previous: Mapping[str, Table], *, longest: Mapping[str, int], sizes: Mapping[str, int]
    ) -> Build:
        """Compile again, for other tasks, longer examples or other chunk sizes (`planner.extend`)."""
        planned = self.agreed(
            Planned(
                planner.extend(self.device, self.planned.groups, adapters, longest=longest, sizes=sizes), flight=self.planned.flight
            )
        )
        build = self.build(adapters, planned, previous=previous)
        self.planned = planned
        return build

    def _captured(self, geometry: Geometry) -> MuxGraph:
        """The backbone for chunks of one size: captured once, whichever tasks come and go."""
        if geometry not in self.captures:
            size = {"tokens": geometry.tokens, "tile": geometry.tile, "max_sequences": geometry.sequences}
            self.captures[geometry] = capture(self.model, **size)
        graph = self.captures[geometry]
        return replace(graph, weights=dict(graph.weights))

    def _attach(self, adapters: Sequence[Adapter], group: Group, previous: Mapping[str, Table], target: Target | None) -> Attached:
        """Run the passes on the backbone, for the group's chunks."""
        geometry = tiling.geometry(self.device, group.tokens)
        graph = self._captured(geometry)
        rows = passes(
            adapters=adapters, reserve=self.options.reserve_slots, previous=previous, target=target, carried=group.carried,
            split=self.split,
        )  # fmt: skip
        return Attached(geometry, *run_passes(graph, rows, skip=self.options.skip_passes))

    def _compile(self, attached: Attached, group: Group, target: Target | None, planned: Planned | None = None) -> Explained:
        """Regions, templates, programs and kernels of one group; of this rank's stage, if there are several."""
        geometry, graph, _ = attached
        lowering = lower.choose(self.options.regions, self.device, invariant=self.options.invariant, carried=group.carried)
        bodies, head_body = partition(graph)
        regions = self.templates.lower(bodies, lowering.form, checkpoint=group.checkpoint)
        head, texts = self.templates.lower_head(head_body, geometry, lowering.form)
        trains, pieces = bool(head.trained), handed_on(bodies)
        rank = 0
        costs: tuple[Stage, ...] = ()
        if self.ranks is not None:
            rank = self.ranks.stage
            loss = -(-geometry.tokens // geometry.head_rows) * self.templates.head_flops(head_body, geometry, lowering.form)
            found = stages(regions, group, planned, count=self.ranks.mesh.pp, loss=loss, ends=self.ends)
            # The first rank's: all must find one order of micro-batches, and others may have measured otherwise.
            self.ends, costs = self.ranks.objects(found)[0]
        programs = [
            schedule(
                regions.regions,
                regions.templates,
                head.value,
                tasks=group.tasks,
                train=train,
                head_reads=head.inputs,
                head_trains=trains,
                kept=[name for own in pieces for name in (own.keys, own.values)],
                ends=self.ends,
            )
            for train in (True, False)
        ]
        train, evaluate = (program.of(rank) for program in programs)
        own = [region for region in regions.regions if any(action.region == region.name for action in train)]
        used = {region.template for region in own}
        launches = [*lowered.kernels(graph, target, head.forward), *regions.launches]
        shared = not self.options.invariant or self._steady(head, head_body, graph, geometry)
        parts = 1 if self.templates.vocabulary is None else self.templates.vocabulary.count
        compiled = Compiled(
            group.tasks,
            geometry,
            {name: spec for name, spec in regions.templates.items() if name in used},
            {region.name: region for region in own},
            head_spec(head, head_body, parts, shared=shared),
            train,
            evaluate,
            {**{name: text for name, text in regions.sources.items() if name.rpartition(".")[0] in used}, **texts},
            {launch.key: launch.source for launch, _ in launches},
            pieces,
            kept=group.kept if pieces else 0,
            recorded=records(self.options, self.backbone, self.device),
            stages=costs,
            received=received(train, bodies),
            sums=summed(graph, geometry.head_rows) if self.split is not None else 0,
        )
        return Explained(group, graph, attached.trail, bodies, regions, compiled, programs[0], lowering, target, launches)

    def _steady(self, head: Head, body: Body, graph: MuxGraph, geometry: Geometry) -> bool:
        """Whether tasks keep their bits in blocks of the loss that they share; all ranks find the same."""
        dtype = body.gm.graph.find_nodes(op="placeholder")[0].meta["val"].dtype
        weights = [graph.weights[own.removeprefix("weight:")] for own in head.inputs if own.startswith("weight:")]
        rows, tile = geometry.head_rows, geometry.head_tile
        found = all(steady(rows, tile, own, dtype, self.device) for own in weights if own.dim() == 2)
        return found if self.ranks is None else all(self.ranks.objects(found))

    def entry(self, adapter: Adapter) -> TaskEntry:
        """What the model keeps of a task once it is compiled."""
        with tempfile.TemporaryDirectory() as folder:
            adapter.config.save_pretrained(folder)
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = (
            config.get("base_model_name_or_path") or getattr(self.backbone, "name_or_path", None) or None
        )
        return TaskEntry(adapter.task.max_length, config, adapter.kind.layout)


def load_weights(state: State, adapter: Adapter) -> None:
    """Start a task from the tensors that its adapter brings."""
    for key, value in adapter.weights.items():
        if state.ranks is None or state.holds(adapter.task.name, key):
            state.write(adapter.task.name, key, value)


def _check_layout(whole: MuxGraph, part: MuxGraph) -> None:
    """A group's regions read the tables of all: by the same names, in the same slots."""
    for name, table in part.tables.items():
        known = whole.tables.get(name)
        assert known is not None, f"{name}: a group's table that the whole does not have"
        assert (table.shape, table.rows, table.route) == (known.shape, known.rows, known.route), f"{name}: {table} is not {known}"
