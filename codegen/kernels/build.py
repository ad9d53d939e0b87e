"""Kernel text -> a launcher, once for each text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from runtime.region import load_source

Launch = Callable[..., None]
_LOADED: dict[str, Launch] = {}


def digest(source: str) -> str:
    """A kernel's name by its content."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def load(source: str) -> Launch:
    """The `launch` of a kernel's text. Equal texts share one compilation; Triton keeps binaries by their content as well."""
    name = digest(source)
    if name not in _LOADED:
        module: dict[str, Any] = load_source(source, f"<mux kernel {name}>")
        _LOADED[name] = module["launch"]
    return _LOADED[name]
