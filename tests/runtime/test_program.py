"""A program is a list of actions and a text, and the two say the same."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.program import Action, Kind, Program

# Task names are free text; the name of a region or value is the compiler's own and holds no blank, bracket or arrow head.
AWKWARD = [
    "a b",
    "a+b",
    "a]",
    "[a",
    "a.0",
    "->",
    " : ",
    "100%",
    "%2B",
    "#1",
    "ünï/cødé",
    "任务",
    "\n",
    "\u2028",
    "🦙",
    "+",
    "0.compute F",
]
task_names = st.sampled_from(AWKWARD) | st.text(min_size=1, max_size=8)
plain_names = st.sampled_from(["layers.3", "h.3", "s.3.1", "grad.layers.3.q_proj", "#", "a+b", "100%", ":", "-", "ü", "块.0"]) | (
    st.text(min_size=1, max_size=8).filter(lambda name: not re.search(r"[\s\[\]>]", name))
)
TRANSFERS = (Kind.SEND, Kind.RECV)
actions = st.builds(
    Action,
    rank=st.integers(0, 999),
    stream=st.sampled_from(["compute", "comm", "copy", "s_1"]),
    kind=st.sampled_from(Kind),
    region=plain_names,
    tasks=st.lists(task_names, max_size=4).map(tuple),
    micro=st.integers(0, 999),
    reads=st.lists(plain_names, max_size=4).map(tuple),
    writes=st.lists(plain_names, max_size=4).map(tuple),
).map(lambda action: replace(action, region=str(action.micro)) if action.kind in TRANSFERS else action)
programs = st.lists(actions, max_size=6).map(tuple).map(Program)


def action(reads: str, writes: str = "") -> Action:
    return Action(0, "compute", Kind.F, "layers.0", (), 0, tuple(reads.split()), tuple(writes.split()))


@settings(deadline=None)
@given(actions)
@example(Action(0, "compute", Kind.F, "layers.3", tuple(AWKWARD), 0, ("h.3",), ("h.4",)))
def test_an_action_reads_back_from_its_line(action: Action) -> None:
    assert "\n" not in str(action)
    assert Action.parse(str(action)) == action


@settings(deadline=None)
@given(programs)
def test_a_program_reads_back_from_its_text(program: Program) -> None:
    assert Program.parse(str(program)) == program
    assert len(str(program).split("\n")) == len(program) + 1


def test_a_line_reads_as_documented() -> None:
    line = "0.compute F layers.3[alice+bob%20%2B].0 : h.3 cos sin -> h.4 s.3.0 s.3.1"
    action = Action.parse(line)
    reads, writes = ("h.3", "cos", "sin"), ("h.4", "s.3.0", "s.3.1")
    assert action == Action(0, "compute", Kind.F, "layers.3", ("alice", "bob +"), 0, reads, writes)
    assert str(action) == line


def test_an_action_may_read_and_write_nothing_and_serve_no_task() -> None:
    idle = Action(1, "copy", Kind.LOAD, "chunk", (), 2, (), ())
    assert str(idle) == "1.copy LOAD chunk[].2 : ->"
    assert Action.parse(str(idle)) == idle


def test_a_task_without_a_name_has_no_text_and_is_read_from_none() -> None:
    for tasks in (("",), ("alice", "")):
        with pytest.raises(ValueError, match=r"F layers\.0: a task has an empty name"):
            str(replace(action("h.0"), tasks=tasks))
    with pytest.raises(ValueError, match="line 1: a task has an empty name"):
        Program.parse("0.compute F layers.0[alice+].0 : ->")


def test_blank_lines_and_comments_are_passed_over() -> None:
    text = "\n# one micro-batch\n  0.compute F layers.0[a].0 : h.0 -> h.1  \n\n   # the end\n"
    assert [str(action) for action in Program.parse(text)] == ["0.compute F layers.0[a].0 : h.0 -> h.1"]


@pytest.mark.parametrize(
    "line",
    [
        "0.compute F layers.0[a].0 : h.0",
        "0.compute F layers.0[a] : h.0 -> h.1",
        "compute F layers.0[a].0 : h.0 -> h.1",
        "0.compute WALK layers.0[a].0 : h.0 -> h.1",
        "0.compute F layers.0[a b].0 : h.0 -> h.1",
        "0.compute F layers.0[a].0 : h.0 -> h.1\n0.compute F",
    ],
)
def test_a_line_that_is_no_action_is_refused_by_number(line: str) -> None:
    with pytest.raises(ValueError, match="not an action"):
        Action.parse(line)
    number = 3 + line.count("\n")
    with pytest.raises(ValueError, match=f"^line {number}: not an action"):
        Program.parse(f"# first\n0.copy LOAD chunk[].0 : -> ids\n{line}\n")


@settings(deadline=None)
@given(programs, st.lists(st.lists(task_names, max_size=3).map(tuple), max_size=4))
def test_unroll_repeats_the_program_for_each_chunk_with_its_tasks(program: Program, chunks: list[tuple[str, ...]]) -> None:
    unrolled = program.unroll(chunks)
    assert len(unrolled) == len(chunks) * len(program)
    for position, action in enumerate(unrolled):
        micro, index = divmod(position, len(program))
        origin = program.actions[index]
        assert (action.micro, action.tasks) == (micro, chunks[micro])
        kept = [(a.rank, a.stream, a.kind, a.region, a.reads, a.writes) for a in (action, origin)]
        assert kept[0] == kept[1]


def test_last_reads_names_what_nobody_reads_afterwards() -> None:
    program = Program((action("ids w", "h"), action("h w h", "g"), action("g h", "loss"), action("")))
    assert program.last_reads() == (("ids",), ("w",), ("g", "h"), ())


@settings(deadline=None)
@given(programs)
def test_every_value_that_is_read_dies_once_at_its_last_reader(program: Program) -> None:
    dying = program.last_reads()
    assert len(dying) == len(program)
    for index, names in enumerate(dying):
        later = {name for action in program.actions[index + 1 :] for name in action.reads}
        assert list(names) == [name for name in dict.fromkeys(program.actions[index].reads) if name not in later]
