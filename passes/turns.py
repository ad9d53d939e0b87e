"""turns: how often each task steps, where tasks of unlike weight share one device.

A period has some rounds and repeats. In a round every task that has its turn takes one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

import numpy as np

Shares = Literal["equal", "proportional"] | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Turns:
    """The tasks that step in each round of a period. Its text is a line for each round: `0: alice bob`."""

    rounds: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        # Task names are free text: percent-encoding keeps blanks and colons out of them.
        return "".join(
            f"{index}:{''.join(f' {quote(task, safe=str())}' for task in tasks)}\n" for index, tasks in enumerate(self.rounds)
        )

    @classmethod
    def parse(cls, text: str) -> Turns:
        """Read the text back.

        Raises:
            ValueError: naming the line.
        """
        rounds: list[tuple[str, ...]] = []
        for line in text.splitlines():
            index, colon, tasks = line.partition(":")
            if not colon or index.strip() != str(len(rounds)):
                raise ValueError(f"line {len(rounds) + 1}: not round {len(rounds)} of a period: {line!r}")
            rounds.append(tuple(unquote(task) for task in tasks.split()))
        return cls(tuple(rounds))

    def steps(self, task: str) -> int:
        """How often the task steps in a period."""
        return sum(task in tasks for tasks in self.rounds)


def turns(shares: Shares, rows: Mapping[str, float], limit: int = 16) -> Turns:
    """Spread the tasks' steps over a period.

    Args:
        shares: "equal": every task steps in every round. "proportional": every task gets the same device time, so light ones
            step more often. Weights, one for each task: device time in proportion to them.
        rows: rows of a step of each task; all that is read of them is their ratio, so seconds serve as well.
        limit: most rounds of a period. The task with the fewest steps takes 1, the others the nearest whole number of its rate.

    Returns:
        Each task's turns lie evenly (gaps, around the period, differ by at most 1) and are shifted so that rounds carry about the
        same number of rows: heavy tasks first, each to where the sum of squares of the rounds' rows grows least.

    Raises:
        ValueError: naming the field, and the task.
    """
    _check(shares, rows, limit)
    if shares == "equal":
        return Turns((tuple(rows),))
    weights: Mapping[str, float] = dict.fromkeys(rows, 1.0) if isinstance(shares, str) else shares
    rates = {task: weights[task] / rows[task] for task in rows}
    least = min(rates.values())
    counts = {task: max(1, round(min(rate / least, limit))) for task, rate in rates.items()}
    period = max(counts.values())
    carried = np.zeros(period)
    places: dict[str, set[int]] = {}
    for task in sorted(rows, key=lambda task: -rows[task] * counts[task]):
        # Adding the same rows in as many rounds everywhere: the squares grow least where the rounds carry least.
        candidates = [[(step * period + shift) // counts[task] for step in range(counts[task])] for shift in range(period)]
        best = min(candidates, key=lambda found: float(carried[found].sum()))
        carried[best] += rows[task]
        places[task] = set(best)
    return Turns(tuple(tuple(task for task in rows if index in places[task]) for index in range(period)))


def _check(shares: Shares, rows: Mapping[str, float], limit: int) -> None:
    if not rows:
        raise ValueError("rows: there is no task")
    if limit < 1:
        raise ValueError(f"limit: {limit} rounds; a period has at least one")
    if isinstance(shares, str):
        if shares not in ("equal", "proportional"):
            raise ValueError(f"shares: {shares!r}; it is 'equal', 'proportional' or a weight for each task")
    else:
        if strange := sorted(set(rows) ^ set(shares)):
            reason = "has no weight" if strange[0] in rows else "is none of the tasks"
            raise ValueError(f"task {strange[0]!r}: shares: {reason}")
        _positive("shares", shares)
    _positive("rows", rows)


def _positive(field: str, values: Mapping[str, float]) -> None:
    for task, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"task {task!r}: {field}: {value}; it is a positive number")
