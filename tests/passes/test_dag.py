"""Regions and actions as graphs."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.dag import action_graph, check_order, critical_path, region_graph
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec
from runtime.simulate import simulate


def region(name: str, reads: str, writes: str) -> RegionSpec:
    inputs = (*(f"value:{value}" for value in reads.split()), "weight:w")
    return RegionSpec(name, name, inputs, tuple(writes.split()))


def test_an_edge_goes_from_who_makes_a_value_to_who_reads_it() -> None:
    graph = region_graph([region("embed", "", "h cos"), region("one", "h cos", "i"), region("two", "i cos", "j")])
    assert set(graph.edges) == {("embed", "one"), ("embed", "two"), ("one", "two")}
    assert graph.edges["embed", "one"]["values"] == ["h", "cos"]


def test_regions_in_a_wrong_order_or_in_a_cycle_are_refused() -> None:
    one, two = region("one", "h", "i"), region("two", "i", "j")
    check_order([one, two])
    with pytest.raises(AssertionError, match="two runs before one"):
        check_order([two, one])
    with pytest.raises(AssertionError, match="wait for each other"):
        check_order([region("one", "j", "i"), two])


def action(kind: Kind, region: str, reads: str, writes: str, *, micro: int = 0, stream: str = "compute") -> Action:
    return Action(0, stream, kind, region, ("ann",), micro, tuple(reads.split()), tuple(writes.split()))


def test_streams_wait_for_data_and_each_for_itself() -> None:
    program = Program(
        (
            action(Kind.F, "a", "", "x"),
            action(Kind.F, "b", "", "y", stream="comm"),
            action(Kind.F, "c", "y", "z"),
            action(Kind.B, "c", "z", "grad.c", micro=0),
            action(Kind.B, "c", "", "grad.c", micro=1),
            action(Kind.STEP, "optimizer", "grad.c", ""),
        )
    )
    assert set(action_graph(program, lanes=False).edges) == {(1, 2), (2, 3), (3, 5), (4, 5)}
    assert set(action_graph(program).edges) == {(0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5)}


@given(
    st.lists(
        st.tuples(st.sampled_from(["compute", "comm"]), st.integers(0, 9), st.sets(st.integers(0, 9), max_size=3)), max_size=10
    )
)
def test_the_critical_path_is_how_long_the_simulator_takes(rows: list[tuple[str, int, set[int]]]) -> None:
    took = {f"r{index}": float(seconds) for index, (_, seconds, _) in enumerate(rows)}
    program = Program(
        tuple(
            action(Kind.F, f"r{index}", " ".join(f"v{read}" for read in sorted(reads) if read < index), f"v{index}", stream=stream)
            for index, (stream, _, reads) in enumerate(rows)
        )
    )
    path, seconds = critical_path(action_graph(program), lambda action: took[action.region])
    assert seconds == simulate(program, seconds=lambda action: took[action.region], nbytes={}).seconds
    assert nx.is_directed_acyclic_graph(action_graph(program))
    free = critical_path(action_graph(program, lanes=False), lambda action: took[action.region])[1]
    assert free <= seconds
    assert [*path] == sorted(path, key=lambda action: int(action.region[1:]))
