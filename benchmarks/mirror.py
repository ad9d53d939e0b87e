"""One GPU as the first of two shards whose other one answers at once: what lanes gain, where there is no second GPU.

    python -m benchmarks.run mirror --workload llama3-8b-mux --loads light heavy --interleaved 0 3 --out mirror.json

All that a shard of `tp=2` does is done: its products, its records, its lanes, its optimizer steps. A sum copies an eighth of its
bytes out of pinned memory, by copy engine as over NVLink, through the slower PCIe, and adds zeros; nobody is waited for. So losses
are not those of the model, and only that they are finite is checked; what two GPUs really do, `benchmarks.run ranks` measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import WORKLOADS
from benchmarks.mux import Engine, mixes
from benchmarks.ranks import flowing, forecasted, one_lane, timed
from muxcompile.planner import interleaved
from runtime import comm, symmetric
from runtime.symmetric import Board, Form, Sums

# Bytes over NVLink to those over PCIe in the same time, and the most of a sum that is copied.
_SLOWER, _MOST = 8, 1 << 20


class Mirror:
    """`runtime.symmetric.Shared` of two ranks, whose other one has zeros and is never late."""

    def __init__(self, nbytes: int, group: Any, device: torch.device, timeout: float) -> None:
        self.nbytes, self.rank, self.count = nbytes, 0, 2
        self._memory = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.afar = torch.zeros(_MOST, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def view(self, rank: int, start: int, form: Form) -> Tensor:
        shape, dtype = form
        return self._memory[rank][start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def meet(self, channel: int) -> None:
        self._flag.add_(1)

    def tell(self, rank: int, channel: int) -> None:
        self._flag.add_(1)

    def wait(self, rank: int, channel: int) -> None:
        self._flag.add_(1)


def _both(self: Sums, tensor: Tensor, start: int) -> Tensor:
    """In place of `Sums._both`: zeros come from the host."""
    tensor, shared = tensor.contiguous(), self.shared
    count = min(tensor.nbytes // _SLOWER, _MOST)
    shared.view(0, start, ((count,), torch.uint8)).copy_(shared.afar[:count], non_blocking=True)
    shared.tell(1, 1)
    shared.wait(1, 1)
    return torch.add(tensor, shared.view(0, start, (tuple(tensor.shape), tensor.dtype)))


def _read(self: Board, number: int, wanted: Form) -> Tensor:
    """In place of `Board.read`: the other one has posted the same."""
    return torch.stack([self._place(0, number % self.room, 0, wanted)] * 2)


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """Within, this process is rank 0 of two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    new_group = dist.new_group
    with contextlib.ExitStack() as patches:
        for owner, name, instead in (
            (dist, "new_group", lambda ranks=None, **rest: new_group(ranks)),
            (comm, "Shared", Mirror),
            (symmetric, "reachable", lambda found, gather: True),
            *([] if device == "cuda" else [(torch.cuda, "synchronize", lambda *given: None)]),
            (Sums, "_both", _both),
            (Board, "read", _read),
            (comm.Ranks, "objects", lambda self, own: [own, own]),
            (comm.Ranks, "gather", lambda self, tensor, group: torch.stack([tensor] * self.size(group))),
            (comm.Ranks, "barrier", lambda self: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, instead))
        yield
    dist.destroy_process_group()


def mirror(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every load and number of groups, in lanes and one micro-batch at a time."""
    from benchmarks.run import versions

    began = time.perf_counter()
    whole, device = WORKLOADS[arguments.workload], torch.device(arguments.device)
    names = list(whole.tasks)[: arguments.tasks]
    workload = replace(whole, tasks={name: whole.tasks[name] for name in names})
    known = {mix.load: mix for mix in mixes(names, [len(names)]) if mix.kind == arguments.lengths}
    report: dict[str, Any] = {
        "benchmark": "mirror",
        "workload": workload.name,
        "layers": arguments.layers or workload.model["num_hidden_layers"],
        "tasks": len(names),
        "rounds": arguments.successive,
        "versions": versions(arguments.device, arguments.commit),
        "gate": {"passed": True},
        "loads": {},
    }
    with alone(arguments.device):
        engine = Engine(workload, workload.backbone(arguments.device, arguments.layers), mesh="tp=2")
        for load in arguments.loads:
            mix = known[load]
            # Rows of the other half of the embedding would be zero.
            rounds = [mix.batch(step, workload.model["vocab_size"] // 2) for step in range(arguments.successive)]
            expected = forecasted(engine, mix)
            engine.compiler.planned = replace(engine.compiler.planned, forecast=expected)
            longest, mesh = {name: max(own) for name, own in mix.lengths.items()}, engine.model._ranks.mesh
            report["loads"][load] = found = {}
            for count in arguments.interleaved:
                plan = interleaved(expected, mesh, longest, counts=[count] if count else [], more=[0])
                groups = [(group.tasks, group.tokens) for group in plan.groups]
                name = "+".join(f"{len(tasks)}@{tokens}" for tasks, tokens in groups)
                for way, run in (("in lanes", flowing), ("one at a time", one_lane)):
                    if way == "in lanes" and len(groups) == 1:
                        continue
                    figures, losses, _ = timed(engine, groups, run, rounds, device, alone=True)
                    report["gate"]["passed"] &= all(map(math.isfinite, losses))
                    found[f"{name} {way}"] = figures
                    told = f"{figures['seconds']:8.3f} s, bubble {figures['bubbles'][0]:.1%}"
                    print(f"[{time.perf_counter() - began:5.0f} s] {load} {name} {way:14} {told}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return report
