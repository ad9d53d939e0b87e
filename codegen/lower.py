"""lower: which form a region runs in, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Lowering:
    """The form of every region of a program, with the reason it was chosen."""

    form: str
    reason: str


def choose(regions: str, device: torch.device) -> Lowering:
    """Pick the form of region bodies.

    Args:
        regions: "auto", "eager" or "inductor" (Options.regions).
    """
    if regions != "auto":
        return Lowering(regions, f"Options.regions={regions!r}")
    if device.type == "cuda":
        return Lowering("inductor", "on CUDA Inductor fuses what lies between the products")
    return Lowering("eager", "on CPU compiling a layer costs about 20 s and a C++ compiler; its products run at the same speed either way")
