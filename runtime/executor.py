"""executor: walks a Program, one handler for each kind of action. It runs compiled text; what it changes is the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from runtime import carry
from runtime.carry import Carried, Turn
from runtime.pack import Chunk, Geometry
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, TemplateSpec, gradient_name
from runtime.state import State

Call = Callable[[list[Any]], Any]
HEAD = "head"


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The loss region: what its inputs are bound to, the value it reads, and the tables that its backward adds gradients to."""

    inputs: tuple[str, ...]
    value: str
    shape: tuple[int, ...]
    dtype: str
    vocab: int
    trained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler hands to the runtime for one group of tasks, as plain data and source text.

    `tasks` share its chunks; `sources` holds the text of every callable by name: `<template>.forward`, `<template>.backward`,
    `head.forward`, `head.backward`; `train` and `evaluate` are the programs of one micro-batch; `kernels` the texts of what
    operators launch, by what they stand for; `carried` what attentions carry from piece to piece of a sequence longer than a
    chunk, in the order of their numbers (none: no sequence may be longer), and `chains` the policy of `runtime.carry.turns`.
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
    chains: str = "recompute"


@dataclass(slots=True)
class Loss:
    """Per task: the sum of its negative log-likelihoods so far, [n, 1, 1] float32 on the device, and its token counts."""

    tasks: tuple[str, ...]
    sums: Tensor


class Executor:
    """Runs the compiled regions over chunks.

    Args:
        compiled: programs, regions and their sources.
        weights: the backbone's tensors by name; read, never written.
        state: adapter tables and gradients.
        callables: the loaded sources, by the names of `compiled.sources`.
    """

    def __init__(self, compiled: Compiled, weights: Mapping[str, Tensor], state: State, callables: Mapping[str, Call]) -> None:
        self.compiled = compiled
        self.weights = weights
        self.state = state
        self.callables = callables
        self.executed: list[Action] = []
        self._train = True
        self._handlers = {Kind.LOAD: self._load, Kind.F: self._forward, Kind.LOSS: self._loss, Kind.B: self._backward}
        self._steps = {True: carry.steps(compiled.train), False: carry.steps(compiled.evaluate)}
        self._carried = {f"carry:{own.number}": own for own in compiled.carried}
        self._kept = {name: own for own in compiled.carried for name in (own.keys, own.values)}

    def run(self, chunks: Iterable[Chunk], tasks: Sequence[str], *, train: bool) -> Loss:
        """Run every chunk through the program; gradients accumulate in the state. `executed` then holds the actions taken."""
        loss = Loss(tuple(tasks), torch.zeros(len(tasks), 1, 1, device=self.state.device))
        self.executed, self._train = [], train
        with torch.no_grad():
            first = 0
            for group in carry.chains(chunks):
                assert len(group) == 1 or self._carried, f"compiled for whole sequences, given {group[0].piece}"
                # By micro-batch: the values of one that pauses, and what one handed on to others of the chain.
                paused: dict[int, dict[str, Any]] = {}
                handed: dict[int, dict[str, Any]] = {}
                plan = carry.turns(group, self._steps[train], self._steps[False], policy=self.compiled.chains, first=first)
                for turn in plan:
                    values = paused.pop(turn.micro, {})
                    self._take(turn, values, handed, loss)
                    handed.setdefault(turn.micro, {}).update(carry.handed_on(values, turn.micro))
                    if turn.pauses:
                        paused[turn.micro] = values
                    first = max(first, turn.micro + 1)
        return loss

    def _take(self, turn: Turn, values: dict[str, Any], handed: Mapping[int, dict[str, Any]], loss: Loss) -> None:
        for micro in (turn.before, turn.after):
            values.update(handed[micro] if micro is not None else {})
        for action, dying in turn.steps:
            action = replace(action, micro=turn.micro, tasks=turn.chunk.tasks)
            if action.region in self.compiled.regions:
                region = self.compiled.regions[action.region]
                action = carry.carrying(action, turn, region, self.compiled.templates[region.template])
            self._handlers[action.kind](action, values, dying, turn.chunk, loss)
            self.executed.append(action)

    # --- one handler for each kind ---

    def _load(self, action: Action, values: dict[str, Any], dying: tuple[str, ...], chunk: Chunk, loss: Loss) -> None:
        device = self.state.device
        for name, tensor in chunk.tensors.items():
            if f"chunk:{name}" in action.writes:
                # `longest` is read by the host: it bounds a kernel's grid.
                values[f"chunk:{name}"] = tensor if name == "longest" else tensor.to(device, non_blocking=True)
        routes = {**self.state.routes, "": loss.tasks}
        table = torch.tensor([[_slot(rows, task) for task in chunk.block_tasks] for rows in routes.values()], dtype=torch.int32)
        for key, route in zip(routes, table.to(device, non_blocking=True), strict=True):
            values[f"route:{key}"] = route
        for name in (name for name in action.writes if name.startswith("drop:")):
            keys = torch.tensor(self.state.drops(name.removeprefix("drop:"), train=self._train), dtype=torch.int32)
            values[name] = keys.to(device, non_blocking=True)
        for name in ("rows", "targets", "weights"):
            values[f"chunk:{name}"] = getattr(chunk, name).to(device, non_blocking=True)

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
        nll = torch.zeros(tokens + 1, device=hidden.device)
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
                own = torch.tensor(slots, dtype=torch.int32).to(self.state.device, non_blocking=True)
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


def _slot(rows: tuple[str, ...], task: str) -> int:
    return rows.index(task) if task and task in rows else -1


def _drop(values: dict[str, Any], dying: tuple[str, ...]) -> None:
    for name in dying:
        values.pop(name, None)
