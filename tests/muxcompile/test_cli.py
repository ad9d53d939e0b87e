"""The command line: what it prints, what it exits with, and that a fault in the input leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors import SafetensorError
from typer.models import OptionInfo

from muxcompile.cli import _shape, app, environment, run_command
from passes.cost import cost_model
from passes.measure import measure

JOBS = """\
base: base
output_dir: out
tasks:
  alice:
    peft: {r: 2, target_modules: [q_proj, v_proj]}
    data: alice.jsonl
    eval_fraction: 0.25
    train: {batch_size: 2, max_steps: 3, learning_rate: 1e-2, save_steps: 2}
  bob:
    peft: {r: 3, lora_alpha: 6, target_modules: all-linear}
    data: bob.jsonl
    train: {batch_size: 3, num_train_epochs: 1, lr_scheduler_type: linear}
"""


def run(*arguments: str | Path) -> int:
    return run_command(app, "muxcompile", [str(argument) for argument in arguments])


@pytest.fixture
def jobs_file(tmp_path: Path, base_folder: Path, write_jsonl: Callable[[str, list[Any]], Path]) -> Path:
    write_jsonl("alice.jsonl", [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(8)])
    write_jsonl(
        "bob.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * i}]} for i in range(5)],
    )
    path = tmp_path / "jobs.yaml"
    path.write_text(JOBS)
    return path


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_help_is_quick_because_it_loads_no_framework() -> None:
    program = (
        "import sys, muxcompile.cli as cli; code = cli.run_command(cli.app, 'muxcompile', ['--help']);"
        " sys.exit(code or ', '.join({'torch', 'transformers', 'peft'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("train", "plan", "env"))


def test_python_m_muxcompile_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "muxcompile", "nonsense"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "muxcompile: No such command 'nonsense'.\n")


def test_env_names_versions_device_and_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == environment()
    assert {"torch", "triton", "transformers", "peft", "device", "c++ compiler"} <= set(facts)
    assert run("env") == 0
    assert "transformers" in capsys.readouterr().out


def bad_yaml(path: Path) -> str:
    path.write_text("base: base\ntasks:\n  alice: {peft: [\n")
    return "jobs.yaml:4: malformed YAML: "


def unknown_key(path: Path) -> str:
    path.write_text(JOBS.replace("learning_rate", "lerning_rate"))
    return "jobs.yaml:8: unknown key 'lerning_rate' in tasks.alice.train; did you mean 'learning_rate'?"


def same_name_twice(path: Path) -> str:
    path.write_text(JOBS.replace("  bob:", "  alice:"))
    return "jobs.yaml:9: key 'alice' is repeated in tasks"


def bad_json(path: Path) -> str:
    (path.parent / "bob.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return "bob.jsonl:2: malformed JSON: "


def empty_data(path: Path) -> str:
    (path.parent / "bob.jsonl").write_text("\n")
    return "bob.jsonl:1: holds no examples"


def outside_vocabulary(path: Path) -> str:
    (path.parent / "bob.jsonl").write_text('{"input_ids": [1, 5000], "labels": [1, 2]}\n')
    return "bob.jsonl:1: input_ids[1]=5000 is outside the vocabulary of 320 (task 'bob')"


def too_long(path: Path) -> str:
    (path.parent / "bob.jsonl").write_text(json.dumps({"input_ids": [1] * 65, "labels": [1] * 65}) + "\n")
    return "bob.jsonl:1: input_ids is 65 tokens long, over the model's limit of 64"


def no_base(path: Path) -> str:
    path.write_text(JOBS.replace("base: base", "base: ./elsewhere"))
    return "jobs.yaml:1: base "


def nothing_left_to_train_on(path: Path) -> str:
    path.write_text(JOBS.replace("eval_fraction: 0.25", "eval_fraction: 0.99"))
    return "jobs.yaml:4: tasks.alice.eval_fraction=0.99 of 8 examples leaves none to train on"


def unknown_module(path: Path) -> str:
    path.write_text(JOBS.replace("[q_proj, v_proj]", "[q_prj]"))
    return "jobs.yaml:5: task 'alice': target_modules names 'q_prj'"


def output_is_a_file(path: Path) -> str:
    path.write_text(JOBS.replace("output_dir: out", "output_dir: alice.jsonl"))
    return "output_dir "


def data_in_an_adapters_folder(path: Path) -> str:
    (path.parent / "bob").mkdir()
    (path.parent / "bob.jsonl").rename(path.parent / "bob" / "train.jsonl")
    path.write_text(JOBS.replace("bob.jsonl", "bob/train.jsonl").replace("output_dir: out", "output_dir: ."))
    return "jobs.yaml:9: task 'bob': output_dir "


def too_small_a_cap(path: Path) -> str:
    path.write_text(JOBS.replace("tasks:\n", "options: {memory_cap: 1000}\ntasks:\n"))
    return "jobs.yaml:3: task 'alice': needs "


def a_pass_that_is_none(path: Path) -> str:
    path.write_text(JOBS.replace("tasks:\n", "options:\n  skip_passes: [fuze]\ntasks:\n"))
    return "jobs.yaml:4: Options: skip_passes names 'fuze', not an optional pass"


def a_weight_of_nobody(path: Path) -> str:
    path.write_text(JOBS.replace("tasks:\n", "options: {fairness: {alice: 1, bob: 1, zoe: 1}}\ntasks:\n"))
    return "jobs.yaml:3: Options: fairness names 'zoe', which is no task (tasks: alice, bob)"


FAULTS = [
    bad_yaml, unknown_key, same_name_twice, bad_json, empty_data, outside_vocabulary, too_long, no_base, nothing_left_to_train_on,
    unknown_module, output_is_a_file, data_in_an_adapters_folder, too_small_a_cap, a_pass_that_is_none, a_weight_of_nobody,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_input_is_one_line_and_exit_code_2_and_nothing_is_written(
    jobs_file: Path, fault: Callable[[Path], str], capfd: pytest.CaptureFixture[str]
) -> None:
    message = fault(jobs_file)
    before = files(jobs_file.parent)
    assert run("train", jobs_file) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("muxcompile: ")
    assert message in lines[0]
    assert files(jobs_file.parent) == before


def test_no_option_takes_its_name_from_what_stands_for_its_value() -> None:
    """Some releases of Typer make `--MESH` of an option `mesh` that is shown with the value MESH, if its name is not said."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            for own in getattr(hint, "__metadata__", ()):
                if isinstance(own, OptionInfo) and (own.metavar or "").casefold() == name.casefold():
                    assert f"--{name}" in (own.default, *(own.param_decls or ())), f"{command.callback.__name__}: {name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument 'JOBS.YAML'."),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["train", "nowhere.yaml", "--outputdir", "x"], "No such option: --outputdir"),
        (["plan", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"muxcompile: {message}")
    assert err.count("\n") == 1


def test_a_fault_of_our_own_is_exit_code_1_and_its_traceback_waits_for_v(
    jobs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AssertionError("a region without a template")

    monkeypatch.setattr("muxcompile.jobs.load_jobs", broken)
    assert run("train", jobs_file) == 1
    assert capsys.readouterr().err == "muxcompile: AssertionError: a region without a template (-v prints the traceback)\n"
    assert run("train", "-v", jobs_file) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_exit_code_130(
    jobs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("muxcompile.jobs.load_jobs", interrupted)
    assert run("train", jobs_file) == 130
    assert capsys.readouterr().err == "muxcompile: interrupted\n"


def test_train_writes_adapters_metrics_and_checkpoints_and_says_so(jobs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", jobs_file, "tasks.alice.train.learning_rate=2e-2") == 0
    out, printed = jobs_file.parent / "out", capsys.readouterr().out
    assert all((out / name / "adapter_model.safetensors").is_file() for name in ("alice", "bob"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["task"] == "alice" and "loss" in row] == [1, 2, 3]
    assert {row["learning_rate"] for row in rows if row["task"] == "alice" and "loss" in row} == {2e-2}
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert "step 3/3" in printed
    assert "held-out loss" in printed
    assert "adapters in" in printed
    assert run("train", jobs_file) == 2
    assert run("train", jobs_file, "--resume") == 0


FULL = {
    "out/checkpoint-1": ("runtime.checkpoint.save_file", SafetensorError("I/O error: No space left on device")),
    "out/metrics.jsonl": ("os.fsync", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("path", FULL)
def test_a_full_disk_is_one_line_that_names_the_path(
    jobs_file: Path, path: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    writer, error = FULL[path]

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(writer, full)
    assert run("train", jobs_file, "tasks.bob.train.save_steps=1") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{jobs_file.parent / path}: cannot be written: " in line
    assert "No space left on device" in line


def test_a_run_resumed_from_a_checkpoint_saves_the_same_bits(jobs_file: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run("train", jobs_file, "--output-dir", whole) == 0
    assert run("train", jobs_file, "--output-dir", part, "tasks.alice.train.max_steps=2", "tasks.bob.train.max_steps=2",
               "tasks.bob.train.total_steps=2") == 0  # fmt: skip
    assert run("train", jobs_file, "--output-dir", part, "--resume", "tasks.bob.train.max_steps=2") == 0
    for name in ("alice", "bob"):
        assert (part / name / "adapter_model.safetensors").read_bytes() == (whole / name / "adapter_model.safetensors").read_bytes()


def test_plan_prints_text_or_json_and_saves_both(jobs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", jobs_file, "--save", tmp_path / "plan") == 0
    assert "alice" in capsys.readouterr().out
    assert (tmp_path / "plan" / "plan.json").is_file()
    assert run("plan", jobs_file, "--json") == 0
    assert json.loads(capsys.readouterr().out)
    assert not (jobs_file.parent / "out").exists()


def test_plan_refuses_what_does_not_fit_before_it_compiles(
    jobs_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muxcompile.driver.Compiler.build", None)  # calling it would be a fault of another kind
    assert run("plan", jobs_file, "--save", jobs_file) == 2
    assert capsys.readouterr().err == f"muxcompile: plan: --save {jobs_file} is no folder\n"
    assert run("plan", jobs_file, "options.memory_cap=1000") == 2
    line = capsys.readouterr().err
    assert re.search(
        r"task 'alice': needs [\d,]+ bytes even alone in the smallest chunk \(.* in flight\); the cap is 1,000\n$", line
    )


def test_plan_holds_its_figures_against_a_step_and_an_exact_solver(jobs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", jobs_file, "--check", "--exact", "options.memory_cap=1e9", "options.groups=[[alice],[bob]]") == 0
    out = capsys.readouterr().out
    assert re.search(r"room for more tasks: alice: \d+, bob: \d+\n", out)
    assert re.search(r"exact\n  cost of a round: the plan [\d.e-]+ s, the best that HiGHS found .* a gap of \d", out)
    assert out.count("predicted and measured on cpu") == 2, "one for each group"
    assert re.search(r"step of 1 chunks +[\d.]+ ms +[\d.]+ ms", out)


def test_plan_calibrated_goes_by_its_own_measurements(
    jobs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for reader in (cost_model, measure):
        assert reader.__kwdefaults__ is not None
        monkeypatch.setitem(reader.__kwdefaults__, "folder", tmp_path / "regions")
    assert run("plan", jobs_file, "--calibrate", "--check", "--exact", "--json", "options.chunk_tokens=64") == 0
    found = json.loads(capsys.readouterr().out)
    (table,) = json.loads((tmp_path / "regions" / "cpu.json").read_text())["tables"].values()
    assert {row["tokens"] for row in table} == {32, 64, 128}
    sources = {row["source"] for row in found["check"][0]["regions"] if not row["name"].startswith("head")}
    assert sources == {"measured at 32, 64, 128 tokens"}
    assert found["exact"]["plan"] >= found["exact"]["bound"] * (1 - 1e-6)
    assert not (jobs_file.parent / "out").exists()


def test_an_exact_plan_without_scipy_names_the_extra(
    jobs_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("plan", jobs_file, "--exact") == 2
    assert capsys.readouterr().err == "muxcompile: plan: --exact needs scipy: pip install 'muxcompile[exact]'\n"


def test_turns_of_unequal_length_train_as_planned(jobs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The light task steps in every round of a period, the heavy one in one."""
    heavy = "".join(json.dumps({"input_ids": [1 + i] * 60, "labels": [1 + i] * 60}) + "\n" for i in range(8))
    (jobs_file.parent / "bob.jsonl").write_text(heavy)
    settings = ("options.fairness=proportional", "tasks.alice.train.max_steps=8", "tasks.bob.train.batch_size=8",
                "tasks.bob.train.max_steps=2", "tasks.bob.train.max_length=60")  # fmt: skip
    assert run("train", jobs_file, *settings) == 0
    rows = [json.loads(line) for line in (jobs_file.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    order = [(row["task"], row["step"]) for row in rows if "loss" in row]
    assert [step for task, step in order if task == "alice"] == list(range(1, 9))
    assert [step for task, step in order if task == "bob"] == [1, 2]
    assert order.index(("bob", 2)) > order.index(("alice", 4)), "several steps of alice go by between two of bob"
    rates = [row["learning_rate"] for row in rows if row["task"] == "bob" and "loss" in row]
    assert rates[1] == pytest.approx(rates[0] / 2), "half of its own steps are done"
    assert "8 steps in" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, "muxcompile", ["bench", "--calibrate"]) == 2
    assert "bench: there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["4096", "4096x", "axb", "8x8", "4096x100x1", "40x-16"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be INxOUT, two multiples of 16"):
        _shape(text)
