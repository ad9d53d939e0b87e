"""What a task's learned keys and values add to attention: three kernels over [T, H, D] rows and slot tables [S, 2 * G * P, D].

join: a softmax that has gone over a row's own sequence goes on over its prefix.
queries: dq += dS K, of the prefix alone.
tables: a slot's dK += dS^T Q and dV += P^T dO, its rows one after another, and at each the heads that share the key.

The programs of blocks that have no slot, or whose slot has no live row, end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.pattern import DTYPES


@dataclass(frozen=True, slots=True)
class Shape:
    """[T, H, D] queries in blocks of `tile` rows, G key/value heads, P rows of a prefix to each; of a dtype by name."""

    tokens: int
    tile: int
    heads: int
    groups: int
    size: int
    rows: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Config:
    """`queries` rows of a block and `keys` rows of a prefix at a time; for `tables` both decide the order of sums."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


_HEADER = '''"""prefix_{family}: [{tokens}, {heads}, {size}] queries, {dtype_name}, blocks of {tile}; {groups} x {rows} keys"""

import triton
import triton.language as tl
'''

# `join` and `queries` begin alike, with the program's rows, and walk the keys and values of their slot alike.
_BEGIN = """\
    tile, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(route + tile * {queries} // {tile})
    live = 0
    if (slot >= 0) & (slot < slots):
        live = tl.load(lengths + slot).to(tl.int32)
    if live > 0:
        columns = tl.arange(0, {width})
        rows = tile * {queries} + tl.arange(0, {queries})
        place = (rows.to(tl.int64)[:, None] * {heads} + head) * {size} + columns[None, :]
        query = tl.load(q + place{row_mask})
"""
_WALK = """\
        first = slot.to(tl.int64) * {table} + head // {share} * {rows}
        for start in range(0, {rows}, {keys}):
            index = start + tl.arange(0, {keys})
            seen = index < live
            where = (first + index)[:, None] * {size} + columns[None, :]
            key = tl.load(kv + where, mask={key_mask}, other=0.0)
            value = tl.load(kv + where + {values}, mask={key_mask}, other=0.0)
"""

_JOIN = (
    """

@triton.jit(do_not_specialize=["slots"])
def join(out, lse, q, kv, lengths, route, scale, slots):
"""
    + _BEGIN
    + """\
        acc = tl.load(out + place{row_mask}).to(tl.float32)
        top = tl.load(lse + head.to(tl.int64) * {tokens} + rows)
        total = tl.full([{queries}], 1.0, tl.float32)
"""
    + _WALK
    + """\
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            high = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - high[:, None])
            rest = tl.exp(top - high)
            total = total * rest + tl.sum(weights, 1)
            acc = acc * rest[:, None] + tl.dot(weights.to({dtype}), value, input_precision="ieee")
            top = high
        tl.store(out + place, (acc / total[:, None]).to({dtype}){store_mask})
        tl.store(lse + head.to(tl.int64) * {tokens} + rows, top + tl.log(total))


def launch(out, lse, q, kv, lengths, route, scale, warmup=False):
    grid = ({row_tiles}, {heads})
    join.run(out, lse, q, kv, lengths, route, scale, kv.shape[0], grid=grid, warmup=warmup, num_warps={warps}, num_stages={stages})
"""
)

_QUERIES = (
    """

@triton.jit(do_not_specialize=["slots"])
def queries(dq, dout, q, out, lse, kv, lengths, route, scale, slots):
"""
    + _BEGIN
    + """\
        grad = tl.load(dout + place{row_mask})
        delta = tl.sum(grad.to(tl.float32) * tl.load(out + place{row_mask}).to(tl.float32), 1)
        top = tl.load(lse + head.to(tl.int64) * {tokens} + rows)
        acc = tl.load(dq + place{row_mask}).to(tl.float32)
"""
    + _WALK
    + """\
            weights = tl.exp(tl.dot(query, tl.trans(key), input_precision="ieee") * scale - top[:, None])
            slope = weights * (tl.dot(grad, tl.trans(value), input_precision="ieee") - delta[:, None]) * scale
            slope = tl.where(seen[None, :], slope, 0.0).to({dtype})
            acc += tl.dot(slope, key, input_precision="ieee")
        tl.store(dq + place, acc.to({dtype}){store_mask})


def launch(dq, dout, q, out, lse, kv, lengths, route, scale, warmup=False):
    tensors = dq, dout, q, out, lse, kv, lengths, route
    grid = ({row_tiles}, {heads})
    queries.run(*tensors, scale, kv.shape[0], grid=grid, warmup=warmup, num_warps={warps}, num_stages={stages})
"""
)

_TABLES = """

@triton.jit
def tables(dkv, dout, q, out, lse, kv, lengths, route, scale):
    group, slot = tl.program_id(1), tl.program_id(2)
    live = tl.load(lengths + slot).to(tl.int32)
    index = tl.program_id(0) * {keys} + tl.arange(0, {keys})
    seen = index < live
    columns = tl.arange(0, {width})
    where = (slot.to(tl.int64) * {table} + group * {rows} + index)[:, None] * {size} + columns[None, :]
    key = tl.load(kv + where, mask={key_mask}, other=0.0)
    value = tl.load(kv + where + {values}, mask={key_mask}, other=0.0)
    dkey = tl.load(dkv + where, mask={key_mask}, other=0.0)
    dvalue = tl.load(dkv + where + {values}, mask={key_mask}, other=0.0)
    blocks = tl.arange(0, {block_count})
    slots = tl.load(route + blocks, mask=blocks < {blocks}, other=-1)
    own = slots == slot
    first = tl.min(tl.where(own, blocks, {blocks}))
    begin = first
    while begin < {blocks}:
        end = tl.min(tl.where((slots != slot) & (blocks > begin), blocks, {blocks}))
        for step in range(begin * {steps}, end * {steps}):
            head = group * {share} + step % {share}
            rows = step // {share} * {queries} + tl.arange(0, {queries})
            place = (rows.to(tl.int64)[:, None] * {heads} + head) * {size} + columns[None, :]
            query = tl.load(q + place{row_mask})
            grad = tl.load(dout + place{row_mask})
            delta = tl.sum(grad.to(tl.float32) * tl.load(out + place{row_mask}).to(tl.float32), 1)
            top = tl.load(lse + head.to(tl.int64) * {tokens} + rows)
            weights = tl.exp(tl.dot(key, tl.trans(query), input_precision="ieee") * scale - top[None, :])
            weights = tl.where(seen[:, None], weights, 0.0)
            dvalue += tl.dot(weights.to({dtype}), grad, input_precision="ieee")
            slope = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - delta[None, :]) * scale
            slope = tl.where(seen[:, None], slope, 0.0).to({dtype})
            dkey += tl.dot(slope, query, input_precision="ieee")
        begin = tl.min(tl.where(own & (blocks >= end), blocks, {blocks}))
    if first < {blocks}:  # others may be writing the rows of a slot that has none here
        tl.store(dkv + where, dkey, mask={key_mask})
        tl.store(dkv + where + {values}, dvalue, mask={key_mask})


def launch(dkv, dout, q, out, lse, kv, lengths, route, scale, warmup=False):
    tensors = dkv, dout, q, out, lse, kv, lengths, route
    grid = ({key_tiles}, {groups}, kv.shape[0])
    tables.run(*tensors, scale, grid=grid, warmup=warmup, num_warps={warps}, num_stages={stages})
"""

_FAMILIES = {"join": _JOIN, "queries": _QUERIES, "tables": _TABLES}


def source(family: str, shape: Shape, config: Config) -> str:
    """A kernel of the three and its `launch`, as text.

    `launch` takes, with out, q, dout and dq [T, H, D], lse [H, T] float32, kv [S, 2 * G * P, D], lengths [S], route [B] int32:
    join: out, lse (of a row's own sequence; both are overwritten), q, kv, lengths, route, scale.
    queries: dq (added to), dout, q, out, lse (of all that a row sees), kv, lengths, route, scale.
    tables: dkv float32 (added to), and then as `queries`.
    """
    assert shape.tile % config.queries == 0
    width, blocks = max(16, _power(shape.size)), shape.tokens // shape.tile
    ragged = shape.size != width
    share = shape.heads // shape.groups
    return (_HEADER + _FAMILIES[family]).format(
        family=family,
        tokens=shape.tokens,
        tile=shape.tile,
        heads=shape.heads,
        groups=shape.groups,
        share=share,
        size=shape.size,
        width=width,
        rows=shape.rows,
        dtype_name=shape.dtype,
        dtype=DTYPES[shape.dtype],
        queries=config.queries,
        keys=config.keys,
        table=2 * shape.groups * shape.rows,
        values=shape.groups * shape.rows * shape.size,
        steps=shape.tile // config.queries * share,
        blocks=blocks,
        block_count=_power(blocks),
        row_tiles=shape.tokens // config.queries,
        key_tiles=-(-shape.rows // config.keys),
        row_mask=f", mask=columns[None, :] < {shape.size}, other=0.0" if ragged else "",
        store_mask=f", mask=columns[None, :] < {shape.size}" if ragged else "",
        key_mask=f"seen[:, None] & (columns[None, :] < {shape.size})" if ragged else "seen[:, None]",
        warps=config.warps,
        stages=config.stages,
    )


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
