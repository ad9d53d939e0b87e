"""LoRA (arXiv 2106.09685): y = W x + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

Dispatch: the input of the linear. Adapter: two skinny products. Aggregate: add to the linear's output.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from codegen.ops import DROP, TILE_MM
from passes.adapters.sites import BUCKETS, NAME, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import LINEAR, MuxGraph, after, call, val
from passes.linears import Bank, Group, Inputs
from passes.slots import in_order, route_key, slots_of
from passes.task import Task
from runtime.tables import Param, Table

MAX_RANK = 256

# Fields that this file gives their PEFT meaning; any other field must keep its default.
_SUPPORTED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
    }
)


@dataclass(frozen=True, slots=True)
class Site:
    """LoRA of one task at one linear: y[T, N] += scaling * (dropout(x)[T, K] A^T) B^T, A [r, K], B [N, r]."""

    name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    init: Any
    dropout: float = 0.0

    @property
    def bucket(self) -> int:
        """The rank that tables are padded to; a task's own, so that no neighbour changes its arithmetic."""
        return next(size for size in BUCKETS if self.rank <= size)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return {
            f"{key(self.name)}.lora_A.weight": (self.rank, self.in_features),
            f"{key(self.name)}.lora_B.weight": (self.out_features, self.rank),
        }


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did; `config` ends up as PEFT would save it."""
    refuse_fields(task, config, _SUPPORTED)
    _refuse_values(task, config)
    refuse_unknown_targets(task, config, skeleton)
    inject(task, config, skeleton)
    from peft.tuners.lora import LoraLayer

    sites = []
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.r:
            if NAME not in module.lora_A:
                raise ValueError(
                    f"task {task.name!r}: target_modules selects {name!r}, a {type(module.get_base_layer()).__name__}; "
                    "LoRA runs on linear layers here"
                )
            rank = module.r[NAME]
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"task {task.name!r}: r={rank} at {name!r} is outside 1..{MAX_RANK}")
            b = module.lora_B[NAME].weight
            scaling = float(module.scaling[NAME])
            if not math.isfinite(scaling):
                raise ValueError(f"task {task.name!r}: lora_alpha={module.lora_alpha[NAME]} at {name!r} is not finite")
            features, init = module.lora_A[NAME].weight.shape[1], config.init_lora_weights
            sites.append(Site(name, rank, scaling, features, b.shape[0], init, float(config.lora_dropout)))
    if not sites:
        raise no_site(task, config)
    _warn_unmatched_patterns(task, config, sites)
    return sites


def _refuse_values(task: Task, config: Any) -> None:
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"task {task.name!r}: init_lora_weights={config.init_lora_weights!r} is not supported (True, False or 'gaussian')"
        )
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"task {task.name!r}: lora_dropout={dropout!r} must be at least 0 and below 1")
    if isinstance(config.r, bool) or not isinstance(config.r, int) or not 1 <= config.r <= MAX_RANK:
        raise ValueError(f"task {task.name!r}: r={config.r!r} must be an integer in 1..{MAX_RANK}")


def _warn_unmatched_patterns(task: Task, config: Any, sites: list[Site]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", site.name) for site in sites):
                warnings.warn(
                    f"task {task.name!r}: {field} has {pattern!r}, which matches none of its {len(sites)} sites", stacklevel=2
                )


# --- nodes -----------------------------------------------------------------------------------------------------------


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """Behind each linear: its input as rows [T, K], dropout, down, up, add. Tables of one slot, routed to this task alone."""
    views: dict[fx.Node, fx.Node] = {}
    for site in sites:
        for node in linears(graph, task, site.name):
            _attach(graph, task, site, node, views)


def _attach(graph: MuxGraph, task: str, site: Site, node: fx.Node, views: dict[fx.Node, fx.Node]) -> None:
    """`views` remembers the [T, K] view of each input."""
    gm, x = graph.gm, node.args[0]
    assert isinstance(x, fx.Node)
    if x not in views:
        # Right behind x: another site may read it earlier than this one.
        with gm.graph.inserting_before(after(x)):
            views[x] = call(gm, torch.ops.aten.reshape.default, (x, [graph.tokens, site.in_features]), node)
    bank = _bank(graph, f"{site.name}@{task}", (task,), site.bucket, [{task: site}], val(x).dtype)
    inputs = Inputs(graph, node)
    rows, route = views[x], inputs.route(bank.a)
    users = list(node.users)
    with gm.graph.inserting_before(node.next):
        if bank.drops:
            counters = inputs.counter("sequences"), inputs.counter("positions")
            rows = call(gm, DROP, (rows, inputs.drop(bank.a), inputs.sites(bank), route, *counters), node)
        down = call(gm, TILE_MM, (rows, inputs.table(bank.a), route, None, True), node)
        up = call(gm, TILE_MM, (down, inputs.table(bank.b[0]), route, inputs.table(bank.scale[0]), False), node)
        delta = call(gm, torch.ops.aten.reshape.default, (up, list(val(node).shape)), node)
        out = call(gm, torch.ops.aten.add.Tensor, (node, delta), node)
    for user in users:
        user.replace_input_with(node, out)
    # The record by which `fuse` finds the nodes again in its own copy of the graph.
    down.meta["mux_lora"] = (task, site)


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Take the attached nodes out again and give each group of linears its banks.

    What shares a bank follows from each task's own configuration, so that no neighbour changes its arithmetic: tasks of one rank
    bucket that adapt the same linears of an input, with dropout or without.
    """
    adapted: dict[fx.Node, dict[str, Site]] = {}
    for down in list(graph.gm.graph.nodes):
        if "mux_lora" in down.meta:
            task, site = down.meta["mux_lora"]
            adapted.setdefault(_detach(graph, down), {})[task] = site
    for group in groups:
        banks: dict[tuple[int, bool, tuple[str, ...]], dict[str, list[Site]]] = {}
        sites = [adapted.get(node, {}) for node in group.linears]
        for task in in_order(graph, {task for own in sites for task in own}):
            mine = [own[task] for own in sites if task in own]
            # A task's rows are in one bank: where its own ranks differ (rank_pattern), the largest decides.
            bucket = max(site.bucket for site in mine)
            banks.setdefault((bucket, mine[0].dropout > 0, tuple(site.name for site in mine)), {})[task] = mine
        for (bucket, drops, names), tasks in sorted(banks.items()):
            name = _joint_name(names) + (".dropout" if drops else "")
            slots = slots_of(list(tasks), reserve, previous.get(f"{name}.r{bucket}.A"))
            members = [{task: own[index] for task, own in tasks.items()} for index in range(len(names))]
            group.banks.append(_bank(graph, name, slots, bucket, members, val(group.x).dtype))


def _detach(graph: MuxGraph, down: fx.Node) -> fx.Node:
    """Take one attached adapter out of the chain of additions; returns the linear it belongs to."""
    (up,) = down.users
    (delta,) = up.users
    (out,) = delta.users
    base = out.args[0]
    out.replace_all_uses_with(base)
    graph.gm.graph.erase_node(out)
    while base.target is not LINEAR:
        base = base.args[0]
    assert isinstance(base, fx.Node)
    return base


def _joint_name(names: tuple[str, ...]) -> str:
    """ "layers.0.q_proj+k_proj": the first name, and what distinguishes the others from their common beginning."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return "+".join([names[0], *(".".join(part[common:]) for part in parts[1:])])


# --- tables ----------------------------------------------------------------------------------------------------------


def _bank(
    graph: MuxGraph, name: str, rows: tuple[str, ...], bucket: int, members: list[dict[str, Site]], dtype: torch.dtype
) -> Bank:
    sites = [next(iter(tasks.values())) for tasks in members]
    slots, route = len(rows), route_key(rows)
    name, text = f"{name}.r{bucket}", str(dtype).removeprefix("torch.")
    a = Table(f"{name}.A", (slots, bucket * len(sites), sites[0].in_features), rows, True, route, text)
    b = tuple(
        Table(f"{name}.B{index}", (slots, bucket, site.out_features), rows, True, route, text) for index, site in enumerate(sites)
    )
    scale = tuple(
        Table(
            f"{name}.scale{index}", (slots,), rows, False, route, values=tuple(tasks[row].scaling if row else 0.0 for row in rows)
        )
        for index, tasks in enumerate(members)
    )
    graph.tables.update({table.name: table for table in (a, *b, *scale)})
    for index, tasks in enumerate(members):
        for slot, task in enumerate(rows):
            if task:
                graph.params.update(_params(task, tasks[task], slot, a.name, index * bucket, b[index].name))
    names = tuple(site.name for site in sites)
    return Bank(bucket, a, b, scale, names, sites[0].dropout > 0)


def _params(task: str, site: Site, slot: int, a: str, start: int, b: str) -> dict[tuple[str, str], Param]:
    """Where PEFT's tensors lie, and how PEFT draws fresh ones (init_lora_weights)."""
    linear = 1 / math.sqrt(site.in_features)  # kaiming_uniform_(a=sqrt(5)), torch's own for linear layers
    gaussian = site.init == "gaussian"
    (key_a, _), (key_b, _) = site.tensors().items()
    return {
        (task, key_a): Param(
            task,
            key_a,
            a,
            slot,
            start,
            start + site.rank,
            False,
            bound=0.0 if gaussian else linear,
            std=1 / site.rank if gaussian else 0.0,
        ),
        (task, key_b): Param(
            task, key_b, b, slot, 0, site.rank, True, bound=1 / math.sqrt(site.rank) if site.init is False else 0.0
        ),
    }
