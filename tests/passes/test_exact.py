"""exact states grouping for scipy's HiGHS; `group` stays within 2% of what it finds, or of the bound it proves."""

from __future__ import annotations

import sys

import pytest

from benchmarks.planner import brute_force, instance
from passes.exact import exact
from passes.group import Load, Price, group

pytest.importorskip("scipy")

TOKENS = (512, 1024, 2048, 3072, 4096, 8192)


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_brute_force_does(seed: int) -> None:
    spared = (0.0, 0.4, 0.7)[seed % 3]
    loads, prices = instance(4 + seed % 3, seed, heavy=(0.1, 0.6)[seed % 2], classes=3, samples=2, tokens=TOKENS, spared=spared)
    best = brute_force(loads, prices)
    found = exact(loads, prices, gap=1e-9)
    assert found.cost == pytest.approx(best, rel=1e-6)
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert not found.relaxed


def test_it_knows_caps_equal_loads_and_costs_by_shape() -> None:
    loads, prices = instance(6, 4, heavy=0.5, classes=3, samples=2, tokens=TOKENS)
    own = (None, Price(0.1, 0), Price(0.001, 10**8), Price(0.001, 0), Price(0.0, 0), Price(0.0, 0))
    twin = loads[0]
    loads = [*loads, Load("twin", twin.rows, twin.extras, twin.resident), Load("cut", (5000, 7000), twin.extras, 0, own)]
    left = 4 * 10**8
    cap = 10**9 + sum(load.resident for load in loads) + left
    found = exact(loads, prices, cap=cap, base_bytes=10**9, gap=1e-9)
    assert found.cost == pytest.approx(brute_force(loads, prices, room=left), rel=1e-6)
    assert found.grouping is not None
    assert found.grouping.bytes <= cap


# Each says the solver's time; the first ones end far earlier, and where it runs out the bound so far is what counts.
@pytest.mark.parametrize(
    ("tasks", "heavy", "classes", "seconds"),
    [(16, 0.05, 4, 8), (16, 8.0, 4, 8), (32, 0.05, 3, 8), (32, 8.0, 4, 8), (64, 0.05, 3, 8), (64, 4.0, 4, 8)],
)
def test_many_tasks_are_within_two_percent_of_the_bound(tasks: int, heavy: float, classes: int, seconds: float) -> None:
    loads, prices = instance(tasks, tasks + 1, heavy=heavy, classes=classes, samples=2, tokens=TOKENS)
    found = exact(loads, prices, seconds=seconds, gap=5e-3)
    assert found.bound > 0
    assert group(loads, prices).cost <= 1.02 * found.bound


def test_too_many_unions_give_a_bound_of_a_relaxation() -> None:
    loads, prices = instance(12, 2, heavy=0.4, classes=10, samples=1, tokens=TOKENS)
    found = exact(loads, prices, unions=6, gap=1e-6)
    best = group(loads, prices).cost
    assert found.relaxed
    assert found.bound <= best * (1 + 1e-6) <= found.cost * (1 + 2e-6)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    loads, prices = instance(2, 0, heavy=0.1, classes=1)
    with pytest.raises(ImportError, match=r"muxcompile\[exact\]"):
        exact(loads, prices)


def test_what_does_not_fit_is_refused_before_solving() -> None:
    loads, prices = instance(2, 0, heavy=0.1, classes=1)
    with pytest.raises(ValueError, match="even alone"):
        exact(loads, prices, cap=10)
