"""Tensors of a model folder, read one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from muxcompile.base import BaseSpec, load_model
from muxcompile.stored import Stored, open_parts
from muxcompile.weights import Given, Weights
from passes.split import Split
from passes.split import split as split_of
from runtime.tables import Shard

from .peft_reference import build, llama, refused, seeded


def spec(folder: Path, **fields: Any) -> BaseSpec:
    return BaseSpec(str(folder), **{"device": "cpu", **fields})


def stored(folder: Path) -> Path:
    """Saved in several files; of a vocabulary that divides."""
    config = LlamaConfig(
        vocab_size=88, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    seeded(lambda: LlamaForCausalLM(config), 0).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_every_tensor_is_the_loaded_model_s(tmp_path: Path, dtype: str) -> None:
    given = spec(stored(tmp_path), dtype=dtype)
    parts, model = open_parts(given), load_model(given)
    assert isinstance(parts.source, Stored)
    read = Weights(parts.model, parts.source).hold(dict(parts.model.named_parameters()))
    want = dict(model.named_parameters())
    assert read.keys() == want.keys()
    assert all(torch.equal(read[name], own) and read[name].dtype == own.dtype for name, own in want.items())
    buffers = dict(parts.model.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], own) and buffers[name].dtype == own.dtype for name, own in model.named_buffers())
    assert parts.model.config.name_or_path == model.config.name_or_path
    assert not parts.model.training


@pytest.mark.parametrize("count", [2, 4])
def test_pieces_are_those_of_the_split_model(tmp_path: Path, count: int) -> None:
    given = spec(stored(tmp_path))
    for index in range(count):
        parts, model = open_parts(given), load_model(given)
        how = Split.of(parts.model, index=index, count=count)
        named = dict(split_of(parts.model, how).named_parameters())
        want = dict(split_of(model, Split.of(model, index=index, count=count)).named_parameters())
        read = Weights(parts.model, parts.source, how).hold(named)
        assert all(torch.equal(read[name], own) for name, own in want.items())
        assert sum(own.untyped_storage().nbytes() for own in read.values()) == parts.source.bytes  # type: ignore[attr-defined]
        assert parts.source.bytes < 0.8 * sum(own.nbytes for own in model.parameters())  # type: ignore[attr-defined]


def test_what_is_held_is_not_read_again(tmp_path: Path) -> None:
    parts = open_parts(spec(stored(tmp_path)))
    weights, named = Weights(parts.model, parts.source), dict(parts.model.named_parameters())
    first = weights.hold(named)
    read = parts.source.bytes  # type: ignore[attr-defined]
    again = weights.hold(named)
    assert all(again[name] is own for name, own in first.items())
    assert torch.equal(weights.whole("model.norm.weight"), first["model.norm.weight"])
    assert parts.source.bytes == read  # type: ignore[attr-defined]


def tensors_of(folder: Path, change: Any) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


OTHERWISE: dict[str, Any] = {
    "its own names are not the file's": lambda found: found.update({"x." + name: found.pop(name) for name in list(found)}),
    "a tensor is missing": lambda found: found.pop("model.norm.weight"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_files_of_another_form_are_loaded_whole(tmp_path: Path, what: str) -> None:
    llama().save_pretrained(tmp_path)
    tensors_of(tmp_path, OTHERWISE[what])
    assert isinstance(open_parts(spec(tmp_path)).source, Given)


def test_other_formats_are_loaded_whole_and_let_go_of(tmp_path: Path) -> None:
    net = build("GPT2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    parts = open_parts(spec(tmp_path))
    weights = Weights(parts.model, parts.source)
    name = "transformer.wte.weight"
    held = weights.hold({name: parts.model.get_parameter(name)})
    assert torch.equal(held[name], net.get_parameter(name))
    model = parts.model
    del parts
    refused(lambda: Weights(model, weights.source).whole("transformer.ln_f.weight"), "ln_f.weight", "keep the model")


def test_another_shape_is_refused_with_file_and_tensor(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tensors_of(tmp_path, lambda found: found.update({"model.norm.weight": torch.ones(31)}))
    refused(lambda: open_parts(spec(tmp_path)), "model.safetensors", r"'model\.norm\.weight' has shape \[31\], the model's \[32\]")


def test_a_torn_file_is_refused_by_name(tmp_path: Path) -> None:
    stored(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    refused(lambda: open_parts(spec(tmp_path)), path.name, "cannot be read")
    path.unlink()
    refused(lambda: open_parts(spec(tmp_path)), f"has no {path.name}", "index.json names")


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.other.weight"] = file
    path.write_text(json.dumps(index))
    refused(lambda: open_parts(spec(tmp_path)), file, r"has no tensor 'model\.other\.weight'")


def test_a_file_that_changes_behind_is_refused_with_the_tensor(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    parts = open_parts(spec(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    like = parts.model.get_parameter("model.norm.weight")
    refused(
        lambda: parts.source.read("model.norm.weight", None, like), "model.safetensors", r"'model\.norm\.weight' cannot be read"
    )
    refused(lambda: parts.source.read("model.norm.weight", Shard(0, 1, 2), like), "model.safetensors")
