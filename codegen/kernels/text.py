"""Pieces of text that the kernel families share."""

from __future__ import annotations

from codegen.kernels.pattern import Link, Pattern

HEADER = '''"""{title}"""

import triton
import triton.language as tl
'''

# The mask of dropout, a function of counters alone: two words for each row from Philox (Salmon et al., SC'11) under the task's own
# key, counting its own sequences and positions, and for each column a multiply-xorshift hash that both words enter.
# `codegen.reference.kept` is the same in plain torch.
DROPOUT = '''

@triton.jit
def row_words(drop, sites, site, slot, sequences, positions, rows):
    """Two random words for each row, one counted from the place's first column; what drops an element is below; 1 / (1 - p)."""
    low = tl.load(drop + slot * 3).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(drop + slot * 3 + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    threshold = tl.load(drop + slot * 3 + 2).to(tl.uint32, bitcast=True)
    position = tl.load(positions + rows).to(tl.uint32)
    sequence = tl.load(sequences + rows).to(tl.uint32)
    zero = position * 0
    word0, word1, _, _ = tl.philox((high << 32) | low, position, sequence, zero + tl.load(sites + site * 2).to(tl.uint32), zero, 10)
    word0 += tl.load(sites + site * 2 + 1).to(tl.uint32)
    inverse = 4294967296.0 / (4294967296.0 - threshold.to(tl.float32))
    return word0, word1, threshold, inverse


@triton.jit
def kept(word0, word1, threshold, columns):
    """Whether each element of [rows, columns] stays."""
    h = columns[None, :].to(tl.uint32) + word0[:, None]
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h += word1[:, None]
    h *= 0x846CA68B
    h ^= h >> 16
    return h >= threshold
'''


def header(family: str, *patterns: Pattern) -> str:
    """Of a kernel over one pattern, or several of one chunk and dtype."""
    shapes = []
    for pattern in patterns:
        wides = ", ".join(f"[{pattern.tokens}, {size}]" for size in pattern.wides)
        tables = ", ".join(f"[S, {rows}, F]" for rows in pattern.tables)
        shapes.append(f"wide {wides}; narrow [{pattern.tokens}, {pattern.width}]; tables {tables}")
    title = f"{family}: {'; and '.join(shapes)}; {patterns[0].dtype}, blocks of {patterns[0].tile} rows"
    return HEADER.format(title=title) + (DROPOUT if any(own.dropout for own in patterns) else "")


def arguments(pattern: Pattern, *, narrow: str = "narrow") -> list[str]:
    """The kernel's parameters, in the order of `launch`."""
    return [
        *(f"wide{index}" for index in range(len(pattern.wides))),
        narrow,
        *(f"table{index}" for index in range(len(pattern.tables))),
        *(f"scale{index}" for index, scaled in enumerate(pattern.scaled) if scaled),
        *(f"route{index}" for index in range(pattern.banks)),
        *(f"drop{bank}" for bank in dropping(pattern)),
        *(f"sites{bank}" for bank in dropping(pattern)),
        *(("sequences", "positions") if pattern.dropout else ()),
    ]


def counts(pattern: Pattern) -> list[str]:
    """The parameters that hold each bank's number of slots."""
    return [f"slots{bank}" for bank in range(pattern.banks)]


def decorator(pattern: Pattern) -> str:
    """A slot count is a number like any other: no kernel of its own for the count 1 or for multiples of 16."""
    names = ", ".join(f'"{name}"' for name in counts(pattern))
    return f"@triton.jit(do_not_specialize=[{names}])" if names else "@triton.jit"


def slots(pattern: Pattern) -> str:
    """The expression in `launch` for each bank's number of slots: the length of one of its tables, by the first tensors."""
    names = arguments(pattern)
    tables = [next(link.table for link in of_bank(pattern, bank)) for bank in range(pattern.banks)]
    return "[" + ", ".join(f"tensors[{names.index(f'table{table}')}].shape[0]" for table in tables) + "]"


def route(pattern: Pattern, bank: int, rows: int) -> list[str]:
    """Which slot the program's rows belong to; what lies outside the tables is nobody's."""
    return [
        f"slot = tl.load(route{bank} + tile * {rows} // {pattern.tile})",
        f"slot = tl.where(slot < slots{bank}, slot, -1)",
        "routed |= slot >= 0",
    ]


def dropping(pattern: Pattern) -> list[int]:
    """The banks that drop elements."""
    return sorted({link.bank for link in pattern.links if link.site is not None})


def words(link: Link, site: str) -> str:
    """The row's random words of a link that drops elements."""
    return (
        f"word0, word1, threshold, inverse = row_words("
        f"drop{link.bank}, sites{link.bank}, {site}, slot, sequences, positions, rows)\n"
    )


def of_bank(pattern: Pattern, bank: int) -> list[Link]:
    return [link for link in pattern.links if link.bank == bank]


def indent(text: str, depth: int) -> str:
    return "\n".join("    " * depth + line if line else line for line in text.strip("\n").split("\n"))
