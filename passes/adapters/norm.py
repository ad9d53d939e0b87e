"""Norm tuning (arXiv 2312.11420, PEFT's LN_TUNING): a task trains its own copy of a norm's weight and bias.

Dispatch: the normalised input of the norm's affine part. Adapter: its weight and bias. Aggregate: in place of the norm's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import vectors
from passes.adapters.sites import inject, key, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import MuxGraph, Source, call, val
from passes.linears import Group
from passes.task import Task
from passes.vectors import Learned, Vector
from runtime.tables import Table

_SUPPORTED = frozenset({"target_modules", "exclude_modules"})
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Site:
    """One norm; `tensor_names` are those of "weight" and "bias" that it has, N features each."""

    name: str
    tensor_names: tuple[str, ...]
    features: int

    def key(self, name: str) -> str:
        """PEFT's key of "weight" or "bias"."""
        return f"{key(self.name)}.ln_tuning_layers.{name}"

    def learned(self, name: str) -> Learned | None:
        return Learned(self.key(name), (self.features,)) if name in self.tensor_names else None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return {self.key(name): (self.features,) for name in self.tensor_names}


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did."""
    refuse_fields(task, config, _SUPPORTED)
    refuse_unknown_targets(task, config, skeleton)
    inject(task, config, skeleton)
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    sites = []
    for name, module in skeleton.named_modules():
        if isinstance(module, LNTuningLayer):
            norm = module.get_base_layer()
            tensors = dict(norm.named_parameters())
            if not tensors or set(tensors) - {"weight", "bias"} or any(tensor.dim() != 1 for tensor in tensors.values()):
                raise ValueError(
                    f"task {task.name!r}: target_modules selects {name!r}, a {type(norm).__name__}; LN_TUNING runs on norms here"
                )
            sites.append(Site(name, tuple(tensors), next(iter(tensors.values())).numel()))
    if not sites:
        raise no_site(task, config)
    return sites


def start(sites: Sequence[Site], model: nn.Module) -> dict[str, Tensor]:
    """A fresh copy holds what the backbone's norm holds."""
    weights = dict(model.named_parameters())
    return {
        f"{key(site.name)}.ln_tuning_layers.{name}": weights[f"{site.name}.{name}"].detach().float().cpu()
        for site in sites
        for name in site.tensor_names
    }


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """Behind each norm the task's own weight and bias over the normalised values, for its rows."""
    for site in sites:
        node, normalised = _norm(graph, task, site)
        vector = Vector(task, f"{site.name}.norm", site.learned("weight"), site.learned("bias"))
        vectors.attach(graph, vector, normalised(), behind=node, otherwise=node)


def _norm(graph: MuxGraph, task: str, site: Site) -> tuple[fx.Node, Callable[[], fx.Node]]:
    """The node of a norm's output, and what makes the value that its weight multiplies."""
    weight = graph.inputs.get(Source("weight", f"{site.name}.weight"))
    found = [user for user in weight.users if user.op == "call_function"] if weight is not None else []
    if len(found) == 1 and (node := found[0]) is not None:
        if node.target is aten.mul.Tensor and site.tensor_names == ("weight",):
            (values,) = [arg for arg in node.args if arg is not weight]
            if isinstance(values, fx.Node) and val(values).shape == val(node).shape and val(values).dtype == val(node).dtype:
                return node, lambda: values
        if node.target in (aten.layer_norm.default, aten.rms_norm.default) and node.args[2] is weight:
            return node, lambda: _without_affine(graph, node)
    raise ValueError(f"task {task!r}: target_modules selects {site.name!r}, whose forward is no norm that is known here")


def _without_affine(graph: MuxGraph, node: fx.Node) -> fx.Node:
    """The same norm without weight and bias; one for all tasks."""
    known: fx.Node | None = node.meta.get("mux_normalised")
    if known is None:
        plain = (*node.args[:2], *(None if isinstance(arg, fx.Node) else arg for arg in node.args[2:]))
        with graph.gm.graph.inserting_before(node):
            known = call(graph.gm, node.target, plain, node)
        node.meta["mux_normalised"] = known
    return known


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Vectors of one place are joined."""
    vectors.fuse(graph, reserve=reserve, previous=previous)
