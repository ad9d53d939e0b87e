"""Tables of measured regions: seconds of a template's forward and backward on one device, by chunk size.

One JSON file for each device in `~/.cache/muxcompile/regions/`. A row belongs to a template by the digest of its text, in which
the chunk's sizes are left open, and to the versions of torch and triton that it was measured with.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from codegen.costs import file_name

OWN = Path.home() / ".cache" / "muxcompile" / "regions"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One phase of one template at one chunk size.

    Args:
        key: the template's digest.
        phase: "forward" or "backward".
        tokens: rows of the chunk.
        seconds: of the device, median; on the CPU of the call.
        host: seconds until the host has issued it.
        peak: most bytes beyond those there at its start.
        watts: mean power while it ran over and over; None: not measured.
    """

    key: str
    phase: str
    tokens: int
    seconds: float
    host: float
    peak: int
    watts: float | None = None


def versions() -> str:
    """What a measurement depends on beside the device and the text."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__} triton {triton}"


def read(device: str, folder: Path = OWN) -> list[Measured]:
    """The rows of this device and these versions, [] where there is none.

    Raises:
        ValueError: a file that is no table of regions, by its name.
    """
    path = folder / file_name(device)
    return [_checked(row) for row in _load(path).get(versions(), [])]


def write(device: str, rows: Iterable[Measured], folder: Path = OWN) -> Path:
    """Add rows to the device's file, in place of those of the same template, phase and size; returns the file."""
    path = folder / file_name(device)
    tables = _load(path)
    merged = {(row["key"], row["phase"], row["tokens"]): row for row in (*tables.get(versions(), []), *map(asdict, rows))}
    tables[versions()] = [merged[name] for name in sorted(merged)]
    folder.mkdir(parents=True, exist_ok=True)
    # Written whole or not at all: another process may be reading.
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"version": VERSION, "device": device, "tables": tables}, indent=1) + "\n")
    fresh.replace(path)
    return path


def seconds(rows: Iterable[Measured]) -> dict[str, dict[int, float]]:
    """Seconds by chunk size under "<key>.<phase>", as the cost model reads them."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(f"{row.key}.{row.phase}", {})[row.tokens] = row.seconds
    return found


def issued(rows: Iterable[Measured]) -> dict[str, float]:
    """Seconds in which the host issues "<key>.<phase>", whatever the size: the least that was seen."""
    found: dict[str, float] = {}
    for row in rows:
        name = f"{row.key}.{row.phase}"
        found[name] = min(row.host, found.get(name, row.host))
    return found


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            return {}
        tables = {str(name): [asdict(_checked(row)) for row in rows] for name, rows in found["tables"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of regions ({error!r}): delete it or measure again") from error
    return tables


def _checked(row: dict[str, Any]) -> Measured:
    found = Measured(**row)
    numbers = (found.tokens, found.seconds, found.host, found.peak)
    if not all(isinstance(own, int | float) and own >= 0 for own in numbers):
        raise ValueError(f"{found} has a figure that is no number of at least 0")
    return found
