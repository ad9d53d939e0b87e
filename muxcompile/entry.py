"""TaskEntry: what a compiled model keeps of a task besides its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.adapterhub import CONFIG_FILE, PICKLE_FILE
from runtime.folder import Form

WEIGHTS = "adapter_model.safetensors"
# A saved adapter: PEFT's layout or AdapterHub's.
ADAPTER = Form(CONFIG_FILE, (CONFIG_FILE, WEIGHTS, PICKLE_FILE))


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """What the model keeps of a task: its own length limit, its adapter_config.json, and the layout of its folder."""

    max_length: int | None
    config: dict[str, Any]
    layout: str = "peft"
