"""output: the folder of a run, what it holds already, and what a run may put there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from muxcompile.entry import ADAPTER
from muxcompile.jobs import Jobs
from muxcompile.metrics import FILE
from muxcompile.standing import STATE
from passes.task import is_folder
from runtime import checkpoint
from runtime.folder import check_replaceable


def check_output(folder: Path, resume: bool) -> None:
    """Refuse a folder that a run would spoil.

    Raises:
        ValueError: it is a file, cannot be written to, or holds a run that `resume` does not ask to go on with.
    """
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"output_dir {str(folder)!r}: {str(above)!r} is not a folder that can be written to")
    if not resume and folder.is_dir() and ((folder / FILE).exists() or any(folder.glob("checkpoint-*"))):
        raise ValueError(
            f"output_dir {str(folder)!r} holds a run already: go on with it by --resume, or name another folder by --output-dir"
        )


def check_adapters(jobs: Jobs) -> None:
    """Refuse to save an adapter, or a checkpoint, over what the run reads or somebody else has put there.

    Raises:
        ValueError: beginning with `file:line:` and naming the task and the folder.
    """
    read = list(_read(jobs))
    for name, job in jobs.jobs.items():
        target, where = jobs.output_dir / name, f"{job.where}: task {name!r}: output_dir {str(jobs.output_dir)!r}: "
        real = target.resolve()
        for what, path in read:
            other = path.resolve()
            if other.is_relative_to(real):
                how = "is" if real == other else "holds"
                raise ValueError(f"{where}the adapter's folder {str(target)!r} {how} {what} {str(path)!r}: name another one")
        check_replaceable(target, ADAPTER, who=where)
    whole = {path for _, path in checkpoints(jobs.output_dir)}
    for _, path in _numbered(jobs.output_dir):
        if path not in whole:
            check_replaceable(path, checkpoint.FORM, who=f"output_dir {str(jobs.output_dir)!r}: ")


def _read(jobs: Jobs) -> Iterator[tuple[str, Path]]:
    """What a run reads: field and path."""
    if Path(jobs.base.path).exists():
        yield "base", Path(jobs.base.path)
    for name, job in jobs.jobs.items():
        yield f"tasks.{name}.data", job.data
        if job.eval_data is not None:
            yield f"tasks.{name}.eval_data", job.eval_data
        if is_folder(job.adapter):
            yield f"tasks.{name}.peft", Path(job.adapter)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return sorted(found)


def keep_newest(folder: Path, limit: int) -> list[Path]:
    """Delete whole checkpoints of a run but the newest; returns older ones that stay, because they hold files of others."""
    left = []
    for _, path in checkpoints(folder)[:-limit]:
        if path.is_symlink() or checkpoint.FORM.foreign(path) is not None:
            left.append(path)
            continue
        # First what makes it a whole one: who is killed in here leaves no half of a checkpoint to go on from.
        (path / STATE).unlink()
        shutil.rmtree(path)
    return left


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run, oldest first."""
    return [(step, path) for step, path in _numbered(folder) if (path / STATE).is_file()]
