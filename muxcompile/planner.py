"""planner: which tasks share chunks, in which order and of which size."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from codegen import tiling
from codegen.links import fabric
from muxcompile.forecast import Forecast, forecast, memory_cap, surveyed_with
from muxcompile.numbers import longest_of
from muxcompile.options import Options
from passes import group as grouping_of
from passes.adapters import Adapter
from passes.admit import room
from passes.interleave import Interleaving, Unfit, dealt
from passes.interleave import counts as counts_of
from passes.loads import Grouping, HTask, Shape
from passes.measure import name_of
from passes.parallel import StageCosts, sections
from passes.survey import Survey
from runtime.comm import Mesh

# Rounds that are played to choose among groups over stages and shards, and to choose the size of each one's chunks: one that just
# holds those of a few rounds is dear when a later one needs a chunk more.
PLAYED_ROUNDS, SIZED_ROUNDS = 12, 64


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that share chunks (an hTask): one program, over chunks of one size.

    Args:
        tasks: their names.
        tokens: rows of a chunk.
        checkpoint: regions keep their inputs alone and run their forward again in the backward.
        fixed: the size was chosen, by the user or for the tasks' data: a longer sequence is cut. Otherwise it grows.
        carried: sequences are cut, keys and values are carried from piece to piece.
        kept: of a sequence of up to so many pieces the forwards are kept for the backwards.
        reasons: why these tasks and this size.
    """

    tasks: tuple[str, ...]
    tokens: int
    checkpoint: bool = False
    fixed: bool = False
    carried: bool = False
    kept: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """What was decided, and what it was decided by; no forecast where there was nothing to decide.

    `flight`: by stage, micro-batches that may be on their way; empty: as in 1F1B.
    """

    groups: list[Group]
    forecast: Forecast | None = None
    grouping: Grouping | None = None
    flight: tuple[int, ...] = ()


def plan(
    model: nn.Module, device: torch.device, adapters: Sequence[Adapter], options: Options, *, there: int | None = None
) -> Planned:
    """Who shares chunks, of which size, with activations kept or not.

    With the lengths of all tasks' data known, the cheapest grouping by `passes.group`, or where there are several stages or shards
    the fastest by `passes.interleave`. Otherwise one group in chunks of the asked or the device's size; where memory has a limit,
    whether that fits is forecast too.

    Args:
        there: bytes of the model that are on the device already; None: all.

    Raises:
        ValueError: `options.groups` or `options.fairness` name a wrong task; the tasks do not fit the memory (with the numbers and
            the largest set that does).
    """
    names = [adapter.task.name for adapter in adapters]
    options.check_names(names)
    asked = None if options.groups is None else _asked(names, options.groups)
    longest = {adapter.task.name: longest_of(adapter) for adapter in adapters}
    fixed, cap = options.chunk_tokens is not None, memory_cap(device, model, options, there)
    default = tiling.chunk_tokens(device, options.chunk_tokens, max(longest.values(), default=0))
    known = all(adapter.task.lengths is not None for adapter in adapters)
    if not known and cap is None:
        reason = "Options.groups" if asked else "all tasks share every chunk"
        checkpoint = bool(options.gradient_checkpointing)
        return Planned([_group(tasks, default, checkpoint, fixed, longest, (reason,)) for tasks in asked or [tuple(names)]])
    found = forecast(model, device, adapters, options, _shapes(device, adapters, options), cap)
    mesh = Mesh() if options.mesh is None else Mesh.of(options.mesh)
    played = known and asked is None and options.objective == "time"
    if mesh.pp > 1 and played:
        return interleaved(found, mesh, longest)
    base, steps = found.model.resident([]), found.sizing()
    if asked is None and known:
        grouping = grouping_of.group(found.loads, found.model, cap=cap, base_bytes=base, objective=options.objective, steps=steps)
    else:
        partition = [[names.index(name) for name in tasks] for tasks in asked or [tuple(names)]]
        grouping = grouping_of.as_groups(partition, found.loads, found.model, cap=cap, base_bytes=base, switch=0.0, steps=steps)
    groups = [_chosen(own, found, fixed or known, longest, asked is not None) for own in grouping.groups]
    if mesh.tp > 1 and played:
        with contextlib.suppress(Unfit):
            return interleaved(found, mesh, longest)
    return _keeping(Planned(groups, found, grouping), found, longest, options)


def interleaved(
    found: Forecast, mesh: Mesh, longest: Mapping[str, int], *, counts: Sequence[int] = (), more: Sequence[int] = ()
) -> Planned:
    """The fastest groups over stages and shards: the rounds are played, with optimizer steps and what waits for them.

    Args:
        counts: numbers of groups to choose from; none: up to two for each stage, or for each lane of shards.
        more: micro-batches that stages may have in flight beyond 1F1B's, to choose from; none: as may help.

    Raises:
        ValueError: no chunk holds the longest sequence, or memory no chunk.
    """
    survey, most = found.model.survey, max(longest.values())
    sizes = sorted({shape.tokens for shape in found.model.shapes if shape.tokens >= most})
    if not sizes:
        raise ValueError(f"mesh {mesh}: no chunk holds a sequence of {most} tokens (Task.max_length), and stages cut none")
    # The replica that has most: sequences are dealt out in turn.
    rounds = {task: [step[:: mesh.dp] for step in given[:SIZED_ROUNDS]] for task, given in found.steps.items()}
    costs = StageCosts(found.model, mesh, fabric(name_of(found.device)), sections(survey))
    costs.balance(survey.extras(list(rounds)), Shape(sizes[len(sizes) // 2]))
    variants = tuple(sorted({shape.checkpoint for shape in found.model.shapes}))
    whole = Interleaving(costs, rounds, sizes, found.cap or 1 << 62, variants, found.device)
    few = replace(whole, rounds={task: given[:PLAYED_ROUNDS] for task, given in rounds.items()})
    mean = {task: float(sum(map(sum, given))) for task, given in rounds.items()}
    counts = counts or counts_of(mesh, len(rounds))
    close = few.close([dealt(mean, count) for count in counts], more=more or sorted({0, 1, mesh.pp}))
    best = min(map(whole.fitted, close), key=lambda run: run.seconds)
    over = f"{mesh.pp} stages" if mesh.pp > 1 else f"{mesh.tp} shards"
    reason = (
        f"the fastest of {counts[0]} to {counts[-1]} groups over {over}, {few.played} choices played: "
        f"{len(next(iter(rounds.values())))} rounds in {best.seconds:.3g} s, "
        f"bubbles {', '.join(f'{best.bubble(stage):.0%}' for stage in range(mesh.pp))}"
    )
    groups = [
        _group(tasks, shape.tokens, shape.checkpoint, True, longest, (reason, str(found.fill(tasks, shape.tokens))))
        for tasks, shape in zip(best.choice.groups, best.choice.shapes, strict=True)
    ]
    return Planned(groups, found, flight=best.flight)


def _shapes(device: torch.device, adapters: Sequence[Adapter], options: Options) -> list[Shape]:
    """The chunks to choose from: of one size where the user chose it, or lengths are not known of all tasks.

    Several ranks cut no sequence: their chunks hold the longest.
    """
    known = all(adapter.task.lengths is not None for adapter in adapters)
    longest = max((longest_of(adapter) for adapter in adapters), default=0)
    one = options.chunk_tokens is not None or not known
    sizes = [] if one else list(tiling.chunk_sizes(device))
    if options.mesh is not None and Mesh.of(options.mesh).size > 1:
        sizes = [size for size in sizes if size >= longest]
    sizes = sizes or [tiling.chunk_tokens(device, options.chunk_tokens, longest)]
    variants = (False, True) if options.gradient_checkpointing is None else (options.gradient_checkpointing,)
    return [Shape(size, variant) for size in sizes for variant in variants]


def _group(
    tasks: Sequence[str], tokens: int, checkpoint: bool, fixed: bool, longest: Mapping[str, int], reasons: tuple[str, ...]
) -> Group:
    return Group(tuple(tasks), tokens, checkpoint, fixed, max(longest[task] for task in tasks) > tokens, reasons=reasons)


def _chosen(own: HTask, found: Forecast, fixed: bool, longest: Mapping[str, int], asked: bool) -> Group:
    fill = str(found.fill(own.tasks, own.shape.tokens))
    reasons = (*(("Options.groups",) if asked else ()), *own.reasons, fill)
    return _group(own.tasks, own.shape.tokens, own.shape.checkpoint, fixed, longest, reasons)


def _keeping(planned: Planned, found: Forecast, longest: Mapping[str, int], options: Options) -> Planned:
    """Keep the forwards of cut sequences for their backwards where memory has a limit and they fit under it.

    The planned ones run all but a sequence's last piece twice: their cost is what is saved.
    """
    grouping = planned.grouping
    assert grouping is not None
    if found.cap is None or options.objective == "memory":
        return planned
    there = found.model.resident()
    groups, htasks = [], []
    for group, htask in zip(planned.groups, grouping.groups, strict=True):
        pieces = -(-max(longest[task] for task in group.tasks) // group.tokens)
        forward = found.model.forward(found.model.survey.extras(group.tasks), htask.shape)
        more = (pieces - 1) * forward.bytes
        if group.carried and there + htask.bytes + more <= found.cap:
            saved = min(htask.cost, found.again(group.tasks, group.tokens) * forward.cost)
            group = replace(group, kept=pieces)
            htask = replace(htask, cost=htask.cost - saved, bytes=htask.bytes + more)
        groups.append(group)
        htasks.append(htask)
    cost = grouping.cost + sum(own.cost for own in htasks) - sum(own.cost for own in grouping.groups)
    peak = max(grouping.bytes, there + max(own.bytes for own in htasks))
    return replace(planned, groups=groups, grouping=replace(grouping, groups=tuple(htasks), cost=cost, bytes=peak))


def extend(
    device: torch.device,
    groups: Sequence[Group],
    adapters: Sequence[Adapter],
    *,
    longest: Mapping[str, int],
    sizes: Mapping[str, int],
) -> list[Group]:
    """The groups without tasks that have left, and with newcomers in the one of the largest chunks.

    A task keeps its chunk size, and so its bits, unless it was the device's default and an example is longer. Where `sizes` says
    otherwise of some tasks of a group, it falls apart by size.

    Args:
        longest: rows of the longest example that tasks are known to have now.
        sizes: rows that the chunks of tasks are to have, as those of a checkpoint.
    """
    names = [adapter.task.name for adapter in adapters]
    known = {name for group in groups for name in group.tasks}
    largest = max(range(len(groups)), key=lambda index: groups[index].tokens)
    announced = {adapter.task.name: longest_of(adapter) for adapter in adapters}
    found = []
    for index, group in enumerate(groups):
        tasks = tuple(name for name in names if name in group.tasks or (index == largest and name not in known))
        if not tasks:
            continue
        asked = {name: sizes.get(name, group.tokens) for name in tasks}
        for size in dict.fromkeys(asked.values()):
            own = tuple(name for name in tasks if asked[name] == size)
            need = max(longest.get(name, 0 if name in known else announced[name]) for name in own)
            tokens = tiling.chunk_tokens(device, size if group.fixed else max(size, need), 0)
            found.append(replace(group, tasks=own, tokens=tokens, carried=group.carried or need > tokens))
    return found


def admit(
    model: nn.Module,
    device: torch.device,
    adapters: Sequence[Adapter],
    groups: Sequence[Group],
    options: Options,
    cap: int,
    survey: Survey,
) -> Survey:
    """Refuse a newcomer for which there is no memory in the chunks that are compiled, as far as can be foretold.

    Args:
        adapters: of all tasks, the newcomer's last.
        groups: of the other tasks.
        cap: bytes of the device that may be used.
        survey: of the other tasks; it is made again where none of them has an adapter like the newcomer's.

    Returns:
        The survey of all tasks.

    Raises:
        ValueError: naming the task, with the bytes needed, and how many like it a model compiled anew would take.
    """
    names, newcomer = [adapter.task.name for adapter in adapters], adapters[-1]
    # Turns are those of the tasks that were planned; whose chunk is the largest does not depend on them.
    options = replace(options, fairness="equal")
    survey = surveyed_with(model, device, adapters, survey)
    held = []
    for group in extend(device, groups, adapters, longest={}, sizes={}):
        own, shape = [adapter for adapter in adapters if adapter.task.name in group.tasks], Shape(group.tokens, group.checkpoint)
        found = forecast(model, device, own, options, [shape], cap, surveyed=survey)
        kept = max(0, group.kept - 1) * found.model.forward(survey.extras(group.tasks), shape).bytes
        held.append(found.model.chunk(survey.extras(group.tasks), shape).bytes + max(load.held(0) for load in found.loads) + kept)
    base, resident, flight = survey.backbone, sum(survey.tasks[name].nbytes for name in names), int(max(held))
    if (needed := base + resident + flight) <= cap:
        return survey
    whole = forecast(model, device, adapters, options, _shapes(device, adapters, options), cap, surveyed=survey)
    *others, like = whole.loads
    raise ValueError(
        f"task {newcomer.task.name!r}: memory: {len(names)} tasks need {needed:,} bytes ({base:,} of the backbone, {resident:,} of "
        f"their own, {flight:,} in flight in the chunks that are compiled), cap {cap:,}; room for more like it: 0, or "
        f"{room(like, others, whole.model, cap, base)} if all are compiled anew"
    )


def _asked(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The user's groups, and one of all tasks that are in none."""
    named = {name for group in groups for name in group}
    rest = tuple(name for name in names if name not in named)
    return [tuple(group) for group in groups if group] + ([rest] if rest else [])
