"""lse: of each row of logits the logarithm of its sum of exponentials, also less the logit at one place, and the gradient of both.

One program of the grid takes a whole row forwards, so that its sum has one order; backwards each takes a part of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.pattern import DTYPES
from codegen.kernels.text import HEADER


@dataclass(frozen=True, slots=True)
class Shape:
    """Logits [rows, features] of a dtype by name."""

    rows: int
    features: int
    dtype: str


_COLUMNS, _WARPS = 4096, 8

_FORWARD = """

@triton.jit
def lse(x, index, sums, nll):
    row = tl.program_id(0)
    start = x + row.to(tl.int64) * {features}
    columns = tl.arange(0, {block})
    largest = tl.full([{block}], float("-inf"), tl.float32)
    for first in range(0, {features}, {block}):
        value = tl.load(start + first + columns, mask=first + columns < {features}, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value)
    most = tl.max(largest, 0)
    total = tl.zeros([{block}], tl.float32)
    for first in range(0, {features}, {block}):
        value = tl.load(start + first + columns, mask=first + columns < {features}, other=float("-inf")).to(tl.float32)
        total += tl.exp(value - most)
    # A maximum leaves out what is not a number, a sum does not.
    rest = tl.log(tl.sum(total, 0))
    tl.store(sums + row, most + rest)
    place = tl.load(index + row)
    here = (place >= 0) & (place < {features})
    # Of the largest logit nothing is left but `rest`, however large it is.
    tl.store(nll + row, rest + (most - tl.load(start + place, mask=here, other=0.0).to(tl.float32)))


def launch(x, index, sums, nll, warmup=False):
    lse.run(x, index, sums, nll, grid=({rows},), warmup=warmup, num_warps={warps})
"""

_BACKWARD = """

@triton.jit
def lse_backward(dsums, dnll, x, index, sums, dx):
    row = tl.program_id(1)
    columns = tl.program_id(0) * {block} + tl.arange(0, {block})
    inside = columns < {features}
    place = row.to(tl.int64) * {features} + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(dnll + row)
    grad = tl.exp(value - tl.load(sums + row)) * (tl.load(dsums + row) + own)
    grad -= tl.where(columns == tl.load(index + row), own, 0.0)
    tl.store(dx + place, grad.to({dtype}), mask=inside)


def launch(dsums, dnll, x, index, sums, dx, warmup=False):
    lse_backward.run(dsums, dnll, x, index, sums, dx, grid=({across}, {rows}), warmup=warmup, num_warps={warps})
"""


def forward(shape: Shape) -> str:
    """The kernel and its `launch`, as text; `launch` takes logits, places [rows] int64, and the two results [rows] float32."""
    return _text(_FORWARD, shape)


def backward(shape: Shape) -> str:
    """As text; `launch` takes the gradients of both results, logits, places, the first result, and the logits' gradient."""
    return _text(_BACKWARD, shape)


def _text(kernel: str, shape: Shape) -> str:
    return HEADER.format(title=f"lse: logits [{shape.rows}, {shape.features}]; {shape.dtype}") + kernel.format(
        rows=shape.rows,
        features=shape.features,
        dtype=DTYPES[shape.dtype],
        block=_COLUMNS,
        across=-(-shape.features // _COLUMNS),
        warps=_WARPS,
    )
