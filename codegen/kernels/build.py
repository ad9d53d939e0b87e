"""Kernel text -> something to call, loaded on first use, once for each text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from runtime.region import load_source


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel: `key` says what was asked for, `name` its family and its content, `source` is the text that runs."""

    key: str
    name: str
    source: str

    def __call__(self, *tensors: Any) -> None:
        """Run; over tensors of the device "meta": only be noted, see `noted`."""
        if tensors[0].is_meta:
            _NOTED.get().append((self, tensors))
        else:
            load(self.source)(*tensors)


_LOADED: dict[str, Callable[..., None]] = {}
_GIVEN: dict[str, str] = {}


def give(sources: Mapping[str, str]) -> None:
    """Texts to run for these keys from now on, in place of freshly emitted ones: those of a saved artifact."""
    _GIVEN.update(sources)


def launch(family: str, key: str, emit: Callable[[], str]) -> Launch:
    """The kernel that was given for a key, or the one that `emit` writes."""
    key = f"{family} {key}"
    source = _GIVEN.get(key) or emit()
    return Launch(key, f"{family}_{digest(source)}", source)


def digest(source: str) -> str:
    """A kernel's name by its content."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def load(source: str) -> Callable[..., None]:
    """The `launch` of a kernel's text. Equal texts share one compilation; Triton keeps binaries by their content as well."""
    if source not in _LOADED:
        _LOADED[source] = load_source(source, f"<mux kernel {digest(source)}>")["launch"]
    return _LOADED[source]


Call = tuple[Launch, tuple[Any, ...]]
_NOTED: ContextVar[list[Call]] = ContextVar("noted")


@contextmanager
def noted() -> Iterator[list[Call]]:
    """Within: kernels that are called on meta tensors are listed, with their arguments, and do not run."""
    found: list[Call] = []
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


def compile_all(calls: Iterable[Call]) -> None:
    """Compile these kernels for arguments like these, beside each other.

    Triton's frontend is Python and holds the interpreter's lock; the passes behind it do not.
    """
    listed = list(calls)
    if not listed:
        return
    import triton

    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for launch, tensors in listed:
            load(launch.source)(*tensors, warmup=True)
