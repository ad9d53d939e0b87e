"""Run a function of a module in several processes with gloo, or NCCL, between them."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Ranks are forked off one process that has imported all they need: each by itself would be busy with that for most of its time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.dist.ready"])


def run(function: str, count: int, *args: Any, seconds: float = 600.0, backend: str = "gloo") -> list[Any]:
    """What `module:name(*args)` returns on each rank; None where the process ended within.

    Raises:
        RuntimeError: with what the first rank that failed wrote; all are ended then.
    """
    with tempfile.TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # ranks with gloo compute on the CPU; nothing else is told to the server
            forkserver.ensure_running()
        # A process that asked for a GPU, as what is captured does, has none in those that are forked off it.
        context = CONTEXT if backend == "gloo" else multiprocessing.get_context("spawn")
        ranks = {
            rank: context.Process(target=_rank, args=(function, Path(folder), rank, count, args, backend), daemon=True)
            for rank in range(count)
        }
        try:
            for process in ranks.values():
                process.start()
            _wait(ranks, Path(folder), seconds)
        finally:
            for process in ranks.values():
                process.kill()
                process.join()
        results = [Path(folder) / f"{rank}.result" for rank in range(count)]
        return [pickle.loads(result.read_bytes()) if result.exists() else None for result in results]


def _sharing(rank: int, count: int, devices: int) -> dict[str, str]:
    """What lets ranks share GPUs where there are fewer: right, not fast, for their contexts take turns.

    NCCL refuses two ranks on one GPU, unless it takes them for two hosts; torch takes memory of one GPU for shared when told so.
    """
    if count <= devices:
        return {}
    hosts = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0"}
    return hosts | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}


def _wait(ranks: Mapping[int, Any], folder: Path, seconds: float) -> None:
    waiting, end = dict(ranks), time.monotonic() + seconds
    while waiting:
        connection.wait([process.sentinel for process in waiting.values()], max(end - time.monotonic(), 0.0))
        for rank, process in list(waiting.items()):
            if process.exitcode is None:
                continue
            del waiting[rank]
            if process.exitcode:
                raise RuntimeError(f"rank {rank} failed:\n{_tail(folder, rank)}")
        if waiting and time.monotonic() > end:
            for process in waiting.values():
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
            logs = "\n".join(f"rank {rank}:\n{_tail(folder, rank)}" for rank in waiting)
            raise RuntimeError(f"ranks {sorted(waiting)} go on after {seconds} s:\n{logs}")


def _tail(folder: Path, rank: int) -> str:
    log = folder / f"{rank}.log"
    return log.read_text()[-6000:] if log.exists() else "(nothing)"


def _rank(function: str, folder: Path, rank: int, count: int, args: tuple[Any, ...], backend: str) -> None:
    import torch
    import torch.distributed as dist

    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    # On a signal, not by faulthandler's own clock: that reads frames while they change, and was seen to crash.
    faulthandler.register(signal.SIGUSR1)
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(str(folder / "store"), count)
    if backend == "nccl":
        os.environ |= _sharing(rank, count, torch.cuda.device_count())
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=100))
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(*args)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    with contextlib.suppress(RuntimeError):  # others may still read what this one sent, or be gone
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # not by way of destructors, which wait for ranks that may be gone
