"""metrics.jsonl: one JSON object a line, written as the run goes and cut back to a checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from runtime.folder import writing

FILE = "metrics.jsonl"


class Metrics:
    """The open file of a run.

    Rows of training: step (the task's own), task, epoch, loss, grad_norm, learning_rate, tokens and labelled_tokens (this task's,
    since the run began), tokens_per_second (since the task's last row), elapsed_seconds. Rows of evaluation: step, task, epoch,
    eval_loss, elapsed_seconds.
    A number that is not finite is written as null: JSON has no NaN.

    Args:
        folder: the run's output folder; it must exist.
        keep_to: keep each task's rows of steps up to this one (a resumed run); None: begin a new file.
        written: False: another process writes the file, and rows given here are left to it.

    Raises:
        OSError: naming the file, whenever it cannot be written.
    """

    def __init__(self, folder: Path, keep_to: Mapping[str, int] | None = None, *, written: bool = True) -> None:
        self.path = folder / FILE
        self._file: TextIO | None = None
        if not written:
            return
        kept = [] if keep_to is None else [row for row in read_metrics(self.path) if row["step"] <= keep_to.get(row["task"], 0)]
        # A file of the kept rows takes the old one's place at once, so that a crash here loses none of them.
        fresh = self.path.with_suffix(".jsonl.tmp")
        with writing(self.path):
            fresh.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it is in the file when this returns."""
        if self._file is not None:
            with writing(self.path):
                self._file.write(_line(row))
                self._file.flush()

    def sync(self) -> None:
        """Force the rows onto the disk: a checkpoint counts on them."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with writing(self.path):  # once more, if a row could not be
                self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none if there is no file. A torn last line (the run was killed in it) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row and "task" in row:
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"
