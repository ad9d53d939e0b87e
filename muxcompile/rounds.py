"""rounds: optimizer steps of all tasks on a mesh, several of them on their way at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from runtime.examples import Example
from runtime.executor import Compiled, Executor
from runtime.pack import pack
from runtime.pipeline import Pipeline, Unit
from runtime.state import State

# By task its examples, and the tasks of these that run.
Given = tuple[Mapping[str, list[Example]], list[str]]


@dataclass(slots=True)
class Round:
    """What came of one round, by task; `norms`: of those that stepped."""

    losses: dict[str, Tensor]
    tokens: dict[str, int]
    norms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Own:
    """A unit of a round, with its tasks' examples and labelled tokens."""

    round: Round
    unit: Unit
    examples: dict[str, int]
    losses: dict[str, Tensor] = field(default_factory=dict)
    place: int = 0


class Rounds:
    """Runs rounds group by group. Every rank of the mesh calls it with the same examples.

    Args:
        pipeline: of the mesh.
        state: of this rank.
        groups, executors: what this rank runs of each group.
    """

    def __init__(self, pipeline: Pipeline, state: State, groups: Sequence[Compiled], executors: Sequence[Executor]) -> None:
        self._pipeline, self._state, self._ranks = pipeline, state, pipeline.ranks
        # The half of the places to which the next call posts: a rank may be behind by a call, not by two.
        self._half = 0
        # The largest chunks first: what runs later then finds room in the memory that they were recorded in.
        self._groups = sorted(zip(groups, executors, strict=True), key=lambda pair: -pair[0].geometry.tokens)

    def train(self, given: Sequence[Given]) -> list[Round]:
        """Losses, gradients and an optimizer step of each round."""
        rounds, units = self._units(given)
        by_unit = {id(own.unit): own for own in units}
        whole = [own.unit for own in units]
        places, room = self._pipeline.places(whole), self._ranks.places // 2
        if len(given) > 1 and max(places, default=0) >= room:  # tasks that take turns far from each other
            middle = len(given) // 2
            return self.train(given[:middle]) + self.train(given[middle:])
        for own, place in zip(units, places, strict=True):
            own.place = self._half * room + place
        self._half ^= bool(units)
        self._open(units)
        self._pipeline.train(whole, lambda unit: self._prepare(by_unit[id(unit)]), lambda unit: self._close(by_unit[id(unit)]))
        return rounds

    def run(self, examples: Mapping[str, list[Example]], active: list[str], *, train: bool) -> Round:
        """Losses of one round, and gradients if it is to train."""
        (found,), units = self._units([(examples, active)])
        if train:
            self._open(units)
            self._pipeline.train([own.unit for own in units], lambda unit: self._state.exchange(unit.tasks), lambda unit: None)
        else:
            self._pipeline.evaluate([own.unit for own in units])
        for own in units:
            self._lose(own, self._ranks.gather(self._summed(own), "model")[-1])
        return found

    def _units(self, given: Sequence[Given]) -> tuple[list[Round], list[_Own]]:
        nan = torch.full((), math.nan, dtype=torch.float32, device=self._state.device)
        rounds, units = [], []
        for examples, active in given:
            tokens = {name: sum(example.labelled for example in own) for name, own in examples.items()}
            rounds.append(Round(dict.fromkeys(examples, nan), tokens))
            for group, executor in self._groups:
                executor.executed = []
                if names := tuple(name for name in active if name in group.tasks):
                    mine = {name: examples[name] for name in names}
                    count = self._ranks.mesh.dp
                    packed = [pack(mine, group.geometry, (index, count), shared=group.head.shared) for index in range(count)]
                    filled = tuple(map(max, zip_longest(*(own.filled for own in packed), fillvalue=0)))
                    unit = Unit(executor, packed[self._ranks.replica], names, executor.loss(names), filled)
                    counts = {name: len(own) for name, own in mine.items()}
                    units.append(_Own(rounds[-1], unit, counts))
        return rounds, units

    def _open(self, units: Sequence[_Own]) -> None:
        names = dict.fromkeys(name for own in units for name in own.unit.tasks)
        self._state.open([name for name in names if self._state.tasks[name].pending is not None])

    def _prepare(self, own: _Own) -> None:
        """What follows the last backward of a unit here: its gradients become those of all replicas, other stages hear of them."""
        if not self._state.crosses(own.unit.tasks):
            self._tell(own)

    def _tell(self, own: _Own) -> None:
        names = own.unit.tasks
        self._state.exchange(names)
        self._ranks.post(own.place, torch.cat([self._state.measure(names), self._summed(own)[:, None]], 1))

    def _close(self, own: _Own) -> None:
        """What follows the last backward of a unit in every stage: its losses are known, its tasks step."""
        names = own.unit.tasks
        if self._state.crosses(names):
            self._tell(own)
        figures = self._ranks.read(own.place, ((len(names), 3), torch.float32))
        self._lose(own, figures[-1, :, 2])
        for name in names:
            task = self._state.tasks[name]
            task.pending = (task.pending or 0) + own.examples[name]
            task.losses.append(own.losses[name])
            task.draws += 1
        own.round.norms |= dict(zip(names, self._state.step_all(names, figures[..., :2]), strict=True))

    def _summed(self, own: _Own) -> Tensor:
        """[tasks]: the sums of losses over the replicas, which the last stage has."""
        sums = own.unit.loss.sums[:, 0, 0].contiguous()
        self._ranks.sum_([sums], "dp")
        return sums

    def _lose(self, own: _Own, sums: Tensor) -> None:
        own.losses = {name: sums[index] / own.round.tokens[name] for index, name in enumerate(own.unit.tasks)}
        own.round.losses |= own.losses
