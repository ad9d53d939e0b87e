"""numbers: what a task asks for, as the runtime knows it."""

from __future__ import annotations

from typing import Any

from passes.adapters import Adapter
from runtime.state import Training


def training(adapter: Adapter) -> Training:
    """A task's numbers, as the runtime knows them."""
    asked: dict[str, Any] = {
        name: max(getattr(site, name, 0) for site in adapter.sites) for name in ("dropout", "virtual_tokens", "position_offset")
    }
    if adapter.task.loraplus_lr_ratio is not None and adapter.kind.loraplus is not None:
        asked["fast"], asked["undecayed"] = adapter.kind.loraplus(adapter.sites)
    numbers: dict[str, Any] = {n: getattr(adapter.task, n) for n in Training.__dataclass_fields__ if hasattr(adapter.task, n)}
    return Training(**numbers, **asked)


def longest_of(adapter: Adapter) -> int:
    """Rows of the longest example that a task announces, its virtual tokens included; 0: none announced."""
    announced = max([adapter.task.max_length or 0, *(adapter.task.lengths or ())])
    return announced + training(adapter).virtual_tokens if announced else 0
