"""BitFit (arXiv 2106.10199): a task trains its own copy of the backbone's biases. PEFT has no such kind: the config is here.

Dispatch: the output of a linear or a norm. Adapter: a bias. Aggregate: in place of the backbone's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import vectors
from passes.adapters.config import Config, is_target
from passes.adapters.sites import key, linears, refuse_types, refuse_unknown_targets
from passes.capture import original_name
from passes.graph import LINEAR, MuxGraph, Source
from passes.linears import Group
from passes.task import Task
from passes.vectors import Learned, Vector
from runtime.tables import Table

_NORM = torch.ops.aten.layer_norm.default


@dataclass(kw_only=True)
class BitFitConfig(Config):
    """Train biases.

    Files hold the trained biases whole, under `base_model.model.<module>.bias`.

    Args:
        target_modules: ends of module names, or one regular expression for whole names; None: every module that has a bias.
        exclude_modules: the same, to leave out.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    peft_type: str = "BITFIT"


@dataclass(frozen=True, slots=True)
class Site:
    """One module's bias of N features; `key` is its name in the file."""

    name: str
    features: int
    key: str

    @property
    def learned(self) -> Learned:
        return Learned(self.key, (self.features,))

    @property
    def reads(self) -> tuple[str, ...]:
        """The backbone's tensors that `start` reads."""
        return (f"{self.name}.bias",)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Keys and shapes in the file."""
        return {self.learned.key: self.learned.shape}


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """The modules that have a bias and are chosen.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_types(task, config)
    for field in ("target_modules", "exclude_modules"):
        refuse_unknown_targets(task, config, skeleton, field)
    sites = []
    for name, module in skeleton.named_modules():
        chosen = config.target_modules is None or is_target(name, config.target_modules)
        if not chosen or (config.exclude_modules is not None and is_target(name, config.exclude_modules)):
            continue
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if bias is not None:
            sites.append(Site(name, bias.numel(), f"{key(name)}.bias"))
        elif config.target_modules is not None and not any(True for _ in module.children()):
            raise ValueError(f"task {task.name!r}: target_modules selects {name!r}, which has no bias")
    if not sites:
        raise ValueError(f"task {task.name!r}: target_modules={config.target_modules!r} selects no module with a bias")
    return sites


def start(sites: Sequence[Site], model: nn.Module) -> dict[str, Tensor]:
    """A fresh copy holds what the backbone's bias holds."""
    weights = {original_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    return {site.learned.key: weights[f"{site.name}.bias"].detach().float().cpu() for site in sites}


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """Behind each module's node the difference of the task's bias and the backbone's, for the task's rows."""
    for site in sites:
        bias = graph.inputs.get(Source("weight", f"{site.name}.bias"))
        for node in _adders(graph, task, site, bias):
            vectors.attach(graph, Vector(task, f"{site.name}.bias", shift=site.learned), node, behind=node, base=bias)


def _adders(graph: MuxGraph, task: str, site: Site, bias: fx.Node | None) -> list[fx.Node]:
    """The nodes that add the bias."""
    added = [user for user in bias.users if user.target in (LINEAR, _NORM) or "mux_bias" in user.meta] if bias is not None else []
    if not added:
        raise ValueError(f"task {task!r}: target_modules selects {site.name!r}, whose bias is added in no way that is known here")
    if added[0].target is LINEAR:
        linears(graph, task, site.name)  # refuses the head
    return added


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Vectors of one place are joined."""
    vectors.fuse(graph, reserve=reserve, previous=previous)
