"""Rounds on a mesh: what every replica reckons with, whatever of it is its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from codegen import tiling
from muxcompile.rounds import Rounds
from runtime.comm import Mesh
from tests.backbones import examples_of

GEOMETRY = tiling.geometry(torch.device("cpu"), 64)
GROUPS = (("a", "b"), ("c",))


def units(mesh: Mesh, replica: int, rounds: list[dict[str, list[int]]]) -> list[Any]:
    ranks = SimpleNamespace(replica=replica, mesh=mesh)
    groups: list[Any] = [SimpleNamespace(tasks=own, geometry=GEOMETRY, head=SimpleNamespace(shared=False)) for own in GROUPS]
    executors: list[Any] = [SimpleNamespace(executed=None, loss=lambda names: None) for _ in GROUPS]
    pipeline: Any = SimpleNamespace(ranks=ranks)
    state: Any = SimpleNamespace(device=torch.device("cpu"))
    given_ = [({name: examples_of(name, own) for name, own in each.items()}, list(each)) for each in rounds]
    return [own.unit for own in Rounds(pipeline, state, groups, executors)._units(given_)[1]]


LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=5)
ROUND = st.dictionaries(st.sampled_from("abc"), LENGTHS, min_size=1)


@given(count=st.integers(1, 3), rounds=st.lists(ROUND, min_size=1, max_size=3))
def test_every_replica_reckons_with_the_rows_of_the_one_that_has_most(count: int, rounds: list[dict[str, list[int]]]) -> None:
    mesh = Mesh.parse(f"dp={count},pp=2")
    everybody = [units(mesh, replica, rounds) for replica in range(count)]
    for each in zip(*everybody, strict=True):
        assert len({own.filled for own in each}) == 1
        assert len({own.tasks for own in each}) == 1
        rows = [own.chunks.filled for own in each]
        assert each[0].filled == tuple(
            max((own[index] for own in rows if index < len(own)), default=0) for index in range(max(map(len, rows)))
        )
