"""stages: a model cut into stages, one a rank, and the order in which each rank runs its part of every micro-batch.

A frozen backbone has no weight gradient to fill a pipeline's waits with; other tasks' micro-batches do. Their steps do not wait for
one another, so what one task leaves idle when its pipeline fills or drains, or while its optimizer step is due, another one takes.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.program import Action, Kind, Program


@dataclass(frozen=True, slots=True)
class Micro:
    """One chunk on its way through the stages.

    Args:
        tasks: whose tokens it holds.
        forward, backward: seconds in each stage.
        transfer: seconds between two stages, either way.
    """

    tasks: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float = 0.0


def cut(seconds: Sequence[float], count: int) -> tuple[int, ...]:
    """Regions in their order as `count` stages, the slowest as fast as can be; the first of two equal cuts.

    Args:
        seconds: of each region.

    Returns:
        The place behind each stage's last region; no stage is empty.

    Raises:
        ValueError: there are fewer regions than stages.
    """
    if not 0 < count <= len(seconds):
        raise ValueError(f"{len(seconds)} regions are not {count} stages")
    until = [0.0]
    for own in seconds:
        until.append(until[-1] + own)
    # By number of stages, the least slowest stage of the first n regions, and where the last stage begins.
    least, begins = [until[:]], [[0] * len(until)]
    for stages in range(2, count + 1):
        best, begin = [math.inf] * len(until), [0] * len(until)
        for stop in range(stages, len(until)):
            for start in range(stages - 1, stop):
                slowest = max(least[-1][start], until[stop] - until[start])
                if slowest < best[stop]:
                    best[stop], begin[stop] = slowest, start
        least.append(best)
        begins.append(begin)
    stops = [len(seconds)]
    for begin in reversed(begins[1:]):
        stops.append(begin[stops[-1]])
    return tuple(reversed(stops))


def staged(steps: Sequence[Sequence[Micro]], *, flight: Sequence[int], drain: bool = False) -> Program:
    """The program of some optimizer steps over stages: 1F1B within a step, other steps' micro-batches where it would wait.

    A rank runs backwards as they come, then optimizer steps that are due, then forwards; of micro-batches in the order in which
    they reach it. A step's forwards wait on every rank until the optimizer steps are taken there of those of its tasks that stepped
    before.

    Args:
        steps: in the order in which they may begin; in each every task that is in it takes one optimizer step. A micro-batch's
            number is its place among all.
        flight: by stage, micro-batches whose forward may have begun there and whose backward has not.
        drain: a step begins when the one before it is over, as where nobody else is there to fill.

    Returns:
        One rank for each stage; regions are called `stage.N`. What goes to the next rank, and gradients to the one before, has a
        stream for each end, so that no transfer waits for one of another pair of ranks.
    """
    return Program(tuple(_played(steps, flight, drain).actions))


def makespan(steps: Sequence[Sequence[Micro]], *, flight: Sequence[int], drain: bool = False) -> float:
    """Seconds that `staged` reckons with for its program: optimizer steps take none."""
    return max(_played(steps, flight, drain).free, default=0.0)


def _played(steps: Sequence[Sequence[Micro]], flight: Sequence[int], drain: bool) -> _Play:
    play = _Play(steps, flight, drain)
    while play.run():
        pass
    return play


class _Play:
    """Event by event, what each rank begins next."""

    def __init__(self, steps: Sequence[Sequence[Micro]], flight: Sequence[int], drain: bool) -> None:
        self.count = len(flight)
        assert all(own > 0 for own in flight), f"nothing may be in flight: {tuple(flight)}"
        self.micros = [micro for step in steps for micro in step]
        self.step_of = [index for index, step in enumerate(steps) for _ in step]
        self.last = {step: index for index, step in enumerate(self.step_of)}
        self.flight, self.drain = flight, drain
        self.actions: list[Action] = []
        self.free = [0.0] * self.count
        self.active = [0] * self.count
        # By rank: micro-batches whose forward or backward has come, in the order in which they came.
        self.forwards: list[deque[int]] = [deque() for _ in range(self.count)]
        self.forwards[0].extend(range(len(self.micros)))
        self.backwards: list[deque[int]] = [deque() for _ in range(self.count)]
        self.due: list[deque[tuple[int, str]]] = [deque() for _ in range(self.count)]
        # By rank and step: backwards to come of each task, and the last step before it that each of its tasks takes part in.
        self.left = [
            [{task: sum(task in micro.tasks for micro in step) for micro in step for task in micro.tasks} for step in steps]
            for _ in range(self.count)
        ]
        self.over = [0] * self.count  # by rank: steps whose backwards all came, as far as they have been counted
        last: dict[str, int] = {}
        self.before: list[dict[str, int]] = []
        for index, step in enumerate(steps):
            tasks = {task for micro in step for task in micro.tasks}
            self.before.append({task: last[task] for task in tasks if task in last})
            last |= dict.fromkeys(tasks, index)
        self.stepped: list[set[tuple[int, str]]] = [set() for _ in range(self.count)]
        self.arrivals: list[tuple[float, int, int, bool, int]] = []  # a heap: when, an order, rank, backward?, micro-batch
        self.sent: dict[tuple[int, int], float] = {}  # by both ranks: when the last transfer ends
        self.now = 0.0

    def run(self) -> bool:
        """One thing more; False when all is done."""
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, _, rank, backward, micro = heapq.heappop(self.arrivals)
            (self.backwards if backward else self.forwards)[rank].append(micro)
        if any(self._begin(rank) for rank in range(self.count)):
            return True
        later = [at for at in (*self.free, *(arrival[0] for arrival in self.arrivals[:1])) if at > self.now]
        if not later:
            assert not any((*self.forwards, *self.backwards, *self.due)), "micro-batches wait for each other"
            return False
        self.now = min(later)
        return True

    def _begin(self, rank: int) -> bool:
        """Begin what this rank does next, if it is free and something can be done."""
        if self.free[rank] > self.now:
            return False
        if self.backwards[rank]:
            self._backward(rank, self.backwards[rank].popleft())
        elif self.due[rank]:
            step, task = self.due[rank].popleft()
            self.stepped[rank].add((step, task))
            self._add(rank, "compute", Kind.STEP, "optimizer", (task,), self.last[step], (f"grad.{rank}",), ())
        elif (micro := self._forward_of(rank)) is not None:
            self.forwards[rank].remove(micro)
            self._forward(rank, micro)
        else:
            return False
        return True

    def _forward_of(self, rank: int) -> int | None:
        if self.active[rank] >= self.flight[rank]:
            return None
        for micro in self.forwards[rank]:
            step = self.step_of[micro]
            if self._ready(rank, step):
                return micro
            if rank or self.drain:
                return None  # those that come later came later to all that follow, or are of later steps
        return None

    def _ready(self, rank: int, step: int) -> bool:
        if self.drain:
            own = self.left[rank]
            while self.over[rank] < step and not any(own[self.over[rank]].values()):
                self.over[rank] += 1
            if self.over[rank] < step:
                return False
        return all((before, task) in self.stepped[rank] for task, before in self.before[step].items())

    def _forward(self, rank: int, micro: int) -> None:
        own, last = self.micros[micro], rank == self.count - 1
        reads = (f"h.{rank}",) if rank else ()
        if rank:
            self._add(rank, "recv_down", Kind.RECV, str(rank - 1), own.tasks, micro, (), reads)
        self._add(
            rank, "compute", Kind.F, f"stage.{rank}", own.tasks, micro, reads, (*(() if last else (f"h.{rank + 1}",)), f"s.{rank}")
        )
        self.active[rank] += 1
        self.free[rank] = self.now + own.forward[rank]
        if last:
            heapq.heappush(self.arrivals, (self.free[rank], len(self.actions), rank, True, micro))
            return
        self._add(rank, "send_down", Kind.SEND, str(rank + 1), own.tasks, micro, (f"h.{rank + 1}",), ())
        self._bring(rank, rank + 1, micro)

    def _backward(self, rank: int, micro: int) -> None:
        own, last = self.micros[micro], rank == self.count - 1
        reads = () if last else (f"d.{rank + 1}",)
        if not last:
            self._add(rank, "recv_up", Kind.RECV, str(rank + 1), own.tasks, micro, (), reads)
        writes = (*((f"d.{rank}",) if rank else ()), f"grad.{rank}")
        self._add(rank, "compute", Kind.B, f"stage.{rank}", own.tasks, micro, (*reads, f"s.{rank}"), writes)
        self.active[rank] -= 1
        self.free[rank] = self.now + own.backward[rank]
        step = self.step_of[micro]
        for task in own.tasks:
            self.left[rank][step][task] -= 1
            if not self.left[rank][step][task]:
                self.due[rank].append((step, task))
        if rank:
            self._add(rank, "send_up", Kind.SEND, str(rank - 1), own.tasks, micro, (f"d.{rank}",), ())
            self._bring(rank, rank - 1, micro)

    def _bring(self, rank: int, to: int, micro: int) -> None:
        """What a rank has just begun to make goes to another when it is there, behind what went before."""
        at = max(self.free[rank], self.sent.get((rank, to), 0.0)) + self.micros[micro].transfer
        self.sent[rank, to] = at
        heapq.heappush(self.arrivals, (at, len(self.actions), to, to < rank, micro))

    def _add(
        self,
        rank: int,
        stream: str,
        kind: Kind,
        region: str,
        tasks: tuple[str, ...],
        micro: int,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
    ) -> None:
        self.actions.append(Action(rank, stream, kind, region, tasks, micro, reads, writes))
