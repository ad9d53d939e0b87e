"""stages: the regions of a model as the stages of a pipeline, as even as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.order import Micro, beside, durations, makespan, staged

__all__ = ["Micro", "beside", "cut", "durations", "makespan", "staged"]


def cut(seconds: Sequence[float], count: int) -> tuple[int, ...]:
    """Regions in their order as `count` stages, the slowest as fast as can be; the first of two equal cuts.

    Args:
        seconds: of each region.

    Returns:
        The place behind each stage's last region; no stage is empty.

    Raises:
        ValueError: there are fewer regions than stages.
    """
    if not 0 < count <= len(seconds):
        raise ValueError(f"{len(seconds)} regions are not {count} stages")
    until = [0.0]
    for own in seconds:
        until.append(until[-1] + own)
    # By number of stages, the least slowest stage of the first n regions, and where the last stage begins.
    least, begins = [until[:]], [[0] * len(until)]
    for stages in range(2, count + 1):
        best, begin = [math.inf] * len(until), [0] * len(until)
        for stop in range(stages, len(until)):
            for start in range(stages - 1, stop):
                slowest = max(least[-1][start], until[stop] - until[start])
                if slowest < best[stop]:
                    best[stop], begin[stop] = slowest, start
        least.append(best)
        begins.append(begin)
    stops = [len(seconds)]
    for begin in reversed(begins[1:]):
        stops.append(begin[stops[-1]])
    return tuple(reversed(stops))
