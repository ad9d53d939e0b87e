"""rowwise: the values of a `codegen.rowwise.Program`, one program of the grid for a row, a part of it, or some narrow ones.

A sum over a row is one of integers, exact whatever the order, which the compiler chooses by what else the kernel does: each term is
cut off 40 bits below the largest one's first. No product is joined with the sum behind it, for that would round once, not twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.kernels.pattern import DTYPES

if TYPE_CHECKING:
    from codegen.rowwise import Line

# Rows that are summed are in one program.
MOST_FEATURES = 16384
# Elements of a program: of one row, or of several narrow ones.
_ELEMENTS, _WARPS = 2048, 4


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that is read or written: its dtype by name, and where its elements lie.

    Args:
        rows: elements from one row to the next, by dimension of the rows from the outermost; 0: all have the same.
        step: elements from one column to the next; 0: all have the same.
    """

    dtype: str
    rows: tuple[int, ...]
    step: int


_HEAD = '''"""rowwise: rows {rows}, columns {features}"""

import triton
import triton.language as tl

'''

_TOTAL = """
@triton.jit
def total(value):
    finite = tl.sum((value - value != 0.0).to(tl.int32), 1, keep_dims=True) == 0
    exponent = (tl.max(tl.abs(value), 1, keep_dims=True).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -80)
    up = ((167 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((87 + exponent) << 23).to(tl.float32, bitcast=True)
    sum = tl.sum((value * up).to(tl.int64), 1, keep_dims=True).to(tl.float32) * down
    return tl.where(finite, sum, float("nan"))

"""

_KERNEL = """
@triton.jit
def rowwise({names}):
    row = tl.program_id(0) * {height} + tl.arange(0, {height})[:, None]
    columns = tl.program_id(1) * {block} + tl.arange(0, {block})[None, :]
{body}

def launch(*tensors, warmup=False):
    rowwise.run(*tensors, grid=({down}, {across}), warmup=warmup, num_warps={warps}, enable_fp_fusion=False)
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


def source(
    sizes: Sequence[int],
    widths: Mapping[str, int],
    given: Sequence[Value],
    lines: Sequence[Line],
    results: Sequence[tuple[str, Value]],
) -> str:
    """The kernel and its `launch`, as text; `launch` takes what is given, then the results.

    Args:
        sizes: of the rows' dimensions, from the outermost.
        widths: columns of every value, given or computed.
    """
    features = max(widths.values())
    summing = any(line.op in ("mean", "sum") for line in lines)
    block = _power(features) if summing else min(_ELEMENTS, _power(features))
    rows = math.prod(sizes)
    height = min(max(1, _ELEMENTS // block), _power(rows))
    body = _Body(sizes, widths, given, lines, block, -(-features // block), height)
    stores = [body.store(f"y{index}", name, own) for index, (name, own) in enumerate(results)]
    return (
        _HEAD.format(rows=list(sizes), features=features)
        + (_TOTAL if summing else "")
        + _KERNEL.format(
            names=", ".join([*(f"x{index}" for index in range(len(given))), *(f"y{index}" for index in range(len(results)))]),
            height=height,
            block=block,
            body="\n".join(f"    {own}" for own in (*body.places.values(), *body.loads, *body.computed, *stores)),
            down=-(-rows // height),
            across=-(-features // block),
            warps=8 if summing and block > 4096 else _WARPS,
        )
    )


class _Body:
    """The lines of a kernel, written as they are asked for.

    A slice is no line: what reads it reads its source, some columns away. So values are named by how far away they are, and one
    that is read at several distances is computed at each.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        widths: Mapping[str, int],
        given: Sequence[Value],
        lines: Sequence[Line],
        block: int,
        across: int,
        height: int,
    ) -> None:
        self._sizes, self._widths, self._columns = sizes, widths, block * across
        self._given = {f"x{index}": own for index, own in enumerate(given)}
        self._lines = {line.name: line for line in lines}
        self._ragged = math.prod(sizes) % height != 0
        self._known: dict[tuple[str, int], str] = {}
        self.places: dict[str, str] = {}
        self.loads: list[str] = []
        self.computed: list[str] = []
        inner = 1
        for number, size in reversed(list(enumerate(sizes))):
            index = "row" if inner == 1 else f"row // {inner}"
            self.places[f"at{number}"] = f"at{number} = {index}" + (f" % {size}" if number else "")
            inner *= size
        if self._ragged:
            self.places["there"] = f"there = row < {math.prod(sizes)}"

    def value(self, name: str, away: int = 0) -> str:
        """What names the value of the columns that are `away` to the right."""
        if self._widths[name] == 1 or (name in self._given and not self._given[name].step):
            away = 0
        if (name, away) not in self._known:
            own = (f"{name}_" if name in self._given else name) + (f"_{'right' if away > 0 else 'left'}{abs(away)}" if away else "")
            self._known[name, away] = self._load(own, name, away) if name in self._given else self._compute(own, name, away)
        return self._known[name, away]

    def store(self, tensor: str, name: str, own: Value) -> str:
        value, mask = self.value(name), self._mask(own, self._widths[name], 0)
        return f"tl.store({tensor}{self._place(own, 0)}, {value}.to({DTYPES[own.dtype]}){f', mask={mask}' if mask else ''})"

    def _load(self, own: str, name: str, away: int) -> str:
        value = self._given[name]
        mask = self._mask(value, self._widths[name], away)
        masked = f", mask={mask}, other=0.0" if mask else ""
        self.loads.append(f"{own} = tl.load({name}{self._place(value, away)}{masked}).to(tl.float32)")
        return own

    def _place(self, own: Value, away: int) -> str:
        parts = []
        if any(own.rows):
            name = "rows_" + "_".join(map(str, own.rows))
            terms = [f"at{number}.to(tl.int64) * {stride}" for number, stride in enumerate(own.rows) if stride]
            self.places[name] = f"{name} = {' + '.join(terms)}"
            parts.append(name)
        return "".join(f" + {part}" for part in (*parts, *([_away("columns", away)] if own.step else [])))

    def _mask(self, own: Value, width: int, away: int) -> str:
        parts = ["there"] if self._ragged and any(own.rows) else []
        if own.step:
            parts += self._within(-away, width - away)
        return " & ".join(parts)

    def _within(self, start: int, stop: int) -> list[str]:
        """The conditions for a column to be one of these."""
        found = [f"(columns >= {start})"] if start > 0 else []
        return [*found, f"(columns < {stop})"] if stop < self._columns else found

    def _compute(self, own: str, name: str, away: int) -> str:
        line = self._lines[name]
        if line.op == "slice":
            return self.value(line.reads[0], away + int(line.args[1]))
        self.computed.append(f"{own} = {self._term(line, away)}")
        return own

    def _term(self, line: Line, away: int) -> str:
        if line.op == "cat":
            return self._joined(line.reads, away)
        if line.op == "pad":
            (read,), start = line.reads, int(line.args[2])
            inside = " & ".join(self._within(start - away, start + self._widths[read] - away))
            value = self.value(read, away - start)
            return f"tl.where({inside}, {value}, 0.0)" if inside else value
        if line.op in ("mean", "sum"):
            (read,) = line.reads
            value, inside = self.value(read), " & ".join(self._within(0, self._widths[read]))
            summed = f"total({f'tl.where({inside}, {value}, 0.0)' if inside else value})"
            return _rounded(f"{summed} / {float(self._widths[read])}" if line.op == "mean" else summed, line.dtype)
        args = [self.value(own, away) if isinstance(own, str) else repr(float(own)) for own in line.args]
        return _rounded(_term(line, args), line.dtype)

    def _joined(self, parts: Sequence[str], away: int) -> str:
        """Values beside one another."""
        *before, last = parts
        stops, stop = [], -away
        for own in before:
            stop += self._widths[own]
            stops.append(stop)
        found = self.value(last, -stop)
        for own, stop in reversed(list(zip(before, stops, strict=True))):
            found = f"tl.where(columns < {stop}, {self.value(own, self._widths[own] - stop)}, {found})"
        return found


def _away(columns: str, away: int) -> str:
    return columns if not away else f"({columns} {'+' if away > 0 else '-'} {abs(away)})"


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _term(line: Line, args: Sequence[str]) -> str:
    if line.op == "pow":
        return _POWERS[int(line.args[1])].format(args[0])
    if line.op == "silu_backward":
        grad, x = args
        return f"{grad} * ((1.0 / (1.0 + tl.exp(-{x}))) * (1.0 + {x} * (1.0 - 1.0 / (1.0 + tl.exp(-{x})))))"
    return _TERMS[line.op].format(*args)


def _rounded(term: str, dtype: str) -> str:
    return term if dtype == "float32" else f"({term}).to({DTYPES[dtype]}).to(tl.float32)"
