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
from codegen.spec import Template
from runtime.region import load_source

Call = Callable[[list[Any]], Any]
_WARM, _ROUNDS, _SAMPLE = 3, 9, 0.02
# Cycles for which the device sleeps, so that the host is through before it begins: what is timed is then the device alone.
_AHEAD = 20_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One call: median seconds of the device and of the host, and the most bytes beyond those there before."""

    seconds: float
    host: float
    peak: int


def call_of(gm: fx.GraphModule) -> Call:
    """The emitted text of a graph, loaded as the runtime loads it."""
    return load_source(emit.eager_source(gm, "measured"), "<measured region>")["call"]


def inputs_of(gm: fx.GraphModule, device: torch.device, *, slots: int, sequences: Tensor) -> list[Tensor]:
    """Arguments for a template's graph by the shapes of its placeholders.

    Args:
        slots: integers are 0 to slots - 1 in turn: indices and routes that point at something.
        sequences: for every length of an int32 vector that holds borders, these borders; others are as above.
    """
    made = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if value.dtype.is_floating_point:
            own = torch.randn(value.shape, device=device, dtype=torch.float32).mul_(0.02).to(value.dtype)
            own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(own)
        elif value.dim() == 0:
            own = sequences.diff().max().to(value.dtype)  # `longest` is read by the host
        elif value.shape == sequences.shape:
            own = sequences.to(device, value.dtype)
        else:
            own = (torch.arange(value.numel(), device=device) * slots // max(1, value.numel())).to(value.dtype).reshape(value.shape)
        made.append(own)
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
    events, issued = [], []
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_AHEAD)
        begin.record()
        start = time.perf_counter()
        call([*inputs])
        issued.append(time.perf_counter() - start)
        end.record()
        events.append((begin, end))
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Sample(statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3, statistics.median(issued), peak)


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


def samples(template: Template, device: torch.device, *, slots: int, sequences: Tensor) -> dict[str, tuple[Sample, float | None]]:
    """ "forward" and "backward" of a template over arguments made up for them, each with its watts."""
    found = {}
    for phase, gm in (("forward", template.forward), ("backward", template.backward)):
        if gm is not None:
            call, inputs = call_of(gm), inputs_of(gm, device, slots=slots, sequences=sequences)
            once = sample(call, inputs, device)
            with power(device) as drawn, torch.no_grad():
                # Long enough for NVML's own mean, which goes over some 100 ms.
                until = time.perf_counter() + (0.4 if device.type == "cuda" else 0.0)
                while time.perf_counter() < until:
                    call([*inputs])
                    torch.cuda.synchronize(device)
            found[phase] = once, drawn.watts
    return found
