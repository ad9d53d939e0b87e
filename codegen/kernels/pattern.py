"""What the tile kernels work on: wide tensors [T, F], one narrow tensor [T, W], slot tables [S, rows, F], and how they are linked.

A link joins `rank` columns of the narrow tensor with as many rows of a table and with one wide tensor. The three kernel families
are the three products over such a link, each block of tokens with the rows of its own slot:

    contract   narrow[:, columns]  = wide table^T            (S = x A^T, dS = dY B^T)
    expand     wide               += narrow[:, columns] table (y += S B, dX += dS A)
    outer      table              += narrow[:, columns]^T wide (dB += S^T dY, dA += dS^T x)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DTYPES = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}


@dataclass(frozen=True, slots=True)
class Link:
    """One adapter place.

    Args:
        wide: index of the wide tensor.
        bank: index of the route: a bank's tasks share tables, a block of tokens is routed in at most one bank.
        table: index of the table; its scale, if it has one, has the same index.
        row: first row of the table that takes part.
        column: first column of the narrow tensor.
        rank: rows of the table and columns of the narrow tensor that take part.
        site: index of the place's dropout key among those of its bank; None: no dropout. It drops elements of the wide tensor.
    """

    wide: int
    bank: int
    table: int
    row: int
    column: int
    rank: int
    site: int | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """The links of one launch and every static size.

    Args:
        tokens, tile: T and the rows of a block.
        dtype: of wide, narrow and tables ("bfloat16"); gradients of tables are float32.
        wides: F of each wide tensor.
        width: W of the narrow tensor.
        tables: rows of each table's slot.
        scaled: for each table whether it has a scale [S].
        banks: number of routes.
        links: those of a bank in the order of their columns; a block of rows meets the links of one bank alone.
    """

    tokens: int
    tile: int
    dtype: str
    wides: tuple[int, ...]
    width: int
    tables: tuple[int, ...]
    scaled: tuple[bool, ...]
    banks: int
    links: tuple[Link, ...]

    def merged(self, most: int) -> Pattern:
        """Links that lie beside each other in narrow tensor and table become one, up to `most` wide, if they drop nothing."""
        links: list[Link] = []
        for link in self.links:
            last = links[-1] if links else None
            joins = (
                last is not None
                and (last.wide, last.bank, last.table) == (link.wide, link.bank, link.table)
                and (last.row + last.rank, last.column + last.rank) == (link.row, link.column)
                and last.site is None
                and link.site is None
                and last.rank + link.rank <= most
            )
            if joins:
                assert last is not None
                links[-1] = replace(last, rank=last.rank + link.rank)
            else:
                links.append(link)
        return replace(self, links=tuple(links))

    def split(self, most: int) -> Pattern:
        """Links wider than `most` are cut."""
        links = [
            replace(link, row=link.row + start, column=link.column + start, rank=min(most, link.rank - start))
            for link in self.links
            for start in range(0, link.rank, most)
        ]
        return replace(self, links=tuple(links))

    @property
    def row(self) -> str:
        """Rows of the narrow tensor as a factor of an address, as text."""
        return factor("rows[:, None]", self.tokens * self.width)

    @property
    def dropout(self) -> bool:
        return any(link.site is not None for link in self.links)


@dataclass(frozen=True, slots=True)
class Run:
    """Links that differ by their place alone: one piece of code, told at run time which of them it is.

    Args:
        link: the first; each further one lies `link.rank` rows and columns on.
        count: how many there are.
        per_site: links of one dropout key, which follow each other.
    """

    link: Link
    count: int = 1
    per_site: int = 1

    def offset(self, size: int, elements: int) -> str:
        """`size` for each rank of the links before this one, as text to add to an address among so many elements."""
        return "" if self.count == 1 else f" + {factor('piece', elements)} * {size * self.link.rank}"

    @property
    def site(self) -> str:
        """The index of this link's dropout key, as text."""
        return str(self.link.site) if self.count == 1 else f"{self.link.site} + piece // {self.per_site}"


def runs(links: list[Link]) -> list[Run]:
    """The links of one bank in their order, as runs."""
    found: list[list[Link]] = []
    for link in links:
        last = found[-1] if found else []
        follows = (
            bool(last)
            and (link.wide, link.table, link.rank) == (last[0].wide, last[0].table, last[0].rank)
            and (link.row, link.column) == (last[-1].row + link.rank, last[-1].column + link.rank)
            and (link.site is None) == (last[0].site is None)
        )
        if follows:
            last.append(link)
        else:
            found.append([link])
    return [run for group in found for run in _regular(group)]


def _regular(group: list[Link]) -> list[Run]:
    """One run if the dropout keys advance regularly, else a run for each link."""
    first = group[0]
    per_site = sum(link.site == first.site for link in group)
    if first.site is None or all(link.site == first.site + index // per_site for index, link in enumerate(group)):
        return [Run(first, len(group), per_site)]
    return [Run(link) for link in group]


def factor(index: str, elements: int) -> str:
    """An index of a tensor of so many elements: int32, in which addresses are cheaper, wherever that reaches the last of them."""
    return f"{index}.to(tl.int64)" if elements >= 2**31 else index


def padded(rank: int) -> int:
    """The size a rank takes in a matrix instruction: a power of two of at least 16."""
    return max(16, 1 << (rank - 1).bit_length())
