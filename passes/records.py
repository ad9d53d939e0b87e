"""records: what every node of a template does in a chunk of any size, as plain numbers.

A graph that was captured for T = tile * p rows, p a prime that divides no size of a weight or a table, tells by itself what grows
with the chunk: a number of elements or of operations that p divides is that of T rows, another is that of no row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from codegen.lower import Forms
from codegen.ops import ATTENTION, LINEARS, LINEARS_BACKWARD_, PREFIXED_ATTENTION, ROWWISE
from passes.needs import PREFIXED_BACKWARD, Clauses, Extras, Needs, both, either, passed, places_of, routes, union

aten = torch.ops.aten
ATTENTION_BACKWARD = torch.ops.mux.attention_backward.default

# What a node's time is bound by: a product with a frozen matrix, attention, memory, a kernel of ours, or nothing at all.
PRODUCT, ATTENDING, PASSING, OWN, FREE = KINDS = ("product", "attention", "memory", "ours", "view")

_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear}
# They read rows of their first argument, not all of it.
_LOOKUPS = {aten.embedding, aten.index_select, aten.index, aten.gather, torch.ops.mux.tile_gather}
# Kernels where there is more than one, by torch's own implementations.
_LAUNCHES = {
    aten.slice_backward: 2, aten.select_backward: 2, aten.constant_pad_nd: 2, aten.scatter: 2, aten.index_put: 2,
    aten.native_layer_norm_backward: 2, aten.empty_like: 0, torch.ops.mux.tile_sparse: 4, torch.ops.mux.tile_sparse_sum_: 4,
}  # fmt: skip
# Behind these a part of the output is written twice: zeros first.
_FILLED = {aten.slice_backward, aten.select_backward}


@dataclass(frozen=True, slots=True)
class Amount:
    """A quantity of a chunk of T rows: `const + row * T`."""

    const: float = 0.0
    row: float = 0.0

    def at(self, tokens: int) -> float:
        return self.const + self.row * tokens

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.const + other.const, self.row + other.row)

    def __mul__(self, factor: float) -> Amount:
        return Amount(self.const * factor, self.row * factor)


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Record:
    """What a node does, or one part of it.

    Args:
        name, op: of the node.
        kind: what its time is bound by (KINDS).
        clauses: when it is there (`passes.needs`).
        flops: but for attention's over its own sequence, which is `per_key` for each row and key that the row sees.
        elements: of a product's result.
        weight: (K, N) of what a product in 16 bits multiplies by, None where it is no frozen matrix.
        routed: a product whose kernel computes no row of padding (`codegen.kernels.gemm`).
        nbytes: read and written.
        launches: kernels.
        host: "view", "call" or "custom": what the host does for it; "": nothing of its own.
        group: records of one group are alternatives for a block of rows: the dearest of those there counts.
    """

    name: str
    op: str
    kind: str
    clauses: Clauses = ()
    flops: Amount = NOTHING
    elements: Amount = NOTHING
    weight: tuple[int, int] | None = None
    routed: bool = False
    nbytes: Amount = NOTHING
    per_key: float = 0.0
    launches: int = 0
    host: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that a phase holds: from the call `born` (-1: from its start) to the end of the call `dies`.

    `role`: "made"; "output" or "saved" if it outlives the phase; "given" if it was saved for it. `unless`: it is not there where
    one of these holds, since another tensor is saved in its place.
    """

    name: str
    role: str
    born: int
    dies: int
    nbytes: Amount
    clauses: Clauses = ()
    unless: tuple[Clauses, ...] = ()


@dataclass(frozen=True, slots=True)
class Phase:
    """One graph: its calls in order, and the memory they take."""

    records: tuple[Record, ...]
    storages: tuple[Storage, ...]
    calls: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Tells what grows with the chunk. `prime` 0: nothing does."""

    tokens: int
    prime: int

    def amount(self, count: float, size: float = 1) -> Amount:
        """`count` elements or operations, of `size` each."""
        if self.prime and count % self.prime == 0:
            return Amount(0.0, count * size / self.tokens)
        return Amount(count * size)

    def memory(self, value: Any) -> Amount:
        """Bytes of a value, or of several; an expanded dimension takes none."""
        total = NOTHING
        for tensor in _tensors(value):
            count = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= size if stride else 1
            total += self.amount(count, tensor.element_size())
        return total


def records(gm: fx.GraphModule, found: Needs, scale: Scale) -> tuple[Record, ...]:
    """The records of every call of a graph, in its order."""
    calls = (node for node in gm.graph.nodes if node.op == "call_function")
    return tuple(record for node in calls for record in _RECORDS.get(node.target, _plain)(node, found, scale))


def is_view(node: fx.Node) -> bool:
    """Whether the value is memory of another one, or a part of what a call returned."""
    if node.target in (operator.getitem, aten._unsafe_view.default, aten.reshape.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(own.alias_info is not None and not own.alias_info.is_write for own in schema.returns)


def _plain(node: fx.Node, found: Needs, scale: Scale) -> Iterator[Record]:
    packet = getattr(node.target, "overloadpacket", None)
    op, clauses = str(packet or node.target), found.clauses[node]
    if is_view(node):
        yield Record(node.name, op, FREE, clauses, host="view")
        return
    own = getattr(node.target, "namespace", "") == "mux"
    value = node.meta.get("val")
    made = scale.memory(value)
    read = made if packet in _LOOKUPS else _reads(node, scale)
    if packet in _FILLED:
        read = read * 2
    if packet is aten.empty_like:
        read = made = NOTHING
    flops = scale.amount(_flops(node)) if packet in flop_registry else NOTHING
    # Kernels of joined pointwise operators reach what those reach by themselves.
    kind = PRODUCT if packet in _PRODUCTS else OWN if own and node.target is not ROWWISE else PASSING
    elements = scale.amount(value.numel()) if kind == PRODUCT else NOTHING
    weight = _weight(node.args[0].meta["val"], value.shape[-1]) if packet in (aten.mm, aten.linear) else None
    launches, host = _LAUNCHES.get(packet, 1), "custom" if own else "call"
    yield Record(node.name, op, kind, clauses, flops, elements, weight, nbytes=read + made, launches=launches, host=host)


def _weight(x: Tensor, outputs: int) -> tuple[int, int] | None:
    """(K, N) of what x is multiplied by, if that is measured: in 16 bits."""
    return (x.shape[-1], outputs) if x.element_size() == 2 else None


def _flops(node: fx.Node) -> int:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda arg: arg.meta["val"])
    return flop_registry[node.target.overloadpacket](*args, **kwargs, out_val=node.meta["val"])


def _reads(node: fx.Node, scale: Scale) -> Amount:
    total = NOTHING
    for arg in node.all_input_nodes:
        total += scale.memory(arg.meta.get("val"))
    return total


def _linears(node: fx.Node, found: Needs, scale: Scale) -> Iterator[Record]:
    """The frozen products; what is done once for all banks; and the products of each bank, of which a block has one."""
    x, weights, _, a, b, *_, members, _drops, forms = node.args
    rows = scale.memory(x.meta["val"])
    choice = Forms.parse(forms).y if forms else ("epilogue",) * len(weights)
    adapted = sorted(set(members)) if a else []
    yield Record(node.name, "mux.linears", FREE, found.clauses[node], host="custom")
    for index, weight in enumerate(weights):
        routed = index in adapted and choice[index] == "fused"
        yield _product(node, f"{node.name}.{index}", x, weight, 0, found.clauses[node], scale, routed=routed)
    if not a:
        return
    own = routes(node, found.present)
    any_ = both(*found.clauses[node], union(own))
    separate = {choice[index] for index in adapted} - {"fused"}
    moved = rows
    for index in adapted:
        moved += scale.memory(node.meta["val"][index]) * _PASSES[choice[index]]
    yield Record(f"{node.name}.adapters", "mux.linears", OWN, any_, nbytes=moved, launches=1 + len(separate))
    yield from _banks(node, a, b, own, 1, found, scale)


# Reads and writes of a result beside the frozen product's own: written first and read by the product's epilogue, half of which
# cuBLAS hides; or read and written again.
_PASSES = {"fused": 0.0, "accumulate": 1.5, "epilogue": 2.0}


def _linears_backward(node: fx.Node, found: Needs, scale: Scale) -> Iterator[Record]:
    _, dx, dys, x, _, weights, a, b, *_, members, _drops, forms = node.args
    rows, choice = scale.memory(x.meta["val"]), Forms.parse(forms).dx if forms else "epilogue"
    yield Record(node.name, "mux.linears_backward_", FREE, found.clauses[node], host="custom")
    back = found.wanted[dx] if dx is not None else ()
    for index, weight in enumerate(weights if dx is not None else ()):
        routed = index == 0 and bool(a) and choice == "fused"
        yield _product(node, f"{node.name}.{index}", dys[index], weight, 1, back, scale, again=index > 0, routed=routed)
    if not a:
        return
    own = routes(node, found.present)
    moved = rows
    for index in sorted(set(members)):
        moved += scale.memory(dys[index].meta["val"]) * 2
    yield Record(f"{node.name}.adapters", "mux.linears_backward_", OWN, both(union(own)), nbytes=moved, launches=2)
    if dx is not None and choice != "fused":
        added = both(union(own), *found.wanted[dx])
        yield Record(f"{node.name}.dx", "mux.linears_backward_", OWN, added, nbytes=rows * _PASSES[choice], launches=1)
    yield from _banks(node, a, b, own, 2, found, scale)


def _product(
    node: fx.Node,
    name: str,
    x: fx.Node,
    weight: fx.Node,
    summed: int,
    clauses: Clauses,
    scale: Scale,
    *,
    routed: bool,
    again: bool = False,
) -> Record:
    """x times a frozen [N, K] over its K (`summed` 0 ... forwards) or its N; `again`: added to a result that is there."""
    value, frozen = x.meta["val"], weight.meta["val"]
    size = frozen.shape[summed]
    rows = scale.amount(value.shape[:-1].numel())
    made = rows * (size * value.element_size())
    moved = scale.memory(value) + scale.memory(frozen) + made * (2 if again else 1)
    flops = rows * (2 * frozen.shape[0] * frozen.shape[1])
    known = (value.shape[-1], size) if value.element_size() == 2 else None
    op = str(node.target.overloadpacket)
    return Record(name, op, PRODUCT, clauses, flops, rows * size, known, routed, moved, launches=1, host="call")


def _banks(node: fx.Node, a: Any, b: Any, own: Sequence[Extras], times: int, found: Needs, scale: Scale) -> Iterator[Record]:
    x = node.args[0] if node.target is LINEARS else node.args[3]
    rows = scale.amount(x.meta["val"].shape[:-1].numel())
    for index, (table, places, extras) in enumerate(zip(a, places_of(a, b), own, strict=True)):
        shapes = [table.meta["val"].shape, *(b[place].meta["val"].shape for place in places)]
        flops = rows * (2 * times * sum(shape[1] * shape[2] for shape in shapes))
        clauses = both(*found.clauses[node], extras)
        yield Record(f"{node.name}.bank{index}", str(node.target.overloadpacket), OWN, clauses, flops, group=f"{node.name}.banks")


def _attention(node: fx.Node, found: Needs, scale: Scale) -> Iterator[Record]:
    """Two products of every row with every key it sees; five backwards, and sums over rows in float32."""
    backward = node.target in (ATTENTION_BACKWARD, PREFIXED_BACKWARD)
    q, k, v = (node.args[place].meta["val"] for place in ((1, 2, 3) if backward else (0, 1, 2)))
    tokens, heads, size = q.shape
    moved = scale.memory([q, k, v]) + scale.memory(node.meta["val"])
    if backward:
        # dO and O are read as well; dQ is summed in float32 and then read again.
        moved = moved + scale.memory(q) * 2 + scale.amount(2 * 4 * q.numel())
    products = 5 if backward else 2
    per_key, launches = 2.0 * products * heads * size, 4 if backward else 1
    given = {"nbytes": moved, "per_key": per_key, "launches": launches, "host": "custom"}
    yield Record(node.name, f"mux.attention{'_backward' * backward}", ATTENDING, found.clauses[node], **given)
    if node.target not in (PREFIXED_ATTENTION, PREFIXED_BACKWARD):
        return
    tables = node.args[4 if backward else 3]
    for index, (table, extras) in enumerate(zip(tables, routes(node, found.present), strict=True)):
        flops = scale.amount(tokens) * ((6 if backward else 4) * heads * size * (table.meta["val"].shape[1] // (2 * k.shape[1])))
        clauses = both(*found.clauses[node], extras)
        yield Record(
            f"{node.name}.prefix{index}",
            str(node.target.overloadpacket),
            OWN,
            clauses,
            flops,
            nbytes=scale.memory(q) * 3,
            launches=1,
        )


_RECORDS: dict[Any, Any] = {
    LINEARS: _linears,
    LINEARS_BACKWARD_: _linears_backward,
    ATTENTION: _attention,
    ATTENTION_BACKWARD: _attention,
    PREFIXED_ATTENTION: _attention,
    PREFIXED_BACKWARD: _attention,
}


def storages(
    gm: fx.GraphModule,
    found: Needs,
    scale: Scale,
    *,
    given: Mapping[fx.Node, Amount],
    outputs: Sequence[fx.Node],
    saved: Mapping[fx.Node, Clauses],
    cuda: bool,
) -> tuple[Storage, ...]:
    """The memory of a graph's emitted text: a variable is dropped after its last use, memory with its last variable.

    Args:
        given: placeholders whose memory is the callable's to drop, with their bytes.
        outputs: what is returned for good.
        saved: what is returned for the backward, and when the backward wants it.
        cuda: kernels' own workspaces are those of CUDA.
    """
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    place = {node: index for index, node in enumerate(calls)}
    root: dict[fx.Node, fx.Node] = {}
    for node in calls:
        part = node.target is operator.getitem and not is_view(node.args[0])
        root[node] = root.get(node.all_input_nodes[0], node.all_input_nodes[0]) if is_view(node) and not part else node
    dies: dict[fx.Node, int] = {}
    for node in (*given, *calls):
        last = max((place[user] for user in node.users if user in place), default=place.get(node, -1))
        top = root.get(node, node)
        dies[top] = max(dies.get(top, -1), last)
    for node in outputs:
        dies[root.get(node, node)] = len(calls)
    wants: dict[fx.Node, list[Clauses]] = {}
    for node, want in saved.items():
        wants.setdefault(root.get(node, node), []).append(want)
    returned = {root.get(node, node) for node in outputs}
    made = []
    for node in (*given, *calls):
        if node in given:
            made.append(Storage(node.name, "given", -1, dies[node], given[node], found.clauses[node]))
        elif root[node] is node and isinstance(node.meta.get("val"), Tensor):
            born = place[node.args[0]] if node.target is operator.getitem else place[node]
            size, clauses, last = scale.memory(node.meta["val"]), found.clauses[node], dies[node]
            made.append(Storage(node.name, "output" if node in returned else "made", born, last, size, clauses))
            if node in wants and node not in returned:
                # Behind its last use here it stays for those who want it.
                made.append(Storage(node.name, "saved", last + 1, len(calls), size, both(*clauses, *either(*wants[node]))))
        if node in saved:
            made += _instead(node, saved[node], root, dies, len(calls), found, scale)
        made += _unread(node, place, found, scale)
        made += _workspace(node, place.get(node, -1), found, scale, cuda)
    return tuple(made)


def _instead(
    node: fx.Node, want: Clauses, root: Mapping[fx.Node, fx.Node], dies: Mapping[fx.Node, int], end: int, found: Needs, scale: Scale
) -> Iterator[Storage]:
    """What is saved where the adapter that made a saved tensor is absent: what it works on."""
    unless: tuple[Clauses, ...] = ()
    top = root.get(node, node)
    while (before := passed(top, found.present)) is not None:
        unless += (both(*(own for own in map(found.present.get, top.all_input_nodes) if own is not None)),)
        top = root.get(before, before)
        if top.op == "placeholder":
            return
        if isinstance(top.meta.get("val"), Tensor):
            yield Storage(f"{top.name}.saved", "saved", dies[top] + 1, end, scale.memory(top.meta["val"]), want, unless)


def _unread(node: fx.Node, place: Mapping[fx.Node, int], found: Needs, scale: Scale) -> Iterable[Storage]:
    """Results that nobody takes out of a list live as long as the list."""
    value = node.meta.get("val")
    if node not in place or not isinstance(value, tuple | list) or not node.users:
        return
    taken = {user.args[1] for user in node.users if user.target is operator.getitem}
    last = max(place[user] for user in node.users)
    for index, own in enumerate(value):
        if index not in taken and isinstance(own, Tensor):
            yield Storage(f"{node.name}.{index}", "made", place[node], last, scale.memory(own), found.clauses[node])


def _workspace(node: fx.Node, place: int, found: Needs, scale: Scale, cuda: bool) -> Iterable[Storage]:
    """What an operator takes for itself while it runs."""
    size = NOTHING
    if node.target is LINEARS_BACKWARD_:
        size = scale.memory(node.args[4].meta["val"])  # dS
    elif cuda and node.target in (ATTENTION_BACKWARD, PREFIXED_BACKWARD):
        q, k = (node.args[place].meta["val"] for place in (1, 2))
        # dQ in float32, with 128 rows more for each sequence (taken to be of 48 rows); dK and dV of every query head where heads
        # share keys.
        size = scale.amount(4 * 4 * q.numel()) + (scale.memory(q) * 2 if q.shape != k.shape else NOTHING)
    return [Storage(f"{node.name}.work", "made", place, place, size, found.clauses[node])] if size != NOTHING else []


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [own for own in value if isinstance(own, Tensor)] if isinstance(value, tuple | list) else []
