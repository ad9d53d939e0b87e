"""check_rows: proof that tokens meet only inside attention.

Packed sequences of several tenants share one graph. That is sound if every other operator works on each token's row alone.
The check follows the dimension that carries tokens from the inputs to the logits and refuses, by module, whatever mixes it
(a convolution or scan over positions, a mean over tokens, a routing that sorts them) or whatever it does not know.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.graph import MuxGraph, module_of, val

_POINTWISE = frozenset(
    {
        "abs",
        "add",
        "alias",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "detach_",
        "div",
        "dropout",
        "elu",
        "eq",
        "erf",
        "exp",
        "full_like",
        "ge",
        "gelu",
        "gt",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "le",
        "lift_fresh_copy",
        "log",
        "log1p",
        "logical_and",
        "logical_not",
        "logical_or",
        "logsigmoid",
        "lt",
        "masked_fill",
        "maximum",
        "minimum",
        "mish",
        "mul",
        "ne",
        "neg",
        "ones_like",
        "pow",
        "reciprocal",
        "relu",
        "relu6",
        "rsqrt",
        "rsub",
        "selu",
        "sigmoid",
        "silu",
        "sin",
        "softplus",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "to",
        "type_as",
        "where",
        "zeros_like",
        "_to_copy",
        "_assert_tensor_metadata",
        "float",
    }
)
_REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm", "linalg_vector_norm", "argmax", "prod", "any", "all"}
)
_SAME_SHAPE_ALONG = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax"})


# The dimension of a node's value that carries tokens; None: none does.
Where = dict[fx.Node, Any]


class _Mixes(Exception):
    """Why a node may mix tokens."""


def check_rows(graph: MuxGraph) -> None:
    """Follow the token dimension through the graph.

    Raises:
        ValueError: naming the module, the operator and the reason.
    """
    where: Where = {}
    for source, node in graph.inputs.items():
        where[node] = 1 if source.kind == "chunk" and source.key in ("input_ids", "position_ids") else None
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "call_function":
            try:
                where[node] = _follow(node, where, graph.tokens)
            except _Mixes as reason:
                module = module_of(node) or "(the model itself)"
                raise ValueError(f"backbone: cannot capture module {module!r}: {_name(node)} {reason}") from None
        elif node.op == "output" and where[node.args[0][0]] != 1:
            raise ValueError("backbone: its logits do not have one row per token")


def _name(node: fx.Node) -> str:
    return (
        node.target.overloadpacket.__name__
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )


def _follow(node: fx.Node, where: Where, tokens: int) -> int | None:
    """The token dimension of a node's value; None if it carries no tokens."""
    carriers = [arg for arg in node.all_input_nodes if where[arg] is not None]
    if not carriers:
        return None
    name = _name(node)
    if name in ("attention", "prefixed_attention"):
        # Of attention's pair only the output (0) has users; its tokens are dimension 0, whatever shared them inside.
        return 0
    if name == "getitem":
        return _follow_getitem(node, where)
    if name == "dropout" and node.args[1] and node.args[2]:
        raise _Mixes("draws random numbers: a frozen backbone has no dropout of its own")
    if name in _POINTWISE:
        return _follow_pointwise(node, where)
    if name in _REDUCTIONS:
        return _follow_reduction(node, where)
    if name in _SAME_SHAPE_ALONG:
        return _keep_unless(node, where, {_positive(node.args[1], _rank(node.args[0]))})
    rule = _RULES.get(name)
    if rule is None:
        raise _Mixes("is not known to keep tokens apart")
    return rule(node, where, tokens)


def _rank(node: Any) -> int:
    return len(val(node).shape)


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _follow_getitem(node: fx.Node, where: Where) -> int | None:
    return where[node.args[0]] if node.target is operator.getitem else None


def _follow_pointwise(node: fx.Node, where: Where) -> int:
    rank = len(val(node).shape) if val(node) is not None else _rank(node.args[0])
    # Broadcasting aligns from the right, so count dimensions from there.
    from_right = {_rank(arg) - where[arg] for arg in node.all_input_nodes if where[arg] is not None}
    if len(from_right) != 1:
        raise _Mixes("meets values whose tokens lie along different dimensions")
    offset = from_right.pop()
    for arg in node.all_input_nodes:
        if where[arg] is None and _rank(arg) >= offset and val(arg).shape[_rank(arg) - offset] != 1:
            raise _Mixes("meets a value that differs by row of the chunk")
    return rank - offset


def _keep_unless(node: fx.Node, where: Where, dims: set[int]) -> int:
    dim = where[node.args[0]]
    if dim is None or dim in dims:
        raise _Mixes("works along the tokens")
    return dim


def _follow_reduction(node: fx.Node, where: Where) -> int:
    dims = next((arg for arg in node.args[1:] if isinstance(arg, list | tuple)), None)
    if dims is None and len(node.args) > 1 and isinstance(node.args[1], int):
        dims = [node.args[1]]
    if not dims:
        raise _Mixes("reduces over all tokens")
    rank = _rank(node.args[0])
    gone = {_positive(dim, rank) for dim in dims}
    dim = _keep_unless(node, where, gone)
    kept = len(val(node).shape) == rank
    return dim if kept else dim - sum(1 for other in gone if other < dim)


def _view(node: fx.Node, where: Where, tokens: int) -> int:
    source, dim = node.args[0], where[node.args[0]]
    assert dim is not None
    before = math.prod(val(source).shape[:dim])
    shape = val(node).shape
    for new, size in enumerate(shape):
        if size == val(source).shape[dim] and math.prod(shape[:new]) == before:
            return new
    raise _Mixes(f"reshapes {tuple(val(source).shape)} to {tuple(shape)} across tokens")


def _permute(node: fx.Node, where: Where, tokens: int) -> int:
    rank = _rank(node.args[0])
    return [_positive(dim, rank) for dim in node.args[1]].index(where[node.args[0]])


def _transpose(node: fx.Node, where: Where, tokens: int) -> int:
    rank, dim = _rank(node.args[0]), where[node.args[0]]
    first, second = (_positive(d, rank) for d in (node.args[1:3] if len(node.args) > 2 else (rank - 2, rank - 1)))
    swapped: Any = {first: second, second: first}.get(dim, dim)
    return swapped


def _unsqueeze(node: fx.Node, where: Where, tokens: int) -> int:
    dim, new = where[node.args[0]], _positive(node.args[1], len(val(node).shape))
    return dim + (new <= dim)


def _squeeze(node: fx.Node, where: Where, tokens: int) -> int:
    rank = _rank(node.args[0])
    given = node.args[1] if len(node.args) > 1 else [dim for dim, size in enumerate(val(node.args[0]).shape) if size == 1]
    gone = {_positive(dim, rank) for dim in (given if isinstance(given, list | tuple) else [given])}
    dim = _keep_unless(node, where, gone)
    return dim - sum(1 for other in gone if other < dim and val(node.args[0]).shape[other] == 1)


def _expand(node: fx.Node, where: Where, tokens: int) -> int:
    return where[node.args[0]] + len(val(node).shape) - _rank(node.args[0])


def _slice(node: fx.Node, where: Where, tokens: int) -> int:
    dim = where[node.args[0]]
    assert dim is not None
    if val(node).shape[dim] != val(node.args[0]).shape[dim]:
        raise _Mixes("takes some rows of the chunk and leaves others")
    return dim


def _select(node: fx.Node, where: Where, tokens: int) -> int:
    chosen = _positive(node.args[1], _rank(node.args[0]))
    dim = _keep_unless(node, where, {chosen})
    return dim - (chosen < dim)


def _pieces(node: fx.Node, where: Where, tokens: int) -> int:
    along = node.args[2] if len(node.args) > 2 else 0
    return _keep_unless(node, where, {_positive(along, _rank(node.args[0]))})


def _repeat(node: fx.Node, where: Where, tokens: int) -> int:
    along = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if along is None:
        raise _Mixes("repeats over all tokens")
    return _keep_unless(node, where, {_positive(along, _rank(node.args[0]))})


def _cat(node: fx.Node, where: Where, tokens: int) -> int:
    along = _positive(node.args[1] if len(node.args) > 1 else 0, len(val(node).shape))
    dims = {where[arg] for arg in node.args[0]}
    if len(dims) != 1 or None in dims or (_name(node) == "cat" and along in dims):
        raise _Mixes("joins rows of tokens")
    dim = dims.pop()
    return dim + (along <= dim) if _name(node) == "stack" else dim


def _embedding(node: fx.Node, where: Where, tokens: int) -> int:
    if where[node.args[0]] is not None:
        raise _Mixes("looks rows of tokens up")
    return where[node.args[1]]


def _product(node: fx.Node, where: Where, tokens: int) -> int:
    """A matrix product of which one factor carries the tokens, along any dimension but the contracted one."""
    name = _name(node)
    if name in ("mm", "bmm", "matmul") and where[node.args[0]] is None:
        # constant [.., M, K] @ tokens [.., K, T], as rotary frequencies times positions
        if where[node.args[1]] != _rank(node.args[1]) - 1 or _rank(node.args[1]) < 2:
            raise _Mixes("contracts over the tokens")
        return len(val(node).shape) - 1
    left, right = (node.args[1], node.args[2]) if name in ("addmm", "baddbmm") else (node.args[0], node.args[1])
    others = [arg for arg in node.all_input_nodes if arg is not left]
    if any(where[arg] is not None for arg in others):
        raise _Mixes("multiplies tokens with tokens outside attention")
    dim = where[left]
    if dim is None or dim == _rank(left) - 1:
        raise _Mixes("contracts over the tokens")
    out = len(val(node).shape)
    at = dim + out - _rank(left)
    for arg in others:
        # A right factor's batch dimensions and an addend broadcast against the result; rows of either would differ by token.
        own = at - (out - _rank(arg))
        shared = own < _rank(arg) - 2 if arg is right and name != "linear" else arg is not right
        if own >= 0 and shared and val(arg).shape[own] != 1:
            raise _Mixes("meets a value that differs by row of the chunk")
    return at if name == "matmul" and _rank(right) >= 2 else dim


def _prelu(node: fx.Node, where: Where, tokens: int) -> int:
    if where[node.args[1]] is not None or (val(node.args[1]).numel() != 1 and where[node.args[0]] == 1):
        raise _Mixes("meets a value that differs by row of the chunk")
    return where[node.args[0]]


def _norm(node: fx.Node, where: Where, tokens: int) -> int:
    rank = _rank(node.args[0])
    return _keep_unless(node, where, set(range(rank - len(node.args[1]), rank)))


_RULES: dict[str, Callable[[fx.Node, Where, int], int]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("linear", "mm", "bmm", "matmul", "addmm", "baddbmm"), _product),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _norm),
    "permute": _permute,
    "prelu": _prelu,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "embedding": _embedding,
    "repeat_interleave": _repeat,
}
