"""The mux ops on CUDA: cuBLAS for frozen weights, emitted Triton kernels for what is a task's own. Meaning: `codegen.reference`.

Launches do not grow with the number of adapters, nothing synchronises with the host, and every product may be captured in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from codegen import tuning
from codegen.checks import check_blocks
from codegen.kernels import build, contract, expand, gemm, outer
from codegen.kernels.build import Launch
from codegen.kernels.pattern import Link, Pattern
from codegen.layout import Layout, layout_of
from codegen.lower import Forms, forms_of


@cache
def _contract(pattern: Pattern) -> Launch:
    return build.load(contract.source(pattern, tuning.of_contract(pattern)))


@cache
def _expand(pattern: Pattern, add: bool, bias: tuple[bool, ...] = ()) -> Launch:
    return build.load(expand.source(pattern, tuning.of_expand(pattern), add=add, bias=bias))


@cache
def _outer(pattern: Pattern, slots: int) -> Launch:
    return build.load(outer.source(pattern, tuning.of_outer(pattern, slots)))


@cache
def _gemm(pattern: Pattern, features: int, transposed: bool, bias: bool) -> Launch:
    config = tuning.of_gemm(pattern)
    return build.load(gemm.source(pattern, config, wide=0, features=features, transposed=transposed, bias=bias))


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """See `reference.tile_mm`."""
    check_blocks("tile_mm", x.shape[0], route.shape[0])
    x, w = x.contiguous(), w.contiguous()
    y = x.new_empty(x.shape[0], w.shape[1] if transpose else w.shape[2])
    wide, narrow = (x, y) if transpose else (y, x)
    pattern = _single(wide, narrow, w.shape[1], route, scale is not None)
    launch = _contract(pattern) if transpose else _expand(pattern, False)
    launch(wide, narrow, w, *([] if scale is None else [scale]), route)
    return y


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """See `reference.tile_outer`; adds to `grad` in place."""
    check_blocks("tile_outer", a.shape[0], route.shape[0])
    pattern = _single(b, a, a.shape[1], route, scale is not None)
    _outer(pattern, grad.shape[0])(b.contiguous(), a.contiguous(), grad, *([] if scale is None else [scale]), route)


@lru_cache(maxsize=4096)
def _pattern(tokens: int, blocks: int, dtype: torch.dtype, features: int, rank: int, scaled: bool) -> Pattern:
    name = str(dtype).removeprefix("torch.")
    return Pattern(tokens, tokens // blocks, name, (features,), rank, (rank,), (scaled,), 1, (Link(0, 0, 0, 0, 0, rank),))


def _single(wide: Tensor, narrow: Tensor, rank: int, route: Tensor, scaled: bool) -> Pattern:
    """One table, one bank."""
    return _pattern(wide.shape[0], route.shape[0], wide.dtype, wide.shape[1], rank, scaled)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> list[Tensor]:
    """See `reference.linears`."""
    layout = layout_of(x, weights, a, b, route[0].shape[0] if route else 1, members, drops)
    chosen = forms_of(forms, layout, tuple(bias is not None for bias in biases))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    narrow = x.new_empty(rows.shape[0], layout.width)
    if a:
        _contract(layout.down().pattern)(rows, narrow, *a, *route, *drop, *sites, *_counters(drop, sequences, positions))
    adapted = {output for bank in layout.banks for output in bank.members}
    outputs: list[Tensor] = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if chosen.y[index] == "fused":
            up = layout.up((index,))
            y = x.new_empty(rows.shape[0], weight.shape[0])
            tables = [*(b[place] for place in up.tables), *(scale[place] for place in up.tables)]
            own = [narrow, *tables, *(route[bank] for bank in up.banks)] if up.tables else []
            launch = _gemm(up.pattern, layout.features, False, bias is not None)
            launch(rows, weight, y, *own, *([] if bias is None else [bias]))
            outputs.append(y)
        elif chosen.y[index] == "accumulate" and index in adapted:
            assert bias is None, "a linear with a bias does not accumulate"
            outputs.append(x.new_empty(rows.shape[0], weight.shape[0]))
        else:
            outputs.append(torch.nn.functional.linear(rows, weight, bias))
    for form in ("accumulate", "epilogue"):
        only = tuple(index for index in sorted(adapted) if chosen.y[index] == form)
        if only:
            up = layout.up(only)
            tables = [*(b[place] for place in up.tables), *(scale[place] for place in up.tables)]
            launch = _expand(up.pattern, form == "epilogue")
            launch(*(outputs[index] for index in only), narrow, *tables, *(route[bank] for bank in up.banks))
        if form == "accumulate":
            for index in only:
                outputs[index].addmm_(rows, weights[index].t())
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in outputs), narrow]


def linears_backward(
    grads: Sequence[Tensor],
    dx: Tensor | None,
    dy: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    members: Sequence[int],
    drops: Sequence[int],
    forms: str,
) -> None:
    """See `reference.linears_backward`."""
    layout = layout_of(x, weights, a, b, route[0].shape[0] if route else 1, members, drops)
    chosen = forms_of(forms, layout, (False,) * len(weights))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    dys = [own.reshape(rows.shape[0], -1).contiguous() for own in dy]
    counters = [*drop, *sites, *_counters(drop, sequences, positions)]
    down = layout.down().pattern
    ds = torch.empty_like(narrow)
    if a:
        up = layout.up()
        slots = sum(table.shape[0] for table in a)
        # Right behind each other: what the first read of dY left in the cache serves the second.
        _contract(up.pattern)(*dys, ds, *b, *scale, *route)
        _outer(up.pattern, slots)(*dys, narrow, *grads[len(a) :], *scale, *route)
        _outer(down, slots)(rows, ds, *grads[: len(a)], *route, *counters)
    if dx is not None:
        _dx(dx.view(rows.shape), layout, chosen, dys, weights, ds, a, route, counters)


def _dx(
    dx: Tensor,
    layout: Layout,
    chosen: Forms,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor,
    a: Sequence[Tensor],
    route: Sequence[Tensor],
    counters: Sequence[Tensor],
) -> None:
    """The linears in their order, the adapters' part before or after them: a sum does not depend on who has adapters."""
    down = layout.down().pattern
    form = chosen.dx if a else ""
    if chosen.dx == "fused":
        plain = layout.down(drops=False)
        own = [ds, *(a[bank] for bank in plain.banks), *(route[bank] for bank in plain.banks)] if plain.banks else []
        _gemm(plain.pattern, weights[0].shape[0], True, False)(dys[0], weights[0], dx, *own)
        # A mask lies over the adapters' part of a bank that drops, so that part is added by itself.
        form = "epilogue" if len(plain.banks) < len(a) else ""
    elif form == "accumulate":
        _expand(down, False)(dx, ds, *a, *route, *counters)
        dx.addmm_(dys[0], weights[0])
    else:
        torch.mm(dys[0], weights[0], out=dx)
    for own, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(own, weight)
    if form == "epilogue":
        if chosen.dx == "fused":
            some = layout.down(drops=True)
            down, a, route = some.pattern, [a[bank] for bank in some.banks], [route[bank] for bank in some.banks]
        _expand(down, True)(dx, ds, *a, *route, *counters)


def _counters(drop: Sequence[Tensor], sequences: Tensor | None, positions: Tensor | None) -> list[Tensor]:
    return [own.flatten() for own in (sequences, positions) if own is not None] if drop else []
