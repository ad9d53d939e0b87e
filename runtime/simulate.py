"""Simulate: play a program on no device, with given durations and sizes, before any device sees it.

The actions of one (rank, stream) run in their order; an action starts when its stream is free and everything it reads has
been written on its rank; streams and ranks run side by side. A SEND and the RECV that it matches start together and end together,
as NCCL's do: each waits for the other. The first SEND listed from a rank to another matches the first RECV listed there from it.
Ranks meet in optimizer steps (they exchange norms): a STEP starts on all ranks together, and ends on each after its own time.
What comes out is a `Timeline` (who runs when, how long, how much memory) or a `ProgramError` whose text is the grid of what ran,
with an arrow at the action that cannot.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime.program import Action, Kind, Program

Lane = tuple[int, str]  # (rank, stream)
Value = tuple[int, str, int]  # (rank, name, micro-batch)
Row = tuple[str, dict[Lane, str], str]  # (start, cells, note)

_SHARED = -1  # the micro-batch of a value that all micro-batches share
_NOBODY = -1  # the writer of a value that nobody writes: it never ends
_ROWS = 24  # a refusal shows the last rows before the arrow, not a whole step of thousands
_STREAMS = ("compute", "comm", "copy")  # their numbers in a trace; other streams follow by name


class ProgramError(ValueError):
    """A program that cannot run as it is scheduled. The message ends in the grid up to the bad action."""


class Span(NamedTuple):
    """One action in time: seconds from the program's start. `issued`: when the host began to launch it; None: nobody noted it."""

    action: Action
    start: float
    end: float
    issued: float | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A program as it would run.

    `spans` are in order of start; `seconds` is the makespan; `peak_bytes` is by rank; `idle` is the fraction of the makespan
    in which a (rank, stream) runs nothing.
    """

    spans: tuple[Span, ...]
    seconds: float
    peak_bytes: Mapping[int, int]
    idle: Mapping[Lane, float]

    def __str__(self) -> str:
        peaks = ", ".join(f"rank {rank} {peak:,}" for rank, peak in self.peak_bytes.items())
        idle = ", ".join(f"{rank}.{stream} {fraction:.1%}" for (rank, stream), fraction in self.idle.items())
        return f"{_table(tuple(self.idle), _rows(self.spans))}\n{self.seconds * 1e3:.3f} ms; peak bytes: {peaks}; idle: {idle}\n"


def simulate(
    program: Program,
    *,
    seconds: Mapping[tuple[Kind, str], float] | Callable[[Action], float],
    nbytes: Mapping[str, int],
    inputs: Iterable[str] = (),
    memory_cap: int | None = None,
    resident: int = 0,
) -> Timeline:
    """Play `program` and time it.

    A name means another value in every micro-batch (`NAME^3` is that of micro-batch 3), except the `inputs` and names that begin
    with `grad.`, which all micro-batches share: gradients accumulate, and who reads one waits for every write listed before it.
    A STEP reads what any micro-batch listed before it wrote.

    A value takes its bytes from the start of the action that writes it to the end of the last one that reads it; a value
    that nobody reads is a result and stays.

    Args:
        program: the actions of all micro-batches.
        seconds: how long an action takes, by (kind, region) or by a function of the action.
        nbytes: the size of a value by its name; a name without a size takes no memory of its own (a view, or a part of
            `resident`).
        inputs: names that are there from the start on every rank that reads them, and stay.
        memory_cap: the most bytes that a rank may hold.
        resident: bytes that every rank holds from start to end.

    Raises:
        ProgramError: a value is read that nobody has written (no writer, or one that waits too), a SEND or RECV matches none, or
            one of other values, tasks or another micro-batch, ranks wait for each other, a value is written twice in a
            micro-batch (a `grad.` value: twice by one region), an input is written, a rank's memory is over the cap, an action
            has no duration, of ranks with STEPs one lacks a STEP of another, a SEND writes or a RECV reads, or what stands behind
            a name's `^` is no micro-batch, or stands in a write.
    """
    actions, given = program.actions, frozenset(inputs)
    _check(actions, given)
    store = _Store(actions, given, nbytes, resident, math.inf if memory_cap is None else memory_cap)
    waits = [frozenset[int]().union(*reads.values()) for reads in store.reads]
    lanes: dict[Lane, deque[int]] = {lane: deque() for lane in _lanes(actions)}
    for index, action in enumerate(actions):
        lanes[_lane(action)].append(index)
    partners = _partners(actions)
    ends: dict[int, float] = {}
    free, busy = dict.fromkeys(lanes, 0.0), dict.fromkeys(lanes, 0.0)
    spans: list[Span] = []
    while heads := [(lane, queue[0]) for lane, queue in lanes.items() if queue]:
        could = {
            index: max([free[lane], *(ends[writer] for writer in waits[index])])
            for lane, index in heads
            if waits[index] <= ends.keys()
        }
        ready = [
            (max([start, *(could[other] for other in partners[index])]), index)
            for index, start in could.items()
            if all(other in could for other in partners[index])
        ]
        if not ready:
            raise _stuck(store, [index for _, index in heads], ends, spans, partners, could)
        start, index = min(ready)  # nothing chosen later starts earlier: the play goes forward in time
        whole = _duration(actions[index], seconds)
        for own in (index, *partners[index]):
            lane, took = _lane(actions[own]), _duration(actions[own], seconds) if actions[own].peer is None else whole
            if complaint := store.play(own, start, start + took):
                raise _refusal(actions, spans, [(own, complaint)])
            lanes[lane].popleft()
            free[lane] = ends[own] = start + took
            busy[lane] += took
            spans.append(Span(actions[own], start, start + took))
    total = max(free.values(), default=0.0)
    idle = {lane: max(0.0, 1.0 - busy[lane] / total) if total else 0.0 for lane in lanes}
    return Timeline(tuple(spans), total, store.peak, idle)


def _check(actions: Sequence[Action], given: frozenset[str]) -> None:
    """Every action by itself: which micro-batch its names mean, and that a transfer goes one way.

    Raises:
        ProgramError: one that is not so.
    """
    for index, action in enumerate(actions):
        for name in action.writes:
            if "^" in name:
                raise _refusal(actions, [], [(index, f"writes {name}, but what it writes is of its own micro-batch")])
        for name in action.reads:
            _, marked, micro = name.partition("^")
            if marked and not _shared(name, given) and not (micro.isascii() and micro.isdecimal()):
                raise _refusal(actions, [], [(index, f"reads {name}, where {micro!r} is no micro-batch")])
        wrong = {Kind.SEND: ("writes", action.writes), Kind.RECV: ("reads", action.reads)}.get(action.kind)
        if wrong is not None and wrong[1]:
            raise _refusal(actions, [], [(index, f"{wrong[0]} {' '.join(wrong[1])}, which no {action.kind} does")])


def _shared(name: str, given: frozenset[str]) -> bool:
    """Whether all micro-batches mean the same value by a name."""
    return name.startswith("grad.") or name in given


class _Store:
    """The values of a program: who waits for whom, and what every rank holds while it plays."""

    def __init__(
        self, actions: Sequence[Action], given: frozenset[str], nbytes: Mapping[str, int], resident: int, cap: float
    ) -> None:
        self.actions, self.given, self.nbytes, self.cap = actions, given, nbytes, cap
        self.writers: defaultdict[Value, list[int]] = defaultdict(list)
        for index, action in enumerate(actions):
            for name in dict.fromkeys(action.writes):
                self.writers[self._value(action, name)].append(index)
        self.reads = [self._awaited(index) for index in range(len(actions))]
        self.readers = Counter(value for reads in self.reads for value in reads)  # how many are still to come
        self.written: set[Value] = set()
        self.added: set[tuple[str, int, Value]] = set()  # which region wrote what in which micro-batch
        self.last_read: dict[Value, float] = {}
        self.dying: list[tuple[float, Value]] = []  # a heap, by the end of the last read
        ranks = sorted({action.rank for action in actions})
        self.live: dict[int, dict[Value, int]] = {rank: {(rank, "(resident)", _SHARED): resident} for rank in ranks}
        for rank, name, micro in self.readers:
            if name in given:
                self.live[rank][rank, name, micro] = nbytes.get(name, 0)
        self.held = {rank: sum(live.values()) for rank, live in self.live.items()}
        self.peak = dict(self.held)

    def _value(self, action: Action, name: str) -> Value:
        if _shared(name, self.given):
            return action.rank, name, _SHARED
        own, _, micro = name.partition("^")
        return action.rank, own, int(micro) if micro else action.micro

    def _awaited(self, index: int) -> dict[Value, frozenset[int]]:
        """What action `index` reads, each with the actions it waits for: the writers listed before it, else the first after."""
        action, awaited = self.actions[index], {}
        for name in action.reads:
            values = [self._value(action, name)]
            if action.kind is Kind.STEP and values[0][2] != _SHARED:
                values = [v for v, by in self.writers.items() if v[:2] == values[0][:2] and by[0] < index] or values
            for value in values:
                writers = self.writers.get(value, [])
                late = [] if name in self.given else writers[:1] or [_NOBODY]
                awaited[value] = frozenset([writer for writer in writers if writer < index] or late)
        return awaited

    def play(self, index: int, start: float, end: float) -> str:
        """Run the action that starts next: what it writes comes alive. Returns what is wrong with it, if anything."""
        action = self.actions[index]
        rank, live = action.rank, self.live[action.rank]
        while self.dying and self.dying[0][0] <= start:
            _, dead = heapq.heappop(self.dying)
            self.held[dead[0]] -= self.live[dead[0]].pop(dead)
        for name in action.writes:
            value = self._value(action, name)
            if not name.startswith("grad.") and (name in self.given or value in self.written):
                whose = "is an input" if name in self.given else f"micro-batch {action.micro} has already written"
                return f"writes {name}, which {whose}"
            added = (action.region, action.micro, value)
            if added in self.added:
                return f"adds to {name}, as {action.region} already did in micro-batch {action.micro}"
            self.added.add(added)
            self.written.add(value)
            if value not in live:
                live[value] = self.nbytes.get(name, 0)
                self.held[rank] += live[value]
        self.peak[rank] = max(self.peak[rank], self.held[rank])
        if self.held[rank] > self.cap:
            largest = sorted(live.items(), key=lambda item: (-item[1], item[0]))[:3]
            named = ", ".join(f"{name} {size:,}" for (_, name, _), size in largest)
            return f"rank {rank} holds {self.held[rank]:,} bytes, over the cap of {self.cap:,} (largest: {named})"
        for value in self.reads[index]:
            self.readers[value] -= 1
            self.last_read[value] = max(end, self.last_read.get(value, end))
            if not self.readers[value] and value[1] not in self.given:
                heapq.heappush(self.dying, (self.last_read[value], value))
        return ""


def _partners(actions: Sequence[Action]) -> dict[int, tuple[int, ...]]:
    """With whom each action starts: a SEND with the RECV that it matches, and back; a STEP with those of the other ranks.

    Raises:
        ProgramError: one matches none, or one of other values, tasks or another micro-batch.
    """
    found: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(actions)), ())
    found |= _transfers(actions)
    meetings: dict[tuple[tuple[str, ...], int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, action in enumerate(actions):
        if action.kind is Kind.STEP:
            meetings[action.tasks, action.micro][action.rank].append(index)
    ranks = sorted({rank for meeting in meetings.values() for rank in meeting})
    for meeting in meetings.values():
        for place in range(max(map(len, meeting.values()))):
            own = {rank: meeting[rank][place] for rank in ranks if len(meeting[rank]) > place}
            if (lacking := next((rank for rank in ranks if rank not in own), None)) is not None:
                raise _refusal(actions, [], [(min(own.values()), f"no STEP of rank {lacking} matches it")])
            found |= {index: tuple(other for other in own.values() if other != index) for index in own.values()}
    return found


def _transfers(actions: Sequence[Action]) -> dict[int, tuple[int, ...]]:
    ends: dict[tuple[int, int], dict[Kind, list[int]]] = defaultdict(lambda: {Kind.SEND: [], Kind.RECV: []})
    for index, action in enumerate(actions):
        if action.peer is not None:
            way = (action.rank, action.peer) if action.kind is Kind.SEND else (action.peer, action.rank)
            ends[way][action.kind].append(index)
    found: dict[int, tuple[int, ...]] = {}
    for (source, target), both in ends.items():
        for place in range(max(map(len, both.values()))):
            pair = [indices[place] for indices in both.values() if place < len(indices)]
            if len(pair) < 2:
                rank, word = (target, Kind.RECV) if actions[pair[0]].kind is Kind.SEND else (source, Kind.SEND)
                raise _refusal(actions, [], [(pair[0], f"no {word} of rank {rank} matches it")])
            sent, received = (actions[index] for index in pair)
            if (sent.micro, sent.reads) != (received.micro, received.writes):
                note = f"where {_place(sent)} brings {' '.join(sent.reads)}"
                raise _refusal(
                    actions, [], [(pair[1], f"receives {' '.join(received.writes)} of micro-batch {received.micro}, {note}")]
                )
            if sent.tasks != received.tasks:
                note = f"is of {_named(received)}, where {_place(sent)} is of {_named(sent)}"
                raise _refusal(actions, [], [(pair[1], note)])
            found |= {pair[0]: (pair[1],), pair[1]: (pair[0],)}
    return found


def _duration(action: Action, seconds: Mapping[tuple[Kind, str], float] | Callable[[Action], float]) -> float:
    took = seconds(action) if callable(seconds) else seconds.get((action.kind, action.region), math.nan)
    if not 0 <= took < math.inf:
        raise ProgramError(f"no duration for {action.kind} {action.region}: `seconds` gives {took}")
    return took


def _stuck(
    store: _Store,
    heads: Sequence[int],
    ends: Mapping[int, float],
    spans: Sequence[Span],
    partners: Mapping[int, tuple[int, ...]],
    could: Mapping[int, float],
) -> ProgramError:
    """No stream can move. Point at an action that waits for nobody, else at one that waits for its own stream.

    Those in `could` have all that they read, and wait for a partner alone.
    """
    waited = {index: next(other for other in partners[index] if other not in could) for index in heads if index in could}
    alone = [(index, f"waits for {_place(store.actions[other])}") for index, other in waited.items()]
    late = []
    for index in heads:
        lane = _lane(store.actions[index])
        for value, writers in store.reads[index].items():
            for writer in sorted(writers - ends.keys()):
                distance = 0 if writer == _NOBODY else 1 if _lane(store.actions[writer]) == lane else 2
                late.append((distance, index, value, writer))
    if not late:
        return _refusal(store.actions, spans, alone, ", whose stream waits too")
    late.sort(key=lambda item: item[0])
    missing: dict[int, str] = {}
    for _, index, (_, name, _), _ in late:
        missing.setdefault(index, name)
    _, _, (rank, _, micro), writer = late[0]
    where = "" if micro == _SHARED else f" in micro-batch {micro}"
    nobody = f"no action of rank {rank} writes it{where}"
    why = nobody if writer == _NOBODY else f"{_place(store.actions[writer])} would, but waits too"
    notes = [(index, f"reads {name}, which nobody has written") for index, name in missing.items()] + alone
    return _refusal(store.actions, spans, notes, f" ({why})")


def _refusal(actions: Sequence[Action], spans: Sequence[Span], bad: Sequence[tuple[int, str]], why: str = "") -> ProgramError:
    """The error for actions that cannot run, each with what is wrong; the first is the one to look at."""
    rows, arrow = _rows(spans), "HERE"
    left_out = f"({len(rows) - _ROWS} rows above are left out)\n" if len(rows) > _ROWS else ""
    rows = rows[-_ROWS:]
    for index, note in bad:
        rows.append(("-", {_lane(actions[index]): _cell(actions[index])}, f"<-- {arrow}: {note}"))
        arrow = "stuck too"
    return ProgramError(f"{_place(actions[bad[0][0]])}: {bad[0][1]}{why}\n{left_out}{_table(_lanes(actions), rows)}")


def _rows(spans: Sequence[Span]) -> list[Row]:
    """One row for the actions that start together."""
    rows: list[Row] = []
    for action, start, *_ in spans:
        label, lane = f"{start * 1e3:.3f}", _lane(action)
        if not rows or rows[-1][0] != label or lane in rows[-1][1]:
            rows.append((label, {}, ""))
        rows[-1][1][lane] = _cell(action)
    return rows


def _table(lanes: Sequence[Lane], rows: Sequence[Row]) -> str:
    head: Row = ("ms", {lane: f"{lane[0]}.{lane[1]}" for lane in lanes}, "")
    table = [[label, *(cells.get(lane, ".") for lane in lanes), note] for label, cells, note in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])] for row in table]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _named(action: Action) -> str:
    return tasks_of(action) or "no task"


def _lane(action: Action) -> Lane:
    return action.rank, action.stream


def _lanes(actions: Iterable[Action]) -> list[Lane]:
    lanes = {_lane(action) for action in actions}
    numbers = stream_numbers(stream for _, stream in lanes)
    return sorted(lanes, key=lambda lane: (lane[0], numbers[lane[1]]))


def stream_numbers(streams: Iterable[str]) -> dict[str, int]:
    """The order in which streams are shown."""
    return {stream: number for number, stream in enumerate([*_STREAMS, *sorted(set(streams) - set(_STREAMS))])}


def _place(action: Action) -> str:
    return f"{action.rank}.{action.stream} {_cell(action)}"


def _cell(action: Action) -> str:
    """The action's own word, `F layers.3[alice+bob].0`; the tasks of a full chunk are counted."""
    tasks = tasks_of(action).split("+")
    shown = "+".join(tasks if len(tasks) <= 3 else [*tasks[:2], f"{len(tasks) - 2}-more"])
    return f"{action.kind} {action.region}[{shown}].{action.micro}"


def tasks_of(action: Action) -> str:
    """The tasks as the action's line spells them."""
    return str(action).partition("[")[2].partition("]")[0]
