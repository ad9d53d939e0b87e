"""docs/peft-kinds.md lists the kinds that there are, as the code's own table says."""

from __future__ import annotations

import os
from pathlib import Path

from passes.adapters import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "peft-kinds.md"
BEGIN, END = "<!-- table: written by tests/passes/test_kinds_table.py -->\n", "<!-- end -->"


def table() -> str:
    lines = ["| peft_type | family | dispatch | adapter | aggregate | file |", "| --- " * 6 + "|"]
    for kind in KINDS.values():
        file = kind.resolve.__module__.rpartition(".")[2]
        cells = kind.peft_type, kind.family, kind.dispatch, kind.adapter, kind.aggregate, f"`{file}.py`"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table_of_the_code() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if os.environ.get("MUXCOMPILE_ACCEPT") == "1":
        PAGE.write_text(wanted)
    assert wanted == text or PAGE.read_text() == wanted


def test_every_kind_says_what_it_is() -> None:
    for kind in KINDS.values():
        assert kind.family in ("reparameterised", "additive", "selective"), kind.peft_type
        assert all((kind.dispatch, kind.adapter, kind.aggregate)), kind.peft_type
