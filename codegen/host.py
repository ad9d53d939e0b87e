"""The mux ops on the CPU: torch's own kernels over runs of rows. Same meaning as `codegen.reference`, to rounding.

What a task's rows become depends on these rows alone: products run over at most 256 rows at a time, between 16 and which rows
of torch's CPU products keep their bits (measured with torch 2.13 and MKL; at 512 rows two threads split the inner dimension).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from codegen import reference, reference_attention

_ROWS = 256


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """See `reference.tile_mm`."""
    y = x.new_empty(x.shape[0], w.shape[1] if transpose else w.shape[2])
    for slot, rows in _runs(route, x.shape[0]):
        if slot < 0:
            y[rows] = 0
            continue
        torch.mm(x[rows], w[slot].T if transpose else w[slot], out=y[rows])
        if scale is not None:
            y[rows] *= scale[slot]
    return y


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """See `reference.tile_outer`; adds to `grad` in place, block after block."""
    size = a.shape[0] // route.shape[0]
    a, b = a.float(), b.float()
    alphas = [1.0] * grad.shape[0] if scale is None else scale.tolist()
    for block, slot in enumerate(route.tolist()):
        if slot >= 0:
            rows = slice(block * size, (block + 1) * size)
            grad[slot].addmm_(a[rows].T, b[rows], alpha=alphas[slot])


def drop(x: Tensor, keys: Tensor, sites: Tensor, route: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """x [T, K] times `reference.dropout_factor`."""
    factor = reference.dropout_factor(keys, sites[0], route, sequences, positions, x.shape[1])
    return (x * factor).to(x.dtype).contiguous()


def tile_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> Tensor:
    """See `reference.tile_affine`."""
    y = (x if otherwise is None else otherwise).clone(memory_format=torch.contiguous_format)
    rows, taken = y.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
    for slot, span in _runs(route, rows.shape[0]):
        if slot >= 0:
            own = taken[span].float()
            own = own if scale is None else own * scale[slot].float()
            own = own if shift is None else own + shift[slot].float()
            rows[span] = (own if base is None else own - base.float()).to(x.dtype)
    return y


def tile_sum(grad: Tensor, a: Tensor, b: Tensor | None, route: Tensor) -> None:
    """See `reference.tile_sum`; adds to `grad` in place, block after block."""
    reference.tile_sum(grad, a, b, route)


def tile_sparse(
    y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool
) -> Tensor:
    """See `reference.tile_sparse`; what a slot adds, it adds in place to its own rows."""
    shape = (*x.shape[:-1], features)
    out = x.new_zeros(shape) if y is None else y.clone(memory_format=torch.contiguous_format)
    rows, taken = out.view(-1, features), x.reshape(-1, x.shape[-1])
    runs = [(slot, span) for slot, span in _runs(route, rows.shape[0]) if slot >= 0]
    for own in sorted({slot for slot, _ in runs}):
        delta = reference.dense(values[own, 0], places[own], x.shape[-1], features, transpose)
        for slot, span in runs:
            if slot == own:
                rows[span].addmm_(taken[span], delta)
    return out


def tile_sparse_sum(grad: Tensor, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    """See `reference.tile_sparse_sum`; the whole product goes on from what the places hold, block after block."""
    slots = route.tolist()
    a, b = (own.float().reshape(route.shape[0], -1, own.shape[-1]) for own in (a, b))
    for own in sorted({slot for slot in slots if slot >= 0}):
        out, into = places[own].long()
        total = reference.dense(grad[own, 0], places[own], a.shape[-1], b.shape[-1], False)
        for block, slot in enumerate(slots):
            if slot == own:
                total.addmm_(a[block].T, b[block])
        grad[own, 0] = total[into, out]


def tile_gather(table: Tensor, index: Tensor, route: Tensor) -> Tensor:
    """See `reference.tile_gather`."""
    slots = route.repeat_interleave(index.shape[0] // route.shape[0])
    owned = slots >= 0
    y = table.new_zeros(index.shape[0], table.shape[2])
    y[owned] = table[slots[owned].long(), index[owned]]
    return y


def tile_scatter(grad: Tensor, rows: Tensor, index: Tensor, route: Tensor) -> None:
    """See `reference.tile_scatter`: first every place's first row, then its second, and so on; within a turn no two rows meet."""
    slots = route.repeat_interleave(index.shape[0] // route.shape[0])
    owned = (slots >= 0).nonzero().flatten()
    places, order = (slots[owned] * grad.shape[1] + index[owned]).sort(stable=True)
    _, counts = places.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    flat, rows = grad.view(-1, grad.shape[2]), rows.float()
    for turn in range(int(counts.max()) if counts.numel() else 0):
        at = starts[counts > turn] + turn
        flat[places[at]] += rows[owned[order[at]]]


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
    """See `reference.linears`; what a task adds, it adds in place to its own rows."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = [torch.nn.functional.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    narrow = rows.new_zeros(rows.shape[0], max((table.shape[1] for table in a), default=0))
    for index, place, columns, mask in reference.members_of(rows, a, b, route, drop, sites, sequences, positions, drops):
        taken = rows if mask is None else (rows * mask).to(rows.dtype)
        alpha = scale[place].tolist()
        for slot, span in _runs(route[index], rows.shape[0]):
            if slot >= 0:
                torch.mm(taken[span], a[index][slot, columns].T, out=narrow[span, columns])
                outputs[members[place]][span].addmm_(narrow[span, columns], b[place][slot], alpha=alpha[slot])
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
    rows = x.reshape(-1, x.shape[-1])
    dys = [own.reshape(rows.shape[0], -1) for own in dy]
    back = None if dx is None else dx.view(rows.shape)
    if back is not None:
        torch.mm(dys[0], weights[0], out=back)
        for own, weight in zip(dys[1:], weights[1:], strict=True):
            back.addmm_(own, weight)
    for index, place, columns, mask in reference.members_of(rows, a, b, route, drop, sites, sequences, positions, drops):
        own = dys[members[place]]
        ds = tile_mm(own, b[place], route[index], scale[place], True)
        taken = rows if mask is None else rows * mask
        tile_outer(grads[len(a) + place], narrow[:, columns], own, route[index], scale[place])
        tile_outer(grads[index][:, columns], ds, taken, route[index], None)
        if back is not None:
            for slot, span in _runs(route[index], rows.shape[0]):
                if slot < 0:
                    continue
                if mask is None:
                    back[span].addmm_(ds[span], a[index][slot, columns])
                else:
                    back[span] += ((ds[span] @ a[index][slot, columns]) * mask[span]).to(back.dtype)


def _runs(route: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Stretches of blocks of one slot (below 0: of none), as slices of at most 256 rows."""
    size = rows // route.shape[0]
    most = max(_ROWS // size, 1)
    slots = route.tolist()
    start = 0
    for block in range(1, len(slots) + 1):
        if block == len(slots) or slots[block] != slots[start] or block - start == most:
            yield slots[start], slice(start * size, block * size)
            start = block


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """See `reference_attention.attention`; torch's flash attention for the CPU, a sequence at a time."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, keys in reference_attention.sequences(cu_seqlens, k.shape[0] - q.shape[0]):
        query, key, value = _heads(q[rows]), _repeated(k[keys], q.shape[1]), _repeated(v[keys], q.shape[1])
        mask = _mask(query, key, window)
        result, top = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        out[rows] = result[0].transpose(0, 1)
        lse[:, rows] = top[0]
    return out, lse


def prefix_join(out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, scale: float, groups: int) -> None:
    """Attention over its own sequence goes on over its prefix: overwrites the routed rows of out and lse."""
    for rows, _, keys, values in _prefixes(q, kv, lengths, route, groups):
        scores = reference_attention.split_heads(q[rows], groups).float() @ keys.mT * scale  # [G, H/G, tile, live]
        own = lse[:, rows].unflatten(0, (groups, -1))
        joint = torch.logaddexp(own, torch.logsumexp(scores, -1))
        seen = reference_attention.split_heads(out[rows], groups).float() * torch.exp(own - joint)[..., None]
        seen = seen + torch.exp(scores - joint[..., None]) @ values
        out[rows] = reference_attention.join_heads(seen).to(out.dtype)
        lse[:, rows] = joint.flatten(0, 1)


def prefix_queries(
    dq: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, scale: float,
    groups: int,
) -> None:  # fmt: skip
    """The prefix's part of the queries' gradient, added to the routed rows of dq."""
    for rows, _, keys, values in _prefixes(q, kv, lengths, route, groups):
        _, slopes = _slopes(rows, keys, values, grad, q, out, lse, scale)
        dq[rows] += reference_attention.join_heads(slopes @ keys).to(dq.dtype)


def prefix_tables(
    dkv: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, scale: float,
    groups: int,
) -> None:  # fmt: skip
    """The gradient of a slot's keys and values, added to dkv in place, block after block."""
    for rows, slot, keys, values in _prefixes(q, kv, lengths, route, groups):
        weights, slopes = _slopes(rows, keys, values, grad, q, out, lse, scale)
        taken = dkv[slot].unflatten(0, (2, groups, -1))[:, :, : keys.shape[-2]]
        for own, left, right in zip(taken, (slopes, weights), (q, grad), strict=True):
            own += left.flatten(1, 2).mT @ reference_attention.split_heads(right[rows], groups).float().flatten(1, 2)


def _prefixes(q: Tensor, kv: Tensor, lengths: Tensor, route: Tensor, groups: int) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Each routed block's rows and slot, and that slot's live keys and values [G, 1, live, D] float32."""
    size = q.shape[0] // route.shape[0]
    for block, slot in enumerate(route.tolist()):
        live = int(lengths[slot]) if slot >= 0 else 0
        if live:
            keys, values = kv[slot].unflatten(0, (2, groups, 1, -1))[..., :live, :].float()
            yield slice(block * size, (block + 1) * size), slot, keys, values


def _slopes(
    rows: slice, keys: Tensor, values: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The softmax's weights of a prefix, and the loss's derivative by its scaled products: [G, H/G, tile, live] both."""
    groups = keys.shape[0]
    query, dout, seen = (reference_attention.split_heads(x[rows], groups).float() for x in (q, grad, out))
    weights = torch.exp(query @ keys.mT * scale - lse[:, rows].unflatten(0, (groups, -1))[..., None])
    delta = (dout * seen).sum(-1, keepdim=True)
    return weights, weights * (dout @ values.mT - delta) * scale


def _heads(x: Tensor) -> Tensor:
    """[L, H, D] -> [1, H, L, D]."""
    return x.transpose(0, 1)[None]


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Key/value heads once for each query head: [L, G, D] -> [1, H, L, D]."""
    return _heads(x.repeat_interleave(heads // x.shape[1], 1))


def _mask(query: Tensor, key: Tensor, window: int) -> Tensor | None:
    queries, keys = query.shape[2], key.shape[2]
    # What the kernel calls causal begins with the first key, whatever keys come before those of the queries.
    if not window and queries == keys:
        return None
    hidden = reference_attention.hidden(queries, keys, window, query.device)
    return torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference_attention.attention_backward`."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    heads, groups = q.shape[1], k.shape[1]
    for rows, keys in reference_attention.sequences(cu_seqlens, k.shape[0] - q.shape[0]):
        query, key, value = _heads(q[rows]), _repeated(k[keys], heads), _repeated(v[keys], heads)
        mask = _mask(query, key, window)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad[rows]), query, key, value, _heads(out[rows]), lse[:, rows].contiguous()[None],
            0.0, mask is None, attn_mask=mask, scale=scale,
        )  # fmt: skip
        dq[rows] = grads[0][0].transpose(0, 1)
        dk[keys], dv[keys] = (x[0].unflatten(0, (groups, -1)).sum(1).transpose(0, 1) for x in grads[1:])
    return dq, dk, dv
