"""IA3 (arXiv 2205.05638): y = l * (W x), or y = W (l * x) in feed-forward modules.

Dispatch: the output of the linear, or its input. Adapter: a vector. Aggregate: multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from passes import vectors
from passes.adapters.sites import NAME, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import LINEAR, MuxGraph
from passes.linears import Group
from passes.task import Task
from passes.vectors import Learned, Vector
from runtime.tables import Table

_SUPPORTED = frozenset({"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})


@dataclass(frozen=True, slots=True)
class Site:
    """IA3 of one task at one linear; `shape` is [1, K] where it scales the input, [N, 1] where it scales the output."""

    name: str
    feedforward: bool
    shape: tuple[int, ...]
    fresh: bool

    @property
    def learned(self) -> Learned:
        # PEFT begins with ones, which change nothing, or with normal numbers.
        return Learned(f"{key(self.name)}.ia3_l", self.shape, fill=1.0, std=0.0 if self.fresh else 1.0)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return {self.learned.key: self.shape}


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did."""
    refuse_fields(task, config, _SUPPORTED)
    for field in ("target_modules", "feedforward_modules"):
        refuse_unknown_targets(task, config, skeleton, field)
    inject(task, config, skeleton)
    from peft.tuners.ia3 import IA3Layer

    sites = []
    for name, module in skeleton.named_modules():
        if isinstance(module, IA3Layer) and NAME in module.ia3_l:
            shape = tuple(module.ia3_l[NAME].shape)
            if len(shape) != 2:
                kind = type(module.get_base_layer()).__name__
                raise ValueError(f"task {task.name!r}: target_modules selects {name!r}, a {kind}; IA3 runs on linear layers here")
            sites.append(Site(name, bool(module.is_feedforward), shape, bool(config.init_ia3_weights)))
    if not sites:
        raise no_site(task, config)
    return sites


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """A scale behind each linear, or before it."""
    for site in sites:
        for node in linears(graph, task, site.name):
            if not site.feedforward:
                vectors.attach(graph, Vector(task, f"{site.name}.ia3", scale=site.learned), node, behind=node)
                continue
            x = _alone(task, site, node)
            vectors.attach(graph, Vector(task, f"{site.name}.ia3.input", scale=site.learned), x, behind=x, users=[node])


def _alone(task: str, site: Site, node: fx.Node) -> fx.Node:
    """The linear's input. Linears of one input are one node: none of them can have an input of its own."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    root = x
    while "mux_vector" in root.meta:
        root = root.args[0]
    readers = [user for user in root.users if user.target is LINEAR and user is not node]
    if readers:
        other = readers[0].meta["mux_module"]
        raise ValueError(
            f"task {task!r}: feedforward_modules selects {site.name!r}, whose input {other!r} reads as well: that is not supported"
        )
    return x


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Vectors of one place are joined."""
    vectors.fuse(graph, reserve=reserve, previous=previous)
