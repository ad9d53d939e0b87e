"""replay: what a pipeline has run, played by the simulator in the order in which it ran, with predicted or with measured seconds.

With those of the cost model it says what was to be expected; with the measured means of every stage and group, how much of the
difference is theirs, and how much lies between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from passes.loads import Shape
from passes.needs import Extras
from passes.parallel import StageCosts
from runtime.program import Action, Kind
from runtime.simulate import Span, Timeline, simulate
from runtime.trace import Run


class Part(NamedTuple):
    """What takes the same time wherever it is in a program: a kind of action of a stage, of a group's tasks and size of chunks."""

    kind: Kind
    stage: int
    tasks: tuple[str, ...]
    rows: int


def part_of(action: Action, run: Run) -> Part:
    """Optimizer steps are of no chunk."""
    return Part(action.kind, action.rank, action.tasks, 0 if action.kind is Kind.STEP else run.rows[action.micro])


def predicted(runs: Sequence[Run], costs: StageCosts, extras: Extras) -> dict[Part, float]:
    """Seconds of all that the runs have, by the cost model.

    Args:
        costs: of the mesh that ran.
        extras: what the programs of all groups run.
    """
    found: dict[Part, float] = {}
    filled: defaultdict[Part, list[int]] = defaultdict(list)
    for run in runs:
        for action in run.program:
            if action.kind is not Kind.STEP and action.peer is None:
                filled[part_of(action, run)].append(run.filled[action.micro])
    for run in runs:
        # Lanes share the device: each is as many times slower as there are.
        lanes = len({action.stream for action in run.program if action.kind is Kind.F and action.rank == 0})
        for action in run.program:
            part = part_of(action, run)
            if part in found or action.peer is not None:
                continue
            if action.kind is Kind.STEP:
                found[part] = sum(costs.step(task)[part.stage] for task in part.tasks)
                continue
            rows = sum(filled[part]) / len(filled[part])
            micro = costs.micro(part.tasks, extras, Shape(part.rows), rows=rows, lanes=lanes) if part.rows else None
            ways = (0.0,) * costs.mesh.pp if micro is None else micro.forward if action.kind is Kind.F else micro.backward
            found[part] = ways[part.stage] * max(1, lanes)
    return found


def measured(runs: Sequence[Run], spans: Sequence[Sequence[Sequence[Span]]]) -> dict[Part, float]:
    """Mean seconds of all that the runs have, as `Trace.actions` has it.

    Ranks wait for each other in an optimizer step: what it takes is what the last one to come sees.

    Args:
        spans: by process, and by run.
    """
    taken: defaultdict[Part, list[float]] = defaultdict(list)
    for index, run in enumerate(runs):
        steps: defaultdict[int, list[float]] = defaultdict(list)
        for own in (own for each in spans for own in each[index]):
            if own.action.kind is Kind.STEP:
                steps[own.action.micro].append(own.end - own.start)
            elif own.action.peer is None:
                taken[part_of(own.action, run)].append(own.end - own.start)
        for action in run.program:
            if action.kind is Kind.STEP:
                taken[part_of(action, run)].append(min(steps[action.micro]))
    return {part: sum(each) / len(each) for part, each in taken.items()}


def play(runs: Sequence[Run], seconds: Mapping[Part, float], transfer: Callable[[int], float]) -> list[Timeline]:
    """Each run as it would take these seconds.

    Args:
        seconds: of all parts; a chunk that a replica has not takes none.
        transfer: of a chunk of so many rows from stage to stage.
    """

    def played(run: Run) -> Timeline:
        def took(action: Action) -> float:
            if action.kind is not Kind.STEP and not run.rows[action.micro]:
                return 0.0
            return transfer(run.rows[action.micro]) if action.peer is not None else seconds[part_of(action, run)]

        return simulate(run.program, seconds=took, nbytes={})

    return [played(run) for run in runs]
