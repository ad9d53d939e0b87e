"""The frozen backbone and its tokenizer, from files on this machine only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """Where the backbone is and how to hold it.

    Args:
        path: a Hugging Face model folder, or the name of a model already in the local Hugging Face cache.
        gguf_file: the file inside the folder, when the weights are GGUF.
        dtype: "auto" (as stored), or a name of `DTYPES`.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        where: "file:line" that complaints begin with.
    """

    path: str
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    where: str = "base"

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.where}: base {why}")


def load_base(spec: BaseSpec) -> tuple[Any, Any]:
    """The backbone in eval mode, frozen, on its device, and its tokenizer (None where the folder has none).

    Raises:
        ValueError: naming file, line and field; nothing is downloaded.
    """
    return load_model(spec), load_tokenizer(spec)


def load_tokenizer(spec: BaseSpec) -> Any:
    """The tokenizer beside the weights, or None if the folder has none.

    Raises:
        ValueError: the folder is missing, or its tokenizer cannot be read.
    """
    source = _source(spec)
    if (
        spec.gguf_file is None
        and Path(source).is_dir()
        and not any(Path(source).glob("*token*"))
        and not any(Path(source).glob("vocab*"))
    ):
        return None
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=True, **_gguf(spec))
        except Exception as error:  # transformers answers a broken folder with a dozen different exception types
            raise spec.error(f"{spec.path!r}: the tokenizer cannot be loaded: {first_line(error)}") from error


def load_model(spec: BaseSpec) -> Any:
    """The backbone itself: eval mode, no gradients.

    Raises:
        ValueError: the folder is missing, its weights cannot be read, or the device is not there.
    """
    source, device, dtype = _source(spec), device_of(spec), dtype_of(spec)
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True, **_gguf(spec))
        except Exception as error:
            raise spec.error(f"{spec.path!r} cannot be loaded: {first_line(error)}") from error
    backbone: Any = model
    return backbone.to(device).eval().requires_grad_(False)


def load_config(spec: BaseSpec) -> Any:
    """The backbone's configuration: what it is like, without its weights.

    Raises:
        ValueError: the folder is missing, or it cannot be read.
    """
    source = _source(spec)
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(source, local_files_only=True, **_gguf(spec))
        except Exception as error:
            raise spec.error(f"{spec.path!r}: the configuration cannot be read: {first_line(error)}") from error


def limits(model: Any) -> tuple[int, int | None]:
    """(ids below this have an embedding, longest sequence the positions allow or None)."""
    from passes.limits import stated

    return int(model.get_input_embeddings().weight.shape[0]), stated(model)


def device_of(spec: BaseSpec) -> torch.device:
    """The device that the spec means on this machine.

    Raises:
        ValueError: an unknown name, or a CUDA device that is not there.
    """
    import torch

    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = spec.device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise spec.error(f"device {spec.device!r} must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise spec.error(f"device {spec.device!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(spec.device)


def _source(spec: BaseSpec) -> str:
    folder = Path(spec.path)
    if folder.is_dir():
        needed = spec.gguf_file or "config.json"
        if not (folder / needed).is_file():
            raise spec.error(f"{spec.path!r} is no model folder: it has no {needed}")
        return str(folder)
    if folder.exists() or folder.is_absolute() or spec.path.startswith(".") or spec.path.count("/") != 1:
        raise spec.error(f"{spec.path!r} is not a folder")
    return spec.path


def _gguf(spec: BaseSpec) -> dict[str, str]:
    return {} if spec.gguf_file is None else {"gguf_file": spec.gguf_file}


def local_file(spec: BaseSpec, name: str) -> Path | None:
    """A file of the model's folder or of its place in the local cache, if it is there."""
    source = _source(spec)
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name)
    return Path(found) if isinstance(found, str) else None


def dtype_of(spec: BaseSpec) -> Any:
    """The torch dtype that the spec names, or "auto".

    Raises:
        ValueError: an unknown name.
    """
    import torch

    if spec.dtype == "auto":
        # GGUF has no dtype of its own once its blocks are unpacked.
        return torch.float32 if spec.gguf_file else "auto"
    if spec.dtype not in DTYPES:
        raise spec.error(f"dtype {spec.dtype!r} must be auto or one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[spec.dtype])


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while a file is read; what it was set to before comes back."""
    from transformers.utils import logging as transformers_logging

    noise: Any = transformers_logging
    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        with _muted(logging.getLogger("gguf")):
            yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


@contextmanager
def _muted(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
