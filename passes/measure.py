"""measure: regions timed on the device in front of us, and predictions held against a whole step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codegen import measure as timing
from codegen import regions
from codegen.lower import Target
from codegen.regions import Measured
from codegen.spec import Body, Template
from passes.adapters import Adapter
from passes.cost import CostModel
from passes.differentiate import differentiate
from passes.graph import val
from passes.loads import Shape
from passes.needs import Extras
from passes.partition import share
from passes.survey import Bodies, Survey, bodies
from runtime.cudagraph import Recorder
from runtime.executor import Compiled, Executor
from runtime.pack import Chunk, Geometry, bounds
from runtime.state import State
from runtime.tables import routes_of


def name_of(device: torch.device) -> str:
    """A device's name in tables of measurements, and of its preset."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(
    model: nn.Module,
    adapters: Sequence[Adapter],
    survey: Survey,
    tokens: Sequence[int],
    *,
    device: torch.device,
    target: Target | None,
    lengths: Sequence[int] = (256,),
    folder: Path = regions.OWN,
) -> Path:
    """Time every template of a survey on the device, and add the figures to its table.

    Blocks are dealt out to the tasks in turn; sequences have these lengths, over and over.

    Args:
        model, adapters, target: those of the survey; the model's tensors may be fake ones.
        tokens: chunk sizes to measure at.
    """
    rows: list[Measured] = []
    for size in tokens:
        built = bodies(model, adapters, size, device=device, target=target)
        done: set[str] = set()
        for checkpoint, parts in survey.parts.items():
            keys = {region: part.key for part in parts for region in part.regions}
            for name, group in share(built.bodies).items():
                key = keys[group[0].spec.name]
                if key not in done:
                    done.add(key)
                    template = differentiate(name, group[0], checkpoint=checkpoint)
                    rows += _phases(built, group[0], template, key, device, lengths)
    return regions.write(name_of(device), rows, folder)


def _phases(
    built: Bodies, body: Body, template: Template, key: str, device: torch.device, lengths: Sequence[int]
) -> list[Measured]:
    inputs = _inputs(built, body, device, lengths)
    bound = {"forward": inputs, "backward": []}
    for reference in template.spec.backward or ():
        kind, _, index = reference.partition(":")
        bound["backward"].append(inputs[int(index)] if kind == "input" else None)
    found = []
    for phase, gm in (("forward", template.forward), ("backward", template.backward)):
        if gm is not None:
            call, given = timing.call_of(gm), timing.inputs_of(gm, device, bound[phase])
            once = timing.sample(call, given, device)
            watts = timing.drawn(call, given, device)
            found.append(Measured(key, phase, built.geometry.tokens, once.seconds, once.host, once.peak, watts))
    return found


def _inputs(built: Bodies, body: Body, device: torch.device, lengths: Sequence[int]) -> list[Tensor | None]:
    """What is not of random numbers: borders of sequences, and routes in which every block is one task's."""
    routes, blocks = routes_of(built.graph.tables), built.graph.blocks
    tasks = list(dict.fromkeys(task for rows in routes.values() for task in rows if task))
    borders, limits = _borders(lengths, built.geometry)
    found: list[Tensor | None] = []
    for node, reference in zip(body.gm.graph.find_nodes(op="placeholder"), body.spec.inputs, strict=True):
        kind, _, name = reference.partition(":")
        own: Tensor | None = None
        if kind == "route":
            slots = {task: slot for slot, task in enumerate(routes[name])}
            own = torch.tensor(
                [slots.get(tasks[block % len(tasks)], -1) for block in range(blocks)], dtype=torch.int32, device=device
            )
        elif reference == "chunk:cu_seqlens":
            own = torch.tensor(borders, dtype=torch.int32, device=device)
        elif reference == "chunk:bounds":
            own = torch.tensor(limits, dtype=val(node).dtype)
        found.append(own)
    return found


def _borders(lengths: Sequence[int], geometry: Geometry) -> tuple[list[int], tuple[int, int]]:
    """A chunk's borders of sequences of these lengths, in turn, and their bounds; the last one has what the entries leave over."""
    borders = [0]
    for place in range(geometry.sequences - 1):
        if borders[-1] < geometry.tokens:
            borders.append(min(geometry.tokens, borders[-1] + lengths[place % len(lengths)]))
    if borders[-1] < geometry.tokens:
        borders.append(geometry.tokens)
    return borders + [geometry.tokens] * (geometry.sequences + 1 - len(borders)), bounds(borders, geometry)


@dataclass(frozen=True, slots=True)
class Line:
    """Predicted beside measured: seconds of one region's phase in all chunks, or of the step, or bytes."""

    name: str
    predicted: float
    measured: float
    source: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """A step as it was predicted and as it was."""

    device: str
    lines: tuple[Line, ...]
    step: Line
    peak: Line | None

    def __str__(self) -> str:
        lines = [f"predicted and measured on {self.device}", f"{'':40} {'predicted':>12} {'measured':>12} {'error':>8}"]
        lines += [f"{own.name:40} {_ms(own)}  {own.source}" for own in (*self.lines, self.step)]
        if self.peak is not None:
            predicted, measured = self.peak.predicted / 1e9, self.peak.measured / 1e9
            lines.append(f"{self.peak.name:40} {predicted:9.3f} GB {measured:9.3f} GB {self.peak.error:+8.1%}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        named = {"step": self.step, "peak": self.peak}
        own = {name: {**asdict(line), "error": line.error} for name, line in named.items() if line is not None}
        return {"device": self.device, "regions": [{**asdict(line), "error": line.error} for line in self.lines], **own}


def _ms(line: Line) -> str:
    return f"{line.predicted * 1e3:9.3f} ms {line.measured * 1e3:9.3f} ms {line.error:+8.1%}"


def check(
    model: CostModel,
    compiled: Compiled,
    weights: Mapping[str, Tensor],
    state: State,
    callables: Mapping[str, Callable[[list[Any]], Any]],
    chunks: Sequence[Chunk],
    tasks: Sequence[str],
    *,
    checkpoint: bool = False,
    after: Callable[[], None] | None = None,
    rounds: int = 5,
    recorders: Sequence[Recorder] = (),
) -> Check:
    """Run a step and hold every region's seconds, the step's and the peak against the model's.

    Gradients accumulate in the state: clear them behind it. Regions are timed in steps of their own, where each waits for the one
    before it; the step's seconds are those of undisturbed ones.

    Args:
        model: of a survey that has these tasks.
        compiled, weights, state, callables: as `runtime.executor.Executor` takes them.
        chunks: of one step of `tasks`.
        checkpoint: how the program was compiled.
        after: the optimizer's step, if it is to be timed as well.
        recorders: the executor's of the model, if it has any: the undisturbed steps are launched as it launches them.
    """
    device = state.device
    # A chunk runs what was compiled for all tasks of the program, whoever is in it.
    extras = model.survey.extras(compiled.train.actions[0].tasks)
    shape = Shape(compiled.geometry.tokens, checkpoint)
    spans: dict[str, list[float]] = {}
    timed = {name: _timed(call, spans.setdefault(name, []), device) for name, call in callables.items()}
    Executor(compiled, weights, state, timed).run(chunks, tasks, train=True)  # the first run compiles and tunes
    for own in spans.values():
        own.clear()
    Executor(compiled, weights, state, timed).run(chunks, tasks, train=True)
    seconds, peak = _step(Executor(compiled, weights, state, callables, recorders), chunks, tasks, device, after, rounds)
    padding = shape.tokens * (1.0 - sum(chunk.full for chunk in chunks) / len(chunks))
    lines = _lines(model, compiled, spans, shape, extras, padding)
    total = sum(model.seconds(extras, shape, full=chunk.full)[0] for chunk in chunks)
    total += model.step(tasks) if after is not None else 0.0
    # All but the last piece of a cut sequence run their forwards twice.
    first = next(iter(compiled.regions.values())).template
    forwards = len(spans[f"{first}.forward"]) / sum(region.template == first for region in compiled.regions.values())
    total += (forwards - len(chunks)) * model.forward(extras, shape).cost
    held = None
    if peak is not None:
        held = Line(
            "peak", model.bytes(extras, shape) + model.resident(list(state.tasks)) + _carried(model, compiled, chunks, shape), peak
        )
    return Check(name_of(device), lines, Line(f"step of {len(chunks)} chunks", total, seconds), held)


def _carried(model: CostModel, compiled: Compiled, chunks: Sequence[Chunk], shape: Shape) -> int:
    """Bytes that the longest cut sequence holds beside its chunks: keys and values, and forwards that are kept."""
    longest = max((chunk.piece.total for chunk in chunks if chunk.piece is not None), default=shape.tokens)
    pieces = -(-longest // shape.tokens)
    kept = model.forward(model.survey.extras(compiled.train.actions[0].tasks), shape).bytes if pieces <= compiled.kept else 0
    return (longest - shape.tokens) * model.survey.carried_row + (pieces - 1) * kept


def _timed(call: Callable[[list[Any]], Any], into: list[float], device: torch.device) -> Callable[[list[Any]], Any]:
    def run(args: list[Any]) -> Any:
        _wait(device)
        start = time.perf_counter()
        found = call(args)
        _wait(device)
        into.append(time.perf_counter() - start)
        return found

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(
    executor: Executor,
    chunks: Sequence[Chunk],
    tasks: Sequence[str],
    device: torch.device,
    after: Callable[[], None] | None,
    rounds: int,
) -> tuple[float, int | None]:
    """Median seconds of a step, and its peak bytes."""
    taken = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Of a recorder's executor the first run calls what the second one records.
    for _ in range(rounds + 2 if executor.recorders else rounds):
        _wait(device)
        start = time.perf_counter()
        executor.run(chunks, tasks, train=True)
        if after is not None:
            after()
        _wait(device)
        taken.append(time.perf_counter() - start)
    taken = taken[-rounds:]
    return sorted(taken)[len(taken) // 2], torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _lines(
    model: CostModel, compiled: Compiled, spans: Mapping[str, Sequence[float]], shape: Shape, extras: Extras, padding: float
) -> tuple[Line, ...]:
    """A line for each template's phase, over all its regions, and one for the loss; `padding`: rows of it in a chunk."""
    place = {region: i for i, part in enumerate(model.survey.parts[shape.checkpoint]) for region in part.regions}
    found = []
    for name in compiled.templates:
        regions_ = [region.name for region in compiled.regions.values() if region.template == name]
        for phase in ("forward", "backward"):
            measured = spans.get(f"{name}.{phase}")
            if measured:
                costs = [model.phase(place[region], phase, extras, shape) for region in regions_]
                predicted = sum(own.seconds - padding * own.spared for own in costs)
                source = model.source(place[regions_[0]], phase, shape.checkpoint)
                runs = len(measured) / len(regions_)
                found.append(Line(f"{name}.{phase} x {len(regions_)}", predicted * runs, sum(measured), source))
    blocks = spans.get("head.backward") or ()
    head = model.head(extras).seconds * len(blocks)
    return (*found, Line(f"head x {len(blocks)}", head, sum(blocks), "by the roofline"))
