"""comm: the ranks of a mesh, and what they send each other. torch.distributed does the moving.

Between GPUs of one host micro-batches move through symmetric memory, everything else, and between hosts all, through NCCL; on CPUs
through gloo.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from runtime import symmetric
from runtime.symmetric import Board, Form, Pipe, Shared, Sums

T = TypeVar("T")
DIMENSIONS = ("dp", "pp", "tp")
# Elements that one exchange of gradients moves at a time: 64 MiB of float32.
_BUCKET = 1 << 24
# Multiprocessors that may be held by what is sent beside the layers: of transfers between stages, whose kernels wait long for the
# other rank, and of sums of gradients, whose kernels do not: at 2 those of 8 tasks took 60 ms of an 8B model's step (2 H200s).
_CTAS = {"few": 2, "some": 16}


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many replicas (dp), pipeline stages (pp) and shards of every tensor (tp) there are; tp's ranks are neighbours.

    Rank r is shard r % tp of stage r // tp % pp of replica r // (tp * pp).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name)}" for name in DIMENSIONS)

    def place(self, rank: int) -> tuple[int, int, int]:
        """The replica, stage and shard of a rank."""
        return rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp

    def rank(self, dp: int, pp: int, tp: int) -> int:
        return (dp * self.pp + pp) * self.tp + tp

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read "dp=2,pp=4"; what is not named is 1.

        Raises:
            ValueError: the text is none, or names a dimension twice.
        """
        found: dict[str, int] = {}
        for part in text.split(",") if text.strip() else ():
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if match is None or match[1] not in DIMENSIONS or match[1] in found or not int(match[2]):
                raise ValueError(f"mesh {text!r}: {part.strip()!r} is not dp=N, pp=N or tp=N, each once and at least 1")
            found[match[1]] = int(match[2])
        return cls(**found)

    @classmethod
    def of(cls, mesh: Mesh | Mapping[str, int] | str | DeviceMesh) -> Mesh:
        """A mesh as users name it: text, a mapping, or torch's DeviceMesh whose dimensions have these names.

        Raises:
            ValueError: it has other dimensions.
        """
        if isinstance(mesh, Mesh):
            return mesh
        if isinstance(mesh, str):
            return cls.parse(mesh)
        if isinstance(mesh, DeviceMesh):
            names = mesh.mesh_dim_names or ()
            sizes = dict(zip(names, mesh.mesh.shape, strict=True)) if names else {}
            order = [name for name in DIMENSIONS if name in sizes]
            if not names or set(names) - set(DIMENSIONS) or list(names) != order:
                raise ValueError(f"mesh: a DeviceMesh needs dimensions named {', '.join(DIMENSIONS)} in this order, not {names}")
            mesh = sizes
        return cls.parse(",".join(f"{name}={size}" for name, size in mesh.items()))


class Ranks:
    """This process among those of a mesh: its place, and its process groups.

    Args:
        mesh: all processes, each of which makes one of these, in the same order of calls.
        device: the one that this rank computes on.
        timeout: seconds that a rank waits for another before both end.

    Raises:
        ValueError: torch.distributed has not been set up, or has another number of processes.
    """

    def __init__(self, mesh: Mesh | DeviceMesh, device: torch.device, timeout: float = 600.0) -> None:
        self.mesh, self.device = Mesh.of(mesh), device
        self._timeout = timedelta(seconds=timeout)
        if not dist.is_initialized():
            raise ValueError(
                f"mesh {self.mesh}: start the script by `torchrun --nproc-per-node {self.mesh.size}`, and call "
                "torch.distributed.init_process_group first"
            )
        if dist.get_world_size() != self.mesh.size:
            raise ValueError(f"mesh {self.mesh}: takes {self.mesh.size} processes, there are {dist.get_world_size()}")
        self.rank = dist.get_rank()
        self.replica, self.stage, self.shard = self.mesh.place(self.rank)
        dp, pp, tp = (range(getattr(self.mesh, name)) for name in DIMENSIONS)
        at = self.mesh.rank
        self.groups: dict[str, Any] = {
            "dp": self._own([[at(d, p, t) for d in dp] for p in pp for t in tp]),
            "tp": self._own([[at(d, p, t) for t in tp] for d in dp for p in pp]),
            # The stages, for gradients of what several of them have.
            "pp": self._own([[at(d, p, t) for p in pp] for d in dp for t in tp], most="few"),
            # The shards again, for what is summed beside the micro-batches: their collectives keep an order of their own.
            "beside": self._own([[at(d, p, t) for t in tp] for d in dp for p in pp], most="some"),
            # Those that hold one copy of the model between them.
            "model": self._own([[at(d, p, t) for p in pp for t in tp] for d in dp], most="few"),
        }
        # A way for what is no tensor of a device.
        self.control = dist.new_group(backend="gloo", timeout=self._timeout)
        # One for each direction between two stages: transfers of one direction run in order, and never wait for the other's.
        self._pipes = {
            (way, stage): self._own([[at(d, stage, t), at(d, stage + 1, t)] for d in dp for t in tp], most="few")
            for stage in pp[:-1]
            for way in ("down", "up")
        }
        self.symmetric = symmetric.reachable(device, self.objects)
        self._lane = 0
        self._board: Board | None = None
        self._posted: dict[int, Tensor] = {}
        self._to: dict[int, Pipe] = {}
        self._from: dict[int, Pipe] = {}
        self._sums: list[Sums] = []
        self._held: dict[Any, Shared] = {}
        self._meet()

    def _meet(self) -> None:
        """Set up every connection now: the first use of each waits for the other ranks, who may have other things to do then."""
        one = torch.zeros(1, device=self.device)
        for group in self.groups.values():
            dist.all_reduce(one, group=group)
        for way, stage in () if self.symmetric else self._pipes:
            if self.stage in (stage, stage + 1):
                sends = (way == "down") == (self.stage == stage)
                other = stage + 1 if self.stage == stage else stage
                if sends:
                    self.send([one], other)()
                else:
                    self.receive([(tuple(one.shape), one.dtype)], other)

    def reserve(self, messages: Mapping[int, int], sums: int, posts: int, *, flight: Sequence[int], lanes: int) -> None:
        """Make room for what micro-batches send. All ranks call it, when none of them is on its way.

        Args:
            messages: by neighbouring stage, the bytes of the largest message from there.
            sums: bytes of the largest tensor that the shards sum.
            posts: bytes of the largest tensor that is posted.
            flight: by stage, micro-batches that may be on their way.
            lanes: micro-batches that sum at a time.
        """
        if not self.symmetric:
            return
        torch.cuda.synchronize(self.device)  # others may still write what is let go
        everybody: list[tuple[int, Mapping[int, int], int]] = self.objects((self.stage, messages, sums))
        for way, stage in self._pipes:
            source, target = (stage, stage + 1) if way == "down" else (stage + 1, stage)
            nbytes = max(given.get(source, 0) for at, given, _ in everybody if at == target)
            if self.stage in (source, target):
                self._pipe_of(way, stage, nbytes, flight[stage] + 1, sends=self.stage == source)
        if self.size("model") > 1 and (self._board is None or posts > self._board.nbytes):
            group = self.groups["model"]
            self._board = Board(posts, self.size("model"), lambda total: self._shared("board", total, group))
        largest = max(own for *_, own in everybody)
        if self.mesh.tp > 1 and largest:
            self._sums_of(largest, lanes)

    def _pipe_of(self, way: str, stage: int, nbytes: int, room: int, *, sends: bool) -> None:
        other, where = (stage + 1 if self.stage == stage else stage), self._to if sends else self._from
        known = where.get(other)
        if nbytes and (known is None or nbytes > known.nbytes or room > known.room):
            shared = self._shared(("pipe", way, stage), room * nbytes, self._pipes[way, stage])
            where[other] = Pipe(shared, nbytes, room, torch.cuda.Stream(self.device) if sends else None)

    def _sums_of(self, nbytes: int, lanes: int) -> None:
        if not self._sums or nbytes > self._sums[0].nbytes or lanes > len(self._sums):
            count, group = self.mesh.tp, self.groups["tp"]
            self._sums = [
                Sums(nbytes, count, lambda total, lane=lane: self._shared(("sums", lane), total, group))  # type: ignore[misc]
                for lane in range(lanes)
            ]

    def _shared(self, name: Any, nbytes: int, group: Any) -> Shared:
        """What was made under this name goes: nothing is on its way, and what was recorded with it is recorded again."""
        self._held.pop(name, None)
        self._held[name] = Shared(nbytes, group, self.device, self._timeout.total_seconds())
        return self._held[name]

    def _own(self, groups: Sequence[Sequence[int]], *, most: str = "") -> Any:
        """The group that this rank is in; every rank makes all of them.

        Args:
            most: NCCL's kernels wait for the other rank on the multiprocessors that they would copy with, beside the layers: how
                many are left to them (`_CTAS`).
        """
        options = None
        if most and self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options.config.max_ctas = _CTAS[most]
        made = [dist.new_group(list(own), timeout=self._timeout, pg_options=options) for own in groups]
        return next((group for own, group in zip(groups, made, strict=True) if self.rank in own), None)

    def size(self, group: str) -> int:
        return dist.get_world_size(self.groups[group])

    # --- between stages ---

    def send(self, tensors: Sequence[Tensor], stage: int) -> Callable[[], None]:
        """Begin to send to the same shard of a neighbouring stage.

        Returns:
            To be called before the tensors are written again, or let go.
        """
        if stage in self._to:
            return self._to[stage].send(tensors)
        to, group = self.mesh.rank(self.replica, stage, self.shard), self._pipe(stage, sends=True)
        works = [dist.isend(tensor, to, group=group) for tensor in tensors]

        def sent() -> None:
            for work in works:
                work.wait()

        return sent

    def receive(self, wanted: Sequence[Form], stage: int) -> list[Tensor]:
        """What the same shard of a neighbouring stage sends next; what follows in the current stream waits for it."""
        if stage in self._from:
            return self._from[stage].receive(wanted)
        other, group = self.mesh.rank(self.replica, stage, self.shard), self._pipe(stage, sends=False)
        found = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in wanted]
        works = [dist.irecv(tensor, other, group=group) for tensor in found]
        for work in works:
            work.wait()
        return found

    def _pipe(self, stage: int, *, sends: bool) -> Any:
        assert abs(stage - self.stage) == 1, f"stage {self.stage} has no way to stage {stage}"
        way = "down" if (stage > self.stage) == sends else "up"
        return self._pipes[way, min(stage, self.stage)]

    # --- sums ---

    def begin(self, slot: int) -> None:
        """What is summed next belongs to the micro-batch of one slot; it may be recorded, up to the next call."""
        if self._sums:
            self._lane = slot % len(self._sums)
            self._sums[self._lane].begin()

    def sum_(self, tensors: Sequence[Tensor], group: str) -> None:
        """Make every tensor its sum over the group's ranks, in the order of the ranks, whatever else is summed."""
        if self.size(group) == 1 or not tensors:
            return
        # One bucket is put together and one taken apart while another is under way.
        waiting: list[Callable[[], None]] = []
        for bucket in _buckets(tensors):
            waiting.append(self._summing(bucket, group))
            if len(waiting) > 1:
                waiting.pop(0)()
        for write in waiting:
            write()

    def _summing(self, bucket: Sequence[Tensor], group: str) -> Callable[[], None]:
        """Begin to sum tensors; what it returns waits for their sums, and writes them."""
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        two = self.size(group) == 2  # a + b is b + a
        each = flat[None] if two else flat.new_empty(self.size(group), flat.numel())
        of = self.groups[group]
        work = (
            dist.all_reduce(flat, group=of, async_op=True)
            if two
            else dist.all_gather_into_tensor(each.view(-1), flat, group=of, async_op=True)
        )

        def write() -> None:
            work.wait()
            total = each[0]
            for part in each[1:]:
                total += part
            parts = total.split([tensor.numel() for tensor in bucket])
            # Hundreds of tensors in few launches: beside layers each launch waits for a multiprocessor.
            torch._foreach_copy_(bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)])

        return write

    def total(self, tensor: Tensor, group: str) -> Tensor:
        """The sum of everybody's tensor, in the order of the ranks; the tensor is left as it is.

        Over more than two ranks each sums one piece of all, in float32, and hands it to the others: a ring's bytes, but in order.
        """
        if group == "tp" and self._sums:
            return self._sums[self._lane].total(tensor)
        count = self.size(group)
        if count <= 2:
            found = tensor.clone(memory_format=torch.contiguous_format)
            if count == 2:  # a + b is b + a
                dist.all_reduce(found, group=self.groups[group])
            return found
        flat = torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % count))
        pieces = torch.empty_like(flat)
        dist.all_to_all_single(pieces, flat, group=self.groups[group])
        first, *others = pieces.view(count, -1)
        own = first.float()
        for piece in others:
            own = own + piece
        found = torch.empty_like(flat)
        dist.all_gather_into_tensor(found, own.to(tensor.dtype), group=self.groups[group])
        return found[: tensor.numel()].view(tensor.shape)

    def gather(self, tensor: Tensor, group: str) -> Tensor:
        """[ranks of the group, *shape]: everybody's tensor of one shape, in the order of the ranks."""
        found = tensor.new_empty(self.size(group), *tensor.shape)
        dist.all_gather_into_tensor(found.view(-1) if tensor.dim() else found, tensor.reshape(-1), group=self.groups[group])
        return found

    @property
    def places(self) -> int:
        """To how many places may be posted."""
        return sys.maxsize if self._board is None else self._board.room

    def post(self, place: int, tensor: Tensor) -> None:
        """Give the ranks of one copy of the model a small tensor, for when they `read` it there.

        Nobody may post to a place again before all have read it.
        """
        if self._board is None:
            self._posted[place] = tensor
        else:
            self._board.post(place, tensor)

    def read(self, place: int, wanted: Form) -> Tensor:
        """[ranks of "model", *shape]: what they posted to a place. All of them read in one order."""
        if self._board is None:
            return self.gather(self._posted.pop(place), "model")
        return self._board.read(place, wanted)

    # --- what is no tensor of a device ---

    def objects(self, own: Any) -> list[Any]:
        """Everybody's object, by rank."""
        found: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(found, own, group=self.control)
        return found

    def by_all(self, work: Callable[[], T]) -> T:
        """What this rank's work comes to, which speaks to no other; where it refuses (ValueError), every rank does.

        Raises:
            ValueError: this rank's own, or else that of the first one that has any.
        """
        found, refused = [], ""
        try:
            found.append(work())
        except ValueError as error:
            refused = str(error)
        others = [text for text in self.objects(refused) if text]
        if not found or others:
            raise ValueError(refused or others[0])
        return found[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)


_JOINED: list[Ranks] = []


def join(ranks: Ranks | None) -> None:
    """Make these the ranks that operators of compiled text speak to (None: nobody). A process is one rank of one mesh."""
    _JOINED[:] = [] if ranks is None else [ranks]


def joined() -> Ranks:
    """What `join` was told last."""
    assert _JOINED, "a collective outside of a mesh: compile with Options.mesh, or runtime.comm.join"
    return _JOINED[0]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype after another, some at a time."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in (own for own in tensors if own.dtype == dtype):
            if bucket and sum(own.numel() for own in bucket) + tensor.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        if bucket:
            yield bucket
