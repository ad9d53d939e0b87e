"""trace: when the actions of a run really began and ended, on the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Trace:
    """Spans of what a rank computes: what it waits for is between them.

    `spans`: a name, a micro-batch, and the marks at its begin and end.
    """

    device: torch.device
    spans: list[tuple[str, int, Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, name: str, micro: int) -> Iterator[None]:
        """What the block launches."""
        begin = self._mark()
        yield
        self.spans.append((name, micro, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self) -> list[tuple[str, int, float, float]]:
        """The spans in seconds from the first one's begin; waits for the device."""
        if not self.spans:
            return []
        zero = self.spans[0][2]
        if self.device.type != "cuda":
            return [(name, micro, begin - zero, end - zero) for name, micro, begin, end in self.spans]
        torch.cuda.synchronize(self.device)
        return [
            (name, micro, zero.elapsed_time(begin) / 1e3, zero.elapsed_time(end) / 1e3) for name, micro, begin, end in self.spans
        ]


def bubble(times: Sequence[tuple[str, int, float, float]]) -> float:
    """The part of the time from the first begin to the last end in which nothing was computed."""
    if not times:
        return 0.0
    total = max(end for *_, end in times) - min(begin for *_, begin, _ in times)
    return 1.0 - sum(end - begin for *_, begin, end in times) / total if total else 0.0


def chrome(times: Sequence[tuple[str, int, float, float]], rank: int) -> dict[str, Any]:
    """The spans of a rank as Chrome's trace format, one lane."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank} (measured)"}}]
    for name, micro, begin, end in times:
        at = {"ts": round(begin * 1e6, 3), "dur": round((end - begin) * 1e6, 3), "pid": rank, "tid": 0}
        events.append({"ph": "X", "name": f"{name}.{micro}", "cat": name.partition(" ")[0], **at})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
