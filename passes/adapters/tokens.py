"""Trainable tokens (PEFT's TRAINABLE_TOKENS): a task trains its own copy of some rows of the embedding.

Dispatch: the token ids. Adapter: rows. Aggregate: in place of the backbone's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from passes.adapters import modules
from passes.adapters.modules import attach, start
from passes.adapters.sites import inject, refuse_fields
from passes.graph import MuxGraph
from passes.linears import Group
from passes.task import Task
from runtime.tables import Table

__all__ = ["attach", "fuse", "resolve", "start"]

_SUPPORTED = frozenset({"token_indices", "target_modules"})


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Any]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did; `config` ends up as PEFT would save it.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_fields(task, config, _SUPPORTED)
    if not config.init_weights:
        raise ValueError(f"task {task.name!r}: init_weights=False is not supported")
    inject(task, config, skeleton)
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers: dict[str, Any] = {name: module for name, module in skeleton.named_modules() if isinstance(module, TrainableTokensLayer)}
    if any(layer.tied_adapter is not None for layer in layers.values()):
        raise ValueError(
            f"task {task.name!r}: peft_type=TRAINABLE_TOKENS where the head is tied to the embedding is not supported; "
            "LoraConfig's trainable_token_indices is"
        )
    return modules.tokens(task, "token_indices", layers, "trainable_tokens_delta")


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The rows of one embedding are joined."""
    modules.fuse(graph, reserve=reserve, previous=previous)
