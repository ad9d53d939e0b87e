"""Run a function of a module in several processes with gloo, or NCCL, between them."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(function: str, count: int, *args: Any, seconds: float = 240.0, backend: str = "gloo") -> list[Any]:
    """What `module:name(*args)` returns on each rank; None where the process ended within.

    Raises:
        RuntimeError: with what the first rank that failed wrote; all are ended then.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "args").write_bytes(pickle.dumps(args))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count), "BACKEND": backend}
        outs = [(path / f"{rank}.log").open("w+") for rank in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.dist.processes", function, folder],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=outs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]
        try:
            waiting = dict(enumerate(processes))
            end = datetime.datetime.now().timestamp() + seconds
            while waiting:
                for rank, process in list(waiting.items()):
                    try:
                        code = process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        continue
                    del waiting[rank]
                    if code:
                        raise RuntimeError(f"rank {rank} failed:\n{_tail(path / f'{rank}.log')}")
                if datetime.datetime.now().timestamp() > end:
                    for rank in waiting:
                        processes[rank].send_signal(signal.SIGUSR1)
                    time.sleep(1)
                    logs = "\n".join(f"rank {rank}:\n{_tail(path / f'{rank}.log')}" for rank in waiting)
                    raise RuntimeError(f"ranks {sorted(waiting)} go on after {seconds} s:\n{logs}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for out in outs:
                out.close()
        results = [path / f"{rank}.result" for rank in range(count)]
        return [pickle.loads(result.read_bytes()) if result.exists() else None for result in results]


def _tail(path: Path) -> str:
    return path.read_text()[-6000:]


def main() -> None:
    import faulthandler

    import torch
    import torch.distributed as dist

    # On a signal, not by faulthandler's own clock: that reads frames while they change, and was seen to crash.
    faulthandler.register(signal.SIGUSR1)
    function, folder = sys.argv[1:]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    if os.environ["BACKEND"] == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(os.environ["BACKEND"], store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=100))
    module, _, name = function.partition(":")
    args = pickle.loads((Path(folder) / "args").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    with contextlib.suppress(RuntimeError):  # others may still read what this one sent, or be gone
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # not by way of destructors, which wait for ranks that may be gone


if __name__ == "__main__":
    main()
