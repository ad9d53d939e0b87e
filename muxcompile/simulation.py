"""simulation: tasks on a cluster that need not be there, played on no device: what it would take, and what each mechanism gains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from codegen import products, tiling
from codegen.links import FABRICS
from codegen.lower import Target
from codegen.machine import machine
from muxcompile.forecast import SPARE, sampled
from muxcompile.setting import Setting, fake, sharded
from passes.adapters import Adapter, resolve
from passes.cost import CostModel, keys
from passes.interleave import Choice, Groups, Interleaving, Run, Unfit, counts, dealt
from passes.loads import Shape
from passes.parallel import FILLED, StageCosts, scaled, sections
from passes.partition import EMBED
from passes.survey import survey
from passes.task import Task
from runtime.comm import Mesh

CUDA = torch.device("cuda")
# Rounds that are played: the pipeline fills and drains once in so many.
ROUNDS = 8
# Layers that are surveyed of a built-in shape: the first, whose input wants no gradient, and two that stand for the others.
SURVEYED = 3
# Rows of chunks beside those that the planner chooses from: who runs one task after another has less to fill a chunk with.
SMALL = (128, 256, 384)


@dataclass(frozen=True, slots=True)
class Simulation:
    """A setting as it would run, beside what it would be without one mechanism or another."""

    setting: Setting
    mesh: Mesh
    device: str
    ours: Run
    others: Mapping[str, Run | None]
    costs: StageCosts
    tokens: int
    rounds: int
    cap: int
    played: int
    candidates: int
    kept_serial: bool

    @property
    def step(self) -> float:
        """Seconds of a round, the mean of those played."""
        return self.ours.seconds / self.rounds

    @property
    def effective(self) -> float:
        """Tokens of sequences in a second, of all replicas."""
        return self.tokens / self.ours.seconds

    @property
    def computed(self) -> float:
        """Rows of chunks in a second, of all replicas."""
        return self.ours.rows * self.mesh.dp / self.ours.seconds

    @property
    def gains(self) -> dict[str, float]:
        """How many times as long the same rounds take otherwise, where that fits."""
        return {name: run.seconds / self.ours.seconds for name, run in self.others.items() if run is not None}

    def text(self) -> str:
        """What `muxcompile simulate` prints."""
        mesh, found = self.mesh, self.costs.cost.machine
        lines = [
            f"muxcompile simulate: {self.setting.name}, {len(self.setting.tasks)} tasks, {mesh.size} x {found.name}, mesh {mesh}",
            "predicted: nothing was run",
            "",
            "plan",
            f"  {self._why()}",
        ]
        for index, (tasks, shape) in enumerate(zip(self.ours.choice.groups, self.ours.choice.shapes, strict=True)):
            lines.append(f"  group {index}: chunks of {shape}: {' '.join(tasks)}")
        lines += ["", "stages (milliseconds of a chunk of group 0; bubble and bytes of every rank of a stage)"]
        lines += [f"  {line}" for line in self._stage_lines()]
        lines += [
            "",
            "step of every task",
            f"  {self.step * 1e3:,.2f} ms, the mean of {self.rounds} rounds in which the pipeline fills and drains once",
            f"  {self.effective:,.0f} tokens/s of sequences, {self.computed:,.0f} rows/s of chunks",
            f"  bubble {self.bubble:.1%}, peak {max(self.ours.peak):,} bytes of {self.cap:,}",
            "",
            "the same rounds otherwise (times as long)",
        ]
        lines += [f"  {gain:6.2f}x  {name}" for name, gain in self.gains.items()]
        lines += [f"  no memory  {name}" for name, run in self.others.items() if run is None]
        lines += ["", "assumed"] + [f"  {line}" for line in self._assumed()]
        return "\n".join(lines) + "\n"

    @property
    def bubble(self) -> float:
        """The mean over the stages."""
        return sum(map(self.ours.bubble, range(self.mesh.pp))) / self.mesh.pp

    def _why(self) -> str:
        groups, asked = self.ours.choice.groups, self.setting.options.groups
        among = "Options.groups" if asked else f"1 to {counts(self.mesh, len(self.setting.tasks))[-1]} groups"
        why = f"{len(groups)} group{'s' if len(groups) > 1 else ''}, the fastest played of {among} and sizes of chunks"
        beside = "; nothing passes beside computation (a sender waits, sums are in line), which is no slower"
        serial = beside if self.kept_serial else ""
        return f"{why} ({self.played} of {self.candidates} played, those of the least bound){serial}"

    def _stage_lines(self) -> list[str]:
        tasks, shape = self.ours.choice.groups[0], self.ours.choice.shapes[0]
        seconds = self.costs.seconds(self.costs.cost.survey.extras(tasks), shape)
        rows = [("stage", "regions", "forward", "backward", "sums", "in flight", "bubble", "bytes")]
        for index, (stage, ways) in enumerate(zip(self.costs.stages, seconds, strict=True)):
            forward, backward = ways
            rows.append(
                (
                    f"{index}",
                    _regions(len(stage), [own.name for own in stage if not own.layer]),
                    f"{forward.busy * 1e3:.2f}",
                    f"{backward.busy * 1e3:.2f}",
                    f"{(forward.sums + backward.sums) * 1e3:.2f}",
                    f"{self.ours.flight[index]}",
                    f"{self.ours.bubble(index):.1%}",
                    f"{self.ours.peak[index]:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

    def _assumed(self) -> list[str]:
        mesh, found, fabric = self.mesh, self.costs.cost.machine, self.costs.fabric
        lines = [found.note] if found.note else []
        if mesh.pp > 1:
            link = self.costs.slowest
            lines.append(
                f"between stages {link.name}, {link.sending / 1e9:.0f} GB/s: {self._transfer * 1e3:.2f} ms a chunk of group 0"
            )
        if mesh.tp > 1:
            link = self.costs.link("tp")
            hidden = f"the other lane's micro-batch hides {fabric.hidden:.0%} of each, and {FILLED:.0%} of what launches take"
            how = hidden if len(self.ours.flight) == 1 < self.ours.flight[0] else "in line with the products"
            lines.append(f"all-reduces of shards over {link.name}, {link.reducing / 1e9:.0f} GB/s; {how}")
        if mesh.dp > 1:
            lines.append(f"gradients of adapters summed over {self.costs.link('dp').name}; sequences dealt out to replicas in turn")
        return [*lines, "backbone in bfloat16, chunks launched as CUDA graphs, attention without padding"]

    @property
    def _transfer(self) -> float:
        return self.costs.transfer(self.ours.choice.shapes[0])

    def to_json(self) -> dict[str, Any]:
        choice = self.ours.choice
        return {
            "predicted": True,
            "setting": self.setting.name,
            "device": self.costs.cost.machine.name,
            "mesh": {"dp": self.mesh.dp, "pp": self.mesh.pp, "tp": self.mesh.tp},
            "groups": [
                {"tasks": list(tasks), "tokens": shape.tokens, "checkpoint": shape.checkpoint}
                for tasks, shape in zip(choice.groups, choice.shapes, strict=True)
            ],
            "stages": [
                {
                    "regions": [own.name for own in stage],
                    "in_flight": self.ours.flight[index],
                    "bubble": self.ours.bubble(index),
                    "peak_bytes": self.ours.peak[index],
                }
                for index, stage in enumerate(self.costs.stages)
            ],
            "rounds": self.rounds,
            "seconds": self.step,
            "tokens_per_second": self.effective,
            "rows_per_second": self.computed,
            "bubble": self.bubble,
            "cap": self.cap,
            "times_as_long": {name: self.gains.get(name) for name in self.others},
            "played": self.played,
            "candidates": self.candidates,
            "assumed": self._assumed(),
        }


SEQUENTIAL, FUSED = "one task after another, 1F1B, drained", "all tasks in one group"
SERIAL, PADDED = "transfers and all-reduces beside nothing", "sequences padded to the longest of all"


def simulate(setting: Setting, mesh: Mesh, device: str, rounds: int = ROUNDS) -> Simulation:
    """Choose how the tasks run on the mesh, and play it.

    Raises:
        ValueError: naming what is wrong: the device, the mesh against the model, a task, memory with the numbers.
    """
    if device not in FABRICS:
        raise ValueError(f"device {device!r} must be one of {', '.join(FABRICS)}")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    found = machine(f"NVIDIA {device}")
    layers = setting.config.num_hidden_layers
    short = setting.alike and layers > SURVEYED
    model = fake(sharded(setting.config, mesh.tp, SURVEYED if short else None))
    adapters = [resolve(_unread(task), model) for task in setting.tasks]
    steps = {adapter.task.name: sampled(adapter, max(tiling.chunk_sizes(CUDA)), rounds) for adapter in adapters}
    busiest = [_busiest(steps, index, mesh.dp) for index in range(rounds)]
    lengths = {task: [own[task] for own in busiest] for task in steps}
    sizes = _sizes(setting, lengths)
    cost = _cost(model, adapters, device, lengths, sizes, layers if short else None)
    costs = StageCosts(cost, mesh, FABRICS[device], sections(cost.survey, layers if short else None))
    # One cut serves chunks of any size: what all of them have grows with their rows.
    costs.balance(cost.survey.extras(list(steps)), Shape(sizes[len(sizes) // 2]))
    cap = min(setting.options.memory_cap or found.memory, found.memory - SPARE)
    asked = setting.options.gradient_checkpointing
    own = Interleaving(costs, lengths, sizes, cap, (False, True) if asked is None else (asked,))
    return _played(setting, costs, own, steps, device, rounds)


def _played(
    setting: Setting, costs: StageCosts, own: Interleaving, steps: Mapping[str, Sequence[Sequence[int]]], device: str, rounds: int
) -> Simulation:
    mesh, tasks = costs.mesh, list(steps)
    mean = {task: sum(map(sum, own.rounds[task])) / rounds for task in tasks}
    asked = setting.options.groups
    partitions = [_asked(tasks, asked)] if asked else [dealt(mean, count) for count in counts(mesh, len(tasks))]
    more = sorted({0, 1, mesh.pp})
    ours = own.best(partitions, more=more)
    played, candidates = own.played, own.candidates
    fused = _fitting(lambda: own.best([(tuple(tasks),)], more=more, hidden=False))
    serial = own.run(replace(ours.choice, hidden=False, beside=False))
    padded = _fitting(lambda: _padded(own, ours.choice, more))
    alone = _fitting(own.alone)
    others = {SEQUENTIAL: alone, FUSED: fused, SERIAL: serial, PADDED: padded}
    # Groups of one task each, in chunks of its own size, were not among those that were searched.
    apart = None if alone is None else _fitting(lambda: own.run(replace(alone.choice, drain=False, hidden=True)))
    best = min((ours, serial, *(run for run in (fused, apart) if run is not None and not asked)), key=lambda run: run.seconds)
    return Simulation(
        setting=setting,
        mesh=mesh,
        device=device,
        ours=best,
        others=others,
        costs=costs,
        tokens=sum(length for given in steps.values() for step in given for length in step),
        rounds=rounds,
        cap=own.cap,
        played=played,
        candidates=candidates,
        kept_serial=best is serial,
    )


def _fitting(play: Callable[[], Run]) -> Run | None:
    """What it is held against may need more memory than it does itself."""
    try:
        return play()
    except Unfit:
        return None


def _padded(own: Interleaving, choice: Choice, more: Sequence[int]) -> Run:
    longest = max(length for given in own.rounds.values() for step in given for length in step)
    rounds = {task: [[longest] * len(step) for step in given] for task, given in own.rounds.items()}
    return replace(own, rounds=rounds).best([choice.groups], more=more)


def _cost(
    model: Any,
    adapters: Sequence[Adapter],
    device: str,
    lengths: Mapping[str, Sequence[Sequence[int]]],
    sizes: Sequence[int],
    layers: int | None,
) -> CostModel:
    """Prices of one shard's chunks, launched as CUDA graphs."""
    found = survey(
        model,
        adapters,
        device=CUDA,
        target=Target(f"NVIDIA {device}", device.startswith("H")),
        optimizers={adapter.task.name: adapter.task.optimizer for adapter in adapters},
    )
    seen = [length for given in lengths.values() for step in given for length in step]
    return CostModel(
        found if layers is None else scaled(found, layers),
        machine(f"NVIDIA {device}"),
        [Shape(size) for size in sizes],
        keys=keys(seen),
        recorded=True,
        products=products.table(f"NVIDIA {device}"),
    )


def _regions(count: int, ends: Sequence[str]) -> str:
    layers = count - len(ends)
    return " + ".join(
        [*(end for end in ends if end == EMBED), *([f"{layers} layers"] if layers else []), *(e for e in ends if e != EMBED)]
    )


def _unread(task: Task) -> Task:
    """A saved adapter as its configuration alone: its tensors are those of no shard."""
    if not isinstance(task.adapter, str):
        return task
    from peft import PeftConfig

    return replace(task, adapter=PeftConfig.from_pretrained(task.adapter))


def _busiest(steps: Mapping[str, Sequence[Sequence[int]]], index: int, dp: int) -> dict[str, Sequence[int]]:
    """The lengths of the replica that has most of a round: sequences are dealt out in turn."""
    replicas = [{task: given[index][replica::dp] for task, given in steps.items()} for replica in range(dp)]
    return max(replicas, key=lambda own: sum(map(sum, own.values())))


def _sizes(setting: Setting, lengths: Mapping[str, Sequence[Sequence[int]]]) -> list[int]:
    """Rows of the chunks to choose from.

    Raises:
        ValueError: a task's sequence is longer than all of them.
    """
    longest = {task: max((length for step in given for length in step), default=0) for task, given in lengths.items()}
    task = max(longest, key=lambda own: longest[own])
    asked = setting.options.chunk_tokens
    sizes = [tiling.chunk_tokens(CUDA, asked, 0)] if asked else [*SMALL, *tiling.chunk_sizes(CUDA)]
    if sizes[-1] < longest[task]:
        raise ValueError(
            f"task {task!r}: a sequence of {longest[task]} tokens is longer than a chunk of {sizes[-1]}; "
            "cut sequences are not simulated"
        )
    return sizes


def _asked(tasks: Sequence[str], groups: Groups) -> Groups:
    """The groups that the options name, and one of all tasks that are in none."""
    named = {name for group in groups for name in group}
    rest = tuple(name for name in tasks if name not in named)
    return (*(tuple(group) for group in groups if group), *([rest] if rest else []))
