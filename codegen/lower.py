"""lower: which form a region runs in, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Lowering:
    """The form of every region of a program, with the reason it was chosen."""

    form: str
    reason: str


def choose(regions: str, device: torch.device, *, invariant: bool) -> Lowering:
    """Pick the form of region bodies.

    Args:
        regions: "auto", "eager" or "inductor" (Options.regions).
        invariant: a task's bits must not depend on its neighbours (Options.invariant).
    """
    if regions != "auto":
        return Lowering(regions, f"Options.regions={regions!r}")
    if device.type != "cuda":
        return Lowering(
            "eager", "on CPU compiling a layer costs about 20 s and a C++ compiler; its products run at the same speed either way"
        )
    if invariant:
        # Seen on an H200 with torch 2.11: another task's adapter nodes change what Inductor fuses, and with it last bits.
        return Lowering(
            "eager", "Inductor's fusions follow the neighbours' adapters, so Options.invariant=True needs eager regions"
        )
    return Lowering("inductor", "on CUDA Inductor fuses what lies between the products")
