"""The turns of a cut sequence: complete chains alone, forwards in order, backwards in reverse, each told whom it follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.carry import Turn, chains, steps, turns
from runtime.examples import Example
from runtime.pack import Chunk, Geometry, pack
from runtime.program import Program

GEOMETRY = Geometry(tokens=16, tile=4, sequences=24, bundle_tokens=8, bundle_sequences=4, head_rows=8)
TRAIN = Program.parse("""
0.compute LOAD chunk[].0 : -> x
0.compute F layer[].0 : x -> y s
0.compute LOSS head[].0 : y -> d.y
0.compute B layer[].0 : d.y s -> grad.layer
""")
EVALUATE = Program.parse("""
0.compute LOAD chunk[].0 : -> x
0.compute F layer[].0 : x -> y
0.compute LOSS head[].0 : y ->
""")


def chunks(*lengths: int) -> list[Chunk]:
    ids = [np.arange(length) for length in lengths]
    return list(pack({"alice": [Example(own, own) for own in ids]}, GEOMETRY))


def shown(turn: Turn) -> tuple[str, int, int | None, int | None, bool]:
    assert turn.chunk.piece is not None
    kinds = "".join(str(action.kind)[0] if action.kind != "LOSS" else "l" for action, _ in turn.steps)
    return kinds, turn.micro, turn.before, turn.after, turn.keeps


def walked(
    train: bool, policy: str, length: int = 40, first: int = 5
) -> list[tuple[tuple[str, int, int | None, int | None, bool], int]]:
    (chain,) = chains(chunks(length))
    evaluate = steps(EVALUATE)
    found = list(turns(chain, steps(TRAIN) if train else evaluate, evaluate, policy=policy, first=first))
    return [(shown(turn), turn.chunk.piece.begin if turn.chunk.piece else 0) for turn in found]


def test_pieces_that_follow_one_another_are_a_chain_and_every_other_chunk_is_one_of_its_own() -> None:
    given = chunks(40, 7, 33, 16, 16)
    found = list(chains(given))
    assert [len(chain) for chain in found] == [3, 3, 1, 1]
    assert [chunk for chain in found for chunk in chain] == given


def test_kept_activations_are_resumed_in_reverse() -> None:
    assert walked(True, "keep") == [
        (("LF", 5, None, None, True), 0),
        (("LF", 6, 5, None, True), 8),
        (("LF", 7, 6, None, False), 24),
        (("lB", 7, 6, None, False), 24),
        (("lB", 6, 5, 7, False), 8),
        (("lB", 5, None, 6, False), 0),
    ]


def test_a_second_forward_runs_right_before_its_backward_and_the_last_piece_needs_none() -> None:
    assert walked(True, "recompute") == [
        (("LF", 5, None, None, True), 0),
        (("LF", 6, 5, None, True), 8),
        (("LFlB", 7, 6, None, False), 24),
        (("LFlB", 8, 5, 7, False), 8),
        (("LFlB", 9, None, 8, False), 0),
    ]


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_evaluation_goes_forward_once(policy: str) -> None:
    assert walked(False, policy) == [
        (("LFl", 5, None, None, True), 0),
        (("LFl", 6, 5, None, True), 8),
        (("LFl", 7, 6, None, False), 24),
    ]


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_a_chunk_of_whole_sequences_runs_its_program_once(policy: str) -> None:
    (chain,) = chains(chunks(9))
    found = list(turns(chain, steps(TRAIN), steps(EVALUATE), policy=policy, first=3))
    assert [(turn.micro, turn.before, turn.after, turn.keeps) for turn in found] == [(3, None, None, False)] * len(found)
    assert [step for turn in found for step in turn.steps] == steps(TRAIN)


def test_a_chain_that_is_not_whole_is_refused() -> None:
    given = chunks(40)
    other = [replace(chunk, piece=replace(chunk.piece, index=1)) for chunk in given if chunk.piece]
    for faulty in (
        given[1:], given[:2], [given[0], given[2]], [given[1], given[0], given[2]], [given[0], *chunks(5)], [given[0], *other[1:]]
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="Piece"):
            list(chains(faulty))
