"""Pipelines and replicas of several processes: the losses, gradients and adapters of one."""

from __future__ import annotations

import pytest

from tests.dist.processes import run


@pytest.mark.parametrize(("mesh", "count"), [("pp=2", 2), ("dp=2", 2), ("pp=2,dp=2", 4), ("pp=4", 4)])
def test_a_mesh_trains_as_one_process_does(mesh: str, count: int) -> None:
    for rank, wrong in enumerate(run("tests.dist.cases:same_as_alone", count, mesh)):
        assert not wrong, (rank, wrong)
