"""Layout: the linears of one input with everyone's low-rank adapters, as shapes; and the two patterns of links in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from codegen.checks import check
from codegen.kernels.pattern import Link, Pattern


@dataclass(frozen=True, slots=True)
class Bank:
    """Tasks of one rank bucket that adapt the same linears of the input, and drop elements of it or do not.

    Args:
        rank: R, rows of a slot of each B table; A's slot has R for each member, below each other.
        members: the linears that are adapted.
        drops: whether elements of the input are dropped, each member with a mask of its own.
    """

    rank: int
    members: tuple[int, ...]
    drops: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of `reference.linears`: x [T, features], y_i [T, outputs[i]], blocks of `tile` rows."""

    tokens: int
    tile: int
    dtype: str
    features: int
    outputs: tuple[int, ...]
    banks: tuple[Bank, ...]

    @property
    def width(self) -> int:
        """W of the narrow tensors S and dS: the ranks of a bank's members side by side, the widest bank's."""
        return max((bank.rank * len(bank.members) for bank in self.banks), default=0)

    def down(self, *, drops: bool | None = None) -> Some:
        """x with the A tables; `drops` those of the banks alone that drop elements of x, or that do not."""
        banks = tuple(index for index, bank in enumerate(self.banks) if drops is None or bank.drops == drops)
        own = [self.banks[index] for index in banks]
        links = tuple(
            Link(0, index, index, place * bank.rank, place * bank.rank, bank.rank, place if bank.drops else None)
            for index, bank in enumerate(own)
            for place in range(len(bank.members))
        )
        rows = tuple(bank.rank * len(bank.members) for bank in own)
        scaled = (False,) * len(rows)
        pattern = Pattern(self.tokens, self.tile, self.dtype, (self.features,), self.width, rows, scaled, len(rows), links)
        return Some(pattern, banks, banks)

    def up(self, only: tuple[int, ...] | None = None) -> Some:
        """The outputs with the B tables; `only` some of the outputs, with the tables and banks that they have."""
        chosen = tuple(range(len(self.outputs))) if only is None else only
        banks = tuple(index for index, bank in enumerate(self.banks) if set(bank.members) & set(chosen))
        links: list[Link] = []
        tables: list[int] = []
        place = 0
        for index, bank in enumerate(self.banks):
            for member, output in enumerate(bank.members):
                if output in chosen:
                    link = Link(chosen.index(output), banks.index(index), len(tables), 0, member * bank.rank, bank.rank)
                    links.append(link)
                    tables.append(place)
                place += 1
        wides = tuple(self.outputs[output] for output in chosen)
        rows = tuple(link.rank for link in links)
        scaled = (True,) * len(rows)
        pattern = Pattern(self.tokens, self.tile, self.dtype, wides, self.width, rows, scaled, len(banks), tuple(links))
        return Some(pattern, tuple(tables), banks)


@dataclass(frozen=True, slots=True)
class Some:
    """A pattern over some of the tables: which of all tables, and which of all banks, are its own, in order."""

    pattern: Pattern
    tables: tuple[int, ...]
    banks: tuple[int, ...]


@lru_cache(maxsize=4096)
def _layout(
    tokens: int,
    blocks: int,
    dtype: str,
    features: int,
    outputs: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
    members: tuple[int, ...],
    drops: tuple[bool, ...],
) -> Layout:
    banks, start = [], 0
    for rows, dropping in zip(a, drops, strict=True):
        rank = b[start]
        stop = start + rows // rank
        banks.append(Bank(rank, members[start:stop], dropping))
        start = stop
    return Layout(tokens, tokens // blocks, dtype, features, outputs, tuple(banks))


def layout_of(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    blocks: int,
    members: Sequence[int],
    drops: Sequence[int],
) -> Layout:
    """The layout of checked arguments."""
    return _layout(
        x.numel() // x.shape[-1],
        blocks,
        str(x.dtype).removeprefix("torch."),
        x.shape[-1],
        tuple(weight.shape[0] for weight in weights),
        tuple(table.shape[1] for table in a),
        tuple(table.shape[1] for table in b),
        tuple(members),
        tuple(bool(dropping) for dropping in drops),
    )


def check_banks(a: Sequence[Tensor], b: Sequence[Tensor], outputs: int, members: Sequence[int]) -> list[range]:
    """That the tables of B are those of A's banks, one after another; returns each bank's places in `b`."""
    banks = []
    check(len(members) == len(b), f"linears: members has {len(members)} entries, b has {len(b)} tables")
    start = 0
    for index, table in enumerate(a):
        check(start < len(b), f"linears: a[{index}] has no table in b")
        rank = b[start].shape[1]
        check(1 <= rank <= 256, f"linears: b[{start}] has rank {rank}, must be 1 to 256")
        whole = table.shape[1] > 0 and table.shape[1] % rank == 0
        check(whole, f"linears: a[{index}] has {table.shape[1]} rows, not a positive multiple of b[{start}]'s rank {rank}")
        stop = start + table.shape[1] // rank
        check(stop <= len(b), f"linears: a[{index}] has rows for {stop - start} tables of b, {len(b) - start} are left")
        for place in range(start, stop):
            check(0 <= members[place] < outputs, f"linears: members[{place}] is {members[place]}, there are {outputs} linears")
            check(b[place].shape[1] == rank, f"linears: b[{place}] has rank {b[place].shape[1]}, b[{start}] has {rank}")
        check(len(set(members[start:stop])) == stop - start, f"linears: members of a[{index}] name a linear twice")
        banks.append(range(start, stop))
        start = stop
    check(start == len(b), f"linears: b has {len(b)} tables, a has rows for {start}")
    return banks
