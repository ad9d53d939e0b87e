"""contract: narrow[:, columns] = scale * wide table^T, a long sum over features for a few ranks (S = x A^T, dS = dY B^T)."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels import text
from codegen.kernels.pattern import DTYPES, Pattern, Run, padded, runs

MOST_RANKS = 256


@dataclass(frozen=True, slots=True)
class Config:
    """`rows` of the narrow tensor a program makes, `step` features at a time."""

    rows: int = 64
    step: int = 128
    warps: int = 4
    stages: int = 4


_HELPERS = '''

@triton.jit
def zeros(narrow, rows, FIRST: tl.constexpr, LAST: tl.constexpr):
    """narrow[rows, FIRST:LAST] = 0"""
    for start in range(FIRST, LAST, 16):
        columns = start + tl.arange(0, 16)
        place = narrow + {row} * {width} + columns[None, :]
        tl.store(place, tl.zeros(place.shape, {dtype}), mask=columns[None, :] < LAST)
'''

_BODY = """
acc = tl.zeros(({rows}, {padded}), tl.float32)
ranks = tl.arange(0, {padded})
matrix = table{table} + slot.to(tl.int64) * {slot_size} + {first}{row_offset}
{words}for start in range(0, {features}, {step}):
    features = start + tl.arange(0, {step})
    x = tl.load(wide{wide} + rows[:, None].to(tl.int64) * {features} + features[None, :]{mask_x})
    w = tl.load(matrix + ranks[:, None] * {features} + features[None, :]{mask_w})
{drop}    acc = tl.dot(x, tl.trans(w), acc{precision})
{scale}tl.store(narrow + {row} * {width} + {column}{column_offset} + ranks[None, :], acc.to({dtype}){mask_s})
"""


def source(pattern: Pattern, config: Config) -> str:
    """The kernel and its `launch`, as text."""
    pattern = pattern.merged(MOST_RANKS).split(MOST_RANKS)
    banks = [text.of_bank(pattern, bank) for bank in range(pattern.banks)]
    parts = max(len(links) for links in banks)
    names = ", ".join([*text.arguments(pattern), *text.counts(pattern)])
    body = []
    for bank, links in enumerate(banks):
        body += text.route(pattern, bank, config.rows)
        first = 0
        for run in runs(links):
            if run.count == 1:
                body.append(f"if (slot >= 0) & (part == {first}):")
            else:
                body.append(f"if (slot >= 0) & (part >= {first}) & (part < {first + run.count}):")
                body.append(f"    piece = part - {first}")
            body.append(text.indent(_run(pattern, config, run), 1))
            first += run.count
        end = max(found.column + found.rank for found in links)
        if end < pattern.width:
            body.append("if (slot >= 0) & (part == 0):")
            body.append(f"    zeros(narrow, rows, {end}, {pattern.width})")
    return (
        text.header("contract", pattern)
        + _HELPERS.format(row=pattern.row, width=pattern.width, dtype=DTYPES[pattern.dtype])
        + f"\n\n{text.decorator(pattern)}\ndef contract({names}):\n"
        + "    part = tl.program_id(0)\n    tile = tl.program_id(1)\n"
        + f"    rows = tile * {config.rows} + tl.arange(0, {config.rows})\n    routed = False\n"
        + text.indent("\n".join(body), 1)
        + f"\n    if (part == 0) & (routed == 0):\n        zeros(narrow, rows, 0, {pattern.width})\n"
        + "\n\ndef launch(*tensors, warmup=False):\n"
        + f"    grid = ({parts}, {pattern.tokens // config.rows})\n"
        + f"    contract.run(*tensors, *{text.slots(pattern)}, grid=grid, warmup=warmup, "
        f"num_warps={config.warps}, num_stages={config.stages})\n"
    )


def _run(pattern: Pattern, config: Config, run: Run) -> str:
    link = run.link
    features, ranks = pattern.wides[link.wide], padded(link.rank)
    slot_size = pattern.tables[link.table] * features
    whole, full = features % config.step == 0, ranks == link.rank
    inside = "" if whole else f"features[None, :] < {features}"
    of_rank = "" if full else f"ranks[:, None] < {link.rank}"
    mask_w = " & ".join(f"({term})" for term in (of_rank, inside) if term)
    words = drop = scale = ""
    if link.site is not None:
        words = text.words(link, run.site)
        drop = "    x = tl.where(kept(word0, word1, threshold, features), x, 0.0)\n"
        scale = "acc *= inverse\n"
    if pattern.scaled[link.table]:
        scale += f"acc *= tl.load(scale{link.table} + slot)\n"
    return _BODY.format(
        rows=config.rows,
        padded=ranks,
        table=link.table,
        slot_size=slot_size,
        first=link.row * features,
        row_offset=run.offset(features, slot_size),
        column_offset=run.offset(1, pattern.width),
        features=features,
        step=config.step,
        wide=link.wide,
        mask_x=f", mask={inside}, other=0.0" if inside else "",
        mask_w=f", mask={mask_w}, other=0.0" if mask_w else "",
        words=words,
        drop=drop,
        precision=', input_precision="ieee"' if pattern.dtype == "float32" else "",
        scale=scale,
        row=pattern.row,
        width=pattern.width,
        column=link.column,
        dtype=DTYPES[pattern.dtype],
        mask_s="" if full else f", mask=ranks[None, :] < {link.rank}",
    )
