"""measure: seconds, bytes and watts of a call on the device in front of us."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from codegen import emit
from runtime.region import load_source

Call = Callable[[list[Any]], Any]
_WARM, _ROUNDS, _SAMPLE = 3, 9, 0.02
# Rows and columns of a product that keeps a device busy (1.6 ms on an H200), and how many of them run before a call is timed: the
# host is through before the call begins, so that the device alone is timed, and runs at the clock that it holds under load.
_SPIN, _AHEAD, _HEATED = 8192, 8, 200


@dataclass(frozen=True, slots=True)
class Sample:
    """One call: median seconds of the device and of the host, and the most bytes beyond those there before."""

    seconds: float
    host: float
    peak: int


def call_of(gm: fx.GraphModule) -> Call:
    """The emitted text of a graph, loaded as the runtime loads it."""
    return load_source(emit.eager_source(gm, "measured"), "<measured region>")["call"]


def inputs_of(gm: fx.GraphModule, device: torch.device, given: Sequence[Tensor | None]) -> list[Tensor]:
    """Arguments for a graph: those that are given, for others small random numbers, or zeros where they are integers."""
    # The global generator is neither read nor moved.
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for node, own in zip(gm.graph.find_nodes(op="placeholder"), given, strict=True):
        value = node.meta["val"]
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        made.append(
            own
            if own is not None
            else fresh.normal_(0, 0.02, generator=generator)
            if value.dtype.is_floating_point
            else fresh.zero_()
        )
    return made


def sample(call: Call, inputs: Sequence[Tensor], device: torch.device) -> Sample:
    """Time one call; arguments are lent, so what it holds is what it makes."""
    with torch.no_grad():
        for _ in range(_WARM):
            call([*inputs])
        return _on_cuda(call, inputs, device) if device.type == "cuda" else _on_host(call, inputs)


def _on_host(call: Call, inputs: Sequence[Tensor]) -> Sample:
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call([*inputs])
        taken.append(time.perf_counter() - start)
    middle = statistics.median(taken)
    return Sample(middle, middle, 0)


def _on_cuda(call: Call, inputs: Sequence[Tensor], device: torch.device) -> Sample:
    events, issued, keep_busy = [], [], busy(device)
    keep_busy(_HEATED)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_busy(_AHEAD)
        begin.record()
        start = time.perf_counter()
        call([*inputs])
        issued.append(time.perf_counter() - start)
        end.record()
        events.append((begin, end))
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Sample(statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3, statistics.median(issued), peak)


def busy(device: torch.device) -> Callable[[int], None]:
    """What keeps a device busy: to be called with a number of products, of 1.6 ms each on an H200.

    In a short burst a board multiplies faster than its power lets it in training (an H200 by an eighth).
    """
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn(_SPIN, _SPIN, generator=generator, device=device, dtype=torch.bfloat16)
    into = torch.empty_like(factor)

    def run(count: int) -> None:
        for _ in range(count):
            torch.mm(factor, factor, out=into)

    return run


@dataclass(slots=True)
class Power:
    """Mean watts of a device while a block runs; None where nobody can say."""

    readings: list[float] = field(default_factory=list)

    @property
    def watts(self) -> float | None:
        return statistics.fmean(self.readings) if self.readings else None


@contextlib.contextmanager
def power(device: torch.device) -> Iterator[Power]:
    """Read NVML (through torch, which needs the package nvidia-ml-py) every 20 ms until the block ends."""
    found, over = Power(), threading.Event()
    if device.type != "cuda" or not _readable(device):
        yield found
        return

    def read() -> None:
        while not over.wait(_SAMPLE):
            found.readings.append(torch.cuda.power_draw(device) / 1e3)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield found
    finally:
        over.set()
        reader.join()


def _readable(device: torch.device) -> bool:
    try:
        torch.cuda.power_draw(device)
    except Exception:  # no NVML, or a board that does not say
        return False
    return True


def drawn(call: Call, inputs: Sequence[Tensor], device: torch.device) -> float | None:
    """Mean watts while a call is repeated for 0.4 s: NVML's own mean goes over some 100 ms."""
    with power(device) as found, torch.no_grad():
        until = time.perf_counter() + (0.4 if device.type == "cuda" else 0.0)
        while time.perf_counter() < until:
            call([*inputs])
            torch.cuda.synchronize(device)
    return found.watts
