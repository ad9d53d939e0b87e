"""Sums through memory that ranks share, played by threads: what a rank writes is there when it is read, whoever is late."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from runtime.symmetric import Form, Sums

TURNS, SHAPE = 24, (3, 40)


class Host:
    """What all ranks have: bytes of each, flags that are put up and taken down, and barriers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.bytes: list[Tensor] = []
        self.up: dict[tuple[int, int, int], bool] = {}
        self.changed = threading.Condition()
        self.barriers = {channel: threading.Barrier(count, timeout=20) for channel in range(2)}

    def turn(self, flag: tuple[int, int, int], up: bool) -> None:
        """Wait until a flag is the other way, then turn it."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.up.get(flag, False) is not up, 20), f"{flag}: nobody came"
            self.up[flag] = up
            self.changed.notify_all()


class Threaded:
    """One rank's `Shared`: a thread is its stream, which is late now and then."""

    def __init__(self, host: Host, rank: int, nbytes: int) -> None:
        self.host, self.rank, self.count, self.nbytes = host, rank, host.count, nbytes
        self._late = random.Random(rank)

    def view(self, rank: int, start: int, form: Form) -> Tensor:
        self._wait_a_little()
        shape, dtype = form
        return self.host.bytes[rank][start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def meet(self, channel: int) -> None:
        self.host.barriers[channel].wait()

    def tell(self, rank: int, channel: int) -> None:
        self.host.turn((rank, self.rank, channel), True)

    def wait(self, rank: int, channel: int) -> None:
        self.host.turn((self.rank, rank, channel), False)
        self._wait_a_little()

    def _wait_a_little(self) -> None:
        if self._late.random() < 0.3:
            time.sleep(0.002 * self._late.random())


def tensor_of(rank: int, turn: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * rank + turn)).to(dtype)


def totals(count: int, dtype: torch.dtype, sums: Callable[..., Sums] = Sums) -> list[list[Tensor]]:
    """By rank the sums of all turns, which begin anew now and then."""
    host, nbytes = Host(count), math.prod(SHAPE) * dtype.itemsize

    def made(rank: int, nbytes: int) -> Threaded:
        if not rank:
            host.bytes = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]
        return Threaded(host, rank, nbytes)

    ranks = [sums(nbytes, count, lambda nbytes, rank=rank: made(rank, nbytes)) for rank in range(count)]

    def run(rank: int) -> list[Tensor]:
        found = []
        for turn in range(TURNS):
            if turn in (0, 7, 16):
                ranks[rank].begin()
            found.append(ranks[rank].total(tensor_of(rank, turn, dtype).T.contiguous().T))
        return found

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_are_of_the_same_turn_in_the_order_of_the_ranks(count: int, dtype: torch.dtype) -> None:
    found = totals(count, dtype)
    for turn in range(TURNS):
        total = tensor_of(0, turn, dtype).float()
        for rank in range(1, count):
            total = total + tensor_of(rank, turn, dtype).float()
        for own in found:
            assert torch.equal(own[turn], total.to(dtype)), turn
            assert own[turn].is_contiguous()


class OneHalf(Sums):
    """Writes where the other may still read."""

    def total(self, tensor: Tensor) -> Tensor:
        self._turn = 0
        return super().total(tensor)


def test_one_half_alone_would_be_written_too_early() -> None:
    found = totals(2, torch.float32, OneHalf)
    wanted = [tensor_of(0, turn, torch.float32) + tensor_of(1, turn, torch.float32) for turn in range(TURNS)]
    assert not all(torch.equal(own[turn], wanted[turn]) for own in found for turn in range(TURNS))
