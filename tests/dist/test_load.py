"""A rank reads and holds its own part of the backbone alone, and trains what one process trains."""

from __future__ import annotations

import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PromptTuningConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import muxcompile
from muxcompile.base import BaseSpec
from muxcompile.stored import open_parts
from muxcompile.weights import Unloaded
from tests.dist import processes
from tests.dist.cases import differ, fill
from tests.muxcompile.peft_reference import examples, seeded

VOCABULARY = 88
MESHES = ("pp=2", "tp=2")
BUFFER = 4 * 4  # of the rotary embedding
WHOLE = 92800  # bytes of the untied backbone
SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}
FORMS = ("tied", "several files", "bin")
ADAPTERS: dict[str, Any] = {
    "wide": LoraConfig(r=4, target_modules="all-linear"),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "dora": LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
}


def backbone(tied: bool) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), 0).eval()


def adapters(tied: bool) -> dict[str, Any]:
    own = {"own": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])}
    return ADAPTERS | ({} if tied else own)


def folder_of(form: str, path: Path) -> Path:
    """A saved backbone; the tied one is stored in bfloat16."""
    folder = path / form.replace(" ", "-")
    if form == "tied":
        backbone(True).to(torch.bfloat16).save_pretrained(folder)
    elif form == "several files":
        backbone(False).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        net = backbone(False)
        folder.mkdir()
        net.config.save_pretrained(folder)
        torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder


def held(model: Any) -> dict[str, Tensor]:
    return dict(model._build.weights)


def storages(tensors: dict[str, Tensor]) -> int:
    """Bytes of memory behind some tensors, all of it."""
    return sum({own.untyped_storage()._cdata: own.untyped_storage().nbytes() for own in tensors.values()}.values())


def outcome(model: Any, names: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {f"{name}: fresh": model.state_dict(name) for name in names}
    for name in names:
        fill(model, name)
    batches = [
        {name: examples(10 * step + number, (9, 4, 17), vocabulary=VOCABULARY) for number, name in enumerate(names)} for step in (0, 1)
    ]
    found["loss"] = {name: float(loss) for name, loss in model.forward_backward(batches[0]).losses.items()}
    found |= {f"{name}: gradient": model.gradients(name) for name in names}
    model.optim_step(list(names))
    found["later loss"] = {name: float(loss) for name, loss in model.step(batches[1]).losses.items()}
    return found


def options(mesh: str | None) -> muxcompile.Options:
    return muxcompile.Options(chunk_tokens=128, mesh=mesh)


def tasks(given: dict[str, Any]) -> list[muxcompile.Task]:
    return [muxcompile.Task(name, adapter, learning_rate=0.01) for name, adapter in given.items()]


def shared(path: str) -> Path:
    """The first rank's folder, on all."""
    found = [path]
    torch.distributed.broadcast_object_list(found)
    return Path(found[0])


class Recorded:
    """A source, and what was asked of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.taken = source, list[tuple[str, Any]]()

    def read(self, name: str, shard: Any, like: Tensor) -> Tensor:
        self.taken.append((name, shard))
        return self.source.read(name, shard, like)


def read_parts(path: Path, form: str, mesh: str) -> dict[str, Any]:
    """What a rank read and holds of a folder, and how its tasks differ from those of one process."""
    spec = BaseSpec(str(path / form.replace(" ", "-")), dtype="float32", device="cpu")
    parts, given = open_parts(spec), adapters(form == "tied")
    source = Recorded(parts.source)
    model = muxcompile.compile(replace(parts, source=source), tasks(given), options(mesh))
    sizes = {name: own.numel() * own.element_size() for name, own in parts.model.named_parameters()}
    whole = sum(sizes.values())
    weights = held(model)
    del parts
    gc.collect()
    kept = storages(weights)
    found = outcome(model, given)
    alone = muxcompile.compile(one(path, form), tasks(given), options(None))
    wrong = [line for what, want in outcome(alone, given).items() for line in differ(what, found[what], want, 10)]
    return {
        "wrong": wrong,
        "names": sorted(weights),
        "shapes": {name: tuple(own.shape) for name, own in weights.items()},
        "kept": kept,
        "whole": whole,
        "sizes": sizes,
        "taken": source.taken,
        "read": [name for name, _ in source.taken],
        "bytes": getattr(source.source, "bytes", 0),
    }


def one(path: Path, form: str) -> Any:
    net = LlamaForCausalLM.from_pretrained(path / form.replace(" ", "-"), dtype=torch.float32)
    return net.eval()


def given_model(mesh: str) -> dict[str, Any]:
    """A model of the user's, of which nothing but this rank's part lives on; tasks that join later."""
    net, names = backbone(False), adapters(False)
    model = muxcompile.compile(net, tasks(names), options(mesh))
    late = muxcompile.Task("late", LNTuningConfig(target_modules=["post_attention_layernorm"]))
    model.add_task(late)
    begins = model.state_dict("late")
    model.remove_task("late")
    layers = zip(begins.items(), net.model.layers, strict=True)
    wrong = [key for (key, value), layer in layers if not torch.equal(value, layer.post_attention_layernorm.weight)]
    kept = storages(held(model))
    addresses = {own.untyped_storage().data_ptr() for own in held(model).values()}
    theirs = {name: own.untyped_storage().data_ptr() for name, own in net.named_parameters()}
    shared_with = sorted(name for name, own in theirs.items() if own in addresses)
    alive = weakref.ref(net)
    del net, layers
    gc.collect()
    refused = ""
    try:
        model.add_task(replace(late, name="later"))
    except ValueError as error:
        refused = str(error)
    model.add_task(muxcompile.Task("lora", LoraConfig(r=2, target_modules=["q_proj"])))
    model.step({"lora": examples(3, (9,), vocabulary=VOCABULARY)})
    tensors = sum("rotary" not in name for name in held(model))
    return {"wrong": wrong, "kept": kept, "tensors": tensors, "shared": shared_with, "alive": alive() is not None, "refused": refused}


def all_of_a_mesh() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        path = shared(own)
        if torch.distributed.get_rank() == 0:
            for form in FORMS:
                folder_of(form, path)
        torch.distributed.barrier()
        for mesh in MESHES:
            for form in FORMS:
                found[f"{mesh} {form}"] = read_parts(path, form, mesh)
            found[f"{mesh} given"] = given_model(mesh)
        torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return processes.run("tests.dist.test_load:all_of_a_mesh", 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", MESHES)
def test_parts_of_a_folder_train_what_one_process_trains(ranks: list[dict[str, Any]], mesh: str, form: str) -> None:
    assert [own[f"{mesh} {form}"]["wrong"] for own in ranks] == [[], []]


def split_bytes(whole: int, pieces: dict[str, tuple[int, ...]]) -> int:
    """What one of two shards has of a model: half of each of its split tensors."""
    return whole - sum(4 * torch.Size(shape).numel() for shape in pieces.values())


def test_a_stage_reads_its_own_layers_and_what_tasks_begin_with(ranks: list[dict[str, Any]]) -> None:
    first, last = (own["pp=2 several files"] for own in ranks)
    assert not set(first["names"]) & set(last["names"])
    assert "model.embed_tokens.weight" in first["names"]
    assert "lm_head.weight" in last["names"]
    for own in (first, last):
        foreign = set(own["read"]) - set(own["names"])
        assert {name.split(".")[-2] for name in foreign} <= {"lm_head", "embed_tokens", "norm", "input_layernorm"}
        assert not any(shard for _, shard in own["taken"])


@pytest.mark.parametrize("form", FORMS)
def test_stages_hold_one_model_between_them(ranks: list[dict[str, Any]], form: str) -> None:
    first, last = (own[f"pp=2 {form}"] for own in ranks)
    # Both have a table that the head is tied to.
    twice = VOCABULARY * 32 * 4 if form == "tied" else 0
    assert first["kept"] + last["kept"] == first["whole"] + twice + BUFFER
    assert max(first["kept"], last["kept"]) < 0.6 * first["whole"]


@pytest.mark.parametrize("form", ["several files", "bin"])
def test_a_shard_reads_and_holds_its_pieces(ranks: list[dict[str, Any]], form: str) -> None:
    for index, own in enumerate(rank[f"tp=2 {form}"] for rank in ranks):
        pieces = {name: shard for name, shard in own["taken"] if shard is not None}
        assert {name.split(".")[-2] for name in pieces} == SPLIT
        assert {shard.index for shard in pieces.values()} == {index}
        assert own["kept"] == split_bytes(own["whole"], {name: own["shapes"][name] for name in pieces}) + BUFFER
        # Of a split tensor nothing is read beyond the piece, unless a task begins with all of it.
        if form == "several files":
            assert own["bytes"] == sum(own["sizes"][name] // (shard.count if shard else 1) for name, shard in own["taken"])


def test_a_tied_table_is_read_and_held_once(ranks: list[dict[str, Any]]) -> None:
    for own in (rank["tp=2 tied"] for rank in ranks):
        assert [name for name, shard in own["taken"] if shard is not None and shard.dim == 0 and "layers" not in name] == [
            "model.embed_tokens.weight"
        ]
        assert own["kept"] < 0.6 * own["whole"]


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_no_part_of_a_given_model_is_let_go_of(ranks: list[dict[str, Any]], mesh: str) -> None:
    for own in (rank[f"{mesh} given"] for rank in ranks):
        assert own["wrong"] == []
        assert not own["alive"]
        assert own["kept"] < 0.6 * WHOLE
        if mesh == "pp=2":
            # What a stage has is the model's own; what a task begins with later may be another stage's.
            assert len(own["shared"]) == own["tensors"]
            assert "keep the model that was compiled" in own["refused"]
