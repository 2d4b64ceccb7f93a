"""A clock: how many cycles a program takes per time step, and which lines of our source it waits for. Predicted.

A scoreboard goes over the executed instructions (``trace``) with the costs of ``latencies``. Warps issue in order; warp
w is on scheduler w % 4, which issues one instruction a cycle, that of the warp that can issue first. An instruction
waits for its operands and for its pipe. Shared memory moves 128 bytes a clock, L2 what the device's record says. At a
barrier a warp waits for all warps of its program and then for ``hardware.barrier``. Other programs are taken to be as
far as this one: a poll sees their announcements ``hardware.exchange`` after this program's own, less one trip to L2, in
which the data follow. Of data that are their own flags a load has those of others half of ``hardware.exchange`` after
the program has put its own: one trip through L2 instead of two.

Asynchronous copies and products of warp groups (cp.async, wgmma) issue and go on in their pipes; a warp waits for them
where it waits for their group. What both move through shared memory is booked there when they issue. A warp multiplies
its 16 rows without waiting for the other three of its group.

PTX is not SASS. Costless are moves between registers, widening without sign and loads of parameters; address arithmetic
counts, though ptxas folds some of it into offsets, and no instruction that it moves or merges is moved or merged here.
Left out: that what a step streams may exceed L2, other blocks on the multiprocessor, the caches of instructions and
constants, register banks, spills, L1, write-back of stores, and how long a taken branch takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .latencies import ARCHITECTURES, COSTS, SHARED_CONFLICT, Cost, group_columns, group_reads, kind
from .order import Known, ordered
from .ptx import EmulatorError, Instruction, Kernel
from .trace import SECTOR, Event, Trace, is_flagged

SCHEDULERS = 4
QUEUED = ("shared", "l2")  # pipes of the multiprocessor
EXCHANGE = "exchange (another program)"
GROUP = "product of a warp group"


@dataclass(eq=False)
class Issued:
    """An instruction at its time. cause: whom it waited for last, None at the beginning; line: what the wait since then
    is for."""

    event: Event
    warp: int
    time: float
    cause: Issued | None
    line: str


@dataclass
class _Wait:
    """Until ``time``, for ``cause``, at ``line`` of the source."""

    time: float = 0.0
    cause: Issued | None = None
    line: str = ""


class _Groups:
    """Of a warp's copies, or of its products: until when those of the open group and of all committed ones go on."""

    def __init__(self) -> None:
        self.open = _Wait()
        self.committed = [_Wait()]  # each with those before it

    def add(self, one: _Wait) -> None:
        self.open = _later(self.open, one)

    def commit(self) -> None:
        self.committed.append(_later(self.committed[-1], self.open))
        self.open = _Wait()

    def all_but(self, left: int) -> _Wait:
        return self.committed[max(0, len(self.committed) - 1 - left)]


def _later(*waits: _Wait) -> _Wait:
    return max(waits, key=lambda wait: wait.time)


class _Warp:
    def __init__(self, number: int, events: list[Event]):
        self.number, self.events, self.at = number, events, 0
        self.order = _Wait()
        self.ready: dict[str, _Wait] = {}
        self.at_barrier = False
        self.groups = {"cp": _Groups(), "wgmma": _Groups()}
        self.issued: list[Issued] = []


class Scoreboard:
    """Runs the events of all warps of a program from time 0, with all registers there."""

    def __init__(self, kernel: Kernel, warps: list[list[Event]], arch: str, hardware: Any):
        """hardware: has ``clock`` (GHz), ``exchange`` and ``barrier`` (microseconds), ``l2_rate`` (bytes per clock)."""
        self.kernel, self.hardware = kernel, hardware
        self.column = ARCHITECTURES.index(arch)
        self.kinds: dict[int, str] = {}
        known: Known = {}
        self.warps = [_Warp(w, ordered(events, kernel, self.latency, known)) for w, events in enumerate(warps)]
        self.barrier, self.exchange = (1e3 * hardware.clock * us for us in (hardware.barrier, hardware.exchange))
        self.busy: dict[tuple[str, int], _Wait] = {}
        self.announced: dict[Event, Issued] = {}
        self.among = {event for warp in warps for event in warp}
        self.operands = {i.number: kernel.read_and_written(i) for i in kernel.code}

    def cost(self, name: str) -> Cost:
        return COSTS[name][self.column]

    def kind(self, i: Instruction) -> str:
        if i.number not in self.kinds:
            self.kinds[i.number] = kind(i)
        return self.kinds[i.number]

    def run(self) -> list[list[Issued]]:
        """Per warp, in order."""
        while True:
            waits = [(self.wait(warp), warp) for warp in self.warps if self.skip_free(warp) and not warp.at_barrier]
            possible = [(wait, warp) for wait, warp in waits if wait is not None]
            if not possible:
                break
            wait, warp = min(possible, key=lambda found: (found[0].time, found[1].number))
            self.issue(warp, wait)
        if any(warp.at < len(warp.events) for warp in self.warps):
            raise EmulatorError("the clock stands still: warps wait at a barrier, or for an announcement")
        return [warp.issued for warp in self.warps]

    def skip_free(self, warp: _Warp) -> bool:
        """Past instructions that cost nothing; whether one is left."""
        while warp.at < len(warp.events):
            instruction = warp.events[warp.at].instruction
            if self.kind(instruction) != "free":
                return True
            read, written = self.operands[instruction.number]
            latest = max((warp.ready.get(r, _Wait()) for r in read), key=lambda w: w.time, default=_Wait())
            warp.ready.update(dict.fromkeys(written, latest))
            warp.at += 1
        return False

    def pipes(self, warp: _Warp, cost: Cost) -> list[tuple[str, int]]:
        found = [("scheduler", warp.number % SCHEDULERS)]
        if cost.pipe and cost.pipe not in QUEUED and cost is not self.cost(GROUP):
            found.append((cost.pipe, warp.number % SCHEDULERS))
        return found

    def wait(self, warp: _Warp) -> _Wait | None:
        """What the warp's next instruction waits for last; None: for an announcement that is yet to be made."""
        event = warp.events[warp.at]
        waits = [warp.ready.get(r, _Wait()) for r in self.operands[event.instruction.number][0]] + [warp.order]
        waits += [self.busy.get(pipe, _Wait()) for pipe in self.pipes(warp, self.cost_of(event)[1])]
        if "wait_group" in event.instruction.modifiers:
            waits.append(warp.groups[event.instruction.name].all_but(int(str(event.instruction.args[0]), 0)))
        if event.release is not None and event.release in self.among:
            if event.release not in self.announced:
                return None
            release = self.announced[event.release]
            waits.append(_Wait(release.time, release, release.line))
        for put in event.puts:
            if put in self.among:
                if put not in self.announced:
                    return None
                waits.append(_Wait(self.announced[put].time, self.announced[put], self.announced[put].line))
        return _later(*waits)

    def cost_of(self, event: Event) -> tuple[str, Cost]:
        """(class, cost); an access without an active lane is an empty slot."""
        name = self.kind(event.instruction)
        if name == "load":
            name = "load from memory" if event.first and not self.past_l1(event) else "load from L2"
        if self.cost(name).pipe in QUEUED and name != "shuffle" and not event.amount:
            name = "branch"
        return name, self.cost(name)

    def latency(self, event: Event) -> float:
        return self.cost_of(event)[1].cycles

    @staticmethod
    def past_l1(event: Event) -> bool:
        """What other programs have just written, and is in L2."""
        return bool({"cg", "acquire", "relaxed", "volatile"} & set(event.instruction.modifiers))

    def issue(self, warp: _Warp, wait: _Wait) -> None:
        event = warp.events[warp.at]
        i, (name, cost) = event.instruction, self.cost_of(event)
        now = Issued(event, warp.number, wait.time, wait.cause, wait.line)
        warp.issued.append(now)
        warp.at += 1
        begins, cycles = now.time, cost.cycles
        if cost.pipe in QUEUED:
            amount = max(1, event.amount)
            busy = amount * cost.busy if cost.pipe == "shared" else amount * SECTOR / self.hardware.l2_rate
            begins = self.book(cost.pipe, 0, now, busy) - busy
            if name == "shared load":
                cycles += SHARED_CONFLICT * (amount - 1)
            if name == "copy":
                cycles = max(cycles, self.book("shared", 0, now, event.stored) - begins)
        elif name == GROUP:
            read = self.book("shared", 0, now, group_reads(i))
            begins = max(read, self.book("tensor", warp.number % SCHEDULERS, now, group_columns(i) * cost.busy))
        else:
            for pipe in self.pipes(warp, cost)[1:]:
                self.busy[pipe] = _Wait(now.time + cost.busy, now, i.source)
        self.busy["scheduler", warp.number % SCHEDULERS] = _Wait(now.time + cost.slots, now, i.source)
        warp.order = _Wait(now.time + cost.slots, now, i.source)
        result = _Wait(begins + cycles, now, i.source)
        if i.name in ("red", "atom") or (i.name == "st" and is_flagged(i)):
            self.announced[event] = now
        for put in event.puts:
            if put in self.announced and self.announced[put].time + self.exchange / 2 > result.time:
                result = _Wait(self.announced[put].time + self.exchange / 2, self.announced[put], EXCHANGE)
        if event.release in self.announced:
            release = self.announced[event.release]
            seen = release.time + self.exchange - self.cost("load from L2").cycles
            if seen > result.time:
                result = _Wait(seen, release, EXCHANGE)
        if name in ("copy", GROUP):
            warp.groups[i.name].add(result)
        elif "commit_group" in i.modifiers:
            warp.groups[i.name].commit()
        else:
            for register in self.operands[i.number][1]:
                warp.ready[register] = result
        if name == "barrier":
            self.meet(warp, now)

    def book(self, pipe: str, number: int, now: Issued, busy: float) -> float:
        """Until when the pipe then works on what has issued now."""
        ends = max(now.time, self.busy.get((pipe, number), _Wait()).time) + busy
        self.busy[pipe, number] = _Wait(ends, now, now.event.instruction.source)
        return ends

    def meet(self, warp: _Warp, now: Issued) -> None:
        warp.at_barrier = True
        if all(other.at_barrier for other in self.warps):
            for other in self.warps:
                other.at_barrier = False
                other.order = _Wait(now.time + self.barrier, now, now.event.instruction.source)


@dataclass
class Step:
    """cycles: of one time step; barriers: in it; shares: (line of the source, cycles on the critical path), the longest
    first."""

    cycles: float
    barriers: int
    shares: list[tuple[str, float]]


def critical(last: Issued, since: float) -> Counter[str]:
    """Line -> cycles, of the time from ``since`` to ``last``: backward, who made whom wait."""
    found: Counter[str] = Counter()
    now: Issued | None = last
    while now is not None and now.time > since:
        before = max(since, now.cause.time if now.cause else 0.0)
        found[now.line] += now.time - before
        now = now.cause
    return found


def second_step(trace: Trace, steps: int, arch: str, hardware: Any) -> Step:
    """Of a launch over ``steps`` time steps, at least 3: from when all warps have begun step 2 to when they have begun
    step 3. What came before the loop over time is not clocked."""
    kernel = trace.kernel
    counts = Counter(event.block for event in trace.warps[0])
    loops = [(a, b) for a, b in kernel.loops if counts[a] >= steps]
    head = max(loops, key=lambda loop: loop[1] - loop[0])[0]
    if counts[head] not in (steps, steps + 1):
        raise EmulatorError(f"the loop over {steps} time steps runs {counts[head]} times")
    turns = [[n for n, event in enumerate(events) if event.block == head] for events in trace.warps]
    cut = [events[first:] for events, (first, *_) in zip(trace.warps, turns, strict=True)]
    issued = Scoreboard(kernel, cut, arch, hardware).run()
    begins = []
    for events, warp, at in zip(trace.warps, issued, turns, strict=True):
        later = [set(events[n:]) for n in at[1:3]]
        begins.append([next(one for one in warp if one.event in some) for some in later])
    since = max(first.time for first, _ in begins)
    last = max((second for _, second in begins), key=lambda one: one.time)
    barriers = sum(event.instruction.name in ("bar", "barrier") for event in trace.warps[0][turns[0][1] : turns[0][2]])
    return Step(last.time - since, barriers, critical(last, since).most_common())
