"""What a person sees while a run trains: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

if TYPE_CHECKING:
    from muxcompile.train import Report


class Progress:
    """What the trainer tells while it goes; this one listens in silence."""

    def note(self, text: str) -> None:
        """Something worth a line: loading, compiling, a task quarantined."""

    def start(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        """Training begins: steps each task will take, and has taken already."""

    def advance(self, name: str, step: int, row: Mapping[str, Any] | None) -> None:
        """A task has taken this step; its row of metrics, if one was due."""

    def evaluated(self, name: str, row: Mapping[str, Any]) -> None:
        """A task's held-out loss is known."""

    def stop(self) -> None:
        """Training has ended, well or not."""


class Lines(Progress):
    """One plain line per logged step, at most one every `pause` seconds, for logs and pipes."""

    def __init__(self, console: Console, pause: float = 1.0) -> None:
        self.console, self.pause = console, pause
        self.totals: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.round: set[str] = set()  # who has stepped since the round began
        self.last = 0.0

    def note(self, text: str) -> None:
        self._flush()
        self._print(text)

    def start(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        self.totals, self.steps = dict(totals), dict(done)
        self.began, self.first = time.monotonic(), sum(done.values())

    def advance(self, name: str, step: int, row: Mapping[str, Any] | None) -> None:
        if name in self.round:
            self.round.clear()
            if time.monotonic() - self.last >= self.pause:
                self._flush()
        self.round.add(name)
        self.steps[name] = step
        if row is not None:
            self.rows[name] = row

    def evaluated(self, name: str, row: Mapping[str, Any]) -> None:
        self._flush()
        self._print(f"step {row['step']}: {name} held-out loss {row['eval_loss']:.4f}")

    def stop(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if not self.rows:
            return
        # One step for all, unless they take turns.
        together = len({row["step"] for row in self.rows.values()}) == 1
        labels = {name: name if together else f"{name} step {row['step']}/{self.totals[name]}" for name, row in self.rows.items()}
        each = ", ".join(
            f"{labels[name]} loss {number(row['loss'])} {row['tokens_per_second']:.0f} tokens/s" for name, row in self.rows.items()
        )
        taken = sum(self.steps.values())
        left = (time.monotonic() - self.began) / max(taken - self.first, 1) * (sum(self.totals.values()) - taken)
        shared = (
            f"step {next(iter(self.rows.values()))['step']}/{max(self.totals[name] for name in self.rows)}: " if together else ""
        )
        self._print(f"{shared}{each}, {clock(left)} left")
        self.rows, self.last = {}, time.monotonic()

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Live(Progress):
    """A bar per task: step, loss, held-out loss, tokens/s, time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("held-out {task.fields[held_out]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self.ids: dict[str, TaskID] = {}
        self.held_out: dict[str, float] = {}

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)

    def start(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        for name, total in totals.items():
            blank: dict[str, Any] = {"loss": "-", "held_out": "-", "speed": "-"}
            self.ids[name] = self.bars.add_task(escape(name), total=total, completed=done[name], **blank)
        self.bars.start()

    def advance(self, name: str, step: int, row: Mapping[str, Any] | None) -> None:
        fields: dict[str, Any] = {} if row is None else {"loss": number(row["loss"]), "speed": f"{row['tokens_per_second']:.0f}"}
        self.bars.update(self.ids[name], completed=step, **fields)

    def evaluated(self, name: str, row: Mapping[str, Any]) -> None:
        self.bars.update(self.ids[name], held_out=number(row["eval_loss"]))

    def stop(self) -> None:
        self.bars.stop()


def progress_for(console: Console) -> Progress:
    """Bars where the console is a terminal, else lines. rich honours NO_COLOR by itself."""
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def number(value: float | None) -> str:
    """A loss for the eye; "-" where there is none."""
    return "-" if value is None or value != value else f"{value:.4f}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def report_table(report: Report) -> Table:
    """A run's end: per task steps, tokens, first and last loss, first and last held-out loss."""
    table = Table()
    for heading in ("task", "steps", "tokens", "loss", "held-out loss"):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for name, standing in report.tasks.items():
        steps = max((int(step) for step in report.values(name, "step")), default=0)
        ends = [ends_of(report.values(name, key)) for key in ("loss", "eval_loss")]
        label = escape(name) if standing.quarantined is None else f"{escape(name)} (quarantined)"
        table.add_row(label, str(steps), f"{standing.tokens:,}", *ends)
    return table


def ends_of(values: list[float]) -> str:
    """The first and the last of a column."""
    return f"{number(values[0])} -> {number(values[-1])}" if values else "-"


def peak_memory() -> str:
    """Peak host memory of this process, and peak device memory where CUDA is used."""
    import resource
    import sys

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device" if torch.cuda.is_available() else ""
    return f"{peak / 2**30:.2f} GiB{device}"
