"""How LoRA's tensors start (`LoraConfig.init_lora_weights`), and what PEFT's files say of it.

Where PEFT takes the start out of the backbone's weight (PiSSA, OLoRA), our tables hold the difference to it: `runtime/residual.py`.
PEFT computes the start again from the untouched weight when it reads a file, and so do we. A randomised start would be another one
then: of `pissa_niter_N` the file holds the finished difference, a plain LoRA of rank 2 r (PEFT's own conversion).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from passes.adapters.sites import BUCKETS
from passes.task import Task
from runtime.residual import orthogonal
from runtime.training import generator

_RANDOMISED = re.compile(r"pissa_niter_(\d+)")
_REFUSED = {
    "eva": "is computed from data: run initialize_lora_eva_weights on a PeftModel, and give that model or its folder",
    "lora_ga": "starts from gradients of data, and takes a part out of the backbone's weights that a file does not hold: give the "
    "folder that PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) writes",
    "corda": "starts from statistics of data, and takes a part out of the backbone's weights that a file does not hold: give the "
    "folder that PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) writes",
    "loftq": "replaces the backbone's weights by quantised ones, which all tasks would share",
}


class Site(Protocol):
    """What a start depends on."""

    @property
    def name(self) -> str: ...
    @property
    def r(self) -> int: ...
    @property
    def scaling(self) -> float: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def transposed(self) -> bool: ...


def residual(init: Any) -> str:
    """The start of `runtime.encoders.STARTS` that is a part of the weight, or "" """
    if init == "pissa" or (isinstance(init, str) and _RANDOMISED.fullmatch(init)):
        return "pissa"
    return "olora" if isinstance(init, str) and init.lower() == "olora" else ""


def niter(init: Any) -> int | None:
    """How many iterations of a randomised SVD; None: the start can be computed again from the weight."""
    found = _RANDOMISED.fullmatch(init) if isinstance(init, str) else None
    return int(found[1]) if found else None


def rewrites(config: Any) -> str:
    """What makes PEFT write the backbone's weights when it injects the adapter."""
    init = config.init_lora_weights
    return f"init_lora_weights={init!r}" if residual(init) or init in ("corda", "lora_ga", "loftq") else ""


def refuse(task: Task, config: Any) -> None:
    """
    Raises:
        ValueError: a start that is not known, needs what nobody gave, or does not go with another field.
    """
    init = config.init_lora_weights
    if not isinstance(init, bool) and init not in ("gaussian", "orthogonal", "eva") and not residual(init):
        known = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora'"
        reason = _REFUSED.get(str(init), f"is not known ({known})")
        raise ValueError(f"task {task.name!r}: init_lora_weights={init!r} is not supported: it {reason}")
    if residual(init) and config.lora_dropout:
        raise ValueError(
            f"task {task.name!r}: init_lora_weights={init!r} with lora_dropout={config.lora_dropout!r} is not supported: what is "
            "taken out of the backbone's weight is not dropped, what is trained in its place would be"
        )


def refuse_site(task: Task, init: Any, site: Site) -> None:
    """
    Raises:
        ValueError: a start that PEFT cannot make at this linear, or makes wrongly.
    """
    where, name = f"task {task.name!r}: init_lora_weights={init!r} at {site.name!r}", residual(init)
    if init == "orthogonal" and site.r % 2:
        raise ValueError(f"{where}: r={site.r} must be even")
    if not name:
        return
    most = min(site.in_features, site.out_features)
    if site.r > most:
        raise ValueError(f"{where}: r={site.r} is more than the {most} ranks of the weight")
    if 2 * site.r > BUCKETS[-1]:
        raise ValueError(f"{where}: r={site.r} is outside 1..{BUCKETS[-1] // 2}: it takes up twice its rank")
    if name == "pissa" and site.scaling <= 0:
        raise ValueError(f"{where}: lora_alpha must be above 0, it divides the singular values")
    if name == "olora" and site.transposed:
        raise ValueError(f"{where}: a Conv1D is not supported: PEFT decomposes the weight as it is stored, turned over")


def fresh(task: str, seed: int, init: Any, sites: Iterable[tuple[Site, tuple[str, str]]]) -> dict[str, Tensor]:
    """What a fresh adapter's A and B start with, by key, where they are not drawn one by one.

    Raises:
        ValueError: they can only be given.
    """
    if init == "eva":
        raise ValueError(f"task {task!r}: init_lora_weights='eva' {_REFUSED['eva']}")
    found: dict[str, Tensor] = {}
    for site, keys in sites if init == "orthogonal" else ():
        own = generator(seed, task, f"{site.name}.orthogonal")
        found.update(zip(keys, orthogonal((site.r, site.in_features, site.out_features), own), strict=True))
    return found


def as_filed(config: Any) -> None:
    """Make the config, in place, what belongs to the tensors of the file: a plain LoRA of twice the rank and the same scaling."""
    if niter(config.init_lora_weights) is None:
        return
    # alpha / r, and alpha / sqrt(r) of rsLoRA
    factor = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {pattern: factor * alpha for pattern, alpha in (config.alpha_pattern or {}).items()}
