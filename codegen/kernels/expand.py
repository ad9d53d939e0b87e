"""expand: wide (+)= scale * narrow[:, columns] table, a few ranks for each of many features (y = S B, dX = dS A)."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels import text
from codegen.kernels.pattern import DTYPES, Link, Pattern, factor, padded

MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Config:
    """A program makes `rows` x `columns` of a wide tensor."""

    rows: int = 128
    columns: int = 128
    warps: int = 4
    stages: int = 2


_LINK = """
{words}for start in {loop}(0, {rank}, {depth}):
    ranks = start + tl.arange(0, {depth})
    s = tl.load(narrow + {row} * {width} + {column} + ranks[None, :]{mask_s})
    matrix = table{table} + slot.to(tl.int64) * {slot_size} + {first}
    w = tl.load(matrix + {rank_row} * {features} + columns[None, :]{mask_w})
    {target} = tl.dot(s, w, {target}{precision})
"""


def source(pattern: Pattern, config: Config, *, add: bool) -> str:
    """The kernel and its `launch`, as text.

    Args:
        add: add to what the wide tensors hold; rows without an adapter are then left alone. Otherwise every row is written.
    """
    pattern = pattern.merged(1 << 30)
    groups = [-(-features // config.columns) for features in pattern.wides]
    names = [*text.arguments(pattern), *text.counts(pattern)]
    body, first = [], 0
    for wide in range(len(pattern.wides)):
        body.append(f"if (group >= {first}) & (group < {first + groups[wide]}):")
        body.append(f"    columns = (group - {first}) * {config.columns} + tl.arange(0, {config.columns})")
        body.append(text.indent(_tile(pattern, config, wide, add), 1))
        first += groups[wide]
    return (
        text.header("expand", pattern)
        + f"\n\n{text.decorator(pattern)}\ndef expand({', '.join(names)}):\n"
        + "    group = tl.program_id(0)\n    tile = tl.program_id(1)\n"
        + f"    rows = tile * {config.rows} + tl.arange(0, {config.rows})\n"
        + text.indent("\n".join(body), 1)
        + "\n\n\ndef launch(*tensors, warmup=False):\n"
        + f"    grid = ({sum(groups)}, {pattern.tokens // config.rows})\n"
        + f"    expand.run(*tensors, *{text.slots(pattern)}, grid=grid, warmup=warmup, "
        f"num_warps={config.warps}, num_stages={config.stages})\n"
    )


def _tile(pattern: Pattern, config: Config, wide: int, add: bool) -> str:
    features = pattern.wides[wide]
    dtype, inside = DTYPES[pattern.dtype], "" if features % config.columns == 0 else f"columns[None, :] < {features}"
    lines = [f"acc = tl.zeros(({config.rows}, {config.columns}), tl.float32)", "routed = False"]
    for bank in range(pattern.banks):
        links = [link for link in pattern.links if link.bank == bank and link.wide == wide]
        if links:
            lines += text.route(pattern, bank, config.rows)
            lines.append("if slot >= 0:")
            lines += [text.indent(_link(pattern, config, link), 1) for link in links]
    mask = f", mask={inside}" if inside else ""
    place = f"wide{wide} + rows[:, None].to(tl.int64) * {features} + columns[None, :]"
    if add:
        lines += [
            "if routed:",
            f"    place = {place}",
            f"    acc += tl.load(place{mask})",
            f"    tl.store(place, acc.to({dtype}){mask})",
        ]
        return "\n".join(lines)
    lines.append(f"tl.store({place}, acc.to({dtype}){mask})")
    return "\n".join(lines)


def _link(pattern: Pattern, config: Config, link: Link) -> str:
    features = pattern.wides[link.wide]
    slot_size = pattern.tables[link.table] * features
    depth = min(padded(link.rank), MOST_RANKS)
    full, whole = link.rank % depth == 0, features % config.columns == 0
    of_rank = "" if full else f"ranks[:, None] < {link.rank}"
    mask_w = " & ".join(f"({term})" for term in (of_rank, "" if whole else f"columns[None, :] < {features}") if term)
    alone = link.site is None and not pattern.scaled[link.table]
    words, after = "", []
    if link.site is not None:
        words = text.words(link, str(link.site))
        after.append("own = tl.where(kept(word0, word1, threshold, columns), own * inverse, 0.0)")
    if pattern.scaled[link.table]:
        after.append(f"own *= tl.load(scale{link.table} + slot)")
    if not alone:
        words += f"own = tl.zeros(({config.rows}, {config.columns}), tl.float32)\n"
        after.append("acc += own")
    product = _LINK.format(
        words=words,
        loop="tl.static_range" if link.rank <= 4 * depth else "range",
        rank=link.rank,
        depth=depth,
        row=pattern.row,
        width=pattern.width,
        column=link.column,
        table=link.table,
        slot_size=slot_size,
        first=link.row * features,
        rank_row=factor("ranks[:, None]", slot_size),
        features=features,
        mask_s="" if full else f", mask=ranks[None, :] < {link.rank}, other=0.0",
        mask_w=f", mask={mask_w}, other=0.0" if mask_w else "",
        target="acc" if alone else "own",
        precision=', input_precision="ieee"' if pattern.dtype == "float32" else "",
    )
    return product.rstrip("\n") + "\n" + "\n".join(after)
