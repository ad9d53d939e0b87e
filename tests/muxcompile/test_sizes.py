"""The size of chunks that a plan chooses is held against a long run: the best size for 200 steps that it has not seen."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

import muxcompile
import muxcompile.forecast
from codegen import tiling
from muxcompile.forecast import Forecast, forecast
from passes.adapters import resolve
from passes.group import as_groups
from passes.loads import Price, Shape
from runtime.fill import fill

from .peft_reference import llama

CUDA = torch.device("cuda")
SIZES = tiling.chunk_sizes(CUDA)
STEPS = 200


@dataclass
class Prices:
    """A chunk that waits for the host up to 3,000 rows, as small ones do, or for a device that is full from 2,000 on."""

    shapes: Sequence[Shape]
    floor: float
    rate: float

    def chunk(self, extras: frozenset[str], shape: Shape) -> Price:
        return Price(max(self.floor, shape.tokens / self.rate), shape.tokens)

    forward = chunk

    def called(self, extras: frozenset[str], shape: Shape) -> float:
        return 0.0


def mix(tasks: int, sequences: int, seed: int) -> dict[str, muxcompile.Task]:
    draw = random.Random(seed)
    lengths = [[draw.randint(8, draw.choice((64, 128, 256))) for _ in range(50)] for _ in range(tasks)]
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    return {f"t{i}": muxcompile.Task(f"t{i}", adapter, lengths=given, batch_size=sequences) for i, given in enumerate(lengths)}


def forecast_of(tasks: Mapping[str, muxcompile.Task], prices: Prices, monkeypatch: pytest.MonkeyPatch) -> Forecast:
    def priced(_survey: Any, _device: str, shapes: Sequence[Shape], **_known: Any) -> Prices:
        prices.shapes = shapes
        return prices

    monkeypatch.setattr(muxcompile.forecast, "cost_model", priced)
    monkeypatch.setattr(muxcompile.forecast, "name_of", str)
    tenant = SimpleNamespace(extras=frozenset(), nbytes=1)
    survey: Any = SimpleNamespace(tasks=dict.fromkeys(tasks, tenant), carried_row=1)
    backbone = llama(41)
    one = resolve(next(iter(tasks.values())), backbone)
    adapters = [muxcompile.forecast.replace(one, task=task) for task in tasks.values()]
    return forecast(backbone, CUDA, adapters, muxcompile.Options(), [Shape(size) for size in SIZES], None, surveyed=survey)


def chunks(tasks: Mapping[str, muxcompile.Task], tokens: int) -> float:
    """A step's, on average over fresh ones, as they are placed."""
    draw, geometry = random.Random("a long run"), tiling.geometry(CUDA, tokens)
    steps = ({task.name: draw.choices(task.lengths or (), k=task.batch_size) for task in tasks.values()} for _ in range(STEPS))
    return sum(fill(step, geometry).chunks for step in steps) / STEPS


@pytest.mark.parametrize(("floor", "rate"), [(0.23, 1.3e4), (0.02, 1e5)])
def test_the_size_that_is_chosen_costs_little_more_than_the_best_for_a_long_run(
    floor: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dearer_by_few = []
    for tasks, sequences in ((2, 4), (4, 16), (8, 16), (14, 4)):
        prices, given = Prices((), floor, rate), mix(tasks, sequences, seed=tasks * sequences)
        found = forecast_of(given, prices, monkeypatch)

        def chosen(steps: Any, found: Forecast = found, prices: Prices = prices) -> tuple[int, float]:
            everyone = [list(range(len(found.loads)))]
            (group,) = as_groups(everyone, found.loads, prices, cap=None, base_bytes=0, switch=0.0, steps=steps).groups
            return group.shape.tokens, group.cost

        size, cost = chosen(found.sizing())
        few, _ = chosen(None)
        price = {tokens: prices.chunk(frozenset(), Shape(tokens)).cost for tokens in SIZES}
        # Sizes that even full chunks make dearer than the best need no long run.
        rows = sum(sum(load.rows) / len(load.rows) for load in found.loads)
        likely = [tokens for tokens in SIZES if 0.95 * max(1, rows / tokens) * price[tokens] < 1.03 * cost] + [few]
        real = {tokens: chunks(given, tokens) * price[tokens] for tokens in likely}
        best = min(real.values())
        assert real[size] <= 1.03 * best, (tasks, sequences, size)
        assert cost == pytest.approx(real[size], rel=0.04), "what is predicted of it comes true"
        dearer_by_few.append(real[few] / best - 1)
    assert max(dearer_by_few) > 0.05, "eight steps and their rows alone do not tell"


def test_more_steps_are_drawn_of_few_sequences_and_they_begin_with_those_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for tasks, sequences in ((2, 4), (20, 64), (20, 1000)):
        found = forecast_of(mix(tasks, sequences, seed=1), Prices((), 0.02, 1e5), monkeypatch)
        drawn.append(len(found.steps["t0"]))
        assert [load.rows[:8] for load in found.rounds] == [load.rows for load in found.loads]
    assert drawn == [256, 102, 32]


def test_chunks_that_tasks_do_not_fill_to_the_end_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two bundles of 640 rows in each step: no chunk of 1,024 rows holds both, though they have 1,280 together.
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    given = {name: muxcompile.Task(name, adapter, lengths=(600,), batch_size=2) for name in ("ann", "ben")}
    found = forecast_of(given, Prices((), 0.02, 1e5), monkeypatch)
    placed = found.sizing().overflow
    assert placed is not None
    assert found.rounds[0].rows[0] == 1280
    assert placed(("ann", "ben"), 1024) == 4 - 3
    assert placed(("ann", "ben"), 1280) == 0
    assert placed(("ann",), 1280) == 0
