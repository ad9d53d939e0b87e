"""Task: what one tenant asks for. The language in which the front speaks to the passes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from os import PathLike
from typing import Any

OPTIMIZERS = ("adamw", "sgd")
LR_SCHEDULES = ("constant", "linear", "cosine")
LOSSES = ("cross_entropy",)
# Files of a run, each of which is written under a name of its own first.
_FILES = ("metrics.jsonl", "checkpoint.json", "train.json")
_TAKEN = {".", "..", "__base__", *_FILES, *(f"{file}.tmp" for file in _FILES)}
# The largest float32: optimizer steps are computed with nothing larger.
_LARGEST = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Task:
    """One tenant: a name, a PEFT adapter and how it is trained.

    Args:
        name: what gradients, files, metrics and random numbers are bound to; unique in a run, usable as a folder name.
        adapter: a `peft.PeftConfig`, or the folder of an adapter saved by PEFT (its weights are then the starting point).
        batch_size: examples the planner expects in one step of this task; a hint, `step` takes any number.
        max_length: longest example, in tokens; a longer one is a ValueError, never truncated. None: the backbone's limit.
        lengths: tokens of typical examples of its data, from which the planner chooses chunk sizes and groups; a hint, as
            `batch_size`. None: not known yet, and the chunk size is the device's default.
        learning_rate: any value >= 0 that float32 holds.
        optimizer: "adamw" (torch.optim.AdamW's formula) or "sgd" (torch.optim.SGD's, with `momentum`).
        betas, eps, momentum, weight_decay: the optimizer's own.
        lr_schedule: "constant", "linear" or "cosine", each after `warmup_steps` steps of linear warm-up; "linear" and
            "cosine" fall to 0 at `total_steps` (the formulas of transformers' schedules of these names).
        max_grad_norm: clip this task's gradient to this 2-norm; None: no clipping.
        loss: "cross_entropy", the mean over labelled tokens.
        loraplus_lr_ratio: LoRA+ (arXiv 2402.12354): LoRA's B, and what else has one dimension, is trained at this multiple of the
            learning rate, biases without weight decay (PEFT's create_loraplus_optimizer); None: one rate for all.
        seed: together with the name alone fixes initialisation and data order.

    Raises:
        ValueError: naming the task and the field.
    """

    name: str
    adapter: Any
    _: KW_ONLY
    batch_size: int = 8
    max_length: int | None = None
    lengths: Sequence[int] | None = None
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    max_grad_norm: float | None = None
    loraplus_lr_ratio: float | None = None
    loss: str = "cross_entropy"
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.adapter is None:
            raise ValueError(f"task {self.name!r}: adapter is missing: give a peft config or the folder of a saved adapter")
        for field, low in (("batch_size", 1), ("warmup_steps", 0), ("seed", 0)):
            self._integer(field, low)
        for field in ("max_length", "total_steps"):
            if getattr(self, field) is not None:
                self._integer(field, 1)
        if self.lengths is not None:
            self._lengths()
        for field in ("learning_rate", "weight_decay", "momentum", "eps"):
            self._real(field)
        if self.learning_rate > _LARGEST:
            raise self._bad("learning_rate", f"must be at most {_LARGEST:.8g}, the largest float32")
        if self.optimizer == "adamw" and self.eps == 0:
            raise self._bad("eps", "must be above 0: an element whose gradients are all zero would divide by it")
        if self.max_grad_norm is not None:
            self._real("max_grad_norm")
            if not 0 < self.max_grad_norm <= _LARGEST:
                raise self._bad("max_grad_norm", "must be above 0 and held by float32, or None for no clipping")
        if self.loraplus_lr_ratio is not None:
            self._real("loraplus_lr_ratio")
            if not 0 < self.loraplus_lr_ratio * max(1.0, self.learning_rate) <= _LARGEST:
                raise self._bad("loraplus_lr_ratio", "must be above 0, or None; float32 must hold its product with learning_rate")
        if not _is_betas(self.betas):
            raise self._bad("betas", "must be two numbers in [0, 1)")
        for field, choices in (("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES), ("loss", LOSSES)):
            if getattr(self, field) not in choices:
                raise self._bad(field, f"must be one of {', '.join(choices)}")
        if self.lr_schedule != "constant" and self.total_steps is None:
            raise self._bad("total_steps", f"is needed by lr_schedule={self.lr_schedule!r}")
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise self._bad("warmup_steps", f"must not exceed total_steps={self.total_steps}")

    def _bad(self, field: str, why: str) -> ValueError:
        return ValueError(f"task {self.name!r}: {field}={getattr(self, field)!r} {why}")

    def _integer(self, field: str, low: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._bad(field, f"must be an integer of at least {low}")

    def _lengths(self) -> None:
        given = self.lengths
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise self._bad("lengths", "must be a sequence of token counts, or None")
        # A copy: a frozen task does not change with the caller's list.
        found = tuple(given)
        if not found or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in found):
            raise ValueError(f"task {self.name!r}: lengths must be token counts of at least 1, one or more")
        if self.max_length is not None and max(found) > self.max_length:
            raise ValueError(f"task {self.name!r}: lengths holds {max(found)}, more than max_length={self.max_length}")
        object.__setattr__(self, "lengths", found)

    def _real(self, field: str) -> None:
        value = getattr(self, field)
        # An integer past the largest double would overflow wherever it meets one.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise self._bad(field, "must be a finite number of at least 0")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names a jobs file may set under `train:` besides the trainer's own."""
        return tuple(field.name for field in fields(cls) if field.name not in ("name", "adapter", "lengths"))


def _is_betas(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
    )


def check_name(name: Any) -> None:
    """A task's name becomes a folder and part of PEFT's keys: refuse what either cannot hold."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"task name {name!r} must be a non-empty string")
    # Adapters stand beside metrics and checkpoints in a run's folder, their states beside a checkpoint's own files, and a folder
    # waits under another name while it is exchanged. Names that differ in case alone are one on some file systems.
    plain = name.casefold()
    taken = plain in _TAKEN or plain.startswith("checkpoint-") or (plain.startswith(".") and plain.endswith(".old"))
    unusable = taken or name != name.strip() or len(name.encode()) > 200
    if unusable or any(char in "/\\:" or ord(char) < 32 for char in name):
        raise ValueError(
            f"task name {name[:40]!r} cannot be used as a folder name: it has a '/', '\\', ':', a control character or an outer "
            "blank, is '.', '..', '__base__' or a file of a run, or is longer than 200 bytes"
        )


def as_tasks(tasks: Any) -> list[Task]:
    """Accept `{"alice": config}`, `[Task(...)]` or `[("alice", config)]`; refuse an empty or ambiguous set.

    Raises:
        ValueError: no task, or two tasks of one name.
    """
    if isinstance(tasks, Task):
        tasks = [tasks]
    if isinstance(tasks, Mapping):
        tasks = [_from_pair(name, adapter) for name, adapter in tasks.items()]
    if not isinstance(tasks, Iterable) or isinstance(tasks, str | bytes):
        raise ValueError(f"tasks must be {{name: adapter}} or a list of Task, got {type(tasks).__name__}")
    found = []
    for task in tasks:
        if not isinstance(task, Task) and not (isinstance(task, tuple | list) and len(task) == 2):
            raise ValueError(f"tasks must hold Task objects or (name, adapter) pairs, found a {type(task).__name__}")
        found.append(task if isinstance(task, Task) else _from_pair(*task))
    if not found:
        raise ValueError("tasks is empty: give at least one task")
    seen: set[str] = set()
    for task in found:
        # Folders of two names that differ in case alone are one folder on some file systems.
        if task.name.casefold() in seen:
            raise ValueError(f"task {task.name!r}: name is used twice (names are compared without regard to case)")
        seen.add(task.name.casefold())
    return found


def _from_pair(name: str, adapter: Any) -> Task:
    if isinstance(adapter, Task):
        if adapter.name != name:
            raise ValueError(f"task {name!r}: its Task is named {adapter.name!r}")
        return adapter
    return Task(name, adapter)


def is_folder(adapter: Any) -> bool:
    """Whether the adapter is the path of a saved one rather than a config object."""
    return isinstance(adapter, str | PathLike)
