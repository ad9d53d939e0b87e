"""export: what a server would refuse is known before it is tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig

import muxcompile
from muxcompile import export
from muxcompile.cli import main

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
