"""IA3 (arXiv 2205.05638): y = l * (W x), or y = W (l * x) in feed-forward modules.

Dispatch: the output of the linear, or its input. Adapter: a vector. Aggregate: multiply.

Linears of one input are one node, whoever adapts them, so that no neighbour changes a sum. Where others read the scaled input as
well, the linear stays among them, and W ((l - 1) * x) is added: a frozen product more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes import vectors
from passes.adapters.sites import NAME, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import LINEAR, MuxGraph, call
from passes.linears import Group
from passes.task import Task
from passes.vectors import Filled, Learned, Vector
from runtime.tables import Encoding, Input, Table

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

    def beside(self, task: str) -> Vector:
        """l - 1."""
        learned = self.learned
        value = Input("value", learned.key, learned.shape, fill=learned.fill, std=learned.std)
        name = f"{self.name}.ia3.beside"
        return Vector(task, name, scale=Filled(), encoding=Encoding(task, name, "offset", (value,), settings={"offset": -1.0}))

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


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> list[str]:
    """A scale behind each linear, or before it.

    Raises:
        ValueError: a feed-forward module runs on several inputs, of which others read some alone.
    """
    beside = []
    for site in sites:
        nodes = linears(graph, task, site.name)
        if site.feedforward and len({_shared(node) for node in nodes}) > 1:
            raise ValueError(
                f"task {task!r}: feedforward_modules selects {site.name!r}, which runs on several inputs: others read one of them, "
                "and none another"
            )
        for node in nodes:
            if not site.feedforward:
                vectors.attach(graph, Vector(task, f"{site.name}.ia3", scale=site.learned), node, behind=node)
                continue
            x = node.args[0]
            if _shared(node):
                rest = _beside(graph, node)
                vectors.attach(graph, site.beside(task), x, behind=rest, otherwise=rest)
                beside.append(site.name)
            else:
                vectors.attach(graph, Vector(task, f"{site.name}.ia3.input", scale=site.learned), x, behind=x, users=[node])
    if not beside:
        return []
    return [
        f"task {task!r}: IA3 scales the input of {beside[0]!r}, which others read: a frozen product more ({len(beside)} places)"
    ]


def _shared(node: fx.Node) -> bool:
    """Whether other linears read the input of this one: a matter of the backbone, for a scaled input has one reader."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return any(user.target is LINEAR and user is not node for user in x.users)


def _beside(graph: MuxGraph, node: fx.Node) -> fx.Node:
    """y + W z for those who read y = W x + b; returns z, zeros until tasks put their rows in. One for all tasks."""
    known: fx.Node | None = node.meta.get("mux_beside")
    if known is None:
        readers = list(node.users)
        with graph.gm.graph.inserting_before(node.next):
            known = call(graph.gm, torch.ops.aten.zeros_like.default, (node.args[0],), node)
            product = call(graph.gm, LINEAR, (known, node.args[1]), node)
            total = call(graph.gm, torch.ops.aten.add.Tensor, (node, product), node)
        for reader in readers:
            reader.replace_input_with(node, total)
        product.meta["mux_added"] = True
        node.meta["mux_beside"] = known
    return known


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Vectors of one place are joined."""
    vectors.fuse(graph, reserve=reserve, previous=previous)
