"""Links: what passes between GPUs in a second, as far as predictions need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Between two GPUs, or among several.

    Args:
        name: of the wire.
        sending: bytes/s from one to another, one way.
        reducing: bytes/s of an all-reduce: what each of n ranks sends, 2 (n - 1) / n of the tensor, over its seconds.
        send, reduce: seconds of either that do not depend on its size.
    """

    name: str
    sending: float
    reducing: float
    send: float
    reduce: float

    def transfer(self, nbytes: float) -> float:
        """Seconds from one GPU to another."""
        return self.send + nbytes / self.sending

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds until every one of some ranks has the sum of their tensors: a ring."""
        return self.reduce + 2 * (ranks - 1) / ranks * nbytes / self.reducing if ranks > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Fabric:
    """How the GPUs of a cluster are joined.

    Args:
        levels: links, each with how many neighbours it joins, ascending; the last joins all that there are.
        hidden: fraction of an all-reduce that passes beside another micro-batch's layers; the rest takes the device's time.
    """

    levels: tuple[tuple[int, Link], ...]
    hidden: float

    def among(self, ranks: Sequence[int]) -> Link:
        """The link that joins all of these ranks, of which neighbours have neighbouring numbers."""
        *near, (_, last) = self.levels
        return next((link for size, link in near if len({rank // size for rank in ranks}) == 1), last)


# 2 H200s over NVLink (NV18, 450 GB/s one way), NCCL, bfloat16 [512, 8192] x 4096: point to point 35, 214 us. Between them by
# straight line: bytes/s, and seconds before them.
_NVLINK = 450e9
_SENDING, _SEND = 351e9 / _NVLINK, 23e-6
# There, sums of an 8B model's layers through symmetric memory, each fetching the other's part: 54, 55, 126 and 139 us each in
# chunks of 512, 896, 4224 and 4608 rows, by what forwards and backwards took beyond the cost model's seconds for all else. Two
# chunks of 4224 and 4608 rows at a time took 281 ms a pair, 314 one after another, and 281 by the model without any sum. (Of 896
# rows half of a run hid all, half none.)
_REDUCING, _REDUCE = 410e9 / _NVLINK, 45e-6
_HIDDEN = 0.95


def _link(name: str, published: float) -> Link:
    """Published bytes/s one way, of which it is taken to reach what the H200's NVLink reaches of its own."""
    return Link(name, published * _SENDING, published * _REDUCING, _SEND, _REDUCE)


# Published: NVLink 4 of Hopper 900 GB/s both ways; NVLink bridge between two A40 112.5 GB/s both ways, PCIe 4.0 x16 64 GB/s both
# ways. Assumed: hosts of 8 Hopper GPUs with a port of 400 Gb/s each, hosts of 4 A40 with one of 200 Gb/s.
_HOPPER = Fabric(((8, _link("NVLink 4", _NVLINK)), (0, _link("InfiniBand NDR", 50e9))), _HIDDEN)
_A40 = Fabric(((2, _link("NVLink bridge", 56.25e9)), (4, _link("PCIe 4.0 x16", 32e9)), (0, _link("InfiniBand HDR", 25e9))), _HIDDEN)


def fabric(device: str) -> Fabric:
    """Of a device by its name, "NVIDIA H200"; one host's, as Hopper's, where it is not known."""
    return next((own for name, own in FABRICS.items() if name in device), _HOPPER)


FABRICS = {"A40": _A40, "H100": _HOPPER, "H200": _HOPPER}
