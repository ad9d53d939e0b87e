"""The nodes of bottleneck adapters: where they stand in the graph, what they compute, and the tables of all tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from codegen.ops import DROP, TILE_AFFINE, TILE_MM
from passes.adapters.sites import BUCKETS
from passes.graph import MuxGraph, call, module_of, val
from passes.linears import Group, Inputs
from passes.shard import ended
from passes.slots import in_order, route_key, slots_of
from runtime.tables import Param, Table

aten = torch.ops.aten

# What transformers' names mean (AdapterHub takes its activations from there, and adds "leakyrelu"), each one operator.
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (aten.relu.default, {}),
    "leakyrelu": (aten.leaky_relu.default, {}),
    "leaky_relu": (aten.leaky_relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_new": (aten.gelu.default, {"approximate": "tanh"}),
    "gelu_pytorch_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
    "swish": (aten.silu.default, {}),
    "tanh": (aten.tanh.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
}
# The widest bottleneck of one product; a wider one is the sum of several over parts of its tables.
WIDEST = BUCKETS[-1]


class Layout(StrEnum):
    """What an adapter reads. It is added to the sublayer's output, before or behind the residual."""

    SUM = "sum"
    OUTPUT = "output"
    RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class Site:
    """One adapter of one task: R wide, over N features, at the sublayer that ends with the linear `linear`."""

    name: str
    linear: str
    layout: Layout
    size: int
    features: int
    activation: str
    scaling: float
    fresh: bool
    dropout: float = 0.0

    @property
    def bucket(self) -> int:
        """What tables are padded to; a task's own size decides, so that no neighbour changes its arithmetic."""
        return next((size for size in BUCKETS if self.size <= size), -(-self.size // WIDEST) * WIDEST)

    @property
    def place(self) -> str:
        """What adapters that share nodes have in common."""
        return f"{self.name}.{self.layout}.{self.activation}.r{self.bucket}" + (".dropout" if self.dropout else "")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """AdapterHub's keys, less the adapter's name, and shapes."""
        shapes: tuple[tuple[int, ...], ...] = (
            (self.size, self.features),
            (self.size,),
            (self.features, self.size),
            (self.features,),
        )
        names = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
        return {f"{self.name}.{name}": shape for name, shape in zip(names, shapes, strict=True)}


@dataclass(frozen=True, slots=True)
class Ends:
    """What an adapter reads, and the value that it is added to."""

    x: fx.Node
    base: fx.Node


def attach(graph: MuxGraph, task: str, sites: Sequence[Site]) -> None:
    """Behind each sublayer the adapter, for the task's rows."""
    for site in sites:
        out = _insert(graph, f"{site.place}@{task}", {task: site}, (task,))
        # The record by which `fuse` finds the node again in its own copy of the graph.
        out.meta["mux_bottleneck"] = (task, site)


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Take the attached nodes out again; adapters of one place, layout, activation and bucket are then one set of nodes.

    Different sets at one place stand behind each other: their rows are disjoint.
    """
    found: dict[str, dict[str, Site]] = {}
    for node in list(graph.gm.graph.nodes):
        if "mux_bottleneck" in node.meta:
            task, site = node.meta["mux_bottleneck"]
            found.setdefault(site.place, {})[task] = site
            node.replace_all_uses_with(node.args[0])
            _erase(graph, node)
    for name, sites in sorted(found.items()):
        slots = slots_of(in_order(graph, sites), reserve, previous.get(f"{name}.down"))
        _insert(graph, name, sites, slots)


def _erase(graph: MuxGraph, node: fx.Node) -> None:
    """The node, and what only it read."""
    dead = [node]
    while dead:
        node = dead.pop()
        read = node.all_input_nodes
        graph.gm.graph.erase_node(node)
        dead.extend(given for given in read if given.op == "call_function" and not given.users)


# --- places ----------------------------------------------------------------------------------------------------------


def _ends(graph: MuxGraph, task: str, site: Site) -> Ends:
    """Where the adapter stands.

    Raises:
        ValueError: the sublayer's output is not added to what the sublayer read.
    """
    nodes = graph.sites().get(site.linear, [])
    if len(nodes) != 1:
        raise ValueError(f"task {task!r}: peft_type=BOTTLENECK: the forward runs {site.linear!r} {len(nodes)} times as a linear")
    output = ended(nodes[0])
    if site.layout is Layout.OUTPUT:
        return Ends(output, output)
    total, residual = _residual(task, site, output)
    return Ends(total, total) if site.layout is Layout.SUM else Ends(residual, output)


def _residual(task: str, site: Site, output: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The addition that a sublayer ends with, and what it adds: nodes of other modules, the linear's own are adapters'."""
    carried, waiting = {output}, [output]
    sums: set[fx.Node] = set()
    while waiting and len(sums) < 2:
        for user in waiting.pop().users:
            if user.target is aten.add.Tensor and module_of(user) != site.linear:
                sums.add(user)
            elif user not in carried and user.op == "call_function":
                carried.add(user)
                waiting.append(user)
    if len(sums) == 1:
        (total,) = sums
        others = [given for given in total.all_input_nodes if given not in carried]
        if len(others) == 1 and not total.kwargs and val(others[0]).shape == val(total).shape and _reads(output, others[0], site):
            return total, others[0]
    raise ValueError(
        f"task {task!r}: peft_type=BOTTLENECK: the output of {site.linear!r} is not simply added to what its sublayer read, "
        "which the adapter needs"
    )


def _reads(output: fx.Node, residual: fx.Node, site: Site) -> bool:
    """Whether the sublayer computes its output from its residual; the walk back stays in the layer."""
    layer = site.name.rpartition(".")[0]
    seen, waiting = {output}, [output]
    while waiting:
        for given in waiting.pop().all_input_nodes:
            if given is residual:
                return True
            if given not in seen and given.op == "call_function" and f"{module_of(given)}.".startswith(f"{layer}."):
                seen.add(given)
                waiting.append(given)
    return False


# --- nodes and tables ------------------------------------------------------------------------------------------------


def _insert(graph: MuxGraph, name: str, sites: Mapping[str, Site], slots: tuple[str, ...]) -> fx.Node:
    """Write the nodes and hand their result to everybody who read the value."""
    task, site = next(iter(sites.items()))
    ends = _ends(graph, task, site)
    readers = list(ends.base.users)
    with graph.gm.graph.inserting_before(ends.base.next):
        out = _write(graph, name, sites, slots, ends)
    for reader in readers:
        reader.replace_input_with(ends.base, out)
    return out


def _write(graph: MuxGraph, name: str, sites: Mapping[str, Site], slots: tuple[str, ...], ends: Ends) -> fx.Node:
    """base + dropped(scale (up(act(down(x))))), each with its bias, in the rows of the slots; other rows are base + 0."""
    gm, base = graph.gm, ends.base
    some, inputs = next(iter(sites.values())), Inputs(graph, ends.base)
    tables = _tables(graph, name, sites, slots, str(val(base).dtype).removeprefix("torch."))
    down, down_bias, up, up_bias, scale = (inputs.table(table) for table in tables)
    route = inputs.route(tables[0])

    def put(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return call(gm, target, args, base, **kwargs)

    rows = put(aten.reshape.default, ends.x, [graph.tokens, some.features])
    target, extra = ACTIVATIONS[some.activation]
    result = None
    for down_part, bias_part, up_part, where in _parts(put, some.bucket, len(slots), (down, down_bias, up), route):
        narrow = put(TILE_MM, rows, down_part, where, None, True)
        narrow = put(target, put(TILE_AFFINE, narrow, None, bias_part, None, where, None), **extra)
        wide = put(TILE_MM, narrow, up_part, where, None, False)
        result = wide if result is None else put(aten.add.Tensor, result, wide)
    delta = put(TILE_AFFINE, result, None, up_bias, None, route, None)
    # The scaling multiplies the bias as well; in float32, as a number would.
    blocks = put(aten.index_select.default, scale, 0, put(aten.clamp.default, route, 0))
    factor = put(aten.expand.default, put(aten.reshape.default, blocks, [graph.blocks, 1]), [graph.blocks, graph.tile])
    delta = put(aten.mul.Tensor, delta, put(aten.reshape.default, factor, [graph.tokens, 1]))
    if some.dropout:
        counters = inputs.counter("sequences"), inputs.counter("positions")
        delta = put(DROP, delta, inputs.drop(tables[0]), inputs.sites(tables[0], (some.name,)), route, *counters)
    if val(delta).dtype != val(base).dtype:
        delta = put(aten.to.dtype, delta, val(base).dtype)
    return put(aten.add.Tensor, base, put(aten.reshape.default, delta, list(val(base).shape)))


def _parts(
    put: Callable[..., fx.Node], bucket: int, slots: int, tables: tuple[fx.Node, fx.Node, fx.Node], route: fx.Node
) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """Tables of down, its bias and up in parts of at most WIDEST rows, each with its route: part p of slot s is slot s * P + p."""
    parts = max(1, bucket // WIDEST)
    down, bias, up = tables
    features = val(down).shape[2]
    bias = put(aten.reshape.default, bias, [slots * parts, 1, bucket // parts])
    if parts == 1:
        yield down, bias, up, route
        return
    down, up = (put(aten.reshape.default, table, [slots * parts, WIDEST, features]) for table in (down, up))
    first = put(aten.mul.Scalar, route, parts)
    for part in range(parts):
        # Blocks without a slot stay below zero: -P + p.
        yield down, bias, up, put(aten.add.Scalar, first, part)


def _tables(
    graph: MuxGraph, name: str, sites: Mapping[str, Site], slots: tuple[str, ...], dtype: str
) -> tuple[Table, Table, Table, Table, Table]:
    """Down [S, R, N], its bias [S, R, 1], up [S, R, N] transposed, its bias [S, 1, N], the scale [S]; where tensors lie in them."""
    some, count, route = next(iter(sites.values())), len(slots), route_key(slots)
    shapes = {
        "down": (count, some.bucket, some.features),
        "down_bias": (count, some.bucket, 1),
        "up": (count, some.bucket, some.features),
        "up_bias": (count, 1, some.features),
    }
    down, down_bias, up, up_bias = (Table(f"{name}.{part}", shape, slots, True, route, dtype) for part, shape in shapes.items())
    values = tuple(sites[task].scaling if task in sites else 0.0 for task in slots)
    scale = Table(f"{name}.scale", (count,), slots, False, route, values=values)
    tables = (down, down_bias, up, up_bias, scale)
    graph.tables.update({table.name: table for table in tables})
    for task, site in sites.items():
        slot, size, keys = slots.index(task), site.size, list(site.tensors())
        # AdapterHub's "mam_adapter" draws the first as torch draws a linear and begins with a zero; "bert" is normal.
        bound, std = (1 / math.sqrt(site.features), 0.0) if site.fresh else (0.0, 0.02)
        for param in (
            Param(task, keys[0], down.name, slot, 0, size, False, bound=bound, std=std),
            Param(task, keys[1], down_bias.name, slot, 0, size, True, flat=True),
            Param(task, keys[2], up.name, slot, 0, size, True, std=std),
            Param(task, keys[3], up_bias.name, slot, 0, 1, False, flat=True),
        ):
            graph.params[task, param.key] = param
    return tables
