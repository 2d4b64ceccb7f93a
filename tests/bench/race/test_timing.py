"""How device work is timed: differences between events, calls per round, and buffers in turn."""

import time

import pytest
import torch

from bench.race import timing


class Clock:
    """The device's, in milliseconds from now on; events keep what it was when they were recorded."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.synchronized = False

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        self.synchronized = True

    def elapsed_time(self, other: "Event") -> float:
        assert self.synchronized
        assert other.synchronized
        return float(torch.tensor(other.at - self.at, dtype=torch.float32))


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    return clock


@pytest.mark.parametrize("gap", [0.0, 1.0, 3.6e6])
def test_event_clock(device_clock: Clock, gap: float) -> None:
    """An hour without a call takes no microsecond away."""
    clock = timing.EventClock()
    for milliseconds in (0.005, 0.25, 1234.5):
        device_clock.now += gap
        start = clock()
        device_clock.now += milliseconds
        assert clock() - start == pytest.approx(milliseconds / 1e3, rel=1e-6)


def test_event_clock_on_a_cpu() -> None:
    clock = timing.EventClock()
    readings = [read() for read in (time.perf_counter, clock) * 3]
    assert readings == sorted(readings), "one clock, in the same seconds"


def test_seconds_of_a_call(device_clock: Clock) -> None:
    def call() -> None:
        device_clock.now += 2.0

    clock = timing.EventClock()
    assert timing.seconds_of(call, clock) == pytest.approx(2e-3)
    assert timing.seconds_of(call, clock, 5) == pytest.approx(2e-3)
    assert device_clock.now == 12.0


def test_calls_per_round() -> None:
    """A round takes two milliseconds, or 200 calls."""
    assert [timing.per_round(s) for s in (1.0, 2e-3, 1.9e-3, 5e-4, 1.1e-5, 9e-6, 0.0)] == [1, 1, 2, 4, 182, 200, 200]


def test_copies_outgrow_the_cache() -> None:
    assert timing.copies(100, 0) == 1
    assert timing.copies(50 << 20, 50 << 20) == 3
    assert timing.copies(151 << 20, 50 << 20) == 1
    assert timing.copies(40 << 20, 50 << 20) == 4
    assert timing.copies(1, 50 << 20) == 64
    assert timing.copies(0, 50 << 20) == 64


def test_rotation() -> None:
    call = timing.rotated(lambda item: item, ["a", "b", "c"])
    assert [call() for _ in range(7)] == list("abcabca")
