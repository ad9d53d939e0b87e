"""A function run by several processes at once, joined by gloo: what tests of meshes stand on."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240


def together(function: Callable[..., Any], count: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What `function(*args)` returned in each of `count` fresh processes, by rank.

    Args:
        function: at the top of a module, so that another process finds it; it begins inside an initialised process group.

    Raises:
        AssertionError: with the traceback of the first process that failed, or where one took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_run, args=(function, rank, count, folder, args), daemon=True) for rank in range(count)]
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(seconds)
        finally:
            late = [index for index, rank in enumerate(ranks) if rank.is_alive()]
            for rank in ranks:
                rank.kill()
        failed = sorted(Path(folder).glob("failed-*"), key=lambda path: path.stat().st_mtime)
        assert not failed, f"{failed[0].name}:\n{failed[0].read_text()}"
        assert not late, f"ranks {late} ran for more than {seconds} seconds"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(count)]


def _run(function: Callable[..., Any], rank: int, count: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        result = function(*args)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"failed-{rank}").write_text(traceback.format_exc())
        os._exit(1)
