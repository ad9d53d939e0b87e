"""Training: how one task is trained, and where it stands."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.cudagraph import Launch, Recorder


@dataclass(frozen=True, slots=True)
class Training:
    """How one task is trained: the numbers of its Task, and what its adapter asks of a chunk.

    `fast`: the keys whose learning rate is multiplied by `loraplus_lr_ratio`; `undecayed`: those that no weight decay holds for;
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
    loraplus_lr_ratio: float | None = None
    fast: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    dropout: float = 0.0
    virtual_tokens: int = 0
    position_offset: int = 0

    def ratio(self, key: str) -> float:
        """What the learning rate is multiplied by for a key."""
        return self.loraplus_lr_ratio if self.loraplus_lr_ratio is not None and key in self.fast else 1.0

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
    """One task in training.

    Args:
        keys, views, gradients: what its optimizer trains: first `rows` rows of tables, then inputs of encodings.
        kept: keys that are not trained.
        steps: optimizer steps taken.
        examples: examples of those steps.
        draws: forward_backward calls, each with dropout masks of its own.
        quarantined: why it was stopped, or None.
        pending: examples whose gradients wait for the step (None: no forward_backward since the last).
    """

    training: Training
    keys: tuple[str, ...]
    kept: tuple[str, ...]
    rows: int
    views: list[Tensor]
    gradients: list[Tensor]
    optimizer: torch.optim.Optimizer
    # On the device, each one tensor that is written in place, since a record of a step reads it there. [] bool: no step was refused
    # so far (a refusal is final, or steps after it would count twice); [] bool: the losses are finite that the next step follows
    # from; [] bool: by these and the gradients the next step may be taken; [] float32: the fastest of its learning rates, and the
    # gradients' 2-norm.
    alive: Tensor
    sound: Tensor
    fine: Tensor
    rate: Tensor
    norm: Tensor
    steps: int = 0
    examples: int = 0
    draws: int = 0
    quarantined: str | None = None
    pending: int | None = None
    # Losses of the accumulated forward_backward calls, on the device: what containment looks at.
    losses: list[Tensor] = field(default_factory=list)
    # (step, examples before it, "was finite" on the device) of steps whose outcome the host has not read yet.
    unread: list[tuple[int, int, Tensor, Any]] = field(default_factory=list)
    # The optimizer's `state` when it stepped last, and by name the launch of work that was recorded with it, with its recorder.
    stepped_with: Any = None
    launches: dict[str, tuple[Recorder, Launch]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write what the next step reads beside weights, gradients and moments."""
        base = self.training.rate(self.steps)
        self.rate.fill_(base * max(group["ratio"] for group in self.optimizer.param_groups))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * group["ratio"])
            else:
                group["lr"] = base * group["ratio"]
        self.listen()

    def listen(self) -> None:
        """Take note whether the losses so far are finite."""
        self.sound.copy_(torch.stack([torch.isfinite(loss) for loss in self.losses]).all() if self.losses else self.alive)

    def reach(self, norm: Tensor) -> Tensor:
        """An upper bound of the table rows' 2-norm after a step, on the device; not finite if the step might overflow.

        Args:
            norm: 2-norm of the gradients that the step is taken with.
        """
        numbers, views = self.training, self.views[: self.rows]
        # The fastest of the keys decides: it bounds them all.
        rate = self.rate
        weights = torch.nn.utils.get_total_norm(views, foreach=True)
        if numbers.optimizer == "sgd":
            states = [self.optimizer.state[view] for view in views if view in self.optimizer.state]
            buffers = [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]
            if buffers:
                norm = norm + numbers.momentum * torch.nn.utils.get_total_norm(buffers, foreach=True)
            moved = norm * rate
        else:
            # An element moves by at most rate * |m / sqrt(v)|, which is (1 - beta1) / sqrt(1 - beta2) where a gradient comes up
            # after long silence (3.2 for the default betas) and near 1 otherwise.
            jump = max(1.0, (1 - numbers.betas[0]) / math.sqrt(1 - numbers.betas[1]))
            moved = norm * 0 + rate * jump * math.sqrt(sum(view.numel() for view in views))
        return weights * (1 + rate * numbers.weight_decay) + moved

    def optimized(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """What the optimizer writes: each view ("") and the tensors of its state, by the view's index."""
        for index, view in enumerate(self.views):
            yield (index, ""), view
            for name, value in self.optimizer.state.get(view, {}).items():
                if isinstance(value, Tensor):
                    yield (index, name), value


def flags(device: torch.device) -> dict[str, Tensor]:
    """`alive`, `sound`, `fine`, `rate` and `norm` of a task that has not stepped."""
    found = {name: torch.tensor(True, device=device) for name in ("alive", "sound", "fine")}
    return found | {name: torch.zeros((), dtype=torch.float32, device=device) for name in ("rate", "norm")}


def optimizer(views: Mapping[str, Tensor], training: Training, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a task's tensors by key. Keys of one ratio and weight decay are a group, which knows its `ratio`.

    On a GPU learning rates are tensors: a recorded step reads them there.
    """
    records = device.type == "cuda"
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for key, view in views.items():
        decay = 0.0 if key in training.undecayed else training.weight_decay
        groups.setdefault((training.ratio(key), decay), []).append(view)
    rate = training.learning_rate
    rates = {key: torch.tensor(rate * key[0], dtype=torch.float32, device=device) if records else rate * key[0] for key in groups}
    if not groups:  # all that the task trains lies on other ranks
        groups, rates = {(1.0, 0.0): [torch.zeros(0, dtype=torch.float32, device=device)]}, {(1.0, 0.0): rate}
    rows = [
        {"params": own, "lr": rates[ratio, decay], "weight_decay": decay, "ratio": ratio} for (ratio, decay), own in groups.items()
    ]
    # The fused forms honour found_inf on the device, so that a refused step needs no synchronisation.
    if training.optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(rows, lr=rate, momentum=training.momentum, fused=True)
    else:
        made = torch.optim.AdamW(rows, lr=rate, betas=training.betas, eps=training.eps, fused=True, capturable=records)
    forget(made)
    return made


def forget(own: torch.optim.Optimizer) -> None:
    """Put an optimizer's state back to that of a task which has not stepped.

    SGD's first step would make its momentum without a value and, if it is refused, leave it so. Momentum that is zero comes to the
    same: the first step then holds 0 * momentum + gradient.
    """
    own.state = defaultdict(dict)
    for group in own.param_groups:
        for view in group["params"] if group.get("momentum") else ():
            own.state[view]["momentum_buffer"] = torch.zeros_like(view)


def generator(seed: int, task: str, key: str) -> torch.Generator:
    """A generator of (seed, task, key) alone, on the CPU; the global one is neither read nor moved."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(shape: tuple[int, ...], own: torch.Generator, *, bound: float, std: float, fill: float = 0.0) -> Tensor:
    """A fresh tensor in PEFT's shape, on the CPU: uniform in +-bound, normal with deviation std, or `fill` everywhere."""
    value = torch.full(shape, fill, dtype=torch.float32)
    if bound:
        return value.uniform_(-bound, bound, generator=own)
    return value.normal_(0, std, generator=own) if std else value
