"""fill: how much of what a step computes is tokens, beside what other layouts of the same sequences would compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.place import Geometry, place


@dataclass(frozen=True, slots=True)
class Fill:
    """Rows of one step of some tasks.

    Args:
        tokens: effective ones, those of the sequences.
        chunks: micro-batches of `computed / chunks` rows.
        computed: rows of all chunks.
        padded: rows if each task's sequences were padded to its longest.
        padded_together: rows if all were padded to the longest of all tasks, as those that share a batch are.
        packed: rows if the sequences stood one behind another, each padded to whole blocks of its own.
    """

    tokens: int
    chunks: int
    computed: int
    padded: int
    padded_together: int
    packed: int

    def __str__(self) -> str:
        def beside(rows: int) -> str:
            return f"{rows:,} ({self.tokens / rows:.0%})" if rows else "0"

        return (
            f"{self.tokens:,} tokens in {beside(self.computed)} rows of {self.chunks:,} chunks; "
            f"plainly packed {beside(self.packed)}, "
            f"padded to each task's longest {beside(self.padded)}, to the longest of all {beside(self.padded_together)}"
        )


def fill(lengths: Mapping[str, Sequence[int]], geometry: Geometry) -> Fill:
    """The figures for each task's sequence lengths, all in one step."""
    longest = {task: max(given, default=0) for task, given in lengths.items()}
    places = place(lengths, geometry)
    chunks = sum(-(-lengths[each.chain[0]][each.chain[1]] // geometry.tokens) if each.chain else 1 for each in places)
    return Fill(
        tokens=sum(map(sum, lengths.values())),
        chunks=chunks,
        computed=chunks * geometry.tokens,
        padded=sum(longest[task] * len(given) for task, given in lengths.items()),
        padded_together=max(longest.values(), default=0) * sum(map(len, lengths.values())),
        packed=sum(geometry.blocks(length) for given in lengths.values() for length in given),
    )
