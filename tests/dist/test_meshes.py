"""Pipelines and replicas of several processes: the losses, gradients and adapters of one, and a task's own bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.dist.processes import run

TWO_GROUPS = (("wide", "norms"), ("early", "dora", "head", "ia3"))


@pytest.mark.parametrize(
    ("kinds", "count", "meshes", "groups"),
    [
        ("apart", 2, ["pp=2", "dp=2"], TWO_GROUPS),
        ("apart", 4, ["pp=2,dp=2", "pp=4"], None),
        ("shared", 2, ["pp=2"], None),
        ("shared", 4, ["pp=2,dp=2", "pp=4"], None),
    ],
    ids=["two", "four", "two with shared tensors", "four with shared tensors"],
)
def test_meshes_train_as_one_process_does_and_go_on_from_each_others_checkpoints(
    kinds: str, count: int, meshes: list[str], groups: Any, tmp_path: Path
) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:same_as_alone", count, kinds, meshes, groups, str(tmp_path / "checkpoint"))):
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize(
    ("kinds", "count", "mesh"), [("apart", 2, "pp=2"), ("apart", 2, "dp=2"), ("apart", 4, "dp=2,pp=2"), ("shared", 2, "pp=2")]
)
def test_a_task_keeps_its_bits_beside_neighbours_on_a_mesh(kinds: str, count: int, mesh: str) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:same_bits_alone", count, kinds, mesh)):
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize(("count", "mesh"), [(2, "dp=2"), (4, "dp=2,pp=2"), (4, "dp=2,tp=2")])
def test_replicas_sum_in_one_order_whoever_of_them_has_chunks(count: int, mesh: str) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:taking_turns", count, mesh)):
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2"])
def test_ranks_run_the_same_tasks_whoever_learns_first_that_one_is_stopped(mesh: str) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:learnt_late", 2, mesh)):
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "tp=2"])
def test_a_folder_that_the_first_rank_must_not_write_or_read_is_refused_by_all(mesh: str, tmp_path: Path) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:saved_by_all", 2, mesh, str(tmp_path))):
        assert not wrong, (rank, wrong)


def test_a_model_sums_with_its_own_ranks_after_another_was_compiled() -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:two_models", 2)):
        assert not wrong, (rank, wrong)


def test_a_task_that_fits_the_memory_of_one_rank_alone_is_refused_by_all() -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:refused_by_all", 2)):
        assert not wrong, (rank, wrong)


def test_a_checkpoint_that_lacks_a_tensor_of_one_stage_is_refused_by_all(tmp_path: Path) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:checkpoint_refused_by_all", 2, str(tmp_path / "checkpoint"))):
        assert not wrong, (rank, wrong)


def test_the_planner_gives_a_pipeline_groups_that_interleave() -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:planned_groups", 2, "pp=2")):
        assert not wrong, (rank, wrong)


def test_a_trace_has_what_was_predicted_of_every_action_beside_what_was_measured() -> None:
    trace, seconds = run("tests.dist.cases:traced", 2)[0]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    threads = {(own["pid"], own["tid"]): own["args"]["name"] for own in trace["traceEvents"] if own["name"] == "thread_name"}
    lanes: dict[tuple[int, str, str], list[Any]] = {}
    for event in events:
        what, stream = threads[event["pid"], event["tid"]].split()
        lanes.setdefault((event["pid"], stream, what), []).append(event)
    down, up = (["send_down", "recv_down"], ["recv_up", "send_up"])
    for rank in (0, 1):
        for stream in ("compute", "steps", down[rank], up[rank]):
            both = [lanes.pop((rank, stream, what)) for what in ("predicted", "measured")]
            named = [Counter((own["name"], own["args"]["action"]) for own in each) for each in both]
            assert named[0] == named[1], (rank, stream)
            assert sum(named[0].values()) >= 8, "four rounds, two groups"
            assert all(own["dur"] >= 0 for each in both for own in each)
            predicted, measured = both
            assert not any("issued" in own["args"] for own in predicted)
            # Here the host computes itself: what it launches begins then, but for a receipt, which waits from earlier on.
            assert all(0 <= own["args"]["issued"] <= own["ts"] + own["dur"] for own in measured)
    assert not lanes
    # Each run begins at the same time in both: its first forward is in the first lane there is.
    first = [min(e["ts"] for e in events if threads[e["pid"], e["tid"]] == f"{what} compute") for what in ("predicted", "measured")]
    assert first[0] == pytest.approx(first[1], abs=1e-3)
    assert {part.rpartition(" ")[0] for part in seconds} == {
        f"{kind} {stage} {tasks}" for kind in ("F", "B", "STEP") for stage in (0, 1) for tasks in ("wide+norms", "early")
    }
    assert min(seconds.values()) > 0


@pytest.mark.parametrize(("how", "seconds"), [("dies", 60.0), ("hangs", 12.0)])
def test_who_waits_for_a_rank_that_is_gone_says_where(how: str, seconds: float, tmp_path: Path) -> None:
    said, other = run("tests.dist.cases:left_alone", 2, how, seconds, str(tmp_path / "over"))
    assert other is None
    assert said.startswith("in time: rank 0 (replica 0, stage 0, shard 0 of mesh dp=1,pp=2,tp=1): "), said
    assert " stage.0 of micro-batch " in said
    assert "tasks wide, early: " in said
