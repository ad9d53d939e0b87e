"""products: how fast a device multiplies by a frozen weight, by rows: measured tables, and how they are measured.

A library picks among kernels by size, and tiles do not fill every wave of multiprocessors: a few rows more may cost some percent of
the rate. No formula of ours says which, so the sizes that a planner chooses from are measured. A table is JSON of one device:
microseconds of [M, K] x [K, N] in bfloat16 by "KxN" and M. One for the H200 comes with the project (`codegen/tables/`), for linears
of common models; a user's own lies in `~/.cache/muxcompile/tables/`, and its products go first.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from codegen import costs
from codegen.measure import busy

# FLOP/s by rows, ascending.
Curve = tuple[tuple[int, float], ...]
# Products before anything is timed, until a board runs at the clock that it holds; of weights so many bytes take turns, more than a
# cache holds; a product is repeated for so many seconds, and the middle of so many laps counts.
_HEATED, _WEIGHTS, _REPEATED, _LAPS = 1000, 256 << 20, 2e-3, 3
# FLOP/s that no product is beyond by much, and seconds that the host takes to launch one: small products are not repeated for more.
_RATE, _LAUNCH = 7e14, 5e-6
# Weights that take turns at most: small ones stay in a cache anyway.
_TURNS = 256


def file_name(device: str) -> str:
    return f"products_{costs.file_name(device)}"


@cache
def table(device: str) -> dict[tuple[int, int], Curve]:
    """The curves of a device by (K, N), {} where it was never measured.

    Raises:
        ValueError: a table that is no JSON object of that form, by its file.
    """
    found: dict[tuple[int, int], Curve] = {}
    for folder in (costs.SHIPPED, costs.OWN):
        path = folder / file_name(device)
        if path.is_file():
            try:
                for name, times in json.loads(path.read_text())["products"].items():
                    inputs, outputs = map(int, name.split("x"))
                    points = sorted((int(rows), 2e6 * int(rows) * inputs * outputs / float(us)) for rows, us in times.items())
                    found[inputs, outputs] = tuple(points)
            except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
                raise ValueError(f"{path}: not a table of products ({error}): delete it or measure again") from error
    return found


def write(products: Mapping[tuple[int, int], Mapping[int, float]]) -> Path:
    """Add microseconds, by (K, N) and M, to the user's table of the current device; returns its file."""
    name = torch.cuda.get_device_name()
    path = costs.OWN / file_name(name)
    known = json.loads(path.read_text())["products"] if path.is_file() else {}
    known |= {f"{inputs}x{outputs}": {str(rows): us for rows, us in times.items()} for (inputs, outputs), times in products.items()}
    lines = ",\n".join(f"  {json.dumps(product)}: {json.dumps(known[product])}" for product in sorted(known))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    head = json.dumps({"device": name, "torch": torch.__version__})[:-1]
    fresh.write_text(f'{head}, "products": {{\n{lines}\n}}}}\n')
    fresh.replace(path)
    table.cache_clear()
    return path


def of_linears(shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The products of linears, given by (features, outputs): of their forwards, and of the gradients of their inputs."""
    return sorted({product for features, outputs in shapes for product in ((features, outputs), (outputs, features))})


def measure(products: Mapping[tuple[int, int], Sequence[int]]) -> dict[tuple[int, int], dict[int, float]]:
    """Microseconds of products (K, N) in bfloat16, each at these numbers of rows: the mean of a weight as it is and transposed.

    The device is kept busy throughout, as it is in training.
    """
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    busy(device)(_HEATED)
    found = {}
    for (inputs, outputs), rows in products.items():
        times: dict[int, list[float]] = {size: [] for size in rows}
        small = torch.randn(max(outputs, max(rows)), inputs, generator=generator, device=device).mul_(0.02).bfloat16()
        x, y = small[: max(rows)], torch.empty(max(rows), outputs, device=device, dtype=torch.bfloat16)
        weights = [small[:outputs].clone() for _ in range(min(_TURNS, max(1, _WEIGHTS // (2 * inputs * outputs))))]
        layouts = [own.t() for own in weights], [own.view(inputs, outputs) for own in weights]
        for lap in range(_LAPS):
            for size in rows if lap % 2 == 0 else reversed(rows):
                times[size].append(statistics.fmean(_seconds(x[:size], layout, y[:size]) for layout in layouts))
        found[inputs, outputs] = {size: round(statistics.median(own) * 1e6, 1) for size, own in times.items()}
        del small, x, y, weights, layouts
    return found


def _seconds(x: torch.Tensor, weights: Sequence[torch.Tensor], into: torch.Tensor) -> float:
    repeated = max(4, int(_REPEATED / max(2 * x.numel() * into.shape[1] / _RATE, _LAUNCH)))
    torch.mm(x, weights[-1], out=into)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for lap in range(repeated):
        torch.mm(x, weights[lap % len(weights)], out=into)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeated
