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
from codegen.rowwise import Line, Program
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
}


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
        self.spaces: dict[fx.Node, tuple[tuple[int, ...], int]] = {}  # by unit: what is before the columns, and their number
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
                    self._join(self.unit[arg], self.unit[node])
        readers: dict[fx.Node, fx.Node] = {}
        for node in self.calls:
            for arg in node.all_input_nodes if self.unit[node] in self.spaces else ():
                if val(arg).shape[-1:] == val(node).shape[-1:] and val(arg).dim() > 1:
                    self._join(self.unit[readers.setdefault(arg, node)], self.unit[node])

    def _join(self, first: fx.Node, second: fx.Node) -> None:
        if first is second or first not in self.spaces or second not in self.spaces:
            return
        (lead, width), (other, own) = self.spaces[first], self.spaces[second]
        # Rows' values go with columns of any number.
        if lead != other or (width != own and 1 not in (width, own)) or self._waits(second, first) or self._waits(first, second):
            return
        for node in self.members.pop(second):
            self.unit[node] = first
            self.members[first].append(node)
        self.spaces[first] = lead, max(width, own)
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
        """Whether it computes anything, from at least one tensor that has all rows and columns."""
        if unit not in self.spaces or all(node.target is aten.expand.default for node in members):
            return False
        shape = (*self.spaces[unit][0], self.spaces[unit][1])
        return any(tuple(val(arg).shape) == shape for arg in _given(members))

    def _called(self, members: Sequence[fx.Node], renamed: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """The call, and what takes its results; `renamed` then has whose they are."""
        graph, inside = self.gm.graph, set(members)
        given = _given(members)
        names = {arg: f"x{index}" for index, arg in enumerate(given)}
        lines: list[Line] = []
        for node in members:
            names[node] = f"v{len(lines)}"
            lines.append(_line(node, names))
        read = [node for node in members if any(user not in inside for user in node.users)]
        # A row's value that is repeated for readers outside is repeated there.
        expanded = [node for node in read if node.target is aten.expand.default]
        results = [node for node in read if node not in expanded]
        repeated = dict.fromkeys(node.args[0] for node in expanded)
        results += [source for source in repeated if source in inside and source not in results]
        program = Program(tuple(lines), tuple(names[node] for node in results))
        sources = [renamed.get(arg, arg) for arg in given]
        call = graph.call_function(ROWWISE, (sources, str(_needed(program))))
        call.meta = {**results[0].meta, "val": [val(node) for node in results]}
        made = [call]
        for index, node in enumerate(results):
            taken = graph.call_function(operator.getitem, (call, index))
            taken.meta = dict(node.meta)
            renamed[node] = taken
            made.append(taken)
        for node in expanded:
            again = graph.call_function(node.target, (renamed.get(node.args[0], node.args[0]), *node.args[1:]))
            again.meta = dict(node.meta)
            renamed[node] = again
            made.append(again)
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


def _space(node: fx.Node) -> tuple[tuple[int, ...], int] | None:
    """The rows and columns that a node works on; None: it is none that a program has."""
    value = node.meta.get("val")
    if node.target not in _OPS or not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.dim() < 2:
        return None
    lead, width = tuple(value.shape[:-1]), value.shape[-1]
    tensors = [val(arg) for arg in node.all_input_nodes]
    summing = node.target in (aten.mean.dim, aten.sum.dim_IntList)
    if summing:
        width = tensors[0].shape[-1]
    if not tensors or lead.count(1) == len(lead) or not _simple(node, width):
        return None
    if node.target is not aten.expand.default and not value.is_contiguous():
        return None
    given = [arg for arg in node.all_input_nodes if _space(arg) is None or arg.target is not aten.expand.default]
    right = all(own.dtype in _FLOATS and _kind(own, lead, width) for own in tensors)
    return (lead, width) if right and all(val(arg).is_contiguous() for arg in given) else None


def _simple(node: fx.Node, width: int) -> bool:
    """Whether its other arguments are those that its line has."""
    rest = [arg for arg in node.args if not isinstance(arg, fx.Node)]
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        dims, kept = rest if len(rest) == 2 else (None, False)
        rank = val(node).dim()
        return dims in ([-1], [rank - 1]) and kept is True and not node.kwargs and width <= MOST_FEATURES
    if node.target is aten._to_copy.default:
        # Autograd's casts also say where the value lies already.
        return "memory_format" not in node.kwargs and val(node).device == val(node.args[0]).device
    if node.target is aten.to.dtype:
        return len(rest) == 1 and not node.kwargs
    if node.target is aten.expand.default:
        return val(node.args[0]).shape[-1] == 1 and val(node.args[0]).shape[:-1] == val(node).shape[:-1]
    if node.target is aten.pow.Tensor_Scalar:
        return rest[0] in powers()
    return not node.kwargs and all(isinstance(arg, int | float) and not isinstance(arg, bool) for arg in rest)


def _kind(value: Tensor, lead: tuple[int, ...], width: int) -> str:
    if tuple(value.shape[:-1]) == lead and value.dim() > 1:
        return {width: "full", 1: "row"}.get(value.shape[-1], "")
    return "column" if value.dim() == 1 and value.shape[0] == width > 1 else ""


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
    return Line(names[node], str(val(node).dtype).removeprefix("torch."), op, tuple(args))


def _needed(program: Program) -> Program:
    """Without the lines that no result comes from."""
    wanted = set(program.results)
    kept = []
    for line in reversed(program.lines):
        if line.name in wanted:
            kept.append(line)
            wanted.update(line.reads)
    return Program(tuple(reversed(kept)), program.results)
