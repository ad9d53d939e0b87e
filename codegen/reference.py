"""The meaning of every mux op in plain torch: what every other form is tested against. Attention: `codegen.reference_attention`.

Shape letters: T tokens of a chunk, H query heads, G key/value heads (H a multiple of G), D head size, S slots of a table,
R adapter rank, K and N features, B = T / tile blocks of `tile` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """Multiply every block of rows with the matrix of its own slot.

    y[b] = scale[route[b]] * x[b] @ w[route[b]]      (w transposed if `transpose`)

    Args:
        x: [T, K]; `T` is a multiple of the number of blocks.
        w: [S, K, N], or [S, N, K] with `transpose`; x's dtype.
        route: [B] int32, the slot of each block; below 0: the block has none and its rows are 0.
        scale: [S] float32 or None.
        transpose: use w[s]^T.

    Returns:
        [T, N] in x's dtype. Rows of one block depend on that block and its slot alone, whatever the others hold.
    """
    blocks = []
    for rows, slot in zip(x.unflatten(0, (route.shape[0], -1)), route.tolist(), strict=True):
        if slot < 0:
            blocks.append(x.new_zeros(rows.shape[0], w.shape[1 if transpose else 2]))
        else:
            y = rows @ (w[slot].T if transpose else w[slot])
            blocks.append(y if scale is None else (y * scale[slot]).to(x.dtype))
    return torch.cat(blocks)


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """The weight gradient of `tile_mm`, added to `grad` in place.

    grad[s] += scale[s] * a[b]^T b[b], for the blocks b of slot s one after another

    The sum is strictly sequential, so it depends on a slot's own blocks and their order, not on where in the chunk, or in
    which of several chunks, they lie.

    Args:
        grad: [S, K, N] float32.
        a: [T, K].
        b: [T, N].
        route, scale: as in `tile_mm`.
    """
    size = a.shape[0] // route.shape[0]
    for block, slot in enumerate(route.tolist()):
        if slot >= 0:
            rows = slice(block * size, (block + 1) * size)
            product = a[rows].float().T @ b[rows].float()
            grad[slot] += product if scale is None else scale[slot] * product


def tile_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, base: Tensor | None, route: Tensor, otherwise: Tensor | None
) -> Tensor:
    """Scale and shift every block of rows with the vectors of its own slot, or only choose the rows that have one.

    y[b] = x[b] * scale[route[b]] + shift[route[b]] - base      (in float32, rounded once)

    Args:
        x: [..., N], T rows.
        scale, shift: [S, 1, N] in x's dtype; one of them may be None, both where there is `otherwise`.
        base: [N], what the shift stands in place of and x holds already; or None.
        route: [B] int32, see `tile_mm`.
        otherwise: like x: the rows of blocks that have no slot; None: they are x's own, bit for bit.
    """
    kept = x if otherwise is None else otherwise
    blocks = []
    for rows, rest, slot in zip(*(own.reshape(route.shape[0], -1, x.shape[-1]) for own in (x, kept)), route.tolist(), strict=True):
        if slot < 0:
            blocks.append(rest)
            continue
        y = rows.float()
        y = y if scale is None else y * scale[slot].float()
        y = y if shift is None else y + shift[slot].float()
        blocks.append((y if base is None else y - base.float()).to(x.dtype))
    return torch.cat(blocks).reshape(x.shape)


def tile_sum(grad: Tensor, a: Tensor, b: Tensor | None, route: Tensor) -> None:
    """The gradients of `tile_affine`'s vectors, added to `grad` [S, 1, N] float32 in place, block after block.

    grad[s] += the sum over rows of a[b] * b[b] (of a[b] without b), for the blocks b of slot s one after another
    """
    products = a.float() if b is None else a.float() * b.float()
    for rows, slot in zip(products.reshape(route.shape[0], -1, a.shape[-1]), route.tolist(), strict=True):
        if slot >= 0:
            grad[slot, 0] += rows.sum(0)


def tile_sparse(
    y: Tensor | None, x: Tensor, values: Tensor, places: Tensor, route: Tensor, features: int, transpose: bool
) -> Tensor:
    """Add to every block of rows its product with the sparse matrix of its own slot.

    out[b] = y[b] + x[b] @ D[route[b]]      (D transposed if `transpose`)

    D[s] [K, N] is zero except for D[s][places[s, 1, j], places[s, 0, j]] = values[s, 0, j].

    Args:
        y: [..., features], T rows; None: zeros.
        x: [..., K], or [..., N] with `transpose`.
        values: [S, 1, n] in x's dtype.
        places: [S, 2, n] int32, each value's output and input, all different in a slot that is routed to (PEFT's order).
        route: [B] int32, see `tile_mm`; blocks without a slot are y's own.
        features: N, or K with `transpose`.
    """
    kept = x.new_zeros(*x.shape[:-1], features) if y is None else y
    blocks = []
    for rows, rest, slot in zip(
        *(own.reshape(route.shape[0], -1, own.shape[-1]) for own in (x, kept)), route.tolist(), strict=True
    ):
        blocks.append(rest if slot < 0 else rest + rows @ dense(values[slot, 0], places[slot], x.shape[-1], features, transpose))
    return torch.cat(blocks).reshape(kept.shape)


def dense(values: Tensor, places: Tensor, rows: int, columns: int, transpose: bool) -> Tensor:
    """One slot's matrix [rows, columns]: D, or D transposed."""
    out, into = places.long().flip(0) if transpose else places.long()
    return values.new_zeros(rows, columns).index_put((into, out), values)


def tile_sparse_sum(grad: Tensor, a: Tensor, b: Tensor, places: Tensor, route: Tensor) -> None:
    """The gradient of `tile_sparse`'s values, added to `grad` [S, 1, n] float32 in place, block after block.

    grad[s, 0, j] += (a[b]^T b[b])[places[s, 1, j], places[s, 0, j]], for the blocks b of slot s one after another
    """
    rows = (own.float().reshape(route.shape[0], -1, own.shape[-1]) for own in (a, b))
    for left, right, slot in zip(*rows, route.tolist(), strict=True):
        if slot >= 0:
            out, into = places[slot].long()
            grad[slot, 0] += (left.T @ right)[into, out]


def tile_gather(table: Tensor, index: Tensor, route: Tensor) -> Tensor:
    """Look rows of each block's own slot up.

    y[t] = table[route[t's block], index[t]]

    Args:
        table: [S, V, F].
        index: [T] int64, 0 to V - 1 in rows of blocks that have a slot.
        route: [B] int32, see `tile_mm`; rows of a block without a slot are 0.

    Returns:
        [T, F] in the table's dtype.
    """
    slots = route.repeat_interleave(index.shape[0] // route.shape[0]).tolist()
    rows = [
        table[slot, at] if slot >= 0 else table.new_zeros(table.shape[2]) for slot, at in zip(slots, index.tolist(), strict=True)
    ]
    return torch.stack(rows)


def tile_scatter(grad: Tensor, rows: Tensor, index: Tensor, route: Tensor) -> None:
    """The gradient of `tile_gather`'s table, added to `grad` [S, V, F] float32 in place.

    grad[route[t's block], index[t]] += rows[t], for one t after another

    The sum goes on from what is there, so it depends on a slot's own rows and their order, not on where in the chunk, or in
    which of several chunks, they lie.
    """
    slots = route.repeat_interleave(index.shape[0] // route.shape[0]).tolist()
    for slot, at, row in zip(slots, index.tolist(), rows.float(), strict=True):
        if slot >= 0:
            grad[slot, at] += row


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
) -> list[Tensor]:
    """The frozen linears of one input, and low-rank adapters: each block of rows with those of its own slot.

    y_i = x W_i^T + bias_i + scale * S_j B_j    where S_j = dropped(x) A_j^T and j adapts linear i

    Tasks come in banks. A bank has one table of A, the matrices of its members (the linears that its tasks adapt) below each
    other, and a table of B and a scale for each member; a block of rows is routed in one bank at most.

    Args:
        x: [..., K], T rows.
        weights: [N_i, K]; biases: [N_i] or None.
        a: for each bank [S, members * R, K].
        b: for each member of each bank [S, R, N_i] (PEFT's B transposed).
        scale: for each member of each bank [S] float32.
        route: for each bank [B] int32, see `tile_mm`. Below -1 a block and all behind it are padding, behind -2 - route others:
            their rows of y_i, and of the gradient of x, may be left unwritten.
        drop: for each bank that drops [S, 3] int32: the two halves of the task's key, and p * 2^32.
        sites: for each bank that drops [members, 2] int32: the key of the place, and the column of its input that x begins with
            (where x is a part of the features, the others being another rank's).
        sequences, positions: T int32 values, the row's sequence among its task's own and its place in it; None if no bank drops.
        members: for each table of b the linear that it adapts.
        drops: for each bank 1 if it drops elements of x, else 0.

    Returns:
        y_i [..., N_i], and S [T, the widest bank's members * R]: member j of a bank has columns j * R to (j + 1) * R; rows and
        columns that belong to nobody are 0.
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = [torch.nn.functional.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    narrow = rows.new_zeros(rows.shape[0], max((table.shape[1] for table in a), default=0))
    for index, place, columns, mask in members_of(rows, a, b, route, drop, sites, sequences, positions, drops):
        taken = rows if mask is None else (rows * mask).to(rows.dtype)
        own = tile_mm(taken, a[index][:, columns], route[index], None, True)
        outputs[members[place]] = outputs[members[place]] + tile_mm(own, b[place], route[index], scale[place], False)
        narrow = narrow + torch.nn.functional.pad(own, (columns.start, narrow.shape[1] - columns.stop))
    return [*(y.reshape(*x.shape[:-1], -1) for y in outputs), narrow]


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
) -> None:
    """The gradients of `linears`: those of the tables are added to `grads` [*a, *b], that of x is written to `dx` if it is there.

    dS_j = scale * dY_i B_j^T;  dB_j += scale * S_j^T dY_i;  dA_j += dS_j^T dropped(x);  dX = sum dY_i W_i + dropped(dS_j A_j)
    """
    rows = x.reshape(-1, x.shape[-1])
    dys = [own.reshape(rows.shape[0], -1) for own in dy]
    total = sum((own @ weight for own, weight in zip(dys, weights, strict=True)), torch.zeros_like(rows))
    for index, place, columns, mask in members_of(rows, a, b, route, drop, sites, sequences, positions, drops):
        own = dys[members[place]]
        ds = tile_mm(own, b[place], route[index], scale[place], True)
        tile_outer(grads[len(a) + place], narrow[:, columns], own, route[index], scale[place])
        tile_outer(grads[index][:, columns], ds, rows if mask is None else rows * mask, route[index], None)
        back = tile_mm(ds, a[index][:, columns], route[index], None, False)
        total = total + (back if mask is None else (back * mask).to(rows.dtype))
    if dx is not None:
        dx.copy_(total.view(x.shape))


def members_of(
    rows: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    route: Sequence[Tensor],
    drop: Sequence[Tensor],
    sites: Sequence[Tensor],
    sequences: Tensor | None,
    positions: Tensor | None,
    drops: Sequence[int],
) -> Iterator[tuple[int, int, slice, Tensor | None]]:
    """For every table of b: its bank, its index, its columns of the narrow tensor, and the factor of dropout [T, K] or None."""
    place, dropping = 0, iter(zip(drop, sites, strict=True))
    for index, table in enumerate(a):
        rank = b[place].shape[1]
        own = next(dropping) if drops[index] else None
        for member in range(table.shape[1] // rank):
            mask = None
            if own is not None:
                assert sequences is not None
                assert positions is not None
                mask = dropout_factor(own[0], own[1][member], route[index], sequences, positions, rows.shape[1])
            yield index, place, slice(member * rank, (member + 1) * rank), mask
            place += 1


def dropout_factor(drop: Tensor, site: Tensor, route: Tensor, sequences: Tensor, positions: Tensor, features: int) -> Tensor:
    """[T, features] float32: 1 / (1 - p) where an element stays, 0 where it is dropped, 1 in rows that nobody owns.

    A function of counters alone, so that it can be drawn again anywhere: Philox-4x32-10 (Salmon et al., SC'11) under the task's
    key, counting (position, sequence, site), gives two words for each row; a multiply-xorshift hash of the column takes up both.
    `site` [2]: the key of the place, and the number of the first column.
    An element is dropped if its hash is below p * 2^32.
    """
    tokens = sequences.numel()
    slot = route.clamp(min=0).repeat_interleave(tokens // route.shape[0]).long()
    low, high, threshold = (_unsigned(drop[slot, index]) for index in range(3))
    site_words, first = _unsigned(site[0]).expand_as(low), _unsigned(site[1])
    word0, word1 = _philox(_unsigned(positions.flatten()), _unsigned(sequences.flatten()), site_words, low, high)
    h = (torch.arange(features, device=drop.device) + first + word0[:, None]) & _WORD
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _WORD
    h = h ^ (h >> 15)
    h = (h + word1[:, None]) & _WORD
    h = (h * 0x846CA68B) & _WORD
    h = h ^ (h >> 16)
    inverse = 4294967296.0 / (4294967296.0 - threshold.float())
    owned = (route >= 0).repeat_interleave(tokens // route.shape[0])[:, None]
    return torch.where(owned, torch.where(h >= threshold[:, None], inverse[:, None], 0.0), 1.0)


_WORD = 0xFFFFFFFF


def _unsigned(words: Tensor) -> Tensor:
    """int32 -> the same bits as a number of 0 to 2^32 - 1, int64."""
    return words.long() & _WORD


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox-4x32-10 at the counter (c0, c1, c2, 0); int64 holding 32 bits each."""
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        first, third = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((third >> 32) & _WORD) ^ c1 ^ k0, ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = third & _WORD, first & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1
