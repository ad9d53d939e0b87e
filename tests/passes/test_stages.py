"""Stages: the fastest cut, and programs over them that the simulator accepts whatever the micro-batches. It refuses faulty ones."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from passes.stages import Micro, cut, durations, makespan, staged
from runtime.order import beside, held
from runtime.program import Action, Kind, Program
from runtime.simulate import ProgramError, Timeline, simulate

TASKS = ("ann", "ben", "cid")


def play(program: Program, steps: list[list[Micro]], stepping: Any = (), **options: Any) -> Timeline:
    sizes = {name: 1 for action in program for name in action.writes if name.startswith("s.")}
    return simulate(program, seconds=durations(steps, stepping), nbytes=sizes, **options)


def even(tasks: tuple[str, ...], stages: int, forward: float = 1.0, backward: float = 2.0) -> Micro:
    return Micro(tasks, (forward,) * stages, (backward,) * stages)


Case = tuple[list[list[Micro]], list[int], list[tuple[float, ...]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Steps, what may be in flight, and seconds of the optimizer steps."""
    stages = draw(st.integers(1, 4))
    times = st.lists(st.sampled_from((0.5, 1.0, 2.0, 3.5)), min_size=stages, max_size=stages).map(tuple)
    tasks = st.lists(st.sampled_from(TASKS), min_size=1, max_size=2, unique=True).map(tuple)
    micros = st.builds(Micro, tasks, times, times, st.sampled_from((0.0, 0.25, 1.5)))
    steps = draw(st.lists(st.lists(micros, min_size=1, max_size=4), min_size=1, max_size=5))
    stepping = st.lists(st.sampled_from((0.0, 0.5, 4.0)), min_size=stages, max_size=stages).map(tuple)
    flight = draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    return steps, flight, draw(st.lists(stepping, min_size=len(steps), max_size=len(steps)))


# --- cuts -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_the_slowest_stage_is_as_fast_as_can_be(seconds: list[int], count: int) -> None:
    assume(count <= len(seconds))

    def slowest(stops: tuple[int, ...]) -> int:
        return max(sum(seconds[start:stop]) for start, stop in itertools.pairwise((0, *stops)))

    found = cut(seconds, count)
    assert len(found) == count
    assert found[-1] == len(seconds)
    assert all(start < stop for start, stop in itertools.pairwise((0, *found)))
    ways = itertools.combinations(range(1, len(seconds)), count - 1)
    assert slowest(found) == min(slowest((*way, len(seconds))) for way in ways)


def test_more_stages_than_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 regions are not 3 stages"):
        cut([1.0, 2.0], 3)


# --- programs ---------------------------------------------------------------------------------------------------------


@given(cases(), st.booleans())
def test_any_program_is_accepted_and_runs_every_micro_batch_once_on_every_rank(case: Case, drain: bool) -> None:
    steps, flight, stepping = case
    program = staged(steps, flight=flight, drain=drain, stepping=stepping)
    assert Program.parse(str(program)) == program
    timeline = play(program, steps, stepping)
    assert timeline.seconds == makespan(steps, flight=flight, drain=drain, stepping=stepping), "the order is that of its own play"
    count, ranks = sum(map(len, steps)), range(len(flight))
    for kind in (Kind.F, Kind.B):
        ran = Counter((action.rank, action.micro) for action in program if action.kind is kind)
        assert ran == Counter((rank, micro) for rank in ranks for micro in range(count))
    for rank in ranks:
        held = most = 0
        for action in (action for action in program if action.rank == rank):
            held += (action.kind is Kind.F) - (action.kind is Kind.B)
            most = max(most, held)
        assert most <= flight[rank] == max(flight[rank], timeline.peak_bytes[rank])
    busy = [sum(micro.forward[rank] + micro.backward[rank] for step in steps for micro in step) for rank in ranks]
    assert timeline.seconds >= max(busy) - 1e-9


@given(cases(), st.booleans())
def test_a_tasks_next_step_begins_behind_its_optimizer_step_on_every_rank(case: Case, drain: bool) -> None:
    steps, flight, stepping = case
    owner = [index for index, step in enumerate(steps) for _ in step]
    for rank in range(len(flight)):
        seen: dict[str, int] = {}  # steps taken
        program = staged(steps, flight=flight, drain=drain, stepping=stepping)
        for action in program.of(rank):
            for task in action.tasks:
                own = [index for index, step in enumerate(steps) if any(task in micro.tasks for micro in step)]
                if action.kind is Kind.STEP:
                    seen[task] = seen.get(task, 0) + 1
                elif action.kind in (Kind.F, Kind.B):
                    assert own[seen.get(task, 0)] == owner[action.micro], "between the steps before it and its own"
        assert all(seen[task] == sum(any(task in m.tasks for m in step) for step in steps) for task in seen)


@given(cases(), st.booleans())
def test_ranks_meet_in_optimizer_steps_and_the_tasks_next_forwards_wait(case: Case, drain: bool) -> None:
    steps, flight, stepping = case
    spans = play(staged(steps, flight=flight, drain=drain, stepping=stepping), steps, stepping).spans
    owner = [index for index, step in enumerate(steps) for _ in step]
    of = {index: {task for micro in step for task in micro.tasks} for index, step in enumerate(steps)}
    taken = {kind: [own for own in spans if own.action.kind is kind] for kind in (Kind.F, Kind.B, Kind.STEP)}
    for index in of:
        own = {span.action.rank: span for span in taken[Kind.STEP] if owner[span.action.micro] == index}
        (start,) = {span.start for span in own.values()}
        assert start >= max(span.end for span in taken[Kind.B] if owner[span.action.micro] == index)
        assert {rank: span.end for rank, span in own.items()} == {
            rank: start + seconds for rank, seconds in enumerate(stepping[index])
        }
        for span in taken[Kind.F]:
            later = owner[span.action.micro]
            if later > index and (drain or of[later] & of[index]):
                assert span.start >= own[span.action.rank].end


def test_optimizer_steps_take_time_where_nobody_fills_it() -> None:
    flight, stepping = [2, 1], [(1.0, 4.0)] * 6
    alone = [[even(("ann",), 2)] * 2] * 6
    seconds = [play(staged(alone, flight=flight, stepping=own), alone, own).seconds for own in ((), stepping)]
    # Rank 1 has its first forward a second after rank 0, whose own optimizer step is over by then.
    assert seconds == [6 * 9.0, 6 * 9.0 + 5 * (4.0 - 1.0) + 4.0]
    several = [[even((task,), 2)] * 2 for _ in range(2) for task in TASKS]
    seconds = [play(staged(several, flight=flight, stepping=own), several, own).seconds for own in ((), stepping)]
    assert seconds[1] == seconds[0] + 4.0, "the last step alone is waited for"


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_step_alone_takes_as_long_as_1f1b(stages: int, count: int) -> None:
    steps = [[even(("ann",), stages)] * count]
    program = staged(steps, flight=[stages - rank for rank in range(stages)])
    assert play(program, steps).seconds == (count + stages - 1) * 3.0


def test_other_tasks_fill_what_a_step_leaves_idle() -> None:
    stages = 4
    steps = [[even((task,), stages)] * 2 for _ in range(5) for task in ("ann", "ben", "cid", "dot")]
    flight = [stages - rank for rank in range(stages)]
    drained, filled = (play(staged(steps, flight=flight, drain=drain), steps) for drain in (True, False))
    work = 40 * 3.0
    assert drained.seconds == 20 * (2 + stages - 1) * 3.0
    assert filled.seconds == work + (stages - 1) * 3.0, "the pipeline fills and drains once"
    alone = [[even(("ann",), stages)] * 2] * 20
    assert play(staged(alone, flight=flight), alone).seconds > 2 * work, "one task's steps wait for each other"


@given(cases(), st.integers(1, 3))
def test_lanes_run_every_micro_batch_once_and_steps_one_after_another(case: Case, lanes: int) -> None:
    steps, _, stepping = case
    steps = [[replace(own, forward=own.forward[:1], backward=own.backward[:1]) for own in step] for step in steps]
    program = beside(steps, lanes=lanes, stepping=stepping)
    assert str(Program.parse(str(program))) == str(program)
    spans = {(own.action.kind, own.action.micro): own for own in play(program, steps, stepping).spans}
    micros = [micro for step in steps for micro in step]
    counts = Counter(action.kind for action in program)
    assert counts == Counter({Kind.F: len(micros), Kind.B: len(micros), Kind.STEP: len(steps)})
    assert len({action.stream for action in program if action.kind is not Kind.STEP}) <= lanes
    first, over = 0, dict[str, float]()
    for step in steps:
        own = range(first, first + len(step))
        first += len(step)
        # They add to the same gradients: one lane, in their order.
        parts = [spans[kind, micro] for micro in own for kind in (Kind.F, Kind.B)]
        assert len({part.action.stream for part in parts}) == 1
        assert all(one.end <= other.start for one, other in itertools.pairwise(parts))
        tasks = {task for micro in step for task in micro.tasks}
        assert all(over.get(task, 0.0) <= parts[0].start for task in tasks)
        done = spans[Kind.STEP, own[-1]]
        assert done.start >= parts[-1].end
        over |= dict.fromkeys(tasks, done.end)


def test_lanes_take_steps_of_other_tasks() -> None:
    steps = [[even((task,), 1)] for task in TASKS[:2]]
    streams = {action.micro: action.stream for action in beside(steps, lanes=2) if action.kind is Kind.F}
    assert streams == {0: "lane0", 1: "lane1"}


def test_lanes_begin_one_forward_apart() -> None:
    steps = [[even((task,), 1)] for task in (*TASKS[:2], *TASKS[:2])]
    program = beside(steps, lanes=2)
    assert held(program) == {0: [], 1: [0], 2: [], 3: []}
    timeline = simulate(program, seconds=durations(steps), nbytes={})
    begins = {span.action.micro: span.start for span in timeline.spans if span.action.kind is Kind.F}
    assert begins[1] == begins[0] + steps[0][0].forward[0]


@given(cases())
def test_filling_costs_no_time(case: Case) -> None:
    steps, flight, _ = case
    steps = [[even(micro.tasks, len(flight)) for micro in step] for step in steps]
    flight = [max(own, len(flight) - rank) for rank, own in enumerate(flight)]
    drained, filled = (play(staged(steps, flight=flight, drain=drain), steps).seconds for drain in (True, False))
    assert filled <= drained + 1e-9


# --- faults -----------------------------------------------------------------------------------------------------------

STEPS = [[even(("ann",), 2)] * 2, [even(("ben",), 2)] * 2]
GOOD = staged(STEPS, flight=[2, 1])


def refusal(actions: list[Action], **options: Any) -> str:
    with pytest.raises(ProgramError) as caught:
        play(Program(tuple(actions)), STEPS, **options)
    assert "<-- HERE" in str(caught.value)
    return str(caught.value).splitlines()[0]


def places(kind: Kind, rank: int) -> list[int]:
    return [index for index, action in enumerate(GOOD) if action.kind is kind and action.rank == rank]


def test_a_dropped_receive_or_send_is_refused() -> None:
    actions = list(GOOD)
    last = places(Kind.RECV, 1)[-1]
    assert refusal(actions[:last] + actions[last + 1 :]).endswith("no RECV of rank 1 matches it")
    first = places(Kind.RECV, 1)[0]
    assert "where 0.send_down SEND 1[ann].0 brings h.1" in refusal(actions[:first] + actions[first + 1 :])
    last = places(Kind.SEND, 0)[-1]
    assert refusal(actions[:last] + actions[last + 1 :]).endswith("no SEND of rank 0 matches it")


def test_swapped_sends_are_refused() -> None:
    actions = list(GOOD)
    one, other = places(Kind.SEND, 0)[:2]
    actions[one], actions[other] = actions[other], actions[one]
    assert refusal(actions) == (
        "1.recv_down RECV 0[ann].0: receives h.1 of micro-batch 0, where 0.send_down SEND 1[ann].1 brings h.1"
    )


def test_a_read_before_its_write_is_refused() -> None:
    actions = list(GOOD)
    first = next(index for index, action in enumerate(actions) if action.kind is Kind.F and action.rank == 1)
    actions[first] = replace(actions[first], reads=("h.1", "nothing"))
    assert "reads nothing, which nobody has written" in refusal(actions)


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    def talk(rank: int, kind: Kind, peer: int, name: str) -> Action:
        reads, writes = ((name,), ()) if kind is Kind.SEND else ((), (name,))
        return Action(rank, "talk", kind, str(peer), (), 0, reads, writes)

    given = [Action(rank, "compute", Kind.F, f"stage.{rank}", (), 0, (), (f"own.{rank}",)) for rank in (0, 1)]
    # Both send first on the one stream they have: each waits for the other's receive.
    circle = [
        talk(0, Kind.SEND, 1, "own.0"),
        talk(0, Kind.RECV, 1, "own.1"),
        talk(1, Kind.SEND, 0, "own.1"),
        talk(1, Kind.RECV, 0, "own.0"),
    ]
    assert "waits for 1.talk RECV 0[].0" in refusal([*given, *circle])
    assert play(Program((*given, circle[0], circle[1], circle[3], circle[2])), STEPS).seconds > 0


def test_an_optimizer_step_that_a_rank_leaves_out_is_refused() -> None:
    actions = list(GOOD)
    first, last = places(Kind.STEP, 1)
    assert refusal(actions[:last] + actions[last + 1 :]).endswith("0.steps STEP optimizer[ben].3: no STEP of rank 1 matches it")
    actions[first], actions[last] = actions[last], actions[first]
    assert "waits for 1.steps STEP optimizer[ann].1" in refusal(actions)


def test_more_in_flight_than_memory_holds_is_refused() -> None:
    peak = play(GOOD, STEPS).peak_bytes[0]
    play(GOOD, STEPS, memory_cap=peak)
    assert "over the cap" in refusal(list(GOOD), memory_cap=peak - 1)


def test_a_transfer_that_names_no_rank_is_no_action() -> None:
    with pytest.raises(ValueError, match="SEND names no rank"):
        Action.parse("0.comm SEND next[].0 : h ->")
