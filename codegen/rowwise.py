"""mux::rowwise: a stretch of a graph in which every row is worked on alone, as one operator that carries its program as text.

    v0: float32 = to(x0); v1: float32 = pow(v0, 2); v2: float32 = mean(v1); ...; return v5, v7 in 0 2 1 3

Every value is rounded to its dtype, as torch's own operators would round it, and a sum over a row is exact before it is rounded:
so no bit of a value depends on which others are computed in the same call. `in 0 2 1 3` is the order of a result's dimensions in
memory, from the outermost; without it, it is contiguous.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen import device
from codegen.checks import check, check_device, describe

aten = torch.ops.aten
Argument = str | int | float

# By name, what torch computes. `to` rounds to the line's dtype, `mean` and `sum` are over a row, `expand` repeats its one value.
# `slice` has the columns from one number to another, `cat` those of several values; `pad` has so many columns, zeros but for the
# value, which begins at its last number.
MEANING: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "pow": torch.pow,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "silu_backward": aten.silu_backward,
    "to": lambda value: value,
    "mean": lambda value: value.mean(-1, True),
    "sum": lambda value: value.sum(-1, True),
    "expand": lambda value, count: value.expand(*value.shape[:-1], count),
    "slice": lambda value, start, stop: value[..., start:stop],
    "cat": lambda *values: torch.cat(values, -1),
    "pad": lambda value, width, start: torch.nn.functional.pad(value, (start, width - start - value.shape[-1])),
}
_SIZED = ("slice", "expand", "pad")
_LINE = re.compile(r"(v\d+): (\w+) = (\w+)\((.*)\)")


@dataclass(frozen=True, slots=True)
class Line:
    """One value: its name, its dtype, what computes it, from which values (`x0` is given, `v0` computed) and numbers."""

    name: str
    dtype: str
    op: str
    args: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} = {self.op}({', '.join(map(str, self.args))})"

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(own for own in self.args if isinstance(own, str))


class Result(NamedTuple):
    """A value that is returned, and the order of its dimensions in memory, from the outermost; none: it is contiguous."""

    name: str
    order: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} in {' '.join(map(str, self.order))}" if self.order else self.name


@dataclass(frozen=True, slots=True)
class Program:
    """Lines in order, and the values that are returned."""

    lines: tuple[Line, ...]
    results: tuple[Result, ...]

    def __str__(self) -> str:
        return "; ".join([*map(str, self.lines), f"return {', '.join(map(str, self.results))}"])

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read what `str` writes.

        Raises:
            ValueError: the text is none.
        """
        *lines, last = text.split("; ")
        if not last.startswith("return "):
            raise ValueError(f"a program returns values: {last!r}")
        return cls(tuple(map(_line, lines)), tuple(map(_result, last.removeprefix("return ").split(", "))))

    def widths(self, given: Sequence[int]) -> dict[str, int]:
        """The columns of every value, by those of what is given; 1: it is the row's."""
        found: dict[Argument, int] = {f"x{index}": width for index, width in enumerate(given)}
        for line in self.lines:
            read = [found[own] for own in line.reads]
            start, *stop = (int(own) for own in line.args if not isinstance(own, str)) if line.op in _SIZED else (0,)
            sized = {"slice": sum(stop) - start, "expand": start, "pad": start, "cat": sum(read), "mean": 1, "sum": 1}
            found[line.name] = sized.get(line.op, max(read))
        return {str(name): width for name, width in found.items()}

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The values, by torch's operators."""
        values: dict[Argument, Any] = {f"x{index}": own for index, own in enumerate(given)}
        for line in self.lines:
            found = MEANING[line.op](*(values[own] if isinstance(own, str) else own for own in line.args))
            values[line.name] = found.to(getattr(torch, line.dtype))
        return [_laid(values[own.name], own.order) for own in self.results]


def _laid(value: Tensor, order: Sequence[int]) -> Tensor:
    """In memory of its own, also a value that is a given one's."""
    found = torch.empty_permuted(value.shape, order or tuple(range(value.dim())), dtype=value.dtype, device=value.device)
    return found.copy_(value)


def _result(text: str) -> Result:
    name, _, order = text.partition(" in ")
    return Result(name, tuple(map(int, order.split())))


def _line(text: str) -> Line:
    found = _LINE.fullmatch(text)
    if found is None or found[3] not in MEANING:
        raise ValueError(f"not a line of a program: {text!r}")
    name, dtype, op, args = found.groups()
    return Line(name, dtype, op, tuple(map(_argument, args.split(", "))))


def _argument(text: str) -> Argument:
    if re.fullmatch(r"[xv]\d+", text):
        return text
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _check(given: Sequence[Tensor], program: str) -> None:
    check(len(given) > 0, "rowwise: nothing is given")
    for own in given:
        right = own.dim() > 0 and (own.shape[-1] == 1 or own.stride(-1) in (0, 1))
        check(right, f"rowwise: reads rows that lie together, got {describe(own)} in strides {own.stride()}")
    check_device("rowwise", given[0], **{f"x{index}": own for index, own in enumerate(given)})


@torch.library.custom_op("mux::rowwise", mutates_args=())
def rowwise(given: list[Tensor], program: str) -> list[Tensor]:
    """The values that `program` returns. `given` are [..., N], [..., 1] and [N]; ... are broadcast."""
    _check(given, program)
    found = Program.parse(program)
    return device.rowwise(given, found, program) if given[0].is_cuda else found.run(given)


@rowwise.register_fake
def _(given: list[Tensor], program: str) -> list[Tensor]:
    _check(given, program)
    return Program.parse(program).run(given)


ROWWISE = torch.ops.mux.rowwise.default
