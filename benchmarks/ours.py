"""This project's adapted linears as contenders of benchmarks/linear.py: each lowering, and the one that is chosen."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.linear_peers import BLOCK, Case, Gradients, Problem
from codegen import ahead, reference
from codegen.kernels import build
from codegen.ops import LINEARS

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
            keys = [torch.tensor([[site, 0] for site in range(sites)], dtype=torch.int32, device=device)]
            positions = torch.arange(case.tokens, dtype=torch.int32, device=device)
            counters, drops = [torch.zeros_like(positions), positions], [1]
        self._tables = a, b
        self._rest: tuple[Any, ...] = scale, route, drop, keys, *counters, list(range(sites)), drops
        self._grads = [torch.zeros(table.shape, device=device) for table in (*a, *b)]
        self._dx = torch.empty_like(problem.x)
        self._forms = f"y={','.join([self.form] * sites)} dx={self.form}" if self.form else ""
        self._narrow: Tensor | None = None

    @classmethod
    def unsupported(cls, case: Case, device: str) -> str | None:
        return None

    @classmethod
    def compile(cls, case: Case) -> None:
        """Compile what the case launches into Triton's cache."""
        own = cls(Problem.draw(case, "meta", 0))
        weights = own.problem.weights
        args = own.problem.x, weights, [None] * len(weights), *own._tables, *own._rest, own._forms
        build.compile_all(ahead.calls(LINEARS, args))

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
        return self._gradients()

    def _gradients(self) -> Gradients:
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


class Augment(Ours):
    """K-augmentation: one dense product of [x, S] with [W, s B], and of [dY, dS] with [W; A], each adapter in its own columns.

    What a product cannot do without is given for free: x and dY lie in buffers with spare columns, as if their producers wrote them
    there, and the second copy of the frozen weights is made once. A slot's columns are zero in the rows of others.
    """

    name = "augment"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        case, (a,) = problem.case, self._tables[0]
        self.slots, self.rank = a.shape[0], case.rank
        width = self.slots * self.rank
        self.rows = torch.arange(case.tokens, device=problem.x.device)
        self.slot = self._rest[1][0].long().repeat_interleave(BLOCK)
        self.wide = torch.cat([problem.x, problem.x.new_zeros(case.tokens, width * len(case.outs))], 1)
        self.dwide = [torch.cat([dy, dy.new_zeros(case.tokens, width)], 1) for dy in problem.dys]
        self.weights, self.dweights = [], []
        for site, weight in enumerate(problem.weights):
            spare = weight.new_zeros(weight.shape[0], len(case.outs), width)
            spare[:, site] = torch.cat([case.scaling * own for own in problem.B[site]], 1)
            self.weights.append(torch.cat([weight, spare.flatten(1)], 1))
            self.dweights.append(torch.cat([weight, *problem.A[site]]))

    @classmethod
    def unsupported(cls, case: Case, device: str) -> str | None:
        return "a mask lies over the adapters' part of dx" if case.dropout else None

    @classmethod
    def compile(cls, case: Case) -> None:
        """Its kernels are few: each compiles when it is met."""

    def _own_columns(self, buffer: Tensor, features: int, narrow: Tensor) -> None:
        """Put a row's ranks into its own slot's columns behind the features, zeros into the others'."""
        spare = buffer[:, features:].unflatten(1, (-1, self.slots, self.rank))
        spare.zero_()
        spare[self.rows, :, self.slot] = narrow.unflatten(1, (-1, self.rank))

    def forward(self) -> list[Tensor]:
        (a,), route = self._tables[0], self._rest[1][0]
        self._narrow = torch.ops.mux.tile_mm(self.problem.x, a, route, None, True)
        self._own_columns(self.wide, self.problem.case.features, self._narrow)
        return [self.wide @ weight.t() for weight in self.weights]

    def backward(self) -> Gradients:
        torch._foreach_zero_(self._grads)
        (_, b), (scale, (route, *_), *_), rank = self._tables, self._rest, self.rank
        da, *db = self._grads
        assert self._narrow is not None, "backward before forward"
        ds = []
        for site, dy in enumerate(self.problem.dys):
            ds.append(torch.ops.mux.tile_mm(dy, b[site], route, scale[site], True))
            narrow = self._narrow[:, site * rank : (site + 1) * rank].contiguous()
            torch.ops.mux.tile_outer_(db[site], narrow, dy, route, scale[site])
            self._own_columns(self.dwide[site], dy.shape[1], ds[site])
        torch.ops.mux.tile_outer_(da, torch.cat(ds, 1), self.problem.x, route, None)
        torch.mm(self.dwide[0], self.dweights[0], out=self._dx)
        for wide, weight in zip(self.dwide[1:], self.dweights[1:], strict=True):
            self._dx.addmm_(wide, weight)
        return self._gradients()


CONTENDERS = {own.name: own for own in (Ours, Accumulate, Epilogue, Fused, Augment)}
