"""jobs.yaml becomes Jobs, or one line that says where and why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from muxcompile.base import BaseSpec, limits, load_base, load_model, load_tokenizer
from muxcompile.jobs import load_jobs, placing
from muxcompile.options import Options

GOOD = """\
base: base
seed: 7
options: {chunk_tokens: 64}
tasks:
  alice:
    peft: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
    data: alice.jsonl
    train:
      per_device_train_batch_size: 2
      learning_rate: 1e-3
      lr_scheduler_type: cosine
      optim: adamw_torch
      adam_beta2: 0.95
      adam_epsilon: 1e-6
      max_steps: 5
  bob:
    peft:
      peft_type: ia3
      target_modules: [k_proj, v_proj, down_proj]
      feedforward_modules: [down_proj]
    data: alice.jsonl
    eval_fraction: 0.5
    train: {batch_size: 3, seed: 1, too_long: drop, betas: [0.8, 0.9]}
"""


@pytest.fixture
def jobs_file(tmp_path: Path) -> Path:
    (tmp_path / "alice.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "base").mkdir()
    path = tmp_path / "jobs.yaml"
    path.write_text(GOOD)
    return path


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    return path


def test_a_jobs_file_says_what_it_says(jobs_file: Path) -> None:
    jobs = load_jobs(jobs_file)
    assert jobs.base.path == str(jobs_file.parent / "base")
    assert jobs.base.gguf_file is None
    assert jobs.output_dir == jobs_file.parent / "outputs"
    assert jobs.options == Options(chunk_tokens=64)
    alice, bob = jobs.jobs["alice"], jobs.jobs["bob"]
    assert (alice.adapter.r, alice.adapter.lora_alpha, alice.adapter.target_modules) == (4, 8, {"q_proj", "v_proj"})
    assert str(alice.adapter.task_type.value) == "CAUSAL_LM"
    assert type(bob.adapter).__name__ == "IA3Config"
    task = alice.task(alice.loop.max_steps)
    assert (task.batch_size, task.learning_rate, task.lr_schedule, task.optimizer) == (2, 1e-3, "cosine", "adamw")
    assert (task.betas, task.eps, task.total_steps, task.seed) == ((0.9, 0.95), 1e-6, 5, 7)
    assert bob.task().seed == 1
    assert bob.task().betas == (0.8, 0.9)
    assert bob.loop.too_long == "drop"
    assert bob.eval_fraction == 0.5
    assert bob.loop.max_steps is None
    assert bob.loop.num_train_epochs == 3


def test_options_of_the_planner_are_read(jobs_file: Path) -> None:
    text = "fairness: {bob: 2.5, alice: 1}, groups: [[bob], [alice]], memory_cap: 80e9, objective: energy"
    options = load_jobs(edited(jobs_file, "chunk_tokens: 64", f"{text}, gradient_checkpointing: null")).options
    assert options == Options(
        fairness={"bob": 2.5, "alice": 1}, groups=(("bob",), ("alice",)), memory_cap=80_000_000_000, objective="energy"
    )
    assert options.gradient_checkpointing is None
    assert load_jobs(jobs_file, overrides=["options.fairness=proportional"]).options.fairness == "proportional"


def test_overrides_win_and_reach_names_with_dots(jobs_file: Path, tmp_path: Path) -> None:
    edited(jobs_file, "  bob:", "  v1.5:")
    changes = [
        "tasks.v1.5.train.learning_rate=2e-3",
        "tasks.alice.peft.target_modules=all-linear",
        "options.regions=eager",
        "seed=3",
    ]
    jobs = load_jobs(jobs_file, overrides=changes, output_dir=tmp_path / "there")
    assert jobs.jobs["v1.5"].task().learning_rate == 2e-3
    assert jobs.jobs["alice"].adapter.target_modules == "all-linear"
    assert jobs.options == Options(chunk_tokens=64, regions="eager")
    assert jobs.seed == 3
    assert jobs.output_dir == tmp_path / "there"


def test_task_names_are_the_text_of_the_file_whatever_yaml_thinks(jobs_file: Path) -> None:
    assert list(load_jobs(edited(edited(jobs_file, "  alice:", "  no:"), "  bob:", "  12:")).jobs) == ["no", "12"]


def test_anchors_and_merges_share_settings_between_tasks(jobs_file: Path) -> None:
    edited(jobs_file, "    train:\n", "    train: &shared\n")
    jobs = load_jobs(
        edited(jobs_file, "{batch_size: 3, seed: 1, too_long: drop, betas: [0.8, 0.9]}", "{<<: *shared, max_steps: 9}")
    )
    assert jobs.jobs["bob"].task(9).learning_rate == 1e-3
    assert jobs.jobs["bob"].loop.max_steps == 9


def test_a_saved_adapter_is_named_by_its_folder(jobs_file: Path) -> None:
    saved = jobs_file.parent / "saved"
    saved.mkdir()
    (saved / "adapter_config.json").write_text("{}")
    jobs = load_jobs(edited(jobs_file, "{r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}", "saved"))
    assert jobs.jobs["alice"].adapter == str(saved)


@pytest.mark.parametrize(
    ("old", "new", "line", "why"),
    [
        ("base: base", "base: [", 3, "malformed YAML: while parsing a flow sequence from line 1: "),
        ("base: base", "bass: base", 1, "unknown key 'bass' in the file; did you mean 'base'"),
        ("base: base\n", "", 1, "base is missing"),
        ("base: base", "base: {gguf_file: x}", 1, "base needs a path"),
        ("base: base", "base: {path: base, dtype: int8}", 1, "base.dtype must be auto or one of float32"),
        ("seed: 7", "seed: -1", 2, "seed must be an integer of at least 0, not -1"),
        ("chunk_tokens", "chunk_token", 3, "unknown key 'chunk_token' in options; did you mean 'chunk_tokens'"),
        ("chunk_tokens: 64", "chunk_tokens: lots", 3, "Options: chunk_tokens='lots' must be a positive integer"),
        (
            "{chunk_tokens: 64}",
            "\n  chunk_tokens: 64\n  objective: money",
            5,
            "Options: objective='money' must be one of time, energy",
        ),
        ("chunk_tokens: 64", "memory_cap: 80GB", 3, "Options: memory_cap='80GB' must be a positive number of bytes"),
        (
            "chunk_tokens: 64",
            "fairness: fair",
            3,
            "Options: fairness='fair' must be one of equal, proportional, or weights by task",
        ),
        ("chunk_tokens: 64", "fairness: {alice: 1, bob: 0}", 3, "Options: fairness=0 for task 'bob' must be a number above 0"),
        ("chunk_tokens: 64", "fairness: {alice: 1}", 3, "Options: fairness has no weight for task 'bob'"),
        (
            "{chunk_tokens: 64}",
            "\n  fairness:\n    alice: 1\n    bob: 1\n    zoe: 2",
            4,
            "Options: fairness names 'zoe', which is no task",
        ),
        ("chunk_tokens: 64", "groups: [[alice, zoe]]", 3, "Options: groups names 'zoe', which is no task"),
        ("chunk_tokens: 64", "groups: [[alice], [alice]]", 3, "Options: groups names 'alice' twice"),
        ("chunk_tokens: 64", "mesh: 2", 3, "Options: mesh=2 must be text as"),
        ("chunk_tokens: 64", "mesh: [dp]", 3, r"Options: mesh=\('dp',\) must be text as"),
        ("{chunk_tokens: 64}", "\n  chunk_tokens: 64\n  mesh: xx=2", 5, "Options: mesh 'xx=2': 'xx=2' is not dp=N"),
        ("chunk_tokens: 64", "skip_passes: fuse", 3, "Options: skip_passes='fuse' must be a tuple of names"),
        ("chunk_tokens: 64", "groups: alice", 3, "Options: groups='alice' must be a tuple of tuples of task names"),
        (
            "chunk_tokens: 64",
            "gradient_checkpointing: maybe",
            3,
            "Options: gradient_checkpointing='maybe' must be True, False or None",
        ),
        ("  bob:", "  alice:", 16, r"key 'alice' is repeated in tasks \(first at .*jobs.yaml:5\)"),
        ("  bob:", "  Alice:", 16, r"task 'Alice' is named twice \(first at .*jobs.yaml:5; case does not tell names apart\)"),
        ("  bob:", "  b/c:", 16, "task name 'b/c' cannot be used as a folder name"),
        ("    peft: {r: 4", "    peftt: {r: 4", 6, "unknown key 'peftt' in tasks.alice; did you mean 'peft'"),
        ("{r: 4,", "{rank: 4,", 6, "unknown key 'rank' in tasks.alice.peft"),
        ("lora_alpha", "lora_alhpa", 6, "unknown key 'lora_alhpa' in tasks.alice.peft; did you mean 'lora_alpha'"),
        (
            "{r: 4,",
            "{peft_type: LORRA, r: 4,",
            6,
            "tasks.alice.peft.peft_type 'LORRA' is no peft_type that is known; did you mean 'LORA'",
        ),
        (
            "{r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}",
            "nowhere",
            6,
            "tasks.alice.peft '.*nowhere' holds no saved adapter",
        ),
        ("feedforward_modules: [down_proj]", "feedforward_modules: [up_proj]", 17, "tasks.bob.peft is refused by PEFT: "),
        ("    data: alice.jsonl\n", "", 5, "tasks.alice data is missing"),
        ("data: alice.jsonl", "data: alcie.jsonl", 7, "tasks.alice.data '.*alcie.jsonl' is not a file"),
        ("data: alice.jsonl", "data: [a]", 7, "tasks.alice.data must be a non-empty string, not a list"),
        ("eval_fraction: 0.5", "eval_fraction: 1", 22, "tasks.bob.eval_fraction must be above 0 and below 1, not 1"),
        (
            "eval_fraction: 0.5",
            "eval_fraction: 0.5\n    eval_data: alice.jsonl",
            22,
            "tasks.bob.eval_fraction and eval_data are both given",
        ),
        ("learning_rate", "lerning_rate", 10, "unknown key 'lerning_rate' in tasks.alice.train; did you mean 'learning_rate'"),
        ("learning_rate: 1e-3", "learning_rate: fast", 10, "task 'alice': learning_rate='fast' must be a finite number"),
        ("per_device_train_batch_size: 2", "per_device_train_batch_size: 0", 9, "task 'alice': batch_size=0 must be an integer"),
        ("max_steps: 5", "warmup_steps: few", 15, "task 'alice': warmup_steps='few' must be an integer"),
        ("max_steps: 5", "warmup_steps: -1", 15, "task 'alice': warmup_steps=-1 must be an integer"),
        (
            "      learning_rate: 1e-3",
            "      total_steps: 2\n      warmup_steps: 3",
            11,
            "task 'alice': warmup_steps=3 must not exceed",
        ),
        ("max_steps: 5", "max_steps: 0", 15, "tasks.alice.train.max_steps must be an integer of at least 1, not 0"),
        ("max_steps: 5", "save_total_limit: 0", 15, "tasks.alice.train.save_total_limit must be an integer of at least 1, not 0"),
        ("max_steps: 5", "save_total_limit: all", 15, "tasks.alice.train.save_total_limit must be an integer of at least 1"),
        ("max_steps: 5", "batch_size: 4", 15, "tasks.alice.train.batch_size and per_device_train_batch_size mean the same"),
        ("cosine", "cosin", 11, "tasks.alice.train.lr_scheduler_type must be one of constant, .*, not 'cosin'"),
        ("cosine", "[cosine]", 11, "tasks.alice.train.lr_scheduler_type must be one of constant, .*, not a list"),
        ("adamw_torch", "[sgd]", 12, "tasks.alice.train.optim must be one of adamw_torch, .*, not a list"),
        ("adamw_torch", "lion", 12, "tasks.alice.train.optim must be one of adamw_torch, .*, not 'lion'"),
        ("too_long: drop", "too_long: cut", 23, "tasks.bob.train.too_long must be one of error, drop, not 'cut'"),
        ("betas: [0.8, 0.9]", "betas: 3", 23, "tasks.bob.train.betas must be a list of two numbers, not 3"),
        ("    train: {batch", "    train: &x {y: *x, batch", 23, "malformed YAML: an alias refers to a value that contains it"),
    ],
)
def test_a_bad_key_is_one_message_with_file_line_and_key(jobs_file: Path, old: str, new: str, line: int, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(jobs_file))}:{line}: {why}") as caught:
        load_jobs(edited(jobs_file, old, new))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("task 'alice': target_modules names 'q_porj', which the backbone does not have", 9),
        ("task 'alice': r=300 at 'model.layers.0' is outside 1..256", 8),
        ("task 'alice': lora_alpha='x' must be a number", 7),
        ("task 'alice': max_length=300 and 4 virtual tokens are more than the backbone's limit of 256", 11),
        ("task 'alice': needs 1,000 bytes even alone in the smallest chunk; the cap is 10", 3),
        ("memory: 2 tasks need 1,000 bytes, cap 10", 3),
        ("Options: skip_passes names 'fuze', not an optional pass", 4),
        ("Options: chunk_tokens=64 would cut sequences", 2),
        ("backbone LlamaForCausalLM: its attention is not causal", 1),
    ],
)
def test_what_the_compiler_refuses_says_where_it_stands(tmp_path: Path, complaint: str, line: int) -> None:
    (tmp_path / "a.jsonl").write_text("")
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "base: base\noptions:\n  memory_cap: 10\n  skip_passes: [fuze]\ntasks:\n  alice:\n    peft:\n      r: 300\n"
        "      target_modules: [q_porj]\n    data: a.jsonl\n    train: {max_length: 300}\n"
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line}: {re.escape(complaint)}$"), placing(load_jobs(path)):
        raise ValueError(complaint)


def test_what_names_no_place_of_a_jobs_file_is_left_as_it_is(jobs_file: Path) -> None:
    for complaint in (f"{jobs_file}:3: alice", "mesh dp=2: takes 2 processes", "task 'zoe': r=3"):
        with pytest.raises(ValueError, match=rf"^{re.escape(complaint)}$"), placing(load_jobs(jobs_file)):
            raise ValueError(complaint)


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("tasks.alcie.train.learning_rate=1", "there is no task 'alcie'; did you mean 'alice'"),
        ("tasks.alice.train.learning_rat=1", "unknown key 'learning_rat' in tasks.alice.train; did you mean 'learning_rate'"),
        ("learning_rate", "must look like"),
        ("seed.x=1", "seed is not a mapping"),
        ("seed=[1", "malformed YAML"),
    ],
)
def test_a_bad_override_is_quoted(jobs_file: Path, assignment: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^override {re.escape(assignment)}: {why}"):
        load_jobs(jobs_file, overrides=[assignment])


@pytest.mark.parametrize(
    ("content", "why"),
    [("", ":1: holds no YAML"), ("base: b\ntasks: {}\n", ":2: tasks is empty"), ("- 1\n", ":1: must be a mapping, not a list")],
)
def test_a_file_without_jobs_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + why):
        load_jobs(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"jobs\.yaml: cannot be read: No such file"):
        load_jobs(tmp_path / "jobs.yaml")


def test_a_base_is_loaded_frozen_and_in_the_asked_dtype(base_folder: Path) -> None:
    import torch

    model, tokenizer = load_base(BaseSpec(str(base_folder), dtype="bf16", device="cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert limits(model) == (320, 64)
    assert tokenizer("hello")["input_ids"]


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"])
def test_how_long_a_sequence_may_be_has_several_names(base_folder: Path, name: str) -> None:
    from types import SimpleNamespace

    model, _ = load_base(BaseSpec(str(base_folder), device="cpu"))
    model.config = SimpleNamespace(**{name: 48})
    assert limits(model) == (320, 48)


def test_a_base_without_tokenizer_has_none(base_folder: Path) -> None:
    for path in base_folder.glob("*token*"):
        path.unlink()
    assert load_tokenizer(BaseSpec(str(base_folder))) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"path": "nowhere/at/all"}, "base 'nowhere/at/all' is not a folder"),
        ({"path": "some-owner/some-model"}, "base 'some-owner/some-model' cannot be loaded: "),
        ({"gguf_file": "x.gguf"}, "is no model folder: it has no x.gguf"),
        ({"device": "tpu"}, "base device 'tpu' must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "base device 'cuda:99' is not there"),
        ({"dtype": "int3"}, "base dtype 'int3' must be auto or one of float32"),
    ],
)
def test_a_base_that_cannot_be_loaded_says_why_in_one_line(base_folder: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=rf"^jobs.yaml:1: .*{why}") as caught:
        load_model(BaseSpec(**{"path": str(base_folder), "where": "jobs.yaml:1", **change}))
    assert "\n" not in str(caught.value)
