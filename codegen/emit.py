"""emit: FX graphs -> source text. What runs is the text: the same file in this process and from a saved artifact."""

from __future__ import annotations

import torch
from torch import fx

_HEADER = '''"""{title}"""

import operator
from math import inf, nan

import torch
from torch import device
'''


def eager_source(gm: fx.GraphModule, title: str) -> str:
    """A Python module with `call(args: list) -> tuple`: the graph as plain torch calls.

    `args` is emptied on entry and every intermediate is dropped after its last use, so that memory is freed as the graph says.
    """
    output = gm.graph.output_node()
    output.args = (tuple(output.args[0]),)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    body = gm.graph.python_code("self").src.split("\n")
    start = next(index for index, line in enumerate(body) if line.startswith("def forward"))
    take = f"    {', '.join(names)}, = args\n    args.clear()\n" if names else ""
    lines = "\n".join(line.rstrip() for line in body[start + 1 :] if line.strip())
    return f"{_HEADER.format(title=title)}\n\ndef call(args):\n{take}{lines}\n"


def inductor_source(gm: fx.GraphModule, title: str) -> str:
    """A Python module with `call(args: list)`: what Inductor makes of the graph, kernels included as source."""
    from torch._inductor.compile_fx import compile_fx_inner

    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    compiled = compile_fx_inner(gm, fakes)
    source = getattr(compiled, "source_code", None)
    assert isinstance(source, str), f"{title}: Inductor returned no source text"
    assert "def call(" in source, f"{title}: Inductor's text has no call()"
    return f'"""{title}"""\n\n{source}'


def decompositions(lowering: str) -> dict | None:
    """The table to trace a body with: Inductor needs its own, eager keeps torch's large operators whole."""
    if lowering != "inductor":
        return None
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def describe(value: torch.Tensor) -> str:
    """Shape, dtype and device of a value, for readers of the source."""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {value.device}"
