"""One GPU as one rank of two whose other one answers at once: what a mesh gains, as far as one GPU can tell.

    python -m benchmarks.run mirror --workload llama3-8b-mux --mesh tp=2 --loads light heavy --interleaved 0 3 --out mirror.json
    python -m benchmarks.run mirror --workload llama3-8b-mux --mesh pp=2 --loads heavy light --out mirror.json

All that a rank does is done: its products, its records, its lanes, its optimizer steps. Of `tp=2` the first shard runs; a sum
copies an eighth of its bytes out of pinned memory, by copy engine as over NVLink, through the slower PCIe, and adds what is there.
Of `pp=2` one stage runs after the other; what it receives is noise. Nobody is waited for. The simulator then plays both stages with
the measured seconds of their parts, in the order in which they ran ("replayed"): what two such GPUs would take, if nothing came
between them but what they send. So losses are not those of the model, and only that they are finite is checked; what two GPUs
really do, `benchmarks.run ranks` measures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from benchmarks.mux import Batch, Engine, Mix, mixes
from benchmarks.ranks import Groups, Recorded, Way, drained, flowing, forecasted, one_lane, simulated, timed, trace_file
from muxcompile.planner import interleaved
from runtime import comm, symmetric
from runtime.comm import Mesh
from runtime.symmetric import Board, Form, Pipe, Sums

# Bytes over NVLink to those over PCIe in the same time.
_SLOWER = 8


class Mirror:
    """`runtime.symmetric.Shared` of two ranks, whose other one has noise and is never late."""

    def __init__(self, nbytes: int, group: Any, device: torch.device, timeout: float) -> None:
        self.nbytes, self.rank, self.count = nbytes, dist.get_rank(group), 2
        # As large as embedded tokens are.
        noise = (0.02 * torch.randn(-(-nbytes // 2), device=device)).bfloat16().view(torch.uint8)
        self._memory = [noise, noise.clone()]
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.afar = torch.zeros(nbytes // _SLOWER, dtype=torch.uint8, pin_memory=device.type == "cuda")

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
    """In place of `Sums._both`: the host sends."""
    tensor, shared = tensor.contiguous(), self.shared
    assert isinstance(shared, Mirror)
    there = shared.view(0, start, (tuple(tensor.shape), tensor.dtype))
    count = tensor.nbytes // _SLOWER
    shared.view(0, start, ((count,), torch.uint8)).copy_(shared.afar[:count], non_blocking=True)
    shared.tell(1, 1)
    shared.wait(1, 1)
    return torch.add(tensor, there)


def _read(self: Board, place: int, wanted: Form) -> Tensor:
    """In place of `Board.read`: the other one has posted the same."""
    return torch.stack([self._view(self.shared.rank, place, self.shared.rank, wanted)] * 2)


def _objects(self: comm.Ranks, own: Any) -> list[Any]:
    """In place of `Ranks.objects`: the other one says the same, but of its own stage and tables."""
    other = own
    if self.mesh.pp > 1 and isinstance(own, list):  # names of tables
        other = []
    elif self.mesh.pp > 1 and isinstance(own, tuple) and own[0] == self.stage:  # what it receives: hidden values; some have more
        other = (1 - self.stage, {self.stage: 2 * max(own[1].values(), default=0)}, own[2])
    return [other, own] if self.rank else [own, other]


@contextlib.contextmanager
def alone(device: str, rank: int) -> Iterator[None]:
    """Within, this process is one rank of two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    new_group = dist.new_group
    host = [
        (torch.cuda, "synchronize", lambda *given: None),
        (torch.cuda, "Stream", lambda *given: None),
        (Pipe, "send", lambda self, tensors: lambda: None),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name, instead in (
            (dist, "new_group", lambda ranks=None, **rest: new_group(ranks)),
            (comm, "Shared", Mirror),
            (symmetric, "reachable", lambda found, gather: True),
            *(host if device == "cpu" else []),
            (Sums, "_both", _both),
            (Board, "read", _read),
            (comm.Ranks, "objects", _objects),
            (comm.Ranks, "gather", lambda self, tensor, group: torch.stack([tensor] * self.size(group))),
            (comm.Ranks, "barrier", lambda self: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, instead))
        yield
    dist.destroy_process_group()


def mirror(arguments: argparse.Namespace) -> dict[str, Any]:
    """One GPU by our plan for one; then every rank, load and number of groups, of shards also one micro-batch at a time."""
    from benchmarks.run import versions

    began = time.perf_counter()
    mesh = Mesh.parse(arguments.mesh or "tp=2")
    if mesh.size != 2 or mesh.dp > 1:
        raise ValueError(f"--mesh {mesh}: mirror is of pp=2 or of tp=2")
    whole, device = WORKLOADS[arguments.workload], torch.device(arguments.device)
    names = list(whole.tasks)[: arguments.tasks]
    workload = replace(whole, tasks={name: whole.tasks[name] for name in names})
    backbone = workload.backbone(arguments.device, arguments.layers)
    known = {mix.load: mix for mix in mixes(names, [len(names)]) if mix.kind == arguments.lengths}
    rounds = {
        load: [known[load].batch(step, _ids(workload, mesh)) for step in range(arguments.successive)] for load in arguments.loads
    }
    loads: dict[str, Any] = {load: {} for load in rounds}
    report: dict[str, Any] = {
        "benchmark": "mirror",
        "workload": workload.name,
        "layers": arguments.layers or workload.model["num_hidden_layers"],
        "mesh": str(mesh),
        "tasks": len(names),
        "rounds": arguments.successive,
        "versions": versions(arguments.device, arguments.commit),
        "gate": {"passed": True},
        "loads": loads,
    }

    def tell(load: str, name: str, own: dict[str, Any]) -> None:
        loads[load].setdefault(name, {}).update(own)
        figures = [f"{key} {value:.3f}" for key, value in own.items() if isinstance(value, float)]
        print(f"[{time.perf_counter() - began:5.0f} s] {load} {name}: {', '.join(figures)}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    if "one GPU".startswith(tuple(arguments.only)):
        single = Engine(workload, backbone)
        gate.start_weights(single.model, names[:2])
        for load, given in rounds.items():
            plan, _, _ = single.planned(known[load])
            figures, losses, _ = timed(single, plan, drained, given, device, alone=True)
            report["gate"]["passed"] &= all(map(math.isfinite, losses))
            tell(load, "one GPU", figures)
        del single
        _clear(device)
    seen: dict[tuple[str, str], Recorded] = {}
    for rank in range(mesh.pp):
        with alone(arguments.device, rank):
            engine = Engine(workload, backbone, mesh=str(mesh))
            gate.start_weights(engine.model, names[:2])
            for load, given in rounds.items():
                base = loads[load].get("one GPU", {}).get("seconds")
                for name, own, finite in _measured(engine, known[load], given, rank, seen, base, arguments):
                    report["gate"]["passed"] &= finite
                    tell(load, name, own)
            del engine
        _clear(device)
    return report


def _measured(
    engine: Engine,
    mix: Mix,
    rounds: Sequence[Batch],
    rank: int,
    seen: dict[tuple[str, str], Recorded],
    base: float | None,
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """What a rank takes for a load's rounds, each way; behind the last rank also what all take together.

    Args:
        seen: what earlier ranks did, by load and way; this one's is added.
        base: seconds of one GPU, if they are known.

    Yields:
        Names, figures, and whether all losses were finite.
    """
    mesh, load = engine.model._ranks.mesh, mix.load
    for name, groups, flight, run in _ways(engine, mix, arguments.interleaved):
        figures, losses, trace = timed(engine, groups, run, rounds, engine.device, flight=flight, alone=True)
        own = seen.setdefault((load, name), Recorded(trace.runs, {}))
        assert own.runs == trace.runs, "stages run programs of their own"
        own.spans[rank] = trace.actions(engine.model._ranks.stage)
        found = {key: figures[key] for key in ("groups", "flight")}
        found |= {f"rank {rank}": figures["seconds"], f"bubble {rank}": figures["bubbles"][0]}
        if rank == mesh.pp - 1:
            file = trace_file(arguments.traces, f"{load} {name}")
            played = simulated(engine, forecasted(engine, mix), own, rounds, figures["seconds"], file)
            together = played["simulated"]["replayed"] if mesh.pp > 1 else figures["seconds"]
            found |= played["simulated"] | {"parts": played["parts"]} | ({} if base is None else {"over_one_gpu": base / together})
        yield name, found, all(map(math.isfinite, losses))


def _ids(workload: Workload, mesh: Mesh) -> int:
    """Tokens to draw from; rows of another shard's part of the embedding would be zero."""
    return workload.model["vocab_size"] // mesh.tp


def _ways(engine: Engine, mix: Mix, counts: Sequence[int]) -> Iterator[tuple[str, Groups, tuple[int, ...], Way]]:
    """What to run: its name, groups, micro-batches in flight and order."""
    expected = forecasted(engine, mix)
    engine.compiler.planned = replace(engine.compiler.planned, forecast=expected)
    longest, mesh = {name: max(own) for name, own in mix.lengths.items()}, engine.model._ranks.mesh
    for count in counts:
        plan = interleaved(expected, mesh, longest, counts=[count] if count else [])
        groups = [(group.tasks, group.tokens) for group in plan.groups]
        name = f"{count} groups" if count else "ours"
        if mesh.pp > 1 or len(groups) > 1:
            yield name, groups, plan.flight, flowing
        if mesh.pp == 1:
            yield f"{name}, one at a time", groups, plan.flight, one_lane


def _clear(device: torch.device) -> None:
    """Records of an engine that is gone give their memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
