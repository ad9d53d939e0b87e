"""numbers: what a task asks for, as the runtime knows it."""

from __future__ import annotations

from collections.abc import Iterable
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


def check_positions(adapters: Iterable[Adapter], limit: int | None) -> None:
    """Hold what tasks announce against the positions that the backbone has.

    Raises:
        ValueError: a task's examples do not fit beside its virtual tokens, naming the field.
    """
    for adapter in adapters:
        task, own = adapter.task, training(adapter)
        taken = own.virtual_tokens + own.position_offset
        for field, announced in (("max_length", task.max_length), ("lengths", max(task.lengths or (0,)))):
            if taken and limit is not None and announced and announced + taken > limit:
                raise ValueError(
                    f"task {task.name!r}: {field}={announced} and {taken} virtual tokens (num_virtual_tokens) are more than the "
                    f"backbone's limit of {limit}"
                )


def longest_of(adapter: Adapter) -> int:
    """Rows of the longest example that a task announces, its virtual tokens included; 0: none announced."""
    announced = max([adapter.task.max_length or 0, *(adapter.task.lengths or ())])
    return announced + training(adapter).virtual_tokens if announced else 0
