"""The planner's plan against fixed policies, one optimizer step of every task, on mixes after MuxTune's workloads.

Tasks have lengths like those of SST-2 (up to 64), OpenBookQA (128) and RTE (256): `benchmarks/lengths/*.json`, drawn before any
run, seeds in the files. A mix is uniform (all tasks like OpenBookQA) or not (the three in turn), light (4 sequences a step and
task) or heavy (16). Steps of a mix are drawn by `random.Random("<mix> <task> <step>")`.

Policies run on the same engine and adapters, in turn within each mix:

- planner: what `muxcompile.compile` decides from the lengths;
- fused 8192, fused 2048: all tasks share chunks of a fixed size;
- interleaved 1024: every task has chunks of its own, all in one step;
- pad to max: all tasks share chunks of 8192, every sequence is padded to the longest that any task of the mix may have;
- one at a time: a step call for each task, chunks of 1024;
- PEFT: HF PEFT, eager, one task after another, padded to the batch's longest (for some mixes).

Learning rates are 0, so every policy computes the same losses: that is checked, beside the gate against PEFT. A ratio is that of
sums over the same steps: a plan whose chunks overflow in one step of five pays for it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import muxcompile
from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from benchmarks.peers.peft_eager import PeftEager
from codegen import tiling
from codegen.kernels import build
from codegen.lower import Target
from muxcompile.forecast import forecast
from muxcompile.planner import Group
from passes.group import Shape, group
from runtime.cudagraph import CudaGraphs
from runtime.pack import pack

Batch = dict[str, list[dict[str, list[int]]]]
# Groups, each its tasks and the rows of a chunk; the seconds expected of a step; the seconds that planning took.
Plans = tuple[list[tuple[tuple[str, ...], int]], float, float]
LENGTHS = Path(__file__).parent / "lengths"
PROFILES = {"uniform": ("openbookqa",), "non-uniform": ("sst2", "openbookqa", "rte")}
SEQUENCES = {"light": 4, "heavy": 16}


@dataclass(frozen=True)
class Mix:
    """Some tasks with the lengths that each draws from."""

    load: str
    kind: str
    profiles: Mapping[str, str]
    lengths: Mapping[str, Sequence[int]]
    longest: int

    @property
    def name(self) -> str:
        return f"{self.load} {self.kind} {len(self.profiles)}"

    def batch(self, step: int, vocabulary: int) -> Batch:
        found: Batch = {}
        for task in self.profiles:
            draw = random.Random(f"{self.name} {task} {step}")
            found[task] = []
            for length in draw.choices(self.lengths[task], k=SEQUENCES[self.load]):
                ids = [draw.randrange(vocabulary) for _ in range(length)]
                found[task].append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
        return found

    def padded(self, batch: Batch) -> Batch:
        def fill(example: dict[str, list[int]]) -> dict[str, list[int]]:
            spare = self.longest - len(example["input_ids"])
            return {"input_ids": example["input_ids"] + [0] * spare, "labels": example["labels"] + [-100] * spare}

        return {task: [fill(example) for example in given] for task, given in batch.items()}


def mixes(names: Sequence[str], counts: Sequence[int]) -> list[Mix]:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(LENGTHS.glob("*.json"))}
    found = []
    for load in SEQUENCES:
        for kind, profiles in PROFILES.items():
            for count in counts:
                own = {name: profiles[index % len(profiles)] for index, name in enumerate(names[:count])}
                lengths = {name: files[profile]["lengths"] for name, profile in own.items()}
                found.append(Mix(load, kind, own, lengths, max(files[profile]["max_length"] for profile in own.values())))
    return found


class Engine:
    """One compiled model of all tasks; `use` gives it other groups. A chunk size is compiled when it is first asked for."""

    def __init__(self, workload: Workload, backbone: Any, mesh: str | None = None) -> None:
        tasks = [replace(task, learning_rate=0.0) for task in workload.compiled_tasks()]
        names = tuple(task.name for task in tasks)
        options = muxcompile.Options(chunk_tokens=workload.chunk_tokens, groups=(names,), gradient_checkpointing=False, mesh=mesh)
        self.model: Any = muxcompile.compile(backbone, tasks, options)
        self.compiler = self.model._compiler
        self.device = self.compiler.device
        self.adapters = {name: self.compiler.adapters[name] for name in names}
        self.survey = self.compiler.planned.forecast.model.survey if self.compiler.planned.forecast else None
        pipeline = self.model._pipeline
        self.flight = () if pipeline is None else pipeline.flight
        if self.model._recorders and len(self.flight) > 1:
            # As many as any plan has on its way.
            stage, most = self.model._ranks.stage, len(self.flight)
            self.model._recorders = tuple(CudaGraphs(self.device) for _ in range(self.flight[stage] + most))
            self.model._use(self.model._build)
        self.executors = {workload.chunk_tokens: self.model._executors[0]}

    def prepare(self, sizes: Collection[int]) -> None:
        """Compile and warm chunks of these sizes. Smaller ones then find room in the memory of larger ones."""
        for tokens in sorted(sizes, reverse=True):
            self.warm(tokens)

    def executor(self, tokens: int) -> Any:
        """Of chunks of a size, whoever is in them: groups of one size share what is recorded."""
        if tokens not in self.executors:
            target = Target.of(self.device)
            # One task of each rank: the tables have the slots of all, and its program is that of all.
            few = list({adapter.sites[0].rank: adapter for adapter in self.adapters.values()}.values())
            own = Group(tuple(adapter.task.name for adapter in few), tokens)
            attached = self.compiler._attach(few, own, self.model.state.tables, target)
            found = self.compiler._compile(attached, own, target, self.compiler.planned)
            build.compile_all(found.launches)
            self.model._use(replace(self.model._build, groups=(found.compiled,)))
            self.executors[tokens] = self.model._executors[0]
        return self.executors[tokens]

    def warm(self, tokens: int) -> None:
        """Steps that load, tune and record what those of a mix launch: twice for each bound of their lengths."""
        self.use([(tuple(self.adapters), tokens)])
        for length in (100, 200, 100, 200):
            ids = list(range(min(length, tokens)))
            self.model.step({name: [{"input_ids": ids, "labels": ids}] for name in self.adapters})

    def use(self, groups: Sequence[tuple[Sequence[str], int]], flight: tuple[int, ...] = ()) -> None:
        """Run these groups from now on, with so many micro-batches on their way, by stage; none: as in 1F1B."""
        if self.model._pipeline is not None:
            self.model._pipeline.flight = flight or self.flight
        executors = [self.executor(tokens) for _, tokens in groups]
        own = tuple(replace(executor.compiled, tasks=tuple(tasks)) for executor, (tasks, _) in zip(executors, groups, strict=True))
        self.model._run_with(replace(self.model._build, groups=own), executors)

    def rows(self, batch: Batch) -> int:
        """Rows that a step computes."""
        examples = self.model._read(batch)
        return sum(
            own.geometry.tokens * len(list(pack({name: examples[name] for name in own.tasks if name in examples}, own.geometry)))
            for own in self.model._build.groups
        )

    def planned(self, mix: Mix) -> Plans:
        """The planner's groups for a mix, the seconds that it expects of a step, and those that it took."""
        start = time.perf_counter()
        adapters = [
            replace(own, task=replace(own.task, lengths=mix.lengths[name], batch_size=SEQUENCES[mix.load]))
            for name, own in self.adapters.items()
            if name in mix.profiles
        ]
        shapes = [Shape(tokens) for tokens in tiling.chunk_sizes(self.device)]
        found = forecast(
            self.model._compiler.model, self.device, adapters, muxcompile.Options(), shapes, None, surveyed=self.survey
        )
        plan = group(found.loads, found.model, base_bytes=found.model.resident([]), steps=found.sizing())
        seconds = time.perf_counter() - start
        return [(own.tasks, own.shape.tokens) for own in plan.groups], found.seconds(plan), seconds


def mux(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every mix, every policy."""
    from benchmarks.run import versions

    workload = WORKLOADS[arguments.workload]
    backbone = workload.backbone(arguments.device, arguments.layers)
    engine = Engine(workload, backbone)
    names = list(workload.tasks)
    report: dict[str, Any] = {
        "benchmark": "mux",
        "workload": workload.name,
        "versions": versions(arguments.device, arguments.commit),
        "mixes": [],
    }
    counts = [count for count in arguments.counts if count <= len(names)]
    chosen = [mix for mix in mixes(names, counts) if not arguments.mixes or mix.name in arguments.mixes]
    plans = [engine.planned(mix) for mix in chosen]
    engine.prepare({*arguments.fixed, *(tokens for plan, *_ in plans for _, tokens in plan)})
    engine.use([(tuple(names), workload.chunk_tokens)])
    two = replace(workload, tasks={name: workload.tasks[name] for name in names[:2]})
    report["gate"] = gate.against_peft(two, engine.model, backbone, scale=1.0)
    if not report["gate"]["passed"]:
        return report
    for mix, planned in zip(chosen, plans, strict=True):
        row = _mix(engine, mix, planned, workload, arguments, backbone)
        report["mixes"].append(row)
        report["gate"]["passed"] &= row["losses_agree"]
        print(_line(row), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    report["summary"] = summary(report["mixes"])
    print(json.dumps(report["summary"], indent=1))
    return report


def _mix(
    engine: Engine, mix: Mix, planned: Plans, workload: Workload, arguments: argparse.Namespace, backbone: Any
) -> dict[str, Any]:
    batches = [mix.batch(step, workload.model["vocab_size"]) for step in range(arguments.laps)]
    padded = [mix.padded(batch) for batch in batches]
    tasks, (large, middle, small) = tuple(mix.profiles), arguments.fixed
    plan, expected, took = planned
    alone = [((name,), small) for name in tasks]
    given: dict[str, tuple[Any, list[Batch], bool]] = {
        "planner": (plan, batches, False),
        f"fused {large}": ([(tasks, large)], batches, False),
        f"fused {middle}": ([(tasks, middle)], batches, False),
        f"interleaved {small}": (alone, batches, False),
        "pad to max": ([(tasks, large)], padded, False),
        "one at a time": (alone, batches, True),
    }
    row: dict[str, Any] = {
        "mix": mix.name,
        "load": mix.load,
        "lengths": mix.kind,
        "tasks": len(tasks),
        "tokens": statistics.mean(sum(len(e["input_ids"]) for given in batch.values() for e in given) for batch in batches),
        "plan": [{"tasks": len(own), "chunk": tokens} for own, tokens in plan],
        "planning_seconds": took,
        "predicted_seconds": expected,
        "policies": {},
    }
    policies: dict[str, Callable[[int], dict[str, Any] | None]] = {}
    computed: dict[str, float] = {}
    for name, (groups, own, apart) in given.items():
        engine.use(groups)
        computed[name] = statistics.mean(map(engine.rows, own))
        policies[name] = _policy(engine, groups, own, apart)
    if len(tasks) in arguments.peft:
        weights = {name: engine.model.state_dict(name) for name in tasks}
        peer = PeftEager(backbone, {name: workload.tasks[name].config for name in tasks}, weights)
        peer.step_all(batches[0])
        policies["PEFT"] = lambda index: peer.step_all(batches[index])
        computed["PEFT"] = sum(len(given) * max(len(e["input_ids"]) for e in given) for given in batches[0].values())
    taken, losses = _rounds(policies, arguments)
    for name, seconds in taken.items():
        row["policies"][name] = {"seconds": seconds, "ratio": _ratio(seconds, taken["planner"]), "rows": computed[name]}
    row["seconds"] = statistics.mean(taken["planner"])
    ours = losses["planner"]
    worst = max(abs(a - b) / abs(b) for own in losses.values() for a, b in zip(own, ours, strict=True))
    row["loss_difference_max"], row["losses_agree"] = worst, worst <= (1e-5 if workload.dtype == torch.float32 else 1e-2)
    return row


def _policy(engine: Engine, groups: Any, batches: Sequence[Batch], apart: bool) -> Callable[[int], dict[str, Any]]:
    """A step of a policy over one of the batches."""

    def step(index: int) -> dict[str, Any]:
        engine.use(groups)
        batch, losses = batches[index], dict[str, Any]()
        for part in [{task: given} for task, given in batch.items()] if apart else [batch]:
            losses |= engine.model.step(part).losses
        return losses

    return step


def _ratio(seconds: Sequence[float], planner: Sequence[float]) -> float:
    """How much longer than the planner's, over the steps that both took."""
    common = min(len(seconds), len(planner))
    return sum(seconds[:common]) / sum(planner[:common])


def _rounds(
    policies: Mapping[str, Callable[[int], dict[str, Any] | None]], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall seconds of each policy's steps, the device's work included, and its losses of the first batch.

    Policies take turns, each first as often as the others: neither favours a host that is busy now and then. One that takes long
    has fewer rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in policies}
    losses: dict[str, list[float]] = {}
    order = list(policies)
    for lap in range(arguments.laps):
        for name in order[lap % len(order) :] + order[: lap % len(order)]:
            if taken[name] and sum(taken[name]) > arguments.longest:
                continue
            _wait(arguments.device)
            start = time.perf_counter()
            found = policies[name](lap)
            _wait(arguments.device)
            taken[name].append(time.perf_counter() - start)
            if lap == 0 and found is not None:
                losses[name] = [float(own) for own in found.values()]
    return taken, losses


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _line(row: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {own['ratio']:.2f}x" for name, own in row["policies"].items() if name != "planner")
    plan = "+".join(f"{own['tasks']}@{own['chunk']}" for own in row["plan"])
    full = row["tokens"] / row["policies"]["planner"]["rows"]
    ours, expected = row["seconds"] * 1e3, row["predicted_seconds"] * 1e3
    return f"{row['mix']:22} {plan:12} {ours:7.0f} ms (predicted {expected:.0f}), {full:.0%} full; {others}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all mixes: each policy's time over the planner's, the least and the median, and by load and lengths."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row["policies"] if name != "planner"):
        ratios = {row["mix"]: row["policies"][name]["ratio"] for row in rows if name in row["policies"]}
        found[name] = {"least": min(ratios.values()), "median": statistics.median(ratios.values())}
        for word in (*SEQUENCES, *PROFILES):
            own = [ratio for mix, ratio in ratios.items() if f" {word} " in f" {mix} "]
            if own:
                found[name][word] = {"least": min(own), "median": statistics.median(own)}
    return found
