"""Every kernel family, run by Triton's interpreter, is what a plain loop over blocks says; and what is emitted is text.

What a kernel must not read holds NaN: rows of nobody, tables and scales of slots without blocks, what lies behind a table. What it
must write holds NaN before.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import device, reference
from codegen.kernels import affine, build, contract, drop, expand, gemm, outer
from codegen.kernels.pattern import Link, Pattern
from codegen.kernels.text import dropping
from codegen.layout import Bank, Layout
from tests.golden import check_golden

RANKS = (1, 3, 8, 16, 33, 64, 200, 256)


@dataclass
class Case:
    """A pattern with tensors for it; `slots` and `routes` are by bank."""

    pattern: Pattern
    slots: tuple[int, ...]
    routes: list[list[int]]
    rates: tuple[float, ...] = ()
    seed: int = 0
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pattern, generator = self.pattern, torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, pattern.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        of_table = {link.table: link for link in pattern.links}
        owned = torch.zeros(pattern.tokens // pattern.tile, dtype=torch.bool)
        used = [torch.zeros(count, dtype=torch.bool) for count in self.slots]
        for bank, route in enumerate(self.routes):
            for block, slot in enumerate(route):
                if 0 <= slot < self.slots[bank]:
                    owned[block] = used[bank][slot] = True
        rows = owned.repeat_interleave(pattern.tile)
        self.wides = [normal(pattern.tokens, size) for size in pattern.wides]
        self.narrow = normal(pattern.tokens, pattern.width)
        for given in (*self.wides, self.narrow):
            given[~rows] = math.nan
        self.tables, self.scales = [], []
        for table, height in enumerate(pattern.tables):
            link = of_table[table]
            whole = normal(self.slots[link.bank] + 2, height, pattern.wides[link.wide])
            whole[-2:] = math.nan
            whole[:-2][~used[link.bank]] = math.nan
            self.tables.append(whole[:-2])
            scale = torch.rand(self.slots[link.bank] + 2, generator=generator) + 0.5
            scale[-2:] = math.nan
            scale[:-2][~used[link.bank]] = math.nan
            self.scales.append(scale[:-2] if pattern.scaled[table] else None)
        self.route = [torch.tensor(route, dtype=torch.int32) for route in self.routes]
        self.drop, self.sites = {}, {}
        for bank in dropping(pattern):
            keys = torch.randint(-(2**31), 2**31 - 1, (self.slots[bank], 3), generator=generator).int()
            keys[:, 2] = torch.tensor(threshold(self.rates[bank]))
            count = sum(link.bank == bank for link in pattern.links)
            self.drop[bank], self.sites[bank] = keys, torch.tensor([[100 + key, 5 * key] for key in range(count)]).int()
        self.sequences = torch.randint(0, 9, (pattern.tokens,), generator=generator).int()
        self.positions = torch.randint(0, 99, (pattern.tokens,), generator=generator).int()

    def arguments(self, wides: list[Tensor], narrow: Tensor, tables: list[Tensor]) -> list[Tensor]:
        """What `launch` takes."""
        counters = [self.sequences, self.positions] if self.drop else []
        scales = [scale for scale in self.scales if scale is not None]
        return [*wides, narrow, *tables, *scales, *self.route, *self.drop.values(), *self.sites.values(), *counters]

    def mask(self, link: Link) -> Tensor:
        """[T, F] the factor of dropout."""
        size = self.pattern.wides[link.wide]
        if link.site is None:
            return torch.ones(self.pattern.tokens, size)
        known = torch.where(self.route[link.bank] < self.slots[link.bank], self.route[link.bank], -1)
        site = self.sites[link.bank][link.site]
        return reference.dropout_factor(self.drop[link.bank], site, known, self.sequences, self.positions, size)

    def visits(self) -> list[tuple[Link, int, slice, slice, slice, float]]:
        """For every block of every link that is routed: slot, rows, columns of narrow, rows of the table, scale."""
        found = []
        for link in self.pattern.links:
            for block, slot in enumerate(self.routes[link.bank]):
                if 0 <= slot < self.slots[link.bank]:
                    rows = slice(block * self.pattern.tile, (block + 1) * self.pattern.tile)
                    columns, own = slice(link.column, link.column + link.rank), slice(link.row, link.row + link.rank)
                    scale = self.scales[link.table]
                    found.append((link, slot, rows, columns, own, 1.0 if scale is None else float(scale[slot])))
        return found


def threshold(rate: float) -> int:
    """p * 2^32 as the int32 with the same bits."""
    bits = int(rate * 2**32)
    return bits - 2**32 if bits >= 2**31 else bits


def banks(features: tuple[int, ...], ranks: tuple[int, ...], routes: list[list[int]], slots: tuple[int, ...], **given: Any) -> Case:
    """A bank for each rank, one table each, which adapts each wide tensor in turn."""
    tile, dtype, scaled = given.pop("tile", 16), given.pop("dtype", "float32"), given.pop("scaled", True)
    links = tuple(Link(bank % len(features), bank, bank, 0, 0, rank) for bank, rank in enumerate(ranks))
    pattern = Pattern(tile * len(routes[0]), tile, dtype, features, max(ranks), ranks, (scaled,) * len(ranks), len(ranks), links)
    return Case(pattern, slots, routes, **given)


def layout(drops: tuple[bool, bool], tile: int = 16, blocks: int = 5, outputs: tuple[int, ...] = (45, 83)) -> Layout:
    """Two banks: one adapts both linears, the other the second."""
    return Layout(tile * blocks, tile, "float32", 37, outputs, (Bank(16, (0, 1), drops[0]), Bank(5, (1,), drops[1])))


def each(rank: int, count: int) -> list[int]:
    """The route of the rank-th of `count` banks, each of which has one block, the last has none; the first has two."""
    return [0 if block == rank or (block == count + 1 and rank == 0) else -1 for block in range(count + 2)]


APART = [[1, -1, 0, 1, -1], [-1, 2, -1, -1, -1]]  # slot 1's blocks are not adjacent; slots without blocks
CASES: dict[str, Callable[[], Case]] = {
    "one bank, sizes that are no multiples": lambda: banks((37,), (16,), [[1, 0, -1, 1, 3]], (5,)),
    "sizes that are multiples": lambda: banks((64,), (32,), [[1, 0, -1, 1, 3]], (5,), scaled=False),
    "every rank in one launch": lambda: banks((37,), RANKS, [each(rank, len(RANKS)) for rank in range(len(RANKS))], (1,) * 8),
    "one task's several linears": lambda: Case(layout((False, False)).up().pattern, (3, 4), APART),
    "one input": lambda: Case(layout((False, False)).down().pattern, (3, 4), APART),
    "one input with dropout": lambda: Case(layout((True, True)).down().pattern, (3, 4), APART, (0.1, 0.6)),
    "one input, one bank drops": lambda: Case(layout((True, False)).down().pattern, (3, 4), APART, (0.25, 0.0)),
    "long blocks": lambda: banks((37, 20), (8, 16), [[1, -1, 1], [-1, 0, -1]], (2, 1), tile=64),
    "long blocks with dropout": lambda: Case(layout((True, False), 32).down().pattern, (3, 4), APART, (0.25, 0.0)),
    "ranks of several products": lambda: Case(
        Layout(48, 16, "float32", 37, (16, 16), (Bank(200, (0, 1), False),)).down().pattern, (2,), [[1, -1, 0]]
    ),
    "70 tasks in a chunk": lambda: banks((20,), (3,), [[(7 * block) % 70 for block in range(70)]], (71,)),
    "nobody": lambda: banks((37, 20), (8, 33), [[-1, -1], [-1, -1]], (2, 1)),
    "routes beyond the tables": lambda: banks((37,), (8, 3), [[2, 1, 3, 2, -1], [-1, -7, 1, 2, 0]], (2, 1)),
    "float16": lambda: banks((37, 20), (8, 33), [[1, -1, 1, -1], [-1, 0, -1, -1]], (2, 1), dtype="float16"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def close(found: Tensor, expected: Tensor) -> None:
    """`expected` was computed in float32; the error is measured against its largest entry."""
    assert found.shape == expected.shape
    bound = {torch.float32: 3e-6, torch.float16: 1e-3}[found.dtype] * max(1.0, float(expected.abs().max()))
    assert float((found.float() - expected).abs().max()) <= bound  # a NaN is not below it


def unwritten(*shape: int, dtype: str) -> Tensor:
    return torch.full(shape, math.nan, dtype=getattr(torch, dtype))


def contracted(case: Case) -> Tensor:
    found = torch.zeros(case.pattern.tokens, case.pattern.width)
    for link, slot, rows, columns, own, scale in case.visits():
        x = case.wides[link.wide][rows].float() * case.mask(link)[rows]
        found[rows, columns] = scale * x @ case.tables[link.table][slot, own].float().T
    return found


def expanded(case: Case) -> list[Tensor]:
    found = [torch.zeros(case.pattern.tokens, size) for size in case.pattern.wides]
    for link, slot, rows, columns, own, scale in case.visits():
        product = scale * case.narrow[rows, columns].float() @ case.tables[link.table][slot, own].float()
        found[link.wide][rows] += product * case.mask(link)[rows]
    return found


def routed(case: Case, wide: int) -> Tensor:
    """[T] whether a row of a wide tensor has an adapter."""
    found = torch.zeros(case.pattern.tokens, dtype=torch.bool)
    for link, _, rows, *_ in case.visits():
        if link.wide == wide:
            found[rows] = True
    return found


# --- products -------------------------------------------------------------------------------------------------------------


def test_contract_is_a_loop_over_blocks_and_writes_every_column(case: Case, interpreted: None) -> None:
    pattern = case.pattern
    narrow = unwritten(pattern.tokens, pattern.width, dtype=pattern.dtype)
    launch = build.load(contract.source(pattern, contract.Config(rows=16, step=32)))
    launch(*case.arguments(case.wides, narrow, case.tables))
    close(narrow, contracted(case))
    owned = sum((routed(case, wide) for wide in range(len(pattern.wides))), torch.zeros(pattern.tokens, dtype=torch.bool))
    assert torch.equal(narrow[~owned], torch.zeros_like(narrow[~owned]))  # exactly


def test_expand_is_a_loop_over_blocks_and_writes_every_row(case: Case, interpreted: None) -> None:
    pattern = case.pattern
    wides = [unwritten(pattern.tokens, size, dtype=pattern.dtype) for size in pattern.wides]
    launch = build.load(expand.source(pattern, expand.Config(rows=16, columns=32), add=False))
    launch(*case.arguments(wides, case.narrow, case.tables))
    for index, (found, expected) in enumerate(zip(wides, expanded(case), strict=True)):
        close(found, expected)
        rest = found[~routed(case, index)]
        assert torch.equal(rest, torch.zeros_like(rest))


def test_expand_adds_to_the_rows_of_adapters_and_leaves_the_others_their_bits(case: Case, interpreted: None) -> None:
    pattern = case.pattern
    generator = torch.Generator().manual_seed(1)
    before = [torch.randn(pattern.tokens, size, generator=generator).to(case.narrow.dtype) for size in pattern.wides]
    for held in before:
        held[:, ::5] = -0.0  # adding a zero would lose the sign
    wides = [given.clone() for given in before]
    launch = build.load(expand.source(pattern, expand.Config(rows=16, columns=32), add=True))
    launch(*case.arguments(wides, case.narrow, case.tables))
    for index, (found, held, added) in enumerate(zip(wides, before, expanded(case), strict=True)):
        own = routed(case, index)
        if own.any():
            close(found[own], (held.float() + added)[own])
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        assert torch.equal(found[~own].view(bits), held[~own].view(bits))


def test_outer_adds_a_slots_blocks_and_leaves_slots_without_blocks_their_bits(case: Case, interpreted: None) -> None:
    pattern = case.pattern
    generator = torch.Generator().manual_seed(3)
    before = [torch.randn(table.shape, generator=generator) for table in case.tables]
    expected, met = [grad.clone() for grad in before], [set[int]() for _ in before]
    for link, slot, rows, columns, own, scale in case.visits():
        x = case.wides[link.wide][rows].float() * case.mask(link)[rows]
        expected[link.table][slot, own] += scale * case.narrow[rows, columns].float().T @ x
        met[link.table].add(slot)
    grads = [grad.clone() for grad in before]
    launch = build.load(outer.source([pattern], outer.Config(columns=32, step=32)))
    launch(*case.arguments(case.wides, case.narrow, grads))
    for found, wanted, held, slots in zip(grads, expected, before, met, strict=True):
        close(found, wanted)
        rest = [slot for slot in range(len(held)) if slot not in slots]
        assert torch.equal(found[rest], held[rest])


@pytest.mark.parametrize("drops", [(False, False), (True, False), (True, True)])
def test_patterns_of_one_launch_of_outer_have_the_bits_that_they_have_alone(drops: tuple[bool, bool], interpreted: None) -> None:
    own = layout(drops)
    cases = [Case(some.pattern, (3, 4), APART, (0.25, 0.5), seed) for seed, some in enumerate((own.up(), own.down()))]
    config = outer.Config(columns=32, step=16)

    def launched(together: Sequence[Case], grads: list[list[Tensor]]) -> None:
        text = outer.source([case.pattern for case in together], config)
        given = [case.arguments(case.wides, case.narrow, own) for case, own in zip(together, grads, strict=True)]
        build.load(text)(*(tensor for own in given for tensor in own))

    found, alone = ([[torch.ones(table.shape) for table in case.tables] for case in cases] for _ in range(2))
    launched(cases, found)
    for case, grads in zip(cases, alone, strict=True):
        launched([case], [grads])
    for one, other in zip(itertools.chain(*found), itertools.chain(*alone), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, torch.ones_like(one))


# --- gemm -----------------------------------------------------------------------------------------------------------------

GEMM: dict[str, tuple[Case, int, gemm.Config, bool]] = {
    # pattern over y [T, N], K, config, bias
    "one bank": (banks((80,), (16,), [[1, 0, -1, 1]], (3,)), 48, gemm.Config(16, 32, 32, 2, 1, 1), False),
    "a bias": (banks((80,), (16,), [[1, 0, -1, 1]], (3,)), 48, gemm.Config(16, 64, 32, 2, 2, 1), True),
    "every rank in one launch": (
        banks((48,), RANKS, [each(rank, len(RANKS)) for rank in range(len(RANKS))], (1,) * 8), 80,
        gemm.Config(16, 64, 64, 4, 4, 2), False,
    ),
    "a gradient of x": (Case(layout((False, False), outputs=(48, 80)).up((1,)).pattern, (3, 4), APART), 16,
                        gemm.Config(16, 32, 32, 8, 1, 1), False),
    "no scale": (banks((32,), (8, 33), [[1, -1, 1, -1], [-1, 0, -1, -1]], (2, 1), scaled=False), 48,
                 gemm.Config(16, 32, 32, 2, 1, 1), True),
    "two tables of one bank": (
        Case(
            Pattern(48, 16, "float32", (48,), 24, (8, 16), (True, True), 1, (Link(0, 0, 0, 0, 0, 8), Link(0, 0, 1, 0, 8, 16))),
            (2,),
            [[1, -1, 0]],
        ),
        32,
        gemm.Config(16, 32, 32, 2, 1, 1),
        False,
    ),
    "tiles within a block": (banks((48,), (24,), [[1, -1, 0]], (2,), tile=64), 32, gemm.Config(32, 32, 32, 2, 1, 1), False),
    "routes beyond the tables": (
        banks((48,), (8, 3), [[2, 1, 3, 2, -1], [-1, -7, 1, 2, 0]], (2, 1)), 32,
        gemm.Config(16, 64, 32, 2, 2, 1), False,
    ),
    "more blocks than there are": (banks((48,), (8,), [[1, 0, -9]], (2,)), 32, gemm.Config(16, 64, 32, 2, 2, 1), False),
    "nobody": (banks((48,), (8,), [[-1, -1, -1]], (2,)), 32, gemm.Config(16, 64, 32, 2, 2, 1), True),
    "70 tasks in a chunk": (banks((32,), (3,), [[(7 * block) % 70 for block in range(70)]], (71,)), 16,
                            gemm.Config(16, 32, 16, 8, 1, 1), False),
    "float16": (banks((48,), (8, 33), [[1, -1, 1, -1], [-1, 0, -1, -1]], (2, 1), dtype="float16"), 64,
                gemm.Config(16, 64, 32, 2, 2, 1), True),
}  # fmt: skip


PADDED = [[0, -1, 1, -1, -1, 1], [-1, 0, -1, -1, 0, -1]]


@pytest.mark.parametrize("transposed", [False, True], ids=["y = x W^T", "dx = dy W"])
@pytest.mark.parametrize("name", GEMM)
def test_gemm_is_the_frozen_product_with_the_adapters(name: str, transposed: bool, interpreted: None) -> None:
    case, features, config, with_bias = GEMM[name]
    pattern = case.pattern
    dtype, generator = getattr(torch, pattern.dtype), torch.Generator().manual_seed(4)
    size = pattern.wides[0]
    x, w, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((pattern.tokens, features), (features, size) if transposed else (size, features), (size,))
    )
    y = unwritten(pattern.tokens, size, dtype=pattern.dtype)
    text = gemm.source(pattern, config, wide=0, features=features, transposed=transposed, bias=with_bias)
    known = {"narrow": case.narrow, "bias": bias, "x": x, "w": w, "y": y}
    known |= {f"table{index}": table for index, table in enumerate(case.tables)}
    known |= {f"scale{index}": scale for index, scale in enumerate(case.scales) if scale is not None}
    known |= {f"route{index}": route for index, route in enumerate(case.route)}
    build.load(text)(*(known[argument] for argument in gemm.arguments(pattern, 0, bias=with_bias)))
    expected = x.float() @ (w.float() if transposed else w.float().T) + expanded(case)[0]
    close(y, expected + bias.float() if with_bias else expected)


@pytest.mark.parametrize("filled", [0, 1, 3, 5, 6])
def test_gemm_computes_no_row_of_padding(filled: int, interpreted: None) -> None:
    """Of 6 blocks of 32 rows the first ones are somebody's, or at least nobody says that they are not."""
    routes = [[slot if block < filled else -2 - filled for block, slot in enumerate(own)] for own in PADDED]
    case = banks((80,), (8, 3), routes, (2, 1), tile=32)
    generator = torch.Generator().manual_seed(7)
    x, w = torch.randn(192, 48, generator=generator), torch.randn(80, 48, generator=generator)
    y = unwritten(192, 80, dtype="float32")
    text = gemm.source(case.pattern, gemm.Config(16, 32, 32, 2, 1, 1), wide=0, features=48, transposed=False, bias=False)
    build.load(text)(x, w, y, case.narrow, *case.tables, *case.scales, *case.route)
    wanted = x @ w.T + expanded(case)[0]
    wanted[32 * filled :] = 0
    assert torch.equal(y.isnan().any(1), torch.arange(192) >= 32 * filled)
    close(y.nan_to_num(), wanted)


@pytest.mark.parametrize("flatten", [False, True])
def test_gemm_without_adapters_takes_any_number_of_rows(flatten: bool, interpreted: None) -> None:
    pattern = Pattern(37, 37, "float32", (48,), 0, (), (), 0, ())
    x, w = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in ((37, 32), (48, 32)))
    y = unwritten(37, 48, dtype="float32")
    text = gemm.source(pattern, gemm.Config(16, 32, 32, 2, 1, 1, flatten), wide=0, features=32, transposed=False, bias=False)
    build.load(text)(x, w, y)
    close(y, x @ w.T)


def test_gemm_reads_and_writes_rows_with_a_stride_of_their_own(interpreted: None) -> None:
    case, features, config, _ = GEMM["one bank"]
    generator = torch.Generator().manual_seed(6)
    x, w = torch.randn(64, features + 16, generator=generator), torch.randn(80, features + 16, generator=generator)
    y = unwritten(64, 96, dtype="float32")
    text = gemm.source(case.pattern, config, wide=0, features=features, transposed=False, bias=False)
    build.load(text)(x[:, :features], w[:, :features], y[:, :80], case.narrow, *case.tables, *case.scales, *case.route)
    close(y[:, :80], x[:, :features] @ w[:, :features].T + expanded(case)[0])
    assert y[:, 80:].isnan().all()


def test_gemm_refuses_what_it_would_get_wrong() -> None:
    case = CASES["one input with dropout"]()
    with pytest.raises(AssertionError, match="dropped"):
        gemm.source(case.pattern, gemm.Config(), wide=0, features=32, transposed=True, bias=False)
    case = CASES["one bank, sizes that are no multiples"]()
    with pytest.raises(AssertionError, match="16 bytes"):
        gemm.source(case.pattern, gemm.Config(), wide=0, features=32, transposed=True, bias=False)
    case = GEMM["one bank"][0]
    with pytest.raises(AssertionError, match="one block"):
        gemm.source(case.pattern, gemm.Config(rows=32), wide=0, features=32, transposed=True, bias=False)


# --- dropout --------------------------------------------------------------------------------------------------------------

TILE, BLOCKS, FEATURES = 16, 6, 45
ROUTE = [1, 0, -1, 1, 0, 2]
DROP = torch.tensor([[3, -4, threshold(0.1)], [5, 6, threshold(0.75)], [-7, 8, 0]], dtype=torch.int32)
SITE, SEQUENCES = torch.tensor([[11, 4]], dtype=torch.int32), torch.arange(TILE * BLOCKS, dtype=torch.int32) // 20
POSITIONS = torch.arange(TILE * BLOCKS, dtype=torch.int32) % 20


@dataclass
class Draw:
    """What a mask depends on."""

    drop: Tensor = field(default_factory=DROP.clone)
    site: Tensor = SITE
    route: Tensor = field(default_factory=lambda: torch.tensor(ROUTE, dtype=torch.int32))
    sequences: Tensor = SEQUENCES
    positions: Tensor = POSITIONS

    def arguments(self) -> list[Tensor]:
        return [self.route, self.drop, self.site, self.sequences, self.positions]

    def pattern(self, rank: int) -> Pattern:
        tokens = self.positions.numel()
        tile = tokens // self.route.numel()
        return Pattern(tokens, tile, "float32", (FEATURES,), rank, (rank,), (False,), 1, (Link(0, 0, 0, 0, 0, rank, 0),))

    def expected(self) -> Tensor:
        factor = reference.dropout_factor(self.drop, self.site[0], self.route, self.sequences, self.positions, FEATURES)
        return torch.where((self.route >= 0).repeat_interleave(TILE)[:, None], factor, 0.0)


def by_drop(draw: Draw) -> Tensor:
    """Ones under the mask; what nobody owns is passed on."""
    tokens = draw.positions.numel()
    x, y = torch.ones(tokens, FEATURES), unwritten(tokens, FEATURES, dtype="float32")
    text = drop.source(affine.Shape(tokens, TILE, FEATURES, "float32"), affine.Config(rows=16, columns=32))
    build.load(text)(x, y, draw.drop, draw.site, draw.route, draw.sequences, draw.positions)
    nobody = (draw.route < 0).repeat_interleave(TILE)
    assert torch.equal(y[nobody], x[nobody])
    return y.masked_fill(nobody[:, None], 0.0)


def by_contract(draw: Draw) -> Tensor:
    """Ones times the identity: the mask itself."""
    pattern = draw.pattern(FEATURES)
    x, narrow = torch.ones(pattern.tokens, FEATURES), unwritten(pattern.tokens, FEATURES, dtype="float32")
    table = torch.eye(FEATURES).expand(3, -1, -1).contiguous()
    build.load(contract.source(pattern, contract.Config(rows=16, step=32)))(x, narrow, table, *draw.arguments())
    return narrow


def by_expand(draw: Draw) -> Tensor:
    """Ones under the mask."""
    pattern = draw.pattern(1)
    x, narrow = unwritten(pattern.tokens, FEATURES, dtype="float32"), torch.ones(pattern.tokens, 1)
    text = expand.source(pattern, expand.Config(rows=16, columns=32), add=False)
    build.load(text)(x, narrow, torch.ones(3, 1, FEATURES), *draw.arguments())
    return x


def by_outer(draw: Draw) -> Tensor:
    """A rank for each row of each block, so that no sum mixes two rows of the mask."""
    pattern = draw.pattern(TILE * BLOCKS)
    x, grad = torch.ones(pattern.tokens, FEATURES), torch.zeros(3, pattern.tokens, FEATURES)
    text = outer.source([pattern], outer.Config(columns=32, step=16))
    build.load(text)(x, torch.eye(pattern.tokens), grad, *draw.arguments())
    return grad.sum(0)


FAMILIES = {"drop": by_drop, "contract": by_contract, "expand": by_expand, "outer": by_outer}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_the_mask_of_the_reference(family: str, interpreted: None) -> None:
    draw = Draw()
    torch.testing.assert_close(FAMILIES[family](draw), draw.expected(), rtol=3e-7, atol=0)


OTHERS = {
    "half of the task's key": Draw(drop=DROP + torch.tensor([1, 0, 0], dtype=torch.int32)),
    "other half of the task's key": Draw(drop=DROP + torch.tensor([0, 1, 0], dtype=torch.int32)),
    "site": Draw(site=SITE + torch.tensor([1, 0], dtype=torch.int32)),
    "sequence": Draw(sequences=SEQUENCES + 1),
    "position": Draw(positions=POSITIONS + 100),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_key_or_place_gives_another_mask(what: str, interpreted: None) -> None:
    here, there = by_expand(Draw()) > 0, by_expand(OTHERS[what]) > 0
    for slot, rate in ((0, 0.1), (1, 0.75)):
        rows = (Draw().route == slot).repeat_interleave(TILE)
        # Two masks that have nothing to do with each other agree where both keep or both drop.
        agreement, count = (here == there)[rows].float().mean().item(), rows.sum().item() * FEATURES
        likely = rate**2 + (1 - rate) ** 2
        assert abs(agreement - likely) <= 5 * math.sqrt(likely * (1 - likely) / count)


def test_a_row_keeps_its_mask_at_another_place_in_the_chunk(interpreted: None) -> None:
    order = torch.tensor([5, 3, 2, 0, 4, 1])
    rows = (order[:, None] * TILE + torch.arange(TILE)).flatten()
    here = Draw()
    there = replace(here, route=here.route[order], sequences=SEQUENCES[rows], positions=POSITIONS[rows])
    assert torch.equal(by_expand(there), by_expand(here)[rows])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.75])
def test_the_kept_share_is_that_of_the_rate(rate: float, interpreted: None) -> None:
    drop = DROP.clone()
    drop[:, 2] = threshold(rate)
    kept = by_expand(Draw(drop=drop, route=torch.zeros(BLOCKS, dtype=torch.int32)))
    count = kept.numel()
    assert abs((kept > 0).float().mean().item() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / count)
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / (1 - rate)), rtol=1e-6, atol=0)


def test_a_rate_of_zero_keeps_everything(interpreted: None) -> None:
    rows = (Draw().route == 2).repeat_interleave(TILE)
    for by in FAMILIES.values():
        assert torch.equal(by(Draw())[rows], torch.ones(TILE, FEATURES))


# --- text -----------------------------------------------------------------------------------------------------------------


def golden_layout(drops: bool) -> Layout:
    return Layout(512, 128, "bfloat16", 200, (256, 80), (Bank(16, (0, 1), drops), Bank(40, (1,), False)))


TEXTS: dict[str, Callable[[], str]] = {
    "contract": lambda: contract.source(golden_layout(True).down().pattern, contract.Config()),
    "contract-outputs": lambda: contract.source(golden_layout(False).up().pattern, contract.Config()),
    "expand": lambda: expand.source(golden_layout(False).up().pattern, expand.Config(), add=False),
    "expand-add": lambda: expand.source(golden_layout(True).down().pattern, expand.Config(), add=True),
    "outer": lambda: outer.source([golden_layout(True).up().pattern, golden_layout(True).down().pattern], outer.Config()),
    "gemm": lambda: gemm.source(
        golden_layout(False).up((1,)).pattern, gemm.Config(), wide=0, features=208, transposed=False, bias=True
    ),
    "gemm-transposed": lambda: gemm.source(
        replace(golden_layout(False), features=208).down().pattern, gemm.Config(parts=1), wide=0, features=256,
        transposed=True, bias=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TEXTS)
def test_the_emitted_text_is_the_accepted_one(family: str) -> None:
    check_golden(f"kernel.{family}", TEXTS[family]())


@pytest.mark.parametrize("family", TEXTS)
def test_equal_patterns_give_equal_text(family: str) -> None:
    assert TEXTS[family]() == TEXTS[family]()  # patterns, configs and layouts are built anew


def text_of(family: str, tokens: int, features: int, ranks: int) -> str:
    """A family's text for one matrix [ranks, features] of each slot."""
    link = Link(0, 0, 0, 0, 0, ranks)
    pattern = Pattern(tokens, 128, "bfloat16", (features,), ranks, (ranks,), (False,), 1, (link,))
    if family == "contract":
        return contract.source(pattern, contract.Config())
    if family == "expand":
        return expand.source(pattern, expand.Config(), add=True)
    if family == "outer":
        return outer.source([pattern], outer.Config())
    return gemm.source(pattern, gemm.Config(), wide=0, features=64, transposed=False, bias=False)


@pytest.mark.parametrize("family", ["contract", "expand", "outer", "gemm"])
def test_rows_of_a_narrow_tensor_are_int64_where_int32_does_not_reach_its_end(family: str) -> None:
    for tokens, wider in ((1 << 20, False), (1 << 21, True)):
        text = text_of(family, tokens, 256, 1024)
        places = re.findall(r"narrow \+ rows\[:, None\](.*?) \* 1024 ", text)
        assert places
        assert set(places) == {".to(tl.int64)" if wider else ""}


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("contract", r"matrix = table0 .* piece(.*) \* "),
        ("outer", r"grad = table0 .* piece(.*) \* "),
        ("expand", r"matrix \+ ranks\[:, None\](.*?) \* "),
    ],
)
def test_rows_of_a_table_are_int64_where_int32_does_not_reach_a_slots_end(family: str, place: str) -> None:
    for ranks, wider in ((1 << 13, False), (1 << 14, True)):
        found = re.findall(place, text_of(family, 512, 1 << 17, ranks))
        assert found == [".to(tl.int64)" if wider else ""]


def test_equal_texts_share_one_launcher(interpreter: Callable[[], AbstractContextManager[None]]) -> None:
    first, second = (contract.source(golden_layout(True).down().pattern, contract.Config()) for _ in range(2))
    with interpreter():
        launch = build.load(first)
        assert build.load(second) is launch
        assert build.load(first.replace("narrow", "slim")) is not launch
    assert build.digest(first) == build.digest(second) != build.digest(first + "\n")


def test_the_interpreter_leaves_nothing_behind(interpreter: Callable[[], AbstractContextManager[None]]) -> None:
    language = pytest.importorskip("triton.language")

    def state() -> tuple[Any, ...]:
        return os.environ.get("TRITON_INTERPRET"), language.zeros, build._LOADED, dict(build._LOADED)

    before = state()
    with interpreter():
        assert os.environ["TRITON_INTERPRET"] == "1"
        build.load(TEXTS["contract"]())
        assert state() != before
    assert state() == before
    assert state()[2] is before[2]


def test_one_launcher_serves_any_number_of_slots(interpreted: None) -> None:
    for slots in (1, 4, 16):
        case = banks((37,), (8,), [[slots - 1, 0, -1]], (slots,))
        narrow = unwritten(48, 8, dtype="float32")
        text = contract.source(case.pattern, contract.Config(rows=16, step=32))
        assert text == contract.source(banks((37,), (8,), [[0, 0, 0]], (1,)).pattern, contract.Config(rows=16, step=32))
        build.load(text)(*case.arguments(case.wides, narrow, case.tables))
        close(narrow, contracted(case))


def test_a_matrix_of_any_size_may_be_a_slots_own(interpreted: None) -> None:
    """A whole linear [K, N] of a task's own has K "ranks": more than any adapter's."""
    generator = torch.Generator().manual_seed(0)
    features, out, route = 300, 89, torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    x, dy = (torch.randn(4 * 16, size, generator=generator) for size in (features, out))
    w = torch.randn(2, features, out, generator=generator) / features**0.5
    for given, matrix, transpose in ((x, w, False), (dy, w, True)):
        found = device.tile_mm(given, matrix, route, None, transpose)
        torch.testing.assert_close(found, reference.tile_mm(given, matrix, route, None, transpose), rtol=1e-5, atol=1e-5)
    grad, wanted = torch.zeros_like(w), torch.zeros_like(w)
    device.tile_outer(grad, x, dy, route, None)
    reference.tile_outer(wanted, x, dy, route, None)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-4)
