"""What a pipeline reckons with when it puts micro-batches in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
