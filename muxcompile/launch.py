"""launch: a process that trains, and its place among those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from muxcompile.base import BaseSpec
from runtime.comm import Mesh


def join(mesh: Any, base: BaseSpec, timeout: float) -> BaseSpec:
    """Set up torch.distributed for a mesh of several processes, and give this one its GPU.

    Args:
        timeout: seconds that a rank waits for another.

    Returns:
        The backbone's spec, with this rank's device.

    Raises:
        ValueError: the mesh is none, or another number of processes was started.
    """
    grid = Mesh() if mesh is None else Mesh.of(mesh)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count != grid.size:
        raise ValueError(
            f"mesh {grid}: takes {grid.size} process{'es' if grid.size > 1 else ''}, there {'are' if count > 1 else 'is'} {count}: "
            f"start it by torchrun --nproc-per-node {grid.size} -m muxcompile train ..."
        )
    if grid.size == 1:
        return base
    cuda = base.device.partition(":")[0] == "cuda" or (base.device == "auto" and torch.cuda.is_available())
    if base.device.startswith("cuda:"):
        raise base.error(f"device {base.device!r}: each of {grid.size} processes has a GPU of its own; say cuda")
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise base.error(f"device: process {local} of this host has no GPU of its own ({torch.cuda.device_count()} are there)")
        torch.cuda.set_device(local)
        base = replace(base, device=f"cuda:{local}")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    return base


def first() -> bool:
    """Whether this process speaks and writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def leave() -> None:
    """The end of what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
