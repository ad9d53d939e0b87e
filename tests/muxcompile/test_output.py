"""The output folder of a run: what is there already is not lost by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from muxcompile.jobs import Jobs, load_jobs
from muxcompile.output import check_adapters

JOBS = """\
base: {base}
output_dir: {out}
tasks:
  alice:
    peft: {peft}
    data: {data}
  bob:
    peft: {{r: 2}}
    data: data.jsonl
    eval_data: {held_out}
"""
USUAL = {"base": "base", "out": "out", "peft": "{r: 2}", "data": "data.jsonl", "held_out": "data.jsonl"}
FILES = ("base/config.json", "data.jsonl", "saved/alice/adapter_config.json", "nest/bob/held-out.jsonl", "alice/train.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def jobs_of(folder: Path, **changed: str) -> Jobs:
    (folder / "jobs.yaml").write_text(JOBS.format_map(USUAL | changed))
    return load_jobs(folder / "jobs.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"out": ".", "data": "alice/train.jsonl"},
            r"jobs\.yaml:4: task 'alice': .*alice' holds tasks\.alice\.data '.*train\.jsonl'",
        ),
        (
            {"out": "nest", "held_out": "nest/bob/held-out.jsonl"},
            r"jobs\.yaml:7: task 'bob': .*bob' holds tasks\.bob\.eval_data '.*held-out",
        ),
        (
            {"out": "saved", "peft": "saved/alice"},
            r"jobs\.yaml:4: task 'alice': .*saved/alice' is tasks\.alice\.peft '.*saved/alice'",
        ),
        ({"out": "link", "peft": "saved/alice"}, r"link/alice' is tasks\.alice\.peft '.*saved/alice'"),
    ],
)
def test_an_adapter_is_not_saved_over_what_the_run_reads(folder: Path, changed: dict[str, str], message: str) -> None:
    (folder / "link").symlink_to("saved")
    with pytest.raises(ValueError, match=message):
        check_adapters(jobs_of(folder, **changed))


def test_an_adapter_is_not_saved_over_files_of_others(folder: Path) -> None:
    where = re.escape(f"{folder / 'jobs.yaml'}:4: task 'alice': output_dir '{folder}': ")
    with pytest.raises(ValueError, match=where + r".*alice: holds 'train\.jsonl', which muxcompile has not written"):
        check_adapters(jobs_of(folder, out="."))


def test_an_adapter_is_saved_over_an_earlier_one_that_the_run_does_not_read(folder: Path) -> None:
    check_adapters(jobs_of(folder))
    check_adapters(jobs_of(folder, out="saved"))


@pytest.mark.parametrize("changed", [{"out": "base"}, {"out": "saved/alice", "peft": "saved/alice"}])
def test_an_adapter_may_be_saved_within_a_folder_that_the_run_reads(folder: Path, changed: dict[str, str]) -> None:
    check_adapters(jobs_of(folder, **changed))


def test_a_folder_by_a_checkpoints_name_with_somebodys_files_is_refused(folder: Path) -> None:
    (folder / "out/checkpoint-4").mkdir(parents=True)
    check_adapters(jobs_of(folder))
    (folder / "out/checkpoint-4/notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"output_dir .*checkpoint-4: holds 'notes\.txt'"):
        check_adapters(jobs_of(folder))
