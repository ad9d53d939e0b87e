"""`benchmarks.run mirror` runs what a rank of two runs whose other one answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def mirrored(folder: Path, mesh: str) -> dict[str, Any]:
    out = folder / "mirror.json"
    given = {"workload": "tiny-mux", "device": "cpu", "tasks": 2, "successive": 1, "loads": "light", "interleaved": 2, "layers": 2}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.run", "mirror", *flags, "--mesh", mesh, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["gate"] == {"passed": True}
    found: dict[str, Any] = report["loads"]["light"]
    return found


def test_a_shard_trains_in_lanes_and_one_micro_batch_at_a_time(tmp_path: Path) -> None:
    found = mirrored(tmp_path, "tp=2")
    assert list(found) == ["one GPU", "2 groups", "2 groups, one at a time"]
    lanes, alone = found["2 groups"], found["2 groups, one at a time"]
    assert len(lanes["groups"]) == 2
    assert lanes["groups"] == alone["groups"]
    assert lanes["over_one_gpu"] > 0


def test_both_stages_run_and_are_played_together(tmp_path: Path) -> None:
    found = mirrored(tmp_path, "pp=2")
    assert list(found) == ["one GPU", "2 groups"]
    own = found["2 groups"]
    assert {part["part"] for part in own["parts"]} == {
        f"{kind} of stage {stage}" for kind in ("F", "B", "STEP") for stage in (0, 1)
    }
    # Both stages at work take no longer than one after the other, and no less than the one that takes longer.
    busy = [sum(part["measured"] for part in own["parts"] if part["part"] == f"{kind} of stage 1") for kind in "FB"]
    assert sum(busy) <= own["replayed"] <= 1.5 * (own["rank 0"] + own["rank 1"])
