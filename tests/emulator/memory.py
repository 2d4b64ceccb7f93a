"""Global memory: the caller's tensors, each a registered range of host memory, and nothing else."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from .arithmetic import S64, U8, UNSIGNED, Array

# All addresses from 16 on as one array of bytes: reads and writes go where memcheck has let them.
_EVERYTHING = {"data": (16, False), "shape": ((1 << 47) - 16,), "typestr": "|u1", "version": 3}
_BYTES = np.asarray(SimpleNamespace(__array_interface__=_EVERYTHING))
_VIEWS = {size: _BYTES.view(dtype) for size, dtype in UNSIGNED.items()}


@dataclass(eq=False)
class Range:
    """One tensor. grain: bytes of an element; fresh: what this launch has not written holds nothing. Of each element
    the race detector keeps the last write (epoch << 24 | (program + 1) << 8 | warp), the last read of each program
    (epoch << 8 | warp; 255: several), weak and strong, the width of a strong write, the instruction of each kind."""

    name: str
    start: int
    end: int
    grain: int
    fresh: bool = False
    written: Array | None = None
    width: Array | None = None
    reads: list[Array] = field(default_factory=list)
    at: list[Array] = field(default_factory=list)

    def forget(self, programs: int) -> None:
        """As at the start of a launch. Pages that nobody touches take no memory."""
        cells = (self.end - self.start) // self.grain + 1
        self.written, self.width = np.zeros(cells, S64), np.zeros(cells, U8)
        self.reads = [np.zeros(cells * programs, S64) for _ in range(2)]
        self.at = [np.zeros(cells, np.int32) for _ in range(3)]


class Memory:
    """The ranges that a launch may access."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, name: str, start: int, size: int, grain: int, fresh: bool = False) -> None:
        if size and not any(r.start <= start and start + size <= r.end for r in self.ranges):
            self.ranges.append(Range(name, start, start + size, grain, fresh))
            self.ranges.sort(key=lambda r: r.start)
            self.starts, self.ends = [r.start for r in self.ranges], [r.end for r in self.ranges]

    def find(self, addresses: Array, size: int) -> tuple[Range | None, int, str]:
        """(the range that holds all of them, or None, and then the index of a bad one and what is wrong with it)."""
        k = bisect_right(self.starts, int(addresses.min())) - 1
        if k >= 0 and int(addresses.max()) + size <= self.ends[k]:
            odd = addresses & (size - 1) != 0
            if not odd.any():
                return self.ranges[k], 0, ""
            return None, int(odd.argmax()), f"misaligned access of {size} bytes"
        found = np.searchsorted(self.starts, addresses, "right") - 1
        bad = (found < 0) | (addresses + size > np.asarray(self.ends)[found])
        if not bad.any():
            return None, 0, "one instruction accesses several tensors, which is not modelled"
        i = int(bad.argmax())
        address = int(addresses[i])
        near = min(self.ranges, key=lambda r: min(abs(r.start - address), abs(r.end - address)))
        where = f"byte {address - near.start} of {near.end - near.start} of {near.name}"
        return None, i, f"global access of {size} bytes outside of every tensor; nearest: {where}"

    def read(self, addresses: Array, size: int, count: int) -> list[Array]:
        index = (addresses - 16) >> (size.bit_length() - 1)
        return [_VIEWS[size][index + n] for n in range(count)]

    def write(self, addresses: Array, size: int, values: list[Array]) -> None:
        index = (addresses - 16) >> (size.bit_length() - 1)
        for n, value in enumerate(values):
            _VIEWS[size][index + n] = value
