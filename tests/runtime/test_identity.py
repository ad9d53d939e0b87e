"""What a checkpoint says of the backbone it was saved over is the same on every mesh."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.identity import sample
from runtime.tables import Shard


def backbone() -> dict[str, Tensor]:
    """80 matrices, more than are taken, and what is passed over."""
    generator = torch.Generator().manual_seed(0)
    found = {f"layers.{number}.weight": torch.randn(8, 4, generator=generator) for number in range(80)}
    return found | {"norm.weight": torch.ones(4), "mask": torch.ones(4, 4, dtype=torch.bool), "nan": torch.full((8, 4), torch.nan)}


class Peers:
    """Ranks that are threads."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given = Barrier(count), [None] * count

    def of(self, rank: int, shard: int) -> Any:
        peers = self

        class Own:
            def __init__(self) -> None:
                self.shard = shard

            def objects(self, own: Any) -> list[Any]:
                peers.given[rank] = own
                peers.barrier.wait(10)
                return list(peers.given)

        return Own()


def piece(name: str, value: Tensor, shard: int, shards: int) -> Tensor:
    """Some are cut by rows, some by columns, some are whole."""
    how = sum(map(ord, name)) % 3
    return value if how == 2 or value.dim() == 1 else Shard(how, shard, shards).cut(value)


@pytest.mark.parametrize(("stages", "shards"), [(2, 1), (1, 2), (4, 1), (2, 4)])
def test_all_ranks_of_every_mesh_find_what_one_process_finds(stages: int, shards: int) -> None:
    whole = backbone()
    alone = sample(whole, None)
    assert 60 < len(alone) <= 64
    assert alone == {name: ("float32", float(whole[name][0, 0])) for name in alone}
    parts = []
    for stage in range(stages):
        own = {name: value for number, (name, value) in enumerate(whole.items()) if number * stages // len(whole) == stage}
        parts += [{name: piece(name, value, shard, shards) for name, value in own.items()} for shard in range(shards)]
    peers = Peers(len(parts))
    with ThreadPoolExecutor(len(parts)) as pool:
        ranks = [peers.of(rank, rank % shards) for rank in range(len(parts))]
        assert all(found == alone for found in pool.map(sample, parts, ranks))
