"""Which kernels an op launches: a function of shapes, forms and sizes, resolved once and listed for the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from codegen import tuning
from codegen.kernels import affine, build, contract, drop, expand, gemm, outer, prefix, put, rowwise, scatter
from codegen.kernels.affine import Shape
from codegen.kernels.build import Launch
from codegen.kernels.pattern import Pattern
from codegen.layout import Layout, Some
from codegen.lower import Forms

if TYPE_CHECKING:
    from codegen.rowwise import Program


@cache
def contracting(pattern: Pattern) -> Launch:
    return build.launch("contract", str(pattern), lambda: contract.source(pattern, tuning.of_contract(pattern)))


@cache
def expanding(pattern: Pattern, add: bool) -> Launch:
    return build.launch("expand", f"{pattern} add={add}", lambda: expand.source(pattern, tuning.of_expand(pattern), add=add))


@cache
def summing(pattern: Pattern, slots: int) -> Launch:
    config = tuning.of_outer(pattern, slots)
    return build.launch("outer", f"{pattern} {config}", lambda: outer.source(pattern, config))


@cache
def multiplying(pattern: Pattern, features: int, transposed: bool, bias: bool) -> Launch:
    key = f"{pattern} features={features} transposed={transposed} bias={bias}"
    config = tuning.of_gemm(pattern)
    return build.launch(
        "gemm", key, lambda: gemm.source(pattern, config, wide=0, features=features, transposed=transposed, bias=bias)
    )


@cache
def scaling(shape: Shape, scale: bool, shift: bool, base: bool, otherwise: bool) -> Launch:
    key = f"{shape} scale={scale} shift={shift} base={base} otherwise={otherwise}"
    config = tuning.of_affine(shape)
    return build.launch(
        "affine", key, lambda: affine.source(shape, config, scale=scale, shift=shift, base=base, otherwise=otherwise)
    )


@cache
def totalling(shape: Shape, product: bool) -> Launch:
    return build.launch("total", f"{shape} product={product}", lambda: affine.total(shape, tuning.of_total(shape), product=product))


@cache
def prefixing(family: str, shape: prefix.Shape) -> Launch:
    config = tuning.of_prefix(family, shape)
    return build.launch(f"prefix_{family}", str(shape), lambda: prefix.source(family, shape, config))


@cache
def dropping(shape: Shape) -> Launch:
    return build.launch("drop", str(shape), lambda: drop.source(shape, tuning.of_affine(shape)))


@cache
def putting(count: int, blocks: int) -> Launch:
    return build.launch("put", f"{count} {blocks}", lambda: put.source(count, blocks))


@cache
def scattering(shape: Shape) -> Launch:
    return build.launch("scatter", str(shape), lambda: scatter.source(shape, tuning.of_scatter(shape)))


@cache
def working(
    text: str, program: Program, wide: tuple[int, ...], given: tuple[tuple[tuple[int, ...], torch.dtype], ...]
) -> tuple[Launch, list[tuple[bool, torch.dtype]]]:
    """A program over rows, and of each result whether it has all columns, and its dtype.

    Args:
        wide: shape of those that have all rows and columns; `given`: shapes and dtypes.
    """
    *lead, features = wide
    rows = math.prod(lead)
    values = [rowwise.Value(_named(dtype), _kind(shape, rows, features)) for shape, dtype in given]
    kinds, lines = program.kinds([own.kind for own in values]), {line.name: line for line in program.lines}
    results = [(name, rowwise.Value(lines[name].dtype, kinds[name])) for name in program.results]
    key = f"{rows}x{features} {' '.join(f'{own.dtype}:{own.kind}' for own in values)}: {text}"
    launch = build.launch("rowwise", key, lambda: rowwise.source(rows, features, values, program.lines, results))
    return launch, [(own.kind == rowwise.FULL, getattr(torch, own.dtype)) for _, own in results]


def _kind(shape: tuple[int, ...], rows: int, features: int) -> str:
    count = math.prod(shape)
    if count == rows * features:
        return rowwise.FULL
    assert count in (rows, features), f"{shape} among rows [{rows}, {features}]"
    return rowwise.ROW if shape[-1] == 1 and count == rows else rowwise.COLUMN


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Step:
    """A kernel over some of the tables; `outputs` are the linears it works on."""

    launch: Launch
    some: Some
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """Of `mux::linears`: S, fused products by output, what is written before the frozen products and what is added after them."""

    narrow: Step | None
    fused: dict[int, Step]
    accumulate: Step | None
    epilogue: Step | None

    def __iter__(self) -> Iterator[Launch]:
        steps = (self.narrow, *self.fused.values(), self.accumulate, self.epilogue)
        return (step.launch for step in steps if step is not None)


@dataclass(frozen=True, slots=True)
class Backward:
    """Of `mux::linears_backward_`: dS, dB, dA; and of dx what is fused, written before and added after the frozen products."""

    narrow: Step | None
    db: Step | None
    da: Step | None
    fused: Step | None
    accumulate: Step | None
    epilogue: Step | None

    def __iter__(self) -> Iterator[Launch]:
        steps = (self.narrow, self.db, self.da, self.fused, self.accumulate, self.epilogue)
        return (step.launch for step in steps if step is not None)


@cache
def forward(layout: Layout, forms: Forms, biases: tuple[bool, ...], flipped: tuple[bool, ...]) -> Forward:
    """`flipped`: for each weight whether it is a transposed view."""
    adapted = sorted({output for bank in layout.banks for output in bank.members})
    fused = {}
    for output, form in enumerate(forms.y):
        if form == "fused":
            some = layout.up((output,))
            launch = multiplying(some.pattern, layout.features, flipped[output], biases[output])
            fused[output] = Step(launch, some, (output,))
    steps: dict[str, Step | None] = {}
    for form in ("accumulate", "epilogue"):
        only = tuple(output for output in adapted if forms.y[output] == form)
        some = layout.up(only)
        steps[form] = Step(expanding(some.pattern, form == "epilogue"), some, only) if only else None
    down = layout.down()
    return Forward(Step(contracting(down.pattern), down) if layout.banks else None, fused, **steps)


@cache
def backward(layout: Layout, forms: Forms, slots: int, flipped: bool, wants_dx: bool) -> Backward:
    """`slots`: rows of all tables, for the sizes alone; `flipped`: whether the first weight is a transposed view."""
    up, down = layout.up(), layout.down()
    narrow = db = da = fused = accumulate = epilogue = None
    if layout.banks:
        narrow = Step(contracting(up.pattern), up)
        db, da = Step(summing(up.pattern, slots), up), Step(summing(down.pattern, slots), down)
    if wants_dx and forms.dx == "fused":
        plain, dropped = layout.down(drops=False), layout.down(drops=True)
        fused = Step(multiplying(plain.pattern, layout.outputs[0], not flipped, False), plain)
        # A mask lies over the adapters' part of a bank that drops, so that part is added by itself.
        epilogue = Step(expanding(dropped.pattern, True), dropped) if dropped.banks else None
    elif wants_dx and layout.banks and forms.dx == "accumulate":
        accumulate = Step(expanding(down.pattern, False), down)
    elif wants_dx and layout.banks:
        epilogue = Step(expanding(down.pattern, True), down)
    return Backward(narrow, db, da, fused, accumulate, epilogue)
