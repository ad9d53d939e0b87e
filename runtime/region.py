"""Regions at run time: what each one reads and writes, and the loading of its source text into a callable."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Under what names PEFT's layers keep what they wrap: the backbone's own names lack them.
WRAPPED = frozenset({"base_layer", "original_module", "token_adapter"})

Callables = dict[str, Callable[[list[Any]], Any]]


@dataclass(frozen=True, slots=True)
class TemplateSpec:
    """One compiled body that several regions share.

    Args:
        name: the stem of its source files.
        outputs: values the forward returns first; what it returns beyond them are the saved tensors of the backward.
        saved: number of saved tensors.
        backward: what the backward is called with, in order: `input:i` (the region's i-th input), `saved:i`, `tangent:i` (the
            gradient of the i-th output), `grad:i` (the gradient table of the i-th input, added to in place); None: no backward.
        input_grads: the inputs whose gradients the backward returns, in order.
    """

    name: str
    outputs: int
    saved: int
    backward: tuple[str, ...] | None
    input_grads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """One place of the model.

    `inputs` are references: `weight:NAME`, `table:NAME`, `route:KEY`, `chunk:NAME`, `carry:NUMBER`, `value:NAME`; `outputs` are
    value names.
    """

    name: str
    template: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The loss region: what its inputs are bound to, the value it reads, and the tables that its backward adds gradients to.

    `shared`: rows of several tasks may stand in one of its blocks.
    """

    inputs: tuple[str, ...]
    value: str
    shape: tuple[int, ...]
    dtype: str
    vocab: int
    trained: tuple[str, ...] = ()
    shared: bool = False


def value_of(reference: str) -> str | None:
    """The value's name if the reference is one (`value:NAME`)."""
    kind, _, name = reference.partition(":")
    return name if kind == "value" else None


def gradient_name(value: str, region: str) -> str:
    """The gradient of a value as one of its readers computes it; the value's own gradient is the sum over its readers."""
    return f"d.{value}@{region}"


def load_source(source: str, filename: str) -> dict[str, Any]:
    """Execute a region's source text; tracebacks show its lines under `filename`."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": filename, "__file__": filename}
    exec(compile(source, filename, "exec"), namespace)
    return namespace
