"""symmetric: memory of one rank that others of its group write to and read (torch's symmetric memory, over NVLink or PCIe).

NCCL's kernels hold multiprocessors for as long as they wait for the other rank, beside layers that need them: a GEMM whose tiles
fill all of them then takes another wave. Here copy engines move the data. Who sends never waits, as long as there is room; who
receives waits on the very stream that would read, where nothing could run anyway.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes that tensors of one message begin at a multiple of.
ALIGNED = 256
# Channels of sums: their beginnings, and tensors that are where they are read.
_BEGUN, _WRITTEN = 0, 1
# Channels of one memory times the ranks that share it, as torch has them: 2 KiB of flags of 4 bytes.
_CHANNELS = 512
# A tensor's shape and dtype.
Form = tuple[tuple[int, ...], torch.dtype]


def reachable(device: torch.device, gather: Callable[[Any], list[Any]]) -> bool:
    """Whether all ranks have GPUs of one host that read each other's memory; all of them find the same.

    Ranks that share a GPU have it where torch lets them (`TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`).

    Args:
        gather: everybody's object, by rank.
    """
    own = (device.type, socket.gethostname(), device.index if device.type == "cuda" else 0)
    found = gather(own)
    indices = [index for _, _, index in found]
    if {(kind, host) for kind, host, _ in found} != {("cuda", own[1])}:
        return False
    if len(set(indices)) < len(indices) and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
        return False
    others = [index for index in indices if index != device.index]
    count = torch.cuda.device_count()
    return all(gather(all(index < count and torch.cuda.can_device_access_peer(device.index, index) for index in others)))


class Shared:
    """Bytes that every rank of a group has, each reading and writing all of them; all make one in the same order.

    Args:
        nbytes: of each rank.
        timeout: seconds after which a rank that waits for another gives up: its GPU's work then ends with an error.
    """

    def __init__(self, nbytes: int, group: Any, device: torch.device, timeout: float) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.nbytes = nbytes
        self._memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, group)
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._timeout = math.ceil(timeout * 1000)

    def view(self, rank: int, start: int, form: Form) -> Tensor:
        """A tensor in one rank's bytes, from `start` on."""
        shape, dtype = form
        return self._handle.get_buffer(rank, shape, dtype, start // dtype.itemsize)

    def meet(self, channel: int) -> None:
        """Wait until all ranks have come this far in their streams."""
        self._handle.barrier(channel, self._timeout)

    def tell(self, rank: int, channel: int) -> None:
        self._handle.put_signal(rank, channel, self._timeout)

    def wait(self, rank: int, channel: int) -> None:
        """Wait until a rank has told; each telling is waited for once."""
        self._handle.wait_signal(rank, channel, self._timeout)


class Pipe:
    """One direction between two ranks: messages arrive in the order in which they are sent.

    A message that finds no room waits, on a stream of its own, until the receiver has copied an older one out.

    Args:
        shared: `room` times `nbytes` of the two ranks.
        nbytes: of the largest message (`size`).
        room: messages that may be under way.
        stream: where messages are sent from; None: where the receiver is.
    """

    def __init__(self, shared: Shared, nbytes: int, room: int, stream: torch.cuda.Stream | None) -> None:
        assert shared.count == 2, f"{shared.count} ranks in a pipe"
        self.shared, self.nbytes, self.room = shared, nbytes, room
        self._stream = stream
        self._other = 1 - shared.rank
        self._count = 0

    def send(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to send, once the current stream has made the tensors.

        Returns:
            To be called before the tensors are written again: the current stream waits until they are sent.
        """
        assert self._stream is not None
        slot, full = self._next()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if full:
                self.shared.wait(self._other, 2 * slot + 1)
            for place, tensor in zip(self._views(self._other, slot, forms(tensors)), tensors, strict=True):
                place.copy_(tensor)
            self.shared.tell(self._other, 2 * slot)
            event = self._stream.record_event()

        def sent(held: Sequence[Tensor] = tensors) -> None:  # they stay as long as it may be called
            torch.cuda.current_stream().wait_event(event)

        return sent

    def receive(self, wanted: Sequence[Form]) -> list[Tensor]:
        """The next message, copied out; the current stream waits for it."""
        slot, _ = self._next()
        self.shared.wait(self._other, 2 * slot)
        found = [place.clone() for place in self._views(self.shared.rank, slot, wanted)]
        self.shared.tell(self._other, 2 * slot + 1)
        return found

    def _next(self) -> tuple[int, bool]:
        slot, full = self._count % self.room, self._count >= self.room
        self._count += 1
        return slot, full

    def _views(self, rank: int, slot: int, wanted: Sequence[Form]) -> list[Tensor]:
        assert size(wanted) <= self.nbytes, f"a message of {size(wanted)} bytes where there is room for {self.nbytes}"
        start, found = slot * self.nbytes, []
        for form in wanted:
            found.append(self.shared.view(rank, start, form))
            start += size([form])
        return found


class Sums:
    """Sums over the ranks of a group, of one micro-batch after another; several that run at a time have one each.

    Of two ranks each writes what it has into the other's memory, by copy engine; of more each puts it where all can read it, and
    the others' copy engines fetch it. Two halves take turns: who writes one again knows that nobody reads it any more.

    Args:
        nbytes: of the largest tensor.
        share: makes memory of so many bytes.
    """

    def __init__(self, nbytes: int, count: int, share: Callable[[int], Shared]) -> None:
        self.nbytes = -(-nbytes // (ALIGNED * count)) * ALIGNED * count  # whole pieces, one for each rank
        # Of two ranks both sum all; of more each sums a piece, which has a place of its own.
        self._half = self.nbytes * (1 if count == 2 else 2)
        self.shared = share(2 * self._half)
        self._turn = 0

    def begin(self) -> None:
        """From here on the halves take turns from the first: what is recorded from one of these to the next runs in any order."""
        self._turn = 0
        self.shared.meet(_BEGUN)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensor, in the order of the ranks, rounded once; the tensor is left as it is."""
        assert tensor.nbytes <= self.nbytes, f"{tensor.nbytes} bytes in sums of {self.nbytes}"
        start = self._half * (self._turn % 2)
        self._turn += 1
        if self.shared.count == 2:
            return self._both(tensor, start)
        return self._pieces(tensor, start)

    def _both(self, tensor: Tensor, start: int) -> Tensor:
        form, own = (tuple(tensor.shape), tensor.dtype), self.shared.rank
        tensor = tensor.contiguous()
        # The other has told of its last tensor since it read what this half had before.
        self.shared.view(1 - own, start, form).copy_(tensor)
        self.shared.tell(1 - own, _WRITTEN)
        self.shared.wait(1 - own, _WRITTEN)
        there = self.shared.view(own, start, form)
        return torch.add(tensor, there) if own == 0 else torch.add(there, tensor)

    def _pieces(self, tensor: Tensor, start: int) -> Tensor:
        """Each rank sums one piece of all, in float32, and the others fetch it."""
        count, own = self.shared.count, self.shared.rank
        step = -(-tensor.numel() // count)
        step += -step % (ALIGNED // tensor.element_size())  # views of pieces begin at whole elements
        whole, piece = ((count, step), tensor.dtype), ((step,), tensor.dtype)
        self.shared.view(own, start, whole).view(-1)[: tensor.numel()].copy_(tensor.reshape(-1))
        self.shared.meet(_WRITTEN)
        offset = own * step * tensor.element_size()
        total: Tensor | None = None
        for rank in range(count):
            there = torch.empty(step, dtype=tensor.dtype, device=tensor.device)
            there.copy_(self.shared.view(rank, start + offset, piece))
            total = there.float() if total is None else total + there.float()
        assert total is not None
        summed = start + self.nbytes
        self.shared.view(own, summed + offset, piece).copy_(total)
        self.shared.meet(_WRITTEN)
        found = torch.empty(count, step, dtype=tensor.dtype, device=tensor.device)
        for rank in range(count):
            found[rank].copy_(self.shared.view(rank, summed + rank * step * tensor.element_size(), piece))
        return found.view(-1)[: tensor.numel()].view(tensor.shape)


class Board:
    """Small tensors that every rank of a group posts, and reads of all when it needs them: who posts waits for nobody.

    So it is for who chooses the places that none is posted to again before all have read it (`runtime.places`).

    Args:
        nbytes: of the largest tensor.
        share: makes memory of so many bytes.
    """

    def __init__(self, nbytes: int, count: int, share: Callable[[int], Shared]) -> None:
        self.nbytes, self.room = -(-nbytes // ALIGNED) * ALIGNED, _CHANNELS // count
        self.shared = share(self.room * count * self.nbytes)

    def post(self, place: int, tensor: Tensor) -> None:
        """Give all others the tensor."""
        own = self.shared.rank
        for rank in range(self.shared.count):
            self._view(rank, place, own, (tuple(tensor.shape), tensor.dtype)).copy_(tensor)
            if rank != own:
                self.shared.tell(rank, place)

    def read(self, place: int, wanted: Form) -> Tensor:
        """[ranks, *shape]: what all have posted to a place; the current stream waits for it."""
        own = self.shared.rank
        for rank in range(self.shared.count):
            if rank != own:
                self.shared.wait(rank, place)
        return torch.stack([self._view(own, place, rank, wanted) for rank in range(self.shared.count)])

    def _view(self, rank: int, place: int, source: int, wanted: Form) -> Tensor:
        assert 0 <= place < self.room, f"place {place} of {self.room}"
        return self.shared.view(rank, (place * self.shared.count + source) * self.nbytes, wanted)


def form(given: tuple[tuple[int, ...], str]) -> Form:
    """Of a shape and a dtype's name."""
    return given[0], getattr(torch, given[1])


def forms(tensors: Sequence[Tensor]) -> list[Form]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def size(wanted: Sequence[Form]) -> int:
    """Bytes of a message of such tensors."""
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for shape, dtype in wanted)
