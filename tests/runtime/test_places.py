"""Whoever posts to a place again comes behind all ranks that read what was there."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.order import Micro, beside, staged
from runtime.places import places
from runtime.program import Kind, Program

TASKS = "abcdef"


def happens(program: Program, units: list[int], ranks: int) -> nx.DiGraph[Any]:
    """What comes before what: streams run in order, values are read behind their writers, messages received behind the sender.

    Args:
        units: of each micro-batch.

    Of a unit on a rank there is ("post", rank, unit) behind its last backward, and its STEP is ("close", rank, unit), behind the
    posts of all ranks.
    """
    graph: nx.DiGraph[Any] = nx.DiGraph()
    latest: dict[Any, Any] = {}
    sent: dict[tuple[int, int], deque[Any]] = defaultdict(deque)
    for index, action in enumerate(program):
        rank, unit = action.rank, units[action.micro]
        own: Any = ("close", rank, unit) if action.kind is Kind.STEP else index
        graph.add_node(own)
        if ("stream", rank, action.stream) in latest:
            graph.add_edge(latest["stream", rank, action.stream], own)
        latest["stream", rank, action.stream] = own
        if action.kind is Kind.SEND:
            sent[rank, int(action.region)].append(own)
        if action.kind is Kind.RECV:
            graph.add_edge(sent[int(action.region), rank].popleft(), own)
        for name in action.reads:
            name, _, micro = name.partition("^")
            key = "value", rank, name, int(micro or action.micro)
            if key in latest:
                graph.add_edge(latest[key], own)
        for name in action.writes:
            latest["value", rank, name, action.micro] = own
        if action.kind is Kind.B:
            graph.add_edge(own, ("post", rank, unit))
        if action.kind is Kind.STEP:
            graph.add_edges_from((("post", other, unit), own) for other in range(ranks))
    return graph


@st.composite
def played(draw: st.DrawFn) -> tuple[int, list[tuple[Micro, ...]], list[tuple[float, ...]], tuple[int, ...]]:
    ranks, lanes = draw(st.sampled_from([(2, 1), (3, 1), (1, 2)]))
    seconds = st.sampled_from([0.5, 1.0, 2.0, 7.0])
    steps = []
    for tasks in draw(st.lists(st.sets(st.sampled_from(TASKS), min_size=1), min_size=1, max_size=14)):
        micro = Micro(tuple(sorted(tasks)), (draw(seconds),) * ranks, (draw(seconds),) * ranks)
        steps.append((micro,) * draw(st.integers(1, 3)))
    flight = (lanes,) if ranks == 1 else tuple(ranks - rank + draw(st.integers(0, 1)) for rank in range(ranks))
    return ranks, steps, [(draw(seconds),) * ranks for _ in steps], flight


@settings(deadline=None, max_examples=200)
@given(played())
def test_a_place_is_free_before_it_is_posted_to_again(case: Any) -> None:
    ranks, steps, stepping, flight = case
    program = staged(steps, flight=flight, stepping=stepping) if ranks > 1 else beside(steps, lanes=2, stepping=stepping)
    units = [unit for unit, step in enumerate(steps) for _ in step]
    closed = [units[action.micro] for action in program.of(0) if action.kind is Kind.STEP]
    found = places([step[0].tasks for step in steps], closed, [True] * len(steps))
    graph = happens(program, units, ranks)
    assert nx.is_directed_acyclic_graph(graph)
    for unit, place in enumerate(found):
        before = nx.ancestors(graph, ("post", 0, unit))
        for other in (other for other in range(unit) if found[other] == place):
            assert all(("close", rank, other) in before for rank in range(ranks)), (other, unit, place)


def test_groups_that_all_train_take_turns_in_few_places() -> None:
    tasks = [("a", "b"), ("c",)] * 20
    assert places(tasks, range(40), [True] * 40) == [0, 1] * 20


def test_a_unit_that_waits_for_nobody_has_a_place_that_nobody_had() -> None:
    # The last one may be through before the second begins.
    assert places(["a", "ac", "ac", "b"], [0, 3, 1, 2], [True] * 4) == [0, 0, 0, 1]
    assert places(["a", "a", "a"], [0, 1, 2], [True, False, True]) == [0, 1, 0]
