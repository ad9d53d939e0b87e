"""pipeline: micro-batches of several groups and steps on their way through the stages, and optimizer steps beside them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from runtime.comm import Ranks
from runtime.executor import Executor, Loss
from runtime.order import Micro, staged
from runtime.pack import Chunk
from runtime.program import Action, Kind, Program
from runtime.trace import Trace


@dataclass(slots=True)
class Unit:
    """Chunks of one group, the last of which is followed by what `close` does: what its tasks learn from at one optimizer step.

    `chunks` are those of this replica, maybe none.
    """

    executor: Executor
    chunks: Sequence[Chunk]
    tasks: tuple[str, ...]
    loss: Loss


class Jobs:
    """Work beside the micro-batches, one after another: on a GPU a stream of its own, elsewhere a thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "muxcompile steps") if self._stream is None else None

    def begin(self, work: Callable[[], None]) -> Callable[[], None]:
        """Begin once what runs now is done.

        Returns:
            To be called before anything that needs the work done; it raises what the work raised.
        """
        if self._thread is not None:
            future: Future[None] = self._thread.submit(work)
            return lambda: future.result()
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            event = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(event)


class Pipeline:
    """Runs units over the stages of a mesh. All ranks of a replica call it with the same units, in the same order.

    Args:
        flight: by stage, micro-batches that may be between their forward and their backward.
    """

    def __init__(self, ranks: Ranks, flight: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.flight = flight
        self._jobs = Jobs(ranks.device)

    def train(self, units: Sequence[Unit], close: Callable[[Unit], None]) -> None:
        """Forwards and backwards of all units, in the order that `staged` finds; `close` of each, in their order, beside the next.

        A unit's forwards wait until those before it that share a task with it are closed.
        """
        none = (0.0,) * len(self.flight)
        steps, stepping = [], []
        for own in units:
            forward, backward, step = zip(*own.executor.compiled.stages, strict=True)
            steps.append(tuple(Micro(own.tasks, forward, backward) for _ in own.chunks) or (Micro(own.tasks, none, none),))
            stepping.append(tuple(len(own.tasks) * seconds for seconds in step))
        program = _order(tuple(steps), tuple(stepping), self.flight)
        micros = [(unit, chunk) for unit in units for chunk in (*unit.chunks, *(() if unit.chunks else (None,)))]
        free = list(range(self.flight[self.ranks.stage]))
        slots: dict[int, int] = {}
        closed: dict[str, Callable[[], None]] = {}
        begun: list[Unit] = []
        trace = units[0].executor.trace if units else None
        if trace is not None:
            trace.begin(program, [0 if chunk is None else unit.executor.compiled.geometry.tokens for unit, chunk in micros])
        for action in program.of(self.ranks.stage):
            with self._named(action):
                if action.kind is Kind.STEP:
                    own = units[len(begun)]
                    begun.append(own)
                    closed |= dict.fromkeys(own.tasks, self._jobs.begin(partial(_close, close, own, action, trace)))
                    continue
                own, chunk = micros[action.micro]
                if chunk is None:
                    continue
                if action.kind is Kind.F:
                    for task in own.tasks:
                        if task in closed:
                            closed.pop(task)()
                    slots[action.micro] = heapq.heappop(free)
                    own.executor.forward(action.micro, chunk, own.loss, slots[action.micro], train=True)
                elif action.kind is Kind.B:
                    own.executor.backward(action.micro)
                    heapq.heappush(free, slots.pop(action.micro))
        for task, wait in closed.items():
            with self._named(Action(self.ranks.stage, "comm", Kind.STEP, "optimizer", (task,), 0, (), ())):
                wait()

    @contextmanager
    def _named(self, action: Action) -> Iterator[None]:
        """What goes wrong within, as when another rank is gone, with this rank's place in the program."""
        try:
            yield
        except RuntimeError as error:
            ranks = self.ranks
            place = f"rank {ranks.rank} (replica {ranks.replica}, stage {ranks.stage}, shard {ranks.shard} of mesh {ranks.mesh})"
            shown = f"{action.kind} {action.region} of micro-batch {action.micro}, tasks {', '.join(action.tasks)}"
            raise RuntimeError(f"{place}: {shown}: {error}") from error

    def evaluate(self, units: Sequence[Unit]) -> None:
        """Forwards of all units."""
        micro = 0
        for unit in units:
            for chunk in unit.chunks:
                unit.executor.forward(micro, chunk, unit.loss, 0, train=False)
                micro += 1


def flight(stages: int) -> tuple[int, ...]:
    """Micro-batches that may be between their forward and their backward in each stage, as in 1F1B."""
    return tuple(stages - stage for stage in range(stages))


def _close(close: Callable[[Unit], None], unit: Unit, action: Action, trace: Trace | None) -> None:
    with nullcontext() if trace is None else trace.span(f"{action.kind} {action.region}", action.micro):
        close(unit)


@lru_cache(64)
def _order(steps: tuple[tuple[Micro, ...], ...], stepping: tuple[tuple[float, ...], ...], flight: tuple[int, ...]) -> Program:
    return staged(steps, flight=flight, stepping=stepping)
