"""put: a slot's row becomes the values at its places of a matrix, if the slot has blocks: others may be writing those without."""

from __future__ import annotations

_STEP = 1024

_PUT = '''"""put: {count} values; {blocks} blocks"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slot"])
def put(matrix, places, route, grad, slot):
    at = tl.program_id(0) * {step} + tl.arange(0, {step})
    blocks = tl.arange(0, {size})
    slots = tl.load(route + blocks, mask=blocks < {blocks}, other=-1)
    if tl.max((slots == slot).to(tl.int32), 0) > 0:
        inside = at < {count}
        value = tl.load(matrix + tl.load(places + at, mask=inside, other=0), mask=inside)
        tl.store(grad + slot.to(tl.int64) * {count} + at, value, mask=inside)


def launch(*tensors, warmup=False):
    put.run(*tensors, grid=({across},), warmup=warmup)
'''


def source(count: int, blocks: int) -> str:
    """The kernel and its `launch`, as text; it takes a matrix, places [count] int64, route [blocks], grad [S, 1, count], slot."""
    size = 1 << (blocks - 1).bit_length()
    return _PUT.format(count=count, blocks=blocks, step=_STEP, size=size, across=-(-count // _STEP))
