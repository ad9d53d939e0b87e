"""rowwise: the values of a `codegen.rowwise.Program`, one program of the grid for each row, or for a part of its columns.

A sum over a row is one of integers, exact whatever the order, which the compiler chooses by what else the kernel does: each term is
cut off 40 bits below the largest one's first. No product is joined with the sum behind it, for that would round once, not twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.kernels.pattern import DTYPES

if TYPE_CHECKING:
    from codegen.rowwise import Line

FULL, ROW, COLUMN = "full", "row", "column"
# Rows that are summed are in one program.
MOST_FEATURES = 16384
_COLUMNS, _WARPS = 2048, 4


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that is read or written: its dtype by name, and whether it has a value for each element, each row or each column."""

    dtype: str
    kind: str


_HEAD = '''"""rowwise: rows [{rows}, {features}]"""

import triton
import triton.language as tl

'''

_TOTAL = """
@triton.jit
def total(value):
    finite = tl.sum((value - value != 0.0).to(tl.int32), 0) == 0
    exponent = (tl.max(tl.abs(value), 0).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -80)
    up = ((167 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((87 + exponent) << 23).to(tl.float32, bitcast=True)
    sum = tl.sum((value * up).to(tl.int64), 0).to(tl.float32) * down
    return tl.where(finite, sum, float("nan"))

"""

_KERNEL = """
@triton.jit
def rowwise({names}):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * {block} + tl.arange(0, {block})
    place = row * {features} + columns
{inside}{body}

def launch(*tensors, warmup=False):
    rowwise.run(*tensors, grid=({rows}, {across}), warmup=warmup, num_warps={warps}, enable_fp_fusion=False)
"""

_TERMS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "rsqrt": "tl.rsqrt({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "to": "{0}",
    "expand": "{0}",
}
_POWERS = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}


def powers() -> tuple[float, ...]:
    """The exponents that `pow` is emitted for."""
    return tuple(_POWERS)


def source(rows: int, features: int, given: Sequence[Value], lines: Sequence[Line], results: Sequence[tuple[str, Value]]) -> str:
    """The kernel and its `launch`, as text; `launch` takes what is given, then the results."""
    summing = any(line.op in ("mean", "sum") for line in lines)
    block = 1 << (features - 1).bit_length() if summing else min(_COLUMNS, 1 << (features - 1).bit_length())
    masked = features % block != 0
    mask = ", mask=inside" if masked else ""
    body = ""
    for index, own in enumerate(given):
        place = {FULL: "place", ROW: "row", COLUMN: "columns"}[own.kind]
        own_mask = f"{mask}, other=0.0" if mask and own.kind != ROW else ""
        body += f"    x{index}_ = tl.load(x{index} + {place}{own_mask}).to(tl.float32)\n"
    for line in lines:
        body += f"    {line.name} = {_rounded(_term(line, features, masked), line.dtype)}\n"
    for index, (name, own) in enumerate(results):
        place, own_mask = ("place", mask) if own.kind == FULL else ("row", "")
        value = f"{_read(name)}.to({DTYPES[own.dtype]})"
        # Every program of a row has a row's value.
        body += f"    tl.store(y{index} + {place}, {value}{own_mask})\n"
    return (
        _HEAD.format(rows=rows, features=features)
        + (_TOTAL if summing else "")
        + _KERNEL.format(
            names=", ".join([*(f"x{index}" for index in range(len(given))), *(f"y{index}" for index in range(len(results)))]),
            rows=rows,
            features=features,
            block=block,
            inside=f"    inside = columns < {features}\n" if masked else "",
            body=body,
            across=-(-features // block),
            warps=8 if summing and block > 4096 else _WARPS,
        )
    )


def _read(arg: str | int | float) -> str:
    if not isinstance(arg, str):
        return repr(float(arg))
    return f"{arg}_" if arg.startswith("x") else arg


def _term(line: Line, features: int, masked: bool) -> str:
    args = [_read(arg) for arg in line.args]
    if line.op == "pow":
        return _POWERS[int(line.args[1])].format(args[0])
    if line.op == "silu_backward":
        grad, x = args
        return f"{grad} * ((1.0 / (1.0 + tl.exp(-{x}))) * (1.0 + {x} * (1.0 - 1.0 / (1.0 + tl.exp(-{x})))))"
    if line.op in ("mean", "sum"):
        summed = f"total(tl.where(inside, {args[0]}, 0.0))" if masked else f"total({args[0]})"
        return f"{summed} / {float(features)}" if line.op == "mean" else summed
    return _TERMS[line.op].format(*args)


def _rounded(term: str, dtype: str) -> str:
    return term if dtype == "float32" else f"({term}).to({DTYPES[dtype]}).to(tl.float32)"
