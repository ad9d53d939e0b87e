"""Configs of kinds that PEFT does not have: plain data, kept in the same files as PEFT's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self

FILE = "adapter_config.json"


@dataclass(kw_only=True)
class Config:
    """What every config has; a kind's own subclass adds its fields and gives `peft_type` its name."""

    peft_type: str
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    inference_mode: bool = False

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write adapter_config.json into a folder."""
        text = json.dumps({name: _plain(value) for name, value in asdict(self).items()}, indent=2, sort_keys=True)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(text + "\n")

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: naming a field that the kind does not have.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{unknown[0]!r} is no field of {cls.__name__}")
        return cls(**given)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else list(value) if isinstance(value, tuple) else value


def is_target(name: str, targets: Sequence[str] | str) -> bool:
    """PEFT's rule: one regular expression for the whole name, or a list of names and ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
