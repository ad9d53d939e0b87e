"""outer: table += scale * narrow[:, columns]^T wide, a slot's blocks one after another (dB += S^T dY beside dA += dS^T x).

A program owns some columns of one slot's gradient and walks that slot's blocks in order: no atomics, no partial sums in memory, and
the sum is the one `codegen.reference.tile_outer` says, whichever chunk or place a block lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codegen.kernels import text
from codegen.kernels.pattern import Pattern, Run, padded, runs

MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Config:
    """A program owns `columns` features of a slot and takes `step` rows of a block at a time."""

    columns: int = 64
    step: int = 128
    warps: int = 4
    stages: int = 4


_BODY = """
own = slots == slot
first = tl.min(tl.where(own, blocks, {blocks}))
if first < {blocks}:  # a slot that has no rows here keeps its gradient
    grad = table{table} + slot.to(tl.int64) * {slot_size} + {first}{row_offset}
    ranks = tl.arange(0, {padded})
    place = grad + ranks[:, None] * {features} + columns[None, :]
    acc = tl.trans(tl.load(place{mask_w}))  # [columns, ranks]
{scale}    begin = first
    while begin < {blocks}:
        end = tl.min(tl.where((slots != slot) & (blocks > begin), blocks, {blocks}))
        for step in range(begin * {steps}, end * {steps}):
            rows = step * {step} + tl.arange(0, {step})
            s = tl.load(narrow + {row} * {width} + {column}{column_offset} + ranks[None, :]{mask_s})
            x = tl.load(wide{wide} + rows[:, None].to(tl.int64) * {features} + columns[None, :]{mask_x})
{drop}{sum}
        begin = tl.min(tl.where(own & (blocks >= end), blocks, {blocks}))
    tl.store(place, tl.trans(acc){store_mask})
"""


def source(patterns: Sequence[Pattern], config: Config) -> str:
    """The kernel and its `launch`, as text; its tensors are those of each pattern in turn. The tables are the float32 gradients.

    Patterns of one launch do not wait for each other, and what one leaves of the device another takes: they have the same banks,
    with as many slots.
    """
    patterns = [own.merged(MOST_RANKS).split(MOST_RANKS) for own in patterns]
    strips = [_strips(own, config) for own in patterns]
    names = [[f"{name}_{index}" for name in text.arguments(own)] for index, own in enumerate(patterns)]
    counts = text.counts(patterns[0])
    body, first = [], 0
    for index, (own, count) in enumerate(zip(names, strips, strict=True)):
        body.append(f"{'elif' if index else 'if'} strip < {first + count}:")
        body.append(f"    sums_{index}({', '.join([f'strip - {first}', 'program', *own, *counts])})")
        first += count
    return (
        text.header("outer", *patterns)
        + "".join(_sums(index, own, config) for index, own in enumerate(patterns))
        + f"\n\n{text.decorator(patterns[0])}\ndef outer({', '.join([*(name for own in names for name in own), *counts])}):\n"
        + "    strip = tl.program_id(0)\n    program = tl.program_id(1)\n"
        + text.indent("\n".join(body), 1)
        + "\n\n\ndef launch(*tensors, warmup=False):\n"
        + f"    slots = {text.slots(patterns[0])}\n"
        + f"    grid = ({first}, sum(slots))\n"
        + f"    outer.run(*tensors, *slots, grid=grid, warmup=warmup, "
        f"num_warps={config.warps}, num_stages={config.stages})\n"
    )


def _strips(pattern: Pattern, config: Config) -> int:
    """Programs of a slot: of the bank that has most."""
    of_banks = (runs(text.of_bank(pattern, bank)) for bank in range(pattern.banks))
    return max(sum(run.count * -(-pattern.wides[run.link.wide] // config.columns) for run in own) for own in of_banks)


def _sums(index: int, pattern: Pattern, config: Config) -> str:
    """What a program does of one pattern."""
    blocks = pattern.tokens // pattern.tile
    body = [f"blocks = tl.arange(0, {1 << (blocks - 1).bit_length()})"]
    for bank in range(pattern.banks):
        body.append(f"if (program >= 0) & (program < slots{bank}):")
        body.append("    slot = program")
        body.append(f"    slots = tl.load(route{bank} + blocks, mask=blocks < {blocks}, other=-1)")
        first = 0
        for run in runs(text.of_bank(pattern, bank)):
            count = -(-pattern.wides[run.link.wide] // config.columns)
            body.append(f"    if (strip >= {first}) & (strip < {first + run.count * count}):")
            if run.count > 1:
                body.append(f"        piece = (strip - {first}) // {count}")
            at = f"(strip - {first}) % {count}" if run.count > 1 else f"(strip - {first})"
            body.append(f"        columns = {at} * {config.columns} + tl.arange(0, {config.columns})")
            body.append(text.indent(_run(pattern, config, run, blocks), 2))
            first += run.count * count
        body.append(f"program -= slots{bank}")
    names = ", ".join(["strip", "program", *text.arguments(pattern), *text.counts(pattern)])
    return f"\n\n@triton.jit\ndef sums_{index}({names}):\n" + text.indent("\n".join(body), 1) + "\n"


def _run(pattern: Pattern, config: Config, run: Run, blocks: int) -> str:
    link = run.link
    features, ranks = pattern.wides[link.wide], padded(link.rank)
    slot_size = pattern.tables[link.table] * features
    step = min(config.step, pattern.tile)
    full, whole = ranks == link.rank, features % config.columns == 0
    inside = "" if whole else f"columns[None, :] < {features}"
    mask_w = " & ".join(f"({term})" for term in ("" if full else f"ranks[:, None] < {link.rank}", inside) if term)
    scale, drop, factors = "", "", []
    if pattern.scaled[link.table]:
        scale = f"    factor = tl.load(scale{link.table} + slot)\n"
        factors.append("factor")
    if link.site is not None:
        drop = text.indent(text.words(link, run.site) + "x = tl.where(kept(word0, word1, threshold, columns), x, 0.0)", 3) + "\n"
        factors.append("inverse")
    precision = ', input_precision="ieee"' if pattern.dtype == "float32" else ""
    steps = pattern.tile // step
    # Features are the long side of the product: 64 of them fill a matrix instruction whatever the rank.
    product = f"tl.dot(tl.trans(x), s{precision})"
    if steps == 1:
        total = f"            acc += {' * '.join([*factors, product])}"
    else:
        # A block's product is one sum; only whole blocks are added.
        ends = " * ".join([*factors, "partial"])
        total = (
            f"            partial = tl.dot(tl.trans(x), s, tl.where(step % {steps} == 0, 0.0, partial){precision})\n"
            f"            acc += tl.where(step % {steps} == {steps - 1}, {ends}, 0.0)"
        )
        scale += f"    partial = tl.zeros(({config.columns}, {ranks}), tl.float32)\n"
    return _BODY.format(
        table=link.table,
        slot_size=slot_size,
        first=link.row * features,
        row_offset=run.offset(features, slot_size),
        column_offset=run.offset(1, pattern.width),
        padded=ranks,
        features=features,
        mask_w=f", mask={mask_w}, other=0.0" if mask_w else "",
        store_mask=f", mask={mask_w}" if mask_w else "",
        scale=scale,
        blocks=blocks,
        steps=steps,
        step=step,
        row=pattern.row,
        width=pattern.width,
        column=link.column,
        mask_s="" if full else f", mask=ranks[None, :] < {link.rank}, other=0.0",
        wide=link.wide,
        mask_x=f", mask={inside}, other=0.0" if inside else "",
        drop=drop,
        sum=total,
    )
