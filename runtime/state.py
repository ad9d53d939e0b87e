"""State: adapter tables, gradients and optimizers, all bound to tasks by name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.tables import Param, Table, routes_of


@dataclass(frozen=True, slots=True)
class Training:
    """How one task is trained: the numbers of its Task, and what its adapter asks of a chunk.

    `dropout`: the probability; `virtual_tokens`: rows before each sequence, whose embeddings are learned; `position_offset`: what
    the position ids of a sequence begin with.
    """

    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    max_grad_norm: float | None = None
    seed: int = 0
    dropout: float = 0.0
    virtual_tokens: int = 0
    position_offset: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (0 is the first), by the formulas of transformers' schedules of these names."""
        if step < self.warmup_steps:
            return self.learning_rate * step / max(1, self.warmup_steps)
        if self.lr_schedule == "constant":
            return self.learning_rate
        assert self.total_steps is not None
        span = max(1, self.total_steps - self.warmup_steps)
        if self.lr_schedule == "linear":
            return self.learning_rate * max(0.0, (self.total_steps - step) / span)
        progress = (step - self.warmup_steps) / span
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


@dataclass(slots=True)
class TaskState:
    """One task in training. `steps`: optimizer steps taken; `examples`: examples of those steps; `draws`: forward_backward calls,
    each with dropout masks of its own; `quarantined`: why it was stopped, or None; `pending`: examples whose gradients wait for
    the step (None: no forward_backward since the last)."""

    training: Training
    keys: tuple[str, ...]
    views: list[Tensor]
    gradients: list[Tensor]
    optimizer: torch.optim.Optimizer
    # [] bool on the device: no step was refused so far. A refusal is final, or steps after it would count twice.
    alive: Tensor
    steps: int = 0
    examples: int = 0
    draws: int = 0
    quarantined: str | None = None
    pending: int | None = None
    # Losses of the accumulated forward_backward calls, on the device: what containment looks at.
    losses: list[Tensor] = field(default_factory=list)
    # (step, examples before it, "was finite" on the device) of steps whose outcome the host has not read yet.
    unread: list[tuple[int, int, Tensor, Any]] = field(default_factory=list)


class State:
    """Slot tables with their gradients, and every task's optimizer over its own rows.

    Masters and gradients are float32; `copies` are what regions read, in the compute dtype (the masters themselves in float32).
    """

    def __init__(
        self, tables: Mapping[str, Table], params: Iterable[Param], training: Mapping[str, Training], device: torch.device
    ) -> None:
        self.tables = dict(tables)
        self.params = {(param.task, param.key): param for param in params}
        self.device = device
        self.masters = {name: self._fresh(table) for name, table in self.tables.items()}
        self.copies = {name: self.masters[name].to(getattr(torch, table.dtype)) for name, table in self.tables.items()}
        self.grads = {name: torch.zeros_like(self.masters[name]) for name, table in self.tables.items() if table.trainable}
        self.tasks: dict[str, TaskState] = {}
        for name, settings in training.items():
            self.admit(name, settings)

    def _fresh(self, table: Table) -> Tensor:
        if table.trainable:
            return torch.zeros(table.shape, dtype=torch.float32, device=self.device)
        return torch.tensor(table.values, dtype=torch.float32, device=self.device)

    @property
    def routes(self) -> dict[str, tuple[str, ...]]:
        return routes_of(self.tables)

    def drops(self, route: str, *, train: bool) -> list[list[int]]:
        """For each slot of a route its task's dropout key in two halves, and p * 2^32, as int32; zeros outside training."""
        found = []
        for name in self.routes[route]:
            task = self.tasks.get(name)
            if task is None or not train:
                found.append([0, 0, 0])
                continue
            numbers = task.training
            digest = hashlib.sha256(f"{numbers.seed}\0{name}\0dropout\0{task.draws}".encode()).digest()
            low, high = (int.from_bytes(digest[start : start + 4], "little", signed=True) for start in (0, 4))
            threshold = min(round(numbers.dropout * 2**32), 2**32 - 1)
            found.append([low, high, threshold - 2**32 if threshold >= 2**31 else threshold])
        return found

    # --- tasks ---

    def admit(self, name: str, training: Training) -> None:
        """Bind a task to its rows, with PEFT's fresh weights drawn from (seed, name, key) alone."""
        params = self._params_of(name)
        for param in params:
            self.write(name, param.key, _draw(param, self.shape(name, param.key), training.seed))
        self._bind(name, params, training)

    def _params_of(self, name: str) -> list[Param]:
        params = [param for (task, _), param in self.params.items() if task == name]
        assert params, f"task {name!r} has no parameters"
        return params

    def _bind(self, name: str, params: Sequence[Param], training: Training) -> None:
        views = [self._rows(self.masters, param) for param in params]
        gradients = [self._rows(self.grads, param) for param in params]
        for view, gradient in zip(views, gradients, strict=True):
            view.grad = gradient
        alive = torch.tensor(True, device=self.device)
        self.tasks[name] = TaskState(
            training, tuple(param.key for param in params), views, gradients, _optimizer(views, training), alive
        )

    def expel(self, name: str) -> None:
        """Forget a task; its slots become zeros, free for another."""
        for table in self._tables_of(name):
            row = self.tables[table].rows.index(name)
            self.masters[table][row] = 0
            self.copies[table][row] = 0
            if table in self.grads:
                self.grads[table][row] = 0
            self.tables[table] = self.tables[table].with_row(row, "")
        self.params = {key: param for key, param in self.params.items() if key[0] != name}
        del self.tasks[name]

    def relayout(self, tables: Mapping[str, Table], params: Iterable[Param], newcomers: Mapping[str, Training]) -> None:
        """Move to other tables: tensors of unchanged tables stay in place, rows of others are copied, newcomers are admitted.

        Every task keeps its weights, gradients, optimizer state and counters.
        """
        held = {name: (self.masters[name], self.grads.get(name), table) for name, table in self.tables.items()}
        moved: set[str] = set()
        for name, table in tables.items():
            old = held.get(name)
            if old is not None and old[2].shape == table.shape:
                if not table.trainable:
                    self.masters[name].copy_(self._fresh(table))
                    self.copies[name].copy_(self.masters[name])
                continue
            moved.update(task for task in table.rows if task)
            self.masters[name] = self._fresh(table)
            if table.trainable:
                self.grads[name] = torch.zeros_like(self.masters[name])
                if old is not None and old[1] is not None:
                    for row, task in enumerate(table.rows):
                        if task in old[2].rows:
                            self.masters[name][row] = old[0][old[2].rows.index(task)]
                            self.grads[name][row] = old[1][old[2].rows.index(task)]
            self.copies[name] = self.masters[name].to(getattr(torch, table.dtype))
        for name in set(held) - set(tables):
            for where in (self.masters, self.copies, self.grads):
                where.pop(name, None)
        self.tables, self.params = dict(tables), {(param.task, param.key): param for param in params}
        for name in [name for name in self.tasks if name in moved]:
            before = self.tasks[name]
            optimizer = before.optimizer.state_dict()
            self._bind(name, self._params_of(name), before.training)
            after = self.tasks[name]
            after.optimizer.load_state_dict(optimizer)
            for kept in ("alive", "steps", "examples", "draws", "quarantined", "pending", "losses", "unread"):
                setattr(after, kept, getattr(before, kept))
        for name, training in newcomers.items():
            self.admit(name, training)

    def _tables_of(self, name: str) -> list[str]:
        return [key for key, table in self.tables.items() if name in table.rows]

    # --- tensors by PEFT key ---

    def _rows(self, where: Mapping[str, Tensor], param: Param) -> Tensor:
        return where[param.table][param.row, param.start : param.stop]

    def shape(self, task: str, key: str) -> tuple[int, ...]:
        param = self.params[task, key]
        rows, features = param.stop - param.start, self.tables[param.table].shape[2]
        if param.flat:
            return (features,)
        return (features, rows) if param.transposed else (rows, features)

    def read(self, task: str, key: str, *, gradient: bool = False) -> Tensor:
        """A float32 copy of one PEFT tensor (or of its gradient), in PEFT's shape, on the CPU."""
        param = self.params[task, key]
        rows = self._rows(self.grads if gradient else self.masters, param)
        rows = rows.T if param.transposed else rows[0] if param.flat else rows
        return rows.detach().to("cpu", copy=True).contiguous()

    def write(self, task: str, key: str, value: Tensor) -> None:
        param = self.params[task, key]
        value = value.T if param.transposed else value
        self._rows(self.masters, param).copy_(value)
        self._rows(self.copies, param).copy_(value)

    # --- training ---

    def clear_gradients(self, name: str) -> None:
        for table in self._tables_of(name):
            if table in self.grads:
                self.grads[table][self.tables[table].rows.index(name)] = 0
        task = self.tasks[name]
        task.pending = None
        task.losses.clear()

    def step(self, name: str) -> Tensor:
        """One optimizer step of one task over its accumulated gradients; returns their 2-norm before clipping, on the device.

        The step is not taken if the loss, the gradient or the update is not finite. That is decided on the device; the host
        learns of it in `poll`.
        """
        task = self.tasks[name]
        norm = torch.nn.utils.get_total_norm(task.gradients, foreach=True)
        finite = task.alive & torch.isfinite(norm)
        for loss in task.losses:
            finite = finite & torch.isfinite(loss)
        clip = task.training.max_grad_norm
        left = norm if clip is None else norm.clamp(max=clip)
        finite = finite & (self._reach(name, left) < self._largest(name))
        task.alive = finite
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(task.views, clip, norm, foreach=True)
        # The contract of torch.amp.GradScaler with fused optimizers: with found_inf = 1 nothing is written.
        task.optimizer.found_inf = (~finite).to(torch.float32)
        task.optimizer.grad_scale = None
        for group in task.optimizer.param_groups:
            group["lr"] = task.training.rate(task.steps)
        task.optimizer.step()
        self._refresh(name)
        task.unread.append((task.steps, task.examples, finite, _event(self.device)))
        task.steps += 1
        task.examples += task.pending or 0
        self.clear_gradients(name)
        return norm

    def _reach(self, name: str, norm: Tensor) -> Tensor:
        """An upper bound of the weights' 2-norm after the step, on the device; not finite if the step might overflow."""
        task, numbers = self.tasks[name], self.tasks[name].training
        rate = numbers.rate(task.steps)
        weights = torch.nn.utils.get_total_norm(task.views, foreach=True)
        if numbers.optimizer == "sgd":
            buffers = [
                state["momentum_buffer"] for state in task.optimizer.state.values() if state.get("momentum_buffer") is not None
            ]
            if buffers:
                norm = norm + numbers.momentum * torch.nn.utils.get_total_norm(buffers, foreach=True)
            moved = norm * rate
        else:
            # An element moves by at most rate * |m / sqrt(v)|, which is (1 - beta1) / sqrt(1 - beta2) where a gradient comes up
            # after long silence (3.2 for the default betas) and near 1 otherwise.
            jump = max(1.0, (1 - numbers.betas[0]) / math.sqrt(1 - numbers.betas[1]))
            moved = norm * 0 + rate * jump * math.sqrt(sum(view.numel() for view in task.views))
        return weights * (1 + rate * numbers.weight_decay) + moved

    def _largest(self, name: str) -> float:
        """The largest value of the dtype that regions read the task's tables in."""
        return min(torch.finfo(getattr(torch, self.tables[table].dtype)).max for table in self._tables_of(name))

    def _refresh(self, name: str) -> None:
        for table in self._tables_of(name):
            if self.copies[table] is not self.masters[table]:
                row = self.tables[table].rows.index(name)
                self.copies[table][row].copy_(self.masters[table][row])

    def poll(self, names: Iterable[str], *, wait: bool) -> dict[str, str]:
        """Read the outcome of past steps; quarantine the tasks whose step was refused. Without `wait` only what is ready."""
        for name in names:
            task = self.tasks[name]
            while task.unread:
                step, examples, finite, event = task.unread[0]
                if not (wait or event is None or event.query()):
                    break
                task.unread.pop(0)
                if not bool(finite):
                    task.quarantined = f"step {step}: loss, gradient or update is not finite; the step was not taken"
                    task.steps, task.examples = step, examples
                    task.unread.clear()
        return {name: reason for name in names if (reason := self.tasks[name].quarantined) is not None}


def _event(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _optimizer(views: Sequence[Tensor], training: Training) -> torch.optim.Optimizer:
    # The fused forms honour found_inf on the device, so that a refused step needs no synchronisation.
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            views, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        views, lr=training.learning_rate, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay, fused=True
    )


def _draw(param: Param, shape: tuple[int, ...], seed: int) -> Tensor:
    """A fresh tensor in PEFT's shape, on the CPU; the global generator is neither read nor moved."""
    value = torch.full(shape, param.fill)
    if param.bound or param.std:
        own = generator(seed, param.task, param.key)
        value = (
            value.uniform_(-param.bound, param.bound, generator=own) if param.bound else value.normal_(0, param.std, generator=own)
        )
    return value


def generator(seed: int, task: str, key: str) -> torch.Generator:
    """The random numbers of one tensor of a task, by these names alone."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
