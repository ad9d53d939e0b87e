"""Adapters of the head and of embeddings: what their rows owe their neighbours, their files and their checkpoints."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import muxcompile

from .peft_reference import (
    equal,
    everything,
    examples,
    llama,
    loss_and_gradients,
    refused,
    shake,
    wrong_gradients,
    wrong_loss,
)
from .test_kinds import causal

# Few labelled rows each: the blocks of the loss are mostly rows of nobody.
pytestmark = pytest.mark.usefixtures("one_capture")
ADAPTERS: dict[str, Any] = {
    "head": causal(LoraConfig, r=4, target_modules=["lm_head", "q_proj"]),
    "dropping": causal(LoraConfig, r=4, target_modules=["lm_head"], lora_dropout=0.3),
    "plain": causal(LoraConfig, r=4, target_modules=["q_proj"]),
    "tokens": causal(LoraConfig, r=2, target_modules=["q_proj"], trainable_token_indices=[3, 1, 44]),
    "embedding": causal(LoraConfig, r=3, target_modules=["embed_tokens", "v_proj"]),
    "own": causal(LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm", "o_proj"]),
}


@functools.cache
def backbone() -> Any:
    return llama(5, tie_word_embeddings=True)


def compiled(names: tuple[str, ...] = tuple(ADAPTERS), **options: Any) -> Any:
    tasks = {name: copy.deepcopy(ADAPTERS[name]) for name in names}
    model = muxcompile.compile(backbone(), tasks, muxcompile.Options(**{"chunk_tokens": 64, **options}))
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
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone())
    for one in (model, loaded):
        one.step(batches())
    assert equal(everything(loaded), everything(model))


def test_a_file_that_holds_another_tensor_for_the_backbones_is_refused(tmp_path: Path) -> None:
    get_peft_model(copy.deepcopy(backbone()), copy.deepcopy(ADAPTERS["head"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    assert key in tensors
    muxcompile.compile(backbone(), {"head": str(tmp_path)})
    save_file({**tensors, key: tensors[key] + 1}, path, {"format": "pt"})
    refused(lambda: muxcompile.compile(backbone(), {"head": str(tmp_path)}), "'head'", key, "not the backbone's own")


@pytest.mark.parametrize("reserve", [0, 3])
def test_tasks_that_come_and_go_leave_the_others_their_bits(reserve: int) -> None:
    batch = batches()
    constant, changing = compiled(), compiled(tuple(ADAPTERS)[::2], reserve_slots=reserve)
    for name in tuple(ADAPTERS)[1::2]:
        changing.add_task({name: copy.deepcopy(ADAPTERS[name])})
        shake(changing, name, list(ADAPTERS).index(name))
    for model in (constant, changing):
        model.step(batch)
    constant.remove_task("tokens")
    changing.remove_task("tokens")
    changing.add_task({"tokens": copy.deepcopy(ADAPTERS["tokens"])})
    changing.remove_task("tokens")
    del batch["tokens"]
    for model in (constant, changing):
        model.step(batch)
    assert equal(everything(changing), everything(constant))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "dropping"])
def test_a_live_peft_model_is_taken_as_it_is(name: str) -> None:
    # Tokens that are tied: see below.
    live = get_peft_model(llama(5, tie_word_embeddings=name != "tokens"), copy.deepcopy(ADAPTERS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = muxcompile.compile(live)
    batch = batches()[name]
    result = model.forward_backward({"default": batch})
    loss, gradients = loss_and_gradients(live, batch)
    assert not wrong_loss(float(result.losses["default"]), loss) + wrong_gradients(model.gradients("default"), gradients)


def test_a_live_peft_model_whose_head_is_tied_to_its_tokens_is_refused() -> None:
    live = get_peft_model(copy.deepcopy(backbone()), copy.deepcopy(ADAPTERS["tokens"]))
    refused(lambda: muxcompile.compile(live), "lm_head", "tied", "folder")


def test_without_fusion_every_task_gets_the_same_to_rounding() -> None:
    fused, apart = compiled(), compiled(skip_passes=("fuse",))
    batch = batches()
    losses = [model.forward_backward(batch).losses for model in (fused, apart)]
    for name in ADAPTERS:
        assert not wrong_loss(float(losses[1][name]), float(losses[0][name])), name
        assert not wrong_gradients(apart.gradients(name), fused.gradients(name)), name


def test_the_backbone_is_never_written() -> None:
    own = backbone()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    model = muxcompile.compile(own, {name: copy.deepcopy(adapter) for name, adapter in ADAPTERS.items()})
    for _ in range(2):
        model.step(batches())
    assert equal(dict(own.state_dict()), before)


def test_a_table_of_the_size_of_an_embedding_exists_once_beside_its_gradient() -> None:
    model = compiled(("own",))
    forward, backward = (model._build.groups[0].sources[f"embed.{phase}"] for phase in ("forward", "backward"))
    assert "mux.tile_gather" in forward
    assert "mux.tile_scatter_" in backward
    assert "tile_scatter.default" not in backward
    state = model.state
    rows = state.masters["model.embed_tokens.own.rows"]
    assert state.copies["model.embed_tokens.own.rows"].data_ptr() == rows.data_ptr()
