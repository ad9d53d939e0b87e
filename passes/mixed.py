"""mixed: which modules compute a linear and more, around which an adapter would not be where PEFT puts it."""

from __future__ import annotations

import torch
from torch import fx

# What a module that is a linear may compute beside it: the same numbers in another shape.
_SAME = {"view", "reshape", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "contiguous", "detach", "alias"}
_PRODUCTS = {"linear", "addmm", "mm", "matmul"}


def mixed(gm: fx.GraphModule) -> dict[str, str]:
    """Modules that compute a linear and more, as those with hooks may: each with an operator that is none."""
    names: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.meta["mux_module"] and isinstance(node.target, torch._ops.OpOverload):
            names.setdefault(node.meta["mux_module"], []).append(node.target.overloadpacket.__name__)
    return {
        module: others[0]
        for module, own in names.items()
        if _PRODUCTS.intersection(own) and (others := [name for name in own if name not in _SAME | _PRODUCTS])
    }
