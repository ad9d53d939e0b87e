"""admit: which tasks fit into memory at all, before anything is compiled.

What runs in turns holds one chunk at a time, and a chunk of fewer extras holds no more than one of many. So a set of tasks fits
exactly when it fits with each task in chunks of its own: base + sum of resident bytes + the largest `flight` of its tasks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from passes.loads import Load, Prices, check, flight


@dataclass(frozen=True, slots=True)
class Admission:
    """Attributes:
    fits: the largest set that fits, in the order given.
    left_out: the other tasks.
    needed: the least peak at which all tasks would run that have a shape at all, in bytes.
    cap: the bytes there are; None: no limit was given.
    """

    fits: tuple[str, ...]
    left_out: tuple[str, ...]
    needed: int
    cap: int | None

    def __str__(self) -> str:
        if not self.left_out:
            return f"all {len(self.fits)} tasks fit: {self.needed:,} bytes needed, cap {_bytes(self.cap)}"
        return (
            f"{len(self.fits) + len(self.left_out)} tasks need {self.needed:,} bytes, cap {_bytes(self.cap)}; the largest set that "
            f"fits has {len(self.fits)}: {' '.join(self.fits)}; left out: {' '.join(self.left_out)}"
        )


def _bytes(cap: int | None) -> str:
    return "none" if cap is None else f"{cap:,}"


def admit(loads: Sequence[Load], prices: Prices, cap: int | None, base_bytes: int) -> Admission:
    """The largest number of tasks that fit; among equally many, those of small resident bytes.

    Let f be the largest flight in a set. Of the tasks with flight <= f the most fit when those of least resident bytes are taken
    (exchange a taken task for a smaller one that is not: as many, no more bytes). The loop raises f over the tasks by flight and
    keeps that prefix: it adds the new task and drops the largest while the sum is over the room that f leaves. A dropped task
    never comes back: later rooms are no larger, and the tasks before it only become more. So every f is seen with its best set,
    in O(n log n) together.
    """
    check(loads, prices)
    flights = {load.task: flight(load, prices) for load in loads}
    room = math.inf if cap is None else cap - base_bytes
    place = {load.task: index for index, load in enumerate(loads)}
    order = sorted(loads, key=lambda load: (flights[load.task], load.resident, place[load.task]))
    kept: list[int] = []  # resident bytes, the largest first
    total, most, among = 0, 0, 0
    for index, load in enumerate(order):
        if math.isinf(flights[load.task]):
            break
        heapq.heappush(kept, -load.resident)
        total += load.resident
        while kept and total + flights[load.task] > room:
            total += heapq.heappop(kept)
        if len(kept) > most:
            most, among = len(kept), index + 1
    best = {load.task for load in sorted(order[:among], key=lambda load: (load.resident, place[load.task]))[:most]}
    finite = [flights[load.task] for load in loads if math.isfinite(flights[load.task])]
    return Admission(
        fits=tuple(load.task for load in loads if load.task in best),
        left_out=tuple(load.task for load in loads if load.task not in best),
        needed=base_bytes + sum(load.resident for load in loads) + int(max(finite, default=0)),
        cap=cap,
    )


def refuse(loads: Sequence[Load], prices: Prices, cap: int | None, base_bytes: int) -> None:
    """
    Raises:
        ValueError: a task fits in no chunk or not alone (by name, with bytes), or the tasks do not fit together (with the
            largest set that does).
    """
    if cap is None and all(any(load.own) for load in loads if load.own):
        return  # without pricing a chunk
    found = admit(loads, prices, cap, base_bytes)
    if not found.left_out:
        return
    for load in loads:
        least = flight(load, prices)
        if math.isinf(least):
            shapes = ", ".join(map(str, prices.shapes))
            raise ValueError(f"task {load.task!r}: its sequences fit in none of the chunks: {shapes}")
        if cap is not None and base_bytes + load.resident + least > cap:
            raise ValueError(
                f"task {load.task!r}: needs {base_bytes + load.resident + int(least):,} bytes even alone in the smallest chunk "
                f"({base_bytes:,} of the backbone, {load.resident:,} of its own, {int(least):,} in flight); the cap is {cap:,}"
            )
    raise ValueError(f"memory: {found}")


def room(like: Load, loads: Sequence[Load], prices: Prices, cap: int, base_bytes: int) -> int:
    """How many more tasks like `like` fit beside `loads`.

    Raises:
        ValueError: `like` holds no bytes, so their number has no bound.
    """
    if like.resident <= 0:
        raise ValueError(f"task {like.task!r}: resident: 0 bytes, so any number of such tasks fits")
    names = {load.task for load in loads}
    name = next(name for name in (f"{like.task}.{index}" for index in range(len(names) + 1)) if name not in names)
    check([*loads, replace(like, task=name)], prices)
    largest = max(flight(load, prices) for load in [*loads, like])
    left = cap - base_bytes - sum(load.resident for load in loads) - largest
    return max(0, int(left // like.resident)) if math.isfinite(left) else 0
