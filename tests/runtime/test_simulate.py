"""The simulator times what can run and refuses, with an arrow, what cannot."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from textwrap import dedent

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.program import Action, Kind, Program
from runtime.simulate import ProgramError, Span, Timeline, simulate
from runtime.trace import chrome


def written_as(text: str) -> Program:
    """A program from its text, in which columns may be lined up."""
    return Program.parse("\n".join(" ".join(line.split()) for line in text.splitlines()))


MICRO_BATCH = written_as("""
    0.copy    LOAD chunk[].0    :         -> ids
    0.compute F    layers.0[].0 : ids w   -> h.1
    0.compute F    layers.1[].0 : h.1 w   -> h.2
    0.compute LOSS head[].0     : h.2     -> loss d.2
    0.compute B    layers.1[].0 : d.2 h.1 -> d.1 grad.alice
    0.compute B    layers.0[].0 : d.1 ids -> grad.alice grad.bob
""")
STEPS = written_as("""
    0.compute STEP optimizer[alice].1 : grad.alice ->
    0.compute STEP optimizer[bob].1   : grad.bob   ->
""")
STEP_OF_TWO_CHUNKS = Program(MICRO_BATCH.unroll([("alice",), ("alice", "bob")]).actions + STEPS.actions)
SECONDS = {
    (Kind.LOAD, "chunk"): 0.001,
    (Kind.F, "layers.0"): 0.002,
    (Kind.F, "layers.1"): 0.002,
    (Kind.LOSS, "head"): 0.001,
    (Kind.B, "layers.1"): 0.003,
    (Kind.B, "layers.0"): 0.003,
    (Kind.STEP, "optimizer"): 0.001,
}
NBYTES = {"ids": 10, "h.1": 100, "h.2": 100, "d.1": 100, "d.2": 100, "loss": 1, "grad.alice": 5, "grad.bob": 7, "w": 1000}


def play(program: Program, *, inputs: tuple[str, ...] = ("w",), memory_cap: int | None = None) -> Timeline:
    return simulate(program, seconds=SECONDS, nbytes=NBYTES, inputs=inputs, memory_cap=memory_cap)


def refusal(program: Program, *, inputs: tuple[str, ...] = ("w",), memory_cap: int | None = None) -> str:
    with pytest.raises(ProgramError) as caught:
        play(program, inputs=inputs, memory_cap=memory_cap)
    return str(caught.value)


def arrow(message: str) -> str:
    """The one row that the arrow is on, its blanks collapsed and the columns without an action left out."""
    (row,) = [line for line in message.splitlines() if "<-- HERE" in line]
    return " ".join(word for word in row.split() if word not in {".", "-"})


# Random programs: a micro-batch whose actions read what is listed above them, unrolled, then a STEP for every gradient.


@st.composite
def valid_programs(draw: st.DrawFn) -> Program:
    above: dict[int, list[str]] = {0: ["w"], 1: ["w"]}
    actions = []
    for index in range(draw(st.integers(1, 7))):
        rank, stream = draw(st.sampled_from([(0, "compute"), (0, "copy"), (1, "compute")]))
        reads = tuple(draw(st.lists(st.sampled_from(above[rank]), max_size=3)))
        writes = tuple(
            draw(st.sampled_from([(f"h.{index}",), (f"h.{index}", f"s.{index}"), (f"h.{index}", "grad.a"), ("grad.b",)]))
        )
        above[rank] += [name for name in writes if not name.startswith("grad.")]
        kind = Kind.B if any(name.startswith("grad.") for name in writes) else Kind.F
        actions.append(Action(rank, stream, kind, f"region.{index}", (), 0, reads, writes))
    unrolled = Program(tuple(actions)).unroll([("a",)] * draw(st.integers(1, 3))).actions
    gradients = sorted({(name, action.rank) for action in unrolled for name in action.writes if name.startswith("grad.")})
    ranks = sorted({rank for _, rank in gradients})
    steps = []
    for name in dict.fromkeys(name for name, _ in gradients):
        for rank in ranks:  # all meet, also those that have no such gradient
            stream = draw(st.sampled_from(["compute", "optimizer"]))
            reads = (name,) if (name, rank) in gradients else ()
            steps.append(Action(rank, stream, Kind.STEP, "optimizer", (name,), unrolled[-1].micro, reads, ()))
    return Program(unrolled + tuple(steps))


def duration(action: Action) -> float:
    return float(1 + sum(map(ord, f"{action.kind}{action.region}")) % 5)


def size(name: str) -> int:
    return 1 + sum(map(ord, name)) % 7


SIZES = {name: size(name) for name in ["w", "grad.a", "grad.b", *(f"{letter}.{index}" for letter in "hs" for index in range(7))]}


def value(action: Action, name: str) -> tuple[int, str, int | None]:
    return action.rank, name, None if name == "w" or name.startswith("grad.") else action.micro


def brute_times(program: Program) -> list[tuple[float, float]]:
    """Start and end of every action: each bound pushes starts later until nothing moves. Ranks start a STEP together."""
    actions, starts = program.actions, [0.0] * len(program)
    while True:
        before = list(starts)
        for later, action in enumerate(actions):
            for earlier in range(later):
                other = actions[earlier]
                same_stream = (other.rank, other.stream) == (action.rank, action.stream)
                feeds = {value(other, name) for name in other.writes} & {value(action, name) for name in action.reads}
                if same_stream or feeds:
                    starts[later] = max(starts[later], starts[earlier] + duration(other))
            if action.kind is Kind.STEP:
                together = [index for index, own in enumerate(actions) if (own.kind, own.tasks) == (action.kind, action.tasks)]
                starts[later] = max(starts[index] for index in together)
        if starts == before:
            return [(start, start + duration(action)) for start, action in zip(starts, actions, strict=True)]


def brute_peaks(program: Program) -> dict[int, int]:
    """The most bytes alive at the start of any action, every value held against its own birth and death."""
    times = brute_times(program)
    births: dict[tuple[int, str, int | None], float] = {}
    deaths: dict[tuple[int, str, int | None], float] = defaultdict(lambda: float("inf"))
    for action, (start, _) in zip(program, times, strict=True):
        for name in action.writes:
            births[value(action, name)] = min(start, births.get(value(action, name), start))
        if "w" in action.reads:
            births[action.rank, "w", None] = 0.0
    for key in births:
        ends = [end for action, (_, end) in zip(program, times, strict=True) if key in {value(action, n) for n in action.reads}]
        if ends and key[1] != "w":
            deaths[key] = max(ends)
    peaks = {}
    for rank in {action.rank for action in program}:
        alive = [
            sum(size(key[1]) for key, birth in births.items() if key[0] == rank and birth <= now < deaths[key])
            for now in [0.0, *(start for start, _ in times)]
        ]
        peaks[rank] = 100 + max(alive)
    return peaks


@settings(deadline=None)
@given(valid_programs())
def test_a_valid_program_takes_the_time_and_the_memory_that_brute_force_finds(program: Program) -> None:
    timeline = simulate(program, seconds=duration, nbytes=SIZES, inputs=["w"], resident=100)
    times = brute_times(program)
    assert timeline.seconds == max(end for _, end in times)
    expected = [Span(action, start, end) for action, (start, end) in zip(program, times, strict=True)]
    assert sorted(timeline.spans, key=lambda span: str(span[0])) == sorted(expected, key=lambda span: str(span[0]))
    assert [span.start for span in timeline.spans] == sorted(span.start for span in timeline.spans)
    assert timeline.peak_bytes == brute_peaks(program)


@settings(deadline=None)
@given(valid_programs())
def test_the_peak_is_the_smallest_cap_that_is_accepted(program: Program) -> None:
    free = simulate(program, seconds=duration, nbytes=SIZES, inputs=["w"])
    peak = max(free.peak_bytes.values())
    assert simulate(program, seconds=duration, nbytes=SIZES, inputs=["w"], memory_cap=peak) == free
    assume(peak > 0)
    with pytest.raises(ProgramError, match=f"<-- HERE: rank . holds {peak} bytes, over the cap of {peak - 1} "):
        simulate(program, seconds=duration, nbytes=SIZES, inputs=["w"], memory_cap=peak - 1)


@settings(deadline=None)
@given(valid_programs(), st.data())
def test_a_dropped_write_is_refused_at_a_reader(program: Program, data: st.DataObject) -> None:
    read = {value(action, name) for action in program for name in action.reads}
    needed = [
        (index, name)
        for index, action in enumerate(program)
        for name in action.writes
        if value(action, name) in read and not name.startswith("grad.")
    ]
    assume(needed)
    index, name = data.draw(st.sampled_from(needed))
    writer = program.actions[index]
    broken = list(program.actions)
    broken[index] = replace(writer, writes=tuple(other for other in writer.writes if other != name))
    with pytest.raises(ProgramError) as caught:
        simulate(Program(tuple(broken)), seconds=duration, nbytes=SIZES, inputs=["w"])
    assert arrow(str(caught.value)).endswith(f".{writer.micro} <-- HERE: reads {name}, which nobody has written")
    assert f"(no action of rank {writer.rank} writes it in micro-batch {writer.micro})" in str(caught.value)


@settings(deadline=None)
@given(valid_programs(), st.data())
def test_a_second_write_in_a_micro_batch_is_refused_at_the_second_writer(program: Program, data: st.DataObject) -> None:
    writes = [(i, name) for i, action in enumerate(program) for name in action.writes if not name.startswith("grad.")]
    assume(writes)
    index, name = data.draw(st.sampled_from(writes))
    again = replace(program.actions[index], region="again", reads=(), writes=(name,))
    broken = Program((*program.actions[: index + 1], again, *program.actions[index + 1 :]))
    with pytest.raises(ProgramError) as caught:
        simulate(broken, seconds=duration, nbytes=SIZES, inputs=["w"])
    micro = again.micro
    assert arrow(str(caught.value)) == (
        f"{again.kind} again[a].{micro} <-- HERE: writes {name}, which micro-batch {micro} has already written"
    )


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_chain_out_of_order_is_refused_at_the_action_that_came_too_early(layers: int, data: st.DataObject) -> None:
    forward = [Action(0, "compute", Kind.F, f"layers.{i}", (), 0, (f"h.{i}",), (f"h.{i + 1}",)) for i in range(layers + 1)]
    early = data.draw(st.integers(1, layers))
    forward[early - 1], forward[early] = forward[early], forward[early - 1]
    with pytest.raises(ProgramError) as caught:
        simulate(Program(tuple(forward)), seconds=duration, nbytes={}, inputs=["h.0"])
    assert arrow(str(caught.value)) == f"F layers.{early}[].0 <-- HERE: reads h.{early}, which nobody has written"
    assert f"(0.compute F layers.{early - 1}[].0 would, but waits too)" in str(caught.value)


def test_a_refusal_prints_the_grid_with_an_arrow_and_every_stuck_stream() -> None:
    broken = list(STEP_OF_TWO_CHUNKS.actions)
    broken[9] = replace(broken[9], writes=("loss",))  # the second LOSS no longer writes d.2
    broken[12:] = [replace(action, stream="optimizer") for action in broken[12:]]
    expected = """
        0.compute B layers.1[alice+bob].1: reads d.2, which nobody has written (no action of rank 0 writes it in micro-batch 1)
            ms  0.compute                0.copy                   0.optimizer
         0.000  .                        LOAD chunk[alice].0      .
         1.000  F layers.0[alice].0      LOAD chunk[alice+bob].1  .
         3.000  F layers.1[alice].0      .                        .
         5.000  LOSS head[alice].0       .                        .
         6.000  B layers.1[alice].0      .                        .
         9.000  B layers.0[alice].0      .                        .
        12.000  F layers.0[alice+bob].1  .                        .
        14.000  F layers.1[alice+bob].1  .                        .
        16.000  LOSS head[alice+bob].1   .                        .
             -  B layers.1[alice+bob].1  .                        .                        <-- HERE: reads d.2, which nobody has written
             -  .                        .                        STEP optimizer[alice].1  <-- stuck too: reads grad.alice, which nobody has written
    """  # noqa: E501
    assert refusal(Program(tuple(broken))) == dedent(expected).strip()


def test_a_deadlock_between_two_streams_shows_both() -> None:
    message = refusal(
        written_as("""
            0.compute F    layers.0[].0 : ids  -> h.1
            0.compute LOSS head[].0     :      -> mask
            0.copy    LOAD chunk[].0    : mask -> ids
        """)
    )
    assert arrow(message) == "F layers.0[].0 <-- HERE: reads ids, which nobody has written"
    assert "LOAD chunk[].0  <-- stuck too: reads mask, which nobody has written" in message


def test_the_arrow_prefers_the_stream_that_waits_for_itself() -> None:
    message = refusal(
        written_as("""
            0.compute F    layers.0[].0 : ids  -> h.1
            0.copy    LOAD chunk[].0    : mask ->
            0.copy    LOAD chunk[].0    :      -> ids mask
        """)
    )
    assert arrow(message) == "LOAD chunk[].0 <-- HERE: reads mask, which nobody has written"
    assert "F layers.0[].0  .               <-- stuck too: reads ids, which nobody has written" in message


def test_a_value_of_another_rank_is_not_there() -> None:
    message = refusal(
        written_as("""
            0.compute F layers.0[].0 :     -> h.1
            1.compute F layers.1[].0 : h.1 -> h.2
        """)
    )
    assert arrow(message) == "F layers.1[].0 <-- HERE: reads h.1, which nobody has written"
    assert "no action of rank 1" in message


def test_an_input_is_never_written() -> None:
    message = refusal(MICRO_BATCH, inputs=("w", "h.1"))
    assert arrow(message) == "F layers.0[].0 <-- HERE: writes h.1, which is an input"


@pytest.mark.parametrize("name", ["h.1^1", "h.1^0", "h.1^", "grad.a^1"])
def test_a_write_into_a_micro_batch_by_its_number_is_refused(name: str) -> None:
    message = refusal(written_as(f"0.compute F layers.0[].0 : -> {name}"))
    assert arrow(message) == f"F layers.0[].0 <-- HERE: writes {name}, but what it writes is of its own micro-batch"


@pytest.mark.parametrize("micro", ["b", "", "-1", "1_0", "1^0", "\u0664"])
def test_a_read_of_a_micro_batch_that_is_no_number_is_refused(micro: str) -> None:
    chain = written_as(f"""
        0.compute F layers.0[].0 :            -> h.1
        0.compute F layers.1[].1 : h.1^{micro} -> h.2
    """)
    assert arrow(refusal(chain)) == f"F layers.1[].1 <-- HERE: reads h.1^{micro}, where {micro!r} is no micro-batch"
    assert play(chain, inputs=(f"h.1^{micro}",)).spans  # the name of an input is free


TRANSFER = """
    0.compute F    layers.0[].0 :     -> h.1
    0.comm    SEND 1[{sent}].0     : h.1 ->{written}
    1.comm    RECV 0[{received}].0 :{read} -> h.1
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"written": " h.2"}, "SEND 1[].0 <-- HERE: writes h.2, which no SEND does"),
        ({"read": " w"}, "RECV 0[].0 <-- HERE: reads w, which no RECV does"),
        ({"sent": "ann"}, "RECV 0[].0 <-- HERE: is of no task, where 0.comm SEND 1[ann].0 is of ann"),
        ({"sent": "ann", "received": "ben"}, "RECV 0[ben].0 <-- HERE: is of ben, where 0.comm SEND 1[ann].0 is of ann"),
    ],
)
def test_a_transfer_goes_one_way_and_serves_the_same_tasks_at_both_ends(change: dict[str, str], expected: str) -> None:
    right = {"sent": "", "received": "", "read": "", "written": ""}
    assert arrow(refusal(written_as(TRANSFER.format(**right | change)))) == expected
    both = {"sent": "ann", "received": "ann"}
    assert len(simulate(written_as(TRANSFER.format(**right | both)), seconds=duration, nbytes={}).spans) == 3


def test_memory_over_the_cap_is_refused_where_it_is_asked_for() -> None:
    message = refusal(STEP_OF_TWO_CHUNKS, memory_cap=1200)
    assert arrow(message) == (
        "F layers.1[alice].0 <-- HERE: rank 0 holds 1,220 bytes, over the cap of 1,200 (largest: w 1,000, h.1 100, h.2 100)"
    )


def test_a_long_refusal_shows_only_the_rows_before_the_arrow() -> None:
    many = MICRO_BATCH.unroll([("alice",)] * 20)
    message = refusal(Program((*many.actions, *written_as("0.compute STEP optimizer[x].19 : grad.x ->"))))
    headline, left_out, head, *rows = message.splitlines()
    assert headline.endswith("reads grad.x, which nobody has written (no action of rank 0 writes it)")
    assert left_out == "(87 rows above are left out)"
    assert head.split() == ["ms", "0.compute", "0.copy"]
    assert len(rows) == 24 + 1


@pytest.mark.parametrize("seconds", [{}, {(Kind.F, "layers.0"): -1.0}, {(Kind.F, "layers.0"): float("nan")}])
def test_an_action_without_a_duration_is_refused(seconds: dict[tuple[Kind, str], float]) -> None:
    with pytest.raises(ProgramError, match=r"no duration for F layers\.0"):
        simulate(written_as("0.compute F layers.0[].0 : -> h.1"), seconds=seconds, nbytes={})


def test_streams_and_ranks_run_side_by_side() -> None:
    timeline = play(
        written_as("""
            0.compute F    layers.0[].0 : -> h.1
            0.copy    LOAD chunk[].1    : -> ids
            1.compute F    layers.1[].0 : -> h.2
            1.compute LOSS head[].0     : h.2 -> loss
        """)
    )
    assert timeline.seconds == pytest.approx(0.003)
    assert timeline.idle == pytest.approx({(0, "compute"): 1 / 3, (0, "copy"): 2 / 3, (1, "compute"): 0.0})


def test_an_action_waits_for_a_stream_that_is_listed_after_it() -> None:
    timeline = play(
        written_as("""
            0.compute F    layers.0[].0 : ids -> h.1
            0.copy    LOAD chunk[].0    :     -> ids
        """)
    )
    assert [(span.action.kind, span.start) for span in timeline.spans] == [(Kind.LOAD, 0.0), (Kind.F, 0.001)]


def test_a_step_on_its_own_stream_waits_for_the_gradients_of_every_micro_batch() -> None:
    apart = [replace(action, stream="optimizer") for action in STEPS]
    timeline = play(Program(STEP_OF_TWO_CHUNKS.actions[:-2] + tuple(apart)))
    last_backward = max(span.end for span in timeline.spans if span.action.kind is Kind.B)
    assert timeline.spans[-2].action.kind is timeline.spans[-1].action.kind is Kind.STEP
    assert timeline.spans[-2].start == last_backward


def test_a_step_reads_what_any_micro_batch_wrote() -> None:
    step = written_as("0.compute STEP optimizer[alice].7 : loss ->")
    timeline = play(Program(MICRO_BATCH.unroll([("alice",), ("alice",)]).actions + step.actions))
    assert timeline.spans[-1].action == step.actions[0]


def test_values_die_with_their_last_reader_and_results_stay() -> None:
    chain = """
        0.compute F    layers.0[].0 : w   -> h.1
        0.compute F    layers.1[].0 : h.1 -> h.2
        0.compute LOSS head[].0     : h.2 -> loss
    """
    one = play(written_as(chain)).peak_bytes[0]
    assert one == 1000 + 100 + 100
    assert play(written_as(chain).unroll([()] * 3)).peak_bytes[0] == one + 2 * NBYTES["loss"]


def test_a_value_lives_until_its_slowest_reader_ends() -> None:
    timeline = play(
        written_as("""
            0.compute LOSS head[].0     :     -> h.1
            0.compute B    layers.0[].0 : h.1 ->
            0.copy    LOAD chunk[].0    : h.1 ->
            0.copy    F    layers.0[].0 :     -> h.2
        """)
    )
    assert [span.end for span in timeline.spans] == pytest.approx([0.001, 0.004, 0.002, 0.004])
    assert timeline.peak_bytes == {0: 200}


def test_resident_bytes_are_held_by_every_rank() -> None:
    two = written_as("""
        0.compute F layers.0[].0 : -> h.1
        1.compute F layers.0[].0 : w -> h.1
    """)
    timeline = simulate(two, seconds=SECONDS, nbytes=NBYTES, inputs=["w"], resident=10_000)
    assert timeline.peak_bytes == {0: 10_100, 1: 11_100}


def test_an_empty_program_takes_no_time() -> None:
    assert play(Program(())) == Timeline((), 0.0, {}, {})


def test_a_timeline_prints_as_a_grid() -> None:
    expected = """
            ms  0.compute                 0.copy
         0.000  .                         LOAD chunk[a+b+c].0
         1.000  F layers.0[a+b+c].0       LOAD chunk[a+b+2-more].1
         3.000  F layers.1[a+b+c].0       .
         5.000  LOSS head[a+b+c].0        .
         6.000  B layers.1[a+b+c].0       .
         9.000  B layers.0[a+b+c].0       .
        12.000  F layers.0[a+b+2-more].1  .
        14.000  F layers.1[a+b+2-more].1  .
        16.000  LOSS head[a+b+2-more].1   .
        17.000  B layers.1[a+b+2-more].1  .
        20.000  B layers.0[a+b+2-more].1  .
        23.000 ms; peak bytes: rank 0 1,326; idle: 0.compute 4.3%, 0.copy 91.3%
    """
    timeline = play(MICRO_BATCH.unroll([("a", "b", "c"), ("a", "b", "c", "d")]))
    assert str(timeline).strip() == dedent(expected).strip()


@settings(deadline=None)
@given(valid_programs())
def test_a_trace_is_json_in_which_no_thread_overlaps_itself(program: Program) -> None:
    timeline = simulate(program, seconds=lambda action: duration(action) / 3e5, nbytes=SIZES, inputs=["w"])
    trace = json.loads(json.dumps(chrome({"predicted": timeline.spans})))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [Action.parse(event["args"]["action"]) for event in complete] == [span.action for span in timeline.spans]
    for rank, stream in timeline.idle:
        mine = [(span, event) for span, event in zip(timeline.spans, complete, strict=True) if span.action.stream == stream]
        mine = [(span, event) for span, event in mine if event["pid"] == span.action.rank == rank]
        assert len({event["tid"] for _, event in mine}) == 1
        for (_, before), (_, after) in pairwise(mine):
            assert round(before["ts"] + before["dur"], 3) <= after["ts"]


def test_a_trace_follows_the_format_that_viewers_read() -> None:
    apart = [replace(action, stream="optimizer") for action in STEPS]
    trace = chrome({"predicted": play(Program(STEP_OF_TWO_CHUNKS.actions[:-2] + tuple(apart))).spans})
    assert trace["displayTimeUnit"] == "ms"
    names = {(event["name"], event["pid"], event.get("tid")): event["args"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names["process_name", 0, None] == {"name": "rank 0 (predicted)"}
    threads = {tid: args["name"] for (name, _, tid), args in names.items() if name == "thread_name"}
    assert threads == {0: "predicted compute", 2: "predicted copy", 3: "predicted optimizer"}
    assert names["thread_sort_index", 0, 2] == {"sort_index": 2}
    first = next(event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == 0)
    assert first == {
        "ph": "X",
        "name": "alice F layers.0.0",
        "cat": "alice",
        "ts": 1000.0,
        "dur": 2000.0,
        "pid": 0,
        "tid": 0,
        "args": {"action": "0.compute F layers.0[alice].0 : ids w -> h.1"},
    }


def test_a_name_may_be_that_of_another_micro_batch() -> None:
    chain = written_as("""
        0.compute F layers.0[].0 : w      -> h.1
        0.compute F layers.0[].1 : h.1^0  -> h.1
        0.compute F layers.1[].2 : h.1^1  -> h.2
    """)
    assert max(play(chain).peak_bytes.values()) == 1000 + 200
    assert "reads h.1, which nobody has written (no action of rank 0 writes it in micro-batch 0)" in refusal(
        Program(chain.actions[1:])
    )
    swapped = Program((chain.actions[1], chain.actions[0], chain.actions[2]))
    assert "reads h.1, which nobody has written (0.compute F layers.0[].0 would, but waits too)" in refusal(swapped)
