"""What a pipeline reckons with when it puts micro-batches in order, and in which order it begins what it does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.comm import Mesh
from runtime.order import Micro, Stage, staged
from runtime.pipeline import Pipeline, Unit

STAGES = (Stage((2.0, 3.0), (0.01, 0.02), 0.5), Stage((1.0, 5.0), (0.0, 0.03), 0.25))


def planned(flight: tuple[int, ...], *units: Unit) -> Any:
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.flight = flight
    return pipeline._planned(units)


def unit(tasks: str, chunks: int, filled: tuple[int, ...]) -> Unit:
    compiled: Any = SimpleNamespace(stages=STAGES, geometry=SimpleNamespace(tokens=64))
    held: Any = [None] * chunks
    return Unit(SimpleNamespace(compiled=compiled), held, tuple(tasks), None, filled)  # type: ignore[arg-type]


def test_a_chunk_takes_its_seconds_less_what_its_padding_spares() -> None:
    own = unit("ab", 2, (64, 16)), unit("c", 0, ())
    program, parts = planned((2, 1), *own)
    full, little = Micro(("a", "b"), (2.0, 1.0), (3.0, 5.0)), Micro(("a", "b"), (2.0 - 0.48, 1.0), (3.0 - 0.96, 5.0 - 1.44))
    none = Micro(("c",), (0.0, 0.0), (0.0, 0.0))
    assert program == staged([(full, little), (none,)], flight=(2, 1), stepping=[(1.0, 0.5), (0.5, 0.25)])
    assert [(part.unit, part.index, part.there) for part in parts] == [(own[0], 0, True), (own[0], 1, True), (own[1], 0, False)]


def test_replicas_with_other_chunks_have_one_program() -> None:
    one, parts = planned((2, 1), unit("a", 1, (48,)), unit("b", 2, (64, 32)))
    other, fewer = planned((2, 1), unit("a", 0, (48,)), unit("b", 1, (64, 32)))
    assert one == other
    assert [part.there for part in parts] == [True] * 3
    assert [part.there for part in fewer] == [False, True, False]


class Begun:
    """In place of the optimizer steps' stream: what is begun there, at once, and behind which lane."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def begin(self, work: Callable[[], None], after: Callable[[], None] = lambda: None) -> Callable[[], None]:
        after()
        work()
        return lambda: None


class Lanes(Pipeline):
    """Two shards' pipeline that notes what it begins, and in which lane."""

    def __init__(self) -> None:
        ranks: Any = SimpleNamespace(device=torch.device("cpu"), mesh=Mesh(tp=2), rank=0, replica=0, stage=0, shard=0)
        super().__init__(ranks, (2,))
        self.log: list[str] = []
        self.lane = 0
        self._steps = Begun(self.log)  # type: ignore[assignment]

    def _at(self, lane: int) -> contextlib.AbstractContextManager[object]:
        return self._in(lane)

    @contextlib.contextmanager
    def _in(self, lane: int) -> Iterator[None]:
        before, self.lane = self.lane, lane
        yield
        self.lane = before

    def unit(self, task: str, chunks: int, filled: tuple[int, ...]) -> Unit:
        compiled: Any = SimpleNamespace(stages=(Stage((1.0, 2.0), (0.0, 0.0), 0.1),), geometry=SimpleNamespace(tokens=64))
        executor: Any = SimpleNamespace(
            compiled=compiled,
            trace=None,
            forward=lambda micro, chunk, loss, slot, train: self.log.append(f"F {task} lane{self.lane}"),
            backward=lambda micro: self.log.append(f"B {task} lane{self.lane}"),
        )
        held: Any = [None] * chunks
        return Unit(executor, held, (task,), None, filled)  # type: ignore[arg-type]

    def run(self, *units: Unit) -> list[str]:
        self.train(
            units,
            lambda own: self.log.append(f"norms {own.tasks[0]} lane{self.lane}"),
            lambda own: self.log.append(f"step {own.tasks[0]} lane{self.lane}"),
        )
        return self.log


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=8))
def test_in_lanes_nothing_waits_for_a_backward_before_its_step(given_: list[tuple[str, int]]) -> None:
    """A GPU's queues are shared by streams: what waits for one lane early would hold up the other."""
    own = Lanes()
    log = own.run(*(own.unit(task, count, (64,) * count) for task, count in given_))
    assert sorted(word[0] for word in log) == sorted("FB" * sum(count for _, count in given_) + "ns" * len(given_))
    for before, after in itertools.pairwise(log):
        if before.startswith("norms"):
            assert after == before.replace("norms", "step")


def test_norms_wait_for_the_lane_of_a_unit_of_which_a_replica_lacks_the_last_chunk() -> None:
    own = Lanes()
    log = own.run(own.unit("a", 1, (64,)), own.unit("b", 1, (64, 64)), own.unit("c", 0, (64,)))
    lanes = {word.split()[1]: word.split()[2] for word in log if word[0] == "B"}
    assert lanes["a"] != lanes["b"]
    assert f"norms b {lanes['b']}" in log
    assert [word for word in log if " c " in word and word[0] in "FB"] == []
