"""muxcompile: train many PEFT adapters of different tasks together on one frozen LLM backbone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muxcompile.artifact import load_artifact as load_artifact
    from muxcompile.driver import compile as compile
    from muxcompile.model import CompiledModel as CompiledModel
    from muxcompile.options import Options as Options
    from muxcompile.plan import Plan as Plan
    from muxcompile.result import StepResult as StepResult
    from passes.adapters import Kind as Kind
    from passes.adapters import register_kind as register_kind
    from passes.adapters.bitfit import BitFitConfig as BitFitConfig
    from passes.adapters.bottleneck import BottleneckConfig as BottleneckConfig
    from passes.task import Task as Task

__version__ = "0.1.0"

# Names are imported when they are first used: the command line starts fast, and a loaded artifact never imports the compiler.
_HOME = {
    "compile": "muxcompile.driver",
    "Task": "passes.task",
    "Options": "muxcompile.options",
    "CompiledModel": "muxcompile.model",
    "StepResult": "muxcompile.result",
    "Plan": "muxcompile.plan",
    "load_artifact": "muxcompile.artifact",
    "BitFitConfig": "passes.adapters.bitfit",
    "BottleneckConfig": "passes.adapters.bottleneck",
    "Kind": "passes.adapters",
    "register_kind": "passes.adapters",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'muxcompile' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
