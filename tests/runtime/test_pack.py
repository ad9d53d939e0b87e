"""Every token of every example lands in one row of one chunk, and what a task's blocks hold follows from its own data alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.pack
from codegen.tiling import chunk_tokens
from codegen.tiling import geometry as geometry_for
from runtime.examples import IGNORE, Example
from runtime.fill import Fill, fill
from runtime.pack import Chunk, Geometry, Piece, pack
from runtime.place import Place, packing, place
from runtime.place import rows as computed_rows

Batches = dict[str, list[Example]]


def example(length: int, first: int, *, labelled: bool = True) -> Example:
    """Ids that count up from `first`, so that every token of a call is told apart."""
    ids = np.arange(first, first + length)
    labels = ids + 1000
    labels[::3] = IGNORE
    return Example(ids, labels if labelled else np.full_like(ids, IGNORE))


def batches_of(lengths: Mapping[str, Sequence[int]], *, unlabelled: frozenset[str] = frozenset()) -> Batches:
    first, found = 1, Batches()
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


def lengths_for(geometry: Geometry) -> st.SearchStrategy[list[int]]:
    """Most sequences fit a chunk; some are cut, in up to four pieces, with and without a whole first one."""
    whole, cut = st.integers(1, geometry.tokens), st.integers(geometry.tokens + 1, 4 * geometry.tokens)
    return st.lists(st.one_of(whole, whole, cut), min_size=1, max_size=6)


@st.composite
def calls(draw: st.DrawFn, names: str = "abc") -> tuple[Geometry, Batches]:
    geometry = draw(geometries())
    lengths = lengths_for(geometry)
    tasks = list(names[: draw(st.integers(1, len(names)))])
    silent = frozenset(draw(st.lists(st.sampled_from(tasks), max_size=1)))
    return geometry, batches_of({task: draw(lengths) for task in tasks}, unlabelled=silent)


def rows_of(chunk: Chunk, geometry: Geometry) -> list[tuple[str, int, int, int]]:
    """(task, example, position, id) of every row that is not padding."""
    tensors = chunk.tensors
    columns = (tensors[name].flatten().tolist() for name in ("sequences", "positions", "input_ids"))
    return [(chunk.block_tasks[row // geometry.tile], *found) for row, found in enumerate(zip(*columns, strict=True)) if found[2]]


def backwards(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks in the order of their backwards: a cut sequence's from its last piece to its first."""
    found: list[Chunk] = []
    chain: list[Chunk] = []
    for chunk in chunks:
        chain.insert(0, chunk)
        if chunk.piece is None or chunk.piece.begin + chunk.piece.rows == chunk.piece.total:
            found += chain
            chain = []
    assert not chain, "a chain without its last piece"
    return found


@given(call=calls())
def test_every_row_of_every_example_stands_in_one_chunk_with_its_place_in_the_call(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    found = [row for chunk in pack(batches, geometry) for row in rows_of(chunk, geometry)]
    assert sorted(found) == sorted(
        (task, index, position, int(one.input_ids[position]))
        for task, given_ in batches.items() for index, one in enumerate(given_) for position in range(len(one))
    )  # fmt: skip


@given(call=calls())
def test_a_sequence_that_fits_a_chunk_is_not_cut_and_positions_ascend(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    for chunk in pack(batches, geometry):
        ids, positions = chunk.tensors["input_ids"][0], chunk.tensors["positions"].tolist()
        assert chunk.tensors["position_ids"][0].tolist() == positions
        for start, stop in pairwise(chunk.tensors["cu_seqlens"].tolist()):
            if stop == start or not ids[start:stop].any():
                continue
            task, index = chunk.block_tasks[start // geometry.tile], int(chunk.tensors["sequences"][start])
            begin, length = positions[start], len(batches[task][index])
            assert positions[start:stop] == list(range(begin, begin + stop - start))
            if (begin, stop - start) != (0, length):
                assert start == 0, "a piece stands in the first rows"
                assert chunk.piece == Piece(task, index, begin, stop, length)
        if chunk.piece is not None:
            assert chunk.tensors["cu_seqlens"][1] == chunk.piece.rows


@given(call=calls())
def test_a_longer_sequence_is_a_chain_of_whole_chunks_behind_what_they_leave_over(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    chunks = list(pack(batches, geometry))
    cut = [chunk.piece for chunk in chunks if chunk.piece is not None]
    lengths = {(task, index): len(one) for task, given_ in batches.items() for index, one in enumerate(given_)}
    chains = [key for key, length in lengths.items() if length > geometry.tokens]
    assert list(dict.fromkeys((piece.task, piece.index) for piece in cut)) == chains
    assert [chunk.piece is None for chunk in chunks] == sorted(chunk.piece is None for chunk in chunks), "chains come first"
    for key in chains:
        chain = [piece for piece in cut if (piece.task, piece.index) == key]
        total, first = lengths[key], chain[0]
        assert first.rows == (total % geometry.tokens or geometry.tokens)
        assert [piece.rows for piece in chain[1:]] == [geometry.tokens] * (len(chain) - 1)
        assert [piece.begin for piece in chain] == [0, *range(first.rows, total, geometry.tokens)]
        assert all(piece.total == total for piece in chain)


def test_the_last_row_of_a_piece_predicts_the_first_id_of_the_next() -> None:
    geometry = Geometry(16, 16, 12, 16, 4, 16)
    ids = np.arange(1, 41)
    first, second, third = pack({"a": [Example(ids, ids)]}, geometry)
    assert [chunk.piece.rows for chunk in (first, second, third) if chunk.piece] == [8, 16, 16]
    assert first.targets[first.rows < 16].tolist() == list(range(2, 10))
    assert second.targets[second.rows < 16].tolist() == list(range(10, 26))
    assert third.targets[third.rows < 16].tolist() == list(range(26, 41))
    assert {weight for chunk in (first, second, third) for weight in chunk.weights.unique().tolist() if weight} == {
        torch.tensor(1 / 39).item()
    }


@given(call=calls())
def test_a_block_belongs_to_one_task_and_the_rest_is_padding(call: tuple[Geometry, Batches]) -> None:
    geometry, batches = call
    owner = {int(token): task for task, given_ in batches.items() for one in given_ for token in one.input_ids}
    chunks = pack(batches, geometry)
    assert chunks.filled == [geometry.tile * sum(map(bool, chunk.block_tasks)) for chunk in chunks]
    for chunk in chunks:
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
        assert set(tensors) == {"input_ids", "position_ids", "cu_seqlens", "bounds", "sequences", "positions", "virtual"}
        assert tensors["input_ids"].shape == tensors["position_ids"].shape == (1, geometry.tokens)
        assert tensors["input_ids"].dtype == tensors["position_ids"].dtype == torch.int64
        borders = tensors["cu_seqlens"]
        assert borders.shape == (geometry.sequences + 1,)
        assert borders.dtype == tensors["bounds"].dtype == torch.int32
        assert borders[0] == 0
        assert borders[-1] == geometry.tokens
        assert (borders.diff() >= 0).all()
        (bound, most), longest = tensors["bounds"].tolist(), borders.diff().max().item()
        assert longest <= bound <= max(2 * longest - 2, geometry.tile)
        assert bound == geometry.tokens or (bound // geometry.tile).bit_count() == 1, "few bounds: a record is kept for each"
        assert tensors["bounds"].device.type == "cpu"
        count = int((borders < geometry.tokens).sum())
        assert count <= most <= max(3 * count // 2, 64)
        assert borders[most] == geometry.tokens, "entries beyond the bound are empty"
        odd = most // (most & -most)
        assert most == geometry.sequences or odd in (1, 3), "few bounds: a record is kept for each"


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


@pytest.mark.parametrize("shared", [True, False])
@given(call=calls())
def test_the_labelled_rows_predict_the_next_token_with_weights_that_sum_to_one(
    call: tuple[Geometry, Batches], shared: bool
) -> None:
    geometry, batches = call
    counted: dict[str, list[tuple[int, int]]] = {task: [] for task in batches}
    sums = dict.fromkeys(batches, 0.0)
    for chunk in pack(batches, geometry, shared=shared):
        assert len(chunk.head_tasks) == len(chunk.rows)
        assert chunk.rows.shape == chunk.targets.shape == chunk.weights.shape
        assert chunk.rows.shape[1] == geometry.head_rows
        assert chunk.rows.dtype == chunk.targets.dtype == torch.int64
        assert chunk.weights.dtype == torch.float32
        ids = chunk.tensors["input_ids"][0]
        owners = [chunk.block_tasks[row // geometry.tile] for row in chunk.rows.flatten().tolist() if row < geometry.tokens]
        assert owners == sorted(owners, key=owners.index), "a task's rows stand together"
        for rows, targets, weights, first in zip(chunk.rows, chunk.targets, chunk.weights, chunk.head_tasks, strict=True):
            real = rows < geometry.tokens
            assert real[0]
            assert not weights[~real].any()
            assert not targets[~real].any(), "the target of nobody's row must be a class that exists"
            assert (rows[~real] == geometry.tokens).all()
            tasks = [chunk.block_tasks[int(row) // geometry.tile] for row in rows[real]]
            assert tasks[0] == first
            assert shared or set(tasks) == {first}, "a block of the loss belongs to one task"
            for task, row, target, weight in zip(tasks, rows[real], targets[real], weights[real], strict=True):
                counted[task].append((int(ids[row]), int(target)))
                sums[task] += float(weight)
    for task, given_ in batches.items():
        expected = [
            (int(one.input_ids[place]), int(one.labels[place + 1]))
            for one in given_ for place in range(len(one) - 1) if one.labels[place + 1] != IGNORE
        ]  # fmt: skip
        assert sorted(counted[task]) == sorted(expected)
        assert sums[task] == pytest.approx(1.0 if expected else 0.0, abs=1e-5)


def test_tasks_share_blocks_of_the_loss_where_they_may() -> None:
    geometry, batches = Geometry(96, 16, 40, 16, 4, 32), batches_of({"a": [20, 20], "b": [20]})
    ((shared,), (apart,)) = (list(pack(batches, geometry, shared=own)) for own in (True, False))
    # Each sequence has 13 rows that predict, in a tile of 16.
    assert (len(shared.rows), shared.head_tasks) == (2, ("a", "b"))
    assert (len(apart.rows), apart.head_tasks) == (2, ("a", "b"))
    batches = batches_of({"a": [20], "b": [20], "c": [20]})
    ((shared,), (apart,)) = (list(pack(batches, geometry, shared=own)) for own in (True, False))
    assert (len(shared.rows), shared.head_tasks) == (2, ("a", "c"))
    assert (len(apart.rows), apart.head_tasks) == (3, ("a", "b", "c"))
    assert [tile[0] < geometry.tokens for tile in shared.rows.view(-1, geometry.head_tile)] == [True, True, True, False]


def test_a_task_without_a_label_in_a_chunk_has_no_block_of_the_loss_there() -> None:
    geometry = Geometry(32, 16, 12, 16, 4, 8)
    batches = {"a": [example(16, 1, labelled=False), example(16, 17, labelled=False), example(16, 33)]}
    first, second = pack(batches, geometry)
    assert first.rows.shape == (0, 8)
    assert second.rows.shape == (2, 8)
    assert float(second.weights.sum()) == pytest.approx(1.0)


def test_a_weight_is_one_over_the_labels_of_the_whole_call() -> None:
    geometry = Geometry(16, 16, 12, 16, 4, 8)
    chunks = list(pack({"a": [example(16, 1), example(10, 17)]}, geometry))
    count = sum(one.labelled for one in (example(16, 1), example(10, 17)))
    assert len(chunks) == 2
    for chunk in chunks:
        assert set(chunk.weights.unique().tolist()) <= {0.0, torch.tensor(1 / count).item()}


# --- no neighbour changes anything --------------------------------------------------------------------------------------


def blocks_of(task: str, chunks: Sequence[Chunk], geometry: Geometry) -> list[list[list[int]]]:
    """The task's blocks in their order: every tensor of theirs, and the borders within."""
    found = []
    for chunk in chunks:
        borders = set(chunk.tensors["cu_seqlens"].tolist())
        for block, owner in enumerate(chunk.block_tasks):
            if owner == task:
                rows = slice(block * geometry.tile, (block + 1) * geometry.tile)
                columns = [
                    chunk.tensors[name].flatten()[rows].tolist() for name in ("input_ids", "sequences", "positions", "virtual")
                ]
                found.append([*columns, [row - rows.start for row in range(rows.start, rows.stop) if row in borders]])
    return found


def loss_of(task: str, chunks: Sequence[Chunk], geometry: Geometry) -> list[tuple[int, int, float]]:
    return [
        (int(chunk.tensors["input_ids"][0][row]), int(target), float(weight))
        for chunk in chunks
        for row, target, weight in zip(chunk.rows.flatten(), chunk.targets.flatten(), chunk.weights.flatten(), strict=True)
        if row < geometry.tokens and chunk.block_tasks[int(row) // geometry.tile] == task
    ]


@given(call=calls("abc"), data=st.data(), place=st.integers(0, 3))
def test_a_tasks_rows_and_blocks_have_one_order_whoever_else_is_in_the_call(
    call: tuple[Geometry, Batches], data: st.DataObject, place: int
) -> None:
    geometry, others = call
    mine = [example(length, 5000 + 500 * index) for index, length in enumerate(data.draw(lengths_for(geometry)))]
    alone = list(pack({"me": mine}, geometry))
    tasks = list(others)
    tasks.insert(place, "me")
    among = list(pack({task: mine if task == "me" else others[task] for task in tasks}, geometry))
    # Training adds up in the order of the backwards, evaluation in that of the chunks.
    for one, other in ((alone, among), (backwards(alone), backwards(among))):
        assert blocks_of("me", one, geometry) == blocks_of("me", other, geometry)
        assert loss_of("me", one, geometry) == loss_of("me", other, geometry)


def order_of(task: str, places: Sequence[Place]) -> list[tuple[int, ...]]:
    """The task's chains and bundles in the order of the places: a chain's backwards end with its first piece's chunk."""
    found: list[tuple[int, ...]] = []
    for each in places:
        found += [(each.chain[1],)] if each.chain and each.chain[0] == task else []
        found += [bundle.examples for owner, bundle in each.bundles if owner == task]
    return found


# Numbers alone are cheap, and an order breaks in few of the cases.
@settings(max_examples=10 * settings().max_examples)
@given(geometry=geometries(), data=st.data(), at=st.integers(0, 2))
def test_no_neighbour_reorders_a_tasks_bundles(geometry: Geometry, data: st.DataObject, at: int) -> None:
    own, *others = (data.draw(lengths_for(geometry)) for _ in range(3))
    call = list(zip(["other", "another"], others, strict=True))
    call.insert(at, ("me", own))
    assert order_of("me", place(dict(call), geometry)) == order_of("me", place({"me": own}, geometry))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        # The second bundle would fit beside the neighbour, where the first did not.
        ([32, 16], [48]),
        # The second would fit beside the first piece of the neighbour's chain, before the task's own.
        ([64 + 64, 16], [64 + 16]),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bundle_does_not_pass_one_before_it_although_there_is_room(own: list[int], other: list[int], first: bool) -> None:
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    call = {"me": own, "other": other} if first else {"other": other, "me": own}
    assert order_of("me", place(call, geometry)) == order_of("me", place({"me": own}, geometry))


def test_a_long_neighbour_does_not_part_a_bundle() -> None:
    # Two sequences that share a block alone share it here too, although the first would fit in front of the neighbour's end.
    geometry = Geometry(32, 16, 12, 16, 4, 8)
    mine = [example(6, 1), example(6, 7)]
    chunks = list(pack({"other": [example(20, 100)], "me": mine}, geometry))
    assert blocks_of("me", chunks, geometry) == blocks_of("me", list(pack({"me": mine}, geometry)), geometry)
    assert [chunk.tasks for chunk in chunks] == [("other",), ("me",)]


# --- economy ------------------------------------------------------------------------------------------------------------


def test_short_examples_share_blocks() -> None:
    geometry = Geometry(64, 16, 40, 64, 16, 8)
    (chunk,) = pack(batches_of({"a": [4] * 8, "b": [16, 16]}), geometry)
    assert chunk.block_tasks == ("a", "a", "b", "b")


def test_tasks_fill_one_chunk_before_another_begins() -> None:
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    chunks = list(pack(batches_of({"a": [16] * 3, "b": [16] * 3}), geometry))
    assert [chunk.block_tasks for chunk in chunks] == [("a", "a", "a", "b"), ("b", "b", "", "")]


def test_a_bundle_takes_the_sequences_that_fill_it_best_and_keeps_their_order() -> None:
    # 10 + 6 and 9 + 7 fill two blocks; in the order of the call they would take three.
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    (chunk,) = pack(batches_of({"a": [6, 9, 10, 7]}), geometry)
    assert chunk.block_tasks == ("a", "a", "", "")
    assert chunk.tensors["sequences"][:32].tolist() == [0] * 6 + [2] * 10 + [1] * 9 + [3] * 7


def test_short_sequences_fill_the_last_block_of_a_long_one() -> None:
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    (chunk,) = pack(batches_of({"a": [40, 5, 3]}), geometry)
    assert chunk.block_tasks == ("a", "a", "a", "")


def test_bundles_stand_beside_the_first_piece_of_their_own_task_and_of_others() -> None:
    geometry = Geometry(64, 16, 40, 16, 4, 8)
    chunks = list(pack(batches_of({"a": [16, 80, 144], "b": [16, 16, 16]}), geometry))
    assert [chunk.block_tasks for chunk in chunks] == [
        ("a", "a", "b", "b"), ("a",) * 4, ("a", "b", "", ""), ("a",) * 4, ("a",) * 4,
    ]  # fmt: skip
    assert [chunk.piece.index if chunk.piece else None for chunk in chunks] == [1, 1, 2, 2, 2]


@given(geometry=geometries(), data=st.data())
def test_no_task_computes_more_rows_than_one_sequence_a_bundle_would(geometry: Geometry, data: st.DataObject) -> None:
    lengths = data.draw(lengths_for(geometry))
    least = geometry.blocks(sum(lengths))
    assert least <= computed_rows(lengths, geometry) <= sum(geometry.blocks(length) for length in lengths)
    chunks = pack(batches_of({"a": lengths}), geometry)
    assert computed_rows(lengths, geometry) == geometry.tile * sum(chunk.block_tasks.count("a") for chunk in chunks)


@given(geometry=geometries(), data=st.data())
def test_chunks_are_nearly_as_few_as_their_rows_allow(geometry: Geometry, data: st.DataObject) -> None:
    # Bounds hold where entries of cu_seqlens are not what runs out.
    geometry = replace(geometry, sequences=3 * geometry.tokens)
    lengths = {task: data.draw(lengths_for(geometry)) for task in "abcd"}
    sizes = [bundle.size.rows for given_ in lengths.values() for bundle in packing(given_, geometry).rest]
    plain = [each.rows for each in place(lengths, geometry) if each.chain is None]
    # All but the last lack less than the largest bundle has: at most T / 8 of it means 8/7 of the least and one.
    assert all(held > geometry.tokens - max(sizes) for held in plain[:-1])
    assert all(one + other > geometry.tokens for one, other in pairwise(plain))


def test_a_task_alone_fills_its_chunks_although_its_bundles_never_go_back() -> None:
    # Ordered by length, the bundles of 0.2 T would all come behind the ten chunks that those of 0.6 T begin.
    geometry = Geometry(1600, 16, 400, 160, 8, 64)
    assert len(place({"a": [960] * 10 + [320] * 20}, geometry)) == 10
    # Bundles of 112, 112 and then of two times 80: the larger come first although they were begun later.
    assert len(place({"a": [112, 112, 80, 80, 80, 80]}, Geometry(272, 16, 400, 160, 8, 64))) == 2


def test_a_thousand_tasks_of_any_length_are_placed_without_a_tensor() -> None:
    lengths = random.Random(0)
    call = {f"task {index}": [lengths.randint(10, 100_000) for _ in range(20)] for index in range(1000)}
    call |= {f"short {index}": [10] * 20 for index in range(1000)}
    geometry = geometry_for(torch.device("cuda"), 8192)
    found = fill(call, geometry)
    # A chain's first chunk is half empty on average, and only short sequences may stand there.
    assert found.tokens <= found.computed <= 1.1 * found.tokens


def test_a_chunk_is_built_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(runtime.pack, "_chunk", lambda *_: built.append(1))
    chunks = pack(batches_of({"a": [16] * 100}), Geometry(16, 16, 12, 16, 4, 8))
    assert len(chunks) == 100
    assert not built
    next(iter(chunks))
    assert len(built) == 1


def test_the_fill_compares_chunks_with_padding_and_plain_packing() -> None:
    geometry = Geometry(64, 16, 40, 64, 4, 8)
    found = fill({"a": [10, 20, 30], "b": [40], "c": [100]}, geometry)
    # "a" takes the 64 rows of a chunk, "b" 48, "c" 48 and then 64: "b" finds no room beside any.
    assert found == Fill(tokens=200, chunks=4, computed=256, padded=230, padded_together=500, packed=16 + 32 + 32 + 48 + 112)
    assert str(found) == (
        "200 tokens in 256 (78%) rows of 4 chunks; plainly packed 240 (83%), "
        "padded to each task's longest 230 (87%), to the longest of all 500 (40%)"
    )
    assert str(fill({}, geometry)).startswith("0 tokens in 0 rows of 0 chunks")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", [1, 16, 32, 48, 64, 80, 100, 512, None])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_shortest_examples_fit_every_geometry_that_is_chosen(kind: str, asked: int | None, length: int) -> None:
    geometry = geometry_for(torch.device(kind), chunk_tokens(torch.device(kind), asked, 0))
    count = 2 * geometry.tokens // length + 1 if geometry.tokens <= 512 else 300
    chunks = list(pack(batches_of({"a": [length] * count, "b": [length] * 5}), geometry))
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
    assert chunk.tensors["bounds"].tolist() == [geometry.tokens, min(64, geometry.sequences)]


@given(call=calls(), virtual=st.integers(0, 3), offset=st.integers(0, 5))
def test_virtual_tokens_stand_before_each_sequence_of_their_task_alone(
    call: tuple[Geometry, Batches], virtual: int, offset: int
) -> None:
    geometry, batches = call
    first, *_ = batches
    prompted = batches | {first: [one.prompted(virtual, offset) for one in batches[first]]}
    seen = []
    for chunk in pack(prompted, geometry):
        tensors = chunk.tensors
        columns = (tensors[name].flatten().tolist() for name in ("virtual", "sequences", "positions", "position_ids", "input_ids"))
        for row, (learned, index, position, position_id, token) in enumerate(zip(*columns, strict=True)):
            own = chunk.block_tasks[row // geometry.tile] == first
            if learned >= 0:
                assert own
                assert (learned, token) == (position, 0)
                seen.append((index, learned))
            if token or learned >= 0:
                assert position_id == position + (offset if own else 0)
                assert learned >= 0 or not own or position >= virtual
    assert sorted(seen) == [(index, place) for index in range(len(batches[first])) for place in range(virtual)]


def test_behind_virtual_tokens_the_first_real_one_is_predicted_as_well() -> None:
    example = Example(np.array([5, 6, 7]), np.array([5, -100, 7]))
    assert example.labelled == 1
    assert example.prompted(2, 0).labelled == 2
    assert example.prompted(0, 4).labelled == 1
    assert example.prompted(0, 0) is example
