"""Machine: what a device does in a second, as far as predictions need it.

Rates of products, attention and copies are measurements; what a launch and the host take, fractions of bandwidth and watts are
estimates, which measured regions (`codegen.regions`) put right. A device that was never measured borrows the preset of its kind and
says so.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

# Elements of a product's result that fill an H200 once: a tile of 128 x 128 for each of its 132 multiprocessors.
WAVE = 132 * 128 * 128


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and the host that feeds it.

    Args:
        name: as torch names it.
        products: FLOP/s of a matrix product by the elements of its result, ascending; between two points by straight line.
        own: FLOP/s of kernels of ours beside frozen products: narrow matrices, masks.
        attention: FLOP/s of attention over long sequences.
        bandwidth: bytes/s of a copy, read and write together.
        passing, owning, attending: fractions of it that pointwise operators, kernels of ours and attention reach.
        launch: seconds of the device from one kernel's end to the next one's start, and of the ramp at its ends.
        view, call, custom, kernel: host seconds of a view, of an operator of torch, of one of ours, and of each kernel in it.
        record: host seconds of a chunk whose regions are launched as CUDA graphs, its loading included.
        serial: the host computes itself: its seconds add to the device's, where they otherwise pass beside them.
        memory: bytes.
        idle, busy: watts.
        note: where figures were borrowed.
    """

    name: str
    products: tuple[tuple[float, float], ...]
    own: float
    attention: float
    bandwidth: float
    passing: float
    owning: float
    attending: float
    launch: float
    view: float
    call: float
    custom: float
    kernel: float
    record: float
    serial: bool
    memory: int
    idle: float
    busy: float
    note: str = ""

    def rate(self, elements: float) -> float:
        """FLOP/s of a matrix product whose result has so many elements; below the first point in proportion to them."""
        sizes = [size for size, _ in self.products]
        place = bisect.bisect_left(sizes, elements)
        if place == 0:
            return self.products[0][1] * elements / sizes[0] if elements else self.products[0][1]
        if place == len(sizes):
            return self.products[-1][1]
        (low, below), (high, above) = self.products[place - 1 : place + 1]
        return below + (above - below) * (elements - low) / (high - low)

    def watts(self, used: float) -> float:
        """Power while a fraction `used` of the time the device works."""
        return self.idle + (self.busy - self.idle) * min(1.0, used)


# NVIDIA H200, 2026-11-21. Measured: products [M, 4096] x [4096, 4096] and x [4096, 14336] in bfloat16 for M = 256 to 8192, copies,
# varlen attention at lengths 128 and 2048, and `owning` (2026-11-23: a layer's narrow products at 8704 rows move 3.4 TB/s).
# Estimated: `own`, `passing`, `launch` (set beside steps and stages of an 8B model, docs/cost-model.md), and watts (the board's
# limit and its rest). The host's seconds, 2026-11-22: forwards and backwards of a layer of 8B in chunks of 1024 rows, which wait
# for the host, take 2.7 and 4.6 ms for 37 and 63 calls, 5 operators of ours, and 5 and 12 kernels in these; launched as CUDA graphs
# all 32 layers take 2.4 ms.
_H200 = Machine(
    name="NVIDIA H200",
    products=tuple(
        (waves * WAVE, flops * 1e12)
        for waves, flops in (
            (0.48, 293),
            (0.97, 464),
            (1.7, 545),
            (1.94, 599),
            (3.9, 640),
            (7.8, 715),
            (14, 743),
            (31, 768),
            (54, 779),
        )
    ),
    own=3e14,
    attention=3.6e14,
    bandwidth=4.23e12,
    passing=0.8,
    owning=0.75,
    attending=0.25,
    launch=4e-6,
    view=5e-6,
    call=1.8e-5,
    custom=1.5e-4,
    kernel=2.1e-4,
    record=2.5e-3,
    serial=False,
    memory=139 << 30,
    idle=120.0,
    busy=660.0,
)
# One core of a busy server's CPU in float32, torch 2.13: fresh memory is paid for page by page, and operators of ours are loops of
# Python over blocks.
_CPU = Machine(
    name="cpu",
    products=((1.0, 5e10), (1e9, 5e10)),
    own=2e10,
    attention=1e10,
    bandwidth=4e9,
    passing=1.0,
    owning=0.5,
    attending=0.5,
    launch=0.0,
    view=3e-6,
    call=1e-5,
    custom=4e-4,
    kernel=0.0,
    record=0.0,
    serial=True,
    memory=16 << 30,
    idle=0.0,
    busy=1.0,
)
PRESETS = {machine.name: machine for machine in (_H200, _CPU)}


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Published figures of a GPU: dense bfloat16 FLOP/s, bytes/s of memory, multiprocessors, bytes that programs see, watts."""

    flops: float
    bandwidth: float
    multiprocessors: int
    memory: int
    watts: float


# NVIDIA's product pages and architecture papers: dense bfloat16 without sparsity; SXM boards of the H100, A100 (80 GB) and B200. Of
# a board's memory about 2% is the driver's.
DATASHEETS = {
    "H200": Datasheet(989e12, 4.8e12, 132, 139 << 30, 700.0),
    "H100": Datasheet(989e12, 3.35e12, 132, 79 << 30, 700.0),
    "A100": Datasheet(312e12, 2.04e12, 108, 79 << 30, 400.0),
    "A40": Datasheet(149.7e12, 696e9, 84, 44 << 30, 300.0),
    "L40S": Datasheet(362e12, 864e9, 142, 44 << 30, 350.0),
    "B200": Datasheet(2250e12, 8e12, 148, 178 << 30, 1000.0),
}


def machine(name: str, memory: int | None = None) -> Machine:
    """The preset of a device by its name ("cpu" for the host), with its own memory if given.

    A GPU that was never measured is the H200 scaled by the ratio of published peaks, or the H200 itself; `note` says which.
    """
    found = PRESETS.get(name)
    if found is None:
        known = next((word for word in DATASHEETS if word in name), None)
        own, measured = DATASHEETS[known or "H200"], DATASHEETS["H200"]
        # Of its published peaks a device is taken to reach what the H200 reaches of its own, in as many waves of blocks.
        flops, waves = own.flops / measured.flops, own.multiprocessors / measured.multiprocessors
        scale = f"the {known}'s published peaks" if known else "nothing: it is unknown"
        found = replace(
            _H200,
            name=name,
            products=tuple((size * waves, rate * flops) for size, rate in _H200.products),
            own=_H200.own * flops,
            attention=_H200.attention * flops,
            bandwidth=_H200.bandwidth * own.bandwidth / measured.bandwidth,
            memory=own.memory,
            busy=own.watts if known else _H200.busy,
            note=f"{name} was never measured: figures of the NVIDIA H200 scaled by {scale}",
        )
    return found if memory is None else replace(found, memory=memory)
