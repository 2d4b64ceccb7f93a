"""What one program of a launch executed, warp by warp: for ``clock``.

Its warps run in lockstep (``units="programs"`` or ``"rows"``), each poll seeing at once what it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Array
from .ptx import Instruction, Kernel

if TYPE_CHECKING:
    from .races import Access
    from .unit import Unit

LINE, SECTOR, BANKS = 128, 32, 32  # bytes, bytes, of 4 bytes each


@dataclass(eq=False)
class Event:
    """One instruction of one warp. amount: transactions of shared memory, or sectors of global memory, that its active
    lanes need (0: none is active, or no access); stored: transactions of what a copy puts into shared memory; first:
    whether it is the program's first access to a line; release: of what a poll sees, the program's own announcement;
    puts: of flagged data, the stores by which the program itself last put some; block: the basic block that begins
    here."""

    instruction: Instruction
    block: int | None = None
    amount: int = 0
    stored: int = 0
    first: bool = False
    release: Event | None = None
    puts: tuple[Event, ...] = ()


class Trace:
    """Of program ``program`` of the next launch."""

    def __init__(self, program: int = 0):
        self.program = program
        self.kernel: Kernel
        self.warps: list[list[Event]] = []
        self._open: list[dict[int, Event]] = []  # of each warp's last block, by number
        self._lines: set[tuple[int, int]] = set()
        self._released: dict[int, Event] = {}  # address -> the last announcement there
        self._last: Event | None = None
        self._puts: tuple[Event, ...] = ()

    def _active(self, unit: Unit, lanes: Array) -> dict[int, Array]:
        """warp of the program -> which of ``lanes`` are its."""
        mine = unit.program[lanes] == self.program
        warp = unit.warp[lanes]
        return {int(w): mine & (warp == w) for w in np.unique(warp[mine])}

    def enter(self, unit: Unit, block: int, mask: Array | None) -> None:
        self.kernel = unit.kernel
        if self.program not in unit.programs:
            return
        for w in self._active(unit, unit.all if mask is None else mask.nonzero()[0]):
            while len(self.warps) <= w:
                self.warps.append([])
                self._open.append({})
            events = [Event(i) for i in self.kernel.blocks[block]]
            events[0].block = block
            self.warps[w] += events
            self._open[w] = {e.instruction.number: e for e in events}

    def shared(self, access: Access) -> None:
        for w, mine in self._active(access.unit, access.lanes).items():
            event, amount = self._open[w][access.number], transactions(access.a[mine], access.size * access.vector)
            if event.instruction.name == "cp":
                event.stored = amount
            else:
                event.amount = amount

    def global_(self, access: Access, start: int) -> None:
        """start: of the tensor, which on a GPU begins at a line."""
        if self.program not in access.unit.programs:
            return
        stored: list[Event] = []
        for w, mine in self._active(access.unit, access.lanes).items():
            event = self._open[w][access.number]
            a, name = access.a[mine], event.instruction.name
            ends = np.concatenate([a, a + access.size * access.vector - 1]) - start
            event.amount = len(np.unique(ends // SECTOR))
            lines = {(start, line) for line in (ends // LINE).tolist()}
            event.first = not lines <= self._lines
            self._lines |= lines
            if name in ("red", "atom"):
                self._released[int(a[0])] = self._last = event
            elif name == "ld" and "acquire" in event.instruction.modifiers:
                event.release = self._released.get(int(a[0]), self._last)
            elif name == "st" and is_flagged(event.instruction):
                stored.append(event)
            elif is_flagged(event.instruction):
                event.puts = self._puts
        self._puts = tuple(stored) or self._puts


def is_flagged(i: Instruction) -> bool:
    """Whether it stores or loads words that are their own flags: strong, and of the device."""
    return "volatile" in i.modifiers or {"relaxed", "gpu"} <= set(i.modifiers)


def transactions(addresses: Array, width: int) -> int:
    """Of 128 bytes, that shared memory needs for the lanes of one warp, ``width`` bytes each: the hardware takes as
    many lanes at a time as have 128 bytes, and of these as often as one bank holds different words."""
    found, at_a_time = 0, LINE // max(width, 4)
    for n in range(0, len(addresses), at_a_time):
        a = addresses[n : n + at_a_time]
        words = np.unique((a[:, None] // 4 + np.arange(max(1, width // 4))).ravel())
        found += int(np.bincount(words % BANKS).max())
    return found
