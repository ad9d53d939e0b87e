"""A Task is checked when it is made: what is wrong is refused with the task's name and the field, before anything is touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.task import Task, as_tasks, check_name, is_folder
from runtime.state import Training
from tests.backbones import lora

ADAPTER = object()  # a Task does not look into its adapter


def test_the_defaults_are_those_of_the_public_contract() -> None:
    task = Task("alice", ADAPTER)
    found = {name: getattr(task, name) for name in Task.field_names()}
    assert found == {
        "batch_size": 8,
        "max_length": None,
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "total_steps": None,
        "max_grad_norm": None,
        "loraplus_lr_ratio": None,
        "loss": "cross_entropy",
        "seed": 0,
    }


def test_the_runtime_has_the_same_defaults() -> None:
    task = Task("alice", ADAPTER)
    asked = {"dropout", "virtual_tokens", "position_offset", "fast", "undecayed"}  # the adapter's config says these
    names = set(Training.__dataclass_fields__) - asked
    assert {name: getattr(task, name) for name in names} == {name: getattr(Training(), name) for name in names}
    assert not any(getattr(Training(), name) for name in asked)


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Task("alice", ADAPTER).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("rate", [0, 0.0, 1e-12, 1, 1e6, 3e38, torch.finfo(torch.float32).max])
def test_any_learning_rate_from_zero_up_that_float32_holds_is_accepted(rate: float) -> None:
    assert Task("alice", ADAPTER, learning_rate=rate).learning_rate == rate


WRONG: list[tuple[str, dict[str, Any]]] = [
    *(("batch_size", {"batch_size": value}) for value in (0, -1, True, 2.0, "8", None)),
    *(("max_length", {"max_length": value}) for value in (0, True, 1.5)),
    *(("total_steps", {"total_steps": value}) for value in (0, -3, 1.0)),
    *(("warmup_steps", {"warmup_steps": value}) for value in (-1, True, 0.5, None)),
    *(("seed", {"seed": value}) for value in (-1, True, 1.0, None, "0")),
    *(("learning_rate", {"learning_rate": value}) for value in (-1e-9, math.nan, math.inf, True, "1e-4", None, 10**400)),
    *(("learning_rate", {"learning_rate": value}) for value in (3.5e38, 1e300)),
    ("max_grad_norm", {"max_grad_norm": 1e39}),
    ("loraplus_lr_ratio", {"loraplus_lr_ratio": 16, "learning_rate": 1e38}),
    *((field, {field: value}) for field in ("weight_decay", "momentum", "eps") for value in (-1, math.nan, None)),
    *(("loraplus_lr_ratio", {"loraplus_lr_ratio": value}) for value in (0, -1, math.nan, math.inf, "16", True)),
    *(("max_grad_norm", {"max_grad_norm": value}) for value in (0, -1, math.nan, math.inf, "1")),
    *(("betas", {"betas": value}) for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), ("a", "b"), 0.9, None)),
    ("optimizer", {"optimizer": "adam"}),
    ("lr_schedule", {"lr_schedule": "step"}),
    ("loss", {"loss": "dpo"}),
    ("total_steps", {"lr_schedule": "cosine"}),
    ("total_steps", {"lr_schedule": "linear", "warmup_steps": 5}),
    ("warmup_steps", {"warmup_steps": 11, "total_steps": 10}),
]


@pytest.mark.parametrize(("field", "given"), WRONG, ids=[f"{field}={next(iter(given.values()))!r:.20}" for field, given in WRONG])
def test_a_wrong_field_is_refused_by_task_and_field(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^task 'alice': {field}=") as caught:
        Task("alice", ADAPTER, **given)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^task 'alice': adapter is missing"):
        Task("alice", None)


@pytest.mark.parametrize("name", ["a", "a b", "任务", "a+b", "a.b", "v1.2", "ünï", "100%", "#1", "x" * 100])
def test_a_name_is_free_text(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", None, 1, b"a", ".", "..", "a/b", "a\\b", "a:b", "a\nb", "a\rb", "a\0b", " a", "a\t", "__base__", "x" * 256]
)
def test_a_name_that_no_folder_can_have_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^task name "):
        Task(name, ADAPTER)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "metrics.jsonl.tmp",
        "checkpoint.json",
        "checkpoint-3",
        "train.json",
        "train.json.tmp",
        "Train.json",
        ".a.old",
    ],
)
def test_a_name_of_a_runs_own_files_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^task name .* is '\.', '\.\.', '__base__' or a file of a run"):
        Task(name, ADAPTER)


def test_tasks_come_as_a_dict_a_list_pairs_or_one_task() -> None:
    config = lora("q")
    alice, bob = Task("alice", config), Task("bob", config)
    assert as_tasks({"alice": config, "bob": config}) == [alice, bob]
    assert as_tasks([alice, bob]) == [alice, bob]
    assert as_tasks([("alice", config), bob]) == [alice, bob]
    assert as_tasks(alice) == [alice]
    assert as_tasks({"alice": alice}) == [alice]


def test_a_dict_and_its_task_must_agree_on_the_name() -> None:
    with pytest.raises(ValueError, match=r"^task 'bob': its Task is named 'alice'"):
        as_tasks({"bob": Task("alice", ADAPTER)})


@pytest.mark.parametrize("empty", [{}, [], ()])
def test_no_task_at_all_is_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        as_tasks(empty)


@pytest.mark.parametrize("second", ["alice", "Alice", "ALICE"])
def test_two_tasks_of_one_name_are_refused_whatever_the_case(second: str) -> None:
    with pytest.raises(ValueError, match=f"^task '{second}': name is used twice"):
        as_tasks([("alice", ADAPTER), (second, ADAPTER)])


@pytest.mark.parametrize(
    "tasks",
    [5, None, lora("q"), [lora("q")], [("alice", ADAPTER, 3)], "ab"],
    ids=["int", "None", "config", "list of configs", "triple", "str"],
)
def test_what_holds_no_tasks_is_refused_as_a_users_error(tasks: Any) -> None:
    with pytest.raises(ValueError, match="task"):
        as_tasks(tasks)


def test_a_path_is_a_saved_adapter_and_a_config_is_not() -> None:
    assert is_folder("out/alice")
    assert is_folder(Path("out/alice"))
    assert not is_folder(lora("q"))
