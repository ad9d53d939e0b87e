"""cudagraph: device work that is recorded once as a CUDA graph and from then on launched with one call.

A record reads and writes the memory that it was recorded with: what changes from run to run is copied into tensors that stay.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from functools import cache
from typing import Any, Protocol

import torch

# The lane of optimizer steps.
STEPS = -1
Values = MutableMapping[str, Any]
Work = Callable[[Values], None]


class Recorder(Protocol):
    """What records work; `CudaGraphs` on a GPU."""

    def memory(self) -> contextlib.AbstractContextManager[object]:
        """Work within takes its memory where records have theirs."""

    def record(self, work: Work, values: Values) -> Callable[[], None]:
        """Record `work(values)`, and do none of it: `values` then names tensors that are written whenever the record is launched.

        Returns:
            The launch.

        Raises:
            RuntimeError: the work cannot be recorded: it waits for the device, say.
        """


class CudaGraphs:
    """Records of one device, whose intermediate values share one pool of memory.

    So records run one after another; what one writes is there until another is launched that was recorded when the value's tensor
    was gone, or until work within `memory()` runs.

    Args:
        lane: records of other lanes may run at the same time; kernels of the lane `STEPS` go before theirs, as multiprocessors
            become free. (A kernel of a record has the priority of the stream that it was recorded in.)
    """

    def __init__(self, device: torch.device, lane: int = 0) -> None:
        self._device, self._side = device, _side(device, lane)
        self._renew()

    def _renew(self) -> None:
        self._pool = torch.cuda.MemPool()
        # torch 2.11 refuses to record into a pool whose records are all gone: one stays.
        self._first = self.record(lambda values: values.update(zero=torch.zeros(1, device=self._device)), {})

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        # The allocator keeps blocks by stream: those of records are their stream's.
        side, current = self._side, torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side), torch.cuda.use_mem_pool(self._pool, self._device):
            yield
        current.wait_stream(side)

    def record(self, work: Work, values: Values) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        side, current = self._side, torch.cuda.current_stream(self._device)
        # Not of the whole device: another stream's transfer may wait for a rank that waits for this one.
        current.synchronize()
        with torch.cuda.stream(side):
            # Other threads may go on, e.g. one that reads data into pinned memory.
            graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")
            try:
                work(values)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                self._give_up(graph)
                raise RuntimeError(
                    f"this cannot be recorded as a CUDA graph (Options(cuda_graphs=False) calls it): {reason}"
                ) from error
            graph.capture_end()
        current.wait_stream(side)
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that is broken. torch leaves its generator as if it went on, until another one ends well, and takes no more
        records into the pool."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        sound = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            sound.capture_begin(capture_error_mode="thread_local")
            sound.capture_end()
        self._renew()


@cache
def _side(device: torch.device, lane: int) -> torch.cuda.Stream:
    """One for all records that run one after another: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device, priority=-1 if lane == STEPS else 0)
