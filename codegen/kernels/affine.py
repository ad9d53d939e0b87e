"""affine: y = x * scale[slot] + shift[slot] - base for the rows of each block's own slot, and what is given for everybody else's.

total: table[slot] += the sum of a * b over a slot's rows, its blocks one after another: the gradients of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.pattern import DTYPES


@dataclass(frozen=True, slots=True)
class Shape:
    """[T, N] rows in blocks of `tile`, of a dtype by name."""

    tokens: int
    tile: int
    features: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Config:
    """A program takes `columns` features; of `affine` also `rows`, which divide a block."""

    rows: int = 32
    columns: int = 128
    warps: int = 4


_AFFINE = '''"""affine: rows [{tokens}, {features}]; {dtype_name}, blocks of {tile} rows"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots"])
def affine(x, y, {names}route, slots):
    columns = tl.program_id(0) * {columns} + tl.arange(0, {columns})
    tile = tl.program_id(1)
    rows = tile * {rows} + tl.arange(0, {rows})
    place = rows[:, None].to(tl.int64) * {features} + columns[None, :]
    slot = tl.load(route + tile * {rows} // {tile})
    if (slot >= 0) & (slot < slots):
        own = slot.to(tl.int64) * {features} + columns
        value = tl.load(x + place{mask}).to(tl.float32)
{terms}        tl.store(y + place, value.to({dtype}){mask})
    else:
        tl.store(y + place, tl.load({otherwise} + place{mask}){mask})


def launch(*tensors, warmup=False):
    grid = ({across}, {down})
    affine.run(*tensors, grid=grid, warmup=warmup, num_warps={warps})
'''

_TOTAL = '''"""total: rows [{tokens}, {features}]; {dtype_name}, blocks of {tile} rows"""

import triton
import triton.language as tl


@triton.jit
def total(a, {names}grad, route):
    columns = tl.program_id(0) * {columns} + tl.arange(0, {columns})
    slot = tl.program_id(1)
    blocks = tl.arange(0, {size})
    slots = tl.load(route + blocks, mask=blocks < {blocks}, other=-1)
    own = slots == slot
    place = grad + slot.to(tl.int64) * {features} + columns
    acc = tl.load(place{column_mask})
    first = tl.min(tl.where(own, blocks, {blocks}))
    begin = first
    while begin < {blocks}:
        end = tl.min(tl.where((slots != slot) & (blocks > begin), blocks, {blocks}))
        for block in range(begin, end):
            rows = block * {tile} + tl.arange(0, {tile})
            where = rows[:, None].to(tl.int64) * {features} + columns[None, :]
            value = tl.load(a + where{mask}).to(tl.float32)
{factor}            acc += tl.sum(value, 0)
        begin = tl.min(tl.where(own & (blocks >= end), blocks, {blocks}))
    if first < {blocks}:  # others may be writing the rows of a slot that has none here
        tl.store(place, acc{column_mask})


def launch(*tensors, warmup=False):
    grid = ({across}, tensors[{grad}].shape[0])
    total.run(*tensors, grid=grid, warmup=warmup, num_warps={warps})
'''


def _masks(shape: Shape, config: Config) -> tuple[str, str]:
    if shape.features % config.columns == 0:
        return "", ""
    return f", mask=columns[None, :] < {shape.features}", f", mask=columns < {shape.features}"


def source(shape: Shape, config: Config, *, scale: bool, shift: bool, base: bool, otherwise: bool) -> str:
    """The kernel and its `launch`, as text.

    Args:
        scale, shift, base, otherwise: which of the operands there are, in the order of `launch`: x, y, these, route, slots.
    """
    assert shape.tile % config.rows == 0
    mask, column_mask = _masks(shape, config)
    given = {"scale": scale, "shift": shift, "base": base, "otherwise": otherwise}
    terms = ""
    if scale:
        terms += f"        value *= tl.load(scale + own{column_mask}).to(tl.float32)[None, :]\n"
    if shift:
        terms += f"        value += tl.load(shift + own{column_mask}).to(tl.float32)[None, :]\n"
    if base:
        terms += f"        value -= tl.load(base + columns{column_mask}).to(tl.float32)[None, :]\n"
    return _AFFINE.format(
        **_common(shape, config),
        names="".join(f"{name}, " for name, present in given.items() if present),
        rows=config.rows,
        down=shape.tokens // config.rows,
        mask=mask,
        terms=terms,
        otherwise="otherwise" if otherwise else "x",
    )


def total(shape: Shape, config: Config, *, product: bool) -> str:
    """The kernel and its `launch`, as text; `launch` takes a, b if it is a `product`, the float32 gradient [S, 1, N], route."""
    mask, column_mask = _masks(shape, config)
    blocks = shape.tokens // shape.tile
    return _TOTAL.format(
        **_common(shape, config),
        names="b, " if product else "",
        blocks=blocks,
        size=1 << (blocks - 1).bit_length(),
        mask=f"{mask}, other=0.0" if mask else "",
        column_mask=column_mask,
        factor=f"            value *= tl.load(b + where{mask}{', other=0.0' if mask else ''}).to(tl.float32)\n" if product else "",
        grad=2 if product else 1,
    )


def _common(shape: Shape, config: Config) -> dict[str, object]:
    return {
        "tokens": shape.tokens,
        "features": shape.features,
        "tile": shape.tile,
        "dtype_name": shape.dtype,
        "dtype": DTYPES[shape.dtype],
        "columns": config.columns,
        "across": -(-shape.features // config.columns),
        "warps": config.warps,
    }
