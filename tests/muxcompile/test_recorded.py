"""Chunks and optimizer steps that are recorded once and launched from then on have the bits of those that are called."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import muxcompile
from muxcompile.forecast import records
from tests.runtime.again import Again

from .kinds import FAMILIES, batches, task
from .peft_reference import examples, fill, llama

pytestmark = pytest.mark.usefixtures("one_capture")
BACKBONE = llama(43)


def recorded(model: Any) -> tuple[Again, Again]:
    """Give a model recorders as a GPU's: of chunks, and of optimizer steps."""
    chunks, steps = Again(), Again()
    model._recorders, model.state.recorders = (chunks,), (steps,)
    model._use(model._build)
    return chunks, steps


def small(*names: str, **fields: Any) -> Any:
    tasks = [muxcompile.Task(name, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), **fields) for name in names]
    model = muxcompile.compile(BACKBONE, tasks, muxcompile.Options(chunk_tokens=64))
    for number, name in enumerate(names):
        fill(model, name, seed=number)
    return model


def data(step: int, *names: str) -> dict[str, Any]:
    """Of other lengths and in another number of chunks at each step."""
    return {name: examples(10 * step + len(name), (5 + 7 * step, 9, 30)[: 1 + step % 3]) for name in names}


def seen(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    result = model.step(given)
    return [
        *result.losses.values(),
        *result.grad_norms.values(),
        *model.evaluate(given).losses.values(),
        *(value for name in given for value in model.state_dict(name).values()),
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_of_every_kind_keep_their_bits() -> None:
    made = FAMILIES["llama"]
    names = tuple(made.adapters)

    def run(record: bool) -> list[list[torch.Tensor]]:
        model = muxcompile.compile(
            made.backbone, [task(name, made.adapters[name]) for name in names], muxcompile.Options(chunk_tokens=256)
        )
        for number, name in enumerate(names):
            fill(model, name, seed=number)
        recorders = recorded(model) if record else ()
        found = [seen(model, batches(made, step)) for step in range(3)]
        assert all(own.launches > own.records > 0 for own in recorders)
        return found

    assert all(same(one, other) for one, other in zip(run(False), run(True), strict=True))


def test_what_changes_from_step_to_step_reaches_the_records() -> None:
    fields = {"learning_rate": 0.1, "lr_schedule": "cosine", "total_steps": 9, "max_grad_norm": 0.5, "weight_decay": 0.1}
    called, launched = small("ann", "benny", **fields), small("ann", "benny", **fields)
    chunks, steps = recorded(launched)
    for step in range(7):
        names = ("ann", "benny") if step % 2 else ("benny",)
        assert same(seen(called, data(step, *names)), seen(launched, data(step, *names))), step
    assert steps.records == 2, "one for each task"
    assert steps.launches == 3 - 1 + 7 - 1
    assert chunks.launches > 2 * chunks.records


def test_figures_of_a_step_stay_when_the_next_one_is_taken() -> None:
    model = small("ann")
    recorded(model)
    results = [model.step(data(step, "ann")) for step in range(4)]
    norms = [float(result.grad_norms["ann"]) for result in results]
    again = small("ann")
    assert norms == [float(again.step(data(step, "ann")).grad_norms["ann"]) for step in range(4)]
    assert len(set(norms)) == 4


def test_a_step_is_recorded_anew_when_its_tensors_are_others(tmp_path: Path) -> None:
    called, launched = small("ann", "benny", learning_rate=0.1), small("ann", "benny", learning_rate=0.1)
    _, steps = recorded(launched)
    for model in (called, launched):
        for step in range(3):
            model.step(data(step, "ann", "benny"))
        model.save_checkpoint(tmp_path)
        model.step(data(3, "ann", "benny"))
        model.load_checkpoint(tmp_path)
    for step in range(4, 7):
        assert same(seen(called, data(step, "ann")), seen(launched, data(step, "ann"))), step
    before = steps.records
    for model in (called, launched):
        # A new rank: other tables, to which everything moves that is in slots.
        model.add_task(muxcompile.Task("cid", LoraConfig(r=16, target_modules=["q_proj", "up_proj"]), learning_rate=0.1))
        model.add_task(muxcompile.Task("dot", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), learning_rate=0.1))
        model.remove_task("benny")
    for step in range(7, 11):
        given = data(step, "ann", "cid", "dot")
        assert same(seen(called, given), seen(launched, given)), step
    assert steps.records > before


def test_a_task_whose_recorded_step_is_not_finite_is_stopped() -> None:
    called, launched = small("ann", "benny"), small("ann", "benny")
    recorded(launched)
    for step in range(5):
        for model in (called, launched):
            if step == 3:
                key = next(iter(model.state_dict("benny")))
                model.state.write("benny", key, torch.full(model.state.shape("benny", key), float("inf")))
            result = model.step(data(step, "ann", "benny"))
        assert list(result.quarantined) == (["benny"] if step >= 3 else [])
        assert all(torch.equal(value, launched.state_dict("ann")[key]) for key, value in called.state_dict("ann").items())
    assert launched.steps == called.steps == {"ann": 5, "benny": 3}


def test_cut_sequences_and_whole_ones_take_turns() -> None:
    def run(record: bool) -> list[list[torch.Tensor]]:
        model = small("ann", "benny")
        for name in ("ann", "benny"):
            model.state.tasks[name].training = replace(model.state.tasks[name].training, learning_rate=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.step({"ann": examples(1, (100,))})  # compiled to cut from here on
        chunks, _ = recorded(model) if record else (None, None)
        found = [seen(model, {"ann": examples(step, (100, 20)), "benny": examples(step + 9, (30,))}) for step in range(4)]
        assert chunks is None or chunks.launches > 0
        return found

    assert all(same(one, other) for one, other in zip(run(False), run(True), strict=True))


def test_the_switch_is_kept_with_an_artifact_and_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    for wanted in (True, False):
        model = muxcompile.compile(
            BACKBONE, {"ann": LoraConfig(r=4, target_modules=["q_proj"])}, muxcompile.Options(chunk_tokens=64, cuda_graphs=wanted)
        )
        assert not model._build.groups[0].recorded
        model.save_artifact(tmp_path)
        assert not muxcompile.load_artifact(tmp_path, BACKBONE)._build.groups[0].recorded
    with pytest.raises(ValueError, match="cuda_graphs='yes'"):
        muxcompile.Options(cuda_graphs="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "dtype", "fields", "expected"),
    [
        ("cuda", torch.bfloat16, {}, True),
        ("cuda", torch.float16, {"invariant": False}, True),
        ("cuda", torch.bfloat16, {"cuda_graphs": False}, False),
        ("cuda", torch.float32, {}, False),  # attention in plain torch reads the sequences' borders on the host
        ("cpu", torch.bfloat16, {}, False),
    ],
)
def test_what_does_not_wait_for_a_gpu_is_recorded(device: str, dtype: torch.dtype, fields: dict[str, Any], expected: bool) -> None:
    model = torch.nn.Linear(1, 1, dtype=dtype)
    assert records(muxcompile.Options(**fields), model, torch.device(device)) == expected


def test_whole_sequences_are_recorded_whole_where_forwards_of_cut_ones_are_kept() -> None:
    found = []
    for record in (False, True):
        model = small("ann", "bob")
        model._build = replace(model._build, groups=tuple(replace(own, kept=4) for own in model._build.groups))
        model._use(model._build)
        if record:
            recorded(model)
        found.append([seen(model, data(step, "ann", "bob")) for step in range(4)])
    assert all(same(one, other) for one, other in zip(*found, strict=True))
