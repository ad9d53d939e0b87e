"""Plan: what the compiler did and why, as text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.program import Program


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: its name, its seconds, and its graph before and after as text."""

    name: str
    seconds: float
    before: str
    after: str
    difference: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of a compilation, for readers.

    Args:
        steps: the passes in their order.
        regions: which regions there are and which share a template.
        program: the actions of one micro-batch.
        groups: task names that share chunks.
        choices: what was decided, with the reason, e.g. {"regions": "eager: ..."}.
        estimates: figures before any run: bytes of weights, tables, optimizer; FLOPs and predicted seconds of a chunk.
        notes: what costs more than it seems, or was left undone.
        sources: source text of every callable by name.
        timeline: the simulated program as a grid.
        trace: the same as a Chrome trace.
        kernels: source text of every emitted kernel by name.
    """

    steps: Sequence[Step]
    regions: str
    program: Program
    groups: tuple[tuple[str, ...], ...]
    choices: Mapping[str, str]
    estimates: Mapping[str, float]
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    timeline: str = ""
    trace: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def schedule(self) -> Program:
        """The actions of one micro-batch."""
        return self.program

    def after(self, name: str) -> str:
        """The graph after a pass, as text.

        Raises:
            KeyError: no such pass; the message lists those there are.
        """
        for step in self.steps:
            if step.name == name:
                return step.after
        raise KeyError(f"no pass {name!r} (passes: {', '.join(step.name for step in self.steps)})")

    def text(self) -> str:
        lines = ["muxcompile plan", ""]
        lines += [f"group {index}: {', '.join(group)}" for index, group in enumerate(self.groups)]
        lines += ["", "choices"] + [f"  {name}: {choice}" for name, choice in self.choices.items()]
        lines += ["", "estimates"] + [f"  {name}: {value:,.6g}" for name, value in self.estimates.items()]
        lines += ["", "passes"]
        for step in self.steps:
            lines.append(f"  {step.name} ({step.seconds * 1e3:.0f} ms)")
            lines += [f"    {line}" for line in step.difference.splitlines()]
        lines += ["", "regions"] + [f"  {line}" for line in self.regions.splitlines()]
        lines += ["", f"program of one chunk ({len(self.program)} actions)"] + [
            f"  {line}" for line in _shorten(str(self.program).splitlines())
        ]
        if self.notes:
            lines += ["", "notes"] + [f"  {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def diff(self, other: Plan) -> str:
        """What another plan decides otherwise: changed lines of its groups, choices, estimates, passes, regions, program and
        notes, each under its heading; "" where nothing differs. Times that passes took are no decision."""
        lines: list[str] = []
        own, its = self._sections(), other._sections()
        for heading in own:
            changed = [
                line
                for line in difflib.unified_diff(own[heading], its[heading], lineterm="", n=0)
                if not line.startswith(("---", "+++", "@@"))
            ]
            if changed:
                lines += [heading, *(f"  {line}" for line in _shorten(changed))]
        return "".join(f"{line}\n" for line in lines)

    def _sections(self) -> dict[str, list[str]]:
        return {
            "groups": [f"group {index}: {', '.join(group)}" for index, group in enumerate(self.groups)],
            "choices": [f"{name}: {choice}" for name, choice in self.choices.items()],
            "estimates": [f"{name}: {value:,.6g}" for name, value in self.estimates.items()],
            "passes": [f"{step.name}: {line}" for step in self.steps for line in (step.difference.splitlines() or ["-"])],
            "regions": self.regions.splitlines(),
            "program": str(self.program).splitlines(),
            "notes": list(self.notes),
        }

    def print(self) -> None:
        """Print the plan; `save` writes it whole."""
        print(self.text(), end="")

    def to_json(self) -> dict[str, Any]:
        return {
            "groups": [list(group) for group in self.groups],
            "choices": dict(self.choices),
            "estimates": dict(self.estimates),
            "passes": [
                {"name": step.name, "seconds": step.seconds, "difference": step.difference.splitlines()} for step in self.steps
            ],
            "regions": self.regions.splitlines(),
            "program": str(self.program).splitlines(),
            "notes": list(self.notes),
        }

    def save(self, directory: str | Path) -> None:
        """Write the plan as a folder: `plan.txt`, `plan.json`, `NN_<pass>.before.py` and `.after.py`, `regions.txt`,
        `regions/*.py`, `kernels/*.py`, `program.txt`, `timeline.txt`, and `trace.json` (predicted, for Perfetto)."""
        folder = Path(directory)
        (folder / "regions").mkdir(parents=True, exist_ok=True)
        (folder / "plan.txt").write_text(self.text())
        (folder / "plan.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        for number, step in enumerate(self.steps, 1):
            (folder / f"{number:02d}_{step.name}.before.py").write_text(step.before)
            (folder / f"{number:02d}_{step.name}.after.py").write_text(step.after)
        (folder / "regions.txt").write_text(self.regions)
        (folder / "program.txt").write_text(str(self.program))
        (folder / "timeline.txt").write_text(self.timeline)
        (folder / "trace.json").write_text(json.dumps(self.trace) + "\n")
        for kind, texts in (("regions", self.sources), ("kernels", self.kernels)):
            for name, source in texts.items():
                (folder / kind).mkdir(exist_ok=True)
                (folder / kind / f"{name}.py").write_text(source)


def _shorten(lines: list[str], ends: int = 8, width: int = 150) -> list[str]:
    if len(lines) > 2 * ends + 1:
        lines = [*lines[:ends], f"... {len(lines) - 2 * ends} more, all in program.txt", *lines[-ends:]]
    return [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]
