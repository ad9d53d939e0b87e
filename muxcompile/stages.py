"""stages: which regions and tensors are this rank's, where the mesh has several stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from codegen.ops import REDUCE, SPREAD
from codegen.spec import Body
from muxcompile.planner import Group, Planned
from muxcompile.templates import Regions
from passes.graph import MuxGraph
from passes.loads import Shape
from passes.stages import cut
from runtime.comm import Ranks
from runtime.executor import Compiled
from runtime.order import Stage
from runtime.program import Kind, Program
from runtime.tables import Encoding, Param, Table


class Part(NamedTuple):
    """The tables, parameters, encodings and weights that one rank holds."""

    tables: dict[str, Table]
    params: tuple[Param, ...]
    encodings: tuple[Encoding, ...]
    weights: dict[str, Tensor]


class _Way(NamedTuple):
    """Seconds of a full chunk's forward or backward, and those that each row of padding spares it."""

    full: float
    spared: float = 0.0


def seconds(regions: Regions, group: Group, planned: Planned | None, loss: float) -> tuple[list[tuple[_Way, _Way]], float]:
    """Of every region's forward and backward, and of a chunk's loss; without a forecast FLOPs, `loss` of the latter."""
    forecast = planned.forecast if planned is not None else None
    if forecast is None:
        # Forward and backward have the same products: the frozen weights have no gradient.
        return [(_Way(regions.costs[region.name] / 2),) * 2 for region in regions.regions], loss
    model = forecast.model
    extras, shape = model.survey.extras(group.tasks), Shape(group.tokens, group.checkpoint)
    place = {region: index for index, part in enumerate(model.survey.parts[shape.checkpoint]) for region in part.regions}

    def took(name: str, phase: str) -> _Way:
        cost = model.phase(place[name], phase, extras, shape)
        return _Way(cost.device, cost.spared) if model.recorded else _Way(cost.seconds)

    each = [(took(region.name, "forward"), took(region.name, "backward")) for region in regions.regions]
    return each, model.head(extras).seconds * model.blocks(shape.tokens)


def stages(
    regions: Regions, group: Group, planned: Planned | None, *, count: int, loss: float, ends: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], tuple[Stage, ...]]:
    """Where each stage ends among the regions, the slowest as fast as can be; and the seconds of each.

    Args:
        loss: FLOPs of a chunk's loss, if every row has one.
        ends: where they end already: all groups and compilations have one cut, or weights would move.

    Raises:
        ValueError: there are fewer regions than stages.
    """
    each, loss = seconds(regions, group, planned, loss)
    # The last stage has the loss. It counts with the backward, which it begins.
    forward, backward = each[-1]
    each[-1] = forward, backward._replace(full=backward.full + loss)
    ends = ends or cut([sum(way.full for way in own) for own in each], count)
    found, start = [], 0
    for end in ends:
        forward, backward = (_Way(*map(sum, zip(*(own[index] for own in each[start:end]), strict=True))) for index in (0, 1))
        step = _step(group, planned, (end - start) / len(each))
        found.append(Stage((forward.full, backward.full), (forward.spared, backward.spared), step))
        start = end
    return ends, tuple(found)


def _step(group: Group, planned: Planned | None, share: float) -> float:
    """Seconds of the optimizer step of one of the group's tasks, on average, over a share of its tensors; FLOPs know of none."""
    forecast = planned.forecast if planned is not None else None
    return forecast.model.step(group.tasks, share) / len(group.tasks) if forecast is not None else 0.0


def received(train: Program, bodies: Sequence[Body]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what other stages send: values, and gradients of values."""
    known = {
        name: node.meta["val"]
        for body in bodies
        for name, node in zip(body.spec.outputs, body.gm.graph.output_node().args[0], strict=True)
    }
    found = {}
    for name in (name for action in train if action.kind is Kind.RECV for name in action.writes):
        value = known[name.removeprefix("d.").rpartition("@")[0] if name.startswith("d.") else name]
        found[name] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return found


def summed(graph: MuxGraph, head_rows: int) -> int:
    """Bytes of the largest tensor that shards sum in a forward or a backward; a block of the loss sums in float32 at most."""
    each = [node.meta["val"] for node in graph.gm.graph.nodes if node.target in (REDUCE, SPREAD)]
    return max((max(val.nbytes, head_rows * val.shape[-1] * 4) for val in each), default=0)


def own_part(groups: Sequence[Compiled], graph: MuxGraph, ranks: Ranks | None) -> Part:
    """What this rank holds of a graph's tensors: all of it where there is one stage.

    Every stage holds what an encoder computes for several of them, with all that it computes: it is the same everywhere, and
    where the stages begin and end changes none of its bits.

    Raises:
        ValueError: a task's tensor is read in several stages as it is, or an encoder in one reads it in another.
    """
    if ranks is None or ranks.mesh.pp == 1:
        return Part(graph.tables, tuple(graph.params.values()), tuple(graph.encodings.values()), graph.weights)
    last = ranks.stage == ranks.mesh.pp - 1
    read = {reference for own in groups for region in own.regions.values() for reference in region.inputs}
    if last:
        read |= {reference for own in groups for reference in own.head.inputs}
        read |= {f"table:{name}" for own in groups for name in own.head.trained}
    tables = {name for name in graph.tables if f"table:{name}" in read}
    everywhere = ranks.objects([name for name in graph.tables if name in tables])
    readers: dict[str, list[int]] = {}
    for stage, names in enumerate(everywhere[: ranks.mesh.pp * ranks.mesh.tp : ranks.mesh.tp]):
        for name in names:
            readers.setdefault(name, []).append(stage)
    _check_apart(graph, readers, ranks)
    params = tuple(param for param in graph.params.values() if param.table in tables)
    encodings = []
    for own in graph.encodings.values():
        stages = tuple(stage for place in own.outputs for stage in readers.get(place.table, ())[:1])
        if len(set(stages)) > 1:
            assert len(stages) == len(own.outputs), f"{own.name}: nobody reads all that it fills"
            encodings.append(replace(own, stages=stages))
            tables |= {place.table for place in own.outputs}
        elif all(place.table in tables for place in own.outputs):
            encodings.append(own)
    held = {name: table for name, table in graph.tables.items() if name in tables}
    weights = {f"weight:{name}" for own in encodings for name in own.weights.values()} | read
    own_weights = {name: value for name, value in graph.weights.items() if f"weight:{name}" in weights}
    return Part(held, params, tuple(encodings), own_weights)


def _check_apart(graph: MuxGraph, readers: Mapping[str, Sequence[int]], ranks: Ranks) -> None:
    """What is trained in tables is one stage's, with the encoders that read it."""
    for param in graph.params.values():
        if graph.tables[param.table].trainable and len(found := readers.get(param.table, ())) > 1:
            raise ValueError(
                f"task {param.task!r}: {param.key} is used in stages {', '.join(map(str, found))} of mesh "
                f"{ranks.mesh}: a tensor that is trained must be one stage's"
            )
    for own in graph.encodings.values():
        known = [graph.params[own.task, key].table for key in own.reads.values() if (own.task, key) in graph.params]
        stages = {stage for place in own.outputs for stage in readers.get(place.table, ())}
        if known and len(stages.union(*(readers.get(table, ()) for table in known))) > 1:
            raise ValueError(
                f"task {own.task!r}: {own.name} computes tensors of stages {', '.join(map(str, sorted(stages)))} of mesh "
                f"{ranks.mesh} from what another has: they must be one stage's"
            )
