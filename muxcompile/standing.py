"""Standings: how far the tasks of a run have come, and the file in which a checkpoint keeps it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.folder import writing

STATE = "train.json"  # written last into a checkpoint: a checkpoint that has it is whole


@dataclass(slots=True)
class Standing:
    """How far one task has come; part of every checkpoint."""

    steps: int = 0
    consumed: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    finished: bool = False
    quarantined: str | None = None
    fingerprint: str = ""


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Standing)}


def write_standings(checkpoint: Path, step: int, elapsed_seconds: float, tasks: Mapping[str, Standing]) -> None:
    """Finish a checkpoint: of round `step`, so many seconds after the run began.

    Raises:
        OSError: naming the file.
    """
    state = {"step": step, "elapsed_seconds": elapsed_seconds, "tasks": {name: asdict(own) for name, own in tasks.items()}}
    fresh = checkpoint / f"{STATE}.tmp"
    with writing(checkpoint / STATE):
        fresh.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(fresh, checkpoint / STATE)


def read_standings(checkpoint: Path, most: Mapping[str, int]) -> tuple[int, float, dict[str, Standing]]:
    """What `write_standings` was given.

    Args:
        most: steps after which each task is done. Checkpoints that know rounds alone are of runs in which every task stepped in
            each until its end; where a task's own steps are known, they count, even if it is to end earlier now.

    Raises:
        ValueError: naming the file.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    whole = isinstance(state, dict) and _count(state.get("step")) and isinstance(state.get("tasks"), dict)
    if not whole or not _seconds(state.get("elapsed_seconds")):
        raise ValueError(f"{path}: step, elapsed_seconds or tasks is missing or of the wrong type")
    standings = {}
    for name, values in state["tasks"].items():
        if not isinstance(values, dict) or not all(field in _DEFAULTS and _fits(field, own) for field, own in values.items()):
            raise ValueError(f"{path}: task {name!r}: is not what a run writes of one")
        standings[name] = Standing(**{"steps": min(state["step"], most.get(name, 0)), **values})
    return state["step"], float(state["elapsed_seconds"]), standings


def _fits(field: str, value: Any) -> bool:
    default = _DEFAULTS[field]
    if default is None:
        return value is None or isinstance(value, str)
    return _count(value) if type(default) is int else isinstance(value, type(default))


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
