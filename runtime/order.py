"""order: in which order the stages of a pipeline run their parts of every micro-batch.

A frozen backbone has no weight gradient to fill a pipeline's waits with; other tasks' micro-batches do. Their steps do not wait for
one another, so what one task leaves idle when its pipeline fills or drains, or while its optimizer step is due, another one takes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime.program import Action, Kind, Program


class Stage(NamedTuple):
    """Seconds in one stage: of a full chunk's forward and backward, and what each row of padding spares these; of an optimizer step
    of one task, on average."""

    ways: tuple[float, float]
    spared: tuple[float, float]
    step: float


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


def staged(
    steps: Sequence[Sequence[Micro]],
    *,
    flight: Sequence[int],
    drain: bool = False,
    stepping: Sequence[Sequence[float]] = (),
) -> Program:
    """The program of some optimizer steps over stages: 1F1B within a step, other steps' micro-batches where it would wait.

    A rank runs backwards as they come, then forwards; of micro-batches in the order in which they reach it. Optimizer steps run
    beside the micro-batches, on every rank in one order: they need the norms of all ranks, so they begin when the last backward
    is through on every rank, behind what a rank is computing then. Forwards of a step wait for the optimizer steps of its tasks'
    steps before.

    Args:
        steps: in the order in which they may begin; in each every task that is in it takes one optimizer step. A micro-batch's
            number is its place among all.
        flight: by stage, micro-batches whose forward may have begun there and whose backward has not.
        drain: a step begins when the one before it is over, its optimizer steps too, as where nobody else is there to fill.
        stepping: by step, seconds of its optimizer steps in each stage; empty: they take none.

    Returns:
        One rank for each stage; regions are called `stage.N`. What goes to the next rank, and gradients to the one before, has a
        stream for each end, so that no transfer waits for one of another pair of ranks.
    """
    return Program(tuple(_played(steps, flight, drain, stepping).actions))


def beside(steps: Sequence[Sequence[Micro]], *, lanes: int, stepping: Sequence[Sequence[float]] = ()) -> Program:
    """The program of some optimizer steps on one stage that runs several micro-batches at a time, each in a lane of its own.

    What one waits for, such as a sum over shards, passes beside what the others compute. A step's micro-batches run one after
    another: they add to the same gradients. A step begins in the lane that is free first, once those of its tasks before it are
    over; its optimizer steps begin behind its last backward, step by step in the order in which they are reckoned to.

    The lanes begin one forward apart, and stay so where their steps are alike: what stands still in one behind its last backward,
    until its tasks have stepped, then has the others' layers beside it.

    Args:
        steps, stepping: as `staged` has them; seconds are those of a micro-batch that runs alone.

    Returns:
        One rank, whose streams `lane0`, `lane1`, ... compute, and `steps` has the optimizer steps.
    """
    assert lanes > 0, "no lane"
    first = steps[0][0].forward[0] if steps and steps[0] else 0.0
    free, ends = [lane * first for lane in range(lanes)], list[float]()
    timed: list[tuple[float, Action]] = []
    latest: dict[str, int] = {}
    micro, met, last, began = 0, 0.0, list[int](), dict[int, int]()
    for index, step in enumerate(steps):
        assert step, "a step of no micro-batch"
        tasks = tuple(dict.fromkeys(task for own in step for task in own.tasks))
        before = tuple(sorted({latest[task] for task in tasks if task in latest}))
        latest |= dict.fromkeys(tasks, index)
        ready = max((ends[other] for other in before), default=0.0)
        lane = min(range(lanes), key=lambda own: max(free[own], ready))
        at = max(free[lane], ready)
        waits = tuple(f"{_STEPPED}^{last[other]}" for other in before)
        # A lane's first forward alone waits for that of the lane before.
        apart = (f"{_HELD}^{began[lane - 1]}",) if lane and lane not in began else ()
        began.setdefault(lane, micro)
        for own in step:
            at += _alone(timed, at, f"lane{lane}", own, micro, waits + apart, _gradient(0, index))
            micro, apart = micro + 1, ()
        timed.append((at, Action(0, "steps", Kind.STEP, "optimizer", tasks, micro - 1, (_gradient(0, index),), (_STEPPED,))))
        last.append(micro - 1)
        free[lane] = at
        met = max(met, at) + (stepping[index][0] if stepping else 0.0)
        ends.append(met)
    return Program(tuple(action for _, action in sorted(timed, key=lambda pair: pair[0])))


def _alone(
    timed: list[tuple[float, Action]], at: float, lane: str, own: Micro, micro: int, waits: tuple[str, ...], grad: str
) -> float:
    """A micro-batch's forward and backward on one rank; the seconds they take."""
    timed.append((at, Action(0, lane, Kind.F, "stage.0", own.tasks, micro, waits, (_HELD,))))
    timed.append((at + own.forward[0], Action(0, lane, Kind.B, "stage.0", own.tasks, micro, (_HELD,), (grad,))))
    return own.forward[0] + own.backward[0]


def held(program: Program) -> dict[int, list[int]]:
    """Of `beside`'s program, by micro-batch those whose forward its own waits for."""
    own = f"{_HELD}^"
    return {
        action.micro: [int(name.removeprefix(own)) for name in action.reads if name.startswith(own)]
        for action in program
        if action.kind is Kind.F
    }


def makespan(
    steps: Sequence[Sequence[Micro]],
    *,
    flight: Sequence[int],
    drain: bool = False,
    stepping: Sequence[Sequence[float]] = (),
) -> float:
    """Seconds that `staged` reckons with for its program, the last optimizer steps included."""
    play = _played(steps, flight, drain, stepping)
    return max(*play.met, *play.free)


def durations(steps: Sequence[Sequence[Micro]], stepping: Sequence[Sequence[float]] = ()) -> Callable[[Action], float]:
    """Seconds of the actions of `staged`'s program of these steps, as `runtime.simulate` asks for them."""
    micros = [(micro, index) for index, step in enumerate(steps) for micro in step]

    def seconds(action: Action) -> float:
        micro, step = micros[action.micro]
        if action.peer is not None:
            return micro.transfer
        if action.kind is Kind.STEP:
            return stepping[step][action.rank] if stepping else 0.0
        return (micro.forward if action.kind is Kind.F else micro.backward)[action.rank]

    return seconds


def _played(steps: Sequence[Sequence[Micro]], flight: Sequence[int], drain: bool, stepping: Sequence[Sequence[float]]) -> _Play:
    play = _Play(steps, flight, drain, stepping)
    while play.run():
        pass
    return play


class _Play:
    """Event by event, what each rank begins next."""

    def __init__(
        self, steps: Sequence[Sequence[Micro]], flight: Sequence[int], drain: bool, stepping: Sequence[Sequence[float]]
    ) -> None:
        self.count = len(flight)
        assert all(own > 0 for own in flight), f"nothing may be in flight: {tuple(flight)}"
        assert all(steps), "a step of no micro-batch"
        assert not stepping or len(stepping) == len(steps), "optimizer steps of other steps"
        self.micros = [micro for step in steps for micro in step]
        self.step_of = [index for index, step in enumerate(steps) for _ in step]
        self.last = [sum(map(len, steps[: index + 1])) - 1 for index in range(len(steps))]
        self.tasks = [tuple(dict.fromkeys(task for micro in step for task in micro.tasks)) for step in steps]
        self.flight, self.drain = flight, drain
        self.actions: list[Action] = []
        self.free = [0.0] * self.count
        self.active = [0] * self.count
        # By rank: micro-batches whose forward or backward has come, in the order in which they came.
        self.forwards: list[deque[int]] = [deque() for _ in range(self.count)]
        self.forwards[0].extend(range(len(self.micros)))
        self.backwards: list[deque[int]] = [deque() for _ in range(self.count)]
        self.left = [[len(step) for step in steps] for _ in range(self.count)]  # by rank: backwards to come of each step
        self.stepping = stepping or [(0.0,) * self.count] * len(steps)
        self.begun = [0] * len(steps)  # ranks that have begun the last backward of a step
        self.through = [0.0] * len(steps)  # when the last of these is through
        self.met = [0.0] * self.count  # by rank: when the optimizer steps that have begun are over
        self.over: set[tuple[int, int]] = set()  # ranks, and steps whose optimizer steps are over there
        # Of each step, those before it that a task of it waits for.
        latest: dict[str, int] = {}
        self.before: list[tuple[int, ...]] = []
        for index, tasks in enumerate(self.tasks):
            last = {index - 1} if drain and index else set()
            self.before.append(tuple(sorted(last | {latest[task] for task in tasks if task in latest})))
            latest |= dict.fromkeys(tasks, index)
        # A heap: when, an order, and what is then there: the rank's forward or backward of a micro-batch, or a step over there.
        self.arrivals: list[tuple[float, int, str, int, int]] = []
        self.sent: dict[tuple[int, int], float] = {}  # by both ranks: when the last transfer ends
        self.now = 0.0

    def run(self) -> bool:
        """One thing more; False when all is done."""
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, _, what, rank, number = heapq.heappop(self.arrivals)
            if what == "through":
                self._step(number)
            elif what == "over":
                self.over.add((rank, number))
            else:
                (self.backwards if what == "backward" else self.forwards)[rank].append(number)
        began = [self._begin(rank) for rank in range(self.count)]
        if any(began):
            return True
        later = [at for at in (*self.free, *(arrival[0] for arrival in self.arrivals[:1])) if at > self.now]
        if not later:
            assert not any((*self.forwards, *self.backwards)), "micro-batches wait for each other"
            return False
        self.now = min(later)
        return True

    def _begin(self, rank: int) -> bool:
        """Begin what this rank does next, if it is free and something can be done."""
        if self.free[rank] > self.now:
            return False
        if self.backwards[rank]:
            self._backward(rank, self.backwards[rank].popleft())
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
            if self._ready(rank, self.step_of[micro]):
                return micro
            if rank or self.drain:
                return None  # those that come later came later to all that follow, or are of later steps
        return None

    def _ready(self, rank: int, step: int) -> bool:
        return all((rank, before) in self.over for before in self.before[step])

    def _forward(self, rank: int, micro: int) -> None:
        own, last = self.micros[micro], rank == self.count - 1
        reads = (f"h.{rank}",) if rank else ()
        if rank:
            self._add(rank, "recv_down", Kind.RECV, str(rank - 1), own.tasks, micro, (), reads)
        waits = tuple(f"{_STEPPED}^{self.last[step]}" for step in self.before[self.step_of[micro]])
        writes = (*(() if last else (f"h.{rank + 1}",)), f"s.{rank}")
        self._add(rank, "compute", Kind.F, f"stage.{rank}", own.tasks, micro, (*reads, *waits), writes)
        self.active[rank] += 1
        self.free[rank] = self.now + own.forward[rank]
        if last:
            self._arrive(self.free[rank], "backward", rank, micro)
            return
        self._add(rank, "send_down", Kind.SEND, str(rank + 1), own.tasks, micro, (f"h.{rank + 1}",), ())
        self._bring(rank, rank + 1, micro)

    def _backward(self, rank: int, micro: int) -> None:
        own, last = self.micros[micro], rank == self.count - 1
        reads = () if last else (f"d.{rank + 1}",)
        if not last:
            self._add(rank, "recv_up", Kind.RECV, str(rank + 1), own.tasks, micro, (), reads)
        writes = (*((f"d.{rank}",) if rank else ()), _gradient(rank, self.step_of[micro]))
        self._add(rank, "compute", Kind.B, f"stage.{rank}", own.tasks, micro, (*reads, f"s.{rank}"), writes)
        self.active[rank] -= 1
        self.free[rank] = self.now + own.backward[rank]
        self.left[rank][self.step_of[micro]] -= 1
        if rank:
            self._add(rank, "send_up", Kind.SEND, str(rank - 1), own.tasks, micro, (f"d.{rank}",), ())
            self._bring(rank, rank - 1, micro)
        step = self.step_of[micro]
        if not self.left[rank][step]:
            self.begun[step] += 1
            self.through[step] = max(self.through[step], self.free[rank])
            if self.begun[step] == self.count:
                self._arrive(self.through[step], "through", rank, step)

    def _step(self, step: int) -> None:
        """The last backward is through on every rank: each begins its optimizer steps with what it computes next."""
        for rank, seconds in enumerate(self.stepping[step]):
            self._add(
                rank, "steps", Kind.STEP, "optimizer", self.tasks[step], self.last[step], (_gradient(rank, step),), (_STEPPED,)
            )
            self.met[rank] = max(self.now, self.free[rank], self.met[rank]) + seconds
            self._arrive(self.met[rank], "over", rank, step)

    def _bring(self, rank: int, to: int, micro: int) -> None:
        """What a rank has just begun to make goes to another when it is there, behind what went before."""
        at = max(self.free[rank], self.sent.get((rank, to), 0.0)) + self.micros[micro].transfer
        self.sent[rank, to] = at
        self._arrive(at, "backward" if to < rank else "forward", to, micro)

    def _arrive(self, at: float, what: str, rank: int, number: int) -> None:
        heapq.heappush(self.arrivals, (at, len(self.actions), what, rank, number))

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


# What optimizer steps write, and forwards behind them read.
_STEPPED = "stepped"
# What a forward on one stage leaves for its backward.
_HELD = "s.0"


def _gradient(rank: int, step: int) -> str:
    """What the backwards of a step add to on a rank: its optimizer steps wait for no other step's."""
    return f"grad.{rank}.{step}"
