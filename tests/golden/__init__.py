"""Golden text: what the compiler emits, as NAME.txt beside this file, reviewed as a diff; MUXCOMPILE_ACCEPT=1 rewrites it."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent


def check_golden(name: str, text: str) -> None:
    """Compare a text with the accepted one, line by line, so that a failure shows the diff."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("MUXCOMPILE_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing: run once with MUXCOMPILE_ACCEPT=1 and review it"
    accepted = path.read_text(encoding="utf-8")
    assert text.splitlines() == accepted.splitlines(), f"differs from {path}; accept with MUXCOMPILE_ACCEPT=1"
