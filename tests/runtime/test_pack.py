"""Every token of every example lands in one row of one chunk, and what a task's blocks hold follows from its own data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from codegen.tiling import chunk_tokens
from codegen.tiling import geometry as geometry_for
from runtime.examples import IGNORE, Example
from runtime.pack import Chunk, Geometry, pack

Batches = dict[str, list[Example]]


def example(length: int, first: int, *, labelled: bool = True) -> Example:
    """Ids that count up from `first`, so that every token of a call is told apart."""
    ids = torch.arange(first, first + length)
    labels = ids + 1000
    labels[::3] = IGNORE
    return Example(ids, labels if labelled else torch.full_like(ids, IGNORE))


def batches_of(lengths: Mapping[str, Sequence[int]], *, unlabelled: frozenset[str] = frozenset()) -> Batches:
    first, found = 1, {}
    for task, given_ in lengths.items():
        found[task] = []
        for length in given_:
            found[task].append(example(length, first, labelled=task not in unlabelled))
            first += length
    return found


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    tile, blocks = draw(st.sampled_from([4, 16])), draw(st.integers(1, 6))
    tokens, most = tile * blocks, draw(st.integers(1, 5))
    sequences = blocks + most + 1 + draw(st.integers(0, 8))
    return Geometry(tokens, tile, sequences, draw(st.integers(1, tokens)), most, draw(st.sampled_from([1, 8, 64])))


@st.composite
def calls(draw: st.DrawFn, names: str = "abc") -> tuple[Geometry, Batches]:
    geometry = draw(geometries())
    lengths = st.lists(st.integers(1, geometry.tokens), min_size=1, max_size=6)
    tasks = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    silent = frozenset(draw(st.lists(st.sampled_from(tasks), max_size=1)))
    return geometry, batches_of({task: draw(lengths) for task in tasks}, unlabelled=silent)


def sequences_of(chunk: Chunk, geometry: Geometry) -> list[tuple[str, Tensor, Tensor]]:
    """(task, ids, positions) of every sequence that is not padding, in the order of the rows."""
    found = []
    ids, positions = chunk.tensors["input_ids"][0], chunk.tensors["position_ids"][0]
    for start, stop in pairwise(chunk.tensors["cu_seqlens"].tolist()):
        if stop > start and ids[start:stop].any():
            found.append((chunk.block_tasks[start // geometry.tile], ids[start:stop], positions[start:stop]))
    return found


@given(call=calls())
def test_every_example_is_one_sequence_of_one_chunk_in_its_tasks_order(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    found: dict[str, list[list[int]]] = {task: [] for task in batches}
    for chunk in pack(batches, geometry):
        for task, ids, positions in sequences_of(chunk, geometry):
            found[task].append(ids.tolist())
            assert positions.tolist() == list(range(len(ids))), "positions restart with each sequence"
    assert found == {task: [one.input_ids.tolist() for one in given_] for task, given_ in batches.items()}


@given(call=calls())
def test_a_block_belongs_to_one_task_and_the_rest_is_padding(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    owner = {int(token): task for task, given_ in batches.items() for one in given_ for token in one.input_ids}
    for chunk in pack(batches, geometry):
        assert len(chunk.block_tasks) == geometry.tokens // geometry.tile
        for block, rows in enumerate(chunk.tensors["input_ids"][0].split(geometry.tile)):
            assert {owner[int(token)] for token in rows if token} <= {chunk.block_tasks[block]}
            if not chunk.block_tasks[block]:
                assert not rows.any()
        # A task's blocks are contiguous, and padding comes last.
        assert [task for index, task in enumerate(chunk.block_tasks) if index == 0 or chunk.block_tasks[index - 1] != task] == list(
            dict.fromkeys(chunk.block_tasks)
        )
        assert "" not in chunk.block_tasks[: chunk.block_tasks.index("")] if "" in chunk.block_tasks else True
        assert chunk.tasks == tuple(dict.fromkeys(task for task in chunk.block_tasks if task))
        assert chunk.tasks, "a chunk of nobody"


@given(call=calls())
def test_the_shapes_are_static_and_the_borders_ascend_from_zero_to_all_rows(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    for chunk in pack(batches, geometry):
        tensors = chunk.tensors
        assert set(tensors) == {"input_ids", "position_ids", "cu_seqlens", "longest", "sequences", "positions", "virtual"}
        assert tensors["input_ids"].shape == tensors["position_ids"].shape == (1, geometry.tokens)
        assert tensors["input_ids"].dtype == tensors["position_ids"].dtype == torch.int64
        borders = tensors["cu_seqlens"]
        assert borders.shape == (geometry.sequences + 1,)
        assert borders.dtype == tensors["longest"].dtype == torch.int32
        assert borders[0] == 0
        assert borders[-1] == geometry.tokens
        assert (borders.diff() >= 0).all()
        assert tensors["longest"].item() == borders.diff().max().item()
        assert tensors["longest"].device.type == "cpu"


@given(call=calls())
def test_padding_is_seen_by_no_example(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    for chunk in pack(batches, geometry):
        ids = chunk.tensors["input_ids"][0]
        for start, stop in pairwise(chunk.tensors["cu_seqlens"].tolist()):
            real = ids[start:stop] != 0
            assert real.all() or not real.any(), "a sequence that is partly padding"
            assert real.any() or stop - start <= geometry.tile, "padding costs attention no more than a block"


# --- the loss -----------------------------------------------------------------------------------------------------------


@given(call=calls())
def test_the_labelled_rows_predict_the_next_token_with_weights_that_sum_to_one(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    counted: dict[str, list[tuple[int, int]]] = {task: [] for task in batches}
    sums = dict.fromkeys(batches, 0.0)
    for chunk in pack(batches, geometry):
        assert chunk.rows.shape == chunk.targets.shape == chunk.weights.shape
        assert chunk.rows.shape[1] == geometry.head_rows
        assert chunk.rows.dtype == chunk.targets.dtype == torch.int64
        assert chunk.weights.dtype == torch.float32
        ids = chunk.tensors["input_ids"][0]
        for rows, targets, weights in zip(chunk.rows, chunk.targets, chunk.weights, strict=True):
            real = rows < geometry.tokens
            assert not weights[~real].any()
            assert not targets[~real].any(), "the target of nobody's row must be a class that exists"
            assert (rows[~real] == geometry.tokens).all()
            owners = {chunk.block_tasks[int(row) // geometry.tile] for row in rows[real]}
            assert len(owners) == 1, "a block of the loss belongs to one task"
            (task,) = owners
            counted[task] += [(int(ids[row]), int(target)) for row, target in zip(rows[real], targets[real], strict=True)]
            sums[task] += float(weights.double().sum())
    for task, given_ in batches.items():
        expected = [
            (int(one.input_ids[place]), int(one.labels[place + 1]))
            for one in given_ for place in range(len(one) - 1) if one.labels[place + 1] != IGNORE
        ]  # fmt: skip
        assert counted[task] == expected
        assert sums[task] == pytest.approx(1.0 if expected else 0.0, abs=1e-5)


def test_a_task_without_a_label_in_a_chunk_has_no_block_of_the_loss_there() -> None:
    geometry = Geometry(32, 16, 12, 16, 4, 8)
    batches = {"a": [example(16, 1, labelled=False), example(16, 17, labelled=False), example(16, 33)]}
    first, second = pack(batches, geometry)
    assert first.rows.shape == (0, 8)
    assert second.rows.shape == (2, 8)
    assert float(second.weights.sum()) == pytest.approx(1.0)


def test_a_weight_is_one_over_the_labels_of_the_whole_call() -> None:
    geometry = Geometry(16, 16, 12, 16, 4, 8)
    chunks = pack({"a": [example(16, 1), example(10, 17)]}, geometry)
    count = sum(one.labelled for one in (example(16, 1), example(10, 17)))
    assert len(chunks) == 2
    for chunk in chunks:
        assert set(chunk.weights.unique().tolist()) <= {0.0, torch.tensor(1 / count).item()}


# --- no neighbour changes anything --------------------------------------------------------------------------------------


def blocks_of(task: str, chunks: Sequence[Chunk], geometry: Geometry) -> list[tuple[list[int], list[int], list[int]]]:
    """The task's blocks in their order: ids, positions, and the borders within."""
    found = []
    for chunk in chunks:
        borders = set(chunk.tensors["cu_seqlens"].tolist())
        for block, owner in enumerate(chunk.block_tasks):
            if owner == task:
                rows = slice(block * geometry.tile, (block + 1) * geometry.tile)
                inside = [row - rows.start for row in range(rows.start, rows.stop) if row in borders]
                found.append(
                    (chunk.tensors["input_ids"][0][rows].tolist(), chunk.tensors["position_ids"][0][rows].tolist(), inside)
                )
    return found


def loss_of(task: str, chunks: Sequence[Chunk], geometry: Geometry) -> list[tuple[int, int, float]]:
    return [
        (int(chunk.tensors["input_ids"][0][row]), int(target), float(weight))
        for chunk in chunks
        for row, target, weight in zip(chunk.rows.flatten(), chunk.targets.flatten(), chunk.weights.flatten(), strict=True)
        if row < geometry.tokens and chunk.block_tasks[int(row) // geometry.tile] == task
    ]


@given(call=calls("abc"), own=st.lists(st.integers(1, 40), min_size=1, max_size=6), place=st.integers(0, 3))
def test_a_tasks_blocks_are_the_same_whoever_else_is_in_the_call(
    call: tuple[Geometry, Batches], own: list[int], place: int
) -> None:
    geometry, others = call
    own = [min(length, geometry.tokens) for length in own]
    mine = [example(length, 5000 + 50 * index) for index, length in enumerate(own)]
    alone = pack({"me": mine}, geometry)
    tasks = list(others)
    tasks.insert(place, "me")
    among = pack({task: mine if task == "me" else others[task] for task in tasks}, geometry)
    assert blocks_of("me", alone, geometry) == blocks_of("me", among, geometry)
    assert loss_of("me", alone, geometry) == loss_of("me", among, geometry)


def test_a_long_neighbour_does_not_part_a_bundle() -> None:
    # Two sequences that share a block alone share it here too, although the first would fit in front of the neighbour's end.
    geometry = Geometry(32, 16, 12, 16, 4, 8)
    mine = [example(6, 1), example(6, 7)]
    chunks = pack({"other": [example(20, 100)], "me": mine}, geometry)
    assert blocks_of("me", chunks, geometry) == blocks_of("me", pack({"me": mine}, geometry), geometry)
    assert [chunk.tasks for chunk in chunks] == [("other",), ("me",)]


# --- economy ------------------------------------------------------------------------------------------------------------


def test_short_examples_share_blocks() -> None:
    geometry = Geometry(64, 16, 40, 64, 16, 8)
    (chunk,) = pack(batches_of({"a": [4] * 8, "b": [16, 16]}), geometry)
    assert chunk.block_tasks == ("a", "a", "b", "b")


def test_tasks_fill_one_chunk_before_another_begins() -> None:
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    chunks = pack(batches_of({"a": [16] * 3, "b": [16] * 3}), geometry)
    assert [chunk.block_tasks for chunk in chunks] == [("a", "a", "a", "b"), ("b", "b", "", "")]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", [1, 16, 32, 48, 64, 80, 100, 512, None])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_shortest_examples_fit_every_geometry_that_is_chosen(kind: str, asked: int | None, length: int) -> None:
    geometry = geometry_for(torch.device(kind), chunk_tokens(torch.device(kind), asked, 0))
    count = 2 * geometry.tokens // length + 1 if geometry.tokens <= 512 else 300
    chunks = pack(batches_of({"a": [length] * count, "b": [length] * 5}), geometry)
    assert sum(int((chunk.tensors["input_ids"] != 0).sum()) for chunk in chunks) == length * (count + 5)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(("asked", "longest"), [(None, 0), (None, 700), (None, 9000), (1, 0), (100, 0), (513, 0), (128, 400)])
def test_a_geometry_is_whole_blocks_and_holds_what_is_announced(kind: str, asked: int | None, longest: int) -> None:
    geometry = geometry_for(torch.device(kind), chunk_tokens(torch.device(kind), asked, longest))
    assert geometry.tokens % geometry.tile == 0
    assert geometry.tokens >= (asked if asked is not None else longest)
    assert geometry.bundle_tokens <= geometry.tokens
    assert geometry.tile == {"cpu": 16, "cuda": 128}[kind]
    if asked is not None:
        assert geometry.tokens - asked < geometry.tile
    (chunk,) = pack({"a": [example(geometry.tokens, 1)]}, geometry)
    assert chunk.tensors["longest"].item() == geometry.tokens


@given(call=calls(), virtual=st.integers(0, 3), offset=st.integers(0, 5))
def test_virtual_tokens_stand_before_each_sequence_of_their_task_alone(
    call: tuple[Geometry, Batches], virtual: int, offset: int
) -> None:
    geometry, batches = call
    first, *_ = batches
    longest = max(len(example) for example in batches[first]) + virtual
    assume(longest <= geometry.tokens)
    prompted = batches | {first: [example.prompted(virtual, offset) for example in batches[first]]}
    seen = []
    for chunk in pack(prompted, geometry):
        tensors = chunk.tensors
        task = [chunk.block_tasks[row // geometry.tile] for row in range(geometry.tokens)]
        assert all(task[row] == first for row in (tensors["virtual"] >= 0).nonzero().flatten().tolist())
        for start, stop in pairwise(tensors["cu_seqlens"].tolist()):
            if stop > start and task[start] == first and tensors["input_ids"][0, start + virtual : stop].any():
                seen.append(tensors["virtual"][start : start + virtual].tolist())
                assert (tensors["virtual"][start + virtual : stop] == -1).all()
                assert tensors["position_ids"][0, start:stop].tolist() == list(range(offset, offset + stop - start))
                assert tensors["positions"][start:stop].tolist() == list(range(stop - start))
    assert seen == [list(range(virtual))] * len(batches[first])


def test_behind_virtual_tokens_the_first_real_one_is_predicted_as_well() -> None:
    example = Example(torch.tensor([5, 6, 7]), torch.tensor([5, -100, 7]))
    assert example.labelled == 1
    assert example.prompted(2, 0).labelled == 2
    assert example.prompted(0, 4).labelled == 1
    assert example.prompted(0, 0) is example
