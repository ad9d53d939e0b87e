"""executor: walks a Program, one handler for each kind of action. It runs compiled text; what it changes is the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime import carry
from runtime.carry import Carried, Step, Turn
from runtime.comm import Ranks, join
from runtime.cudagraph import Recorder
from runtime.order import Stage
from runtime.pack import Chunk, Geometry
from runtime.program import Action, Kind, Program
from runtime.region import HeadSpec, RegionSpec, TemplateSpec, gradient_name
from runtime.state import State
from runtime.symmetric import form
from runtime.trace import Trace
from runtime.unmixed import unmixed

Call = Callable[[list[Any]], Any]
HEAD = "head"
_OF_REGIONS = (Kind.F, Kind.B)
# What the loss alone reads: its number of blocks changes from chunk to chunk.
_CALLED = frozenset({"chunk:rows", "chunk:targets", "chunk:weights"})


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler hands to the runtime for one group of tasks, as plain data and source text.

    `tasks` share its chunks; `sources` holds the text of every callable by name: `<template>.forward`, `<template>.backward`,
    `head.forward`, `head.backward`; `train` and `evaluate` are the programs of one micro-batch; `kernels` the texts of what
    operators launch, by what they stand for; `carried` what attentions carry from piece to piece of a sequence longer than a
    chunk, in the order of their numbers (none: no sequence may be longer); `kept`: of a sequence of up to so many pieces the
    forwards are kept for the backwards, of longer ones they run again (`runtime.carry.turns`).
    `recorded`: on a GPU chunks of whole sequences run as CUDA graphs.
    Of a model in stages this is one stage's. `stages`: seconds in each (none: there is one); `received`: shape and dtype of what
    others send; `sums`: bytes of the largest sum.
    """

    tasks: tuple[str, ...]
    geometry: Geometry
    templates: dict[str, TemplateSpec]
    regions: dict[str, RegionSpec]
    head: HeadSpec
    train: Program
    evaluate: Program
    sources: dict[str, str]
    kernels: dict[str, str] = field(default_factory=dict)
    carried: tuple[Carried, ...] = ()
    kept: int = 0
    recorded: bool = False
    stages: tuple[Stage, ...] = ()
    received: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    sums: int = 0


@dataclass(slots=True)
class Loss:
    """Per task: the sum of its negative log-likelihoods so far, [n, 1, 1] float32 on the device, and its token counts."""

    tasks: tuple[str, ...]
    sums: Tensor


@dataclass(frozen=True, slots=True)
class Stretch:
    """Actions one after another, all of regions or none; `leaves`: what later ones that are none of regions read of theirs."""

    regions: bool
    steps: tuple[Step, ...]
    leaves: frozenset[str]


class Records:
    """Of one program: its stretches, and by the bounds of sequences and stretch the launch of a record with what it leaves."""

    def __init__(self, steps: Sequence[Step]) -> None:
        found: list[tuple[bool, list[Step]]] = []
        for step in steps:
            regions = step[0].kind in _OF_REGIONS
            if not found or found[-1][0] != regions:
                found.append((regions, []))
            found[-1][1].append(step)
        called = {name for action, _ in steps if action.kind not in _OF_REGIONS for name in action.reads}
        self.stretches = [
            Stretch(regions, tuple(own), frozenset(called & {name for action, _ in own for name in action.writes}))
            for regions, own in found
        ]
        self.known: dict[tuple[int, ...], dict[int, tuple[Callable[[], None], dict[str, Any]]]] = {}
        self.warm = False


@dataclass(slots=True)
class _Slot:
    """What a micro-batch has to itself while it is on its way: records, what they read of what is new, and transfers that go on."""

    index: int
    recorder: Recorder | None
    records: dict[int, Records] = field(default_factory=dict)  # by the identity of the steps that they hold
    places: dict[str, Tensor] = field(default_factory=dict)
    transfers: list[tuple[Callable[[], None], list[Tensor]]] = field(default_factory=list)


@dataclass(slots=True)
class _Paused:
    """A micro-batch between its forward and its backward."""

    turn: Turn
    values: dict[str, Any]
    loss: Loss
    slot: int


class Executor:
    """Runs the compiled regions over chunks.

    Args:
        compiled: programs, regions and their sources.
        weights: the backbone's tensors by name; read, never written.
        state: adapter tables and gradients.
        callables: the loaded sources, by the names of `compiled.sources`.
        recorders: what records the regions' actions of a chunk, one for each micro-batch that is on its way at a time; none: they
            are called one by one. Tensors of the state must stay where they are as long as the executor is used.
        ranks: where the other stages are; None: there are none.
    """

    def __init__(
        self,
        compiled: Compiled,
        weights: Mapping[str, Tensor],
        state: State,
        callables: Mapping[str, Call],
        recorders: Sequence[Recorder] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.compiled = compiled
        self.weights = weights
        self.state = state
        self.callables = callables
        self.recorders = tuple(recorders)
        self.ranks = ranks
        self.executed: list[Action] = []
        self.trace: Trace | None = None  # where the times of what it computes are noted
        self._train = True
        self._steps = {True: carry.steps(compiled.train), False: carry.steps(compiled.evaluate)}
        # A stage's forward, the loss behind it, and its backward, which waits for other stages.
        self._forwards, self._backwards = carry.halves(self._steps[True])
        self._carried = {f"carry:{own.number}": own for own in compiled.carried}
        self._kept = {name: own for own in compiled.carried for name in (own.keys, own.values)}
        # Functions, not methods of this executor: one that held itself would outlive its last use, and its records with it.
        self._handlers = dict(_HANDLERS)
        self._slots = [_Slot(index, recorder) for index, recorder in enumerate(recorders)]
        self._warm, self._paused = set[int](), dict[int, _Paused]()

    def run(self, chunks: Iterable[Chunk], tasks: Sequence[str], *, train: bool) -> Loss:
        """Run every chunk through the program; gradients accumulate in the state. `executed` then holds the actions taken."""
        loss = self.loss(tasks)
        self.executed, self._train = [], train
        with torch.no_grad(), unmixed():
            first = 0
            for group in carry.chains(chunks):
                assert len(group) == 1 or self._carried, f"compiled for whole sequences, given {group[0].piece}"
                # By micro-batch: the values of one that pauses, and what one handed on to others of the chain.
                paused: dict[int, dict[str, Any]] = {}
                handed: dict[int, dict[str, Any]] = {}
                policy = "keep" if 1 < len(group) <= self.compiled.kept else "recompute"
                plan = carry.turns(group, self._steps[train], self._steps[False], policy=policy, first=first)
                for turn in plan:
                    values = paused.pop(turn.micro, {})
                    for micro in (turn.before, turn.after):
                        values.update(handed[micro] if micro is not None else {})
                    self._take(turn, values, loss, 0)
                    handed.setdefault(turn.micro, {}).update(carry.handed_on(values, turn.micro))
                    if turn.pauses:
                        paused[turn.micro] = values
                    first = max(first, turn.micro + 1)
        return loss

    @unmixed()
    def loss(self, tasks: Sequence[str]) -> Loss:
        """None yet."""
        return Loss(tuple(tasks), torch.zeros(len(tasks), 1, 1, dtype=torch.float32, device=self.state.device))

    def forward(self, micro: int, chunk: Chunk, loss: Loss, slot: int, *, train: bool) -> None:
        """A chunk's way through this stage, up to the loss; `backward` goes on with it if it is to train."""
        assert chunk.piece is None, "a cut sequence goes through no stages"
        self._train = train
        turn = Turn(micro, chunk, self._forwards if train else self._steps[False], pauses=train)
        values: dict[str, Any] = {}
        with torch.no_grad(), unmixed():
            self._take(turn, values, loss, slot)
        if train:
            self._paused[micro] = _Paused(turn, values, loss, slot)

    def backward(self, micro: int) -> None:
        """The way back of a chunk whose forward has run."""
        held = self._paused.pop(micro)
        self._train = True
        with torch.no_grad(), unmixed():
            self._take(replace(held.turn, steps=self._backwards, pauses=False), held.values, held.loss, held.slot)

    def _take(self, turn: Turn, values: dict[str, Any], loss: Loss, slot: int) -> None:
        while slot >= len(self._slots):
            assert not self.recorders, f"{len(self.recorders)} micro-batches may be on their way"
            self._slots.append(_Slot(len(self._slots), None))
        own, which = self._slots[slot], id(turn.steps)
        if turn.steps and turn.steps[0][0].kind is Kind.LOAD:
            # What this slot's last micro-batch sends is overwritten from now on.
            for sent, _ in own.transfers:
                sent()
            own.transfers.clear()
        # A first run without: kernels are loaded, libraries set up.
        if own.recorder is not None and turn.chunk.piece is None and which in self._warm:
            if which not in own.records:
                own.records[which] = Records(turn.steps)
            self._replay(turn, values, loss, own, own.recorder, own.records[which])
        else:
            self._walk(turn, turn.steps, values, loss, own)
            if turn.chunk.piece is None:
                self._warm.add(which)

    def _walk(
        self, turn: Turn, steps: Sequence[Step], values: dict[str, Any], loss: Loss, slot: _Slot, *, recording: bool = False
    ) -> None:
        if self.ranks is not None:
            join(self.ranks)  # another model of this process may have others
            self.ranks.begin(slot.index)
        # Between chunks nothing is left in the memory of records, so that regions that are called may have it.
        memory = nullcontext if slot.recorder is None or recording else slot.recorder.memory
        for action, dying in steps:
            own = self._named(action, turn)
            with self._traced(own, recording), memory() if action.kind in _OF_REGIONS else nullcontext():
                if own.peer is not None:
                    self._transfer(own, values, dying, slot)
                else:
                    self._handlers[own.kind](self, own, values, dying, turn.chunk, loss)
            if not recording:
                self.executed.append(own)

    def _traced(self, action: Action, recording: bool = False) -> AbstractContextManager[None]:
        if self.trace is None or recording or action.kind is Kind.LOAD:
            return nullcontext()
        return self.trace.span(f"{action.kind} {action.region}", action.micro)

    def _named(self, action: Action, turn: Turn) -> Action:
        action = replace(action, micro=turn.micro, tasks=turn.chunk.tasks)
        if action.region not in self.compiled.regions:
            return action
        region = self.compiled.regions[action.region]
        return carry.carrying(action, turn, region, self.compiled.templates[region.template])

    def _replay(self, turn: Turn, values: dict[str, Any], loss: Loss, slot: _Slot, recorder: Recorder, records: Records) -> None:
        """Stretches of regions' actions as records, which are made when they are first needed; what is between them is called."""
        # What bounds the grid of attention are the numbers that a record holds.
        known = records.known.setdefault(tuple(turn.chunk.tensors["bounds"].tolist()), {})
        for number, stretch in enumerate(records.stretches):
            if not stretch.regions:
                there = set(values)
                self._walk(turn, stretch.steps, values, loss, slot)
                values.update({name: self._place(name, values[name], slot) for name in set(values) - there})
                continue
            if number not in known:
                launch = recorder.record(partial(self._record, turn, stretch, loss, slot), values)
                known[number] = launch, {name: values[name] for name in stretch.leaves if name in values}
            launch, left = known[number]
            with self._traced(self._named(stretch.steps[0][0], turn)):
                launch()
            values.update(left)
            self.executed += [self._named(action, turn) for action, _ in stretch.steps]

    def _record(self, turn: Turn, stretch: Stretch, loss: Loss, slot: _Slot, values: Any) -> None:
        self._walk(turn, stretch.steps, values, loss, slot, recording=True)

    def _place(self, name: str, value: Any, slot: _Slot) -> Any:
        """A value in the tensor where records read it."""
        if not isinstance(value, Tensor) or value.device != self.state.device or name in _CALLED:
            return value
        own = slot.places.get(name)
        if own is None:
            own = slot.places[name] = torch.empty_like(value)
        assert own.shape == value.shape, f"{name}: {tuple(value.shape)} where records read {tuple(own.shape)}"
        return own.copy_(value)

    # --- one handler for each kind ---

    def _load(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], chunk: Chunk, loss: Loss) -> None:
        for name, tensor in chunk.tensors.items():
            if f"chunk:{name}" in action.writes:
                # `bounds` are read by the host: they bound a kernel's grid.
                values[f"chunk:{name}"] = tensor if name == "bounds" else self._sent(tensor)
        routes = {**self.state.routes, "": loss.tasks}
        table = torch.tensor([_route(rows, chunk.block_tasks) for rows in routes.values()], dtype=torch.int32)
        for key, route in zip(routes, self._sent(table), strict=True):
            values[f"route:{key}"] = route
        for name in (name for name in action.writes if name.startswith("drop:")):
            keys = self.state.drops(name.removeprefix("drop:"), train=self._train)
            values[name] = self._sent(torch.tensor(keys, dtype=torch.int32))
        for name in ("rows", "targets", "weights"):
            values[f"chunk:{name}"] = self._sent(getattr(chunk, name))

    def _transfer(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], slot: _Slot) -> None:
        """SEND goes on beside what follows; RECV is over before the next action reads it."""
        assert self.ranks is not None
        assert action.peer is not None
        if action.kind is Kind.SEND:
            tensors = [values[name].contiguous() for name in action.reads]
            slot.transfers.append((self.ranks.send(tensors, action.peer), tensors))
            _drop(values, dying)
        else:
            found = self.ranks.receive([form(self.compiled.received[name]) for name in action.writes], action.peer)
            values.update(zip(action.writes, found, strict=True))

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device. Out of pinned memory the host need not wait until it is there."""
        return tensor.pin_memory().to(self.state.device, non_blocking=True) if self.state.device.type == "cuda" else tensor

    def _forward(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], chunk: Chunk, loss: Loss) -> None:
        region = self.compiled.regions[action.region]
        template = self.compiled.templates[region.template]
        args = [self._input(reference, action, values, chunk) for reference in region.inputs]
        _drop(values, dying)
        results = self.callables[f"{template.name}.forward"](args)
        made = dict(zip((*region.outputs, *(f"s.{region.name}/{index}" for index in range(template.saved))), results, strict=True))
        values.update((name, made[name]) for name in action.writes if name in made)
        for reference in region.inputs:
            if reference in self._carried:
                carry.keep(self._carried[reference], action, values, chunk, made)

    def _backward(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], chunk: Chunk, loss: Loss) -> None:
        region = self.compiled.regions[action.region]
        template = self.compiled.templates[region.template]
        assert template.backward is not None
        args = [self._argument(reference, region, action, values, chunk) for reference in template.backward]
        _drop(values, dying)
        results = self.callables[f"{template.name}.backward"](args)
        for index, grad in zip(template.input_grads, results, strict=True):
            reference = region.inputs[index]
            if reference in self._carried:
                carry.hand_back(self._carried[reference], action, values, grad)
            else:
                values[gradient_name(reference.removeprefix("value:"), region.name)] = grad

    def _loss(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], chunk: Chunk, loss: Loss) -> None:
        """Cross entropy of the labelled rows, a block at a time; each row's loss and gradient land in its own place."""
        head, tokens = self.compiled.head, self.compiled.geometry.tokens
        hidden = values[head.value].reshape(tokens, -1)
        rows, targets, seeds = (values[f"chunk:{name}"] for name in ("rows", "targets", "weights"))
        # The row past the end stands for no row: what it writes is cut off, and it reads its block's first, so that a task's
        # adapters of the head meet rows of its own alone.
        reads = torch.where(rows < tokens, rows, rows[:, :1])
        given = self._head_inputs(chunk, reads, values)
        route = values["route:"]
        _drop(values, dying)
        nll = torch.zeros(tokens + 1, dtype=torch.float32, device=hidden.device)
        gradient_to = next((name for name in action.writes if name.startswith("d.")), None)
        tables = [self.state.grads[name] for name in head.trained]
        backward = gradient_to is not None or (self._train and bool(tables))
        grad = torch.zeros(tokens + 1 if backward else 0, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        for block in range(rows.shape[0]):
            inputs = [hidden.index_select(0, reads[block])[None], *given[block], targets[block]]
            if backward:
                losses, row_grads = self.callables["head.backward"]([*inputs, seeds[block], *tables])
                grad.index_copy_(0, rows[block], row_grads[0])
            else:
                (losses,) = self.callables["head.forward"](inputs)
            nll.index_copy_(0, rows[block], losses)
        if gradient_to is not None:
            values[gradient_to] = grad[:tokens].reshape(head.shape)
        # Block by block in the order of the blocks, as every sum over a task's tokens.
        torch.ops.mux.tile_outer_(loss.sums, nll[:tokens, None], torch.ones_like(nll[:tokens, None]), route, None)

    def _head_inputs(self, chunk: Chunk, reads: Tensor, values: Mapping[str, Any]) -> list[list[Tensor]]:
        """What each block of the loss is given besides rows and targets: counters of its rows, the slot of its task, the rest."""
        geometry = self.compiled.geometry
        found = []
        for reference in self.compiled.head.inputs:
            kind, _, name = reference.partition(":")
            if kind == "chunk":
                found.append(list(values[reference][reads]))
            elif kind == "route":
                slots = [_slot(self.state.routes[name], task) for task in chunk.head_tasks]
                own = self._sent(torch.tensor(slots, dtype=torch.int32))
                found.append(list(own[:, None].repeat(1, geometry.head_rows // geometry.head_tile)))
            else:
                found.append([self._resolve(reference, values)] * reads.shape[0])
        return [list(block) for block in zip(*found, strict=True)]

    # --- references ---

    def _resolve(self, reference: str, values: Mapping[str, Any]) -> Tensor:
        kind, _, name = reference.partition(":")
        if kind == "weight":
            return self.weights[name]
        if kind == "table":
            return self.state.copies[name]
        return values[name if kind == "value" else reference]

    def _input(self, reference: str, action: Action, values: Mapping[str, Any], chunk: Chunk) -> Tensor:
        if reference in self._carried:
            return carry.before(self._carried[reference], action, values, chunk, self.state.device)
        return self._resolve(reference, values)

    def _argument(self, reference: str, region: RegionSpec, action: Action, values: Mapping[str, Any], chunk: Chunk) -> Tensor:
        kind, _, text = reference.partition(":")
        index = int(text)
        if kind == "input":
            return self._input(region.inputs[index], action, values, chunk)
        if kind == "saved":
            return values[f"s.{region.name}/{index}"]
        if kind == "grad":
            return self.state.grads[region.inputs[index].removeprefix("table:")]
        # The gradient of an output is the sum over those who read it.
        value, tokens = region.outputs[index], self.compiled.geometry.tokens
        parts = [values[name] for name in action.reads if name.startswith(f"d.{value}@")]
        if value in self._kept:
            parts.append(carry.tangent(self._kept[value], value, action, values, chunk, tokens, self.state.device))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


_HANDLERS = {Kind.LOAD: Executor._load, Kind.F: Executor._forward, Kind.LOSS: Executor._loss, Kind.B: Executor._backward}


def _route(rows: tuple[str, ...], block_tasks: Sequence[str]) -> list[int]:
    """The slot of each block. Behind the last task's there is padding: -2 less the blocks before it, so that the last one says how
    many rows are anybody's."""
    filled = len(block_tasks)
    while filled and not block_tasks[filled - 1]:
        filled -= 1
    return [*(_slot(rows, task) for task in block_tasks[:filled]), *[-2 - filled] * (len(block_tasks) - filled)]


def _slot(rows: tuple[str, ...], task: str) -> int:
    return rows.index(task) if task and task in rows else -1


def _drop(values: dict[str, Any], dying: tuple[str, ...]) -> None:
    for name in dying:
        values.pop(name, None)
