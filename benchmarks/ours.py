"""This project's adapted linears as contenders of benchmarks/linear.py: each lowering, and the one that is chosen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import codegen.ops  # noqa: F401  (registers the operators)
from benchmarks.peers.linear_peers import BLOCK, Case, Gradients, Problem
from codegen import reference

_P32 = 4294967296.0


class Ours:
    """`mux::linears` with the lowering that `codegen.lower` chooses."""

    name: ClassVar[str] = "muxcompile"
    form: ClassVar[str] = ""

    def __init__(self, problem: Problem) -> None:
        case, device = problem.case, problem.x.device
        slots, sites = case.active, len(case.outs)
        self.problem = problem
        owner = [slot for slot, (start, stop) in enumerate(case.ranges) for _ in range(start, stop, BLOCK)]
        a = [torch.cat([torch.stack(own) for own in problem.A], 1)]  # [S, sites * R, K]
        b = [torch.stack(own).mT.contiguous() for own in problem.B]  # [S, R, N]
        scale = [torch.full((slots,), case.scaling, device=device) for _ in case.outs]
        route = [torch.tensor(owner, dtype=torch.int32, device=device)]
        drop, keys, counters, drops = [], [], [None, None], [0]
        if case.dropout:
            threshold = round(case.dropout * _P32)
            rows = [[slot, 77, threshold - (1 << 32 if threshold >= 1 << 31 else 0)] for slot in range(slots)]
            drop = [torch.tensor(rows, dtype=torch.int32, device=device)]
            keys = [torch.arange(sites, dtype=torch.int32, device=device)]
            positions = torch.arange(case.tokens, dtype=torch.int32, device=device)
            counters, drops = [torch.zeros_like(positions), positions], [1]
        self._tables = a, b
        self._rest = scale, route, drop, keys, *counters, list(range(sites)), drops
        self._grads = [torch.zeros(table.shape, device=device) for table in (*a, *b)]
        self._dx = torch.empty_like(problem.x)
        self._forms = f"y={','.join([self.form] * sites)} dx={self.form}" if self.form else ""
        self._narrow: Tensor | None = None

    @classmethod
    def unsupported(cls, case: Case, device: str) -> str | None:
        return None

    @property
    def masks(self) -> list[Tensor] | None:
        if not self.problem.case.dropout:
            return None
        _, route, drop, keys, sequences, positions, *_ = self._rest
        features = self.problem.case.features
        return [reference.dropout_factor(drop[0], key, route[0], sequences, positions, features) > 0 for key in keys[0]]

    def forward(self) -> list[Tensor]:
        weights = self.problem.weights
        *outputs, self._narrow = torch.ops.mux.linears(
            self.problem.x, weights, [None] * len(weights), *self._tables, *self._rest, self._forms
        )
        return outputs

    def backward(self) -> Gradients:
        # Gradients are added to what is there; a step begins from zero.
        torch._foreach_zero_(self._grads)
        torch.ops.mux.linears_backward_(
            self._grads, self._dx, self.problem.dys, self.problem.x, self._narrow, self.problem.weights, *self._tables,
            *self._rest, self._forms,
        )  # fmt: skip
        rank = self.problem.case.rank
        da, *db = self._grads
        sites = range(len(db))
        return (
            self._dx,
            [[own[site * rank : (site + 1) * rank] for own in da] for site in sites],
            [[own.mT for own in db[site]] for site in sites],
        )


class Accumulate(Ours):
    name = "accumulate"
    form = "accumulate"


class Epilogue(Ours):
    name = "epilogue"
    form = "epilogue"


class Fused(Ours):
    name = "fused"
    form = "fused"


CONTENDERS = {own.name: own for own in (Ours, Accumulate, Epilogue, Fused)}
