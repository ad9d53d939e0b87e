"""calibrate: measure the lowerings of adapted linears on this device, for `codegen.costs`.

Each product is timed with tasks of rank 16 that fill the chunk. Lowerings take turns, each first as often as the others, on a busy
device: neither a drifting clock nor the cache favours one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegen import costs, device
from codegen.lower import FORMS

TASKS, RANK, BLOCK = 8, 16, 128
_SETS, _ROUNDS, _BUSY = 3, 12, 0.1


def calibrate(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Microseconds of every lowering of a linear's forward ("y") and of its backward, gradients included ("dx"), by `costs.key`.

    Args:
        shapes: (features, outputs) of frozen linears.
        tokens: chunk sizes, multiples of 128.
        dtype: of weights and activations.
    """
    name = str(dtype).removeprefix("torch.")
    found: dict[str, dict[str, float]] = {}
    for count in tokens:
        for features, outputs in shapes:
            cases = [_Case(count, features, outputs, dtype, seed) for seed in range(_SETS)]
            for product in ("y", "dx"):
                runs = {form: [getattr(case, product)(form) for case in cases] for form in FORMS}
                found[costs.key(product, count, features, outputs, name)] = _microseconds(runs)
    return found


def write(sites: dict[str, dict[str, float]], folder: Path = costs.OWN) -> Path:
    """Add to the table of the current device; returns its file."""
    name = torch.cuda.get_device_name()
    path = folder / costs.file_name(name)
    known = json.loads(path.read_text())["sites"] if path.is_file() else {}
    versions = {"torch": torch.__version__, "tasks": TASKS, "rank": RANK}
    merged = dict(sorted({**known, **sites}.items()))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": name, **versions, "sites": merged}, indent=1) + "\n")
    costs.table.cache_clear()
    return path


class _Case:
    """One linear with one bank of tasks."""

    def __init__(self, tokens: int, features: int, outputs: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=dtype).mul_(0.02)

        blocks = tokens // BLOCK
        slots = min(TASKS, blocks)
        self.x, self.dy, self.weight = normal(tokens, features), normal(tokens, outputs), normal(outputs, features)
        self.a, self.b = normal(slots, RANK, features), normal(slots, RANK, outputs)
        self.scale = torch.ones(slots, device="cuda")
        self.route = (torch.arange(blocks, device="cuda") * slots // blocks).int()
        self.narrow = normal(tokens, RANK)

    def rest(self) -> Any:
        """The arguments that forward and backward share: one bank, no dropout."""
        return [self.scale], [self.route], [], [], None, None, [0], [0]

    def y(self, form: str) -> Callable[[], None]:
        given: Any = self.x, [self.weight], [None], [self.a], [self.b], *self.rest(), f"y={form} dx={form}"

        def run() -> None:
            device.linears(*given)

        return run

    def dx(self, form: str) -> Callable[[], None]:
        dx = torch.empty_like(self.x)
        grads = [torch.zeros(table.shape, device="cuda") for table in (self.a, self.b)]
        tables = [self.a], [self.b]
        given: Any = grads, dx, [self.dy], self.x, self.narrow, [self.weight], *tables, *self.rest(), f"y={form} dx={form}"

        def run() -> None:
            device.linears_backward(*given)

        return run


def _microseconds(runs: dict[str, list[Callable[[], None]]]) -> dict[str, float]:
    """The median over rounds; every form once a round."""
    graphs = {form: _graph(calls) for form, calls in runs.items()}
    order, events = list(graphs), []
    start = time.perf_counter()
    while time.perf_counter() - start < _BUSY:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    for lap in range(_ROUNDS):
        for form in order[lap % len(order) :] + order[: lap % len(order)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[form].replay()
            end.record()
            events.append((form, begin, end))
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {form: [] for form in runs}
    for form, begin, end in events:
        times[form].append(begin.elapsed_time(end) * 1e3 / len(runs[form]))
    return {form: round(statistics.median(own), 1) for form, own in times.items()}


def _graph(calls: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
