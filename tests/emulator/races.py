"""The race detector: which accesses are ordered by what the PTX memory model promises, at the granularity of warps.

A program's clock counts its barriers: its *epoch*. Each warp knows an epoch of every program: what that program did in
earlier epochs comes before whatever the warp does next. A barrier joins what its warps know. A release publishes, under
its address, what its warp knows and its own program's epoch, that is all that the program did before its last barrier;
an add publishes on top of what is there (a release sequence). An acquire takes that over, a relaxed load at the next
fence, and a relaxed store publishes what was known at the last one.

Two accesses of one element, one a write, must be ordered, unless both are strong (``volatile``, ``relaxed``,
``acquire``, ``release`` or atomic) and of one width: the model calls them morally strong, and only they do not tear. A
volatile load beside a plain store is a race, and so is one of 32 bits beside stores of 16. Threads that hold copies of
one number may store it by one instruction.

Conservative: what a warp does after its program's last barrier is not covered by its own release. Not seen: races
between lanes of one warp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import S64, Array

if TYPE_CHECKING:
    from .grid import Grid
    from .memory import Range
    from .unit import Unit

SEVERAL = 255  # in place of a warp: several of them
There = Callable[[], Array]  # which lanes' values are in memory already


def note(table: Array, at: Array, epoch: Array, warp: Array) -> None:
    """Enter reads as epoch << 8 | warp."""
    code, old = (epoch << 8) | warp, table[at]
    shared = (old >> 8 == epoch) & (old != code)
    table[at] = np.where(shared, code | SEVERAL, code)
    lost = (table[at] != code) & ~shared  # to another warp of the same unit
    if lost.any():
        table[at[lost]] |= SEVERAL


class Races:
    """Of one launch. Findings go to the report, each pair of instructions once."""

    def __init__(self, grid: Grid):
        self.grid, self.programs, self.warps = grid, grid.programs, grid.warps
        self.epoch = np.ones(self.programs, S64)
        self.known = np.zeros((self.programs * self.warps, self.programs), S64)
        self.heard = np.zeros_like(self.known)  # by relaxed loads, until a fence
        self.fenced = np.zeros_like(self.known)  # what a relaxed store publishes
        self.published: dict[int, Array] = {}
        grain = grid.kernel.grain
        self.shift = grain.bit_length() - 1
        cells = grid.stride * self.programs // grain + 64
        # Of shared memory: epoch << 8 | warp of the last write and read, and their instructions.
        self.s_written, self.s_read = np.zeros(cells, S64), np.zeros(cells, S64)
        self.s_written_at, self.s_read_at = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        # Of the asynchronous proxy: when each cell was written and each warp last fenced, how many wgmma are reading.
        self.asynchronous = grid.kernel.uses("wgmma")
        self.tick, self.s_tick = 0, np.zeros(cells if self.asynchronous else 0, S64)
        self.fence_tick = np.zeros(self.programs * self.warps, S64)
        self.reading = np.zeros(cells if self.asynchronous else 0, np.int32)
        self.seen: set[tuple[int, int, str]] = set()
        for where in grid.memory.ranges:
            where.forget(self.programs)

    def tell(self, unit: Unit, number: int, other: int, what: str, kind: str, who: str, lane: int) -> None:
        if (number, int(other), kind) in self.seen:
            return
        self.seen.add((number, int(other), kind))
        self.grid.report.races.append(
            f"{what} by {unit.where(lane)} at {unit.name(number)} is not ordered after the {kind} by {who} at "
            f"{unit.name(int(other))}"
        )

    def tell_unwritten(self, unit: Unit, number: int, what: str, lane: int) -> None:
        if (number, 0, "nobody") in self.seen:
            return
        self.seen.add((number, 0, "nobody"))
        self.grid.report.unwritten.append(
            f"read of {what}, which nobody wrote; {unit.where(lane)}; {unit.name(number)}"
        )

    # -- order

    def barrier(self, programs: Iterable[int]) -> None:
        for program in programs:
            rows = slice(program * self.warps, (program + 1) * self.warps)
            for table in (self.known, self.heard):
                table[rows] = table[rows].max(0)
            self.epoch[program] += 1

    def _rows(self, unit: Unit, a: Array, lanes: Array) -> Iterator[tuple[int, list[int]]]:
        """(address, the warps that access it)."""
        rows = unit.row[lanes]
        for address in np.unique(a).tolist():
            yield address, np.unique(rows[a == address]).tolist()

    def acquire(self, unit: Unit, a: Array, lanes: Array, acquires: bool) -> None:
        table = self.known if acquires else self.heard
        for address, rows in self._rows(unit, a, lanes):
            if address in self.published:
                table[rows] = np.maximum(table[rows], self.published[address])

    def release(self, unit: Unit, a: Array, lanes: Array, releases: bool, adds: bool) -> None:
        for address, rows in self._rows(unit, a, lanes):
            for row in rows:
                told = (self.known if releases else self.fenced)[row].copy()
                if releases:
                    told[row // self.warps] = self.epoch[row // self.warps]
                if adds and address in self.published:
                    told = np.maximum(told, self.published[address])
                self.published[address] = told

    def fence(self, unit: Unit, lanes: Array) -> None:
        rows = np.unique(unit.row[lanes])
        self.known[rows] = np.maximum(self.known[rows], self.heard[rows])
        self.fenced[rows] = self.known[rows]
        self.fenced[rows, rows // self.warps] = self.epoch[rows // self.warps]

    # -- global memory

    @staticmethod
    def _cells(where: Range, a: Array, lanes: Array, size: int) -> tuple[Array, Array]:
        """(elements, the lane of each)."""
        cell, many = (a - where.start) // where.grain, max(1, size // where.grain)
        if many == 1:
            return cell, lanes
        return (cell[:, None] + np.arange(many)).ravel(), np.repeat(lanes, many)

    def _after_last_write(self, unit: Unit, where: Range, cell: Array, lanes: Array, number: int, what: str,
                          strong: int, there: There | None = None, count: int = 1) -> None:  # fmt: skip
        last = where.written[cell]
        if not last.any():
            return
        program, warp, epoch = ((last >> 8) & 0xFFFF) - 1, last & 0xFF, last >> 24
        own = program == unit.program[lanes]
        mine = (warp == unit.warp[lanes]) | (epoch < self.epoch[unit.program[lanes]])
        fine = (last == 0) | np.where(own, mine, epoch < self.known[unit.row[lanes], program])
        if strong:
            fine |= where.width[cell] == strong
        if there is not None and not fine.all():
            fine |= own & np.repeat(there(), len(cell) // count) & (where.at[2][cell] == number)
        if not fine.all():
            i = int((~fine).argmax())
            self.tell(unit, number, where.at[2][cell[i]], f"{what} of {where.name}[{cell[i]}]", "write",
                      f"program {program[i]}, warp {warp[i]}", lanes[i])  # fmt: skip

    def read(self, unit: Unit, where: Range, a: Array, lanes: Array, size: int, vector: int, number: int,
             strong: bool) -> None:  # fmt: skip
        cell, lanes = self._cells(where, a, lanes, size * vector)
        if where.fresh and (unwritten := where.written[cell] == 0).any():
            i = int(unwritten.argmax())
            self.tell_unwritten(unit, number, f"{where.name}[{cell[i]}]", lanes[i])
        self._after_last_write(unit, where, cell, lanes, number, "read", size * strong)
        at = cell * self.programs + unit.program[lanes]
        note(where.reads[strong], at, self.epoch[unit.program[lanes]], unit.warp[lanes])
        where.at[strong][cell] = number

    def write(self, unit: Unit, where: Range, a: Array, lanes: Array, size: int, vector: int, there: There | None,
              number: int, strong: bool) -> None:  # fmt: skip
        """Before a write: it must come after the last one, and after the reads since."""
        cell, many = self._cells(where, a, lanes, size * vector)
        self._after_last_write(unit, where, cell, many, number, "write", size * strong, there, len(a))
        for kind in (0,) if strong else (0, 1):
            reads = where.reads[kind].reshape(-1, self.programs)[cell]
            if not reads.any():
                continue
            me, epoch = unit.program[many], reads >> 8
            mine = (epoch < self.epoch[me][:, None]) | ((reads & SEVERAL) == unit.warp[many][:, None])
            own = me[:, None] == np.arange(self.programs)
            fine = (reads == 0) | np.where(own, mine, epoch < self.known[unit.row[many]])
            if not fine.all():
                i, program = divmod(int((~fine).argmax()), self.programs)
                self.tell(unit, number, where.at[kind][cell[i]], f"write of {where.name}[{cell[i]}]", "read",
                          f"program {program}", many[i])  # fmt: skip

    def written(self, unit: Unit, where: Range, a: Array, lanes: Array, size: int, vector: int, there: There | None,
                number: int, strong: bool) -> None:  # fmt: skip
        """After a write: whose it was."""
        cell, many = self._cells(where, a, lanes, size * vector)
        code = (self.epoch[unit.program[many]] << 24) | ((unit.program[many] + 1) << 8) | unit.warp[many]
        where.written[cell], where.width[cell], where.at[2][cell] = code, size * strong, number
        if strong or (where.written[cell] == code).all():
            return
        if not (right := there()).all():
            i = int((~right).argmax())
            self.tell(unit, number, number, f"write of {where.name}", "write", "another warp", lanes[i])

    # -- shared memory

    def _shared_cells(self, a: Array, lanes: Array, size: int) -> tuple[Array, Array]:
        cell, many = a >> self.shift, size >> self.shift
        if many == 1:
            return cell, lanes
        return (cell[:, None] + np.arange(many)).ravel(), np.repeat(lanes, many)

    def shared_read(self, unit: Unit, a: Array, lanes: Array, size: int, number: int) -> None:
        cell, lanes = self._shared_cells(a, lanes, size)
        last = self.s_written[cell]
        epoch, warp = self.epoch[unit.program[lanes]], unit.warp[lanes]
        if (last == 0).any():
            i = int((last == 0).argmax())
            byte = (int(cell[i]) << self.shift) - int(unit.offset[lanes[i]])
            self.tell_unwritten(unit, number, f"shared byte {byte}", lanes[i])
        self._same_epoch(unit, last, epoch, warp, number, self.s_written_at[cell], "read", "write", lanes)
        note(self.s_read, cell, epoch, warp)
        self.s_read_at[cell] = number

    def _same_epoch(self, unit: Unit, last: Array, epoch: Array, warp: Array, number: int, at: Array, what: str,
                    kind: str, lanes: Array, fine: Callable[[], Array] | None = None) -> None:  # fmt: skip
        """No barrier stands between this access and the last one, by another warp."""
        bad = (last >> 8 == epoch) & ((last & SEVERAL) != warp)
        if bad.any() and fine is not None:
            bad &= ~fine()
        if bad.any():
            i = int(bad.argmax())
            self.tell(unit, number, at[i], f"{what} of shared memory", kind, f"warp {last[i] & SEVERAL}", lanes[i])

    def shared_write(self, unit: Unit, a: Array, lanes: Array, size: int, there: There, number: int) -> None:
        cells, many = self._shared_cells(a, lanes, size)
        epoch, warp = self.epoch[unit.program[many]], unit.warp[many]
        if self.asynchronous:
            self.tick += 1
            self.s_tick[cells] = self.tick
            if (busy := self.reading[cells] > 0).any():
                i = int(busy.argmax())
                self.tell(unit, number, self.s_read_at[cells[i]], "write of shared memory", "unfinished wgmma",
                          "its warp group", many[i])  # fmt: skip

        def copies() -> Array:
            return np.repeat(there(), len(cells) // len(a)) & (self.s_written_at[cells] == number)

        self._same_epoch(unit, self.s_written[cells], epoch, warp, number, self.s_written_at[cells], "write", "write",
                         many, copies)  # fmt: skip
        self._same_epoch(unit, self.s_read[cells], epoch, warp, number, self.s_read_at[cells], "write", "read", many)

    def shared_written(self, unit: Unit, a: Array, lanes: Array, size: int, there: There, number: int) -> None:
        cells, many = self._shared_cells(a, lanes, size)
        code = (self.epoch[unit.program[many]] << 8) | unit.warp[many]
        self.s_written[cells], self.s_written_at[cells] = code, number
        if (self.s_written[cells] != code).any() and not (right := there()).all():
            i = int((~right).argmax())
            self.tell(unit, number, number, "write of shared memory", "write", "another warp", lanes[i])

    # -- the asynchronous proxy: wgmma reads shared memory from its start until somebody waits for its group

    def proxy_fence(self, unit: Unit, lanes: Array) -> None:
        self.tick += 1
        self.fence_tick[np.unique(unit.row[lanes])] = self.tick

    def async_read(self, unit: Unit, a: Array, lanes: Array, size: int, number: int) -> None:
        self.shared_read(unit, a, lanes, size, number)
        cells, many = self._shared_cells(a, lanes, size)
        writer = unit.program[many] * self.warps + (self.s_written[cells] & SEVERAL)
        late = self.s_tick[cells] >= self.fence_tick[writer]
        if late.any():
            i = int(late.argmax())
            what = "wgmma's read of shared memory, with no proxy fence between,"
            self.tell(
                unit, number, self.s_written_at[cells[i]], what, "write", f"warp {writer[i] % self.warps}", many[i]
            )
        np.add.at(self.reading, cells, 1)

    def async_done(self, unit: Unit, a: Array, lanes: Array, size: int) -> None:
        cells, many = self._shared_cells(a, lanes, size)
        np.add.at(self.reading, cells, -1)
        note(self.s_read, cells, self.epoch[unit.program[many]], unit.warp[many])
