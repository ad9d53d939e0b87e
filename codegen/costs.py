"""Costs of the lowerings of a linear: measured on a device, or by its roofline.

A measured table is JSON of one device: microseconds of each lowering by shape, written by `muxcompile bench --calibrate`. One for
the H200 comes with the project (`codegen/tables/`); a user's own lies in `~/.cache/muxcompile/tables/`, and goes first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SHIPPED = Path(__file__).parent / "tables"
OWN = Path.home() / ".cache" / "muxcompile" / "tables"


@dataclass(frozen=True, slots=True)
class Roofline:
    """A device's two ceilings: matrix products in FLOP/s and memory traffic in bytes/s."""

    flops: float
    bandwidth: float


# bf16, measured on an H200 (docs/kernels.md); other devices rank lowerings by the same ratio of the two.
ROOFLINE = Roofline(7.5e14, 4.2e12)


# What a Triton GEMM with adapters in its accumulator costs over cuBLAS alone (H200, 8192 tokens, docs/kernels.md).
FUSED_GEMM = 1.03


def file_name(device: str) -> str:
    return "_".join(device.split()) + ".json"


@cache
def table(device: str) -> dict[str, dict[str, float]]:
    """Microseconds by site and lowering, {} where the device was never measured.

    Raises:
        ValueError: a table that is no JSON object of that form, by its file.
    """
    for folder in (OWN, SHIPPED):
        path = folder / file_name(device)
        if path.is_file():
            try:
                found = json.loads(path.read_text())["sites"]
                return {str(site): {form: float(us) for form, us in forms.items()} for site, forms in found.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not a table of costs ({error}): delete it or run bench --calibrate again") from error
    return {}


def key(product: str, tokens: int, features: int, outputs: int, dtype: str) -> str:
    """A site's name in a table: `product` is y or dx, the shape is that of the frozen weight."""
    return f"{product} {dtype} T{tokens} {features}->{outputs}"


def nearest(
    sites: dict[str, dict[str, float]], product: str, tokens: int, features: int, outputs: int, dtype: str
) -> dict[str, float] | None:
    """The figures of a shape, at the measured chunk size that is nearest (as a ratio, at most 2); None: not measured."""
    found: list[tuple[float, dict[str, float]]] = []
    for site, figures in sites.items():
        count = site.split(" T")[-1].split(" ")[0]
        if count.isdigit() and site == key(product, int(count), features, outputs, dtype):
            ratio = max(int(count) / tokens, tokens / int(count))
            found.append((ratio, figures))
    best = min(found, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] <= 2 else None
