"""The mux ops on CUDA: cuBLAS for frozen weights, emitted Triton kernels for what is a task's own. Meaning: `codegen.reference`.

Launches do not grow with the number of adapters (but for sparse matrices, which lie dense one after another), nothing synchronises
with the host, and every product may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codegen import launches
from codegen.checks import check_blocks
from codegen.kernels import prefix
from codegen.kernels.affine import Shape
from codegen.kernels.lse import Shape as Logits
from codegen.kernels.pattern import Link, Pattern
from codegen.launches import Laid, Step
from codegen.layout import layout_of
from codegen.lower import forms_of

if TYPE_CHECKING:
    from codegen.rowwise import Program


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """See `reference.tile_mm`."""
    check_blocks("tile_mm", x.shape[0], route.shape[0])
    x, w = x.contiguous(), w.contiguous()
    y = x.new_empty(x.shape[0], w.shape[1] if transpose else w.shape[2])
    wide, narrow = (x, y) if transpose else (y, x)
    pattern = _single(wide, narrow, w.shape[1], route, scale is not None)
    launch = launches.contracting(pattern) if transpose else launches.expanding(pattern, False)
    launch(wide, narrow, w, *([] if scale is None else [scale]), route)
    return y


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """See `reference.tile_outer`; adds to `grad` in place."""
    check_blocks("tile_outer", a.shape[0], route.shape[0])
    pattern = _single(b, a, a.shape[1], route, scale is not None)
    launches.summing((pattern,), grad.shape[0])(b.contiguous(), a.contiguous(), grad, *([] if scale is None else [scale]), route)


def drop(x: Tensor, keys: Tensor, sites: Tensor, route: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """x [T, K] times `reference.dropout_factor`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    launches.dropping(_rows("drop", x, route))(x, y, keys, sites, route, sequences.flatten(), positions.flatten())
    return y


def tile_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> Tensor:
    """See `reference.tile_affine`."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    rest = None if otherwise is None else otherwise.contiguous()
    given = [own for own in (scale, shift, base, rest) if own is not None]
    # Without a table every slot is one.
    slots = next((own.shape[0] for own in (scale, shift) if own is not None), 2**31 - 1)
    present = scale is not None, shift is not None, base is not None, otherwise is not None
    launches.scaling(_rows("tile_affine", x, route), *present)(x, y, *given, route, slots)
    return y


def tile_sum(grad: Tensor, a: Tensor, b: Tensor | None, route: Tensor) -> None:
    """See `reference.tile_sum`; adds to `grad` in place."""
    given = [own.contiguous() for own in (a, b) if own is not None]
    launches.totalling(_rows("tile_sum", a, route), b is not None)(*given, grad, route)


def tile_sparse(
    y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool
) -> Tensor:
    """See `reference.tile_sparse`; one slot after another, with a route that sends all other rows nowhere."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    check_blocks("tile_sparse", rows.shape[0], route.shape[0])
    shape = (*x.shape[:-1], features)
    out = x.new_zeros(shape) if y is None else y.clone(memory_format=torch.contiguous_format)
    wide = out.view(-1, features)
    launch = launches.expanding(_single(wide, rows, rows.shape[1], route, False), True)
    delta = values.new_empty(1, rows.shape[1], features)
    for slot in range(values.shape[0]):
        # A free slot's places are all the first, and its values zeros.
        delta.zero_().view(-1).scatter_(0, _flat(places[slot], features, transpose), values[slot, 0])
        launch(wide, rows, delta, _only(route, slot))
    return out


def tile_sparse_sum(grad: Tensor, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    """See `reference.tile_sparse_sum`; the whole product goes on from what the places hold, block after block."""
    narrow, wide = (own.reshape(-1, own.shape[-1]).contiguous() for own in (a, b))
    check_blocks("tile_sparse_sum", narrow.shape[0], route.shape[0])
    launch = launches.summing((_single(wide, narrow, narrow.shape[1], route, False),), 1)
    put = launches.putting(grad.shape[2], route.shape[0])
    total = grad.new_empty(1, narrow.shape[1], wide.shape[1])
    for slot in range(grad.shape[0]):
        flat = _flat(places[slot], wide.shape[1], False)
        total.zero_().view(-1).scatter_(0, flat, grad[slot, 0])
        launch(wide, narrow, total, _only(route, slot))
        put(total, flat, route, grad, slot)


def _flat(places: Tensor, columns: int, transpose: bool) -> Tensor:
    """Where the values [n] of one slot lie in its matrix, row after row; int64."""
    out, into = places.long()
    return out * columns + into if transpose else into * columns + out


def _only(route: Tensor, slot: int) -> Tensor:
    """The blocks of one slot, as slot 0 of a table that has no other."""
    return torch.where(route == slot, 0, -1).int()


def tile_gather(table: Tensor, index: Tensor, route: Tensor) -> Tensor:
    """See `reference.tile_gather`."""
    places = _places(table.shape, index, route)
    flat = table.view(-1, table.shape[2])
    found = flat.index_select(0, places.clamp(max=flat.shape[0] - 1))
    return torch.where((places < flat.shape[0])[:, None], found, found.new_zeros(()))


def tile_scatter(grad: Tensor, rows: Tensor, index: Tensor, route: Tensor) -> None:
    """See `reference.tile_scatter`; adds to `grad` in place."""
    places, order = _places(grad.shape, index, route).sort(stable=True)
    shape = Shape(rows.shape[0], rows.shape[0] // route.shape[0], rows.shape[1], str(rows.dtype).removeprefix("torch."))
    launches.scattering(shape)(rows.contiguous(), places, order, grad, grad.shape[0] * grad.shape[1])


def _places(shape: torch.Size, index: Tensor, route: Tensor) -> Tensor:
    """Each row's place among S * V; S * V itself for a row of a block without a slot."""
    slots = route.long().repeat_interleave(index.shape[0] // route.shape[0], output_size=index.shape[0])
    return torch.where((slots >= 0) & (slots < shape[0]), slots * shape[1] + index, shape[0] * shape[1])


def _rows(op: str, x: Tensor, route: Tensor) -> Shape:
    tokens, blocks = x.numel() // x.shape[-1], route.shape[0]
    check_blocks(op, tokens, blocks)
    return Shape(tokens, tokens // blocks, x.shape[-1], str(x.dtype).removeprefix("torch."))


@lru_cache(maxsize=4096)
def _pattern(tokens: int, blocks: int, dtype: torch.dtype, features: int, rank: int, scaled: bool) -> Pattern:
    name = str(dtype).removeprefix("torch.")
    return Pattern(tokens, tokens // blocks, name, (features,), rank, (rank,), (scaled,), 1, (Link(0, 0, 0, 0, 0, rank),))


def _single(wide: Tensor, narrow: Tensor, rank: int, route: Tensor, scaled: bool) -> Pattern:
    """One table, one bank."""
    return _pattern(wide.shape[0], route.shape[0], wide.dtype, wide.shape[1], rank, scaled)


def prefix_join(out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, scale: float, groups: int) -> None:
    """Attention over its own sequence goes on over its prefix: overwrites the routed rows of out and lse."""
    shape = _attended(q, kv, route, groups)
    launches.prefixing("join", shape)(out, lse, q.contiguous(), kv.contiguous(), lengths, route, scale)


def prefix_queries(dq: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, *rest: Any) -> None:
    """The prefix's part of the queries' gradient, added to the routed rows of dq; `rest`: lengths, route, scale, groups."""
    _prefix_backward("queries", dq, grad, q, out, lse, kv, *rest)


def prefix_tables(dkv: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, *rest: Any) -> None:
    """The gradient of a slot's keys and values, added to dkv in place; `rest`: lengths, route, scale, groups."""
    _prefix_backward("tables", dkv, grad, q, out, lse, kv, *rest)


def _prefix_backward(
    family: str, found: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, lengths: Tensor, route: Tensor,
    scale: float, groups: int,
) -> None:  # fmt: skip
    given = (x.contiguous() for x in (grad, q, out, lse, kv))
    launches.prefixing(family, _attended(q, kv, route, groups))(found, *given, lengths, route, scale)


def _attended(q: Tensor, kv: Tensor, route: Tensor, groups: int) -> prefix.Shape:
    (tokens, heads, size), blocks = q.shape, route.shape[0]
    check_blocks("prefixed_attention", tokens, blocks)
    dtype = str(q.dtype).removeprefix("torch.")
    return prefix.Shape(tokens, tokens // blocks, heads, groups, size, kv.shape[1] // (2 * groups), dtype)


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
    given = tuple(bias is not None for bias in biases)
    steps = launches.forward(layout, forms_of(forms, layout, given), given, tuple(w.stride(1) != 1 for w in weights))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    narrow = x.new_empty(rows.shape[0], layout.width)
    if steps.narrow is not None:
        steps.narrow.launch(rows, narrow, *a, *route, *drop, *sites, *_counters(drop, sequences, positions))
    written = steps.accumulate.outputs if steps.accumulate is not None else ()
    outputs: list[Tensor] = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index in steps.fused:
            fused, y = steps.fused[index], x.new_empty(rows.shape[0], weight.shape[0])
            own = [narrow, *_of(fused, b, scale, route)] if fused.some.tables else []
            fused.launch(rows, _as_stored(weight), y, *own, *([] if bias is None else [bias]))
            outputs.append(y)
        elif index in written:
            assert bias is None, "a linear with a bias does not accumulate"
            outputs.append(x.new_empty(rows.shape[0], weight.shape[0]))
        else:
            outputs.append(torch.nn.functional.linear(rows, weight, bias))
    for step in (steps.accumulate, steps.epilogue):
        if step is not None:
            step.launch(*(outputs[index] for index in step.outputs), narrow, *_of(step, b, scale, route))
    for index in written:
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
    slots, flipped = sum(table.shape[0] for table in a), weights[0].stride(1) != 1
    chosen = forms_of(forms, layout, (False,) * len(weights))
    steps = launches.backward(layout, chosen, slots, flipped, dx is not None)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    dys = [own.reshape(rows.shape[0], -1).contiguous() for own in dy]
    counters = [*drop, *sites, *_counters(drop, sequences, positions)]
    ds = torch.empty_like(narrow)
    if steps.narrow is not None and steps.tables is not None:
        steps.narrow.launch(*dys, ds, *b, *scale, *route)
        # dB and dA in one launch right behind dS: what the first read of dY left in the cache serves the second.
        steps.tables(*dys, narrow, *grads[len(a) :], *scale, *route, rows, ds, *grads[: len(a)], *route, *counters)
    if dx is None:
        return
    # The linears in their order, the adapters' part before or after them: a sum does not depend on who has adapters.
    back = dx.view(rows.shape)
    if steps.fused is not None:
        own = [ds, *_of(steps.fused, a, [], route)] if steps.fused.some.banks else []
        steps.fused.launch(dys[0], _as_stored(weights[0]), back, *own)
    elif steps.accumulate is not None:
        steps.accumulate.launch(back, ds, *a, *route, *counters)
        back.addmm_(dys[0], weights[0])
    else:
        torch.mm(dys[0], weights[0], out=back)
    for own_dy, weight in zip(dys[1:], weights[1:], strict=True):
        back.addmm_(own_dy, weight)
    if steps.epilogue is not None:
        steps.epilogue.launch(back, ds, *_of(steps.epilogue, a, [], route), *counters)


def lse(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """See `codegen.logits.lse`; one launch."""
    sums, nll = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    launches.totalling_logits(_of_logits(logits), False)(logits, index, sums, nll)
    return sums, nll


def lse_backward(dsums: Tensor, dnll: Tensor, logits: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """See `codegen.logits.lse_backward`; one launch."""
    made = torch.empty_like(logits)
    launches.totalling_logits(_of_logits(logits), True)(dsums, dnll, logits, index, sums, made)
    return made


def _of_logits(logits: Tensor) -> Logits:
    return Logits(logits.shape[0], logits.shape[1], str(logits.dtype).removeprefix("torch."))


def rowwise(given: Sequence[Tensor], program: Program, text: str) -> list[Tensor]:
    """See `codegen.rowwise.rowwise`; one launch."""
    launch, results = launches.working(text, program, tuple(Laid(own.shape, own.stride(), own.dtype) for own in given))
    made = [torch.empty_strided(own.shape, own.strides, dtype=own.dtype, device=given[0].device) for own in results]
    launch(*given, *made)
    return made


def _of(step: Step, tables: Sequence[Tensor], scale: Sequence[Tensor], route: Sequence[Tensor]) -> list[Tensor]:
    """The tables, scales and routes of a step over some of them."""
    some = step.some
    own = [tables[place] for place in some.tables]
    return [*own, *(scale[place] for place in some.tables if scale), *(route[bank] for bank in some.banks)]


def _as_stored(weight: Tensor) -> Tensor:
    """A Conv1D's weight is a transposed view: the tensor whose rows lie in memory."""
    return weight if weight.stride(1) == 1 else weight.t()


def _counters(drop: Sequence[Tensor], sequences: Tensor | None, positions: Tensor | None) -> list[Tensor]:
    return [own.flatten() for own in (sequences, positions) if own is not None] if drop else []
