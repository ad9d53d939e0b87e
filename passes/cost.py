"""cost: seconds and bytes of a chunk, for any of the tasks and any size, from a survey and what a machine does in a second.

Device time is the sum over nodes of the greater of arithmetic and memory traffic, with a launch each, and of products by frozen
matrices of measured shapes (`codegen.products`) what they took; the host issues nodes one
after another beside it. Whichever takes longer is the chunk's time, so that small chunks are bound by the host: this is the
saturation curve that grouping looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codegen import products, regions
from codegen.machine import Machine, machine
from codegen.products import Curve
from passes.loads import Price, Shape
from passes.needs import Extras
from passes.records import ATTENDING, FREE, OWN, PASSING, PRODUCT, Phase, Record, Storage
from passes.survey import Survey
from runtime.cudagraph import STEPS

Vector = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Cost:
    """One run of a phase: seconds of the device and of the host, bytes when it peaks beyond what is there at its start, and what it
    leaves for the backward; of the device's seconds those of launches, which other work on it may fill, and those that each row of
    padding spares it."""

    device: float
    host: float
    peak: float
    saved: float
    launches: float = 0.0
    spared: float = 0.0
    serial: bool = False

    @property
    def seconds(self) -> float:
        return self.device + self.host if self.serial else max(self.device, self.host)


class _Table:
    """A phase as arrays over its records and its storages."""

    def __init__(self, phase: Phase) -> None:
        rows, held = phase.records, phase.storages
        self.kinds = {kind: np.array([row.kind == kind for row in rows], bool) for kind in (PRODUCT, ATTENDING, PASSING, OWN, FREE)}
        self.flops = _amounts(row.flops for row in rows)
        self.elements = _amounts(row.elements for row in rows)
        self.routed = np.array([row.routed for row in rows], bool)
        self.weights = [(index, row.weight) for index, row in enumerate(rows) if row.weight is not None]
        self.nbytes = _amounts(row.nbytes for row in rows)
        self.per_key = np.array([row.per_key for row in rows])
        self.launches = np.array([row.launches for row in rows], float)
        self.groups = [row.group for row in rows]
        # The products inside an operator of ours are calls of its own, its other kernels are launched by it.
        self.hosts = [row.host or ("kernel" if row.kind == OWN else "call") for row in rows]
        self.calls_of = np.array([1 if row.host else row.launches for row in rows], float)
        self.rows, self.held = _Clauses(rows), _Clauses(held)
        self.sizes = _amounts(own.nbytes for own in held)
        self.born = np.array([own.born + 1 for own in held], int)
        self.dies = np.array([own.dies + 1 for own in held], int)
        self.saved = np.array([own.role == "saved" for own in held], bool)
        self.calls = phase.calls


class _Clauses:
    """Which of some things are there: those without a clause that fails, and without an exception that holds."""

    def __init__(self, things: Sequence[Record] | Sequence[Storage]) -> None:
        self.each = [own.clauses for own in things]
        self.all = list(dict.fromkeys(own for clauses in self.each for own in clauses))
        self.need = np.array([[own in clauses for own in self.all] for clauses in self.each], bool).reshape(len(self.each), -1)
        self.unless = [(index, own.unless) for index, own in enumerate(things) if isinstance(own, Storage) and own.unless]

    def alive(self, extras: Extras) -> Flags:
        found = ~(self.need & np.array([own.isdisjoint(extras) for own in self.all], bool)).any(1)
        for index, unless in self.unless:
            found[index] &= not any(all(not own.isdisjoint(extras) for own in clauses) for clauses in unless)
        return found


class _Total:
    """Seconds of a chunk, summed over the records of one set of clauses: extras then cost a short sum."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.plain: dict[tuple[Extras, ...], list[float]] = {}
        self.groups: dict[Any, list[tuple[float, tuple[Extras, ...]]]] = {}

    def add(self, name: Any, table: _Table, device: Vector, host: Vector, times: float) -> None:
        routed = np.where(table.routed, device / max(1, self.tokens), 0.0)
        for clauses, group, busy, issued, spared in zip(
            table.rows.each, table.groups, device.tolist(), host.tolist(), routed.tolist(), strict=True
        ):
            if group:
                self.groups.setdefault((name, group), []).append((busy * times, clauses))
                busy = 0.0
            total = self.plain.setdefault(clauses, [0.0, 0.0, 0.0])
            for index, own in enumerate((busy, issued, spared)):
                total[index] += own * times

    def at(self, extras: Extras) -> tuple[float, float, float]:
        """Seconds of the device, of the host, and those that the device is spared by each row of padding."""
        device = host = spared = 0.0
        holds: dict[tuple[Extras, ...], bool] = {}
        for clauses, (busy, issued, less) in self.plain.items():
            holds[clauses] = not any(own.isdisjoint(extras) for own in clauses)
            if holds[clauses]:
                device, host, spared = device + busy, host + issued, spared + less
        # Of the banks that a block may be in, the dearest counts.
        for members in self.groups.values():
            device += max((busy for busy, clauses in members if holds[clauses]), default=0.0)
        return device, host, spared


def _amounts(amounts: Any) -> tuple[Vector, Vector]:
    pairs = [(own.const, own.row) for own in amounts]
    return np.array([const for const, _ in pairs]), np.array([row for _, row in pairs])


def _at(pair: tuple[Vector, Vector], tokens: Vector) -> Vector:
    """[amounts, sizes]"""
    return pair[0][:, None] + pair[1][:, None] * tokens


_NO_COST = Cost(0.0, 0.0, 0.0, 0.0)
_HEAD = ("head",)


@dataclass(slots=True)
class CostModel:
    """Prices of chunks.

    Args:
        survey: of all tasks.
        machine: what it runs on.
        shapes: the chunks that a planner chooses from.
        measured: seconds of regions on this device (`codegen.regions`): for a part's key and phase, by chunk size.
        issued: seconds in which the host issues them, for a part's key and phase.
        keys: keys that a row of a chunk sees, on average (`keys` figures it from lengths).
        labelled: the fraction of a chunk's rows that have a loss.
        recorded: regions and optimizer steps are launched as CUDA graphs, so that of the host's seconds the loss's are left.
        objective: "time", or "energy" for prices in joules.
        products: measured rates of products by frozen matrices of (K, N).
    """

    survey: Survey
    machine: Machine
    shapes: Sequence[Shape] = ()
    measured: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    issued: Mapping[str, float] = field(default_factory=dict)
    keys: float = 128.0
    labelled: float = 0.75
    recorded: bool = False
    objective: str = "time"
    products: Mapping[tuple[int, int], Curve] = field(default_factory=dict)
    _tables: dict[Any, _Table] = field(default_factory=dict, init=False, repr=False)
    _bytes: dict[Any, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)
    _totals: dict[tuple[Shape, bool], _Total] = field(default_factory=dict, init=False, repr=False)
    _between: Any = field(default=None, init=False, repr=False)
    _prices: dict[tuple[Extras, Shape], Price] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        live = np.zeros((2, 2 * len(self.survey.order) + 2))
        for own in self.survey.held:
            # From the action behind the one that makes it, whose own peak has it, to the one that reads it last.
            for row, size in zip(live, (own.nbytes.const, own.nbytes.row), strict=True):
                row[own.born + 1] += size
                row[own.dies + 1] -= size
        self._between = np.cumsum(live, 1)[:, :-1]

    def chunk(self, extras: Extras, shape: Shape) -> Price:
        """One chunk that runs these extras: its forward, its loss and its backward."""
        known = self._prices.get((extras, shape))
        if known is None:
            device, host, spared = self._parts(extras, shape)
            cost = self._priced(*self.seconds(extras, shape))
            # Where the host takes longer padding spares nothing.
            less = cost * spared / device if device > host else 0.0
            known = self._prices[extras, shape] = Price(cost, self.bytes(extras, shape), less)
        return known

    def seconds(self, extras: Extras, shape: Shape, *, full: float = 1.0, called: bool = False) -> tuple[float, float]:
        """Seconds of a chunk, and the fraction of them in which the device works.

        Args:
            full: the fraction of the chunk's rows that are some task's, in whole blocks.
            called: the chunk holds a piece of a cut sequence, whose regions are no record.
        """
        device, host, spared = self._parts(extras, shape, called=called)
        device -= (1.0 - full) * shape.tokens * spared
        seconds = device + host if self.machine.serial else max(device, host)
        return seconds, device / seconds if seconds else 0.0

    def _parts(self, extras: Extras, shape: Shape, *, called: bool = False) -> tuple[float, float, float]:
        """Of a full chunk seconds of the device and of the host, and those that each row of padding spares the device."""
        key = shape, self.recorded and not called
        total = self._totals.get(key)
        if total is None:
            total = self._totals[key] = self._total(*key)
        device, host, spared = total.at(extras)
        return device, host + self.machine.record * key[1], spared

    def called(self, extras: Extras, shape: Shape) -> float:
        """What a chunk costs more when its regions are called, not launched as a record."""
        return self._priced(*self.seconds(extras, shape, called=True)) - self._priced(*self.seconds(extras, shape))

    def bytes(self, extras: Extras, shape: Shape) -> int:
        """The most that a chunk holds at once, beside what is resident: over forwards, loss and backwards, one after another."""
        order, tokens, count = self.survey.order, shape.tokens, len(self.survey.order)
        parts = self.survey.parts[shape.checkpoint]
        forward = [self._held((shape.checkpoint, i, "forward"), part.forward, extras, tokens) for i, part in enumerate(parts)]
        backward = [
            self._held((shape.checkpoint, i, "backward"), part.backward, extras, tokens)[0] if part.backward is not None else 0.0
            for i, part in enumerate(parts)
        ]
        before = np.cumsum([0.0, *(forward[index][1] for index in order)])
        peaks = np.zeros(2 * count + 1)
        peaks[:count] = before[:-1] + [forward[index][0] for index in order]
        rows = self.survey.head_row * (tokens + 1) + 8.0 * tokens
        peaks[count] = before[-1] + rows + self._held(_HEAD, self.survey.head, extras, 0)[0]
        # A backward holds its own saved tensors, and those of all regions before it, which run theirs later.
        peaks[count + 1 :] = (before[:-1] + [backward[index] for index in order])[::-1]
        return int((self._between[0] + self._between[1] * tokens + peaks).max())

    def forward(self, extras: Extras, shape: Shape) -> Price:
        """The forwards of a chunk alone, and the bytes that it holds from then on until its backwards."""
        parts = self.survey.parts[shape.checkpoint]
        costs = [self.phase(index, "forward", extras, shape) for index in range(len(parts))]
        device, host = (
            sum(getattr(cost, name) * len(p.regions) for cost, p in zip(costs, parts, strict=True)) for name in ("device", "host")
        )
        seconds = device + host if self.machine.serial else max(device, host)
        cost = self._priced(seconds, device / seconds)
        saved = sum(cost.saved * len(part.regions) for cost, part in zip(costs, parts, strict=True))
        count = len(self.survey.order)
        kept = sum(own.nbytes.at(shape.tokens) for own in self.survey.held if own.born < count <= own.dies)
        return Price(cost, int(saved + kept))

    def _priced(self, seconds: float, used: float) -> float:
        return seconds if self.objective == "time" else seconds * self.machine.watts(used)

    def phase(self, index: int, phase: str, extras: Extras, shape: Shape) -> Cost:
        """One run of one part's "forward" or "backward"."""
        part = self.survey.parts[shape.checkpoint][index]
        body = getattr(part, phase)
        if body is None:
            return _NO_COST
        found = self._cost((shape.checkpoint, index, phase), body, extras, shape.tokens)
        factor = self._factor((shape.checkpoint, index, phase), part.key, body, shape.tokens)
        times = self._issued((shape.checkpoint, index, phase), part.key, body)
        return replace(found, device=found.device * factor, host=found.host * times, spared=found.spared * factor)

    def head(self, extras: Extras) -> Cost:
        """One block of the loss with its gradient."""
        return self._cost(_HEAD, self.survey.head, extras, 0)

    def blocks(self, tokens: int) -> float:
        """Blocks of the loss in a chunk."""
        return -(-tokens * self.labelled // self.survey.geometry.head_rows)

    def source(self, index: int, phase: str, checkpoint: bool = False) -> str:
        """Where the figures of a part's phase come from."""
        sizes = sorted(self.measured.get(f"{self.survey.parts[checkpoint][index].key}.{phase}", {}))
        return f"measured at {', '.join(map(str, sizes))} tokens" if sizes else "by the roofline"

    def resident(self, tasks: Sequence[str] | None = None) -> int:
        """Bytes of the backbone, and of the tables and optimizers of these tasks (None: of all)."""
        chosen = self.survey.tasks if tasks is None else tasks
        return self.survey.backbone + sum(self.survey.tasks[task].nbytes for task in chosen)

    def step(self, tasks: Sequence[str], share: float = 1.0) -> float:
        """Seconds of one optimizer step of each of these tasks, over a share of their tensors."""
        total = 0.0
        for task in tasks:
            own = self.survey.tasks[task]
            # Read and written in norm, optimizer, copies in the compute dtype and clearing, by kernels over lists of tensors.
            moved, tensors = 6 * share * own.nbytes / self.machine.bandwidth, share * own.tensors
            if self.recorded and not own.encodings:
                # Several tasks' side by side: measured, eight reach 80% of the bandwidth with what they really move, and a task's
                # launches wait while others' run.
                total += 0.45 * moved + (60 + 0.3 * tensors) * self.machine.launch / STEPS
                continue
            # Called, few elements in many tensors keep the host busy. Per tensor: its place in the lists; per table a copy; per
            # encoding its forward and backward.
            calls = 20 + 0.5 * tensors + 2 * share * own.tables + 30 * own.encodings
            total += max(calls * self.machine.call, moved) + self.machine.serial * moved
        return total

    # --- one phase ---

    def _table(self, name: tuple[Any, ...], phase: Phase) -> _Table:
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = _Table(phase)
        return table

    def _total(self, shape: Shape, recorded: bool) -> _Total:
        found = _Total(shape.tokens)
        for index, part in enumerate(self.survey.parts[shape.checkpoint]):
            for phase, body in (("forward", part.forward), ("backward", part.backward)):
                if body is not None:
                    name = (shape.checkpoint, index, phase)
                    table = self._table(name, body)
                    device = self._device(table, np.array([shape.tokens], float))[:, 0]
                    factor = self._factor(name, part.key, body, shape.tokens)
                    host = self._host(table) * (0.0 if recorded else self._issued(name, part.key, body))
                    found.add(name, table, device * factor, host, len(part.regions))
        table = self._table(_HEAD, self.survey.head)
        found.add(_HEAD, table, self._device(table, np.zeros(1))[:, 0], self._host(table), self.blocks(shape.tokens))
        return found

    def _cost(self, name: tuple[Any, ...], phase: Phase, extras: Extras, tokens: int) -> Cost:
        """Seconds, as they add up in `seconds`."""
        if not phase.records:
            return _NO_COST
        found, table = _Total(tokens), self._table(name, phase)
        found.add(name, table, self._device(table, np.array([tokens], float))[:, 0], self._host(table), 1)
        launches = float(table.launches[table.rows.alive(extras)].sum()) * self.machine.launch
        device, host, spared = found.at(extras)
        return Cost(device, host, *self._held(name, phase, extras, tokens), launches, spared, self.machine.serial)

    def _held(self, name: tuple[Any, ...], phase: Phase, extras: Extras, tokens: int) -> tuple[float, float]:
        """Bytes at the peak of a phase, and those that it saves."""
        if not phase.storages:
            return 0.0, 0.0
        table = self._table(name, phase)
        held = table.held.alive(extras)
        key = name, held.tobytes(), tokens
        known = self._bytes.get(key)
        if known is None:
            # All sizes that may be asked for cost about what one does, and many extras hold the same.
            sizes = sorted({tokens, *(shape.tokens for shape in self.shapes)})
            peaks = _memory(table, held, np.array(sizes, float))
            self._bytes.update(
                {(*key[:2], size): (float(peak), float(saved)) for size, peak, saved in zip(sizes, *peaks, strict=True)}
            )
            known = self._bytes[key]
        return known

    def _host(self, table: _Table) -> Vector:
        seconds = {word: getattr(self.machine, word) for word in ("view", "call", "custom", "kernel")}
        return table.calls_of * np.array([seconds[word] for word in table.hosts])

    def _device(self, table: _Table, tokens: Vector) -> Vector:
        """Seconds of the device, [records, sizes]."""
        kinds, own = {kind: flags[:, None] for kind, flags in table.kinds.items()}, self.machine
        flops, moved, elements = (_at(amounts, tokens) for amounts in (table.flops, table.nbytes, table.elements))
        sizes, rates = np.array(own.products).T
        rate = np.interp(elements, sizes, rates) * np.minimum(1.0, np.maximum(elements, 1.0) / sizes[0])
        arithmetic = np.where(kinds[PRODUCT], flops / rate, flops / own.own)
        fraction = np.select([kinds[OWN], kinds[ATTENDING]], [own.owning, own.attending], own.passing)
        traffic = moved / (own.bandwidth * fraction)
        attention = table.per_key[:, None] * tokens * self.keys / own.attention
        # A tile of attention is loaded before it is multiplied, so its two times add.
        busy = np.where(kinds[ATTENDING], attention + traffic, np.maximum(arithmetic, traffic))
        for index, weight in table.weights:
            if weight in self.products:
                rows, measured = np.array(self.products[weight]).T
                # Fewer rows than were measured take as long.
                count = np.maximum(elements[index] / weight[1], rows[0])
                busy[index] = 2.0 * weight[0] * weight[1] * count / np.interp(count, rows, measured)
        return busy + table.launches[:, None] * own.launch

    def _issued(self, name: tuple[Any, ...], key: str, phase: Phase) -> float:
        """Measured over predicted seconds of the host; where it computes itself they are among the device's."""
        seconds = self.issued.get(f"{key}.{name[-1]}")
        if seconds is None or self.machine.serial:
            return 1.0
        return seconds / self._cost(name, phase, self.survey.extras(list(self.survey.tasks)), self.survey.tokens).host

    def _factor(self, name: tuple[Any, ...], key: str, phase: Phase, tokens: int) -> float:
        """Measured over predicted seconds, between measured sizes by straight line over the logarithm of the size."""
        sizes = self.measured.get(f"{key}.{name[-1]}")
        if not sizes:
            return 1.0
        everything = self.survey.extras(list(self.survey.tasks))
        points = sorted(sizes)
        costs = [self._cost(name, phase, everything, size) for size in points]
        # Where the host computes itself, its seconds are among the measured ones.
        busy = [max(sizes[size] - cost.host * cost.serial, 0.1 * sizes[size]) for size, cost in zip(points, costs, strict=True)]
        ratios = [seconds / cost.device for seconds, cost in zip(busy, costs, strict=True)]
        return float(np.interp(np.log(tokens), np.log(points), ratios))


def _memory(table: _Table, held: Flags, tokens: Vector) -> tuple[Vector, Vector]:
    """The peak of a phase, with what it is given and what it leaves, and the bytes that it saves."""
    sizes = np.where(held[:, None], _at(table.sizes, tokens), 0.0)
    if not len(sizes):
        return np.zeros(len(tokens)), np.zeros(len(tokens))
    # What is born in a call is there beside what dies in it.
    change = np.zeros((table.calls + 2, len(tokens)))
    np.add.at(change, table.born, sizes)
    np.subtract.at(change, np.minimum(table.dies + 1, table.calls + 1), np.where((table.dies <= table.calls)[:, None], sizes, 0.0))
    return np.cumsum(change[: table.calls + 1], 0).max(0), sizes[table.saved].sum(0)


def keys(lengths: Sequence[int], carried: Sequence[int] = ()) -> float:
    """Keys that a row sees on average, over sequences of these lengths, each behind so many keys of earlier pieces."""
    before = carried or [0] * len(lengths)
    rows = sum(lengths)
    return sum(length * (behind + (length + 1) / 2) for length, behind in zip(lengths, before, strict=True)) / rows if rows else 0.0


def cost_model(
    survey: Survey, device: str, shapes: Sequence[Shape], *, memory: int | None = None, folder: Path = regions.OWN, **known: Any
) -> CostModel:
    """The model of a device by its name ("cpu" for the host): its preset, its own measurements where there are any.

    Args:
        memory: bytes of the device; None: its preset's.
        folder: of the tables of measured regions.
        known: fields of `CostModel` that are known better than by default: `keys`, `labelled`, `objective`.
    """
    rows, found = regions.read(device, folder), machine(device, memory)
    drawn = [(row.seconds, row.watts) for row in rows if row.watts is not None]
    if drawn:
        found = replace(found, busy=sum(seconds * watts for seconds, watts in drawn) / sum(seconds for seconds, _ in drawn))
    return CostModel(survey, found, shapes, regions.seconds(rows), regions.issued(rows), products=products.table(device), **known)
