"""Prefix tuning (arXiv 2101.00190): learned keys and values that every position of a task's sequences sees, in every layer.

Dispatch: attention. Adapter: P keys and P values for each key/value head, trained as they are or through a two-layer MLP.
Aggregate: one softmax over them and the sequence's own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from codegen.ops import ATTENTION, PREFIXED_ATTENTION
from passes.adapters import prompt
from passes.adapters.sites import bucket_of, refuse_fields
from passes.graph import MuxGraph, module_of, val
from passes.linears import Group, Inputs
from passes.slots import in_order, route_key, slots_of
from passes.task import Task
from runtime.tables import Encoding, Input, Place, Table

NAME = "prefix"
_SUPPORTED = frozenset(
    {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size",
     "prefix_projection", "init_weights"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """The prefix of all layers: P keys and values of `heads` * `size` features in each.

    `hidden`: width of the projection, 0 if there is none; `zero`: a fresh prefix is all zeros.
    """

    name: str
    count: int
    layers: int
    heads: int
    size: int
    hidden: int
    zero: bool

    @property
    def bucket(self) -> int:
        """The rows of a key/value head in tables."""
        return bucket_of(self.count)

    @property
    def position_offset(self) -> int:
        """The prefix stands before the sequence: as keys in a cache it takes the first positions, though nothing rotates it."""
        return self.count

    @property
    def encoder(self) -> str:
        return "prefix_projection" if self.hidden else "prefix"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What is trained, drawn as PEFT's PrefixEncoder draws it."""
        features = self.heads * self.size
        if not self.hidden:
            shape = (self.count, self.layers * 2 * features)
            return (Input("embedding.weight", prompt.KEY, shape, std=0.0 if self.zero else 1.0),)
        return (
            prompt.embedding(self.count, features),
            *prompt.linear("transform.0", features, self.hidden),
            *prompt.linear("transform.2", self.hidden, self.layers * 2 * features, zero=self.zero),
        )

    @property
    def finished(self) -> str:
        """PEFT's file holds the keys and values themselves, which a projection cannot be had back from."""
        return prompt.KEY if self.hidden else ""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return {given.key: given.shape for given in self.inputs}


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """The prefix that the config asks for; `config` ends up as PEFT would save it.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_fields(task, config, _SUPPORTED)
    count = prompt.virtual_tokens(task, config)
    if config.init_weights not in (None, "zero"):
        raise ValueError(f"task {task.name!r}: init_weights={config.init_weights!r} is not supported (None, 'zero')")
    _fill_sizes(task, config, skeleton)
    heads, features = config.num_attention_heads, config.token_dim
    if features % heads:
        raise ValueError(f"task {task.name!r}: token_dim={features} is not a multiple of num_attention_heads={heads}")
    hidden = prompt.positive(task, config, "encoder_hidden_size") if config.prefix_projection else 0
    return [Site(NAME, count, config.num_layers, heads, features // heads, hidden, config.init_weights == "zero")]


def _fill_sizes(task: Task, config: Any, skeleton: nn.Module) -> None:
    """Let PEFT read the sizes off the backbone: where heads share keys and values, these give num_attention_heads and token_dim."""
    from peft.utils.other import _prepare_prompt_learning_config

    try:
        _prepare_prompt_learning_config(config, getattr(skeleton, "config", {}))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"task {task.name!r}: peft_type={config.peft_type.value}: {' '.join(str(error).split())}") from error
    config.num_transformer_submodules = 1
    for field in ("num_layers", "num_attention_heads", "token_dim"):
        prompt.positive(task, config, field)


# --- nodes -----------------------------------------------------------------------------------------------------------


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """In every layer attention with the task's own keys and values, behind those of the tasks before it."""
    (site,) = sites
    nodes = [node for node in graph.gm.graph.nodes if node.target in (ATTENTION, PREFIXED_ATTENTION)]
    _check_layers(task, site, nodes)
    places = []
    for node in nodes:
        held = node.meta.get("mux_prefixes", ())
        name = f"{module_of(node)}.prefix{site.bucket}@{task}"
        banks = [*_banks(node), _bank(graph, name, {task: site}, (task,), node)]
        # The record by which `fuse` finds the node again in its own copy of the graph.
        _write(graph, node, banks).meta["mux_prefixes"] = (*held, (task, site))
        places.append(_place(name, site, 0))
    settings: dict[str, int | float | str] = {"layers": site.layers, "heads": site.heads, "bucket": site.bucket}
    graph.encodings[task, NAME] = Encoding(task, NAME, site.encoder, site.inputs, tuple(places), settings=settings)


def _check_layers(task: str, site: Site, nodes: Sequence[fx.Node]) -> None:
    if len(nodes) != site.layers:
        raise ValueError(f"task {task!r}: num_layers={site.layers}, but the forward attends {len(nodes)} times")
    if len({module_of(node) for node in nodes}) != len(nodes):
        raise ValueError(f"task {task!r}: a module of the backbone attends more than once, which PREFIX_TUNING does not know")
    for node in nodes:
        where, (_, heads, size) = module_of(node), val(node.args[1]).shape
        if (heads, size) != (site.heads, site.size):
            raise ValueError(
                f"task {task!r}: num_attention_heads={site.heads} and token_dim={site.heads * site.size} do not fit {where!r}, "
                f"which has {heads} key/value heads of {size} features"
            )
        # A cache layer of transformers that slides drops keys as tokens come, the prefix's first.
        if node.args[-1]:
            raise ValueError(
                f"task {task!r}: peft_type=PREFIX_TUNING is not supported with the sliding window of {where!r} ({node.args[-1]})"
            )


@dataclass(frozen=True, slots=True)
class _Bank:
    """What the operator reads of one bucket: keys and values, lengths, route."""

    kv: fx.Node
    lengths: fx.Node
    route: fx.Node


def _banks(node: fx.Node) -> list[_Bank]:
    if node.target is ATTENTION:
        return []
    return [_Bank(*nodes) for nodes in zip(*node.args[3:6], strict=True)]


def _bank(graph: MuxGraph, name: str, sites: Mapping[str, Site], slots: tuple[str, ...], node: fx.Node) -> _Bank:
    """The tables of some tasks of one bucket at one layer."""
    inputs, value = Inputs(graph, node.args[1]), val(node.args[1])
    some, route = next(iter(sites.values())), route_key(slots)
    shape, dtype = (len(slots), 2 * some.heads * some.bucket, some.size), str(value.dtype).removeprefix("torch.")
    kv = Table(f"{name}.kv", shape, slots, True, route, dtype)
    counts = tuple(float(sites[task].count) if task in sites else 0.0 for task in slots)
    lengths = Table(f"{name}.lengths", (len(slots),), slots, False, route, values=counts)
    graph.tables.update({table.name: table for table in (kv, lengths)})
    return _Bank(inputs.table(kv), inputs.table(lengths), inputs.route(kv))


def _place(name: str, site: Site, row: int) -> Place:
    return Place(f"{name}.kv", row, 0, 2 * site.heads * site.bucket)


def _write(graph: MuxGraph, node: fx.Node, banks: Sequence[_Bank]) -> fx.Node:
    """The same attention over these tables, in the node's place."""
    gm = graph.gm
    tables = [[getattr(bank, part) for bank in banks] for part in ("kv", "lengths", "route")]
    rest = node.args[3:] if node.target is ATTENTION else node.args[6:]
    with gm.graph.inserting_before(node):
        joint = gm.graph.call_function(PREFIXED_ATTENTION, (*node.args[:3], *tables, *rest))
    joint.meta = dict(node.meta)
    assert all(user.target is operator.getitem for user in node.users)
    node.replace_all_uses_with(joint)
    gm.graph.erase_node(node)
    return joint


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The prefixes of one bucket are one table in each layer.

    Each bucket keeps its own: were all padded to the longest, a neighbour's length would decide how many columns a task's scores
    have, and with them the loops of its products and the order of its sums: its bits.
    """
    places: dict[str, list[Place]] = {}
    for node in [node for node in graph.gm.graph.nodes if "mux_prefixes" in node.meta]:
        found: dict[int, dict[str, Site]] = {}
        for task, site in node.meta["mux_prefixes"]:
            found.setdefault(site.bucket, {})[task] = site
        banks = []
        for bucket, sites in found.items():
            name = f"{module_of(node)}.prefix{bucket}"
            slots = slots_of(in_order(graph, sites), reserve, previous.get(f"{name}.kv"))
            banks.append(_bank(graph, name, sites, slots, node))
            for task, site in sites.items():
                places.setdefault(task, []).append(_place(name, site, slots.index(task)))
        _write(graph, node, banks)
    for task, outputs in places.items():
        graph.encodings[task, NAME] = replace(graph.encodings[task, NAME], outputs=tuple(outputs))
