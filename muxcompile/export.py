"""export: adapters for a server, each checked against what that server takes before anything is copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from muxcompile.entry import WEIGHTS
from runtime.adapterhub import CONFIG_FILE as CONFIG
from runtime.folder import replace_folder


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters of a run's folder by task, or the one that the folder itself is.

    Raises:
        ValueError: there is none.
    """
    if (folder / CONFIG).is_file():
        return {folder.resolve().name: folder}
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if not found:
        raise ValueError(f"{folder}: holds no adapter (no {CONFIG} there or one level below)")
    return found


def vllm(config: Mapping[str, Any], keys: frozenset[str], most: int) -> list[str]:
    """Why vLLM would refuse an adapter, or serve something else than was trained; nothing if it takes it.

    Its loader (vllm/lora/peft_helper.py, vllm/lora/utils.py) reads r, lora_alpha, use_rslora and target_modules, knows the tensors
    lora_A and lora_B of linears, the head among them, and of embeddings, and scales every module alike.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type={kind}: vLLM serves LoRA"]
    reasons = []
    if config.get("use_dora"):
        reasons.append("use_dora: vLLM has no magnitude vectors")
    if config.get("modules_to_save"):
        reasons.append(f"modules_to_save={config['modules_to_save']}: vLLM replaces no whole modules")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        start = f"init_lora_weights={config['init_lora_weights']!r}"
        reasons.append(f"{start}: vLLM adds to the whole weight, the adapter belongs to what its start left of it")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}: vLLM loads no trained biases")
    if config.get("lora_bias"):
        reasons.append("lora_bias: vLLM has no bias of lora_B")
    for field in ("rank_pattern", "alpha_pattern"):
        if config.get(field):
            reasons.append(f"{field}: vLLM scales every module by lora_alpha and r")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        reasons.append(f"r={rank!r}: vLLM needs a whole number")
    elif rank > most:
        reasons.append(f"r={rank}: more than --max-lora-rank {most}")
    if not reasons:
        known = ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"
        unknown = sorted(key for key in keys if not key.endswith(known))
        reasons += [f"tensor {key!r}: vLLM does not know it" for key in unknown[:1]]
    return reasons


SERVERS: dict[str, Callable[[Mapping[str, Any], frozenset[str], int], list[str]]] = {"vllm": vllm}


def check(folder: Path, server: str, most: int) -> dict[str, list[str]]:
    """By task why the server would not take its adapter.

    Raises:
        ValueError: an unknown server, or a folder that holds no readable adapter.
    """
    if server not in SERVERS:
        raise ValueError(f"--check {server!r} must be one of {', '.join(SERVERS)}")
    found = {}
    for task, path in adapters_in(folder).items():
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / CONFIG}: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path / CONFIG}: holds no adapter's fields but a {type(config).__name__}")
        found[task] = SERVERS[server](config, _keys(path / WEIGHTS), most)
        if not found[task] and not (path / WEIGHTS).is_file():
            found[task] = [f"{WEIGHTS}: is missing, so that nothing is known of its tensors"]
    return found


def _keys(path: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return frozenset()
    try:
        with safe_open(str(path), "pt") as file:
            return frozenset(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def copy(folder: Path, target: Path, tasks: list[str]) -> None:
    """Each task's adapter as a folder of `target`, which appears whole or not at all.

    Raises:
        ValueError: it is there already, or would be a part of an adapter.
    """
    sources = adapters_in(folder)
    if target.exists():
        raise ValueError(f"{target}: is there already")
    for task in tasks:
        if target.resolve().is_relative_to(sources[task].resolve()):
            raise ValueError(f"{target}: lies in {sources[task]}, which would be copied into itself")
    with replace_folder(target) as fresh:
        for task in tasks:
            shutil.copytree(sources[task], fresh / task)
