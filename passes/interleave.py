"""interleave: which tasks share chunks over stages and shards, in how many groups and chunks of which size, by playing the program.

More groups than one let a pipeline work on while a group's optimizer step is due, and let shards compute while another group's
sums are on their way; fewer fill their chunks better. Which wins is not figured but played, on no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from codegen import tiling
from passes.loads import Shape
from passes.parallel import Room, StageCosts
from passes.stages import Micro, beside, durations, makespan, staged
from runtime.comm import Mesh
from runtime.place import place, rows
from runtime.simulate import Timeline, simulate

Groups = tuple[tuple[str, ...], ...]
_CUDA = torch.device("cuda")
# Streams that compute.
_COMPUTE = ("compute", "lane0", "lane1")
# Candidates that a search plays, of those that no bound rules out: each takes up to 0.2 s.
PLAYED = 64
# How much longer a choice may take for which more rounds may tell.
_CLOSE = 1.06
# Sizes above and below its own that a group may change to.
_ABOUT = 2


class Unfit(ValueError):
    """Memory does not hold it; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a system runs the tasks.

    Args:
        groups: tasks that share chunks; each group's tasks take their optimizer steps together.
        shapes: of each group's chunks.
        more: micro-batches that a stage may have in flight beyond as many as there are stages from it to the last.
        drain: a step begins when the one before it is over.
        hidden: all-reduces pass beside another group's micro-batch, which shards of one stage run at the same time.
        beside: transfers pass beside computation.
    """

    groups: Groups
    shapes: tuple[Shape, ...]
    more: int = 0
    drain: bool = False
    hidden: bool = True
    beside: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """A choice as it would run."""

    choice: Choice
    flight: tuple[int, ...]
    timeline: Timeline
    rows: int
    peak: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    def bubble(self, stage: int) -> float:
        """The fraction of the time in which a stage's rank computes nothing, in no lane."""
        return min(idle for (rank, stream), idle in self.timeline.idle.items() if rank == stage and stream in _COMPUTE)


class Placed(NamedTuple):
    """A chunk: its tasks, and their rows in whole blocks."""

    tasks: tuple[str, ...]
    rows: int


@dataclass(slots=True)
class Interleaving:
    """Choices for some rounds of some tasks, played.

    Args:
        costs: of the mesh, cut into stages.
        rounds: by task, the sequence lengths of each round's optimizer step: those of the replica that has most.
        sizes: rows of chunks to choose from.
        cap: bytes of a rank.
        device: that chunks are placed for.
        variants: whether layers are checkpointed: what may be chosen, the first wherever it keeps the pipeline full.
        played, candidates: how many were played so far, of how many.
    """

    costs: StageCosts
    rounds: Mapping[str, Sequence[Sequence[int]]]
    sizes: Sequence[int]
    cap: int
    variants: tuple[bool, ...] = (False, True)
    device: torch.device = _CUDA
    played: int = 0
    candidates: int = 0
    _rows: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)
    _chunks: dict[tuple[tuple[str, ...], int, int], tuple[Placed, ...]] = field(default_factory=dict, init=False, repr=False)
    _taking: dict[str, tuple[float, ...]] = field(default_factory=dict, init=False, repr=False)

    # --- one choice ---

    def chunks(self, tasks: tuple[str, ...], tokens: int, index: int) -> tuple[Placed, ...]:
        """The chunks of a round."""
        key = tasks, tokens, index
        if key not in self._chunks:
            geometry = tiling.geometry(self.device, tokens)
            lengths = {task: self.rounds[task][index] for task in tasks if self.rounds[task][index]}
            count, taken = sum(map(len, lengths.values())), sum(self._taken(task, index) for task in lengths)
            if tiling.holds(geometry, taken, count):
                own = [(set(lengths), taken)] if lengths else []
            else:
                own = [({task for task, _ in each.bundles}, each.rows) for each in place(lengths, geometry)]
            self._chunks[key] = tuple(Placed(tuple(task for task in tasks if task in among), filled) for among, filled in own)
        return self._chunks[key]

    def _taken(self, task: str, index: int) -> int:
        """Rows that a task takes in a round, in whole blocks."""
        key = task, index
        if key not in self._rows:
            self._rows[key] = rows(self.rounds[task][index], tiling.geometry(self.device, self.sizes[-1]))
        return self._rows[key]

    def flight(self, choice: Choice) -> tuple[int, ...] | None:
        """By stage, how many micro-batches may be in flight under the cap; None: not one."""
        pp, found = self.costs.mesh.pp, []
        for stage, room in enumerate(self._rooms(choice)):
            free = self.cap - room.weights - room.tables - room.work
            if free < room.held:
                return None
            if pp == 1:
                # What is in flight runs at a time, each with a workspace.
                found.append(min(self._lanes(choice), (free + room.work) // max(1, room.held + room.work)))
            else:
                found.append(min(pp - stage + choice.more, free // max(1, room.held)))
        return tuple(found)

    def _lanes(self, choice: Choice) -> int:
        """Micro-batches that shards of one stage run at a time: of two groups, for those of one add to the same gradients."""
        mesh = self.costs.mesh
        return 2 if mesh.pp == 1 < mesh.tp and len(choice.groups) > 1 and choice.hidden and not choice.drain else 1

    def _rooms(self, choice: Choice) -> list[Room]:
        """By stage, of whichever group takes most."""
        each = [self.costs.rooms(self._extras(tasks), shape) for tasks, shape in zip(choice.groups, choice.shapes, strict=True)]
        return [
            Room(own[0].weights, own[0].tables, max(room.work for room in own), max(room.held for room in own))
            for own in zip(*each, strict=True)
        ]

    def _extras(self, tasks: Sequence[str]) -> frozenset[str]:
        return self.costs.cost.survey.extras(tasks)

    def steps(self, choice: Choice, flight: Sequence[int]) -> list[list[Micro]]:
        """Of all rounds, each group's optimizer step after the other; micro-batches that share a device are slower by as much."""
        lanes, found = flight[0] if len(flight) == 1 else 1, []
        for index in range(self._count):
            for tasks, shape in zip(choice.groups, choice.shapes, strict=True):
                extras = self._extras(tasks)
                chunks = self.chunks(tasks, shape.tokens, index)
                micros = [
                    self.costs.micro(own.tasks, extras, shape, rows=own.rows, lanes=lanes, beside=choice.beside) for own in chunks
                ]
                micros = [slowed(own, lanes) for own in micros]
                if micros:
                    found.append(micros)
        return found

    def stepping(self, steps: Sequence[Sequence[Micro]]) -> list[tuple[float, ...]]:
        """By step, seconds of its tasks' optimizer steps in each stage."""
        if not self._taking:
            self._taking = {task: self.costs.step(task) for task in self.rounds}
        stepped = ({task for micro in step for task in micro.tasks} for step in steps)
        return [tuple(map(sum, zip(*(self._taking[task] for task in tasks), strict=True))) for tasks in stepped]

    def run(self, choice: Choice) -> Run:
        """Play all rounds by the simulator.

        Raises:
            Unfit: a stage's rank has too few bytes.
        """
        flight = self.flight(choice)
        if flight is None:
            raise Unfit(self.refusal(choice))
        steps = self.steps(choice, flight)
        stepping = self.stepping(steps)
        rooms = self._rooms(choice)
        sizes = {f"s.{stage}": room.held for stage, room in enumerate(rooms)}
        if len(flight) == 1 < flight[0]:
            program = beside(steps, lanes=flight[0], stepping=stepping)
        else:
            program = staged(steps, flight=flight, drain=choice.drain, stepping=stepping)
        timeline = simulate(program, seconds=durations(steps, stepping), nbytes=sizes)
        works = [room.work * (flight[0] if len(flight) == 1 else 1) for room in rooms]
        peak = tuple(
            room.weights + room.tables + works[stage] + timeline.peak_bytes.get(stage, 0) for stage, room in enumerate(rooms)
        )
        rows = sum(
            shape.tokens * len(self.chunks(tasks, shape.tokens, index))
            for tasks, shape in zip(choice.groups, choice.shapes, strict=True)
            for index in range(self._count)
        )
        return Run(choice, flight, timeline, rows, peak)

    @property
    def _count(self) -> int:
        return len(next(iter(self.rounds.values())))

    def refusal(self, choice: Choice) -> str:
        """Which stage's rank has too few bytes for a choice."""
        rooms = self._rooms(choice)
        stage = max(range(len(rooms)), key=lambda own: rooms[own].least)
        room, regions = rooms[stage], self.costs.stages[stage]
        name = regions[0].name if len(regions) == 1 else f"{regions[0].name} to {regions[-1].name}"
        chunk = f"{room.work + room.held:,} for one chunk of {choice.shapes[0]}"
        return (
            f"memory: a rank of stage {stage} ({name}) needs {room.least:,} bytes ({room.weights:,} of weights, "
            f"{room.tables:,} of {len(self.rounds)} tasks, {chunk}), {self.costs.cost.machine.name} "
            f"has {self.cap:,}: more stages or shards hold less each"
        )

    # --- the best one ---

    def best(self, partitions: Sequence[Groups], *, more: Sequence[int] = (0,), hidden: bool = True) -> Run:
        """The fastest choice of groups, one size of chunks for all, and what may be in flight.

        Raises:
            Unfit: none does, with the numbers of the smallest chunk.
        """
        found = self._searched(partitions, more, Choice((), (), hidden=hidden))[:2]
        return min((self.run(own) for _, own in found), key=lambda run: run.seconds)

    def close(self, partitions: Sequence[Groups], *, more: Sequence[int] = (0,)) -> list[Choice]:
        """Of each number of groups the fastest choice, if it is nearly as fast as the fastest of all: more rounds may tell.

        Raises:
            Unfit: as `best`.
        """
        found: dict[int, tuple[float, Choice]] = {}
        for seconds, own in self._searched(partitions, more, Choice((), ())):
            found.setdefault(len(own.groups), (seconds, own))
        least = min(seconds for seconds, _ in found.values())
        return [own for seconds, own in found.values() if seconds <= least * _CLOSE]

    def fitted(self, choice: Choice) -> Run:
        """The same groups, each in turn with the fastest of the sizes of chunks about its own."""
        best = self.run(choice)
        for index, tasks in enumerate(choice.groups):
            longest = max(length for task in tasks for step in self.rounds[task] for length in (0, *step))
            place = self.sizes.index(choice.shapes[index].tokens)
            for tokens in self.sizes[max(0, place - _ABOUT) : place + _ABOUT + 1]:
                shapes = list(best.choice.shapes)
                if tokens < longest or tokens == shapes[index].tokens:
                    continue
                shapes[index] = replace(shapes[index], tokens=tokens)
                own = replace(best.choice, shapes=tuple(shapes))
                if self.flight(own) == best.flight:
                    best = min(best, self.run(own), key=lambda run: run.seconds)
        return best

    def alone(self) -> Run:
        """One task after another, each in its best size of chunks; a step begins when the one before it is over.

        Raises:
            Unfit: as `best`.
        """
        tasks = tuple(self.rounds)
        own = [self._searched([((task,),)], (0,), Choice((), (), drain=True, hidden=False))[0][1] for task in tasks]
        return self.run(Choice(tuple((task,) for task in tasks), tuple(each.shapes[0] for each in own), drain=True, hidden=False))

    def _searched(self, partitions: Sequence[Groups], more: Sequence[int], like: Choice) -> list[tuple[float, Choice]]:
        """Some candidates that were played, the fastest first, each with its seconds.

        All rounds are played: a size that holds the first few may need a chunk more in the next. Those whose bound is least are
        played first, until the next one's is no less than the best that was played.
        """
        bounds = [
            (self._bound(choice, flight), index, choice, flight)
            for index, (choice, flight) in enumerate(self._candidates(partitions, more, like))
        ]
        times: list[tuple[float, int, Choice]] = []
        for bound, index, choice, flight in sorted(bounds, key=lambda own: own[:2]):
            if times and (bound >= min(times)[0] * _CLOSE or len(times) == PLAYED):
                break
            times.append((self._makespan(choice, flight), index, choice))
        self.played += len(times)
        self.candidates += len(bounds)
        return [(seconds, choice) for seconds, _, choice in sorted(times, key=lambda own: own[:2])]

    def _makespan(self, choice: Choice, flight: Sequence[int]) -> float:
        if len(flight) == 1 < flight[0]:
            return self.run(choice).seconds
        steps = self.steps(choice, flight)
        return makespan(steps, flight=flight, drain=choice.drain, stepping=self.stepping(steps))

    def _bound(self, choice: Choice, flight: Sequence[int]) -> float:
        """Less than any order takes: what the busiest stage computes, and before and behind it the least of the others; and what a
        task's own steps take, one after another."""
        lanes = flight[0] if len(flight) == 1 else 1
        means: list[tuple[int, Micro]] = []
        micros: list[Micro] = []
        apart = dict.fromkeys(self.rounds, 0.0)
        for tasks, shape in zip(choice.groups, choice.shapes, strict=True):
            steps = [self.chunks(tasks, shape.tokens, index) for index in range(self._count)]
            filled = [each.rows for step in steps for each in step]
            if not filled:
                continue
            mean, least = (
                self.costs.micro(tasks, self._extras(tasks), shape, rows=rows, lanes=lanes, beside=choice.beside)
                for rows in (sum(filled) / len(filled), min(filled))
            )
            means.append((len(filled), mean))
            micros.append(least)
            for step in steps:
                for task in {task for each in step for task in each.tasks}:
                    apart[task] += _step(least, len(step))
        return max(
            *apart.values(),
            *(
                sum(count * (own.forward[stage] + own.backward[stage]) for count, own in means)
                + min((sum(own.forward[:stage]) for own in micros), default=0.0)
                + min((sum(own.backward[:stage]) for own in micros), default=0.0)
                for stage in range(len(flight))
            ),
        )

    def _candidates(
        self, partitions: Sequence[Groups], more: Sequence[int], like: Choice
    ) -> Iterator[tuple[Choice, tuple[int, ...]]]:
        """Those that fit, with what may be in flight. Layers are checkpointed only where a pipeline would not be full otherwise."""
        fitting, smallest = False, None
        for groups in partitions:
            most = max(max(sum(map(sum, (self.rounds[t][i] for t in own))) for own in groups) for i in range(self._count))
            longest = max(length for own in groups for task in own for step in self.rounds[task] for length in (0, *step))
            for tokens in (size for size in self.sizes if size >= longest):
                for checkpoint in self.variants:
                    own = replace(like, groups=groups, shapes=(Shape(tokens, checkpoint),) * len(groups))
                    smallest = min(smallest or own, own, key=lambda each: max(room.least for room in self._rooms(each)))
                    flight = self.flight(own)
                    if flight is None:
                        continue
                    seen: set[tuple[int, ...]] = set()
                    for extra in more:
                        choice = replace(own, more=extra)
                        wider = self.flight(choice)
                        if wider is not None and wider not in seen:
                            seen.add(wider)
                            fitting = True
                            yield choice, wider
                    if all(own >= self.costs.mesh.pp - stage for stage, own in enumerate(flight)):
                        break
                if tokens >= most * 2:
                    break  # one chunk holds every round already
        if not fitting:
            assert smallest is not None
            raise Unfit(self.refusal(smallest))


def counts(mesh: Mesh, tasks: int) -> range:
    """Numbers of groups that are worth a play: up to two for each stage, and for each of the two lanes of shards of one stage."""
    return range(1, min(2 * max(mesh.pp, 2 if mesh.tp > 1 else 1), tasks) + 1)


def slowed(own: Micro, times: int) -> Micro:
    """One that takes so many times the seconds, as it does beside others."""
    return replace(own, forward=tuple(times * each for each in own.forward), backward=tuple(times * each for each in own.backward))


def dealt(rows: Mapping[str, float], count: int) -> Groups:
    """Tasks in so many groups of about as many rows: the heaviest first, each to the group that has least."""
    groups: list[list[str]] = [[] for _ in range(count)]
    for task in sorted(rows, key=lambda own: -rows[own]):
        min(groups, key=lambda own: sum(rows[each] for each in own)).append(task)
    order = list(rows)
    return tuple(tuple(sorted(own, key=order.index)) for own in groups)


def _step(own: Micro, count: int) -> float:
    """Less than a step of so many micro-batches takes: one goes through all stages and back, a stage computes all of them."""
    ways = [forward + backward for forward, backward in zip(own.forward, own.backward, strict=True)]
    return max(sum(ways), *(sum(ways[:stage]) + count * way for stage, way in enumerate(ways)))
