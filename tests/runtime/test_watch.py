"""A device that stops: the first action of each stream that was not over is named, once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from runtime.program import Action, Kind
from runtime.watch import Watch


@dataclass
class Device:
    """Marks in the order in which they were noted; it has passed so many, or has stopped behind them."""

    noted: int = 0
    passed: int = 0
    stopped: bool = False

    def mark(self) -> Mark:
        self.noted += 1
        return Mark(self, self.noted)


@dataclass
class Mark:
    device: Device
    number: int

    def query(self) -> bool:
        if self.device.stopped:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self.number <= self.device.passed


def action(kind: Kind, micro: int, stream: str = "compute") -> Action:
    return Action(0, stream, kind, "stage.0", ("ann", "ben"), micro, (), ())


def watching(device: Device) -> tuple[Watch, list[str], threading.Event]:
    told: list[str] = []
    over = threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        over.set()

    return Watch("rank 1", tell, device.mark, 0.01), told, over


def looked(watch: Watch) -> None:
    """Wait until the thread has nothing left to look at."""
    for _ in range(500):
        if watch._thread is None:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the thread goes on")


def test_the_action_that_the_device_was_in_is_named_not_the_last_that_was_launched() -> None:
    device = Device()
    watch, told, over = watching(device)
    for micro in range(4):
        watch.note(action(Kind.F, micro))
        watch.note(action(Kind.B, micro))
    device.passed = 3
    while "B stage.0 of micro-batch 1" not in watch.where():
        threading.Event().wait(0.01)
    device.stopped = True
    assert over.wait(5)
    assert watch.where() == "B stage.0 of micro-batch 1, tasks ann, ben"
    line = "rank 1: the device stopped in B stage.0 of micro-batch 1, tasks ann, ben: CUDA error: unspecified launch failure"
    assert told == [line]
    assert watch.stopped == line
    watch.note(action(Kind.F, 4))  # nothing is marked on a device that has stopped
    assert device.noted == 8
    assert told == [line]


def test_each_stream_has_an_action_of_its_own() -> None:
    device = Device(passed=1)
    watch, _, _ = watching(device)
    watch.note(action(Kind.F, 0, "lane0"))
    watch.note(action(Kind.F, 1, "lane1"))
    watch.note(action(Kind.B, 0, "lane0"))
    expected = "B stage.0 of micro-batch 0, tasks ann, ben; F stage.0 of micro-batch 1, tasks ann, ben"
    while watch.where() != expected:
        threading.Event().wait(0.01)
    device.passed = 3
    looked(watch)
    assert watch.where() == ""


def test_the_thread_ends_with_the_work_and_begins_with_it() -> None:
    device = Device()
    watch, told, _ = watching(device)
    for turn in range(3):
        watch.note(action(Kind.F, turn))
        assert watch._thread is not None
        device.passed += 1
        looked(watch)
    assert told == []


def test_it_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    device = Device(stopped=True)
    watch = Watch("rank 0", None, device.mark, 0.01)
    watch.note(action(Kind.STEP, 2))
    while watch.stopped is None:
        threading.Event().wait(0.01)
    assert watch.where() == "STEP stage.0 of micro-batch 2, tasks ann, ben"
    assert capsys.readouterr().err == watch.stopped + "\n"
