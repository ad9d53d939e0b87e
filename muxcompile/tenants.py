"""Tenants: the jobs of a file with their data read, checked against the backbone and counted, before anything is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxcompile.base import limits
from muxcompile.data import Dataset, Row, encode_rows, fit, read_rows
from muxcompile.feed import Feed, split
from muxcompile.jobs import Job, Jobs
from passes.adapters.config import FILE
from passes.task import Task, is_folder


@dataclass(frozen=True, slots=True)
class Tenant:
    """A job with its data read: what the training loop walks.

    Args:
        job: the jobs file's entry.
        task: what the compiler gets.
        data: examples to train on.
        held_out: examples to evaluate on, or None.
        total_steps: optimizer steps until this task is done.
        notes: a line for each file of which `too_long: drop` left something out.
    """

    job: Job
    task: Task
    data: Dataset
    held_out: Dataset | None
    total_steps: int
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.task.name

    def feed(self) -> Feed:
        """Its examples, from the first one on."""
        return Feed(self.name, self.task.seed, self.data.examples, self.job.step_examples)

    def fingerprint(self) -> str:
        """What a resumed run must share with the one it resumes: the examples, and what cuts them into batches."""
        text = json.dumps([self.data.examples, self.job.step_examples, self.task.seed])
        return hashlib.sha256(text.encode()).hexdigest()


def read_all(jobs: Jobs) -> dict[Path, list[Row]]:
    """Every data file of the jobs, each read once, shapes checked.

    Raises:
        ValueError: beginning with `file:line:`.
    """
    paths = {path for job in jobs.jobs.values() for path in (job.data, job.eval_data) if path is not None}
    return {path: read_rows(path) for path in sorted(paths)}


def prepare(jobs: Jobs, rows: Mapping[Path, list[Row]], backbone: Any, tokenizer: Any) -> dict[str, Tenant]:
    """Tokenise, hold against the backbone, split, and count the steps.

    Raises:
        ValueError: beginning with `file:line:` and naming field and task.
    """
    encoded: dict[Path, Dataset] = {}
    tenants = {}
    vocab_size, model_limit = limits(backbone)
    for job in jobs.jobs.values():
        try:
            sets: list[Dataset] = []
            for path in (job.data, job.eval_data):
                if path is None:
                    continue
                if path not in encoded:
                    encoded[path] = encode_rows(path, rows[path], tokenizer)
                longest = job.settings.get("max_length")
                sets.append(
                    fit(
                        encoded[path],
                        vocab_size=vocab_size,
                        max_length=longest,
                        model_limit=model_limit,
                        virtual=_virtual(job.adapter),
                        too_long=job.loop.too_long,
                    )
                )
        except ValueError as error:
            raise ValueError(f"{error} (task {job.name!r})") from None
        tenants[job.name] = _tenant(job, sets)
    return tenants


def _virtual(adapter: Any) -> int:
    """Positions that an adapter takes from each sequence; what is no number is refused when it is compiled."""
    try:
        given = json.loads((Path(adapter) / FILE).read_text()) if is_folder(adapter) else vars(adapter)
        count = given.get("num_virtual_tokens")
    except (OSError, ValueError, AttributeError):
        return 0
    return count if isinstance(count, int) and not isinstance(count, bool) else 0


# What the planner draws its sample steps from: more examples than that say nothing new about a distribution.
_TYPICAL = 2048


def _typical(lengths: list[int]) -> list[int]:
    """At most _TYPICAL of the lengths, evenly over their distribution, the longest among them."""
    found = sorted(lengths, reverse=True)
    return found[:: math.ceil(len(found) / _TYPICAL)]


def _tenant(job: Job, sets: list[Dataset]) -> Tenant:
    data, held_out = sets[0], sets[1] if len(sets) > 1 else None
    notes = tuple(
        f"{job.name}: {one.dropped} of {one.dropped + len(one)} examples of {one.path} left out, too long"
        for one in sets
        if one.dropped
    )
    if job.eval_fraction is not None:
        keep, hold = split(data.examples, job.eval_fraction, job.settings["seed"], job.name)
        if not keep:
            raise ValueError(
                f"{job.where}: tasks.{job.name}.eval_fraction={job.eval_fraction:g} of {len(data)} examples leaves none to train on"
            )
        data, held_out = data.only(keep), data.only(hold)
    steps = job.loop.max_steps or max(1, math.ceil(job.loop.num_train_epochs * math.ceil(len(data) / job.step_examples)))
    # The compiler plans for the lengths it is told of: tell it, rather than have it compile again at step 70.
    longest = max(len(example["input_ids"]) for one in (data, held_out) if one is not None for example in one.examples)
    known: dict[str, Any] = {
        "max_length": job.settings.get("max_length") or longest,
        "lengths": _typical([len(example["input_ids"]) for example in data.examples]),
        "batch_size": job.step_examples,
    }
    try:
        task = dataclasses.replace(job.task(steps), **known)
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from None
    return Tenant(job, task, data, held_out, steps, notes)
