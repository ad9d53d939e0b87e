"""Several GPUs against one: rounds of eight tasks on a mesh, by torchrun, against what other systems do on the same one.

    torchrun --nproc-per-node 2 -m benchmarks.run ranks --workload llama3-8b-mux --mesh pp=2 --out ranks.json

Contenders, all on the same engine, kernels and adapters, over the same rounds (mixes of `benchmarks.mux`, `--successive` of them):

- one GPU: our own plan for one, on the first rank alone;
- ours: the tasks in groups whose micro-batches interleave, successive rounds without a drain between them;
- ours, drained: the same groups, each round ends before the next begins;
- fused: all tasks share every chunk, at least four of them a round in 1F1B, each round ends before the next begins;
- one task after another: each task's step alone in 1F1B, drained, as an instance for each task would.

Every contender runs some of the rounds first; then all are measured. Learning rates are 0, so all compute the same losses: that
is checked, beside the gate against PEFT of the mesh's model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from benchmarks.mux import SEQUENCES, Batch, Engine, Mix, mixes
from codegen import tiling
from muxcompile.forecast import forecast
from muxcompile.options import Options
from passes.group import Shape, as_groups
from runtime.trace import Trace, chrome

Groups = Sequence[tuple[tuple[str, ...], int]]
# What an engine does of some rounds, and their losses.
Run = Callable[[Engine, Sequence[Batch]], list[dict[str, Any]]]
_WARM = 6


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", help="ranks: replicas, stages and shards, as 'pp=2'")
    parser.add_argument("--successive", type=int, default=20, help="ranks: successive steps of all tasks")
    parser.add_argument("--tasks", type=int, default=8, help="ranks: how many")
    parser.add_argument("--loads", nargs="+", choices=sorted(SEQUENCES), default=["heavy", "light"], help="ranks: which")
    parser.add_argument("--lengths", choices=("uniform", "non-uniform"), default="non-uniform", help="ranks: as the mixes of mux")
    parser.add_argument("--traces", type=Path, help="ranks: a folder for the times of what every rank computed, for Perfetto")
    parser.add_argument("--interleaved", type=int, nargs="+", default=[2, 3], help="ranks: numbers of groups that are tried")


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every load, every contender."""
    from benchmarks.run import versions

    device = _join(arguments.device)
    rank = dist.get_rank()
    whole = WORKLOADS[arguments.workload]
    names = list(whole.tasks)[: arguments.tasks]
    workload = replace(whole, tasks={name: whole.tasks[name] for name in names})
    backbone = workload.backbone(arguments.device, arguments.layers)
    known = {mix.load: mix for mix in mixes(names, [len(names)]) if mix.kind == arguments.lengths}
    report: dict[str, Any] = {
        "benchmark": "ranks",
        "workload": workload.name,
        "layers": arguments.layers or workload.model["num_hidden_layers"],
        "mesh": arguments.mesh,
        "tasks": len(names),
        "rounds": arguments.successive,
        "versions": versions(arguments.device, arguments.commit),
        "loads": {},
    }
    engine = Engine(workload, backbone, mesh=arguments.mesh)
    two = replace(workload, tasks={name: workload.tasks[name] for name in names[:2]})
    report["gate"] = gate.against_peft(two, engine.model, backbone, scale=1.0)
    if not report["gate"]["passed"]:
        return report
    single = Engine(workload, backbone) if rank == 0 else None
    if single is not None:
        gate.start_weights(single.model, names[:2])
    dist.barrier()
    for load in arguments.loads:
        found = _load(known[load], engine, single, workload, arguments, device)
        report["loads"][load] = found
        report["gate"]["passed"] &= found["losses_agree"]
        if rank == 0:
            print(_lines(found), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _join(device: str) -> torch.device:
    """Take this process's place among those that torchrun started."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def _load(
    mix: Mix, engine: Engine, single: Engine | None, workload: Workload, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    rounds = [mix.batch(step, workload.model["vocab_size"]) for step in range(arguments.successive)]
    tokens = sum(map(_tokens, rounds))
    names = tuple(mix.profiles)
    even = max(map(_tokens, rounds)) // 4
    micro = tiling.chunk_tokens(device, even, 0)
    small = tiling.chunk_tokens(device, min(even, 512), 0)
    contenders: dict[str, tuple[Groups, Run]] = {}
    for count, groups in dealt(engine, mix, arguments.interleaved).items():
        contenders[f"ours, {count} groups"] = (groups, _flowing)
        contenders[f"ours, {count} groups, drained"] = (groups, _drained)
    contenders["fused"] = ([(names, micro)], _drained)
    contenders["one task after another"] = ([(names, small)], _apart)
    found: dict[str, Any] = {"mix": mix.name, "tokens": tokens, "contenders": {}}
    losses: dict[str, list[float]] = {}
    if single is not None:
        plan, _, _ = single.planned(mix)
        found["contenders"]["one GPU"], losses["one GPU"] = _measured(single, plan, _drained, rounds, device, alone=True)
    dist.barrier()
    for name, (groups, run) in contenders.items():
        found["contenders"][name], losses[name] = _measured(engine, groups, run, rounds, device)
    if single is not None:
        base = found["contenders"]["one GPU"]["seconds"]
        for own in found["contenders"].values():
            own["over_one_gpu"] = base / own["seconds"]
    for name, own in found["contenders"].items():
        spans = own.pop("spans")
        if arguments.traces is not None:
            arguments.traces.mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"\W+", "-", f"{mix.load} {name} rank {dist.get_rank()}")
            (arguments.traces / f"{stem}.json").write_text(json.dumps(chrome({"measured": spans})))
    first = next(iter(losses.values()))
    worst = max(abs(a - b) / abs(b) for own in losses.values() for a, b in zip(own, first, strict=True))
    found["loss_difference_max"], found["losses_agree"] = worst, worst <= (1e-5 if workload.dtype == torch.float32 else 1e-2)
    return found


def _tokens(batch: Batch) -> int:
    return sum(len(example["input_ids"]) for given in batch.values() for example in given)


def dealt(engine: Engine, mix: Mix, counts: Sequence[int]) -> dict[int, Groups]:
    """For each number of groups, tasks in groups of about as many tokens, in chunks of the size that is best for the largest."""
    adapters = [
        replace(own, task=replace(own.task, lengths=mix.lengths[name], batch_size=SEQUENCES[mix.load]))
        for name, own in engine.adapters.items()
    ]
    shapes = [Shape(tokens) for tokens in tiling.chunk_sizes(engine.device)]
    found = forecast(engine.compiler.model, engine.device, adapters, Options(), shapes, None, surveyed=engine.survey)
    order, steps = [adapter.task.name for adapter in adapters], found.sizing()
    weight = {name: sum(mix.lengths[name]) / len(mix.lengths[name]) for name in mix.profiles}
    answers: dict[int, Groups] = {}
    for count in counts:
        groups: list[list[str]] = [[] for _ in range(count)]
        for name in sorted(weight, key=lambda name: -weight[name]):
            min(groups, key=lambda own: sum(weight[task] for task in own)).append(name)
        partition = [[order.index(name) for name in own] for own in groups]
        sized = as_groups(partition, found.loads, found.model, cap=None, base_bytes=0, switch=0.0, steps=steps)
        tokens = max(group.shape.tokens for group in sized.groups)
        answers[count] = [(tuple(own), tokens) for own in groups]
    return answers


def _flowing(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [result.losses for result in engine.model.step_rounds(rounds)]


def _drained(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [engine.model.step(batch).losses for batch in rounds]


def _apart(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [{name: engine.model.step({name: given}).losses[name] for name, given in batch.items()} for batch in rounds]


def _measured(
    engine: Engine, groups: Groups, run: Run, rounds: Sequence[Batch], device: torch.device, *, alone: bool = False
) -> tuple[dict[str, Any], list[float]]:
    """Seconds of all rounds, the losses of the last, and every rank's bubble."""
    engine.use(groups)
    for _ in range(2):  # the first launches, the second records
        run(engine, rounds[:_WARM])
    trace = Trace(device)
    for executor in engine.model._executors:
        executor.trace = trace
    _wait(device, alone=alone)
    start = time.perf_counter()
    found = run(engine, rounds)
    _wait(device, alone=alone)
    seconds = time.perf_counter() - start
    for executor in engine.model._executors:
        executor.trace = None
    own = trace.bubble()
    bubbles: list[Any] = [own]
    if not alone:
        bubbles = [None] * dist.get_world_size()
        dist.all_gather_object(bubbles, own)
    figures = {
        "groups": [{"tasks": len(names), "chunk": size} for names, size in groups],
        "seconds": seconds,
        "tokens_per_second": sum(map(_tokens, rounds)) / seconds,
        "bubbles": bubbles,
    }
    ranks = getattr(engine.model, "_ranks", None)
    figures["spans"] = [span for run in trace.actions(0 if ranks is None else ranks.stage) for span in run]
    return figures, [float(value) for value in found[-1].values()]


def _wait(device: torch.device, *, alone: bool) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if not alone:
        dist.barrier()


def _lines(found: dict[str, Any]) -> str:
    lines = [found["mix"]]
    for name, own in found["contenders"].items():
        chunks = "+".join(f"{group['tasks']}@{group['chunk']}" for group in own["groups"])
        bubbles = ", ".join(f"{value:.1%}" for value in own["bubbles"])
        lines.append(
            f"  {name:30} {chunks:24} {own['seconds']:8.3f} s {own['tokens_per_second']:9.0f} tokens/s "
            f"{own['over_one_gpu']:5.2f}x one GPU, bubbles {bubbles}"
        )
    return "\n".join(lines)
