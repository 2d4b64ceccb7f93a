"""The race detector: which accesses are ordered by what the PTX memory model promises, at the granularity of warps.

A program's clock counts its barriers: its *epoch*. Each warp knows an epoch of every program: what that program did in
earlier epochs comes before whatever the warp does next. A barrier joins what its warps know. A release publishes, under
its address, what its warp knows and its own program's epoch, that is all that the program did before its last barrier;
an add publishes on top of what is there (a release sequence), and a relaxed add leaves it. An acquire takes that over.

Two accesses of one element, one a write, must be ordered, unless both are strong (``volatile``, ``relaxed``,
``acquire``, ``release`` or atomic) and of one width: the model calls them morally strong, and only they do not tear. A
volatile load beside a plain store is a race, and so is one of 32 bits beside stores of 16. Threads that hold copies of
one number may store it by one instruction.

Conservative: what a warp does after its program's last barrier is not covered by its own release. Not seen: races
between lanes of one warp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import S64, Array

if TYPE_CHECKING:
    from .grid import Grid
    from .memory import Range
    from .unit import Unit

SEVERAL = 255  # in place of a warp: several of them


@dataclass
class Access:
    """Of one instruction: ``vector`` elements of ``size`` bytes at each of the addresses ``a`` of ``lanes``. there:
    which lanes' values are in memory already."""

    unit: Unit
    number: int
    a: Array
    lanes: Array
    size: int
    vector: int = 1
    strong: bool = False
    there: Callable[[], Array] | None = None

    def cells(self, start: int, grain: int) -> tuple[Array, Array]:
        """(the cells of ``grain`` bytes from ``start`` on, the lane of each)."""
        cell, many = (self.a - start) // grain, max(1, self.size * self.vector // grain)
        if many == 1:
            return cell, self.lanes
        return (cell[:, None] + np.arange(many)).ravel(), np.repeat(self.lanes, many)

    def copies(self, cells: Array) -> Array:
        """Of its cells, those that hold what it is about to write."""
        return np.repeat(self.there(), len(cells) // len(self.a))


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
        lines: dict[str, int] = {}
        self.line = np.array([lines.setdefault(i.source, len(lines)) for i in grid.kernel.code])
        self.epoch = np.ones(self.programs, S64)
        self.known = np.zeros((self.programs * self.warps, self.programs), S64)
        self.published: dict[int, Array] = {}
        self.grain = grid.kernel.grain
        cells = grid.stride * self.programs // self.grain + 64
        # Of shared memory: epoch << 8 | warp of the last write and read, and their instructions.
        self.s_written, self.s_read = np.zeros(cells, S64), np.zeros(cells, S64)
        self.s_written_at, self.s_read_at = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        # Of the asynchronous proxy: when each cell was written and each warp last fenced, how many wgmma are reading.
        self.asynchronous = grid.kernel.uses("wgmma")
        self.tick, self.s_tick = 0, np.zeros(cells if self.asynchronous else 0, S64)
        self.fence_tick, self.fence_epoch = np.zeros((2, self.programs * self.warps), S64)
        self.reading = np.zeros(cells if self.asynchronous else 0, np.int32)
        self.seen: set[tuple[int, int, str]] = set()
        for where in grid.memory.ranges:
            where.forget(self.programs)

    def tell(self, access: Access, lane: int, what: str, kind: str, who: str, other: int) -> None:
        """``what`` by a lane is not ordered after the ``kind`` of access by somebody at the instruction ``other``."""
        key = access.number, int(other), kind
        if key not in self.seen:
            self.seen.add(key)
            name, where = access.unit.name, access.unit.where(lane)
            text = f"{what} by {where} at {name(access.number)} is not ordered after the {kind} by {who} at"
            self.grid.report.races.append(f"{text} {name(int(other))}")

    def tell_unwritten(self, access: Access, lane: int, what: str) -> None:
        key = access.number, 0, "nobody"
        if key not in self.seen:
            self.seen.add(key)
            where = f"{access.unit.where(lane)}; {access.unit.name(access.number)}"
            self.grid.report.unwritten.append(f"read of {what}, which nobody wrote; {where}")

    # -- order

    def barrier(self, programs: Iterable[int]) -> None:
        for program in programs:
            rows = slice(program * self.warps, (program + 1) * self.warps)
            self.known[rows] = self.known[rows].max(0)
            self.epoch[program] += 1

    def _rows(self, unit: Unit, a: Array, lanes: Array) -> Iterator[tuple[int, list[int]]]:
        """(address, the warps that access it)."""
        rows = unit.row[lanes]
        for address in np.unique(a).tolist():
            yield address, np.unique(rows[a == address]).tolist()

    def acquire(self, unit: Unit, a: Array, lanes: Array) -> None:
        for address, rows in self._rows(unit, a, lanes):
            if address in self.published:
                self.known[rows] = np.maximum(self.known[rows], self.published[address])

    def release(self, unit: Unit, a: Array, lanes: Array, adds: bool) -> None:
        for address, rows in self._rows(unit, a, lanes):
            for row in rows:
                told = self.known[row].copy()
                told[row // self.warps] = self.epoch[row // self.warps]
                if adds and address in self.published:
                    told = np.maximum(told, self.published[address])
                self.published[address] = told

    # -- global memory

    def _after_last_write(self, where: Range, access: Access, cells: Array, lanes: Array, what: str) -> None:
        last = where.written[cells]
        if not last.any():
            return
        unit = access.unit
        program, warp, epoch = ((last >> 8) & 0xFFFF) - 1, last & 0xFF, last >> 24
        own = program == unit.program[lanes]
        mine = (warp == unit.warp[lanes]) | (epoch < self.epoch[unit.program[lanes]])
        fine = (last == 0) | np.where(own, mine, epoch < self.known[unit.row[lanes], program])
        if access.strong:
            fine |= where.width[cells] == access.size
        if access.there is not None and not fine.all():
            # An inline instruction is one per register, and registers of two warps may hold the same element.
            fine |= own & access.copies(cells) & (self.line[where.at[2][cells]] == self.line[access.number])
        if not fine.all():
            i = int((~fine).argmax())
            who = f"program {program[i]}, warp {warp[i]}"
            self.tell(access, lanes[i], f"{what} of {where.name}[{cells[i]}]", "write", who, where.at[2][cells[i]])

    def read(self, where: Range, access: Access) -> None:
        cells, lanes = access.cells(where.start, where.grain)
        if where.fresh and (unwritten := where.written[cells] == 0).any():
            i = int(unwritten.argmax())
            self.tell_unwritten(access, lanes[i], f"{where.name}[{cells[i]}]")
        self._after_last_write(where, access, cells, lanes, "read")
        program = access.unit.program[lanes]
        at = cells * self.programs + program
        note(where.reads[access.strong], at, self.epoch[program], access.unit.warp[lanes])
        where.at[access.strong][cells] = access.number

    def write(self, where: Range, access: Access) -> None:
        """Before a write: it must come after the last one, and after the reads since."""
        cells, lanes = access.cells(where.start, where.grain)
        self._after_last_write(where, access, cells, lanes, "write")
        unit = access.unit
        for kind in (0,) if access.strong else (0, 1):
            reads = where.reads[kind].reshape(-1, self.programs)[cells]
            if not reads.any():
                continue
            me, epoch = unit.program[lanes], reads >> 8
            mine = (epoch < self.epoch[me][:, None]) | ((reads & SEVERAL) == unit.warp[lanes][:, None])
            own = me[:, None] == np.arange(self.programs)
            fine = (reads == 0) | np.where(own, mine, epoch < self.known[unit.row[lanes]])
            if not fine.all():
                i, program = divmod(int((~fine).argmax()), self.programs)
                what, other = f"write of {where.name}[{cells[i]}]", where.at[kind][cells[i]]
                self.tell(access, lanes[i], what, "read", f"program {program}", other)

    def written(self, where: Range, access: Access) -> None:
        """After a write: whose it was."""
        cells, lanes = access.cells(where.start, where.grain)
        program = access.unit.program[lanes]
        code = (self.epoch[program] << 24) | ((program + 1) << 8) | access.unit.warp[lanes]
        where.written[cells], where.at[2][cells] = code, access.number
        where.width[cells] = access.size * access.strong
        if not access.strong and (where.written[cells] != code).any():
            self._at_once(access, f"write of {where.name}")

    def _at_once(self, access: Access, what: str) -> None:
        """Several warps wrote a cell by one instruction: they must have written the same."""
        right = access.there()
        if not right.all():
            self.tell(access, access.lanes[int((~right).argmax())], what, "write", "another warp", access.number)

    # -- shared memory

    def _same_epoch(self, access: Access, lanes: Array, last: Array, at: Array, what: str, kind: str,
                    fine: Callable[[], Array] | None = None) -> None:  # fmt: skip
        """No barrier stands between this access and the last one, by another warp."""
        bad = (last >> 8 == self.epoch[access.unit.program[lanes]]) & ((last & SEVERAL) != access.unit.warp[lanes])
        if bad.any() and fine is not None:
            bad &= ~fine()
        if bad.any():
            i = int(bad.argmax())
            self.tell(access, lanes[i], f"{what} of shared memory", kind, f"warp {last[i] & SEVERAL}", at[i])

    def _note_shared_read(self, access: Access, cells: Array, lanes: Array) -> None:
        note(self.s_read, cells, self.epoch[access.unit.program[lanes]], access.unit.warp[lanes])
        self.s_read_at[cells] = access.number

    def shared_read(self, access: Access) -> None:
        cells, lanes = access.cells(0, self.grain)
        last = self.s_written[cells]
        if (last == 0).any():
            i = int((last == 0).argmax())
            byte = int(cells[i]) * self.grain - int(access.unit.offset[lanes[i]])
            self.tell_unwritten(access, lanes[i], f"shared byte {byte}")
        self._same_epoch(access, lanes, last, self.s_written_at[cells], "read", "write")
        self._note_shared_read(access, cells, lanes)

    def shared_write(self, access: Access) -> None:
        """Before a write."""
        cells, lanes = access.cells(0, self.grain)
        at, read_at = self.s_written_at[cells], self.s_read_at[cells]
        if self.asynchronous:
            self.tick += 1
            self.s_tick[cells] = self.tick
            if (busy := self.reading[cells] > 0).any():
                i = int(busy.argmax())
                self.tell(access, lanes[i], "write of shared memory", "unfinished wgmma", "its warp group", read_at[i])

        def copies() -> Array:
            return access.copies(cells) & (at == access.number)

        self._same_epoch(access, lanes, self.s_written[cells], at, "write", "write", copies)
        self._same_epoch(access, lanes, self.s_read[cells], read_at, "write", "read")

    def shared_written(self, access: Access) -> None:
        """After a write."""
        cells, lanes = access.cells(0, self.grain)
        code = (self.epoch[access.unit.program[lanes]] << 8) | access.unit.warp[lanes]
        self.s_written[cells], self.s_written_at[cells] = code, access.number
        if (self.s_written[cells] != code).any():
            self._at_once(access, "write of shared memory")

    # -- the asynchronous proxy: wgmma reads shared memory from its start until somebody waits for its group

    def proxy_fence(self, unit: Unit, lanes: Array) -> None:
        self.tick += 1
        self.fence_tick[unit.row[lanes]] = self.tick
        self.fence_epoch[unit.row[lanes]] = self.epoch[unit.program[lanes]]

    def async_read(self, access: Access) -> None:
        self.shared_read(access)
        cells, lanes = access.cells(0, self.grain)
        writer = access.unit.program[lanes] * self.warps + (self.s_written[cells] & SEVERAL)
        # Of the writer, before the barrier, or of the reader, behind it.
        late = self.s_tick[cells] >= self.fence_tick[writer]
        late &= self.s_written[cells] >> 8 >= self.fence_epoch[access.unit.row[lanes]]
        if late.any():
            i = int(late.argmax())
            what, who = "wgmma's read of shared memory, with no proxy fence between,", f"warp {writer[i] % self.warps}"
            self.tell(access, lanes[i], what, "write", who, self.s_written_at[cells[i]])
        np.add.at(self.reading, cells, 1)

    def async_done(self, access: Access) -> None:
        cells, lanes = access.cells(0, self.grain)
        np.add.at(self.reading, cells, -1)
        self._note_shared_read(access, cells, lanes)
