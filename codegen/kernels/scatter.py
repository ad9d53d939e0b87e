"""scatter: grad[place] += the rows of that place, one after another. Rows come sorted by place, and within a place in their order.

The program at a place's first row walks them all, so that nothing is added by two programs and no atomic is needed. Rows are the
grid's x: of y CUDA launches 65535 at most.
"""

from __future__ import annotations

from codegen.kernels.affine import Config, Shape

_SCATTER = '''"""scatter: rows [{tokens}, {features}]; {dtype_name}, added to float32"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["limit"])
def scatter(rows, places, order, grad, limit):
    columns = tl.program_id(1) * {columns} + tl.arange(0, {columns})
    at = tl.program_id(0)
    place = tl.load(places + at)
    before = tl.load(places + at - 1, mask=at > 0, other=-1)
    if (place < limit) & (place != before):
        target = grad + place * {features} + columns
        acc = tl.load(target{mask})
        current = place
        while current == place:
            row = tl.load(order + at)
            acc += tl.load(rows + row * {features} + columns{mask}).to(tl.float32)
            at += 1
            current = tl.load(places + at, mask=at < {tokens}, other=-1)
        tl.store(target, acc{mask})


def launch(*tensors, warmup=False):
    scatter.run(*tensors, grid=({tokens}, {across}), warmup=warmup, num_warps={warps})
'''


def source(shape: Shape, config: Config) -> str:
    """The kernel and its `launch`, as text; `launch` takes rows [T, F], places and order [T] int64, grad [S, V, F], S * V."""
    return _SCATTER.format(
        tokens=shape.tokens,
        features=shape.features,
        dtype_name=shape.dtype,
        columns=config.columns,
        across=-(-shape.features // config.columns),
        mask="" if shape.features % config.columns == 0 else f", mask=columns < {shape.features}",
        warps=config.warps,
    )
