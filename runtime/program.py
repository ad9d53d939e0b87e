"""Program: the static schedule of a training step, as a list of actions that is also a text.

One action is one line, and the line parses back to the action:

    0.compute F layers.3[alice+bob].0 : h.3 cos sin -> h.4 s.3.0 s.3.1

rank 0, stream `compute`, kind F, region `layers.3`, tasks alice and bob, micro-batch 0; it reads three values and writes
three. `kept.3^0` is what micro-batch 0 wrote as `kept.3`. Order within one (rank, stream) is the schedule; a value is written
before it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from urllib.parse import quote, unquote


class Kind(StrEnum):
    """What an action does. A closed alphabet: the executor has one handler for each word, those between ranks by `runtime.comm`."""

    LOAD = "LOAD"  # a packed chunk becomes device tensors
    F = "F"  # a region's forward
    LOSS = "LOSS"  # head and cross entropy over the labelled rows: losses, and the gradient of the hidden state
    B = "B"  # a region's backward: adapter gradients accumulate, the input's gradient is written
    STEP = "STEP"  # one task's optimizer step
    SEND = "SEND"  # values go to the rank that the region names
    RECV = "RECV"  # they come from it, under the same names


_LINE = re.compile(
    r"(?P<rank>\d+)\.(?P<stream>\w+) (?P<kind>[A-Z]+) (?P<region>[^\s\[\]]+)\[(?P<tasks>[^\s\[\]]*)\]\.(?P<micro>\d+) :"
    r"(?P<reads>(?: [^\s>]+)*) ->(?P<writes>(?: \S+)*)$"
)


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one stream of one rank; `reads` and `writes` are the names of the values it takes and makes."""

    rank: int
    stream: str
    kind: Kind
    region: str
    tasks: tuple[str, ...]
    micro: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def peer(self) -> int | None:
        """The other rank of a SEND or RECV."""
        return int(self.region) if self.kind in (Kind.SEND, Kind.RECV) else None

    def __str__(self) -> str:
        if "" in self.tasks:
            # `[]` is no task.
            raise ValueError(f"{self.kind} {self.region}: a task has an empty name: its text would not read back")
        # Task names are free text: percent-encoding keeps the line's own signs out of them.
        tasks = "+".join(quote(task, safe="") for task in self.tasks)
        reads = "".join(f" {name}" for name in self.reads)
        writes = "".join(f" {name}" for name in self.writes)
        return f"{self.rank}.{self.stream} {self.kind} {self.region}[{tasks}].{self.micro} :{reads} ->{writes}"

    @classmethod
    def parse(cls, line: str) -> Action:
        """Read one line back.

        Raises:
            ValueError: the line is not an action.
        """
        match = _LINE.match(line.strip())
        if match is None or match["kind"] not in Kind.__members__:
            raise ValueError(f"not an action: {line.strip()!r}")
        if match["kind"] in (Kind.SEND, Kind.RECV) and not match["region"].isdecimal():
            raise ValueError(f"{match['kind']} names no rank: {line.strip()!r}")
        tasks = tuple(unquote(task) for task in match["tasks"].split("+")) if match["tasks"] else ()
        if "" in tasks:
            raise ValueError(f"a task has an empty name: {line.strip()!r}")
        return cls(
            rank=int(match["rank"]),
            stream=match["stream"],
            kind=Kind(match["kind"]),
            region=match["region"],
            tasks=tasks,
            micro=int(match["micro"]),
            reads=tuple(match["reads"].split()),
            writes=tuple(match["writes"].split()),
        )


@dataclass(frozen=True, slots=True)
class Program:
    """A list of actions. The compiler writes the program of ONE micro-batch; `unroll` repeats it for a step's chunks."""

    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return "".join(f"{action}\n" for action in self.actions)

    def __iter__(self) -> Iterator[Action]:
        return iter(self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read a program's text back; blank lines and lines that begin with `#` are passed over.

        Raises:
            ValueError: naming the line.
        """
        actions = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    actions.append(Action.parse(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
        return cls(tuple(actions))

    def of(self, rank: int) -> Program:
        """What one rank runs."""
        return Program(tuple(action for action in self if action.rank == rank))

    def unroll(self, chunks: Iterable[tuple[str, ...]]) -> Program:
        """The whole step: this micro-batch's actions once for each chunk, carrying the tasks that the chunk holds."""
        return Program(tuple(replace(action, micro=micro, tasks=tasks) for micro, tasks in enumerate(chunks) for action in self))

    def last_reads(self) -> tuple[tuple[str, ...], ...]:
        """For every action, the values nobody reads afterwards: what the executor drops before it runs the action."""
        seen: set[str] = set()
        dying: list[tuple[str, ...]] = []
        for action in reversed(self.actions):
            dying.append(tuple(dict.fromkeys(name for name in action.reads if name not in seen)))
            seen.update(action.reads)
        return tuple(reversed(dying))
