"""How long device work takes, and on which buffers: CUDA events as the timer of pytest-benchmark, and rotation."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Item = TypeVar("Item")

# One round lasts at least this long, so that the first launch's way to the device does not count.
ROUND = 2e-3
MOST_PER_ROUND = 200
# Buffers in turn hold at least this many times L2: what a call reads is not there by accident.
ROTATED = 3


class EventClock:
    """A timer in seconds of device time: a difference of two calls is the time between two events of the stream.

    On a CPU it is ``time.perf_counter``.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.Event | None = None
        self.seconds = 0.0

    def __call__(self) -> float:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            # Event by event: in milliseconds from one origin float32 would lose microseconds within minutes.
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


def seconds_of(call: Callable[[], object], clock: Callable[[], float], calls: int = 1) -> float:
    """Seconds of one call, over ``calls`` of them in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def seconds_of_rounds(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
    """Seconds of one call, of each of so many rounds of ``calls`` calls."""
    clock = EventClock()
    return [seconds_of(call, clock, calls) for _ in range(rounds)]


def per_round(seconds: float) -> int:
    """Calls per round."""
    return min(MOST_PER_ROUND, max(1, math.ceil(ROUND / max(seconds, 1e-9))))


def copies(size: int, cache: int, most: int = 64) -> int:
    """Buffers of ``size`` bytes that rotation needs against a cache of so many bytes."""
    return min(most, max(1, math.ceil(ROTATED * cache / max(size, 1))))


def rotated(call: Callable[[Item], object], items: list[Item]) -> Callable[[], object]:
    """``call`` on the next item each time."""
    turn = itertools.cycle(items)
    return lambda: call(next(turn))
