"""planner: which tasks share chunks, in which order and of which size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from codegen import tiling
from muxcompile.forecast import Forecast, forecast, memory_cap
from muxcompile.numbers import longest_of
from muxcompile.options import Options
from passes import group as grouping_of
from passes.adapters import Adapter
from passes.loads import Grouping, HTask, Shape


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that share chunks (an hTask): one program, over chunks of one size.

    Args:
        tasks: their names.
        tokens: rows of a chunk.
        checkpoint: regions keep their inputs alone and run their forward again in the backward.
        fixed: the size was chosen, by the user or for the tasks' data: a longer sequence is cut. Otherwise it grows.
        carried: sequences are cut, keys and values are carried from piece to piece.
        reasons: why these tasks and this size.
    """

    tasks: tuple[str, ...]
    tokens: int
    checkpoint: bool = False
    fixed: bool = False
    carried: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """What was decided, and what it was decided by; no forecast where there was nothing to decide."""

    groups: list[Group]
    forecast: Forecast | None = None
    grouping: Grouping | None = None


def plan(model: nn.Module, device: torch.device, adapters: Sequence[Adapter], options: Options) -> Planned:
    """Who shares chunks, of which size, with activations kept or not.

    With the lengths of all tasks' data known, the cheapest grouping by `passes.group`. Otherwise one group in chunks of the asked
    or the device's size; where memory has a limit, whether that fits is forecast too.

    Raises:
        ValueError: `options.groups` or `options.fairness` name a wrong task; the tasks do not fit the memory (with the numbers and
            the largest set that does).
    """
    names = [adapter.task.name for adapter in adapters]
    options.check_names(names)
    asked = None if options.groups is None else _asked(names, options.groups)
    longest = {adapter.task.name: longest_of(adapter) for adapter in adapters}
    fixed, cap = options.chunk_tokens is not None, memory_cap(device, model, options)
    default = tiling.chunk_tokens(device, options.chunk_tokens, max(longest.values(), default=0))
    known = all(adapter.task.lengths is not None for adapter in adapters)
    if not known and cap is None:
        reason = "Options.groups" if asked else "all tasks share every chunk"
        checkpoint = bool(options.gradient_checkpointing)
        return Planned([_group(tasks, default, checkpoint, fixed, longest, (reason,)) for tasks in asked or [tuple(names)]])
    sizes = tiling.chunk_sizes(device) if known and not fixed else [default]
    variants = (False, True) if options.gradient_checkpointing is None else (options.gradient_checkpointing,)
    shapes = [Shape(size, variant) for size in sizes for variant in variants]
    found = forecast(model, device, adapters, options, shapes, cap)
    base = found.model.resident([])
    if asked is None and known:
        grouping = grouping_of.group(found.loads, found.model, cap=cap, base_bytes=base, objective=options.objective)
    else:
        partition = [[names.index(name) for name in tasks] for tasks in asked or [tuple(names)]]
        grouping = grouping_of.as_groups(partition, found.loads, found.model, cap=cap, base_bytes=base, switch=0.0)
    groups = [_chosen(own, found, fixed or known, longest, device, asked is not None) for own in grouping.groups]
    return Planned(groups, found, grouping)


def _group(
    tasks: Sequence[str], tokens: int, checkpoint: bool, fixed: bool, longest: Mapping[str, int], reasons: tuple[str, ...]
) -> Group:
    return Group(tuple(tasks), tokens, checkpoint, fixed, max(longest[task] for task in tasks) > tokens, reasons)


def _chosen(own: HTask, found: Forecast, fixed: bool, longest: Mapping[str, int], device: torch.device, asked: bool) -> Group:
    fill = str(found.fill(own.tasks, own.shape.tokens, device))
    reasons = (*(("Options.groups",) if asked else ()), *own.reasons, fill)
    return _group(own.tasks, own.shape.tokens, own.shape.checkpoint, fixed, longest, reasons)


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


def _asked(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The user's groups, and one of all tasks that are in none."""
    named = {name for group in groups for name in group}
    rest = tuple(name for name in names if name not in named)
    return [tuple(group) for group in groups if group] + ([rest] if rest else [])
