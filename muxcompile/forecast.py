"""forecast: what the tasks will ask of the device, from their data and a survey of the compilation -> loads and prices."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from codegen import tiling
from codegen.attention import attention_form
from codegen.lower import Target
from muxcompile.numbers import training
from muxcompile.options import Options
from passes.adapters import Adapter
from passes.bare import nbytes
from passes.cost import CostModel, cost_model, keys
from passes.loads import Grouping, Load, Price, Shape, Steps
from passes.measure import name_of
from passes.survey import Survey, survey
from passes.turns import Turns, turns
from runtime.fill import Fill, fill
from runtime.place import rows

# A search for groups judges them by their mean over this many steps, drawn from the tasks' lengths.
SEARCHED = 8
# The sizes of the groups that it finds are chosen by more, as many as have so many sequences (0.1 s), within bounds. What 8 choose
# costs up to 15% more in later steps than the best size there is, 2% on average; what 64 choose 0.4% on average.
SEQUENCES, LEAST, MOST = 1 << 17, 32, 256
# Sequences that are placed to see how chunks of a size are filled: 40 ms.
PLACED = 8192
# Bytes of the device that nobody's figures know: the context, workspaces of libraries, what the allocator cannot join.
SPARE = 2 << 30


@dataclass(frozen=True, slots=True)
class Forecast:
    """What planning reads.

    Args:
        loads: of the tasks, over the first sampled rounds.
        rounds: of the tasks, over all sampled rounds.
        model: prices of chunks.
        cap: bytes of the device that may be used; None: no limit.
        steps: of every task the sequence lengths of its sampled steps.
        turns: who steps in which round.
        device: that chunks are placed for.
    """

    loads: tuple[Load, ...]
    rounds: tuple[Load, ...]
    model: CostModel
    cap: int | None
    steps: Mapping[str, Sequence[Sequence[int]]]
    turns: Turns
    device: torch.device

    def sizing(self) -> Steps:
        """What the sizes of groups are chosen by."""
        return Steps(self.rounds, functools.cache(self._overflow))

    def _overflow(self, tasks: tuple[str, ...], tokens: int) -> float:
        """Chunks that a round of these tasks needs beyond its rows over `tokens`, on average over rounds that are really placed."""
        geometry, among = tiling.geometry(self.device, tokens), set(tasks)
        rounds = zip(*(load.rows for load in self.rounds if load.task in among), strict=True)
        more, placed = [], 0
        for index, total in enumerate(map(sum, rounds)):
            stepping = among.intersection(self.turns.rounds[index % len(self.turns.rounds)])
            lengths = {task: self.steps[task][index % len(self.steps[task])] for task in tasks if task in stepping}
            count = sum(map(len, lengths.values()))
            if tiling.holds(geometry, total, count):
                more.append(0)
                continue
            more.append(fill(lengths, geometry).chunks - -(-total // tokens))
            placed += count
            if placed >= PLACED:
                break
        return max(0.0, sum(more) / len(more))

    def again(self, tasks: Sequence[str], tokens: int) -> float:
        """Pieces of cut sequences whose forward runs twice, of one round of these tasks on average."""
        return sum(_pieces(step, tokens)[1] / len(self.steps[task]) for task in tasks for step in self.steps[task])

    def seconds(self, grouping: Grouping) -> float:
        """Of one round, optimizer steps included, on average."""
        stepping = [self.model.step(tasks) for tasks in self.turns.rounds]
        return grouping.cost + sum(stepping) / len(stepping)

    def fill(self, tasks: Sequence[str], tokens: int) -> Fill:
        """Of the first sampled step of these tasks, in chunks of that size."""
        return fill({task: self.steps[task][0] for task in tasks}, tiling.geometry(self.device, tokens))


def forecast(
    model: nn.Module,
    device: torch.device,
    adapters: Sequence[Adapter],
    options: Options,
    shapes: Sequence[Shape],
    cap: int | None,
    *,
    surveyed: Survey | None = None,
) -> Forecast:
    """Survey a compilation of all tasks, and draw steps from their lengths.

    Args:
        surveyed: a survey of these tasks, among others, if there is one already.
        shapes: the chunks to choose from; those that are far larger than a round of all tasks are left out.
        cap: bytes of the device that may be used.
    """
    variants = sorted({shape.checkpoint for shape in shapes})
    found = surveyed or _survey(model, device, adapters, variants)
    count = min(MOST, max(LEAST, SEQUENCES // sum(adapter.task.batch_size for adapter in adapters)))
    steps = {adapter.task.name: sampled(adapter, max(shape.tokens for shape in shapes), count) for adapter in adapters}
    largest = tiling.geometry(device, max(shape.tokens for shape in shapes))
    computed = {task: [rows(step, largest) for step in given] for task, given in steps.items()}
    order = turns(options.fairness, {task: max(1.0, sum(given) / len(given)) for task, given in computed.items()})
    turn = {task: [task in stepping for stepping in order.rounds] for task in steps}
    rounds = {task: _rounds(given, turn[task]) for task, given in computed.items()}
    few = {task: _rounds(given[:SEARCHED], turn[task]) for task, given in computed.items()}
    shapes = _useful(shapes, max(map(sum, zip(*rounds.values(), strict=True))))
    seen = [length for given in steps.values() for step in given for length in step]
    prices = cost_model(
        found,
        name_of(device),
        shapes,
        keys=keys(seen),
        recorded=records(options, model, device),
        objective="energy" if options.objective == "energy" else "time",
    )
    # Many tasks have the same extras.
    forward, called = functools.cache(prices.forward), functools.cache(prices.called)
    loads = tuple(
        Load(
            task,
            few[task],
            found.tasks[task].extras,
            found.tasks[task].nbytes,
            tuple(_own(forward, called, found.carried_row, found.tasks[task].extras, shape, steps[task]) for shape in shapes),
        )
        for task in steps
    )
    everything = tuple(replace(load, rows=rounds[load.task]) for load in loads)
    return Forecast(loads, everything, prices, cap, steps, order, device)


def surveyed_with(model: nn.Module, device: torch.device, adapters: Sequence[Adapter], known: Survey) -> Survey:
    """A survey of all these tasks, the last of them new beside those that are known: as one that has the same adapter, or anew."""
    *others, newcomer = adapters
    for other in others:
        alike = other.kind == newcomer.kind and other.config == newcomer.config
        if alike and other.task.optimizer == newcomer.task.optimizer:
            return replace(known, tasks={**known.tasks, newcomer.task.name: known.tasks[other.task.name]})
    return _survey(model, device, adapters, sorted(known.parts))


def _survey(model: nn.Module, device: torch.device, adapters: Sequence[Adapter], variants: Sequence[bool]) -> Survey:
    optimizers = {adapter.task.name: adapter.task.optimizer for adapter in adapters}
    return survey(model, adapters, device=device, target=Target.of(device), checkpoint=variants, optimizers=optimizers)


def records(options: Options, model: nn.Module, device: torch.device) -> bool:
    """Whether regions and optimizer steps are launched as CUDA graphs: on a GPU, where attention does not wait for the device."""
    return options.cuda_graphs and device.type == "cuda" and not attention_form(device, dtype_of(model)).waits


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of a backbone's activations: its first floating-point parameter's."""
    return next(own.dtype for own in model.parameters() if own.is_floating_point())


def memory_cap(device: torch.device, backbone: nn.Module, options: Options, there: int | None = None) -> int | None:
    """Bytes that the compiled model may hold, its backbone among them: the user's limit, or what the GPU has left.

    Args:
        there: bytes of the backbone that are on the device already; None: all.
    """
    if options.memory_cap is not None or device.type != "cuda":
        return options.memory_cap
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached + (nbytes(backbone) if there is None else there) - SPARE


def sampled(adapter: Adapter, tokens: int, count: int) -> list[list[int]]:
    """Sequence lengths of some optimizer steps, drawn by the task's own name and seed; one full chunk where nothing is known."""
    task, virtual = adapter.task, training(adapter).virtual_tokens
    if task.lengths is None:
        return [[tokens]] * count
    draw = random.Random(f"{task.seed} {task.name} steps")
    return [[length + virtual for length in draw.choices(task.lengths, k=task.batch_size)] for _ in range(count)]


def _rounds(computed: Sequence[int], stepping: Sequence[bool]) -> tuple[int, ...]:
    """Rows in each of some rounds, none in those in which the task waits: whole periods, and no fewer rounds than samples."""
    count = len(stepping) * -(-len(computed) // len(stepping))
    return tuple(computed[index % len(computed)] if stepping[index % len(stepping)] else 0 for index in range(count))


def _useful(shapes: Sequence[Shape], most: int) -> list[Shape]:
    """Without sizes of which a smaller one holds the largest round already."""
    enough = min((shape.tokens for shape in shapes if shape.tokens >= most), default=max(shape.tokens for shape in shapes))
    return [shape for shape in shapes if shape.tokens <= enough]


def _pieces(lengths: Sequence[int], tokens: int) -> tuple[int, int]:
    """Of a step: pieces of sequences longer than a chunk, and those whose forward runs once more: all but each one's last."""
    cut = [-(-length // tokens) for length in lengths if length > tokens]
    return sum(cut), sum(cut) - len(cut)


def _own(
    forward: Callable[[frozenset[str], Shape], Price],
    called: Callable[[frozenset[str], Shape], float],
    carried_row: int,
    extras: frozenset[str],
    shape: Shape,
    steps: Sequence[Sequence[int]],
) -> Price:
    """What cut sequences cost beside their chunks: forwards that run twice, and the keys and values that are carried."""
    cut = [length for step in steps for length in step if length > shape.tokens]
    if not cut:
        return Price(0.0, 0)
    # Pieces are not launched as records.
    pieces, again = (sum(each) / len(steps) for each in zip(*(_pieces(step, shape.tokens) for step in steps), strict=True))
    return Price(again * forward(extras, shape).cost + pieces * called(extras, shape), (max(cut) - shape.tokens) * carried_row)
