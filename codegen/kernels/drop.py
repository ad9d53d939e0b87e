"""drop: y = x * 1 / (1 - p) where an element stays and 0 where it is dropped, each block under its own slot's key and rate.

For dropout that no product takes up: the fused linears draw their masks where they read x.
"""

from __future__ import annotations

from codegen.kernels.affine import Config, Shape
from codegen.kernels.pattern import DTYPES
from codegen.kernels.text import DROPOUT, HEADER

_DROP = """

@triton.jit(do_not_specialize=["slots"])
def drop(x, y, keys, sites, route, sequences, positions, slots):
    columns = tl.program_id(0) * {columns} + tl.arange(0, {columns})
    tile = tl.program_id(1)
    rows = tile * {rows} + tl.arange(0, {rows})
    place = rows[:, None].to(tl.int64) * {features} + columns[None, :]
    slot = tl.load(route + tile * {rows} // {tile})
    value = tl.load(x + place{mask})
    if (slot >= 0) & (slot < slots):
        word0, word1, threshold, inverse = row_words(keys, sites, 0, slot, sequences, positions, rows)
        value = tl.where(kept(word0, word1, threshold, columns), value.to(tl.float32) * inverse, 0.0).to({dtype})
    tl.store(y + place, value{mask})


def launch(x, y, keys, *rest, warmup=False):
    grid = ({across}, {down})
    drop.run(x, y, keys, *rest, keys.shape[0], grid=grid, warmup=warmup, num_warps={warps})
"""


def source(shape: Shape, config: Config) -> str:
    """The kernel and its `launch`, as text.

    `launch` takes x and y [T, N], keys [S, 3], sites [1, 2], route [B], and sequences and positions [T], all but x and y int32.
    """
    assert shape.tile % config.rows == 0
    title = f"drop: rows [{shape.tokens}, {shape.features}]; {shape.dtype}, blocks of {shape.tile} rows"
    return (
        HEADER.format(title=title)
        + DROPOUT
        + _DROP.format(
            features=shape.features,
            tile=shape.tile,
            dtype=DTYPES[shape.dtype],
            rows=config.rows,
            columns=config.columns,
            across=-(-shape.features // config.columns),
            down=shape.tokens // config.rows,
            mask="" if shape.features % config.columns == 0 else f", mask=columns[None, :] < {shape.features}",
            warps=config.warps,
        )
    )
