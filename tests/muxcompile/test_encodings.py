"""A compiled model hands encodings through: a task whose tables are encoded trains bit for bit as one whose tables are its own.

The encoder is the identity, written into the graph behind the passes: so the plain model is the reference for everything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import muxcompile
import muxcompile.driver
from passes.graph import MuxGraph, check
from runtime.encoders import ENCODERS
from runtime.tables import Encoding, Input, Place

from .peft_reference import examples, fill, llama

pytestmark = pytest.mark.usefixtures("one_capture")

CHUNK = muxcompile.Options(chunk_tokens=96, reserve_slots=1)
TASKS = {
    "alice": muxcompile.Task("alice", LoraConfig(r=4, target_modules="all-linear"), learning_rate=1e-2),
    "bob": muxcompile.Task("bob", LoraConfig(r=9, target_modules=["q_proj", "v_proj"]), learning_rate=1e-2),
    "carol": muxcompile.Task("carol", LoraConfig(r=4, target_modules=["q_proj"]), optimizer="sgd", learning_rate=0.1, momentum=0.9),
}
ENCODED = ("alice", "carol")


def same(inputs: dict[str, Tensor], reads: Any, weights: dict[str, Tensor], *, transposed: bool) -> list[Tensor]:
    assert set(weights) == {"norm"}, "the backbone's weights are handed through"
    return [inputs["tensor"].T if transposed else inputs["tensor"]]


def encoded(graph: MuxGraph) -> MuxGraph:
    """Every tensor of alice and carol behind an encoding."""
    encodings, weight = dict(graph.encodings), next(name for name in graph.weights if "norm" in name)
    for (task, key), param in list(graph.params.items()):
        if task not in ENCODED:
            continue
        rows, width = param.stop - param.start, graph.tables[param.table].shape[2]
        given = Input("tensor", key, (width, rows) if param.transposed else (rows, width), param.bound, param.std)
        place = Place(param.table, param.row, param.start, param.stop)
        settings: dict[str, Any] = {"transposed": param.transposed}
        encodings[task, key] = Encoding(task, key, "same", (given,), (place,), {}, {"norm": weight}, settings)
    params = {where: param for where, param in graph.params.items() if where[0] not in ENCODED}
    graph = replace(graph, params=params, encodings=encodings)
    check(graph)
    return graph


@pytest.fixture(scope="module")
def backbone() -> Any:
    return llama(51)


@pytest.fixture
def models(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The plain model, and the one whose tables are encoded, also when it is compiled again."""
    monkeypatch.setitem(ENCODERS, "same", same)
    tasks = [TASKS["alice"], TASKS["bob"]]
    plain = muxcompile.compile(backbone, tasks, CHUNK)
    build, run_passes = muxcompile.driver.Compiler.build, muxcompile.driver.run_passes

    def and_encode(*args: Any, **kwargs: Any) -> Any:
        graph, trail = run_passes(*args, **kwargs)
        return encoded(graph), trail

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            if self is not plain._compiler:
                patch.setattr(muxcompile.driver, "run_passes", and_encode)
            return build(self, *args, **kwargs)

    monkeypatch.setattr(muxcompile.driver.Compiler, "build", patched)
    return plain, muxcompile.compile(backbone, tasks, CHUNK)


def data(step: int, names: Any) -> dict[str, Any]:
    return {name: examples(10 * step + len(name), (30, 12)) for name in names}


def bits(model: Any) -> dict[str, Tensor]:
    """Every weight and gradient of every task."""
    found = {f"{task} {key}": value for task in model.tasks for key, value in model.state_dict(task).items()}
    return found | {f"{task} grad {key}": value for task in model.tasks for key, value in model.gradients(task).items()}


def equal(one: Any, other: Any) -> bool:
    ours, theirs = bits(one), bits(other)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_encoded_tasks_train_come_and_go_with_the_bits_of_plain_ones(models: tuple[Any, Any]) -> None:
    plain, model = models
    assert not plain.state.encoded.encodings
    assert {task for task, _ in model.state.encoded.encodings} == {"alice"}
    assert {task for task, _ in model.state.params} == {"bob"}
    for each in models:
        fill(each, "alice")
        each.step(data(0, each.tasks))
        each.forward_backward(data(1, each.tasks))
    assert equal(plain, model)
    assert any(value.any() for value in model.gradients("alice").values())
    for each in models:
        each.add_task(TASKS["carol"])
        each.optim_step(("alice", "bob"))
        each.step(data(2, each.tasks))
    assert {task for task, _ in model.state.encoded.encodings} == {"alice", "carol"}
    assert equal(plain, model)
    for each in models:
        each.remove_task("alice")
        each.step(data(3, each.tasks))
    assert {task for task, _ in model.state.encoded.encodings} == {"carol"}
    assert equal(plain, model)


def test_files_hold_encoded_tasks(models: tuple[Any, Any], backbone: Any, tmp_path: Path) -> None:
    plain, model = models
    for each in models:
        each.step(data(0, each.tasks))
    model.save_pretrained(tmp_path / "adapters")
    model.save_checkpoint(tmp_path / "checkpoint")
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone)
    assert loaded.state.encoded.encodings == model.state.encoded.encodings
    again = muxcompile.compile(backbone, {"alice": tmp_path / "adapters" / "alice"}, CHUNK)
    assert all(torch.equal(value, model.state_dict("alice")[key]) for key, value in again.state_dict("alice").items())
    for each in (plain, model, loaded):
        each.step(data(1, each.tasks))
    assert equal(plain, model)
    assert equal(plain, loaded)
    model.load_checkpoint(tmp_path / "checkpoint")
    model.step(data(1, model.tasks))
    assert equal(plain, model)
