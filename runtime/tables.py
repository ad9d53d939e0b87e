"""Slot tables: the preallocated tensors that hold every task's adapter, and the map from PEFT's tensors into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Table:
    """One tensor of several tasks: row s belongs to the task in slot s.

    Args:
        name: what regions read, e.g. "model.layers.0.self_attn.q_proj.lora_A.r8".
        shape: [S, R, F] of a trainable table (R is the rank bucket), [S] of a table of constants.
        rows: the task in each slot, "" where a slot is free.
        trainable: float32 masters with gradients, read through copies in the compute dtype; otherwise float32 constants.
        route: key of the routing row that sends blocks of tokens to this table's slots.
        dtype: what regions read it as.
        values: a constant for each row (0.0 in a free one); empty for a trainable table.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[str, ...]
    trainable: bool
    route: str
    dtype: str = "float32"
    values: tuple[float, ...] = ()

    def with_row(self, row: int, task: str, value: float = 0.0) -> Table:
        rows = (*self.rows[:row], task, *self.rows[row + 1 :])
        values = (*self.values[:row], value, *self.values[row + 1 :]) if self.values else ()
        return replace(self, rows=rows, values=values)


@dataclass(frozen=True, slots=True)
class Param:
    """Where one PEFT tensor of one task lives: `tables[table][row, start:stop, :]`, transposed if `transposed`.

    `key` is the tensor's name in PEFT's file, where it has one dimension if `flat`; `std` and `bound` say how a fresh one is drawn
    (normal, uniform; both 0: all `fill`).
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


def routes_of(tables: Mapping[str, Table]) -> dict[str, tuple[str, ...]]:
    """For every routing key the tasks of its slots. All tables of one key agree, or the routing would be wrong for some."""
    routes: dict[str, tuple[str, ...]] = {}
    for table in tables.values():
        rows = routes.setdefault(table.route, table.rows)
        assert rows == table.rows, f"{table.name}: rows {table.rows} differ from route {table.route}'s {rows}"
    return routes
