"""Train every task of a jobs file at once: one call of the compiled model a round carries the next batch of each task that has
its turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from muxcompile import launch
from muxcompile.base import load_model, load_tokenizer
from muxcompile.heap import settled
from muxcompile.jobs import Jobs, placing
from muxcompile.metrics import FILE, Metrics, read_metrics
from muxcompile.output import check_adapters, check_output, checkpoints, keep_newest
from muxcompile.progress import Progress
from muxcompile.standing import Standing, read_standings, write_standings
from muxcompile.stored import open_parts
from muxcompile.tenants import Tenant, prepare, read_all
from runtime.comm import Mesh

# Rounds that are given to a pipeline together, so that the next begins while the last is on its way.
_WINDOW = 8


@dataclass(slots=True)
class Report:
    """What a run did.

    Args:
        steps: rounds in all, those passed over because nobody had a turn among them; with equal turns every task's steps.
        seconds: time since the run began, over all its resumptions, compilation not included.
        step_seconds: the time of every round of this process, without logging, evaluation and checkpoints.
        tasks: each task's standing at the end.
        rows: the rows of metrics.jsonl.
        resumed_from: the round of the checkpoint that this process began with, or None.
    """

    steps: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    tasks: dict[str, Standing] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: int | None = None

    def values(self, task: str, key: str) -> list[float]:
        """One column of the metrics of one task, in order, rows without it left out."""
        return [row[key] for row in self.rows if row.get("task") == task and row.get(key) is not None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Jobs made ready to train: the backbone is loaded, the data read, every task attached. Nothing has been written.

    `backbone`: None on a mesh of several processes, where the compiled model alone has this rank's part.
    """

    backbone: Any
    tokenizer: Any
    tenants: dict[str, Tenant]
    model: Any


def compile_jobs(jobs: Jobs, *, calibrated: bool = False, progress: Progress | None = None) -> Compiled:
    """Read the data, load the backbone, hold one against the other, the cheapest check first, and compile.

    Args:
        calibrated: time the regions of a first plan on this device; the compilation plans by these figures.

    Raises:
        ValueError: anything wrong with the files.
    """
    import muxcompile
    from muxcompile.calibrate import calibrate

    progress = progress or Progress()
    rows = read_all(jobs)
    progress.note(f"loading {jobs.base.path}")
    tokenizer = load_tokenizer(jobs.base)
    many = jobs.options.mesh is not None and Mesh.of(jobs.options.mesh).size > 1 and not calibrated
    backbone: Any = open_parts(jobs.base) if many else load_model(jobs.base)
    tenants = prepare(jobs, rows, backbone.model if many else backbone, tokenizer)
    for line in (line for tenant in tenants.values() for line in tenant.notes):
        progress.note(line)
    tasks = [tenant.task for tenant in tenants.values()]
    with placing(jobs):
        if calibrated:
            path, sizes = calibrate(backbone, tasks, jobs.options)
            progress.note(f"regions timed in chunks of {', '.join(map(str, sizes))} tokens, kept in {path}")
        progress.note(f"compiling for {len(tasks)} task{'s' if len(tasks) > 1 else ''}")
        model = muxcompile.compile(backbone, tasks, options=jobs.options)
    return Compiled(None if many else backbone, tokenizer, tenants, model)


def run_jobs(jobs: Jobs, *, resume: bool = False, progress: Progress | None = None) -> Report:
    """Compile, train and save: the whole of `muxcompile train`.

    Raises:
        ValueError: anything wrong with the files or the folder, before anything is written.
    """
    jobs = replace(jobs, base=launch.join(jobs.options.mesh, jobs.base, jobs.options.timeout))
    try:
        if launch.first():
            check_output(jobs.output_dir, resume)
            check_adapters(jobs)
        compiled = compile_jobs(jobs, progress=progress)
        with settled():
            return train(compiled.tenants, compiled.model, jobs.output_dir, resume=resume, progress=progress)
    finally:
        launch.leave()


def train(
    tenants: Mapping[str, Tenant], model: Any, output_dir: Path, *, resume: bool = False, progress: Progress | None = None
) -> Report:
    """Step all tasks, each in the rounds that are its turns (`model.turns`), until each has had its steps; log, evaluate and save
    on the way, each task by its own steps.

    A task that the compiled model quarantines stops there, with the reason in the metrics; the others go on.

    Args:
        tenants: from `prepare`.
        model: the CompiledModel of the tenants' tasks.
        output_dir: gets metrics.jsonl, checkpoint-<round>/ and, at the end, one folder per adapter.
        resume: go on from the newest whole checkpoint in `output_dir`; from the beginning, and said so, if there is none.
        progress: told what happens; None: silence.

    Raises:
        ValueError: the checkpoint does not belong to these jobs.
    """
    progress = progress or Progress()
    run = _Run(tenants, model, output_dir, progress)
    if resume:
        run.restore()
    writes = launch.first()
    if writes:
        output_dir.mkdir(parents=True, exist_ok=True)
    with Metrics(output_dir, keep_to=None if run.report.resumed_from is None else run.steps_done(), written=writes) as metrics:
        totals, done = {name: tenant.total_steps for name, tenant in tenants.items()}, run.steps_done()
        progress.start(totals, {name: min(steps, totals[name]) for name, steps in done.items()})
        try:
            run.loop(metrics)
        finally:
            progress.stop()
    model.save_pretrained(output_dir)
    run.report.rows = read_metrics(output_dir / FILE)
    return run.report


class _Batch(NamedTuple):
    """Examples of one step, its learning rate, and where the task's data stands behind it."""

    examples: list[Any]
    rate: float
    consumed: int
    epoch: float


class _Run:
    """The state of `train`: feeds, standings and clocks."""

    def __init__(self, tenants: Mapping[str, Tenant], model: Any, folder: Path, progress: Progress) -> None:
        self.tenants, self.model, self.folder, self.progress = tenants, model, folder, progress
        self.turns = model.turns
        self.feeds = {name: tenant.feed() for name, tenant in tenants.items()}
        self.report = Report(tasks={name: Standing(fingerprint=tenant.fingerprint()) for name, tenant in tenants.items()})
        self.began = time.perf_counter()
        self.spared: set[Path] = set()  # old checkpoints that are not ours to delete
        self.logged = dict.fromkeys(tenants, (self.began, 0))  # when and at how many tokens a task's last row was written

    def steps_done(self) -> dict[str, int]:
        return {name: standing.steps for name, standing in self.report.tasks.items()}

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def active(self) -> list[str]:
        """Tasks that have steps left, and may take them."""
        return [name for name, standing in self.report.tasks.items() if not standing.finished and standing.quarantined is None]

    def loop(self, metrics: Metrics) -> None:
        if self.report.resumed_from is None:
            self._evaluate(self.active(), metrics)
        now = time.perf_counter()
        self.logged = {name: (now, self.report.tasks[name].tokens) for name in self.tenants}
        while self.active():
            rounds = self._window()
            self.report.steps += len(rounds)
            if not any(rounds):
                continue
            self._step([names for names in rounds if names], metrics)
            for name in self.active():
                self.report.tasks[name].finished = self._at_end(name)
            self._evaluate([name for name in rounds[-1] if self._due(name, "eval_steps")], metrics)
            # The last step's checkpoint makes resuming a finished run a matter of saving its adapters again.
            if any(self._due(name, "save_steps") for name in rounds[-1]):
                self._checkpoint(metrics)
        self.report.seconds = self.elapsed()

    def _window(self) -> list[list[str]]:
        """Who steps in each of the next rounds, up to the first behind which somebody is at its end or has something to do."""
        steps, rounds = self.steps_done(), []
        left = self.active()
        for place in range(_WINDOW if self.model.overlaps else 1):
            turn = self.turns[(self.report.steps + place) % len(self.turns)]
            rounds.append([name for name in left if name in turn])
            for name in rounds[-1]:
                steps[name] += 1
            if any(self._busy(name, steps[name]) for name in rounds[-1]):
                break
        return rounds

    def _busy(self, name: str, steps: int) -> bool:
        """Whether a task is evaluated or saved behind so many steps, or ends there."""
        loop = self.tenants[name].job.loop
        periods = [every for every in (loop.eval_steps, loop.save_steps) if every is not None]
        return steps >= self.tenants[name].total_steps or any(steps % every == 0 for every in periods)

    def _at_end(self, name: str, steps: int | None = None) -> bool:
        return (self.report.tasks[name].steps if steps is None else steps) >= self.tenants[name].total_steps

    def _due(self, name: str, period: str) -> bool:
        """Whether a task has something periodic to do after its step; its last step always counts if it has any."""
        standing, every = self.report.tasks[name], getattr(self.tenants[name].job.loop, period)
        if standing.quarantined is not None:
            return False
        if standing.finished:
            return period == "eval_steps" or every is not None
        return every is not None and standing.steps % every == 0

    def _step(self, rounds: list[list[str]], metrics: Metrics) -> None:
        ahead: Counter[str] = Counter()
        taken = []
        for names in rounds:
            taken.append({name: self._take(name, ahead[name]) for name in names})
            ahead.update(names)
        began = time.perf_counter()
        results = self.model.step_rounds([{name: own.examples for name, own in given.items()} for given in taken])
        steps = self.steps_done()
        due: list[list[str]] = []
        for names in rounds:
            for name in names:
                steps[name] += 1
            due.append([n for n in names if steps[n] % self.tenants[n].job.loop.logging_steps == 0 or self._at_end(n, steps[n])])
        # Both wait for the device, so neither is read of rounds that nobody wants a row of.
        losses = [{name: float(result.losses[name]) for name in own} for own, result in zip(due, results, strict=True)]
        lost = {name: reason for result in results for name, reason in result.quarantined.items()} if any(due) else {}
        self.report.step_seconds += [(time.perf_counter() - began) / len(rounds)] * len(rounds)
        for given, result, own in zip(taken, results, losses, strict=True):
            for name, batch in given.items():
                self._note(name, batch, result, own.get(name), lost.get(name), metrics)

    def _take(self, name: str, ahead: int) -> _Batch:
        """A task's next batch; `ahead`: how many of its steps are to come before."""
        feed, rate = self.feeds[name], float(self.model.learning_rate(name, ahead))
        return _Batch(feed.take(), rate, feed.consumed, feed.epoch)

    def _note(self, name: str, batch: _Batch, result: Any, loss: float | None, lost: str | None, metrics: Metrics) -> None:
        """What one task's step came to."""
        standing = self.report.tasks[name]
        if standing.quarantined is not None:
            return
        standing.steps += 1
        if lost is not None and standing.steps > self.model.steps[name]:
            standing.quarantined = str(lost)
            row = {"step": standing.steps, "task": name, "quarantined": standing.quarantined}
            metrics.write({**row, "elapsed_seconds": round(self.elapsed(), 3)})
            self.progress.note(f"{name}: quarantined at step {standing.steps}: {standing.quarantined}")
            return
        standing.consumed = batch.consumed
        standing.tokens += sum(len(example["input_ids"]) for example in batch.examples)
        standing.labelled_tokens += int(result.tokens[name])
        logged = self._row(name, loss, result, batch) if loss is not None else None
        if logged is not None:
            metrics.write(logged)
        self.progress.advance(name, standing.steps, logged)

    def _row(self, name: str, loss: float, result: Any, batch: _Batch) -> dict[str, Any]:
        standing, now = self.report.tasks[name], time.perf_counter()
        since, before = self.logged[name]
        self.logged[name] = (now, standing.tokens)
        norm = result.grad_norms.get(name)
        return {
            "step": standing.steps,
            "task": name,
            "epoch": round(batch.epoch, 4),
            "loss": loss,
            "grad_norm": None if norm is None else float(norm),
            "learning_rate": batch.rate,
            "tokens": standing.tokens,
            "labelled_tokens": standing.labelled_tokens,
            "tokens_per_second": round((standing.tokens - before) / max(now - since, 1e-9), 2),
            "elapsed_seconds": round(self.elapsed(), 3),
        }

    def _evaluate(self, names: list[str], metrics: Metrics) -> None:
        held_out = {name: one.examples for name in names if (one := self.tenants[name].held_out) is not None}
        if not held_out:
            return
        began = time.perf_counter()
        losses = self.model.evaluate(held_out).losses
        for name in held_out:
            row = {
                "step": self.report.tasks[name].steps,
                "task": name,
                "epoch": round(self.feeds[name].epoch, 4),
                "eval_loss": float(losses[name]),
            }
            metrics.write({**row, "elapsed_seconds": round(self.elapsed(), 3)})
            self.progress.evaluated(name, row)
        spent = time.perf_counter() - began
        self.logged = {name: (since + spent, tokens) for name, (since, tokens) in self.logged.items()}

    def _checkpoint(self, metrics: Metrics) -> None:
        """Save the model's state, then ours; only a folder with ours in it is a checkpoint."""
        metrics.sync()
        path = self.folder / f"checkpoint-{self.report.steps}"
        self.model.save_checkpoint(path)  # in the place of what a run that was killed in here has left
        if not launch.first():
            return
        write_standings(path, self.report.steps, self.elapsed(), self.report.tasks)
        loops = [tenant.job.loop for tenant in self.tenants.values()]
        limits = [loop.save_total_limit for loop in loops if loop.save_steps is not None]
        known = [limit for limit in limits if limit is not None]
        for old in keep_newest(self.folder, max(known)) if len(known) == len(limits) else ():
            if old not in self.spared:
                self.spared.add(old)
                self.progress.note(f"{old} stays, though save_total_limit is reached: it holds what muxcompile has not written")

    def restore(self) -> None:
        """Take up the newest whole checkpoint.

        Raises:
            ValueError: it is damaged; its tasks, their data, batches or seeds are not today's.
        """
        whole = checkpoints(self.folder)
        if not whole:
            self.progress.note(f"no whole checkpoint in {self.folder}: beginning at step 1")
            return
        _, path = whole[-1]
        step, elapsed, standings = read_standings(path, {name: tenant.total_steps for name, tenant in self.tenants.items()})
        if set(standings) != set(self.tenants):
            then, now = (", ".join(sorted(names)) for names in (standings, self.tenants))
            raise ValueError(f"{path} was made with tasks {then}, these jobs have {now}")
        for name, own in standings.items():
            if own.fingerprint != self.report.tasks[name].fingerprint:
                raise ValueError(f"{path}: task {name!r} was trained on other data, batch_size or seed: begin in another folder")
            self.feeds[name].consumed = own.consumed
        self.model.load_checkpoint(path)
        self.report.tasks, self.report.steps, self.report.resumed_from = standings, step, step
        for name, own in standings.items():
            own.finished = self._at_end(name)
        self.began = time.perf_counter() - elapsed
        self.progress.note(f"resuming after round {step} ({path})")
