"""export: what a server would refuse is known before it is tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import save_file

import muxcompile
from muxcompile import export
from muxcompile.cli import app, main, run_command

from .peft_reference import llama

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
KEYS = frozenset({"base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"})


@pytest.mark.parametrize(
    ("changed", "keys", "reason"),
    [
        ({"peft_type": "IA3"}, KEYS, "peft_type=IA3"),
        ({"use_dora": True}, KEYS, "use_dora"),
        ({"modules_to_save": ["norm"]}, KEYS, "modules_to_save"),
        ({"bias": "all"}, KEYS, "bias='all'"),
        ({"lora_bias": True}, KEYS, "lora_bias"),
        ({"rank_pattern": {"q_proj": 4}}, KEYS, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, KEYS, "alpha_pattern"),
        *(({"init_lora_weights": init}, KEYS, f"init_lora_weights={init!r}") for init in ("pissa", "OLoRA", "corda")),
        ({"r": "8"}, KEYS, "r='8'"),
        ({"r": None}, KEYS, "r=None"),
        ({"r": 17}, KEYS, "--max-lora-rank 16"),
        ({}, KEYS | {"base_model.model.q_proj.extra"}, "q_proj.extra"),
        ({}, KEYS | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"}, "trainable_tokens_delta"),
    ],
)
def test_what_vllm_refuses_is_said_with_the_reason(changed: dict[str, Any], keys: frozenset[str], reason: str) -> None:
    assert export.vllm(GOOD, KEYS, 16) == []
    (found,) = export.vllm(GOOD | changed, keys, 16)
    assert reason in found


def test_vllm_takes_adapters_of_embeddings() -> None:
    keys = frozenset(
        {"base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.model.embed_tokens.lora_embedding_B"}
    )
    assert export.vllm(GOOD | {"target_modules": ["embed_tokens"]}, keys, 16) == []


def test_the_adapters_that_pass_are_copied_and_the_exit_code_tells_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {
        "alice": LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True),
        "bob": LoraConfig(r=4, target_modules=["v_proj"], use_dora=True),
        "carol": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    }
    muxcompile.compile(llama(), tasks).save_pretrained(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "served")])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "alice: ok",
        "bob: use_dora: vLLM has no magnitude vectors",
        "carol: peft_type=IA3: vLLM serves LoRA",
    ]
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["alice"]
    assert json.loads((tmp_path / "served" / "alice" / "adapter_config.json").read_text())["use_rslora"] is True
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "run" / "alice")])
    assert ended.value.code == 0


@pytest.mark.parametrize("arguments", [["empty"], ["run", "--check", "sglang"]])
def test_a_folder_without_adapters_or_an_unknown_server_is_one_line_and_exit_code_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "alice"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(GOOD))
    save_file({key: torch.zeros(1) for key in KEYS}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_without_its_tensors_does_not_pass(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.check(adapter, "vllm", 16) == {"alice": []}
    (adapter / "adapter_model.safetensors").unlink()
    assert run_command(app, "muxcompile", ["export", str(adapter)]) == 1
    assert capsys.readouterr().out.startswith("alice: adapter_model.safetensors: is missing")


@pytest.mark.parametrize("text", ["[1]", "null", "3", "{"])
def test_a_config_that_is_none_is_refused_by_its_path(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"alice/adapter_config\.json: "):
        export.check(adapter.parent, "vllm", 16)


def test_an_adapter_is_not_copied_into_itself(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter.parent / "link").symlink_to("alice")
    for target in (adapter / "served", adapter.parent / "link" / "served"):
        assert run_command(app, "muxcompile", ["export", str(adapter.parent / "alice"), "--to", str(target)]) == 2
        assert "would be copied into itself" in capsys.readouterr().err
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_in_the_working_folder_is_called_by_its_folders_name(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter)
    assert export.check(Path(), "vllm", 16) == {"alice": []}
