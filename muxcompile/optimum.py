"""optimum: a plan's grouping held against the best that an exact solver finds, and its bound."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from muxcompile.planner import Planned
from passes.exact import exact
from passes.group import SWITCH, UNITS, as_groups


@dataclass(frozen=True, slots=True)
class Optimum:
    """Costs of one round, in `unit`, without optimizer steps.

    Args:
        plan: of the plan's grouping, each group in its best size by the steps that the search looked at.
        found: of the best partition that the solver found; infinite if it found none in time.
        bound: no partition costs less.
        seconds: that the solver took.
        relaxed: the bound is of fewer classes of adapters than there are: valid, and maybe low.
    """

    plan: float
    found: float
    bound: float
    unit: str
    seconds: float
    relaxed: bool

    @property
    def gap(self) -> float:
        """How much more the plan may cost than the cheapest one, as a part of the bound."""
        return self.plan / self.bound - 1 if self.bound > 0 else math.inf

    def __str__(self) -> str:
        found = (
            f"the best that HiGHS found {self.found:.6g} {self.unit}" if math.isfinite(self.found) else "HiGHS found none in time"
        )
        relaxed = " (of fewer classes of adapters than there are)" if self.relaxed else ""
        return (
            f"cost of a round: the plan {self.plan:.6g} {self.unit}, {found}, its bound {self.bound:.6g} {self.unit}{relaxed}: "
            f"a gap of {self.gap:.2%}; solved in {self.seconds:.1f} s\n"
        )

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "gap": self.gap}
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def optimum(planned: Planned, objective: str) -> Optimum:
    """Solve the grouping of a plan exactly, as far as HiGHS comes in a minute.

    Raises:
        ValueError: nothing was forecast, so there is nothing to solve.
        ImportError: scipy is not installed.
    """
    found, grouping = planned.forecast, planned.grouping
    if found is None or grouping is None:
        raise ValueError("exact: there is no forecast to solve: give every task its lengths")
    # The least peak comes first there: what is left to solve is the least time at the plan's.
    limits: Any = {"cap": grouping.bytes if objective == "memory" else found.cap, "base_bytes": found.model.resident([])}
    answer = exact(found.loads, found.model, **limits)
    place = {load.task: index for index, load in enumerate(found.loads)}
    partition = [[place[task] for task in own.tasks] for own in grouping.groups]
    plan = as_groups(partition, found.loads, found.model, **limits, switch=SWITCH)
    return Optimum(plan.cost, answer.cost, answer.bound, UNITS[objective], answer.seconds, answer.relaxed)
