"""heap: when Python's garbage collector runs.

A compiled Llama-3-8B is half a million objects that refer to each other, and stay. The collector walks all of them time and again:
for a quarter of the time in which they are made, and later, of a sudden, between two launches.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected within; behind it all that was made and dropped within, which so does not wait for a collection amid
    training. Within another one, behind that one.

    What was there before is passed by: to walk that as well would take a small model as long as compiling it. Where the caller has
    turned collections off, they stay so.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect(1)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """The collector passes by what was made before: a collection takes 0.6 s on the host of an H200, in which no chunk is launched,
    and a rank that stands still holds up all others.

    For whoever has the process to himself: nothing of that is freed within that only a collection would free.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
