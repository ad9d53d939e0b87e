"""Checkpoints: per task weights, optimizer, schedule and data position, as safetensors and JSON in a folder that appears whole.

    checkpoint.json            format, versions, some numbers of the backbone, and for every task its chunk size, counters, training
                               numbers and what of its adapter's config says what its tensors do
    <task>/state.safetensors   weight/<PEFT key> and optimizer/<PEFT key>/<name>, float32

Random numbers need no file: they are a function of (seed, task name) and the counters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.folder import Form, check_replaceable, replace_folder, set_aside
from runtime.identity import Identity, is_whole
from runtime.state import State
from runtime.training import forget

FORMAT = 2


# What it looks like; train.json is what `muxcompile train` adds.
FORM = Form("checkpoint.json", ("checkpoint.json", "*/state.safetensors", "train.json", "train.json.tmp"))


def write_checkpoint(directory: Path, state: State, chunk_tokens: Mapping[str, int], identity: Identity | None = None) -> None:
    """Write the state of every task, with the size of its chunks and what its tensors stand for. Waits for the device.

    Raises:
        ValueError: the folder holds what is no part of a checkpoint; nothing was changed then.
    """
    check_replaceable(directory, FORM, state.ranks)
    state.poll(list(state.tasks), wait=True)
    known = identity or Identity()
    tasks: dict[str, Any] = {}
    # Of a mesh every rank has a part of a task's tensors, and the first one writes them.
    if state.ranks is not None and state.ranks.rank:
        for name in state.tasks:
            _whole(state, name)
        return
    with replace_folder(directory, FORM) as folder:
        for name, task in state.tasks.items():
            (folder / name).mkdir()
            save_file(_whole(state, name), folder / name / "state.safetensors")
            tasks[name] = {
                "chunk_tokens": chunk_tokens[name],
                "steps": task.steps,
                "examples": task.examples,
                "draws": task.draws,
                "quarantined": task.quarantined,
                "training": asdict(task.training),
            }
            if name in known.adapters:
                tasks[name]["adapter"] = known.adapters[name]
        manifest = {"format": FORMAT, "torch": torch.__version__, "backbone": known.backbone, "tasks": tasks}
        (folder / "checkpoint.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _whole(state: State, name: str) -> dict[str, Tensor]:
    """A task's tensors, all ranks' together."""
    own = _tensors(state, name)
    if state.ranks is None:
        return own
    return {key: value for part in state.ranks.objects(own) for key, value in part.items()}


def _tensors(state: State, name: str) -> dict[str, Tensor]:
    task = state.tasks[name]
    found = {f"weight/{key}": state.read(name, key) for key in (*task.keys, *task.kept)}
    for key, view in zip(task.keys, task.views, strict=True):
        for field, value in task.optimizer.state.get(view, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer/{key}/{field}"] = state.moment(name, key, value.detach()).to("cpu", copy=True).contiguous()
    return found


@dataclass(frozen=True, slots=True)
class Restore:
    """A checkpoint that was read and checked; `apply` writes it into the state."""

    state: State
    tasks: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def chunk_tokens(self) -> dict[str, int]:
        """Rows of each task's chunks when it was saved."""
        return {name: task["chunk_tokens"] for name, task in self.tasks.items()}

    def apply(self) -> None:
        for name, saved in self.tasks.items():
            task, tensors = self.state.tasks[name], self.tensors[name]
            for key in (*task.keys, *task.kept):
                self.state.write(name, key, tensors[f"weight/{key}"])
            forget(task.optimizer)
            for key, view in zip(task.keys, task.views, strict=True):
                prefix = f"optimizer/{key}/"
                fields = {field.removeprefix(prefix): value for field, value in tensors.items() if field.startswith(prefix)}
                if fields:
                    here = {field: self.state.moment_here(name, key, value) for field, value in fields.items()}
                    task.optimizer.state[view] = {
                        field: value.to(self.state.device, copy=True, memory_format=torch.contiguous_format)
                        for field, value in here.items()
                    }
            self.state.clear_gradients(name)
            task.unread.clear()
            task.steps, task.examples, task.quarantined = saved["steps"], saved["examples"], saved["quarantined"]
            task.draws = saved["draws"]
            task.alive.fill_(task.quarantined is None)


def read_checkpoint(directory: Path, state: State, identity: Identity | None = None) -> Restore:
    """Read and check a checkpoint against the tasks there are; nothing is changed. What one rank refuses, all do.

    Args:
        identity: what the tensors must stand for, where the checkpoint says so; None: whatever they do.

    Raises:
        ValueError: naming the file, and the task, field or tensor.
    """
    expected = {name: _expected(state, name) for name in state.tasks}
    known = {name: set(own) for name, own in expected.items()}
    if state.ranks is None:
        return _read(directory, state, identity or Identity(), expected, known)
    for other in state.ranks.objects(known):
        for name, keys in other.items():
            known[name] = known[name] | keys
    return state.ranks.by_all(lambda: _read(directory, state, identity or Identity(), expected, known))


def _expected(state: State, name: str) -> dict[str, tuple[int, ...] | None]:
    """The tensors of a task that this rank has a part in; of the optimizer's their shapes."""
    task = state.tasks[name]
    fields = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",) if task.training.momentum else ()}
    found: dict[str, tuple[int, ...] | None] = {f"weight/{key}": None for key in (*task.keys, *task.kept)}
    for key, view in zip(task.keys, task.views, strict=True):
        for field in fields[task.training.optimizer]:
            found[f"optimizer/{key}/{field}"] = () if field == "step" else state.moment_shape(name, key, view)
    return found


def _read(
    directory: Path,
    state: State,
    identity: Identity,
    expected: Mapping[str, dict[str, tuple[int, ...] | None]],
    known: Mapping[str, set[str]],
) -> Restore:
    """`expected` of this rank, `known` to any."""
    if not directory.exists() and (old := set_aside(directory.resolve())).exists():
        # A process was killed between the two renames of `replace_folder`.
        directory = old
    path = directory / "checkpoint.json"
    if not path.is_file():
        raise ValueError(f"{directory}: holds no checkpoint.json")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
    _check_manifest(path, manifest)
    saved = manifest["tasks"]
    for name in state.tasks:
        if name not in saved:
            raise ValueError(f"{path}: has no task {name!r}")
    for name in saved:
        if name not in state.tasks:
            raise ValueError(f"{path}: has a task {name!r} that this model does not have")
    identity.check(path, manifest)
    tensors = {}
    for name, own in saved.items():
        file = directory / name / "state.safetensors"
        tensors[name] = _read_task(file, state, name, own)
        _check_tensors(file, name, tensors[name], expected[name], known[name], stepped=own["steps"] > 0)
    return Restore(state, saved, tensors)


def _check_manifest(path: Path, manifest: Any) -> None:
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: is not a checkpoint of format {FORMAT} (format: {found!r})")
    if not isinstance(manifest.get("tasks"), dict):
        raise ValueError(f"{path}: lacks tasks")
    for name, task in manifest["tasks"].items():
        if isinstance(task, dict):
            # Once there was one size for all tasks.
            task.setdefault("chunk_tokens", manifest.get("chunk_tokens"))
        whole = isinstance(task, dict) and all(
            isinstance(task.get(field), int) and task[field] >= 0 for field in ("chunk_tokens", "steps", "examples", "draws")
        )
        reason = task.get("quarantined", 0) if whole else 0
        training = task.get("training") if whole else None
        if not (reason is None or isinstance(reason, str)) or not isinstance(training, dict) or "optimizer" not in training:
            raise ValueError(
                f"{path}: task {name!r}: chunk_tokens, steps, examples, draws, quarantined or training is missing or of "
                "the wrong type"
            )
    if not is_whole(manifest):
        raise ValueError(f"{path}: backbone, or adapter of a task, is of the wrong type")


def _read_task(path: Path, state: State, name: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    task = state.tasks[name]
    if saved["training"]["optimizer"] != task.training.optimizer:
        raise ValueError(
            f"{path}: task {name!r} was trained with optimizer={saved['training']['optimizer']!r}, not {task.training.optimizer!r}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    for key in (*task.keys, *task.kept):
        given = tensors.get(f"weight/{key}")
        if given is None or tuple(given.shape) != state.shape(name, key):
            found = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise ValueError(f"{path}: task {name!r}: {key} needs shape {state.shape(name, key)}, found {found}")
    return tensors


def _check_tensors(
    path: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...] | None],
    known: set[str],
    *,
    stepped: bool,
) -> None:
    for key in tensors:
        if key not in known:
            raise ValueError(f"{path}: task {name!r}: unexpected tensor {key!r}")
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: task {name!r}: {key} holds values that are not finite")
    for key, shape in expected.items():
        if shape is not None and (key in tensors or stepped):
            # A missing moment would silently start again from zero.
            held = tuple(tensors[key].shape) if key in tensors else None
            if held != shape:
                raise ValueError(f"{path}: task {name!r}: {key} needs shape {shape}, found {held}")
