"""mux::rowwise: a stretch of a graph in which every row is worked on alone, as one operator that carries its program as text.

    v0: float32 = to(x0); v1: float32 = pow(v0, 2); v2: float32 = mean(v1); ...; return v5, v7

Every value is rounded to its dtype, as torch's own operators would round it, and a sum over a row is exact before it is rounded:
so no bit of a value depends on which others are computed in the same call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import device
from codegen.checks import check, check_device, describe
from codegen.kernels.rowwise import FULL, ROW

aten = torch.ops.aten
Argument = str | int | float

# By name, what torch computes. `to` rounds to the line's dtype, `mean` and `sum` are over a row, `expand` repeats its one value.
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
}
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


@dataclass(frozen=True, slots=True)
class Program:
    """Lines in order, and the values that are returned."""

    lines: tuple[Line, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([*map(str, self.lines), f"return {', '.join(self.results)}"])

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read what `str` writes.

        Raises:
            ValueError: the text is none.
        """
        *lines, last = text.split("; ")
        if not last.startswith("return "):
            raise ValueError(f"a program returns values: {last!r}")
        return cls(tuple(map(_line, lines)), tuple(last.removeprefix("return ").split(", ")))

    def kinds(self, given: Sequence[str]) -> dict[str, str]:
        """Of every value whether it is one for each element, each row or each column, by those of what is given."""
        found = {f"x{index}": kind for index, kind in enumerate(given)}
        for line in self.lines:
            read = {found[own] for own in line.reads}
            if line.op in ("mean", "sum"):
                found[line.name] = ROW
            else:
                found[line.name] = read.pop() if len(read) == 1 and line.op != "expand" else FULL
        return found

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The values, by torch's operators."""
        values: dict[Argument, Any] = {f"x{index}": own for index, own in enumerate(given)}
        for line in self.lines:
            found = MEANING[line.op](*(values[own] if isinstance(own, str) else own for own in line.args))
            values[line.name] = found.to(getattr(torch, line.dtype))
        # Memory of its own for each, also for a value that is a given one's.
        return [values[name].clone(memory_format=torch.contiguous_format) for name in self.results]


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
        check(own.is_contiguous(), f"rowwise: reads contiguous tensors, got {describe(own)} in strides {own.stride()}")
    check_device("rowwise", given[0], **{f"x{index}": own for index, own in enumerate(given)})


@torch.library.custom_op("mux::rowwise", mutates_args=())
def rowwise(given: list[Tensor], program: str) -> list[Tensor]:
    """The values that `program` returns. `given` are [..., N], [..., 1] and [N]; contiguous."""
    _check(given, program)
    found = Program.parse(program)
    return device.rowwise(given, found, program) if given[0].is_cuda else found.run(given)


@rowwise.register_fake
def _(given: list[Tensor], program: str) -> list[Tensor]:
    _check(given, program)
    return Program.parse(program).run(given)


ROWWISE = torch.ops.mux.rowwise.default
