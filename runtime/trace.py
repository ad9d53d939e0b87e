"""trace: when the actions of a run really began and ended, on the device; and traces of runs, predicted and measured, as files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from runtime.program import Action, Kind, Program
from runtime.simulate import Span, Timeline, stream_numbers, tasks_of

# What a stage's forward and backward consist of; the loss is where the last stage's backward begins.
_PARTS = {Kind.F: Kind.F, Kind.LOSS: Kind.B, Kind.B: Kind.B}


class Run(NamedTuple):
    """A program that a pipeline has run, and of its micro-batches the rows of each one's chunk (0: this replica has none), and how
    many of these are some task's."""

    program: Program
    rows: tuple[int, ...]
    filled: tuple[int, ...]


@dataclass(slots=True)
class Trace:
    """Spans of what a rank computes, of what it waits for from others, and of optimizer steps beside it.

    `spans`: the number of the run, a name, a micro-batch, the host's time at its begin, and the marks at its begin and end; `runs`:
    what pipelines ran. Seconds count from where the trace was made: with the device idle, the host's too.
    """

    device: torch.device
    spans: list[tuple[int, str, int, float, Any, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    _zero: Any = None
    _made: float = 0.0

    def __post_init__(self) -> None:
        self._zero, self._made = self._mark(), time.perf_counter()

    def begin(self, run: Run) -> None:
        """What follows is of this program, of all ranks."""
        self.runs.append(run)

    @contextlib.contextmanager
    def span(self, name: str, micro: int) -> Iterator[None]:
        """What the block launches."""
        issued, begin = time.perf_counter() - self._made, self._mark()
        yield
        self.spans.append((len(self.runs) - 1, name, micro, issued, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> Iterator[tuple[int, Kind, str, int, float, float, float]]:
        """The spans in seconds; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for run, name, micro, issued, *marks in self.spans:
            begin, end = (
                self._zero.elapsed_time(mark) / 1e3 if self.device.type == "cuda" else mark - self._zero for mark in marks
            )
            kind, _, region = name.partition(" ")
            yield run, Kind(kind), region, micro, issued, begin, end

    def bubble(self) -> float:
        """The part of the time from the first begin to the last end in which nothing was computed."""
        times = sorted((begin, end) for _, kind, *_, begin, end in self._seconds() if kind in _PARTS)
        if not times:
            return 0.0
        busy, last = 0.0, times[0][0]
        for begin, end in times:
            busy += max(0.0, end - max(begin, last))  # those of other lanes run at the same time
            last = max(last, end)
        return 1.0 - busy / (last - times[0][0]) if last > times[0][0] else 0.0

    def actions(self, rank: int) -> list[list[Span]]:
        """Of each run, the actions of a rank of its program as they were measured, by their begin.

        A forward or backward lasts from its first region's begin to its last one's end; a RECV from where the rank had nothing else
        to do; a SEND until it is under way; a STEP from the rank's last backward, so that it waits for other ranks within.
        """
        known = [{(own.kind, own.region, own.micro): own for own in run.program.of(rank)} for run in self.runs]
        found: list[dict[Action, tuple[float, float, float]]] = [{} for _ in self.runs]
        for run, kind, region, micro, issued, begin, end in self._seconds():
            if run < 0:
                continue
            part = kind in _PARTS
            action = known[run][(_PARTS[kind], f"stage.{rank}", micro) if part else (kind, region, micro)]
            first, last, host = found[run].get(action, (begin, end, issued))
            found[run][action] = min(first, begin), max(last, end), min(host, issued)
        return [sorted((Span(action, *own) for action, own in each.items()), key=lambda own: own.start) for each in found]


def aligned(timelines: Sequence[Timeline], measured: Sequence[Sequence[Span]]) -> list[Span]:
    """Predicted runs one after another, the first forward of each where the first measured one of all ranks begins.

    Args:
        timelines: by run.
        measured: by run, the spans of all ranks.
    """
    found = []
    for timeline, spans in zip(timelines, measured, strict=True):
        first = [min((own.start for own in each if own.action.kind is Kind.F), default=0.0) for each in (spans, timeline.spans)]
        shift = first[0] - first[1]
        found += [own._replace(start=own.start + shift, end=own.end + shift) for own in timeline.spans]
    return found


def chrome(lanes: Mapping[str, Iterable[Span]]) -> dict[str, Any]:
    """Spans as Chrome's trace format, for Perfetto and `chrome://tracing`: a rank is a process, each of its streams a thread.

    Args:
        lanes: spans under "predicted", "measured" or both; threads are then called "predicted compute" and so on. Of a measured one
            `issued` (microseconds, as `ts`) says when the host launched it: where it begins no later than that, it waited for the
            host.
    """
    events: list[dict[str, Any]] = []
    known: dict[int, set[str]] = {}
    threads: set[tuple[int, int]] = set()
    kept = {what: list(spans) for what, spans in lanes.items()}
    numbers = stream_numbers(own.action.stream for spans in kept.values() for own in spans)
    for place, (what, spans) in enumerate(kept.items()):
        for own in spans:
            pid, tid = own.action.rank, numbers[own.action.stream] * len(kept) + place
            known.setdefault(pid, set()).add(what)
            if (pid, tid) not in threads:
                threads.add((pid, tid))
                thread = {"ph": "M", "pid": pid, "tid": tid}
                events.append({**thread, "name": "thread_name", "args": {"name": f"{what} {own.action.stream}"}})
                events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": tid}})
            events.append(_event(own, tid))
    heads: list[dict[str, Any]] = []
    for pid, words in sorted(known.items()):
        name = f"rank {pid} ({' and '.join(what for what in kept if what in words)})"
        heads.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        heads.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
    return {"traceEvents": heads + events, "displayTimeUnit": "ms", "otherData": {"source": " and ".join(kept)}}


def _event(own: Span, tid: int) -> dict[str, Any]:
    action, tasks = own.action, tasks_of(own.action)
    # Microseconds in whole nanoseconds: neighbours on one thread touch and never overlap, which viewers refuse.
    begin, finish = round(own.start * 1e6, 3), round(own.end * 1e6, 3)
    issued = {} if own.issued is None else {"issued": round(own.issued * 1e6, 3)}
    return {
        "ph": "X",
        "name": f"{tasks} {action.kind} {action.region}.{action.micro}".strip(),  # viewers colour by the beginning
        "cat": tasks or str(action.kind),
        "ts": begin,
        "dur": round(finish - begin, 3),
        "pid": action.rank,
        "tid": tid,
        "args": {"action": str(action), **issued},
    }
