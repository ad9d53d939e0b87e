"""`muxcompile train` in several processes: the adapters of one, and a run that goes on with another mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muxcompile.cli import app, run_command
from muxcompile.metrics import read_metrics
from tests.dist.processes import ROOT
from tests.muxcompile.conftest import base_folder, tokenizer, write_jsonl  # noqa: F401

JOBS = """\
base: base
options: {chunk_tokens: 128}
tasks:
  alice:
    peft: {r: 2, target_modules: [q_proj, v_proj]}
    data: alice.jsonl
    eval_fraction: 0.25
    train: {batch_size: 2, max_steps: 4, learning_rate: 1e-2, save_steps: 2, logging_steps: 1}
  bob:
    peft: {r: 3, lora_alpha: 6, target_modules: all-linear}
    data: bob.jsonl
    train: {batch_size: 3, max_steps: 4, lr_scheduler_type: linear, logging_steps: 1}
"""


@pytest.fixture
def jobs_file(tmp_path: Path, base_folder: Path, write_jsonl: Callable[[str, list[Any]], Path]) -> Path:  # noqa: F811
    write_jsonl("alice.jsonl", [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(8)])
    write_jsonl("bob.jsonl", [{"prompt": "hi", "completion": f"there, {i}"} for i in range(9)])
    path = tmp_path / "jobs.yaml"
    path.write_text(JOBS)
    return path


def torchrun(count: int, *arguments: str | Path) -> str:
    """What `muxcompile` prints, run by torchrun in several processes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, "-m", "muxcompile", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}: {key}": value
        for name in ("alice", "bob")
        for key, value in load_file(folder / name / "adapter_model.safetensors").items()
    }


def test_a_run_that_goes_on_with_another_mesh_leaves_the_adapters_of_one_process(jobs_file: Path) -> None:
    one, many = jobs_file.parent / "one", jobs_file.parent / "many"
    assert run_command(app, "muxcompile", ["train", str(jobs_file), "--output-dir", str(one)]) == 0
    stop = "tasks.alice.train.max_steps=2"
    said = torchrun(2, "train", jobs_file, stop, "--mesh", "pp=2", "--output-dir", many)
    assert said.count("adapters in") == 1, "one process speaks for all"
    torchrun(2, "train", jobs_file, "--mesh", "dp=2", "--resume", "--output-dir", many)
    want, got = adapters(one), adapters(many)
    assert want.keys() == got.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=lambda text, key=key: key + text)
    rows = [{(row["step"], row["task"]): row["loss"] for row in read_metrics(own / "metrics.jsonl") if "loss" in row} for own in (one, many)]
    assert rows[0].keys() == rows[1].keys()
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_another_number_of_processes_than_the_mesh_takes_is_refused(jobs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, "muxcompile", ["train", str(jobs_file), "--mesh", "pp=2"]) == 2
    assert capsys.readouterr().err == (
        "muxcompile: mesh dp=1,pp=2,tp=1: takes 2 processes, there is 1: start it by torchrun --nproc-per-node 2 -m muxcompile "
        "train ...\n"
    )
