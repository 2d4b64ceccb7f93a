"""Lanes that run in lockstep, and what the translated code asks of them: a warp, a program, or a row of programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .arithmetic import F16, F32, S64, U16, U32, UNSIGNED, Array
from .opcodes import SYNCHRONISING
from .ptx import EmulatorError
from .races import Access

if TYPE_CHECKING:
    from .grid import Grid
    from .memory import Range

UNKNOWN = 0x7FBADBAD  # where a copy is on its way

_FOLDS = {"max": np.maximum, "add": np.add}


class Unit:
    """Accesses go through memcheck here, and on to the race detector."""

    def __init__(self, grid: Grid, warps: Sequence[tuple[int, int]]):
        """warps: (program, warp) of each."""
        self.grid, self.kernel, self.races, self.report = grid, grid.kernel, grid.races, grid.report
        self.trace = grid.trace
        self.programs = sorted({program for program, _ in warps})
        # A part of a program meets the others at barriers.
        self.parts = len(warps) < grid.warps * len(self.programs)
        self.n = 32 * len(warps)
        self.all = np.arange(self.n)
        self.program = np.repeat([program for program, _ in warps], 32).astype(S64)
        self.warp = np.repeat([warp for _, warp in warps], 32).astype(S64)
        self.row = self.program * grid.warps + self.warp  # of the warp among all warps
        self.lane = np.tile(np.arange(32), len(warps))
        self.thread = self.warp * 32 + self.lane
        x, y, z = grid.shape
        numbers = self.thread, self.program % x, self.program // x % y, self.program // (x * y), x, y, z
        self.special = tuple(np.broadcast_to(v, self.n).astype(U32) for v in numbers)
        self.parameters = [np.full(self.n, value, UNSIGNED[size]) for value, size in grid.values]
        self.offset = self.program * grid.stride  # of its program's shared memory
        self.count = [0] * len(self.kernel.blocks)
        self.groups: list[list[Access]] = []  # of wgmma, committed: what they read
        self.open: list[Access] = []
        self.copies: list[list[tuple[Access, Array]]] = [[]]  # asynchronous ones and their data, the last group open
        self.waits = False
        self.last: int | None = None  # kind of the operation that comes next
        self.vote: Array | None = None
        self.generator = grid.translation(self.n)(self)

    def name(self, number: int) -> str:
        return str(self.kernel.code[number])

    def where(self, lane: int) -> str:
        return f"program {self.program[lane]}, thread {self.thread[lane]}"

    def fail(self, what: str, number: int, lane: int) -> None:
        raise EmulatorError(f"{what}; {self.where(lane)}; {self.name(number)}")

    # -- global memory

    def _active(self, address: Array, condition: Array | None) -> tuple[Array, Array]:
        """(addresses of the active lanes, the lanes)."""
        if condition is None:
            return address.astype(S64), self.all
        lanes = condition.nonzero()[0]
        return address[lanes].astype(S64), lanes

    def _global(self, access: Access) -> Range:
        """The tensor that an access is to."""
        size = access.size * access.vector
        where, bad, what = self.grid.memory.find(access.a, size)
        if where is None:
            self.fail(what, access.number, access.lanes[bad])
        self.report.bytes[access.number, where.name] += len(access.a) * size
        if self.trace:
            self.trace.global_(access, where.start)
        return where

    def load_global(self, address, condition, size, vector, number, strength):
        a, lanes = self._active(address, condition)
        if not len(a):
            return None, lanes
        access = Access(self, number, a, lanes, size, vector, bool(strength))
        where = self._global(access)
        if strength == SYNCHRONISING:
            self.races.acquire(self, a, lanes)
        self.races.read(where, access)
        return self.grid.memory.read(a, size, vector), lanes

    def store_global(self, address, condition, data, size, number, strength):
        a, lanes = self._active(address, condition)
        if not len(a):
            return
        memory, values = self.grid.memory, [v[lanes].astype(UNSIGNED[size]) for v in data]

        def there() -> Array:
            before = memory.read(a, size, len(values))
            return np.logical_and.reduce([x == y for x, y in zip(before, values, strict=True)])

        access = Access(self, number, a, lanes, size, len(data), bool(strength), there)
        where = self._global(access)
        self.grid.progress += 1
        if strength == SYNCHRONISING:
            self.races.release(self, a, lanes, adds=False)
        self.races.write(where, access)
        memory.write(a, size, values)
        self.races.written(where, access)

    def atomic(self, address, condition, data, number, acquires, releases):
        size = data.itemsize
        old = np.zeros(self.n, UNSIGNED[size])
        a, lanes = self._active(address, condition)
        if not len(a):
            return old
        access = Access(self, number, a, lanes, size, 1, True)
        where = self._global(access)
        if releases:
            self.races.release(self, a, lanes, adds=True)
        self.races.read(where, access)
        self.races.write(where, access)
        for n, lane in enumerate(lanes.tolist()):
            (bits,) = self.grid.memory.read(a[n : n + 1], size, 1)
            old[lane] = bits[0]
            self.grid.progress += bool(data[lane] != 0)
            self.grid.memory.write(a[n : n + 1], size, [(bits.view(data.dtype) + data[lane]).view(UNSIGNED[size])])
        self.races.written(where, access)
        if acquires:
            self.races.acquire(self, a, lanes)
        return old

    def proxy_fence(self, condition: Array | None) -> None:
        self.races.proxy_fence(self, self.all if condition is None else condition.nonzero()[0])

    # -- shared memory

    def _shared(self, address: Array, condition: Array | None, size: int, vector: int, number: int) -> Access:
        """Addresses are among those of all programs."""
        a, lanes = self._active(address, condition)
        width = size * vector
        bad = (a + width > self.kernel.shared) | ((a & (width - 1)) != 0)
        if bad.any():
            i = int(bad.argmax())
            self.fail(f"shared access of {width} bytes at {a[i]} of {self.kernel.shared}", number, lanes[i])
        self.report.bytes[number, "shared"] += len(a) * width
        access = Access(self, number, a + self.offset[lanes], lanes, size, vector)
        if self.trace:
            self.trace.shared(access)
        return access

    def _index(self, access: Access) -> Array:
        return (access.a >> (access.size.bit_length() - 1))[:, None] + np.arange(access.vector)

    def load_shared(self, address, condition, size, vector, number):
        access = self._shared(address, condition, size, vector, number)
        if not len(access.a):
            return None, access.lanes
        self.races.shared_read(access)
        return self.grid.shared[size][self._index(access).T], access.lanes

    def store_shared(self, address, condition, data, size, number):
        access = self._shared(address, condition, size, len(data), number)
        if len(access.a):
            self._write_shared(access, np.stack([v[access.lanes].astype(UNSIGNED[size]) for v in data], 1))

    def _write_shared(self, access: Access, values: Array) -> None:
        """values: [lanes, vector]."""
        memory, index = self.grid.shared[access.size], self._index(access)
        access.there = lambda: (memory[index] == values).all(1)
        self.races.shared_write(access)
        memory[index] = values
        self.races.shared_written(access)

    def copy(self, to: Array, source: Array, condition: Array | None, taken: Array, number: int) -> None:
        """An asynchronous copy: from here on nobody may read what was there before, and what comes is there when its
        threads have waited. taken: bytes of the source, 16 or 0, for zeros."""
        access = self._shared(to, condition, 4, 4, number)
        if not len(access.a):
            return
        if not np.isin(taken[access.lanes], (0, 16)).all():
            self.fail("a copy of a part of 16 bytes is not modelled", number, access.lanes[0])
        values = np.zeros((len(access.a), 4), U32)
        some = taken[access.lanes] > 0
        found, _ = self.load_global(source, np.isin(self.all, access.lanes[some]), 4, 4, number, 0)
        if found is not None:
            values[some] = np.stack(found, 1)
        self._write_shared(access, np.full_like(values, UNKNOWN))
        self.copies[-1].append((access, values))

    def copies_commit(self) -> None:
        self.copies.append([])

    def copies_wait(self, left: int) -> None:
        done, self.copies = self.copies[: len(self.copies) - 1 - left], self.copies[len(self.copies) - 1 - left :]
        for access, values in (copy for group in done for copy in group):
            self._write_shared(access, values)

    def ldmatrix(self, address, matrices, transposed, number):
        access = self._shared(address, self.lane < 8 * matrices, 2, 8, number)
        self.races.shared_read(access)
        rows = self.grid.shared[2][self._index(access)].reshape(-1, matrices, 8, 8)
        rows = rows.swapaxes(2, 3) if transposed else rows
        return [np.ascontiguousarray(rows[:, m]).view(U32).reshape(-1) for m in range(matrices)]

    def stmatrix(self, address, data, transposed, number):
        access = self._shared(address, self.lane < 8 * len(data), 2, 8, number)
        rows = np.stack([np.ascontiguousarray(d).reshape(-1, 8, 4).view(U16) for d in data], 1)
        self._write_shared(access, (rows.swapaxes(2, 3) if transposed else rows).reshape(-1, 8))

    # -- warps and programs

    def barrier(self, number: int, predicate: Array | None) -> None:
        self.vote = predicate
        if self.parts:
            self.grid.arrived[self.programs[0]].append((self, number))
        else:
            self.races.barrier(self.programs)

    def agreed(self) -> Array:
        """Which lanes are of programs whose threads all gave a true predicate."""
        if self.parts:
            return np.full(self.n, self.grid.votes[self.programs[0]])
        return np.repeat(self.vote.reshape(len(self.programs), -1).all(1), self.n // len(self.programs))

    def shuffle(self, a: Array, b: Array, mode: str) -> Array:
        other = b.astype(S64)
        return a[self.all - self.lane + ((self.lane ^ other if mode == "bfly" else other) & 31)]

    def reduce(self, a: Array, operation: str) -> Array:
        return np.repeat(_FOLDS[operation].reduce(a.reshape(-1, 32), axis=1, dtype=a.dtype), 32)

    # -- warp groups

    def wgmma(self, a: Any, b: Array, c: list[Array], scale: Array, kind: str, columns: int, transposed: list[int],
              number: int) -> list[Array]:  # fmt: skip
        """a: registers or descriptors; transposed: a flag per operand in shared memory, where the type has them."""
        flags = [*transposed, 0, 0]
        if isinstance(a, list):
            left = arithmetic.wgmma_operand(a, kind)
        else:
            left = self._tile(a, 64, bool(flags.pop(0)), kind, number)
        return arithmetic.wgmma(left, self._tile(b, columns, bool(flags.pop(0)), kind, number), c, scale)

    def _tile(self, descriptor: Array, rows: int, transposed: bool, kind: str, number: int) -> Array:
        """A tile [groups, rows, 32 bytes] in float32 that a descriptor names."""
        d = descriptor.reshape(-1, 128)
        if (d != d[:, :1]).any():
            self.fail("a descriptor differs within a warp group", number, 0)
        size = 4 if kind == "tf32" else 2
        a = arithmetic.descriptor_offsets(d[:, 0], rows, transposed, size)
        if int(a.max()) + size > self.kernel.shared:
            self.fail(f"shared operand up to {int(a.max())} of {self.kernel.shared}", number, 0)
        a = a + self.offset.reshape(-1, 128)[:, 0][:, None, None]
        self.report.bytes[number, "shared"] += a.size * size
        lanes = np.repeat(np.arange(0, self.n, 128), a[0].size)
        self.open.append(Access(self, number, a.reshape(-1), lanes, size))
        self.races.async_read(self.open[-1])
        raw = self.grid.shared[size][a >> (size.bit_length() - 1)]
        if kind == "tf32":
            return arithmetic.cut_to_tf32(raw)
        return raw.view(F16).astype(F32) if kind == "f16" else arithmetic.of_bf16(raw)

    def wgmma_order(self, what: str) -> None:
        if what == "commit_group":
            self.groups.append(self.open)
            self.open = []

    def wgmma_wait(self, left: int) -> None:
        done, self.groups = self.groups[: len(self.groups) - left], self.groups[len(self.groups) - left :]
        for access in (access for group in done for access in group):
            self.races.async_done(access)
