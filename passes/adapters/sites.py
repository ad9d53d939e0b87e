"""What kinds share: PEFT's own injection into a weightless copy, refusals that name the field, and the nodes of a site."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.graph import MuxGraph
from passes.task import Task

# What tables pad a rank or a number of virtual tokens to: a task's own decides, so that no neighbour changes its arithmetic.
BUCKETS = (8, 16, 32, 64, 128, 256)
# The name in the throw-away injection: a task's own may hold what a module's name cannot, such as a dot.
NAME = "default"
# Fields that say where a config comes from, not what it does.
_ABOUT = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",
    }
)


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str) for one in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wholes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_whole, value))


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and _names(list(value)) and all(map(fits, value.values()))


_TARGETS: tuple[str, Callable[[Any], bool]] = ("a string or a list of strings", lambda v: isinstance(v, str) or _names(v))
# What PEFT takes for something else, or fails over in its depths, if it is of another type.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), _TARGETS),
    "modules_to_save": ("a list of strings", _names),
    "layers_to_transform": ("an integer or a list of integers", lambda v: _whole(v) or _wholes(v)),
    "token_indices": ("a list of integers", _wholes),
    "trainable_token_indices": ("a list of integers, or one by module", lambda v: _wholes(v) or _by_name(_wholes)(v)),
    "rank_pattern": ("integers by module", _by_name(_whole)),
    "alpha_pattern": ("numbers by module", _by_name(_number)),
    **dict.fromkeys(("lora_alpha", "d_initial"), ("a number", _number)),
    **dict.fromkeys(("projection_prng_key", "random_seed"), ("an integer", _whole)),
    "runtime_config": ("a peft.LoraRuntimeConfig", lambda v: hasattr(v, "ephemeral_gpu_offload")),
}
_NEEDED = ("lora_alpha", "d_initial", "projection_prng_key")


def bucket_of(size: int) -> int:
    """What a table pads `size` rows to."""
    return next(bucket for bucket in BUCKETS if size <= bucket)


def key(site: str) -> str:
    """The beginning of PEFT's keys of a module's tensors."""
    return f"base_model.model.{site}"


def refuse_fields(task: Task, config: Any, supported: Collection[str]) -> None:
    """Every field that the kind does not give its PEFT meaning must keep its default."""
    default = type(config)()
    for field in vars(default):
        if field in supported or field in _ABOUT or field.startswith("_"):
            continue
        given = getattr(config, field)
        if given != getattr(default, field) and given not in (None, [], {}, False):
            raise ValueError(f"task {task.name!r}: {field}={given!r} is not supported")
    refuse_types(task, config)


def refuse_types(task: Task, config: Any) -> None:
    """A quoted "false" is true to whoever asks whether it is: booleans must be booleans, and other fields what they are named for.

    None stands for what the kind makes of it; files that other tools write hold it in place of False.
    """
    flags = {own.name for own in fields(config) if own.type in (bool, "bool")} if is_dataclass(config) else set()
    for field, given in vars(config).items():
        what, fits = ("True or False", lambda v: isinstance(v, bool)) if field in flags else _TYPES.get(field, ("", bool))
        if what and not fits(given) and (given is not None or field in _NEEDED):
            raise ValueError(f"task {task.name!r}: {field}={given!r} must be {what}")


def dropout_of(task: Task, config: Any, field: str) -> float:
    """A probability of dropout.

    Raises:
        ValueError: it is none.
    """
    given = getattr(config, field)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1:
        raise ValueError(f"task {task.name!r}: {field}={given!r} must be at least 0 and below 1")
    return float(given)


def refuse_unknown_targets(task: Task, config: Any, skeleton: nn.Module, field: str = "target_modules") -> None:
    """PEFT is content if any entry of a list matches; a misspelt second entry would be ignored without a word."""
    names = [name for name, _ in skeleton.named_modules() if name]
    targets = getattr(config, field)
    if targets is None or isinstance(targets, str):
        return
    known = set(names)
    for target in sorted(targets):
        if target not in known and not any(name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            close = difflib.get_close_matches(target.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.0)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise ValueError(f"task {task.name!r}: {field} names {target!r}, which the backbone does not have{hint}")


def inject(task: Task, config: Any, skeleton: nn.Module) -> None:
    """Let PEFT put the adapter into the weightless copy; `config` ends up as PEFT would save it.

    Raises:
        ValueError: PEFT's reason, naming the task and its targets.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT warns of fan_in_fan_out beside Conv1D and corrects it; the forward pass does not depend on it.
            warnings.simplefilter("ignore")
            # As `inject_adapter_in_model` does it, which refuses kinds whose sites share tensors.
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](skeleton, config, adapter_name=NAME, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, re.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"task {task.name!r}: target_modules={_brief(config.target_modules)}: {reason}") from error


def no_site(task: Task, config: Any) -> ValueError:
    return ValueError(f"task {task.name!r}: target_modules={config.target_modules!r} selects no layer of the backbone")


def _brief(targets: Any) -> str:
    return repr(targets if targets is None or isinstance(targets, str) else sorted(targets))


def linears(graph: MuxGraph, task: str, site: str) -> list[fx.Node]:
    """The linear nodes of a module.

    Raises:
        ValueError: the forward runs no linear there, or more than that: PEFT's adapter reads what the module reads, and is added to
            what it returns.
    """
    if site in graph.mixed:
        raise ValueError(
            f"task {task!r}: target_modules selects {site!r}, which computes more than a linear ({graph.mixed[site]}; a hook may): "
            "an adapter would stand within it"
        )
    nodes = graph.sites().get(site)
    if nodes is None:
        raise ValueError(f"task {task!r}: target_modules selects {site!r}, which the forward does not run as a linear")
    return nodes
