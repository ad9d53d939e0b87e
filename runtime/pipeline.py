"""pipeline: micro-batches of several groups and steps on their way through the stages, and optimizer steps beside them."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from runtime.comm import Mesh, Ranks
from runtime.executor import Compiled, Executor, Loss
from runtime.order import Micro, beside, held, staged
from runtime.pack import Chunks
from runtime.places import places
from runtime.program import Action, Kind, Program
from runtime.symmetric import form, size
from runtime.trace import Run
from runtime.watch import Watch, shown


@dataclass(slots=True)
class Unit:
    """Chunks of one group: what its tasks learn from at one optimizer step.

    `chunks` are those of this replica, maybe none; `filled`: rows of each micro-batch that are some task's, of the replica that has
    most. All replicas run one program, for gradients are summed over them in its order: who has fewer chunks leaves out the last.
    """

    executor: Executor
    chunks: Chunks
    tasks: tuple[str, ...]
    loss: Loss
    filled: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch of a unit, of which this replica may have no chunk."""

    unit: Unit
    index: int

    @property
    def there(self) -> bool:
        return self.index < len(self.unit.chunks)


class Jobs:
    """Work beside the micro-batches, one after another: on a GPU a stream of its own, elsewhere a thread.

    Many small kernels, for which a group's next forward waits: as multiprocessors become free, they go before the layers'.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "muxcompile steps") if self._stream is None else None

    def begin(self, work: Callable[[], None], after: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Begin once what runs now is done.

        Args:
            after: what an earlier call returned, of work that this needs.

        Returns:
            To be called before anything that needs the work done; it raises what the work raised.
        """

        def begun() -> None:
            after()
            work()

        if self._thread is not None:
            future: Future[None] = self._thread.submit(begun)
            return lambda: future.result()
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            begun()
            event = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(event)


class Pipeline:
    """Runs units over the stages of a mesh. All ranks of a replica call it with the same units, in the same order.

    Args:
        flight: by stage, micro-batches that may be between their forward and their backward. Where there is one stage, they run
            at a time.
    """

    def __init__(self, ranks: Ranks, flight: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.flight = flight
        self._steps = Jobs(ranks.device)
        cuda = ranks.device.type == "cuda"
        # Elsewhere what waits for a rank is the call itself.
        self._watch = Watch(self._place) if cuda else None
        self._lanes = [torch.cuda.Stream(ranks.device) for _ in range(self.lanes if cuda and self.lanes > 1 else 0)]

    @property
    def lanes(self) -> int:
        """Micro-batches that compute at a time."""
        return self.flight[0] if len(self.flight) == 1 else 1

    @property
    def _streams(self) -> list[torch.cuda.Stream]:
        return self._lanes if self.lanes > 1 else []

    def reserve(self, groups: Sequence[Compiled]) -> None:
        """Make room for what the groups' micro-batches send. All ranks call it, with nothing on its way."""
        messages: dict[int, int] = {}
        for group in groups:
            for action in (action for program in (group.train, group.evaluate) for action in program if action.kind is Kind.RECV):
                assert action.peer is not None
                nbytes = size([form(group.received[name]) for name in action.writes])
                messages[action.peer] = max(nbytes, messages.get(action.peer, 0))
        sums = max((group.sums for group in groups), default=0)
        posts = max((12 * len(group.tasks) for group in groups), default=0)
        self.ranks.reserve(messages, sums, posts, flight=self.flight, lanes=self.lanes)

    def train(self, units: Sequence[Unit], prepare: Callable[[Unit], None], close: Callable[[Unit], None]) -> None:
        """Forwards and backwards of all units, in the order that `staged` finds, and what follows them beside the next.

        A unit's forwards wait until those before it that share a task with it are closed.

        Args:
            prepare: called when the last backward of a unit is through on this rank; it waits for no other stage. `close` of a unit
                before it may still run, beside the micro-batches; never beside it.
            close: called when it is through in every stage, on all ranks in one order.
        """
        course = _Course(self, units, prepare, close)
        with self._together():
            course.run()
        course.wait()

    def places(self, units: Sequence[Unit]) -> list[int]:
        """Of each unit, where `prepare` may post what `close` reads, if `train` is to run them."""
        program, micros = self._planned(units)
        order = {id(own): index for index, own in enumerate(units)}
        closed = [order[id(micros[action.micro].unit)] for action in program.of(0) if action.kind is Kind.STEP]
        return places([own.tasks for own in units], closed, [len(own.chunks) > 0 for own in units])

    def _planned(self, units: Sequence[Unit]) -> tuple[Program, list[_Part]]:
        """The program of all ranks, and its micro-batches."""
        none = (0.0,) * len(self.flight)
        steps, stepping = [], []
        for own in units:
            stages, tokens, step = own.executor.compiled.stages, own.executor.compiled.geometry.tokens, []
            for rows in own.filled:
                each = [[way - (tokens - rows) * less for way, less in zip(at.ways, at.spared, strict=True)] for at in stages]
                forward, backward = zip(*each, strict=True)
                step.append(Micro(own.tasks, forward, backward))
            steps.append(tuple(step) or (Micro(own.tasks, none, none),))
            stepping.append(tuple(len(own.tasks) * at.step for at in stages))
        micros = [_Part(own, index) for own in units for index in range(len(own.filled) or 1)]
        return _order(tuple(steps), tuple(stepping), self.flight), micros

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What runs in lanes within begins behind what the current stream has to do, and ends before what it does then."""
        current = torch.cuda.current_stream(self.ranks.device) if self._streams else None
        for stream in self._streams:
            stream.wait_stream(current)
        yield
        for stream in self._streams:
            assert current is not None
            current.wait_stream(stream)

    def _at(self, lane: int) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[lane]) if self._streams else contextlib.nullcontext()

    @contextlib.contextmanager
    def _named(self, action: Action) -> Iterator[None]:
        """What goes wrong within, as when another rank is gone, with this rank's place in the program."""
        try:
            yield
        except RuntimeError as error:
            ahead = self._watch.where() if self._watch is not None else ""
            device = f" (the device was in {ahead})" if ahead else ""
            raise RuntimeError(f"{self._place}: {shown(action)}{device}: {error}") from error

    @property
    def _place(self) -> str:
        ranks = self.ranks
        return f"rank {ranks.rank} (replica {ranks.replica}, stage {ranks.stage}, shard {ranks.shard} of mesh {ranks.mesh})"

    def _launched(self, action: Action) -> None:
        if self._watch is not None:
            self._watch.note(action)

    def evaluate(self, units: Sequence[Unit]) -> None:
        """Forwards of all units."""
        micro = 0
        for unit in units:
            for chunk in unit.chunks:
                unit.executor.forward(micro, chunk, unit.loss, 0, train=False)
                micro += 1


class _Course:
    """What one call of `train` has on its way on this rank."""

    def __init__(
        self, pipeline: Pipeline, units: Sequence[Unit], prepare: Callable[[Unit], None], close: Callable[[Unit], None]
    ) -> None:
        self._pipeline, self._prepare, self._close = pipeline, prepare, close
        self._stage = pipeline.ranks.stage
        self._program, self._micros = pipeline._planned(units)
        self._lanes = {f"lane{index}": index for index in range(pipeline.lanes)} if pipeline.lanes > 1 else {}
        self._free = list(range(pipeline.flight[self._stage]))
        self._slots: dict[int, int] = {}  # of micro-batches; those of a lane have its number
        self._left = {id(own): len(own.filled) or 1 for own in units}  # backwards to come
        self._prepared: dict[int, Callable[[], None]] = {}
        self._closed: dict[str, Callable[[], None]] = {}
        # Of micro-batches those whose forward others wait for, and where it ended.
        self._behind = held(self._program)
        self._forwarded: dict[int, torch.cuda.Event] = {}
        # Filled as they are needed, while the device is busy with those before.
        self._chunks = {id(own): iter(own.chunks) for own in units}
        self._trace = units[0].executor.trace if units else None
        if self._trace is not None:
            rows = (part.unit.executor.compiled.geometry.tokens if part.there else 0 for part in self._micros)
            filled = (part.unit.chunks.filled[part.index] if part.there else 0 for part in self._micros)
            self._trace.begin(Run(self._program, tuple(rows), tuple(filled)))

    def run(self) -> None:
        pipeline = self._pipeline
        for action in self._program.of(self._stage):
            part = self._micros[action.micro]
            if action.kind is Kind.F and self._lanes:
                self._slots[action.micro] = self._lanes[action.stream]  # though not there: what follows it waits for its lane
            elif action.kind is Kind.F and part.there:
                self._slots[action.micro] = heapq.heappop(self._free)
            with pipeline._named(action), pipeline._at(self._slots.get(action.micro, 0)):
                if action.kind is Kind.STEP:
                    self._step(action, part.unit)
                elif action.kind is Kind.F and part.there:
                    self._forward(action, part.unit)
                elif action.kind is Kind.B:
                    self._backward(action, part)

    def wait(self) -> None:
        """Until the optimizer steps are taken."""
        for task, wait in self._closed.items():
            with self._pipeline._named(Action(self._stage, "steps", Kind.STEP, "optimizer", (task,), 0, (), ())):
                wait()

    def _forward(self, action: Action, own: Unit) -> None:
        for task in own.tasks:
            if task in self._closed:
                self._closed.pop(task)()
        # A replica that has no chunk of one does not wait for it.
        for micro in (micro for micro in self._behind[action.micro] if micro in self._forwarded):
            torch.cuda.current_stream(self._pipeline.ranks.device).wait_event(self._forwarded[micro])
        own.executor.forward(action.micro, next(self._chunks[id(own)]), own.loss, self._slots[action.micro], train=True)
        self._pipeline._launched(action)
        if self._pipeline._streams and any(action.micro in others for others in self._behind.values()):
            self._forwarded[action.micro] = torch.cuda.current_stream(self._pipeline.ranks.device).record_event()

    def _backward(self, action: Action, part: _Part) -> None:
        own = part.unit
        if part.there:
            own.executor.backward(action.micro)
            self._pipeline._launched(action)
            if not self._lanes:
                heapq.heappush(self._free, self._slots[action.micro])
        self._left[id(own)] -= 1
        # Other stages wait for it. With lanes it has time until the step: a GPU has few queues for many streams, and what waits in
        # one, as for this backward, holds up all that is launched behind it, of other lanes too.
        if not self._left[id(own)] and not self._lanes:
            self._prepared[id(own)] = self._pipeline._steps.begin(partial(self._prepare, own))

    def _step(self, action: Action, own: Unit) -> None:
        steps = self._pipeline._steps
        prepared = steps.begin(partial(self._prepare, own)) if self._lanes else self._prepared.pop(id(own))
        begun = steps.begin(partial(self._stepped, action, own), after=prepared)
        self._closed |= dict.fromkeys(own.tasks, begun)

    def _stepped(self, action: Action, own: Unit) -> None:
        with contextlib.nullcontext() if self._trace is None else self._trace.span(f"{action.kind} {action.region}", action.micro):
            self._close(own)
        self._pipeline._launched(action)


def flight(mesh: Mesh) -> tuple[int, ...]:
    """Micro-batches that may be between their forward and their backward in each stage, as in 1F1B.

    Shards of one stage run two at a time, so that one's sums pass beside the other's layers.
    """
    if mesh.pp == 1:
        return (2 if mesh.tp > 1 else 1,)
    return tuple(mesh.pp - stage for stage in range(mesh.pp))


@lru_cache(64)
def _order(steps: tuple[tuple[Micro, ...], ...], stepping: tuple[tuple[float, ...], ...], flight: tuple[int, ...]) -> Program:
    """On one stage micro-batches run in lanes if several may be on their way."""
    if len(flight) == 1 and flight[0] > 1:
        return beside(steps, lanes=flight[0], stepping=stepping)
    return staged(steps, flight=flight, stepping=stepping)
