"""stored: the tensors of a model folder, read one by one, or by pieces, when somebody asks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muxcompile.base import BaseSpec, device_of, dtype_of, first_line, load_config, load_model, local_file, quiet_transformers
from muxcompile.weights import Given, Unloaded
from passes.bare import bare
from runtime.tables import Shard

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(slots=True)
class Stored:
    """The parameters of a backbone in safetensors files.

    Args:
        spec: where it is.
        files: the file and the name there of every parameter.
        bytes: read so far, as the files have them.
    """

    spec: BaseSpec
    files: Mapping[str, tuple[Path, str]]
    bytes: int = field(default=0, init=False)

    def read(self, name: str, shard: Shard | None, like: Tensor) -> Tensor:
        """A parameter, or a piece of it; no more than that is read.

        Raises:
            ValueError: naming the file and the tensor.
        """
        path, key = self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(key)
                size = stored.get_shape()
                index = [slice(None)] * len(size)
                if shard is not None:
                    step = size[shard.dim] // shard.count
                    index[shard.dim] = slice(step * shard.index, step * (shard.index + 1))
                found: Tensor = stored[tuple(index)] if size else file.get_tensor(key)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise self.spec.error(f"{path}: tensor {key!r} cannot be read: {first_line(error)}") from error
        self.bytes += found.nbytes
        if found.untyped_storage().nbytes() > found.nbytes or not found.is_contiguous():
            found = found.clone(memory_format=torch.contiguous_format)  # a view would keep all of the tensor
        return found.to(device=like.device, dtype=like.dtype)


def open_parts(spec: BaseSpec) -> Unloaded:
    """A model folder of which a rank reads what it holds.

    Where the files do not have the model's tensors as the model has them, by its own names, all is loaded into the host's memory,
    to be cut there: other formats than safetensors, quantised weights, and what transformers renames, joins, or keeps in another
    dtype than the rest. What is not then held is let go of.

    Raises:
        ValueError: a file is broken or missing, or a tensor has another shape than the model's, naming both.
    """
    found = _stored(spec)
    if found is None:
        model = load_model(replace(spec, device="cpu"))
        found = Unloaded(bare(model, device_of(spec)), Given(model), model)
    return found


def _stored(spec: BaseSpec) -> Unloaded | None:
    """The folder's own tensors; None: they are not there as the model has them."""
    config = load_config(spec) if spec.gguf_file is None else None
    if config is None or any(getattr(config, name, None) for name in ("quantization_config", "transformers_weights")):
        return None
    if local_file(spec, "adapter_config.json") is not None:
        return None
    known = _headers(spec)
    if known is None:
        return None
    dtype = dtype_of(spec)
    model = _shapes(spec, config, _own_dtype(config, known) if dtype == "auto" else dtype)
    files = None if model is None else _files(spec, model, known)
    return None if model is None or files is None else Unloaded(bare(model, device_of(spec)), Stored(spec, files))


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def _headers(spec: BaseSpec) -> dict[str, _Header] | None:
    """Every tensor of the folder's safetensors files; None: it has none of these."""
    one = local_file(spec, ONE)
    index = local_file(spec, INDEX) if one is None else None
    if one is not None:
        paths: dict[str, list[str] | None] = {ONE: None}
    elif index is not None:
        try:
            named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = {file: [key for key, own in named.items() if own == file] for file in sorted(set(named.values()))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise spec.error(f"{index} cannot be read: {first_line(error)}") from error
    else:
        return None
    found: dict[str, _Header] = {}
    for file, keys in paths.items():
        path = local_file(spec, file)
        if path is None:
            raise spec.error(f"{spec.path!r} has no {file}, which its {INDEX} names")
        try:
            with safe_open(path, framework="pt") as opened:
                there = list(opened.keys())  # in one order on all ranks: the first of them may decide the dtype
                if missing := sorted(set(keys or ()).difference(there)):
                    raise spec.error(f"{path} has no tensor {missing[0]!r}, which {INDEX} says it has")
                for key in keys or there:
                    own = opened.get_slice(key)
                    found[key] = _Header(path, tuple(own.get_shape()), own.get_dtype())
        except (OSError, SafetensorError) as error:
            raise spec.error(f"{path} cannot be read: {first_line(error)}") from error
    return found


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _own_dtype(config: Any, known: Mapping[str, _Header]) -> torch.dtype:
    """The dtype that the configuration says, or the first floating-point tensor has."""
    said = getattr(config, "dtype", None)
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    return next((_DTYPES[own.dtype] for own in known.values() if own.dtype in _DTYPES), torch.get_default_dtype())


def _shapes(spec: BaseSpec, config: Any, dtype: torch.dtype) -> nn.Module | None:
    """The model with parameters on the meta device; None: its tensors are not all of one dtype, or made out of the stored ones."""
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        stack.enter_context(init_empty_weights(include_buffers=False))
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # as from_pretrained: a dozen different exception types
            raise spec.error(f"{spec.path!r} cannot be loaded: {first_line(error)}") from error
        if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
            return None
        if any(isinstance(own, WeightConverter) for own in get_model_conversion_mapping(model)):
            return None
    model.tie_weights()  # every parameter became one of its own when it lost its memory
    model.config.name_or_path = spec.path
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def _files(spec: BaseSpec, model: nn.Module, known: Mapping[str, _Header]) -> dict[str, tuple[Path, str]] | None:
    """Where every parameter lies; None: some of them, or a buffer, are elsewhere or otherwise stored."""
    tied: dict[int, list[str]] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(own), []).append(name)
    if any(name in known for name, _ in model.named_buffers()):
        return None
    files: dict[str, tuple[Path, str]] = {}
    for names in tied.values():
        stored = [name for name in names if name in known]
        if len(stored) != 1:
            return None
        (key,) = stored
        shape = tuple(model.get_parameter(key).shape)
        if known[key].shape != shape:
            raise spec.error(f"{known[key].path}: tensor {key!r} has shape {list(known[key].shape)}, the model's {list(shape)}")
        files |= dict.fromkeys(names, (known[key].path, key))
    return files
