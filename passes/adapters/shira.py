"""SHiRA (arXiv 2406.13175): y = (W + D) x, with D zero except at r (K + N) fixed places whose values are trained.

Dispatch: the input of the linear. Adapter: a sparse matrix. Aggregate: add to the linear's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from codegen.ops import TILE_SPARSE
from passes.adapters.sites import NAME, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import MuxGraph, call, origin, val
from passes.linears import Group, Inputs
from passes.slots import in_order, route_key, slots_of
from passes.task import Task
from runtime.tables import Param, Table

_SUPPORTED = frozenset({"r", "mask_type", "mask_fn", "random_seed", "target_modules", "fan_in_fan_out", "init_weights"})


@dataclass(frozen=True, slots=True)
class Site:
    """SHiRA of one task at one linear [K -> N]: `count` values. `choose`: where they lie, [2, count] int32, of a fresh adapter."""

    name: str
    in_features: int
    out_features: int
    count: int
    fresh: bool
    choose: Callable[[Site, nn.Module], Tensor]

    @property
    def keys(self) -> tuple[str, str]:
        """PEFT's names of the values and of their (output, input)."""
        return f"{key(self.name)}.shira_weight", f"{key(self.name)}.shira_indices"

    @property
    def reads(self) -> tuple[str, ...]:
        """The backbone's tensors that `start` reads: random places need none."""
        return (f"{self.name}.weight",) if isinstance(self.choose, partial) else ()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return dict(zip(self.keys, ((self.count,), (2, self.count)), strict=True))

    def fault(self, weights: Mapping[str, Tensor]) -> str:
        """What is wrong with the tensors of a file."""
        out, into = weights[self.keys[1]].long()
        inside = (out >= 0) & (out < self.out_features) & (into >= 0) & (into < self.in_features)
        if not inside.all():
            return f"{self.keys[1]!r} has places outside of [{self.out_features}, {self.in_features}]"
        return "" if (out * self.in_features + into).unique().numel() == self.count else f"{self.keys[1]!r} has a place twice"


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did; `config` ends up as PEFT would save it."""
    refuse_fields(task, config, _SUPPORTED)
    if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
        raise ValueError(f"task {task.name!r}: r={config.r!r} must be a positive integer")
    refuse_unknown_targets(task, config, skeleton)
    # Without weights there is no mask, and of all ranks the smallest fits wherever one does.
    given = copy.copy(config)
    given.mask_fn, given.r = None, 1
    inject(task, given, skeleton)
    config.target_modules, config.fan_in_fan_out = given.target_modules, given.fan_in_fan_out
    from peft.tuners.shira import ShiraLayer
    from peft.tuners.shira.mask_functions import random_mask

    choose = _random(config.random_seed) if config.mask_fn is random_mask else partial(_masked, task, config)
    sites = []
    for name, module in skeleton.named_modules():
        if isinstance(module, ShiraLayer) and NAME in module.shira_weight:
            features, outputs = module.in_features, module.out_features
            count = config.r * (features + outputs)
            if count > features * outputs:
                raise ValueError(
                    f"task {task.name!r}: r={config.r} asks for {count} values at {name!r}, which has {features * outputs}"
                )
            sites.append(Site(name, features, outputs, count, bool(config.init_weights), choose))
    if not sites:
        raise no_site(task, config)
    return sites


def _random(seed: int | None) -> Callable[[Site, nn.Module], Tensor]:
    """PEFT's random mask: the same places in every linear of a shape; without a seed those of torch's default one."""

    @cache  # the largest take a second to draw
    def draw(outputs: int, features: int, count: int) -> Tensor:
        own = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
        chosen = torch.randperm(outputs * features, generator=own)[:count].sort().values
        return torch.stack([chosen // features, chosen % features]).int()

    return lambda site, linear: draw(site.out_features, site.in_features, site.count)


def _masked(task: Task, config: Any, site: Site, linear: nn.Module) -> Tensor:
    """The places of a mask of the user's own."""
    if config.mask_fn is None:
        raise ValueError(f"task {task.name!r}: mask_type={config.mask_type!r} needs a function of yours: set config.mask_fn")
    own = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    with torch.random.fork_rng(devices=[]):
        mask = config.mask_fn(linear, config.r, **own)
    weight: Any = linear.weight
    if not isinstance(mask, Tensor) or mask.shape != weight.shape:
        raise ValueError(f"task {task.name!r}: mask_fn must return a mask {tuple(weight.shape)}")
    found = torch.stack(torch.where(mask == 1)).int().cpu()
    if found.shape[1] != site.count:
        raise ValueError(f"task {task.name!r}: mask_fn must return a mask of {site.count} ones, r (K + N), not {found.shape[1]}")
    return found


def start(sites: Sequence[Site], model: nn.Module) -> dict[str, Tensor]:
    """The places of the values, which begin with zeros."""
    found = {}
    for site in sites:
        linear: Any = model.get_submodule(site.name)
        base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
        found[site.keys[1]] = site.choose(site, base)
    return found


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """Behind each linear the product with the task's own matrix, for its rows."""
    for site in sites:
        for node in linears(graph, task, site.name):
            out = _insert(graph, f"{site.name}.shira@{task}", {task: site}, (task,), node)
            # The record by which `fuse` finds the node again in its own copy of the graph.
            out.meta["mux_shira"] = (task, site)


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Take the attached nodes out again; matrices of as many values behind one linear are then one node."""
    found: dict[tuple[fx.Node, int], dict[str, Site]] = {}
    for node in list(graph.gm.graph.nodes):
        if "mux_shira" in node.meta:
            task, site = node.meta["mux_shira"]
            found.setdefault((origin(node), site.count), {})[task] = site
            node.replace_all_uses_with(node.args[0])
            graph.gm.graph.erase_node(node)
    # In an order of their own, whoever came first: regions that differ by it alone share their code.
    for (base, count), sites in sorted(found.items(), key=lambda item: item[0][1]):
        name = f"{next(iter(sites.values())).name}.shira.n{count}"
        slots = slots_of(in_order(graph, sites), reserve, previous.get(f"{name}.values"))
        _insert(graph, name, sites, slots, base)


def _insert(graph: MuxGraph, name: str, sites: Mapping[str, Site], slots: tuple[str, ...], linear: fx.Node) -> fx.Node:
    """Right behind the linear, for all who read it; returns the sum."""
    readers, some, inputs = list(linear.users), next(iter(sites.values())), Inputs(graph, linear)
    count, dtype, route = some.count, str(val(linear).dtype).removeprefix("torch."), route_key(slots)
    values = Table(f"{name}.values", (len(slots), 1, count), slots, True, route, dtype)
    places = Table(f"{name}.places", (len(slots), 2, count), slots, False, route, "int32")
    graph.tables.update({table.name: table for table in (values, places)})
    for task, site in sites.items():
        slot, (value, place) = slots.index(task), site.keys
        graph.params[task, value] = Param(task, value, values.name, slot, 0, 1, False, std=0.0 if site.fresh else 1.0, flat=True)
        graph.params[task, place] = Param(task, place, places.name, slot, 0, 2, False)
    args = (linear, linear.args[0], inputs.table(values), inputs.table(places), inputs.route(values), some.out_features, False)
    with graph.gm.graph.inserting_before(linear.next):
        out = call(graph.gm, TILE_SPARSE, args, linear)
    for reader in readers:
        reader.replace_input_with(linear, out)
    return out
