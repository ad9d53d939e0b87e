"""Draw a `linear` report: `python -m benchmarks.chart results.json --out docs/linear.svg --table`.

The chart is the layer's overhead over its frozen GEMMs, for each contender and number of adapters. The same report gives the
same bytes, whatever the day.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Wong's palette, which readers with colour-blind eyes can tell apart; what is not a peer is drawn in the first.
OWN = ("#0072B2", "#009E73", "#CC79A7")
PEER = {"addmm": "#E69F00", "grouped_mm": "#D55E00", "eager": "#999999"}


def chosen(report: dict[str, Any], tokens: int, rank: int, dropout: float) -> dict[int, dict[str, dict[str, Any]]]:
    """For each number of adapters the contenders' layer sums at one setting."""
    found = {
        layer["adapters"]: {name: entry for name, entry in layer["contenders"].items() if name != "frozen"}
        for layer in report["layers"]
        if (layer["tokens"], layer["rank"], layer["dropout"]) == (tokens, rank, dropout)
    }
    if not found:
        settings = sorted({(layer["tokens"], layer["rank"], layer["dropout"]) for layer in report["layers"]})
        raise ValueError(f"no layer at tokens, rank, dropout {(tokens, rank, dropout)}: the report has {settings or 'none'}")
    return dict(sorted(found.items()))


def contenders(columns: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    """Every name, the peers first, in the report's order."""
    names = list(dict.fromkeys(name for entries in columns.values() for name in entries))
    return sorted(names, key=lambda name: name not in PEER)


def adapters(count: int) -> str:
    return f"{count} adapter" if count == 1 else f"{count} adapters"


def percent(entry: dict[str, Any] | None) -> str:
    """An overhead, or why there is none."""
    if entry is None:
        return "not run"
    if "overhead" in entry or "ratio" in entry:
        return f"{entry.get('overhead', entry.get('ratio', 1) - 1):+.1%}"
    return next((word for word in ("failed", "skipped", "missing") if word in entry), "not run")


def table(report: dict[str, Any], tokens: int, rank: int, dropout: float) -> str:
    """Markdown: the layer's overhead by adapters, then the groups it is made of."""
    columns = chosen(report, tokens, rank, dropout)
    names = contenders(columns)
    lines = [f"| {tokens} tokens, r = {rank}, dropout {dropout:g} | " + " | ".join(adapters(count) for count in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    lines += [f"| {name} | " + " | ".join(percent(entries.get(name)) for entries in columns.values()) + " |" for name in names]
    lines += ["", "| group | adapters | frozen, us | " + " | ".join(names) + " |", "| --- | --- | --- |" + " --- |" * len(names)]
    for case in report["cases"]:
        if (case["tokens"], case["rank"], case["dropout"]) == (tokens, rank, dropout):
            found = case["contenders"]
            frozen = f"{found['frozen']['us']:.0f}" if "us" in found["frozen"] else percent(found["frozen"])
            cells = [case["group"], str(case["adapters"]), frozen, *(percent(found.get(name)) for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
    made = report["versions"]
    lines += ["", f"Time added to the frozen GEMMs. {made['device']}, torch {made['torch']}, commit {made['commit']}."]
    return "\n".join(lines)


def draw(report: dict[str, Any], tokens: int, rank: int, dropout: float, out: Path) -> None:
    """Write the SVG."""
    import matplotlib

    matplotlib.use("svg")
    # Element ids are hashed with the salt instead of a random one, and text stays text: the file is the same on every machine.
    matplotlib.rcParams.update({"svg.hashsalt": "muxcompile", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    columns = chosen(report, tokens, rank, dropout)
    names = contenders(columns)
    own = iter(OWN * len(names))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        colour = PEER.get(name) or next(own)
        places = [column + (index - (len(names) - 1) / 2) * width for column in range(len(columns))]
        entries = [entries.get(name) for entries in columns.values()]
        heights = [100 * entry["overhead"] if entry and "overhead" in entry else 0.0 for entry in entries]
        axes.bar(places, heights, width * 0.92, color=colour, label=name)
        for place, height, entry in zip(places, heights, entries, strict=True):
            known = entry is not None and "overhead" in entry
            text = f"{height:.0f}" if known and abs(height) >= 10 else f"{height:.1f}" if known else percent(entry)
            axes.annotate(
                text,
                (place, max(height, 0.0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                rotation=0 if known else 90,
            )
    axes.set_xticks(range(len(columns)), [adapters(count) for count in columns])
    axes.set_ylabel("time added, % of the frozen GEMMs")
    axes.margins(y=0.12)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    figure.suptitle("What LoRA adapters cost on a layer's linears, forward and backward", x=0.02, ha="left", fontsize=12)
    setting = f"Llama-3-8B layer, {tokens} tokens, rank {rank}, dropout {dropout:g}, bf16, {report['versions']['device']}"
    axes.set_title(setting, loc="left", fontsize=9, color="#555555")
    axes.legend(frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what `python -m benchmarks.run linear --out` wrote")
    parser.add_argument("--out", type=Path, help="write the chart as SVG")
    parser.add_argument("--table", action="store_true", help="print the figures as Markdown")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    if report.get("benchmark") != "linear":
        raise ValueError(f"{arguments.report}: a report of `linear` is wanted, this is one of {report.get('benchmark')!r}")
    setting = arguments.tokens, arguments.rank, arguments.dropout
    if arguments.out:
        draw(report, *setting, arguments.out)
    if arguments.table:
        print(table(report, *setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
