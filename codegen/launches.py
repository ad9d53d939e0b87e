"""Which kernels an op launches: a function of shapes, forms and sizes, resolved once and listed for the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from codegen import tuning
from codegen.kernels import affine, build, contract, drop, expand, gemm, lse, outer, prefix, put, rowwise, scatter
from codegen.kernels.affine import Shape
from codegen.kernels.build import Launch
from codegen.kernels.pattern import Pattern
from codegen.layout import Layout, Some
from codegen.lower import Forms

if TYPE_CHECKING:
    from codegen.rowwise import Program


class Laid(NamedTuple):
    """A tensor of rows, and how it lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def row(self, dim: int, lead: Sequence[int]) -> int:
        """Elements from one row to the next along a dimension of `lead`, to which its own are broadcast."""
        own = dim + len(self.shape) - 1 - len(lead)
        return self.strides[own] if own >= 0 and self.shape[own] > 1 else 0


@cache
def contracting(pattern: Pattern) -> Launch:
    return build.launch("contract", str(pattern), lambda: contract.source(pattern, tuning.of_contract(pattern)))


@cache
def expanding(pattern: Pattern, add: bool) -> Launch:
    return build.launch("expand", f"{pattern} add={add}", lambda: expand.source(pattern, tuning.of_expand(pattern), add=add))


@cache
def summing(patterns: tuple[Pattern, ...], slots: int) -> Launch:
    config = tuning.of_outer(patterns, slots)
    return build.launch("outer", f"{' '.join(map(str, patterns))} {config}", lambda: outer.source(patterns, config))


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
def totalling_logits(shape: lse.Shape, backward: bool) -> Launch:
    family, write = ("lse_backward", lse.backward) if backward else ("lse", lse.forward)
    return build.launch(family, str(shape), lambda: write(shape))


@cache
def scattering(shape: Shape) -> Launch:
    return build.launch("scatter", str(shape), lambda: scatter.source(shape, tuning.of_scatter(shape)))


@cache
def working(text: str, program: Program, given: tuple[Laid, ...]) -> tuple[Launch, list[Laid]]:
    """A program over rows, and what it returns."""
    lead = torch.broadcast_shapes(*(own.shape[:-1] for own in given))
    widths = program.widths([own.shape[-1] for own in given])
    dtypes = {line.name: line.dtype for line in program.lines}
    results = [_laid((*lead, widths[name]), order, getattr(torch, dtypes[name])) for name, order in program.results]
    # From one row to the next as the first result lies.
    order = [dim for dim in program.results[0].order or range(len(lead)) if dim < len(lead) and lead[dim] > 1]
    sizes, strides = _collapsed([lead[dim] for dim in order], [[own.row(dim, lead) for dim in order] for own in (*given, *results)])
    values = [
        rowwise.Value(_named(own.dtype), rows, 0 if own.shape[-1] == 1 else own.strides[-1])
        for own, rows in zip((*given, *results), strides, strict=True)
    ]
    named = list(zip((own.name for own in program.results), values[len(given) :], strict=True))
    key = f"{sizes} {' '.join(f'{own.dtype}:{own.rows}:{own.step}' for own in values)} {[own.shape[-1] for own in given]}: {text}"
    write = partial(rowwise.source, sizes, widths, values[: len(given)], program.lines, named)
    return build.launch("rowwise", key, write), results


def _laid(shape: tuple[int, ...], order: Sequence[int], dtype: torch.dtype) -> Laid:
    strides, stride = [0] * len(shape), 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = stride
        stride *= shape[dim]
    return Laid(shape, tuple(strides), dtype)


def _collapsed(sizes: list[int], strides: list[list[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Dimensions with those joined that lie one within the other in every tensor."""
    at = len(sizes) - 1
    while at > 0:
        if all(own[at - 1] == own[at] * sizes[at] for own in strides):
            sizes = [*sizes[: at - 1], sizes[at - 1] * sizes[at], *sizes[at + 1 :]]
            strides = [[*own[: at - 1], *own[at:]] for own in strides]
        at -= 1
    return tuple(sizes), list(map(tuple, strides))


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
    """Of `mux::linears_backward_`: dS; dB and dA; and of dx what is fused, written before and added after the frozen products."""

    narrow: Step | None
    tables: Launch | None
    fused: Step | None
    accumulate: Step | None
    epilogue: Step | None

    def __iter__(self) -> Iterator[Launch]:
        if self.narrow is not None:
            yield self.narrow.launch
        if self.tables is not None:
            yield self.tables
        yield from (step.launch for step in (self.fused, self.accumulate, self.epilogue) if step is not None)


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
    narrow = tables = fused = accumulate = epilogue = None
    if layout.banks:
        narrow, tables = Step(contracting(up.pattern), up), summing((up.pattern, down.pattern), slots)
    if wants_dx and forms.dx == "fused":
        plain, dropped = layout.down(drops=False), layout.down(drops=True)
        fused = Step(multiplying(plain.pattern, layout.outputs[0], not flipped, False), plain)
        # A mask lies over the adapters' part of a bank that drops, so that part is added by itself.
        epilogue = Step(expanding(dropped.pattern, True), dropped) if dropped.banks else None
    elif wants_dx and layout.banks and forms.dx == "accumulate":
        accumulate = Step(expanding(down.pattern, False), down)
    elif wants_dx and layout.banks:
        epilogue = Step(expanding(down.pattern, True), down)
    return Backward(narrow, tables, fused, accumulate, epilogue)
