"""The benchmark of adapted linears: its check is passed by what is right, and refuses what is wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chart, linear
from benchmarks.ours import Ours
from benchmarks.peers.linear_peers import Case


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    linear.flags(parser)
    arguments = parser.parse_args(["--rounds", "1", "--sets", "1", "--contenders", "addmm,grouped_mm,eager,muxcompile,augment"])
    return linear.linear(argparse.Namespace(**vars(arguments), device="cpu", commit="none"))


def test_every_contender_of_the_tiny_grid_passes_its_check(report: dict[str, Any]) -> None:
    assert report["gate"]["passed"], report["gate"]
    assert {"frozen", "addmm", "eager", "muxcompile", "augment"} <= set(report["gate"]["worst_relative_error"])
    assert {case["dropout"] > 0 for case in report["cases"]} == {False, True}


class Wrong(Ours):
    """The scale of one adapter is off."""

    name = "wrong"

    def forward(self) -> list[torch.Tensor]:
        self._rest[0][0][0] = 2.2
        return super().forward()


def test_a_contender_that_is_wrong_gets_no_time() -> None:
    case = Case("o", 64, (64,), 256, 2, 16)
    found = linear.measure(case, {"frozen": linear.CONTENDERS["frozen"], "wrong": Wrong}, "cpu", linear.GRIDS["tiny"])
    entry = found["contenders"]["wrong"]
    assert "failed" in entry
    assert "us" not in entry


def test_the_chart_and_the_table_follow_from_the_report_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*linear*.json"))
    assert results, "no recorded run"
    report = json.loads(results[-1].read_text())
    text = chart.table(report, 8192, 16, 0.0)
    assert "| muxcompile |" in text
    assert "32 adapters" in text
