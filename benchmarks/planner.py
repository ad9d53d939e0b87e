"""Planning itself: how long `group` takes, how far from the optimum its answer is, and what it gains over fixed policies.

Loads and prices are synthetic and seeded: no device is read, and no figure here is a training step's. A chunk costs
max(floor, T / rate) * (1 + the sum of its extras), a device that small chunks cannot fill.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from codegen import tiling
from passes.exact import exact
from passes.group import SWITCH, Load, Price, Shape, fused, group, interleaved

TOKENS = tiling.CHUNK_SIZES["cuda"]


@dataclass
class Saturation:
    """Prices of a device that is full from `floor * rate` rows on. `asked` counts the chunks that were priced."""

    extras: dict[str, float]
    tokens: Sequence[int] = TOKENS
    rate: float = 1e5  # rows a second
    floor: float = 0.02  # seconds that even a small chunk takes: at this rate, those of 2,000 rows
    row_bytes: int = 100_000
    spared: float = 0.0  # of what a row takes at this rate, what one of padding does not
    asked: int = 0

    @property
    def shapes(self) -> Sequence[Shape]:
        return [Shape(tokens) for tokens in self.tokens]

    def chunk(self, extras: frozenset[str], shape: Shape) -> Price:
        self.asked += 1
        more = 1 + math.fsum(self.extras[extra] for extra in extras)
        spared = self.spared / self.rate if shape.tokens / self.rate > self.floor else 0.0
        cost = max(self.floor, shape.tokens / self.rate) * more
        return Price(cost, round(shape.tokens * self.row_bytes * more), spared)


def instance(
    tasks: int,
    seed: int,
    *,
    heavy: float,
    classes: int = 16,
    samples: int = 8,
    tokens: Sequence[int] = TOKENS,
    spared: float = 0.0,
) -> tuple[list[Load], Saturation]:
    """Seeded loads: rows of a step are 64, 128 or 256 times 8, 16 or 32 times `heavy`, with a spread of a tenth over samples."""
    draw = random.Random(seed)
    extras = {f"extra{index}": draw.choice((0.01, 0.03, 0.08, 0.2)) for index in range(classes)}
    kinds = [frozenset(draw.sample(sorted(extras), draw.randint(1, min(3, classes)))) for _ in range(classes)]
    loads = []
    for index in range(tasks):
        mean = draw.choice((64, 128, 256)) * draw.choice((8, 16, 32)) * heavy
        rows = tuple(max(16, 16 * round(draw.gauss(mean, mean / 10) / 16)) for _ in range(samples))
        loads.append(Load(f"task{index}", rows, draw.choice(kinds), resident=draw.randrange(10**8)))
    return loads, Saturation(extras, tokens, spared=spared)


def brute_force(loads: Sequence[Load], prices: Any, *, room: float = math.inf, switch: float = SWITCH) -> float:
    """The least cost over all partitions and all shapes, one by one, in whole numbers: what `group` is held against."""

    def of(members: Sequence[Load]) -> float:
        union = frozenset[str]().union(*(load.extras for load in members))
        best = math.inf
        for place, shape in enumerate(prices.shapes):
            owns = [load.own[place] if load.own else Price(0.0, 0) for load in members]
            price = prices.chunk(union, shape)
            if any(own is None for own in owns) or price.bytes + max(own.bytes for own in owns if own) > room:
                continue
            rows = [sum(counts) for counts in zip(*(load.rows for load in members), strict=True)]
            steps = [-(-own // shape.tokens) * price.empty(shape.tokens) + own * price.spared for own in rows]
            best = min(best, sum(steps) / len(steps) + sum(own.cost for own in owns if own) + switch)
        return best

    known: dict[tuple[str, ...], float] = {}

    def cached(members: Sequence[Load]) -> float:
        key = tuple(load.task for load in members)
        if key not in known:
            known[key] = of(members)
        return known[key]

    return min(sum(map(cached, partition)) for partition in _partitions(list(loads)))


def _partitions(items: list[Any]) -> Iterator[list[list[Any]]]:
    """All partitions of a list into lists."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in _partitions(rest):
        for index, part in enumerate(partition):
            yield [*partition[:index], [first, *part], *partition[index + 1 :]]
        yield [[first], *partition]


def gate(count: int = 12) -> dict[str, Any]:
    """Passed if `group` costs what brute force does on random instances of up to 7 tasks."""
    worst = 0.0
    for seed in range(count):
        loads, prices = instance(3 + seed % 5, seed, heavy=(0.1, 0.5, 2.0)[seed % 3], classes=4, samples=3)
        best = brute_force(loads, prices)
        worst = max(worst, abs(group(loads, prices).cost - best) / best)
    return {"passed": worst < 1e-9, "instances": count, "worst_relative_difference": worst}


def measure(tasks: int, heavy: float, solver: float) -> dict[str, Any]:
    """Plan one instance; up to 64 tasks, let the solver try as well."""
    loads, prices = instance(tasks, tasks, heavy=heavy)
    start, busy = time.perf_counter(), time.process_time()
    found = group(loads, prices)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    # On cores that others use as well, the time of the processor says more.
    entry: dict[str, Any] = {"tasks": tasks, "heavy": heavy, "seconds": seconds, "cpu_seconds": busy, "asked": prices.asked}
    entry |= {"groups": len(found.groups), "cost": found.cost}
    for name, policy in (("fused", fused), ("interleaved", interleaved)):
        entry[f"gain_over_{name}"] = policy(loads, prices).cost / found.cost
    if tasks <= 64 and solver > 0:
        # Fewer classes and samples: in this time the solver says nothing about the instance above.
        loads, prices = instance(tasks, tasks, heavy=heavy, classes=4, samples=2)
        cost, best = group(loads, prices).cost, exact(loads, prices, seconds=solver, gap=1e-3)
        entry["solver"] = {"seconds": best.seconds, "over_bound": cost / best.bound - 1, "over_best": cost / best.cost - 1}
    return entry


def line(entry: dict[str, Any]) -> str:
    text = (
        f"{entry['tasks']:5} tasks, load {entry['heavy']:<4g}: {entry['seconds']:6.2f} s ({entry['cpu_seconds']:.2f} s of a core), "
        f"{entry['groups']:3} groups, "
        f"{entry['gain_over_fused']:5.2f}x all fused, {entry['gain_over_interleaved']:5.2f}x all interleaved"
    )
    if "solver" in entry:
        over = entry["solver"]
        text += f"; HiGHS {over['seconds']:.0f} s: {over['over_bound']:+.2%} of its bound, {over['over_best']:+.2%} of its best"
    return text


def flags(parser: argparse.ArgumentParser) -> None:
    """What this benchmark reads of a command line, besides --device and --commit."""
    parser.add_argument("--sizes", default="8,16,32,64,256,1000", help="planner: numbers of tasks, separated by commas")
    parser.add_argument("--solver-seconds", type=float, default=20.0, help="planner: HiGHS' time for each instance up to 64 tasks")


def planner(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan instances of growing size, light and heavy, and print one line for each."""
    from benchmarks.run import versions

    notes = ["synthetic loads and prices; the instances for HiGHS have 4 classes and 2 samples, the others 16 and 8"]
    report: dict[str, Any] = {"benchmark": "planner", "notes": notes, "versions": versions("cpu", arguments.commit), "gate": gate()}
    print(f"gate: {report['gate']}", flush=True)
    if not report["gate"]["passed"]:
        return report
    report["cases"] = []
    for tasks in map(int, arguments.sizes.split(",")):
        for heavy in (0.05, 0.2, 1.0, 8.0):
            report["cases"].append(measure(tasks, heavy, arguments.solver_seconds))
            print(line(report["cases"][-1]), flush=True)
    return report
