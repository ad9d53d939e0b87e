"""An adapted linear as a benchmark sees it, and what people run today for many LoRA adapters on one frozen linear.

`Case` and `Problem` are the shapes and the tensors, `Contender` is what benchmarks/linear.py runs, `Frozen` its baseline. Each
peer is given the best form of its own recipe (kept buffers, scale taken on the narrow side, sums in place), so that a ratio says
something about the recipe and not about how it was typed. `Eager` alone is left as PEFT and autograd run it.

The sites of a case read one x [T, K]. Forward and backward run under no_grad and can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # rows: tokens are shared out among adapters in whole blocks

Ranges = list[tuple[int, int]]
Gradients = tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]  # dx, dA[site][adapter], dB[site][adapter]


@dataclass(frozen=True)
class Case:
    """One group of linears [features -> outs] in one step.

    Adapters beyond the number of blocks take turns: only `active` of them have tokens in a step, and only those are in it.
    """

    group: str
    features: int
    outs: tuple[int, ...]
    tokens: int
    adapters: int
    rank: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens < BLOCK or self.tokens % BLOCK or self.adapters < 1:
            raise ValueError(
                f"{self.group}: {self.tokens} tokens are not whole blocks of {BLOCK}, or {self.adapters} adapters too few"
            )

    @property
    def active(self) -> int:
        return min(self.adapters, self.tokens // BLOCK)

    @property
    def ranges(self) -> Ranges:
        """First row and end of each active adapter."""
        cuts = [slot * (self.tokens // BLOCK) // self.active * BLOCK for slot in range(self.active + 1)]
        return list(itertools.pairwise(cuts))

    @property
    def scaling(self) -> float:
        """alpha / rank with alpha = 2 rank."""
        return 2.0

    def __str__(self) -> str:
        outs = ",".join(map(str, self.outs))
        adapters = str(self.adapters) if self.active == self.adapters else f"{self.adapters} ({self.active} a step)"
        return f"{self.group} {self.features}->{outs} T {self.tokens} adapters {adapters} r {self.rank} dropout {self.dropout:g}"


@dataclass(frozen=True)
class Problem:
    """The tensors of one case in bf16; T tokens, K features, N_i outs, S active adapters, R rank.

    Args:
        x: [T, K].
        weights: for each site [N_i, K].
        A, B: for each site and adapter [R, K] and [N_i, R]; B is not zero, or dA would be.
        dys: for each site [T, N_i].
    """

    case: Case
    x: Tensor
    weights: list[Tensor]
    A: list[list[Tensor]]
    B: list[list[Tensor]]
    dys: list[Tensor]

    @classmethod
    def draw(cls, case: Case, device: str, seed: int) -> Problem:
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(std)

        k, slots = case.features, case.active
        # The adapter's share of y is then about 0.1 sqrt(r) against 0.02 sqrt(K): one adapter's rows done wrong cannot hide.
        return cls(
            case=case,
            x=normal(case.tokens, k),
            weights=[normal(n, k, std=0.02) for n in case.outs],
            A=[list(normal(slots, case.rank, k, std=k**-0.5).unbind(0)) for _ in case.outs],
            B=[list(normal(slots, n, case.rank, std=0.05).unbind(0)) for n in case.outs],
            dys=[normal(case.tokens, n) for n in case.outs],
        )


class Contender(Protocol):
    """One way to run a case. Everything is launched on the current stream and can be captured in a CUDA graph.

    May also have `adapted = False` (the backbone alone: dx is a list, one for each linear) and class methods:
    `unsupported(case, device)` says why it cannot run a case, or None; `compile(case)` compiles a case's kernels.
    """

    name: ClassVar[str]

    def __init__(self, problem: Problem) -> None: ...

    @property
    def masks(self) -> list[Tensor] | None:
        """For each site the elements [T, K] kept by the last forward's dropout; None without dropout."""
        ...

    def forward(self) -> list[Tensor]: ...

    def backward(self) -> Gradients: ...


def dropped(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """x with elements dropped and the rest scaled up, and the mask [T, K] of those kept; x itself without dropout."""
    if probability == 0:
        return x, None
    kept, mask = torch.native_dropout(x, probability, True)
    return kept, mask


def undropped(grad: Tensor, mask: Tensor, probability: float) -> Tensor:
    """The gradient of dropout's input."""
    return torch.ops.aten.native_dropout_backward(grad, mask, 1 / (1 - probability))


class Peer:
    """Keeps the problem and the outputs' buffers."""

    name: ClassVar[str]
    adapted: ClassVar[bool] = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sites = range(len(problem.weights))
        self.ys = [torch.empty_like(dy) for dy in problem.dys]
        self.drawn: list[Tensor | None] = [None for _ in self.sites]

    @classmethod
    def unsupported(cls, case: Case, device: str) -> str | None:
        """Why this contender cannot run the case; None if it can."""
        return None

    @property
    def masks(self) -> list[Tensor] | None:
        """For each site the elements [T, K] kept by the last forward."""
        found = [mask for mask in self.drawn if mask is not None]
        return found or None


class Frozen(Peer):
    """The backbone alone: one GEMM forward and one for dx of each linear, nothing summed. Overheads are relative to this."""

    name = "frozen"
    adapted = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.dxs = [torch.empty_like(problem.x) for _ in self.sites]

    def forward(self) -> list[Tensor]:
        for y, weight in zip(self.ys, self.problem.weights, strict=True):
            torch.mm(self.problem.x, weight.t(), out=y)
        return self.ys

    def backward(self) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
        """dx of each linear; there are no adapters."""
        for dx, dy, weight in zip(self.dxs, self.problem.dys, self.problem.weights, strict=True):
            torch.mm(dy, weight, out=dx)
        return self.dxs, [], []


class Addmm(Peer):
    """The frozen GEMMs, and each adapter's products added in place to its rows by cuBLAS."""

    name = "addmm"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.dx = torch.empty_like(problem.x)
        # Scaled x A^T and scaled dy B, [T, R] for each site; dropout's gradient passes through its own [T, K].
        self.narrow = [problem.x.new_empty(problem.case.tokens, problem.case.rank) for _ in self.sites]
        self.dnarrow = [torch.empty_like(narrow) for narrow in self.narrow]
        self.dA = [[torch.empty_like(a) for a in site] for site in problem.A]
        self.dB = [[torch.empty_like(b) for b in site] for site in problem.B]
        self.through = torch.empty_like(problem.x) if problem.case.dropout else None
        self.inputs: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        problem, case = self.problem, self.problem.case
        self.inputs = []
        for site, (y, weight) in enumerate(zip(self.ys, problem.weights, strict=True)):
            torch.mm(problem.x, weight.t(), out=y)
            x, self.drawn[site] = dropped(problem.x, case.dropout)
            self.inputs.append(x)
            for slot, (start, end) in enumerate(case.ranges):
                narrow = self.narrow[site][start:end]
                narrow.addmm_(x[start:end], problem.A[site][slot].t(), beta=0, alpha=case.scaling)
                y[start:end].addmm_(narrow, problem.B[site][slot].t())
        return self.ys

    def backward(self) -> Gradients:
        problem, case = self.problem, self.problem.case
        for site, (dy, weight) in enumerate(zip(problem.dys, problem.weights, strict=True)):
            if site == 0:
                torch.mm(dy, weight, out=self.dx)
            else:
                self.dx.addmm_(dy, weight)
            for slot, (start, end) in enumerate(case.ranges):
                dnarrow = self.dnarrow[site][start:end]
                dnarrow.addmm_(dy[start:end], problem.B[site][slot], beta=0, alpha=case.scaling)
                torch.mm(dnarrow.t(), self.inputs[site][start:end], out=self.dA[site][slot])
                torch.mm(dy[start:end].t(), self.narrow[site][start:end], out=self.dB[site][slot])
                if self.through is None:
                    self.dx[start:end].addmm_(dnarrow, problem.A[site][slot])
                else:
                    torch.mm(dnarrow, problem.A[site][slot], out=self.through[start:end])
            mask = self.drawn[site]
            if self.through is not None and mask is not None:
                self.dx.add_(undropped(self.through, mask, case.dropout))
        return self.dx, self.dA, self.dB


class GroupedMM(Peer):
    """torch's grouped GEMM over stacked adapters: base GEMM, two grouped GEMMs, scale, add; backward with its 2d-2d form.

    The recipe of prime-rl and of the `grouped_mm` LoRA trainers, whose A and B are stacked once and not at every step, and whose
    scale is taken on [T, R].
    """

    name = "grouped_mm"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        device = problem.x.device
        self.dx = torch.empty_like(problem.x)
        self.offsets = torch.tensor([end for _, end in problem.case.ranges], dtype=torch.int32, device=device)
        # TMA wants strides of 16 bytes: the rank is padded with zeros to a multiple of 8.
        pad = -problem.case.rank % 8
        self.A = [F.pad(torch.stack(site), (0, 0, 0, pad)) for site in problem.A]  # [S, R, K]
        self.B = [F.pad(torch.stack(site), (0, pad)) for site in problem.B]  # [S, N, R]
        self.narrow: list[Tensor] = []
        self.inputs: list[Tensor] = []

    @classmethod
    def unsupported(cls, case: Case, device: str) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
        if any(size % 8 for size in (case.features, *case.outs)):
            return "grouped_mm wants sizes that are multiples of 8"
        if device == "cpu":
            narrow, stack = torch.ones(16, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
            offsets = torch.tensor([8, 16], dtype=torch.int32)
            try:
                F.grouped_mm(narrow, stack, offs=offsets)
                F.grouped_mm(narrow.t(), narrow, offs=offsets)
            except (RuntimeError, NotImplementedError) as error:
                return f"no grouped_mm on this CPU: {str(error).splitlines()[0]}"
        return None

    def forward(self) -> list[Tensor]:
        problem, case = self.problem, self.problem.case
        self.inputs, self.narrow = [], []
        for site, (y, weight) in enumerate(zip(self.ys, problem.weights, strict=True)):
            torch.mm(problem.x, weight.t(), out=y)
            x, self.drawn[site] = dropped(problem.x, case.dropout)
            narrow = F.grouped_mm(x, self.A[site].transpose(1, 2), offs=self.offsets).mul_(case.scaling)
            y.add_(F.grouped_mm(narrow, self.B[site].transpose(1, 2), offs=self.offsets))
            self.inputs.append(x)
            self.narrow.append(narrow)
        return self.ys

    def backward(self) -> Gradients:
        problem, case = self.problem, self.problem.case
        dA: list[list[Tensor]] = []
        dB: list[list[Tensor]] = []
        for site, (dy, weight) in enumerate(zip(problem.dys, problem.weights, strict=True)):
            if site == 0:
                torch.mm(dy, weight, out=self.dx)
            else:
                self.dx.addmm_(dy, weight)
            dnarrow = F.grouped_mm(dy, self.B[site], offs=self.offsets).mul_(case.scaling)
            back = F.grouped_mm(dnarrow, self.A[site], offs=self.offsets)
            mask = self.drawn[site]
            self.dx.add_(back if mask is None else undropped(back, mask, case.dropout))
            # 2d-2d: the groups cut the summed dimension, [R, T] x [T, K] -> [S, R, K].
            dA.append(list(F.grouped_mm(dnarrow.t(), self.inputs[site], offs=self.offsets)[:, : case.rank].unbind(0)))
            dB.append(list(F.grouped_mm(dy.t(), self.narrow[site], offs=self.offsets)[:, :, : case.rank].unbind(0)))
        return self.dx, dA, dB


class Eager(Peer):
    """One task after another, `result + B(A(dropout(x))) * scaling` as PEFT writes it; backward op by op as autograd runs it."""

    name = "eager"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.dx = torch.empty_like(problem.x)
        # For each task and site: what the backward reads (dropped x, x A^T, mask).
        self.saved: list[list[tuple[Tensor, Tensor, Tensor | None]]] = []

    @property
    def masks(self) -> list[Tensor] | None:
        if not self.problem.case.dropout:
            return None
        found = [[mask for _, _, mask in task if mask is not None] for task in self.saved]
        return [torch.cat(site) for site in zip(*found, strict=True)]

    def forward(self) -> list[Tensor]:
        problem, case = self.problem, self.problem.case
        self.saved = []
        for slot, (start, end) in enumerate(case.ranges):
            self.saved.append([])
            for site, (y, weight) in enumerate(zip(self.ys, problem.weights, strict=True)):
                rows = problem.x[start:end]
                result = torch.mm(rows, weight.t())
                x, mask = dropped(rows, case.dropout)
                narrow = torch.mm(x, problem.A[site][slot].t())
                delta = torch.mm(narrow, problem.B[site][slot].t())
                torch.add(result, delta * case.scaling, out=y[start:end])
                self.saved[-1].append((x, narrow, mask))
        return self.ys

    def backward(self) -> Gradients:
        problem, case = self.problem, self.problem.case
        dA: list[list[Tensor]] = [[] for _ in self.sites]
        dB: list[list[Tensor]] = [[] for _ in self.sites]
        for slot, (start, end) in enumerate(case.ranges):
            dx = self.dx[start:end]
            for site, (x, narrow, mask) in enumerate(self.saved[slot]):
                dy = problem.dys[site][start:end]
                ddelta = dy * case.scaling
                dB[site].append(torch.mm(ddelta.t(), narrow))
                dnarrow = torch.mm(ddelta, problem.B[site][slot])
                dA[site].append(torch.mm(dnarrow.t(), x))
                back = torch.mm(dnarrow, problem.A[site][slot])
                if mask is not None:
                    back = undropped(back, mask, case.dropout)
                base = torch.mm(dy, problem.weights[site])
                if site == 0:
                    torch.add(base, back, out=dx)
                else:
                    dx.add_(base).add_(back)
        return self.dx, dA, dB


PEERS: dict[str, type[Contender]] = {kind.name: kind for kind in (Frozen, Addmm, GroupedMM, Eager)}
