"""Adapters of the head and of embeddings: what their rows owe their neighbours, their files and their checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import muxcompile

from .peft_reference import equal, everything, examples, llama, refused, shake
from .test_kinds import causal

# Few labelled rows each: the blocks of the loss are mostly rows of nobody.
ADAPTERS: dict[str, Any] = {
    "head": causal(LoraConfig, r=4, target_modules=["lm_head", "q_proj"]),
    "dropping": causal(LoraConfig, r=4, target_modules=["lm_head"], lora_dropout=0.3),
    "plain": causal(LoraConfig, r=4, target_modules=["q_proj"]),
}


def compiled(names: tuple[str, ...] = tuple(ADAPTERS), **options: Any) -> Any:
    tasks = {name: copy.deepcopy(ADAPTERS[name]) for name in names}
    model = muxcompile.compile(llama(5), tasks, muxcompile.Options(**{"chunk_tokens": 64, **options}))
    for name in names:
        shake(model, name, list(ADAPTERS).index(name))
    return model


def batches() -> dict[str, Any]:
    return {name: examples(index, (9, 3, 20), labelled=0.2) for index, name in enumerate(ADAPTERS)}


@pytest.mark.parametrize("sick", ADAPTERS)
def test_what_is_not_finite_stays_with_its_task(sick: str) -> None:
    well, ill = compiled(), compiled()
    first = next(iter(ill.state_dict(sick)))
    ill.state.write(sick, first, torch.full(ill.state.shape(sick, first), torch.nan))
    for model in (well, ill):
        result = model.step(batches())
        assert set(result.quarantined) <= {sick}
    for name in ADAPTERS:
        assert equal(everything(ill)[name], everything(well)[name]) == (name != sick), name


@pytest.mark.parametrize("tokens", [64, 96, 256])
def test_where_a_tasks_sequences_land_changes_no_bit(tokens: int) -> None:
    together = compiled(chunk_tokens=tokens)
    batch = {name: examples(index, (40, 30, 40, 17, 20), labelled=0.4) for index, name in enumerate(ADAPTERS)}
    losses = together.step(batch).losses
    for name in ADAPTERS:
        alone = compiled((name,), chunk_tokens=tokens)
        assert torch.equal(alone.step({name: batch[name]}).losses[name], losses[name])
        assert equal(everything(alone)[name], everything(together)[name]), name


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    through, resumed = compiled(), compiled()
    through.step(batches())
    through.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    for model in (through, resumed):
        model.step(batches())
    assert equal(everything(resumed), everything(through))


def test_an_artifact_runs_without_the_compiler_to_the_bit(tmp_path: Path) -> None:
    model = compiled()
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", llama(5))
    for one in (model, loaded):
        one.step(batches())
    assert equal(everything(loaded), everything(model))


def test_a_file_that_holds_another_tensor_for_the_backbones_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(5), copy.deepcopy(ADAPTERS["head"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    assert key in tensors
    muxcompile.compile(llama(5), {"head": str(tmp_path)})
    save_file({**tensors, key: tensors[key] + 1}, path, {"format": "pt"})
    refused(lambda: muxcompile.compile(llama(5), {"head": str(tmp_path)}), "'head'", key, "not the backbone's own")
