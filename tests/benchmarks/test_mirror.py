"""`benchmarks.run mirror` runs what a shard runs, in lanes and one micro-batch at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_shard_whose_other_one_answers_at_once_trains_in_lanes(tmp_path: Path) -> None:
    out = tmp_path / "mirror.json"
    given = {"workload": "tiny-mux", "device": "cpu", "tasks": 2, "successive": 1, "loads": "light", "interleaved": 2, "layers": 1}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.run", "mirror", *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["gate"] == {"passed": True}
    lanes, alone = report["loads"]["light"].values()
    assert len(lanes["groups"]) == 2
    assert lanes["groups"] == alone["groups"]
    assert [name.split(" ", 1)[1] for name in report["loads"]["light"]] == ["in lanes", "one at a time"]
