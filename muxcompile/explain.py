"""explain: what a compilation decided, with figures -> the Plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from codegen.attention import attention_form
from codegen.kernels.build import Call
from codegen.lower import Lowering, Target
from codegen.spec import Body
from muxcompile.forecast import Forecast
from muxcompile.plan import Plan, Step
from muxcompile.planner import Group, Planned
from muxcompile.templates import Regions
from passes import admit, lower
from passes.bare import distinct
from passes.graph import MuxGraph, val
from passes.loads import Shape
from passes.partition import summary
from passes.pipeline import Snapshot
from runtime.executor import Compiled
from runtime.program import Action, Kind, Program
from runtime.simulate import Span, Timeline, simulate
from runtime.trace import chrome

# Dense matrix rates that predicted seconds are figured with, in FLOP/s: bf16 of an H200 (measured 7.2e14 to 7.9e14 on layers of
# an 8B model), float32 of two CPU cores (measured 1e11). They rank plans; they promise no time.
_RATES = {"cuda": 7.5e14, "cpu": 1e11}

_ATTENTIONS = (torch.ops.mux.attention.default, torch.ops.mux.prefixed_attention.default)
_LAUNCHES = (
    "CUDA graphs of a chunk's regions, recorded once for each bound of its sequence lengths, and of tasks' optimizer steps; called "
    "one by one: the loss, pieces of cut sequences, first runs, and the optimizer steps of tasks with encoders"
)


class Explained(NamedTuple):
    """One group's compilation, with what a reader of the plan is told about it."""

    group: Group
    graph: MuxGraph
    trail: list[Snapshot]
    bodies: Sequence[Body]
    regions: Regions
    compiled: Compiled
    program: Program
    lowering: Lowering
    target: Target | None
    launches: Sequence[Call]


def explain(groups: Sequence[Explained], whole: MuxGraph, planned: Planned) -> Plan:
    """The plan of a compilation; what differs between groups is said for each.

    Args:
        whole: the graph with all tasks' adapters.
        planned: the decisions, with the figures they rest on.
    """
    adapters = sum(torch.Size(table.shape).numel() for table in whole.tables.values() if table.trainable)
    backbone = distinct(whole.weights.values())
    estimates: dict[str, float] = {
        "backbone bytes": backbone,
        "adapter parameters in tables": adapters,
        "adapter bytes (masters, gradients, AdamW state)": 16 * adapters,
    }
    estimates |= _forecast(planned)
    choices: dict[str, str] = _grouping(planned)
    steps: list[Step] = []
    regions, notes = "", dict.fromkeys(whole.notes)
    sources: dict[str, str] = {}
    kernels: dict[str, str] = {}
    program: list[Any] = []
    timelines = []
    for number, own in enumerate(groups):
        # One group alone needs no number: most plans have one.
        label = f"group {number}: " if len(groups) > 1 else ""
        suffix = f".group{number}" if number else ""
        timeline = _timeline(own, backbone, planned.forecast)
        timelines.append(timeline)
        estimates |= {f"{label}{name}": value for name, value in _estimates(own, timeline, planned).items()}
        choices |= {f"{label}{name}": choice for name, choice in _choices(own).items()}
        steps += [replace(step, name=step.name + suffix) for step in _steps(own.trail)]
        regions += (f"{label}{', '.join(own.group.tasks)}\n" if label else "") + summary(list(own.bodies))
        sources |= {
            (name + suffix if sources.get(name, text) != text else name): text for name, text in own.compiled.sources.items()
        }
        kernels |= {launch.name: launch.source for launch, _ in own.launches}
        notes |= dict.fromkeys(own.graph.notes)
        program += [replace(action, micro=number) for action in own.program]
    return Plan(
        steps,
        regions,
        Program(tuple(program)),
        tuple(own.group.tasks for own in groups),
        choices,
        estimates,
        tuple(notes),
        sources,
        "\n".join(str(timeline) for timeline in timelines),
        _traces(timelines),
        kernels,
    )


def _forecast(planned: Planned) -> dict[str, float]:
    """Predictions for a round of all tasks."""
    if planned.forecast is None or planned.grouping is None:
        return {}
    unit = "joules" if planned.forecast.model.objective == "energy" else "seconds"
    found = {"predicted peak bytes": float(planned.grouping.bytes)}
    if planned.forecast.cap is not None:
        found["memory cap, bytes"] = float(planned.forecast.cap)
    if unit == "joules":
        return found | {"predicted joules of a round without optimizer steps": planned.grouping.cost}
    return found | {
        "predicted seconds of a round": planned.forecast.seconds(planned.grouping),
        "of these optimizer steps": planned.forecast.seconds(planned.grouping) - planned.grouping.cost,
    }


def _grouping(planned: Planned) -> dict[str, str]:
    if planned.forecast is None or planned.grouping is None:
        return {}
    rounds = planned.forecast.turns.rounds
    found = {"grouping": "; ".join(planned.grouping.reasons)} if planned.grouping.reasons else {}
    if planned.forecast.cap is not None:
        found["room for more tasks"] = _room(planned.forecast, planned.forecast.cap)
    if len(rounds) > 1:
        found["turns"] = f"{len(rounds)} rounds: " + " | ".join(" ".join(tasks) or "nobody" for tasks in rounds)
    return found


def _room(found: Forecast, cap: int) -> str:
    """How many more tasks like each there is memory for, if they are all like that one."""
    base = found.model.resident([])
    # Beside its likes a task needs its own bytes alone: equal ones are asked for once.
    by_bytes = {load.resident: load for load in found.loads if load.resident}
    room = {nbytes: admit.room(load, found.loads, found.model, cap, base) for nbytes, load in by_bytes.items()}
    return ", ".join(f"{load.task}: {room[load.resident] if load.resident else 'any number'}" for load in found.loads)


def _timeline(own: Explained, resident: int, forecast: Forecast | None) -> Timeline:
    rate = _RATES.get(next(iter(own.graph.weights.values())).device.type, _RATES["cpu"])

    def roughly(action: Action) -> float:
        # Forward and backward have the same products: the frozen weights have no gradient.
        return own.regions.costs.get(action.region, 0) / 2 / rate

    seconds = roughly if forecast is None else _by_the_model(own, forecast)
    return simulate(own.program, seconds=seconds, nbytes=_sizes(own.bodies, own.program), resident=resident)


def _by_the_model(own: Explained, forecast: Forecast) -> Callable[[Action], float]:
    model = forecast.model
    extras, shape = model.survey.extras(own.group.tasks), Shape(own.group.tokens, own.group.checkpoint)
    place = {region: index for index, part in enumerate(model.survey.parts[shape.checkpoint]) for region in part.regions}

    def seconds(action: Action) -> float:
        if action.kind is Kind.LOSS:
            return model.head(extras).seconds * model.blocks(shape.tokens)
        if action.kind in (Kind.F, Kind.B):
            return model.phase(place[action.region], "forward" if action.kind is Kind.F else "backward", extras, shape).seconds
        return 0.0

    return seconds


def _estimates(own: Explained, timeline: Timeline, planned: Planned) -> dict[str, float]:
    found = {
        "chunk tokens": own.compiled.geometry.tokens,
        "FLOPs of a chunk, layers, forward and backward": float(sum(own.regions.costs.values())),
        "bytes that a chunk's layers save for the backward": own.regions.saved,
        "predicted seconds of a chunk": timeline.seconds,
    }
    if planned.forecast is None:
        return found | {"bytes of the backbone and of values between regions, at the most": timeline.peak_bytes.get(0, 0)}
    return found


def _choices(own: Explained) -> dict[str, str]:
    geometry, carried, most = own.compiled.geometry, own.compiled.carried, own.compiled.kept
    again = "all but the last piece run their forward again for the backward"
    kept = f"forwards of up to {most} pieces are kept for their backwards, otherwise {again}" if most else again
    cut = {
        "longer sequences": f"cut into pieces of {geometry.tokens} tokens, keys and values carried through {len(carried)} "
        f"attentions; {kept}"
    }
    return {
        "regions": f"{own.lowering.form}: {own.lowering.reason}",
        "chunk": f"{geometry.tokens} tokens in blocks of {geometry.tile}; bundles of up to {geometry.bundle_tokens} tokens; "
        f"loss in blocks of {geometry.head_rows} rows",
        "tasks": "; ".join(own.group.reasons),
        "schedule": _schedule(own.program),
        **lower.choices(own.graph, own.target),
        "attention": _attention(own.graph),
        **(cut if carried else {}),
        **({"launches": _LAUNCHES if own.compiled.recorded else "called one by one"} if own.target is not None else {}),
    }


def _schedule(program: Program) -> str:
    forwards: dict[int, list[str]] = {}
    for action in program:
        if action.kind is Kind.F:
            forwards.setdefault(action.rank, []).append(action.region)
    if len(forwards) == 1:
        return "one rank, one stream: forwards in order, loss, backwards in reverse"
    parts = ", ".join(f"{rank}: {own[0]} to {own[-1]}" for rank, own in forwards.items())
    return f"{len(forwards)} stages ({parts}); micro-batches as `runtime/order.py` plays them, optimizer steps beside them"


def _attention(graph: MuxGraph) -> str:
    found = (val(node.args[0]) for node in graph.gm.graph.nodes if node.target in _ATTENTIONS)
    return "; ".join(sorted({attention_form(own.device, own.dtype).text for own in found}))


def _steps(trail: Sequence[Snapshot]) -> list[Step]:
    # A pass begins with the graph that the one before it left: each is printed once.
    texts = {id(snapshot.before): snapshot.before.text() for snapshot in trail[:1]}
    for snapshot in trail:
        texts[id(snapshot.after)] = snapshot.after.text()
    return [Step(s.name, s.seconds, texts[id(s.before)], texts[id(s.after)], s.difference()) for s in trail]


def _traces(timelines: Sequence[Timeline]) -> Mapping[str, Any]:
    """One trace: the groups' chunks one after another."""
    spans, start = [], 0.0
    for timeline in timelines:
        spans += [Span(own.action, own.start + start, own.end + start) for own in timeline.spans]
        start += timeline.seconds
    return chrome({"predicted": spans})


def _sizes(bodies: Sequence[Body], program: Program) -> dict[str, int]:
    """Bytes of the values that regions exchange."""
    sizes: dict[str, int] = {}
    for body in bodies:
        for name, node in zip(body.spec.outputs, body.gm.graph.output_node().args[0], strict=True):
            value = node.meta["val"]
            sizes[name] = value.numel() * value.element_size()
    for action in program:
        for name in action.writes:
            if name.startswith("d."):
                sizes[name] = sizes.get(name[2:].rsplit("@", 1)[0], 0)
    return sizes
