"""planner: which tasks share chunks, in which order and of which size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from codegen import tiling
from muxcompile.options import Options
from passes.adapters import Adapter
from runtime.state import Training


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that share chunks (an hTask): one program, over chunks of one size.

    Args:
        tasks: their names.
        tokens: rows of a chunk.
        checkpoint: regions keep their inputs alone and run their forward again in the backward.
        fixed: the size was chosen, by the user or for the tasks' data: a longer sequence is cut. Otherwise it grows.
        carried: sequences are cut, keys and values are carried from piece to piece.
        reason: why these tasks and this size.
    """

    tasks: tuple[str, ...]
    tokens: int
    checkpoint: bool = False
    fixed: bool = False
    carried: bool = False
    reason: str = ""


def plan(device: torch.device, adapters: Sequence[Adapter], options: Options) -> list[Group]:
    """Who shares chunks.

    Raises:
        ValueError: `options.groups` names a task that does not exist, or one twice.
    """
    names = tuple(adapter.task.name for adapter in adapters)
    longest = {adapter.task.name: longest_of(adapter) for adapter in adapters}
    fixed = options.chunk_tokens is not None
    tokens = tiling.chunk_tokens(device, options.chunk_tokens, max(longest.values(), default=0))

    def group(tasks: tuple[str, ...], reason: str) -> Group:
        carried = max(longest[name] for name in tasks) > tokens
        return Group(tasks, tokens, bool(options.gradient_checkpointing), fixed, carried, reason)

    if options.groups is None:
        return [group(names, "all tasks share every chunk")]
    return [group(tasks, "Options.groups") for tasks in _asked(names, options.groups)]


def extend(
    device: torch.device,
    groups: Sequence[Group],
    adapters: Sequence[Adapter],
    *,
    longest: Mapping[str, int],
    sizes: Mapping[str, int],
) -> list[Group]:
    """The groups without tasks that have left, and with newcomers in the one of the largest chunks.

    A task keeps its chunk size, and so its bits, unless it was the device's default and an example is longer.

    Args:
        longest: rows of the longest example that tasks are known to have now.
        sizes: rows that the chunks of tasks have at least, as those of a checkpoint.
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
        need = max(longest.get(name, 0 if name in known else announced[name]) for name in tasks)
        tokens = max([group.tokens, *(sizes.get(name, 0) for name in tasks), *([] if group.fixed else [need])])
        tokens = tiling.chunk_tokens(device, tokens, 0)
        found.append(replace(group, tasks=tasks, tokens=tokens, carried=group.carried or need > tokens))
    return found


def longest_of(adapter: Adapter) -> int:
    """Rows of the longest example that a task announces, its virtual tokens included; 0: none announced."""
    announced = adapter.task.max_length
    return announced + training(adapter).virtual_tokens if announced is not None else 0


def _asked(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The user's groups, and one of all tasks that are in none."""
    named = [name for group in groups for name in group]
    for name in named:
        if name not in names:
            raise ValueError(f"Options: groups names {name!r}, which is no task (tasks: {', '.join(names)})")
        if named.count(name) > 1:
            raise ValueError(f"Options: groups names {name!r} twice")
    rest = tuple(name for name in names if name not in named)
    return [tuple(group) for group in groups if group] + ([rest] if rest else [])


def training(adapter: Adapter) -> Training:
    """A task's numbers, as the runtime knows them."""
    asked: dict[str, Any] = {
        name: max(getattr(site, name, 0) for site in adapter.sites) for name in ("dropout", "virtual_tokens", "position_offset")
    }
    if adapter.task.loraplus_lr_ratio is not None and adapter.kind.loraplus is not None:
        asked["fast"], asked["undecayed"] = adapter.kind.loraplus(adapter.sites)
    numbers: dict[str, Any] = {n: getattr(adapter.task, n) for n in Training.__dataclass_fields__ if hasattr(adapter.task, n)}
    return Training(**numbers, **asked)
