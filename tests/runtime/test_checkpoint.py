"""A checkpoint's folder appears whole or not at all, and training goes on from it as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from passes.task import check_name
from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.state import State, Training
from runtime.tables import Param, Table

CPU = torch.device("cpu")
KEYS = ("site.lora_A.weight", "site.lora_B.weight")
ADAMW = Training(learning_rate=0.1, weight_decay=0.1, lr_schedule="linear", total_steps=9, seed=4)
SGD = Training(optimizer="sgd", learning_rate=0.1, momentum=0.9)


def state_of(training: dict[str, Training], *, ranks: dict[str, int] | None = None) -> State:
    rows = tuple(training)
    tables = {name: Table(name, (len(rows), 8, width), rows, True, "r") for name, width in (("A", 6), ("B", 10))}
    params = []
    for row, task in enumerate(rows):
        rank = (ranks or {}).get(task, 3)
        params += [
            Param(task, KEYS[0], "A", row, 0, rank, False, bound=0.5),
            Param(task, KEYS[1], "B", row, 0, rank, True, bound=0.5),
        ]
    return State(tables, params, training, CPU)


def train(state: State, steps: int, first: int = 0, tasks: list[str] | None = None) -> None:
    for step in range(first, first + steps):
        for task in tasks or list(state.tasks):
            generator = torch.Generator().manual_seed(step)
            for gradient in state.tasks[task].gradients:
                gradient += torch.randn(gradient.shape, generator=generator)
            state.tasks[task].pending = 2
            state.step(task)


def everything(state: State, task: str) -> dict[str, Tensor]:
    own = state.tasks[task]
    found = {key: state.read(task, key) for key in own.keys}
    for key, view in zip(own.keys, own.views, strict=True):
        found |= {f"{name} {key}": value.clone() for name, value in own.optimizer.state[view].items()}
    return found | {"counters": torch.tensor((own.steps, own.examples, int(own.alive)))}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- round trips --------------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    training = {"alice": ADAMW, "b ob": SGD}
    state = state_of(training)
    train(state, 3)
    train(state, 1, first=3, tasks=["alice"])  # tasks stand at different steps
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 512))
    train(state, 2, first=10)

    fresh = state_of(training)
    restore = read_checkpoint(tmp_path / "at", fresh)
    assert set(restore.chunk_tokens.values()) == {512}
    restore.apply()
    assert (fresh.tasks["alice"].steps, fresh.tasks["b ob"].steps) == (4, 3)
    assert (fresh.tasks["alice"].examples, fresh.tasks["b ob"].examples) == (8, 6)
    train(fresh, 2, first=10)
    for task in training:
        assert same(everything(fresh, task), everything(state, task))


def test_a_checkpoint_before_the_first_step_is_one_too(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    fresh = state_of({"alice": ADAMW})
    train(fresh, 2)
    read_checkpoint(tmp_path / "at", fresh).apply()
    train(fresh, 2)
    train(state, 2)
    assert same(everything(fresh, "alice"), everything(state, "alice"))


def test_reading_changes_nothing_until_it_is_applied(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    train(state, 2)
    before = everything(state, "alice")
    restore = read_checkpoint(tmp_path / "at", state)
    assert same(everything(state, "alice"), before)
    restore.apply()
    assert state.tasks["alice"].steps == 0


def test_applying_drops_gradients_that_were_waiting(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    state.tasks["alice"].gradients[0].fill_(7.0)
    state.tasks["alice"].pending = 3
    state.tasks["alice"].losses.append(torch.tensor(float("nan")))
    read_checkpoint(tmp_path / "at", state).apply()
    assert state.tasks["alice"].pending is None
    assert not any(gradient.any() for gradient in state.tasks["alice"].gradients)
    train(state, 1)
    assert state.poll(["alice"], wait=True) == {}


@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_quarantine_is_saved_and_kept(tmp_path: Path, training: Training, steps: int) -> None:
    state = state_of({"alice": training})
    train(state, steps)
    state.tasks["alice"].gradients[0][0, 0] = float("nan")
    state.tasks["alice"].pending = 1
    state.step("alice")
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))  # waits for the outcome
    fresh = state_of({"alice": training})
    read_checkpoint(tmp_path / "at", fresh).apply()
    assert fresh.tasks["alice"].quarantined == f"step {steps}: loss, gradient or update is not finite; the step was not taken"
    assert fresh.tasks["alice"].steps == steps
    before = fresh.read("alice", KEYS[0])
    train(fresh, 1)
    assert torch.equal(fresh.read("alice", KEYS[0]), before)


def test_a_checkpoint_of_a_healthy_task_ends_a_quarantine(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    train(state, 1)
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    expected = everything(state, "alice")
    state.tasks["alice"].gradients[0][0, 0] = float("nan")
    state.step("alice")
    assert state.poll(["alice"], wait=True)
    read_checkpoint(tmp_path / "at", state).apply()
    assert state.poll(["alice"], wait=True) == {}
    assert same(everything(state, "alice"), expected)
    train(state, 1)
    assert state.tasks["alice"].steps == 2


def test_other_slots_and_a_wider_bucket_read_the_same_checkpoint(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW, "bob": SGD})
    train(state, 2)
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    turned = state_of({"bob": SGD, "alice": ADAMW})
    read_checkpoint(tmp_path / "at", turned).apply()
    for task in ("alice", "bob"):
        assert same(everything(turned, task), everything(state, task))


def test_a_checkpoint_is_json_and_safetensors_under_pefts_keys(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    train(state, 1)
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    assert set(files(tmp_path / "at")) == {"checkpoint.json", "alice/state.safetensors"}
    manifest = json.loads((tmp_path / "at" / "checkpoint.json").read_text())
    assert manifest["format"] == 2
    assert manifest["tasks"]["alice"]["steps"] == 1
    assert manifest["tasks"]["alice"]["training"]["learning_rate"] == 0.1
    tensors = load_file(tmp_path / "at" / "alice" / "state.safetensors")
    assert tensors[f"weight/{KEYS[1]}"].shape == (10, 3)
    assert {f"optimizer/{key}/{name}" for key in KEYS for name in ("step", "exp_avg", "exp_avg_sq")} < set(tensors)


def test_a_second_checkpoint_replaces_the_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "at", state_of({"alice": ADAMW, "bob": SGD}), {"alice": 64, "bob": 64})
    write_checkpoint(tmp_path / "at", state_of({"alice": ADAMW}), {"alice": 64})
    assert set(files(tmp_path / "at")) == {"checkpoint.json", "alice/state.safetensors"}


def test_a_folder_that_holds_somebodys_files_is_no_place_for_a_checkpoint(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    target = tmp_path / "at"
    write_checkpoint(target, state, {"alice": 64})
    (target / "train.json").write_text("{}")  # muxcompile train's own
    write_checkpoint(target, state, {"alice": 64})
    (target / "alice" / "notes.txt").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"at: holds 'alice/notes\.txt', which muxcompile has not written"):
        write_checkpoint(target, state, {"alice": 64})
    assert files(tmp_path) == before


def test_a_checkpoint_goes_where_a_link_leads_and_is_found_there_while_it_is_exchanged(tmp_path: Path) -> None:
    state = state_of({"alice": ADAMW})
    (tmp_path / "real").mkdir()
    (tmp_path / "at").symlink_to("real")
    for steps in (1, 2):
        train(state, 1)
        write_checkpoint(tmp_path / "at", state, {"alice": 64})
        assert json.loads((tmp_path / "real" / "checkpoint.json").read_text())["tasks"]["alice"]["steps"] == steps
    (tmp_path / "real").rename(tmp_path / ".real.old")
    read_checkpoint(tmp_path / "at", state_of({"alice": ADAMW})).apply()


@pytest.mark.parametrize("name", ["checkpoint.json", "a b", "ünï", "100%", ".hidden"])
def test_any_name_that_a_task_may_have_can_be_saved(tmp_path: Path, name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    state = state_of({name: ADAMW})
    train(state, 1)
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    fresh = state_of({name: ADAMW})
    read_checkpoint(tmp_path / "at", fresh).apply()
    assert same(everything(fresh, name), everything(state, name))


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = state_of({"alice": ADAMW, "bob": SGD})
    train(state, 2)
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    return tmp_path / "at"


def refusal(folder: Path, state: State | None = None) -> str:
    state = state or state_of({"alice": ADAMW, "bob": SGD})
    before = {task: everything(state, task) for task in state.tasks}
    with pytest.raises(ValueError, match=r".") as caught:
        read_checkpoint(folder, state)
    assert all(same(everything(state, task), before[task]) for task in before), "a refusal changes nothing"
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    return str(caught.value)


def edit_tensors(folder: Path, task: str, change: Any) -> None:
    path = folder / task / "state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert "holds no checkpoint.json" in refusal(tmp_path)
    assert "holds no checkpoint.json" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 2}', '{"format": 2, "tasks": []}'])
def test_a_manifest_that_is_none_is_refused_by_its_path(saved: Path, text: str) -> None:
    (saved / "checkpoint.json").write_text(text)
    assert "checkpoint.json" in refusal(saved)


def test_the_line_of_a_broken_manifest_is_named(saved: Path) -> None:
    (saved / "checkpoint.json").write_text('{\n "format": 2,\n oops\n}')
    assert "checkpoint.json:3: " in refusal(saved)


def test_another_set_of_tasks_is_refused_by_name(saved: Path) -> None:
    assert "has no task 'carol'" in refusal(saved, state_of({"alice": ADAMW, "bob": SGD, "carol": ADAMW}))
    assert "has a task 'bob' that this model does not have" in refusal(saved, state_of({"alice": ADAMW}))


def test_another_optimizer_is_refused(saved: Path) -> None:
    assert "task 'alice' was trained with optimizer='adamw', not 'sgd'" in refusal(saved, state_of({"alice": SGD, "bob": SGD}))


def test_another_rank_is_refused_by_tensor_and_shapes(saved: Path) -> None:
    message = refusal(saved, state_of({"alice": ADAMW, "bob": SGD}, ranks={"bob": 4}))
    assert "task 'bob'" in message
    assert "needs shape (4, 6), found shape (3, 6)" in message


def test_a_missing_file_is_refused_by_its_path(saved: Path) -> None:
    (saved / "bob" / "state.safetensors").unlink()
    assert "bob/state.safetensors: is missing" in refusal(saved)


def test_a_torn_file_is_refused_by_its_path(saved: Path) -> None:
    path = saved / "bob" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    assert "bob/state.safetensors: " in refusal(saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(f"weight/{KEYS[0]}"), KEYS[0]),
        (lambda tensors: tensors.pop(f"optimizer/{KEYS[0]}/exp_avg"), "exp_avg"),
        (lambda tensors: tensors.update({"weight/stranger": torch.zeros(1)}), "weight/stranger"),
        (lambda tensors: tensors.update({f"optimizer/{KEYS[0]}/momentum_buffer": torch.zeros(3, 6)}), "momentum_buffer"),
        (lambda tensors: tensors.update({f"optimizer/{KEYS[0]}/exp_avg": torch.zeros(2, 6)}), "exp_avg"),
        (lambda tensors: tensors[f"weight/{KEYS[0]}"].fill_(float("nan")), KEYS[0]),
        (lambda tensors: tensors[f"optimizer/{KEYS[0]}/exp_avg"].fill_(float("inf")), "exp_avg"),
    ],
    ids=[
        "no weight",
        "no moment",
        "a strange tensor",
        "another optimizer's moment",
        "a moment's shape",
        "a weight's value",
        "a moment's value",
    ],
)
def test_a_tensor_that_is_not_what_it_should_be_is_refused_by_task_and_name(saved: Path, change: Any, named: str) -> None:
    edit_tensors(saved, "alice", change)
    message = refusal(saved)
    assert "task 'alice'" in message
    assert named in message


@pytest.mark.parametrize("field", ["steps", "examples", "training", "quarantined"])
def test_a_task_without_one_of_its_numbers_is_refused(saved: Path, field: str) -> None:
    manifest = json.loads((saved / "checkpoint.json").read_text())
    del manifest["tasks"]["alice"][field]
    (saved / "checkpoint.json").write_text(json.dumps(manifest))
    assert "checkpoint.json" in refusal(saved)


@pytest.mark.parametrize("change", [{"backbone": []}, {"backbone": {"w": 1.0}}, {"adapter": []}])
def test_what_a_checkpoint_says_of_its_tensors_must_be_of_the_right_type(saved: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((saved / "checkpoint.json").read_text())
    (manifest if "backbone" in change else manifest["tasks"]["bob"]).update(change)
    (saved / "checkpoint.json").write_text(json.dumps(manifest))
    assert "checkpoint.json: backbone, or adapter of a task, is of the wrong type" in refusal(saved)


def test_a_folder_that_was_being_exchanged_is_read(saved: Path) -> None:
    # Killed between two renames: the old checkpoint waits under its other name.
    saved.rename(saved.with_name(".at.old"))
    state = state_of({"alice": ADAMW, "bob": SGD})
    read_checkpoint(saved, state).apply()
    assert state.tasks["alice"].steps == 2
