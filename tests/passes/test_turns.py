"""turns spreads the tasks' steps over the rounds of a period."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.turns import Turns, turns

ROWS = st.dictionaries(st.text(min_size=1, max_size=5), st.floats(1, 10_000), min_size=1, max_size=8)


def places(found: Turns, task: str) -> list[int]:
    return [index for index, tasks in enumerate(found.rounds) if task in tasks]


@given(ROWS)
def test_equal_turns_are_one_round_of_all(rows: dict[str, float]) -> None:
    assert turns("equal", rows).rounds == (tuple(rows),)


@given(ROWS, st.integers(1, 20))
def test_proportional_steps_are_inverse_to_rows(rows: dict[str, float], limit: int) -> None:
    found = turns("proportional", rows, limit)
    heaviest = max(rows.values())
    counts = {task: max(1, round(min(heaviest / count, limit))) for task, count in rows.items()}
    assert {task: found.steps(task) for task in rows} == counts
    assert len(found.rounds) == max(counts.values()) <= limit


@given(ROWS, st.integers(1, 20))
def test_gaps_between_a_tasks_turns_differ_by_one_at_most(rows: dict[str, float], limit: int) -> None:
    found = turns("proportional", rows, limit)
    for task in rows:
        at = places(found, task)
        gaps = [after - before for before, after in zip(at, [*at[1:], at[0] + len(found.rounds)], strict=True)]
        assert max(gaps) - min(gaps) <= 1


@given(ROWS, st.data())
def test_weights_are_shares_of_device_time(rows: dict[str, float], data: st.DataObject) -> None:
    weights = {task: data.draw(st.floats(0.1, 10)) for task in rows}
    found = turns(weights, rows, limit=1000)
    rates = {task: weights[task] / rows[task] for task in rows}
    least = min(rates.values())
    for task in rows:
        assert found.steps(task) == max(1, round(min(rates[task] / least, 1000)))


@given(ROWS, st.integers(1, 20))
def test_no_round_is_empty_and_the_text_parses_back(rows: dict[str, float], limit: int) -> None:
    found = turns("proportional", rows, limit)
    assert all(found.rounds)
    assert Turns.parse(str(found)) == found
    assert found == turns("proportional", rows, limit)


def test_tasks_that_step_rarely_are_staggered() -> None:
    found = turns("proportional", {"light": 100.0, "one": 400.0, "two": 400.0, "three": 400.0, "four": 400.0})
    assert str(found) == "0: light one\n1: light two\n2: light three\n3: light four\n"


@pytest.mark.parametrize("text", ["1: a\n", "0 a\n", "0: a\n2: b\n"])
def test_a_wrong_line_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d: not round"):
        Turns.parse(text)


@pytest.mark.parametrize(
    ("shares", "rows", "limit", "match"),
    [
        ("fair", {"a": 1.0}, 16, "shares: 'fair'"),
        ("equal", {}, 16, "no task"),
        ("equal", {"a": 0.0}, 16, "task 'a': rows: 0.0"),
        ("equal", {"a": 1.0}, 0, "limit: 0"),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, 16, "task 'b': shares: has no weight"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, 16, "task 'b': shares: is none of the tasks"),
        ({"a": float("nan")}, {"a": 1.0}, 16, "task 'a': shares: nan"),
    ],
)
def test_wrong_arguments_are_refused(shares: object, rows: dict[str, float], limit: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        turns(shares, rows, limit)  # type: ignore[arg-type]
