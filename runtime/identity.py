"""Identity: what the tensors of a checkpoint stand for, beyond their names and shapes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.comm import Ranks

_MOST = 64  # matrices: with the first number of each, no two backbones that were trained apart are taken for one


@dataclass(frozen=True, slots=True)
class Identity:
    """
    Args:
        adapters: by task the fields of its config that say what function its tensors are of; of no task: nobody knows.
        backbone: by name of a matrix its dtype and its first number (`sample`).
    """

    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backbone: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def check(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Hold it against what a checkpoint says of itself; what only one of them knows is passed over.

        Raises:
            ValueError: naming the file, and the task and field or the backbone's matrix that differs.
        """
        for name, fields in self.adapters.items():
            saved = manifest["tasks"][name].get("adapter", {})
            for key, value in fields.items():
                if key in saved and saved[key] != value:
                    raise ValueError(f"{path}: task {name!r} was trained with {key}={saved[key]!r}, not {value!r}")
        saved = manifest.get("backbone", {})
        for name, (dtype, value) in self.backbone.items():
            # The same weights in another dtype are rounded otherwise.
            then = saved.get(name, (dtype, value))
            if then[0] == dtype and then[1] != value:
                raise ValueError(f"{path}: was saved over another backbone: {name!r} began with {then[1]!r}, not {value!r}")


def sample(weights: Mapping[str, Tensor], ranks: Ranks | None) -> dict[str, tuple[str, float]]:
    """The dtype and the first number of some of the backbone's matrices, by name. All ranks make this call, and get the same.

    It is the same on every mesh: a tensor's first number is with the first shard, however many there are, and the names that are
    taken are the first by their hashes, whichever stage has them.
    """
    own = {name: tensor for name, tensor in weights.items() if tensor.dim() > 1 and tensor.is_floating_point() and tensor.numel()}
    taken = _chosen(own) if ranks is None or not ranks.shard else {}
    # One transfer for all.
    first = [tensor.detach()[(0,) * tensor.dim()].double() for tensor in taken.values()]
    values = torch.stack(first).tolist() if first else []
    described = ((name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in taken.items())
    found = {name: (dtype, value) for (name, dtype), value in zip(described, values, strict=True)}
    if ranks is not None:
        found = _chosen({name: value for part in ranks.objects(found) for name, value in part.items()})
    # JSON has no others.
    return {name: (dtype, value) for name, (dtype, value) in found.items() if math.isfinite(value)}


def _chosen(named: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())[:_MOST]
    return {name: named[name] for name in names}


def is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether the parts of a checkpoint's manifest that `Identity.check` reads are what they should be, or not there."""
    backbone = manifest.get("backbone", {})
    return (
        isinstance(backbone, dict)
        and all(isinstance(own, list) and len(own) == 2 for own in backbone.values())
        and all(isinstance(task.get("adapter", {}), dict) for task in manifest["tasks"].values())
    )
