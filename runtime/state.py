"""State: how tasks step, each with its own optimizer over its own rows, all bound to tasks by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.choose import choose
from runtime.cudagraph import Values, together
from runtime.store import Store, as_stored
from runtime.training import TaskState, Training
from runtime.unmixed import unmixed

# Steps of a task whose outcome ranks do not wait for before they decide who trains: so far a host may be ahead of its device.
_AHEAD = 2

__all__ = ["State", "TaskState", "Training"]


class State(Store):
    """A store whose tasks train.

    With `ranks`, `step_all` and `exchange` are calls that all of them make, in the same order.
    """

    def read(self, task: str, key: str, *, gradient: bool = False) -> Tensor:
        return self._copied(task, key, self._gradient(task, key)) if gradient else super().read(task, key)

    def _gradient(self, task: str, key: str) -> Tensor:
        param = self.params.get((task, key))
        if param is None:
            self.poll([task], wait=True)
            self._pull([self.encoded.owner(task, key)])
            return self.encoded.grads[task, key]
        return as_stored(param, self._rows(self.grads, param))

    def clear_gradients(self, name: str) -> None:
        task = self.tasks[name]
        self._zero(name)
        task.pending = None
        task.losses.clear()

    def _zero(self, name: str) -> None:
        task = self.tasks[name]
        if rows := [*self._accumulated(name), *task.gradients[task.rows :]]:
            torch._foreach_zero_(rows)

    def step(self, name: str) -> Tensor:
        """One optimizer step of one task over its accumulated gradients; returns their 2-norm before clipping, on the device.

        The step is not taken if the loss, the gradient or the update is not finite. That is decided on the device; the host
        learns of it in `poll`.
        """
        (norm,) = self.step_all([name])
        return norm

    @unmixed()
    def step_all(self, names: Sequence[str], measured: Tensor | None = None) -> list[Tensor]:
        """`step` of some tasks, which ranks agree about together.

        Args:
            measured: [ranks of one copy of the model, tasks, 2]: what `measure` gave each of them; None: they are asked now.
        """
        if self.ranks is None:
            for name in names:
                self._prepare(name)
        else:
            self._agree(names, self.ranks.gather(self.measure(names), "model") if measured is None else measured)
        self._each("update", self._update, names)
        return [self._stepped(name) for name in names]

    def _prepare(self, name: str) -> None:
        self._pull(self.encoded.of(name))
        self.tasks[name].prepare()

    @unmixed()
    def measure(self, names: Sequence[str]) -> Tensor:
        """[tasks, 2] float32: the norm of what this rank has of each task's gradients, and whether it may step (1 or 0)."""
        for name in names:
            self._prepare(name)
        self._each("measure", self._measure, names)
        return torch.stack([torch.stack([self.tasks[name].norm, self.tasks[name].fine.float()]) for name in names])

    def crosses(self, names: Sequence[str]) -> bool:
        """Whether gradients of some task are summed over stages: then all ranks exchange and measure in one order."""
        return any(encoding.stages for name in names for encoding in self.encoded.of(name))

    def exchange(self, names: Sequence[str]) -> None:
        """Gradients that each replica has of its own examples, each stage of what it reads, and each shard of its own features,
        become those of all.
        """
        if self.ranks is not None:
            self.ranks.sum_([gradient for name in names for gradient in self._accumulated(name)], "dp")
            # Of each only one stage has any: what the encoders' inputs come to has the bits of one process.
            self.ranks.sum_([gradient for name in names for _, gradient in self._spread(name)], "pp")
            self.ranks.sum_([gradient for name in names for gradient in self._partial(name)], "beside")

    def _accumulated(self, name: str) -> list[Tensor]:
        """Where backwards add to gradients of a task."""
        tables = [table for table in self._tables_of(name) if table in self.grads]
        return [self.grads[table][self.tables[table].rows.index(name)] for table in tables]

    def _partial(self, name: str) -> list[Tensor]:
        """Those that are sums over what each shard adds."""
        tables = [table for table in self._tables_of(name) if self.tables[table].partial]
        return [self.grads[table][self.tables[table].rows.index(name)] for table in tables]

    def _spread(self, name: str) -> list[tuple[int, Tensor]]:
        """Those of what an encoder fills for several stages, each with the stage that reads it."""
        spread = [encoding for encoding in self.encoded.of(name) if encoding.stages]
        places = [pair for own in spread for pair in zip(own.stages, own.outputs, strict=True)]
        return [(stage, self._rows(self.grads, place)) for stage, place in places if place.table in self.grads]

    def open(self, names: Sequence[str]) -> None:
        """Before new gradients are added to those that wait for a step: these are of all ranks already, and count once."""
        if self.ranks is None:
            return
        for name in names:
            summed = self._accumulated(name) if self.ranks.replica else self._partial(name) if self.ranks.shard else []
            summed += [gradient for stage, gradient in self._spread(name) if stage != self.ranks.stage]
            if summed:
                torch._foreach_zero_(summed)

    def _agree(self, names: Sequence[str], found: Tensor) -> None:
        """Norms of the tasks' gradients over all stages, and whether every stage may step. found: [ranks, tasks, 2]."""
        norms, fine = torch.linalg.vector_norm(found[..., 0], dim=0), found[..., 1].amin(0) > 0
        for index, name in enumerate(names):
            task = self.tasks[name]
            task.norm.copy_(norms[index])
            # Every rank has the losses, which it may have learned of since it measured.
            task.listen()
            task.fine.copy_(fine[index] & task.sound)

    def _each(self, what: str, work: Callable[[str], None], names: Sequence[str]) -> None:
        """Work of the device alone, of every task.

        Hundreds of small tensors keep the host busy far longer than the device, and none of them fills it. So from a task's second
        step on, when its moments are there, the work is recorded, and tasks' records run side by side. Those with encoders are
        called: what an encoder keeps from run to run is none of the device's alone.
        """
        launches, places = [], {name: place for place, name in enumerate(self.tasks)}
        for name in names:
            task = self.tasks[name]
            if task.stepped_with is not task.optimizer.state:
                task.launches.clear()
            if not self.recorders or name in self.taken_back or task.stepped_with is not task.optimizer.state:
                work(name)
                continue
            if what not in task.launches:
                recorder = self.recorders[places[name] % len(self.recorders)]
                task.launches[what] = recorder, recorder.record(partial(_given, work, name), {})
            launches.append(task.launches[what])
        together(launches)

    def _stepped(self, name: str) -> Tensor:
        task = self.tasks[name]
        task.stepped_with = task.optimizer.state
        task.unread.append((task.steps, task.examples, task.alive.clone(), _event(self.device)))
        task.steps += 1
        task.examples += task.pending or 0
        task.pending = None
        task.losses.clear()
        return task.norm.clone()

    def _measure(self, name: str) -> None:
        """The norm of a task's gradients here, and whether a step with them is fine as far as is known beforehand."""
        task = self.tasks[name]
        own = [grad for key, grad in zip(task.keys, task.gradients, strict=True) if self._counts(name, key)]
        task.norm.copy_(torch.nn.utils.get_total_norm(own, foreach=True) if own else torch.zeros_like(task.norm))
        fine = task.alive & task.sound & torch.isfinite(task.norm)
        if task.rows:
            clip = task.training.max_grad_norm
            left = task.norm if clip is None else task.norm.clamp(max=clip)
            fine = fine & (task.reach(left) < self._largest(name))
        task.fine.copy_(fine)

    def _counts(self, name: str, key: str) -> bool:
        """Whether a tensor is counted on this rank: what several shards or stages have counts once."""
        if self.ranks is None:
            return True
        stages = () if (name, key) in self.params else self.encoded.owner(name, key).stages
        return self.ranks.stage in (stages[:1] or (self.ranks.stage,)) and (
            self.ranks.shard == 0 or self._shard(name, key) is not None
        )

    def _update(self, name: str) -> None:
        """What the device does of a step: from the gradients to the copies that regions read, and cleared gradients."""
        task, clip = self.tasks[name], self.tasks[name].training.max_grad_norm
        if self.ranks is None:
            self._measure(name)
        finite = task.fine.clone()
        if clip is not None and task.views:
            torch.nn.utils.clip_grads_with_norm_(task.views, clip, task.norm, foreach=True)
        # The contract of torch.amp.GradScaler with fused optimizers: with found_inf = 1 nothing is written.
        task.optimizer.found_inf = (~finite).to(torch.float32)
        task.optimizer.grad_scale = None
        if name in self.taken_back:
            finite = self._step_and_encode(name, finite)
        elif task.views:
            task.optimizer.step()
        task.alive.copy_(finite)
        self._refresh(name)
        self._zero(name)

    def _step_and_encode(self, name: str, finite: Tensor) -> Tensor:
        """The optimizer's step, then the places' new rows; where these do not fit what regions read, all of it is taken back.

        An encoder's results have no bound that is known beforehand, so they are looked at. [] bool: the step was taken.
        """
        task = self.tasks[name]
        held = dict(task.optimized())
        before = {}
        if held:
            before = dict(zip(held, torch._foreach_mul(list(held.values()), 1.0), strict=True))  # copies, in few launches
            task.optimizer.step()
        filled = [
            (place, rows)
            for encoding in self.encoded.of(name)
            for place, rows in zip(encoding.outputs, self.encoded.encode(encoding), strict=True)
        ]
        judged: dict[str, list[Tensor]] = {"float32": task.views[task.rows :]}
        for place, rows in filled:
            judged.setdefault(self.tables[place.table].dtype, []).append(rows)
        for dtype, values in ((dtype, values) for dtype, values in judged.items() if values):
            largest = torch.nn.utils.get_total_norm(values, math.inf, foreach=True)
            finite = finite & (largest <= torch.finfo(getattr(torch, dtype)).max)
        if self.ranks is not None:
            finite = self.ranks.gather(finite.float(), "model").amin() > 0
        after = dict(task.optimized())
        # A first step makes the moments; taken back, they are zeros.
        old = [before[where] if where in before else torch.zeros_like(value) for where, value in after.items()]
        choose(finite, list(after.values()), old, list(after.values()))
        masters = [self._rows(self.masters, place) for place, _ in filled]
        choose(finite, [rows for _, rows in filled], masters, masters)
        return finite

    def _largest(self, name: str) -> float:
        """The largest value of the dtype that regions read the task's tables in."""
        read = [self.tables[param.table] for param in self._params_of(name)]
        return min(torch.finfo(getattr(torch, table.dtype)).max for table in read if table.trainable)

    def _refresh(self, name: str) -> None:
        tables = [table for table in self._tables_of(name) if self.copies[table] is not self.masters[table]]
        rows = [self.tables[table].rows.index(name) for table in tables]
        masters, copies = (
            [where[table][row] for table, row in zip(tables, rows, strict=True)] for where in (self.masters, self.copies)
        )
        if copies:
            torch._foreach_copy_(copies, masters)

    def poll(self, names: Iterable[str], *, wait: bool) -> dict[str, str]:
        """Read the outcome of past steps; quarantine the tasks whose step was refused. All ranks call it, and find the same.

        Without `wait` only what is ready: in one process, by its device; of several ranks, whose devices may be further on or less,
        all steps of a task but its last ones (`_AHEAD`), which are waited for.
        """
        for name in names:
            task = self.tasks[name]
            while task.unread and (wait or self._known(task)):
                step, examples, finite, _ = task.unread.pop(0)
                if not bool(finite):
                    task.quarantined = _refused(step)
                    task.steps, task.examples = step, examples
                    self.encoded.forget(name)
                    task.unread.clear()
        return {name: reason for name in names if (reason := self.tasks[name].quarantined) is not None}

    def _known(self, task: TaskState) -> bool:
        event = task.unread[0][-1]
        return event is None or (event.query() if self.ranks is None else len(task.unread) > _AHEAD)

    def outcomes(self, names: Iterable[str]) -> dict[str, str]:
        """Tasks in quarantine, and those that will be by steps that were launched; waits for these. One rank alone may ask."""
        if self.ranks is None:
            return self.poll(names, wait=True)
        found = {}
        for name in names:
            refused = (_refused(step) for step, _, finite, _ in self.tasks[name].unread if not bool(finite))
            if (reason := self.tasks[name].quarantined or next(refused, None)) is not None:
                found[name] = reason
        return found


def _refused(step: int) -> str:
    return f"step {step}: loss, gradient or update is not finite; the step was not taken"


def _given(work: Callable[[str], None], name: str, values: Values) -> None:
    work(name)


def _event(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
