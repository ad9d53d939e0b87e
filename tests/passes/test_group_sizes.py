"""The groups that a search found, in few sizes of chunks, are given the best of many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.planner import TOKENS, Saturation, instance
from passes.group import SEARCH_PRICES, Load, Price, Shape, Steps, _unions, fused, group
from passes.group_sizes import SEARCHED, searched_shapes
from passes.loads import Known

PLAIN = {"plain": 0.0}


class Launched(Saturation):
    """A chunk costs as much as 1,000 rows beside its own: one that fits is better than several that do."""

    def chunk(self, extras: frozenset[str], shape: Shape) -> Price:
        price = super().chunk(extras, shape)
        more = 1 + math.fsum(self.extras[extra] for extra in extras)
        return replace(price, cost=(shape.tokens + 1000) / self.rate * more)


def plain(rows: int, tasks: int = 1, samples: int = 8) -> list[Load]:
    return [Load(f"t{index}", (rows // tasks,) * samples, frozenset(PLAIN)) for index in range(tasks)]


def mean_cost(loads: Sequence[Load], tokens: int, prices: Saturation) -> float:
    union = frozenset[str]().union(*(load.extras for load in loads))
    counts = [math.ceil(sum(rows) / tokens) for rows in zip(*(load.rows for load in loads), strict=True)]
    return sum(counts) / len(counts) * prices.chunk(union, Shape(tokens)).cost


# --- What a search looks at ------------------------------------------------------------------------------------------------------


def test_a_search_looks_at_some_of_many_sizes_the_ends_among_them() -> None:
    prices = Known(Saturation(PLAIN))
    everything = list(range(len(TOKENS)))
    assert searched_shapes(plain(100), prices, everything, most=len(TOKENS), capped=False) == everything
    assert searched_shapes(plain(100), prices, everything[:SEARCHED], most=1, capped=False) == everything[:SEARCHED]
    few = searched_shapes(plain(100), prices, everything, most=1, capped=False)
    sizes = [TOKENS[index] for index in few]
    assert SEARCHED - 2 <= len(few) <= SEARCHED
    assert (sizes[0], sizes[-1]) == (TOKENS[0], TOKENS[-1])
    assert max(large / small for small, large in itertools.pairwise(sizes)) <= 1.5


def test_a_task_that_fits_in_one_size_alone_is_given_it_though_a_search_does_not_look_there() -> None:
    even, everything = Known(Saturation(PLAIN)), list(range(len(TOKENS)))
    passed = next(index for index in everything if index not in searched_shapes([], even, everything, most=1, capped=False))
    loads, _ = instance(40, 1, heavy=0.1)
    prices = Saturation({extra: 0.01 for load in loads for extra in load.extras})
    assert _unions(loads) * len(TOKENS) > SEARCH_PRICES, "else all sizes are looked at"
    own = tuple(None if index != passed else Price(0.0, 1) for index in everything)
    odd = replace(loads[0], own=own)
    for cap in (10**12, None):
        found = group([odd, *loads[1:]], prices, cap=cap)
        assert next(made.shape for made in found.groups if odd.task in made.tasks) == Shape(TOKENS[passed])


# --- What its groups are given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens"), [(5440, 5632), (2300, 2304), (2350, 2560), (1200, 1280), (11_700, 11_776)])
def test_steps_that_fit_a_size_get_it(rows: int, tokens: int) -> None:
    (made,) = group(plain(rows, 4), Launched(PLAIN), switch=1.0).groups
    assert (made.shape, made.chunks) == (Shape(tokens), 1.0)


def test_groups_of_many_unions_have_sizes_that_no_search_looked_at() -> None:
    loads, drawn = instance(64, 64, heavy=0.05)
    prices = Launched(drawn.extras)
    assert _unions(loads) * len(TOKENS) > SEARCH_PRICES
    by_name = {load.task: load for load in loads}
    found = group(loads, prices)
    for made in found.groups:
        members = [by_name[task] for task in made.tasks]
        least = min(mean_cost(members, tokens, prices) for tokens in TOKENS)
        assert made.cost == pytest.approx(least + 2e-5, rel=1e-9)
    some = set(searched_shapes(loads, Known(prices), range(len(TOKENS)), most=1, capped=False))
    assert {made.shape.tokens for made in found.groups} - {TOKENS[index] for index in some}


@pytest.mark.parametrize("heavy", [0.05, 0.3, 4.0])
def test_more_sizes_never_make_a_plan_dearer(heavy: float) -> None:
    loads, prices = instance(30, 7, heavy=heavy, classes=3)
    few = Saturation(prices.extras, TOKENS[::3])
    assert group(loads, prices).cost <= group(loads, few).cost * 1.005, "a search is no proof: half a percent for luck"
    assert fused(loads, prices).cost <= fused(loads, few).cost
    # With sizes that serve no one, the same groups are found.
    useless = Saturation(prices.extras, (*TOKENS, 10**6))
    assert group(loads, useless).cost == pytest.approx(group(loads, prices).cost)


@given(st.lists(st.integers(0, 20_000), min_size=8, max_size=8), st.data())
def test_the_size_is_the_best_by_placed_steps_and_the_fewest_are_placed(rows: list[int], data: st.DataObject) -> None:
    prices = Saturation(PLAIN)
    loads = [Load("a", tuple(rows), frozenset(PLAIN))]
    overflow = {tokens: data.draw(st.sampled_from((0.0, 0.1, 0.5, 2.0)), label=str(tokens)) for tokens in TOKENS}
    asked = []

    def placed(tasks: Sequence[str], tokens: int) -> float:
        assert tuple(tasks) == ("a",)
        asked.append(tokens)
        return overflow[tokens]

    (made,) = group(loads, prices, switch=0.0, steps=Steps(tuple(loads), placed)).groups
    real = {
        tokens: mean_cost(loads, tokens, prices) + overflow[tokens] * prices.chunk(frozenset(PLAIN), Shape(tokens)).cost
        for tokens in TOKENS
    }
    assert made.cost == pytest.approx(min(real.values()))
    assert made.cost == pytest.approx(real[made.shape.tokens])
    assert made.chunks * made.shape.tokens >= sum(rows) / len(rows) - 1e-9
    # Never dearer than what is best by rows alone; and what by rows alone is dearer than the answer need not be placed.
    (by_rows,) = group(loads, prices, switch=0.0).groups
    assert made.cost <= real[by_rows.shape.tokens] * (1 + 1e-9)
    assert all(mean_cost(loads, tokens, prices) <= made.cost * (1 + 1e-9) or tokens == asked[0] for tokens in asked)


def test_sizes_are_chosen_by_the_steps_and_not_by_the_few_that_groups_are_searched_by() -> None:
    prices = Launched(PLAIN)
    loads = plain(4000, 2)
    (few,) = group(loads, prices, switch=1.0).groups
    more = tuple(replace(load, rows=(2000, 2000, 2500, 2500)) for load in loads)
    (made,) = group(loads, prices, switch=1.0, steps=Steps(more)).groups
    assert (few.shape.tokens, made.shape.tokens) == (4096, 5120)
    assert made.reasons[0].startswith("1 chunks of 5120 rows, 88% full")


def test_a_plan_says_what_the_next_best_size_costs_as_its_steps_are_placed() -> None:
    prices = Saturation(PLAIN, tokens=(1024, 2048, 4096), floor=0.0)
    steps = Steps(tuple(plain(2048)), lambda tasks, tokens: {1024: 0.5, 2048: 1.0, 4096: 0.0}[tokens])
    (made,) = group(plain(2048), prices, switch=0.0, steps=steps).groups
    assert made.shape == Shape(1024)
    assert made.reasons[:2] == (
        "2.5 chunks of 1024 rows, 80% full: 25.6 ms a step",
        "next best shape, 2048 rows: 40.96 ms (+60.0%)",
    )
