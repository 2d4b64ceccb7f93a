"""One launch: its programs take turns as a schedule says, and meet at barriers."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from .arithmetic import U8, UNSIGNED
from .counts import Report
from .memory import Memory
from .opcodes import ACQUIRE, ATOMIC, BARRIER, LOAD
from .ptx import EmulatorError, Kernel
from .races import Races
from .trace import Trace
from .translate import Translator
from .unit import Unit


@dataclass
class Schedule:
    """Who runs next.

    order: "random", for up to ``burst`` operations each; "turns"; "first": the first that can, until it polls.
    slow: (program, warp or None, kind or None): what takes a ``rarely``-th of its turns, all of them or those before
    operations of a kind.
    """

    seed: int = 0
    order: str = "random"
    slow: Collection[tuple[int, int | None, int | None]] = ()
    rarely: int = 25
    burst: int = 6

    def __post_init__(self) -> None:
        self._random, self.turn = random.Random(self.seed), 0

    def pick(self, units: list[Unit]) -> tuple[Unit, int]:
        if self.order == "turns":
            self.turn += 1
            return units[self.turn % len(units)], 1
        if self.order == "first":
            return units[0], 1 << 30
        for _ in range(8):
            unit = self._random.choice(units)
            kinds = self.slow_kinds(unit)
            if not kinds:
                return unit, self._random.randint(1, self.burst)
            if not {None, unit.last} & kinds or self._random.random() < 1 / self.rarely:
                return unit, 1
        return unit, 1

    def slow_kinds(self, unit: Unit) -> set[int | None]:
        mine = (None, int(unit.warp[0])) if unit.parts else (None,)
        return {kind for program, warp, kind in self.slow if program in unit.programs and warp in mine}


class Grid:
    """A launch of ``shape`` programs.

    values: (value, bytes) of each parameter. units: what runs in lockstep, "warps" (warp groups where they multiply
    together), "programs", or "rows" (the programs of one row of the grid, which is fastest). absent: programs that
    never run. patience: polls in a row of all units, with nothing stored between, that are taken for a hang. trace:
    what one program executes.
    """

    def __init__(self, kernel: Kernel, shape: tuple[int, int, int], values: list[tuple[int, int]], memory: Memory,
                 units: str = "programs", schedule: Schedule | None = None, absent: Collection[int] = (),
                 patience: int = 20_000, trace: Trace | None = None):  # fmt: skip
        self.kernel, self.shape, self.values, self.memory = kernel, shape, values, memory
        self.programs, self.warps = shape[0] * shape[1] * shape[2], kernel.threads // 32
        self.schedule, self.patience, self.trace = schedule or Schedule(), patience, trace
        self.report = Report(kernel, self.programs, shape[0])
        self.progress = 0  # stores that changed something
        self.stride = (kernel.shared + 255) // 128 * 128
        store = np.full(self.stride * self.programs + 256, 0xA5, U8)  # what nobody has written is not zero
        self.shared = {size: store.view(dtype) for size, dtype in UNSIGNED.items()}
        self.arrived: dict[int, list[tuple[Unit, int]]] = defaultdict(list)
        self.votes: dict[int, bool] = {}
        self.races = Races(self)
        self.units = [Unit(self, warps) for warps in self._lockstep(units, set(range(self.programs)) - set(absent))]
        self._expected = Counter(unit.programs[0] for unit in self.units)

    def translation(self, lanes: int) -> Callable:
        if lanes not in self.kernel.translations:
            self.kernel.translations[lanes] = Translator(self.kernel, lanes).function()
        return self.kernel.translations[lanes]

    def _lockstep(self, units: str, programs: set[int]) -> list[list[tuple[int, int]]]:
        size = 4 if self.kernel.uses("wgmma") else 1
        made: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for p in sorted(programs):
            for w in range(self.warps):
                key = {"warps": (p, w // size), "programs": (p, 0), "rows": (p // self.shape[0], 0)}[units]
                made[key].append((p, w))
        return list(made.values())

    def run(self) -> Report:
        live, quiet = list(self.units), 0
        with np.errstate(all="ignore"):
            while live:
                ready = [unit for unit in live if not unit.waits]
                if not ready:
                    raise EmulatorError("all units wait at barriers, and some warps of their programs have ended")
                unit, turns = self.schedule.pick(ready)
                progress = self.progress
                polled = self._go_on(unit, turns, live)
                quiet = 0 if self.progress > progress else quiet + polled
                if polled and quiet > self.patience * len(live):
                    raise EmulatorError(f"a hang: programs {sorted({u.programs[0] for u in live})} poll, nobody stores")
        self.report.blocks = [unit.count for unit in self.units]
        return self.report

    def _go_on(self, unit: Unit, turns: int, live: list[Unit]) -> bool:
        """Whether it ended in a poll that stored nothing."""
        progress = self.progress
        for _ in range(turns):
            try:
                unit.last = next(unit.generator)
            except StopIteration:
                live.remove(unit)
                return False
            if unit.last == BARRIER:
                self._meet(unit)
                return False
            if unit.last in (ACQUIRE, ATOMIC, LOAD):
                if self.progress == progress:
                    if self.schedule.order == "first":  # let the next one run
                        live.append(live.pop(live.index(unit)))
                    return True
                progress = self.progress
        return False

    def _meet(self, unit: Unit) -> None:
        unit.waits = True
        program = unit.programs[0]
        there = self.arrived[program]
        if len(there) < self._expected[program]:
            return
        if len({number for _, number in there}) > 1:
            names = sorted({unit.name(number) for _, number in there})
            self.report.races.append(f"warps of program {program} meet at different barriers: {names}")
        self.votes[program] = all(other.vote is None or bool(other.vote.all()) for other, _ in there)
        for other, _ in there:
            other.waits = False
        there.clear()
        self.races.barrier([program])
