"""rowwise: stretches of a template's graphs that work on each row alone become one operator each.

Between the products of a layer lie norms, activations and residuals: a dozen torch calls, each of which reads and writes all rows.
However the tasks' adapters cut them up, a value keeps its bits (`codegen.rowwise`), so a stretch may end where a task's begins.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from codegen.kernels.rowwise import MOST_FEATURES, powers
from codegen.ops import ROWWISE
from codegen.rowwise import Line, Program, Result
from passes.graph import val
from passes.records import is_view

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OPS = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.neg.default: "neg",
    aten.pow.Tensor_Scalar: "pow",
    aten.rsqrt.default: "rsqrt",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.silu_backward.default: "silu_backward",
    aten._to_copy.default: "to",
    aten.to.dtype: "to",
    aten.mean.dim: "mean",
    aten.sum.dim_IntList: "sum",
    aten.expand.default: "expand",
    aten.slice.Tensor: "slice",
    aten.slice_backward.default: "pad",
    aten.cat.default: "cat",
}
_VIEWS = (aten.expand.default, aten.slice.Tensor)
# They put values elsewhere, and compute none.
_MOVES = (*_VIEWS, aten.slice_backward.default, aten.cat.default)
_TURNS = (aten.transpose.int, aten.permute.default)


def rowwise(gm: fx.GraphModule, conditional: set[fx.Node]) -> None:
    """Rewrite a forward or backward in place.

    Before: plain torch calls, tables' gradients added in place. After: what works on rows [..., N] alone is in `mux::rowwise`
    calls, in an order in which each has what it reads. Left alone: all else, and what reads a `conditional` value, one that is
    there for some tasks alone, since its price is theirs.
    """
    gm.graph.eliminate_dead_code()
    stretches = _Stretches(gm, conditional)
    stretches.join()
    stretches.rewrite()
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


class _Stretches:
    """Nodes in units, of which the larger ones become one call; no two of them wait for each other."""

    def __init__(self, gm: fx.GraphModule, conditional: set[fx.Node]) -> None:
        self.gm = gm
        self.calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        self.place = {node: index for index, node in enumerate(self.calls)}
        self.behind = _behind(self.calls)
        self.unit = {node: node for node in self.calls}  # its first node names it
        self.members: dict[fx.Node, list[fx.Node]] = {node: [node] for node in self.calls}
        # By unit: what is before the columns, and their numbers.
        self.spaces: dict[fx.Node, tuple[tuple[int, ...], frozenset[int]]] = {}
        for node in self.calls:
            space = None if conditional.intersection(node.all_input_nodes) else _space(node)
            if space is not None:
                self.spaces[node] = space

    def join(self) -> None:
        """Every node joins the stretches that it reads from, then stretches join that read the same, unless they would then wait
        for themselves.
        """
        for node in self.calls:
            for arg in dict.fromkeys(node.all_input_nodes):
                if node in self.unit and arg in self.unit:
                    self._join(self.unit[arg], self.unit[node], moved=node.target in _MOVES)
        readers: dict[fx.Node, fx.Node] = {}
        for node in self.calls:
            for arg in node.all_input_nodes if self.unit[node] in self.spaces else ():
                if val(arg).shape[-1:] == val(node).shape[-1:] and val(arg).dim() > 1:
                    self._join(self.unit[readers.setdefault(arg, node)], self.unit[node])

    def _join(self, first: fx.Node, second: fx.Node, *, moved: bool = False) -> None:
        if first is second or first not in self.spaces or second not in self.spaces:
            return
        (lead, widths), (other, own) = self.spaces[first], self.spaces[second]
        # Rows' values go with columns of any number, and what is moved to other columns with where it is from.
        if (
            lead != other
            or not (moved or widths <= own or own <= widths)
            or self._waits(second, first)
            or self._waits(first, second)
        ):
            return
        for node in self.members.pop(second):
            self.unit[node] = first
            self.members[first].append(node)
        self.spaces[first] = lead, widths | own
        del self.spaces[second]

    def _waits(self, unit: fx.Node, other: fx.Node) -> bool:
        """Whether a unit needs another one by way of a third."""
        ahead = [own for own in self._needs(unit) if own is not other]
        seen = set(ahead)
        while ahead:
            for own in self._needs(ahead.pop()):
                if own is other:
                    return True
                if own not in seen and own is not unit:
                    seen.add(own)
                    ahead.append(own)
        return False

    def _needs(self, unit: fx.Node) -> set[fx.Node]:
        return {self.unit[arg] for node in self.members[unit] for arg in self.behind[node]} - {unit}

    def rewrite(self) -> None:
        """Each stretch as one call, all units in an order in which they have what they need."""
        graph = self.gm.graph
        order = self._ordered()
        last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
        renamed: dict[fx.Node, fx.Node] = {}
        for unit in order:
            members = sorted(self.members[unit], key=self.place.__getitem__)
            made = self._called(members, renamed) if self._fit(unit, members) else members
            for node in made:
                node.args = fx.map_arg(node.args, lambda arg: renamed.get(arg, arg))
                node.kwargs = fx.map_arg(node.kwargs, lambda arg: renamed.get(arg, arg))
                if last is None:
                    graph._root.append(node)
                else:
                    last.append(node)
                last = node
        output = graph.output_node()
        output.args = fx.map_arg(output.args, lambda arg: renamed.get(arg, arg))
        for node in reversed(self.calls):
            if not node.users and node in self.gone:
                graph.erase_node(node)
        for node in list(graph.find_nodes(op="call_function", target=ROWWISE)):
            for taken in node.users:
                _settle(taken)

    @property
    def gone(self) -> set[fx.Node]:
        return {node for unit, own in self.members.items() if self._fit(unit, own) for node in own}

    def _ordered(self) -> list[fx.Node]:
        """Of those that have what they need, always the one that was first."""
        left = {unit: self._needs(unit) for unit in self.members}
        users: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for unit, needs in left.items():
            for own in needs:
                users[own].append(unit)
        # A stretch comes where its last member was, so that nothing is held longer than it was.
        rank = {unit: max(map(self.place.__getitem__, own)) for unit, own in self.members.items()}
        ready, order = sorted((unit for unit, needs in left.items() if not needs), key=rank.__getitem__), []
        while ready:
            unit = ready.pop(0)
            order.append(unit)
            for own in users[unit]:
                left[own].remove(unit)
                if not left[own]:
                    ready.append(own)
            ready.sort(key=rank.__getitem__)
        assert len(order) == len(left), "stretches wait for each other"
        return order

    def _fit(self, unit: fx.Node, members: Sequence[fx.Node]) -> bool:
        """Whether it computes anything of columns, from at least one tensor that has all rows."""
        if unit not in self.spaces or all(node.target in _MOVES for node in members):
            return False
        lead, widths = self.spaces[unit]
        return bool(widths) and any(tuple(val(arg).shape[:-1]) == lead for arg in _given(members))

    def _called(self, members: Sequence[fx.Node], renamed: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """The call, and what takes its results; `renamed` then has whose they are."""
        graph, inside = self.gm.graph, set(members)
        given = _given(members)
        names = {arg: f"x{index}" for index, arg in enumerate(given)}
        lines: list[Line] = []
        for node in members:
            names[node] = f"v{len(lines)}"
            lines.append(_line(node, names))
        # Views that are read outside are made there once more.
        again: list[fx.Node] = []
        results: list[fx.Node] = []
        for node in reversed(members):
            wanted = any(user not in inside or user in again for user in node.users)
            if wanted:
                (again if node.target in _VIEWS else results).insert(0, node)
        orders = {node: _order(node) for node in results}
        program = Program(tuple(lines), tuple(Result(names[node], orders[node]) for node in results))
        sources = [renamed.get(arg, arg) for arg in given]
        call = graph.call_function(ROWWISE, (sources, str(_needed(program))))
        values = [_laid(val(node), orders[node]) for node in results]
        call.meta = {**results[0].meta, "val": values}
        made = [call]
        for index, (node, value) in enumerate(zip(results, values, strict=True)):
            taken = graph.call_function(operator.getitem, (call, index))
            taken.meta = {**node.meta, "val": value}
            renamed[node] = taken
            made.append(taken)
        for node in again:
            view = graph.call_function(node.target, (renamed.get(node.args[0], node.args[0]), *node.args[1:]))
            view.meta = dict(node.meta)
            renamed[node] = view
            made.append(view)
        return made


def _behind(calls: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What each call must come behind: those it reads, and around a call that writes to memory those that read this."""
    found = {node: {arg for arg in node.all_input_nodes if arg.op == "call_function"} for node in calls}
    root: dict[fx.Node, fx.Node] = {}
    users: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    written: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    writers: list[fx.Node] = []
    for node in calls:
        root[node] = root.get(node.all_input_nodes[0], node.all_input_nodes[0]) if is_view(node) and node.all_input_nodes else node
        own = _written(node)
        for arg in node.all_input_nodes:
            top = root.get(arg, arg)
            found[node].update(written[top])
            users[top].append(node)
        if own:
            found[node].update(writers)
            writers = [node]
            for arg in own:
                top = root.get(arg, arg)
                found[node].update(user for user in users[top] if user is not node)
                written[top].append(node)
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    found: list[fx.Node] = []
    for own, arg in zip(schema.arguments, node.args, strict=False) if schema is not None else ():
        if own.alias_info is not None and own.alias_info.is_write:
            fx.map_arg(arg, found.append)
    return found


def _space(node: fx.Node) -> tuple[tuple[int, ...], frozenset[int]] | None:
    """The rows that a node works on, and the number of its columns, none of a row's value; None: a program has no such node."""
    value = node.meta.get("val")
    if node.target not in _OPS or not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.dim() < 2:
        return None
    lead = tuple(value.shape[:-1])
    tensors = [val(arg) for arg in node.all_input_nodes]
    if not tensors or lead.count(1) == len(lead) or not _simple(node):
        return None
    if any(own.dtype not in _FLOATS or not _read(own, lead, alike=node.target in _MOVES) for own in tensors):
        return None
    if node.target not in _VIEWS and _dense(value) is None:
        return None
    width = (tensors[0] if node.target in (aten.mean.dim, aten.sum.dim_IntList) else value).shape[-1]
    return lead, frozenset({width} - {1})


def _simple(node: fx.Node) -> bool:
    """Whether its other arguments are those that its line has."""
    rest = [arg for arg in node.args if not isinstance(arg, fx.Node)]
    rank, source = val(node).dim(), val(node.all_input_nodes[0])
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        dims, kept = rest if len(rest) == 2 else (None, False)
        return dims in ([-1], [rank - 1]) and kept is True and not node.kwargs and source.shape[-1] <= MOST_FEATURES
    if node.target is aten._to_copy.default:
        # Autograd's casts also say where the value lies already.
        return "memory_format" not in node.kwargs and val(node).device == source.device
    if node.target is aten.to.dtype:
        return len(rest) == 1 and not node.kwargs
    if node.target is aten.expand.default:
        return source.shape[-1] == 1 and source.shape[:-1] == val(node).shape[:-1]
    if node.target is aten.slice.Tensor:
        return rest[:1] in ([-1], [rank - 1]) and rest[3:] in ([], [1]) and val(node).shape[-1] > 0 and not node.kwargs
    if node.target is aten.slice_backward.default:
        return rest[1] in (-1, rank - 1) and rest[4] == 1
    if node.target is aten.cat.default:
        return rest[1:] in ([-1], [rank - 1]) and all(val(own).dtype == val(node).dtype for own in node.all_input_nodes)
    if node.target is aten.pow.Tensor_Scalar:
        return rest[0] in powers()
    return not node.kwargs and all(isinstance(arg, int | float) and not isinstance(arg, bool) for arg in rest)


def _read(value: Tensor, lead: tuple[int, ...], *, alike: bool) -> bool:
    """Whether it can be read with rows `lead`: it has these itself, or, unless it must be `alike`, is broadcast to them."""
    if value.dim() == 0 or not (value.shape[-1] == 1 or value.stride(-1) in (0, 1)):
        return False
    if value.dim() == 1:
        return value.shape[0] > 1 and not alike
    own = tuple(value.shape[:-1])
    return own == lead or (not alike and len(own) == len(lead) and all(size in (1, of) for size, of in zip(own, lead, strict=True)))


def _dense(value: Tensor) -> tuple[int, ...] | None:
    """The order of its dimensions in memory, from the outermost, if it fills its memory with the columns together; () if it is
    contiguous.
    """
    order = sorted(range(value.dim()), key=lambda dim: (-value.stride(dim), dim))
    if value.is_contiguous():
        return ()
    return tuple(order) if order[-1] == value.dim() - 1 and value.permute(order).is_contiguous() else None


def _order(node: fx.Node) -> tuple[int, ...]:
    """How a result lies in memory: as torch would lay it, or as those want it that all turn it and copy that."""
    order = _dense(val(node))
    assert order is not None, f"{node} lies in strides {val(node).stride()}"
    turned = list(node.users)
    if turned and all(user.target in _TURNS and user.users and all(map(_copies, user.users)) for user in turned):
        wanted = {_turned(user) for user in turned}
        if len(wanted) == 1 and max(wanted)[-1] == val(node).dim() - 1:
            return max(wanted)
    return order


def _settle(taken: fx.Node) -> None:
    """Drop the copies of a result that lies as its copies would."""
    for turned in [user for user in taken.users if user.target in _TURNS]:
        value = turned.target(val(taken), *turned.args[1:])
        if value.stride() != val(turned).stride() or value.is_contiguous():
            turned.meta["val"] = value
            for copy in [user for user in turned.users if _copies(user) and value.is_contiguous()]:
                # What is written to one of the two would be seen in the other.
                if not (_changed(copy) or _changed(taken)):
                    copy.replace_all_uses_with(turned)


def _changed(node: fx.Node) -> bool:
    """Whether a call writes to its memory, by whatever view."""
    return any(node in _written(user) or (is_view(user) and _changed(user)) for user in node.users)


def _turned(node: fx.Node) -> tuple[int, ...]:
    """The dimensions of its argument in the order that a turn gives them."""
    dims = list(range(val(node).dim()))
    if node.target is aten.permute.default:
        return tuple(dim % len(dims) for dim in node.args[1])
    one, other = (int(dim) % len(dims) for dim in node.args[1:])
    dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


def _copies(node: fx.Node) -> bool:
    """Whether it makes contiguous what it reads."""
    return node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format


def _laid(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """Like a value, with its dimensions in this order in memory."""
    return torch.empty_permuted(value.shape, order or tuple(range(value.dim())), dtype=value.dtype, device=value.device)


def _given(members: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return list(dict.fromkeys(arg for node in members for arg in node.all_input_nodes if arg not in inside))


def _line(node: fx.Node, names: Mapping[fx.Node, str]) -> Line:
    op = _OPS[node.target]
    args: list[Any] = [names[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    if op in ("to", "mean", "sum"):
        args = args[:1]
    elif op == "expand":
        args = [args[0], val(node).shape[-1]]
    elif op == "pow":
        args = [args[0], int(args[1])]
    elif op == "slice":
        start = _place(args[2] if len(args) > 2 else None, val(node.args[0]).shape[-1])
        args = [args[0], start, start + val(node).shape[-1]]
    elif op == "pad":
        args = [args[0], val(node).shape[-1], _place(args[3], val(node).shape[-1])]
    elif op == "cat":
        args = [names[own] for own in node.args[0]]
    return Line(names[node], str(val(node).dtype).removeprefix("torch."), op, tuple(args))


def _place(start: int | None, width: int) -> int:
    """Where a slice begins, as torch counts."""
    start = start or 0
    return min(start + width if start < 0 else start, width)


def _needed(program: Program) -> Program:
    """Without the lines that no result comes from."""
    wanted = {own.name for own in program.results}
    kept = []
    for line in reversed(program.lines):
        if line.name in wanted:
            kept.append(line)
            wanted.update(line.reads)
    return Program(tuple(reversed(kept)), program.results)
