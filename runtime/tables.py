"""Slot tables: the preallocated tensors that hold every task's adapter, and the map from PEFT's tensors into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's piece of a tensor: number `index` of `count` equal ones along `dim`."""

    dim: int
    index: int
    count: int

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's piece, a view."""
        return whole.chunk(self.count, self.dim)[self.index]

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of all pieces together."""
        return (*shape[: self.dim], shape[self.dim] * self.count, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Table:
    """One tensor of several tasks: row s belongs to the task in slot s.

    Args:
        name: what regions read, e.g. "model.layers.0.self_attn.q_proj.lora_A.r8".
        shape: [S, R, F] of a trainable table (R is the rank bucket) or of one of fixed tensors, [S] or [S, ...] of constants.
        rows: the task in each slot, "" where a slot is free.
        trainable: float32 masters with gradients, read through copies in the compute dtype; otherwise float32 constants, or
            tensors that tasks keep as they are and regions read as they lie there, e.g. the places of sparse matrices in int32.
        route: key of the routing row that sends blocks of tokens to this table's slots.
        dtype: what regions read it as.
        values: a constant for each row (0.0 in a free one), or nested tuples of them; empty for a table of tensors.
        partial: every rank of a tensor-parallel group has the same tensors, and a part of their gradient: the sum is the gradient.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[str, ...]
    trainable: bool
    route: str
    dtype: str = "float32"
    values: tuple[Any, ...] = ()
    partial: bool = False

    def with_row(self, row: int, task: str, value: float = 0.0) -> Table:
        rows = (*self.rows[:row], task, *self.rows[row + 1 :])
        values = (*self.values[:row], _filled(self.values[row], value), *self.values[row + 1 :]) if self.values else ()
        return replace(self, rows=rows, values=values)


def _filled(like: Any, value: float) -> Any:
    """The value in the nesting of another."""
    return tuple(_filled(own, value) for own in like) if isinstance(like, tuple | list) else value


@dataclass(frozen=True, slots=True)
class Param:
    """Where one PEFT tensor of one task lives: `tables[table][row, start:stop, :]`, transposed if `transposed`.

    `key` is the tensor's name in PEFT's file, where it has one dimension if `flat`; `std` and `bound` say how a fresh one is drawn
    (normal, uniform; both 0: all `fill`). `shard`: which piece of PEFT's tensor it is; None: all of it.
    """

    task: str
    key: str
    table: str
    row: int
    start: int
    stop: int
    transposed: bool
    bound: float = 0.0
    std: float = 0.0
    fill: float = 0.0
    flat: bool = False
    shard: Shard | None = None

    @property
    def rows_shard(self) -> Shard | None:
        """The piece as the table has it: [stop - start, F] of the rows that all ranks' tables have."""
        if self.shard is None:
            return None
        dim = 1 if self.flat else self.shard.dim
        return replace(self.shard, dim=1 - dim if self.transposed else dim)


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor that belongs to a task and lies in no table: an encoder computes from it what regions read.

    Args:
        name: what the encoder calls it, e.g. "lambda_d".
        key: its name in PEFT's file.
        shape: PEFT's shape, of the rank's piece where there is a `shard`.
        bound, std: how a fresh one is drawn, as in `Param` (both 0: `fill` everywhere).
        fill: the constant of a fresh one.
        start: a function of `runtime.encoders.STARTS` that computes a fresh one instead, e.g. "dora".
        trainable: optimised; otherwise kept as it starts or is written, e.g. VeRA's random matrices.
        filed: PEFT has a tensor of this key; otherwise it is in checkpoints alone.
        shard: which piece of PEFT's tensor it is; None: all of it.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    bound: float = 0.0
    std: float = 0.0
    fill: float = 0.0
    start: str = ""
    trainable: bool = True
    filed: bool = True
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """`tables[table][row, start:stop, :]`: what an encoding fills, and where its gradient comes from."""

    table: str
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """Rows of tables that are computed from a task's tensors, once for each optimizer step.

    Regions read the places and add gradients to them as everywhere; the runtime pulls these back into the inputs, which the
    task's optimizer trains. Plain data: `Encoding.of(dataclasses.asdict(x)) == x`, through JSON as well.

    Args:
        task: whose it is.
        name: unique among the task's encodings, e.g. the site. It stays when the task moves to other tables.
        encoder: a function of `runtime.encoders.ENCODERS`; "" if there are no outputs and the tensors are only kept.
        inputs: the tensors that belong to this encoding.
        outputs: the places it fills, in the order of the encoder's results.
        reads: what else it reads without gradient, by the encoder's name for it: keys of the task (a `Param`, or another
            encoding's `Input`), in PEFT's shape.
        weights: tensors of the backbone that it reads, by the encoder's name for them: their full names.
        settings: numbers and words for the encoder and its starts.
        stages: by output the pipeline stage that reads it, where these are several: each stage then has the inputs and all outputs.
    """

    task: str
    name: str
    encoder: str
    inputs: tuple[Input, ...]
    outputs: tuple[Place, ...] = ()
    reads: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    settings: dict[str, int | float | str] = field(default_factory=dict)
    stages: tuple[int, ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Encoding:
        """Read back what `dataclasses.asdict` made, where JSON has put lists for tuples."""
        inputs = tuple(Input(**{**given, "shape": tuple(given["shape"])}) for given in row["inputs"])
        outputs = tuple(Place(**place) for place in row["outputs"])
        return cls(**{**row, "inputs": inputs, "outputs": outputs, "stages": tuple(row.get("stages", ()))})


def routes_of(tables: Mapping[str, Table]) -> dict[str, tuple[str, ...]]:
    """For every routing key the tasks of its slots. All tables of one key agree, or the routing would be wrong for some."""
    routes: dict[str, tuple[str, ...]] = {}
    for table in tables.values():
        rows = routes.setdefault(table.route, table.rows)
        assert rows == table.rows, f"{table.name}: rows {table.rows} differ from route {table.route}'s {rows}"
    return routes
