"""When Python's garbage collector runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

import muxcompile
from benchmarks.cases import WORKLOADS
from muxcompile.heap import settled, uncollected


class Own:
    """Something that only a collection frees."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations of the collections that a test sees."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_what_is_dropped_within_goes_behind(collections: list[int]) -> None:
    with uncollected():
        many = [Own() for _ in range(10_000)]
        gone = weakref.ref(many[0])
        del many
        with uncollected():
            pass
        assert gone() is not None
        assert not collections
    assert gone() is None
    assert collections == [1]
    assert gc.isenabled()


def test_collections_go_on_behind_an_error() -> None:
    with pytest.raises(ValueError, match="refused"), uncollected():
        raise ValueError("refused")
    assert gc.isenabled()


def test_who_has_turned_collections_off_finds_them_off(collections: list[int]) -> None:
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        assert not collections
    finally:
        gc.enable()


def test_a_model_is_compiled_without_a_collection_amid(collections: list[int]) -> None:
    workload = WORKLOADS["tiny-four"]
    backbone, tasks = workload.backbone("cpu"), workload.compiled_tasks()
    gc.collect()
    gc.freeze()  # what earlier tests made, and compiling lets go of, is not counted below
    try:
        collections.clear()
        before = gc.get_stats()[1]["collected"]
        model = muxcompile.compile(backbone, tasks, muxcompile.Options(chunk_tokens=256))
        assert collections == [1]
        dropped = gc.get_stats()[1]["collected"] - before
        left = gc.collect()
    finally:
        gc.unfreeze()
    assert left < dropped / 100
    assert len(model.tasks) == len(tasks)


def test_what_was_made_before_is_passed_by() -> None:
    earlier = Own()
    with settled():
        later = Own()
        gone, collected = weakref.ref(earlier), weakref.ref(later)
        del earlier, later
        gc.collect()
        assert gone() is not None
        assert collected() is None
    gc.collect()
    assert gone() is None
