"""Several GPUs against one: rounds of eight tasks on a mesh, by torchrun, against what other systems do on the same one.

    torchrun --nproc-per-node 2 -m benchmarks.run ranks --workload llama3-8b-mux --mesh pp=2 --out ranks.json

Contenders, all on the same engine, kernels and adapters, over the same rounds (mixes of `benchmarks.mux`, `--successive` of them):

- one GPU: our own plan for one, on the first rank alone;
- ours: the planner's groups, whose micro-batches interleave, as many on their way as it says, successive rounds without a drain
  between them;
- ours, drained: the same groups, each round ends before the next begins; on one stage of several shards "ours, no overlap"
  instead: the same groups and rounds, one micro-batch at a time;
- fused: all tasks share every chunk, at least four of them a round in 1F1B, each round ends before the next begins;
- one task after another: each task's step alone in 1F1B, drained, as an instance for each task would.

Every contender runs the rounds first, so that all that they launch is recorded; then they are measured. Learning rates are 0, so
all compute the same losses: that is checked, beside the gate against PEFT of the mesh's model.

What the mesh ran is then played by the simulator, in the order in which it ran: "predicted", with the cost model's seconds (with
`--calibrated`, of regions that are timed first), and "replayed", with the measured mean seconds of every stage's forwards,
backwards and optimizer steps of each group. Both say how many times the measured seconds they are. "predicted" off and "replayed"
right is a fault of the cost model's; both off, of what lies between: transfers, the host, the order of play.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from benchmarks.mux import SEQUENCES, Batch, Engine, Mix, mixes
from codegen import tiling
from codegen.links import fabric
from codegen.lower import Target
from muxcompile.forecast import Forecast, forecast
from muxcompile.heap import settled
from muxcompile.options import Options
from muxcompile.planner import interleaved
from passes.cost import CostModel, keys
from passes.loads import Shape
from passes.measure import measure, name_of
from passes.parallel import StageCosts, sections
from passes.replay import measured, play, predicted
from runtime.comm import Mesh
from runtime.simulate import Span, Timeline
from runtime.trace import Run, Trace, aligned, chrome

Groups = Sequence[tuple[tuple[str, ...], int]]
# What an engine does of some rounds, and their losses.
Way = Callable[[Engine, Sequence[Batch]], list[dict[str, Any]]]
_WARM = 2
# Rows of the chunks that `--calibrated` times: between them ratios of measured and predicted seconds are drawn as straight lines.
_TIMED = (512, 2048, 8192)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", help="ranks: replicas, stages and shards, as 'pp=2'")
    parser.add_argument("--successive", type=int, default=20, help="ranks, mirror: successive steps of all tasks")
    parser.add_argument("--tasks", type=int, default=8, help="ranks, mirror: how many")
    parser.add_argument("--loads", nargs="+", choices=sorted(SEQUENCES), default=["heavy", "light"], help="ranks, mirror: which")
    parser.add_argument(
        "--lengths", choices=("uniform", "non-uniform"), default="non-uniform", help="ranks, mirror: as the mixes of mux"
    )
    parser.add_argument(
        "--traces", type=Path, help="ranks, mirror: a folder for a file of each contender on the mesh, for Perfetto"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="ranks: those on the mesh whose names begin so")
    parser.add_argument(
        "--interleaved", type=int, nargs="+", default=[0], help="ranks, mirror: numbers of groups; 0: the planner's"
    )


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every load, every contender."""
    from benchmarks.run import versions

    began = time.perf_counter()
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
    _say("the backbone is there", began)
    engine = Engine(workload, backbone, mesh=arguments.mesh)
    _say(f"compiled for {arguments.mesh}", began)
    if arguments.calibrated:
        calibrate(engine, known[arguments.loads[0]])  # lengths of all loads are alike
        _say("calibrated", began)
    report["calibrated"] = arguments.calibrated
    two = replace(workload, tasks={name: workload.tasks[name] for name in names[:2]})
    report["gate"] = gate.against_peft(two, engine.model, backbone, scale=1.0)
    if not report["gate"]["passed"]:
        return report
    _say("gate passed", began)
    single = Engine(workload, backbone) if rank == 0 else None
    if single is not None:
        gate.start_weights(single.model, names[:2])
    dist.barrier()
    alone = {} if single is None else {load: _alone(single, known[load], workload, arguments, device) for load in arguments.loads}
    if single is not None:  # its records would take the memory of the mesh's
        single = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    _say("measured on one GPU", began)
    for load in arguments.loads:
        found = _load(known[load], engine, alone.get(load), workload, arguments, device)
        _say(f"measured {load}", began)
        report["loads"][load] = found
        report["gate"]["passed"] &= found["losses_agree"]
        if rank == 0:
            print(_lines(found), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _say(what: str, began: float) -> None:
    """Where a run is that takes minutes."""
    if dist.get_rank() == 0:
        print(f"[{time.perf_counter() - began:5.0f} s] {what}", flush=True)


def _join(device: str) -> torch.device:
    """Take this process's place among those that torchrun started."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def _batches(mix: Mix, workload: Workload, arguments: argparse.Namespace) -> list[Batch]:
    return [mix.batch(step, workload.model["vocab_size"]) for step in range(arguments.successive)]


def _alone(
    single: Engine, mix: Mix, workload: Workload, arguments: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[float]]:
    """One GPU's figures, and its losses."""
    plan, _, _ = single.planned(mix)
    figures, losses, _ = timed(single, plan, drained, _batches(mix, workload, arguments), device, alone=True)
    return figures, losses


def _load(
    mix: Mix,
    engine: Engine,
    alone: tuple[dict[str, Any], list[float]] | None,
    workload: Workload,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """All contenders; `alone`: what the first rank found of one GPU."""
    rounds = _batches(mix, workload, arguments)
    tokens = sum(map(_tokens, rounds))
    names = tuple(mix.profiles)
    even = max(map(_tokens, rounds)) // 4
    micro = tiling.chunk_tokens(device, even, 0)
    small = tiling.chunk_tokens(device, min(even, 512), 0)
    expected = forecasted(engine, mix)
    # Stages' seconds, by which micro-batches are put in order, are those of these lengths.
    engine.compiler.planned = replace(engine.compiler.planned, forecast=expected)
    contenders: dict[str, tuple[Groups, Way, tuple[int, ...]]] = {}
    longest, mesh = {name: max(own) for name, own in mix.lengths.items()}, engine.model._ranks.mesh
    for count in arguments.interleaved:
        plan = interleaved(expected, mesh, longest, counts=[count] if count else [])
        groups = [(group.tasks, group.tokens) for group in plan.groups]
        name = f"ours, {count} groups" if count else "ours"
        contenders[name] = (groups, flowing, plan.flight)
        if mesh.pp == 1 < len(groups):
            contenders[f"{name}, no overlap"] = (groups, one_lane, plan.flight)
        elif mesh.pp > 1:
            contenders[f"{name}, drained"] = (groups, drained, plan.flight)
    contenders["fused"] = ([(names, micro)], drained, ())
    contenders["one task after another"] = ([(names, small)], _apart, ())
    contenders = {name: own for name, own in contenders.items() if name.startswith(tuple(arguments.only))}
    found: dict[str, Any] = {"mix": mix.name, "tokens": tokens, "contenders": {}}
    losses: dict[str, list[float]] = {}
    if alone is not None:
        found["contenders"]["one GPU"], losses["one GPU"] = alone
    for name, (among, run, flight) in contenders.items():
        own, losses[name], trace = timed(engine, among, run, rounds, device, flight=flight)
        found["contenders"][name] = own
        seen = _recorded(engine, trace)
        if alone is not None:
            own |= simulated(engine, expected, seen, rounds, own["seconds"], trace_file(arguments.traces, f"{mix.load} {name}"))
    if alone is not None:
        base = found["contenders"]["one GPU"]["seconds"]
        for own in found["contenders"].values():
            own["over_one_gpu"] = base / own["seconds"]
    first = next(iter(losses.values()))
    worst = max(abs(a - b) / abs(b) for own in losses.values() for a, b in zip(own, first, strict=True))
    # A task that was stopped has no loss.
    worst = worst if all(math.isfinite(value) for own in losses.values() for value in own) else math.inf
    found["loss_difference_max"], found["losses_agree"] = worst, worst <= (1e-5 if workload.dtype == torch.float32 else 1e-2)
    return found


def _tokens(batch: Batch) -> int:
    return sum(len(example["input_ids"]) for given in batch.values() for example in given)


def trace_file(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "-", name)
    return folder / f"{stem}.json"


def forecasted(engine: Engine, mix: Mix) -> Forecast:
    """What the tasks of a mix ask of the device, by its measured regions where there are any."""
    adapters = [
        replace(own, task=replace(own.task, lengths=mix.lengths[name], batch_size=SEQUENCES[mix.load]))
        for name, own in engine.adapters.items()
    ]
    shapes = [Shape(tokens) for tokens in tiling.chunk_sizes(engine.device)]
    return forecast(engine.compiler.model, engine.device, adapters, Options(), shapes, None, surveyed=engine.survey)


def calibrate(engine: Engine, mix: Mix) -> None:
    """Time the regions, on the first rank; forecasts from now on, of all ranks of this host, are made by the table.

    The regions are those of one shard without its sums, which links price.
    """
    ranks = engine.model._ranks
    engine.survey = forecasted(engine, mix).model.survey
    if ranks.rank == 0:
        lengths = [length for own in mix.lengths.values() for length in own[:4]]
        sizes = [tiling.chunk_tokens(engine.device, tokens, 0) for tokens in _TIMED]
        adapters, target = list(engine.adapters.values()), Target.of(engine.device)
        path = measure(engine.compiler.model, adapters, engine.survey, sizes, device=engine.device, target=target, lengths=lengths)
        print(f"timed chunks of {', '.join(map(str, sizes))}: {path}", flush=True)
    ranks.barrier()


class Recorded(NamedTuple):
    """What ran on the mesh: the runs, and by process of the first replica its number and the spans of each run."""

    runs: list[Run]
    spans: dict[int, list[list[Span]]]


def _recorded(engine: Engine, trace: Trace) -> Recorded:
    ranks = engine.model._ranks
    parts = ranks.objects(trace.actions(ranks.stage))
    return Recorded(trace.runs, {rank: own for rank, own in enumerate(parts) if ranks.mesh.place(rank)[0] == 0})


def simulated(
    engine: Engine, expected: Forecast, seen: Recorded, rounds: Sequence[Batch], seconds: float, file: Path | None
) -> dict[str, Any]:
    """The same rounds, played by the simulator; of every stage's parts their seconds, predicted and measured."""
    costs = costs_of(engine, expected.model, seen.runs, rounds)
    extras = costs.cost.survey.extras(list(engine.adapters))
    ways = {
        "predicted": predicted(seen.runs, costs, extras),
        "replayed": measured(seen.runs, list(seen.spans.values())),
    }
    timelines = {name: play(seen.runs, own, lambda rows: costs.transfer(Shape(rows))) for name, own in ways.items()}
    if file is not None:
        file.write_text(json.dumps(lanes(seen, timelines["predicted"], engine.model._ranks.mesh)))
    totals = {name: sum(own.seconds for own in each) for name, each in timelines.items()}
    spent = [[own for each in seen.spans.values() for own in each[run]] for run in range(len(seen.runs))]
    return {
        # Of the measured seconds those in which no run was on its way: the host prepares the next one.
        "between_runs": seconds - sum(max(own.end for own in run) - min(own.start for own in run) for run in spent),
        "simulated": totals,
        "simulated_over_measured": {name: own / seconds for name, own in totals.items()},
        "parts": [
            {
                "part": f"{part.kind} of stage {part.stage}",
                "tasks": len(part.tasks),
                "chunk": part.rows,
                "predicted": ways["predicted"][part],
                "measured": own,
            }
            for part, own in sorted(ways["replayed"].items())
        ],
    }


def costs_of(engine: Engine, model: CostModel, runs: Sequence[Run], rounds: Sequence[Batch]) -> StageCosts:
    """Prices of the mesh's stages for the sequences that really ran, in the chunks that held them."""
    mesh = engine.model._ranks.mesh
    examples = [example for batch in rounds for given in batch.values() for example in given]
    lengths = [len(example["input_ids"]) for example in examples]
    labelled = sum(label != -100 for example in examples for label in example["labels"][1:])
    # Of all replicas, of which the runs are one's.
    rows = mesh.dp * sum(sum({own.micro: run.rows[own.micro] for own in run.program}.values()) for run in runs)
    own = replace(model, keys=keys(lengths) * sum(lengths) / rows, labelled=labelled / rows)
    found = StageCosts(own, mesh, fabric(name_of(engine.device)), sections(own.survey), engine.compiler.ends)
    assert found.stops[-1] == len(found.sections), f"{found.stops} of {len(found.sections)} regions"
    return found


def lanes(seen: Recorded, timelines: Sequence[Timeline], mesh: Mesh) -> dict[str, Any]:
    """Every process with what was predicted of its stage, and what was measured there."""

    def of(rank: int, spans: Iterable[Span]) -> list[Span]:
        return [own._replace(action=replace(own.action, rank=rank)) for own in spans]

    whole = aligned(timelines, [[own for each in seen.spans.values() for own in each[run]] for run in range(len(seen.runs))])
    expected = [own for rank in seen.spans for own in of(rank, (each for each in whole if each.action.rank == mesh.place(rank)[1]))]
    return chrome(
        {"predicted": expected, "measured": [own for rank, each in seen.spans.items() for run in each for own in of(rank, run)]}
    )


def flowing(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [result.losses for result in engine.model.step_rounds(rounds)]


def drained(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [engine.model.step(batch).losses for batch in rounds]


def one_lane(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    pipeline = engine.model._pipeline
    flight, pipeline.flight = pipeline.flight, (1,)
    found = flowing(engine, rounds)
    pipeline.flight = flight
    return found


def _apart(engine: Engine, rounds: Sequence[Batch]) -> list[dict[str, Any]]:
    return [{name: engine.model.step({name: given}).losses[name] for name, given in batch.items()} for batch in rounds]


def timed(
    engine: Engine,
    groups: Groups,
    run: Way,
    rounds: Sequence[Batch],
    device: torch.device,
    *,
    flight: tuple[int, ...] = (),
    alone: bool = False,
) -> tuple[dict[str, Any], list[float], Trace]:
    """Seconds of all rounds with every rank's bubble, the losses of the last round, and the trace."""
    engine.use(groups, flight)
    run(engine, rounds[:_WARM])  # the first launches, the second records: a long sequence now and then asks for a record of its own
    run(engine, rounds)
    _wait(device, alone=alone)
    # Behind a barrier, so that the clocks of all ranks begin together.
    trace = Trace(device)
    for executor in engine.model._executors:
        executor.trace = trace
    with settled():  # as `muxcompile train` does
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
        "flight": flight or engine.flight,
        "seconds": seconds,
        "tokens_per_second": sum(map(_tokens, rounds)) / seconds,
        "bubbles": bubbles,
    }
    return figures, [float(value) for value in found[-1].values()], trace


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
        ratios = own.get("simulated_over_measured", {})
        told = "".join(f", {way} {own['simulated'][way]:.3f} s ({ratio:.2f}x)" for way, ratio in ratios.items())
        lines.append(
            f"  {name:30} {chunks:24} {own['seconds']:8.3f} s {own['tokens_per_second']:9.0f} tokens/s "
            f"{own['over_one_gpu']:5.2f}x one GPU, bubbles {bubbles}{told}"
        )
    return "\n".join(lines)
