"""A recorder for any device: what it records it does again, with the tensors of the first time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from runtime.cudagraph import Values, Work


class Again:
    """Counts records and launches. As with CUDA graphs, a launch reads and writes tensors of the recording alone."""

    stream = None

    def __init__(self) -> None:
        self.records = self.launches = 0

    def memory(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, work: Work, values: Values) -> Callable[[], None]:
        given = dict(values)
        work(values)
        made, first = dict(values), True
        self.records += 1

        def launch() -> None:
            nonlocal first
            self.launches += 1
            if first:  # the recording did it
                first = False
                return
            found = dict(given)
            work(found)
            for name, value in found.items():
                if isinstance(value, Tensor):
                    made[name].copy_(value)

        return launch
