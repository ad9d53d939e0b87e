"""Replay: measured means of a run, played in its order, are the run again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from passes.replay import Part, measured, play
from passes.stages import Micro, durations, staged
from runtime.program import Kind
from runtime.simulate import Span, Timeline, simulate
from runtime.trace import Run

FLIGHT, TRANSFER = (2, 1), 0.25
# Group "ann" has chunks of 64 rows, "ben" of 128: all chunks of one take the same time.
ANN = Micro(("ann",), (1.0, 2.0), (2.0, 3.0), TRANSFER)
BEN = Micro(("ben",), (1.5, 1.0), (3.0, 4.0), TRANSFER)
STEPS, STEPPING = [[ANN, ANN], [BEN], [ANN], [BEN, BEN]], [(4.0, 1.0), (0.5, 0.5)] * 2
PROGRAM = staged(STEPS, flight=FLIGHT, stepping=STEPPING)
ROWS = tuple({"ann": 64, "ben": 128}[micro.tasks[0]] for step in STEPS for micro in step)
RUNS = [Run(PROGRAM, ROWS, ROWS)]


def ran(stepping: Sequence[tuple[float, ...]]) -> Timeline:
    return simulate(PROGRAM, seconds=durations(STEPS, stepping), nbytes={})


def by_rank(timeline: Timeline) -> list[list[list[Span]]]:
    return [[[own for own in timeline.spans if own.action.rank == rank]] for rank in (0, 1)]


def test_a_run_played_again_by_its_means_takes_its_seconds() -> None:
    even = [(max(own),) * 2 for own in STEPPING]
    timeline = ran(even)
    seconds = measured(RUNS, by_rank(timeline))
    assert seconds[Part(Kind.F, 1, ("ann",), 64)] == ANN.forward[1]
    assert seconds[Part(Kind.B, 0, ("ben",), 128)] == BEN.backward[0]
    assert seconds[Part(Kind.STEP, 0, ("ann",), 0)] == 4.0
    (again,) = play(RUNS, seconds, lambda rows: TRANSFER)
    assert again == timeline


def test_what_a_rank_waits_for_in_an_optimizer_step_is_no_part_of_it() -> None:
    timeline = ran(STEPPING)
    first, other = by_rank(timeline)
    # As a trace has it: from the rank's own last backward on.
    waiting = [Span(own.action, own.start - 5.0, own.end) if own.action.kind is Kind.STEP else own for own in first[0]]
    for spans in ([[waiting], other], [other, [waiting]]):
        seconds = measured(RUNS, spans)
        assert {seconds[Part(Kind.STEP, rank, ("ann",), 0)] for rank in (0, 1)} == {1.0}


def test_means_are_of_all_runs_and_processes() -> None:
    timeline = ran(STEPPING)
    slow = [[[Span(own.action, own.start, own.end + 2.0) for own in run] for run in each] for each in by_rank(timeline)]
    seconds = measured(RUNS, [*by_rank(timeline), *slow])
    assert seconds[Part(Kind.F, 0, ("ann",), 64)] == ANN.forward[0] + 1.0
    twice = measured(RUNS * 2, [[*one, *other] for one, other in zip(by_rank(timeline), slow, strict=True)])
    assert twice == pytest.approx(seconds | {part: own + 1.0 for part, own in measured(RUNS, by_rank(timeline)).items()})


def test_a_chunk_that_the_replica_has_not_takes_no_time() -> None:
    rows = 64, 64, 0, 64, 128, 128
    run = Run(PROGRAM, rows, rows)
    seconds = measured(RUNS, by_rank(ran(STEPPING)))
    (timeline,) = play([run], seconds, lambda rows: TRANSFER)
    assert {own.end - own.start for own in timeline.spans if own.action.micro == 2 and own.action.kind is not Kind.STEP} == {0.0}
    assert timeline.seconds < play(RUNS, seconds, lambda rows: TRANSFER)[0].seconds
