"""cudagraph: device work that is recorded once as a CUDA graph and from then on launched with one call.

A record reads and writes the memory that it was recorded with: what changes from run to run is copied into tensors that stay.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import cache
from typing import Any, Protocol

import torch

# Records of optimizer steps that run at a time: they are of hundreds of small tensors, of which few together keep a device busy.
# Each takes a lane below 0.
STEPS = 4
Values = MutableMapping[str, Any]
Work = Callable[[Values], None]
Launch = Callable[[], None]


class Recorder(Protocol):
    """What records work; `CudaGraphs` on a GPU.

    `stream`: where `together` launches; None: there is one.
    """

    @property
    def stream(self) -> torch.cuda.Stream | None: ...

    def memory(self) -> contextlib.AbstractContextManager[object]:
        """Work within takes its memory where records have theirs."""

    def record(self, work: Work, values: Values) -> Launch:
        """Record `work(values)`, and do none of it: `values` then names tensors that are written whenever the record is launched.

        Returns:
            The launch.

        Raises:
            RuntimeError: the work cannot be recorded: it waits for the device, say.
        """


def together(launches: Iterable[tuple[Recorder, Launch]]) -> None:
    """Launch records of several recorders side by side: those of each one after another, in its stream.

    They begin behind what the current stream has to do, and end before what it does then.
    """
    used: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # with the one that waits for it
    for recorder, launch in launches:
        stream = recorder.stream
        if stream is None:
            launch()
            continue
        if stream not in used:
            used[stream] = torch.cuda.current_stream(stream.device)
            stream.wait_stream(used[stream])
        with torch.cuda.stream(stream):
            launch()
    for stream, current in used.items():
        current.wait_stream(stream)


class CudaGraphs:
    """Records of one device, whose intermediate values share one pool of memory.

    So records run one after another; what one writes is there until another is launched that was recorded when the value's tensor
    was gone, or until work within `memory()` runs.

    Args:
        lane: records of other lanes may run at the same time; kernels of lanes below 0 go before theirs, as multiprocessors become
            free. (A kernel of a record has the priority of the stream that it was recorded in.)
    """

    def __init__(self, device: torch.device, lane: int = 0) -> None:
        self._device, self._side = device, _side(device, lane)
        self._renew()

    @property
    def stream(self) -> torch.cuda.Stream:
        return self._side

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

    def record(self, work: Work, values: Values) -> Launch:
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
    return torch.cuda.Stream(device, priority=-1 if lane < 0 else 0)
