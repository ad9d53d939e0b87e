"""Folders in the layout of AdapterHub's `adapters` library: `adapter_config.json` and `pytorch_adapter.bin`.

The library puts the adapter's name into every key, `<module>.adapters.<name>.<tensor>`, and what describes the adapter under
`config`. In memory keys have no name, `<module>.<tensor>`: a task may be called otherwise than its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG_FILE = "adapter_config.json"
# What the library writes by default, and with use_safetensors.
PICKLE_FILE, SAFE_FILE = "pytorch_adapter.bin", "adapter.safetensors"
# The version whose fields and files these are.
VERSION = "adapters.1.3.0"
# Fields of our configs that say whose model it is; the library keeps them beside `config`.
BESIDE = ("model_type", "model_class", "hidden_size")
_OURS = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")


def write(folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one adapter; the library will call it `name`, less what a module cannot be called: a dot in it, or "double"."""
    name = name.replace(".", "_")
    name += "_" * hasattr(nn.ModuleDict, name)
    fields = {key: value for key, value in config.items() if key not in (*BESIDE, *_OURS)}
    given = {key: config.get(key) for key in (*BESIDE, *_OURS)}
    given |= {"config": fields, "name": name, "model_name": config.get("base_model_name_or_path"), "version": VERSION}
    (folder / CONFIG_FILE).write_text(json.dumps(given, indent=2, sort_keys=True) + "\n")
    try:
        torch.save({_named(key, name): value for key, value in tensors.items()}, folder / PICKLE_FILE)
    except RuntimeError as error:  # torch's own of a file that cannot be written
        raise OSError(str(error).partition("\n")[0]) from error


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The fields of an adapter with what is known of its model, and its tensors; None: the folder has another layout.

    Raises:
        ValueError: a file cannot be read, or a tensor belongs to another adapter.
    """
    given = json.loads((folder / CONFIG_FILE).read_text())
    if not isinstance(given, dict) or not isinstance(given.get("config"), dict):
        return None
    tensors = _tensors(folder)
    name = str(given.get("name"))
    return given["config"] | {key: given[key] for key in BESIDE if key in given}, {
        _nameless(key, name): value.float() for key, value in tensors.items()
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / SAFE_FILE).is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(folder / SAFE_FILE)
        except SafetensorError as error:
            raise ValueError(f"{SAFE_FILE} cannot be read: {error}") from error
    if not (folder / PICKLE_FILE).is_file():
        raise ValueError(f"the folder holds neither {PICKLE_FILE} nor {SAFE_FILE}")
    try:
        found = torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a broken file
        raise ValueError(f"{PICKLE_FILE} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{PICKLE_FILE} holds something else than tensors by name")
    return found


def _named(key: str, name: str) -> str:
    """ "h.0.output_adapters.adapter_up.bias" -> "h.0.output_adapters.adapters.<name>.adapter_up.bias"."""
    module, mark, tensor = key.partition("_adapters.")
    return f"{module}{mark}adapters.{name}.{tensor}"


def _nameless(key: str, name: str) -> str:
    module, mark, tensor = key.partition(f"_adapters.adapters.{name}.")
    if not mark:
        raise ValueError(f"its tensor {key!r} is none of the adapter {name!r}")
    return f"{module}_adapters.{tensor}"
