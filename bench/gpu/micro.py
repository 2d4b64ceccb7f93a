"""Microbenchmarks of what the cost model takes for granted: the exchange between programs, L2, shared memory, barriers,
launches, device memory, the clock.

Every number is a median over ``Scale.rounds`` rounds. Microseconds come from CUDA events: work of N and of N/2, the
difference divided by N/2, so that what happens once per launch drops out. Bytes per clock come from the
multiprocessors' own clocks. Every launch's results are checked: a wrong one is an error, and no number.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import micro_kernels as kernels
from bench.report.results import Micro
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import SPIN_LIMIT, Exchange
from persistrnn.kernels.planner.measurements import Constant
from persistrnn.kernels.planner.occupancy import shared_bound

KIB = 1024
LINES_READ = 4 * KIB  # in one tile of the broadcast
FIRST_CALL = """
import time, torch, persistrnn
layer = persistrnn.LSTM(1024, 1024, device="cuda", dtype=torch.bfloat16, backend="persistent")
x = torch.randn(64, 16, 1024, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
before = time.perf_counter()
layer(x)[0].sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - before)
"""
LEAD = 200.0  # microseconds for which the device is kept busy while the host queues what is measured


@dataclass(frozen=True)
class Scale:
    """How much of everything; the defaults are for a GPU.

    Attributes:
        programs, payloads: of the exchange; bytes that each program reads per step, 0 for the announcement alone.
        exchanges: per launch. lines: of one tile that is put or got, one per thread.
        broadcast: bytes of the buffer that all read. read: bytes that each program reads per launch.
        sweep: K of the resident weights, of which there are 64 rows. steps: per launch.
        barriers, launches: in one timing. cycles: of a spin. copied: bytes.
        rounds: timings that count. warmups, settle: before them, so many and for so many seconds, those that do not,
            lest the clock is still on its way up from idle.
        spin_limit: polls before a wait gives up.
    """

    programs: tuple[int, ...] = (4, 16, 64, 128)
    payloads: tuple[int, ...] = (0, 4 * KIB, 64 * KIB)
    exchanges: int = 512
    lines: int = 256
    broadcast: tuple[int, ...] = (64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB)
    read: int = 64 * KIB * KIB
    sweep: tuple[int, ...] = (256, 512, 1024, 1536)
    steps: int = 2000
    barriers: int = 100_000
    launches: int = 200
    cycles: int = 2_000_000
    copied: int = 2 * KIB**3
    rounds: int = 15
    warmups: int = 3
    settle: float = 0.2
    spin_limit: int = SPIN_LIMIT


# In Triton's interpreter, where times say nothing. The programs of the exchange must run at the same time there too.
REHEARSAL = Scale(
    programs=(2, 3, 132), payloads=(0, 100), exchanges=4, lines=4, broadcast=(64 * KIB, 128 * KIB), read=256 * KIB,
    sweep=(128,), steps=2, barriers=4, launches=4, cycles=640, copied=4 * KIB, rounds=2, warmups=0, settle=0.0,
    spin_limit=200_000,
)  # fmt: skip


def title(name: str, programs: int, payload: int) -> str:
    return f"{name}, {programs} programs, {payload:,} bytes"


@dataclass(frozen=True)
class Item:
    """One measurement. start: allocates, and returns what takes one round's value. skip: why it cannot run here."""

    name: str
    programs: int
    payload: int
    unit: str
    start: Callable[[], Callable[[], float]]
    skip: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.programs, self.payload

    def __str__(self) -> str:
        return title(*self.key)


class Machine:
    """The device that is measured, and how to launch and time on it."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device = device
        self.scale = scale
        self.hardware = launch.hardware(device)
        self.cuda = device.type == "cuda"
        self.multiprocessors = self.hardware.multiprocessors if self.cuda else 4
        self.lead = LEAD

    def new(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def error_word(self) -> Tensor:
        """int32 [1] in host memory, which a wait that runs out writes."""
        return torch.zeros(1, dtype=torch.int32, pin_memory=self.cuda)

    def free(self) -> int:
        """Bytes of device memory."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 40

    def options(self, warps: int, cooperative: bool = False) -> dict[str, object]:
        """Compile options as the scan's: all registers that so many warps can have."""
        chosen: dict[str, object] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        if self.cuda:
            chosen["maxnreg"] = min(255, 65536 // (32 * warps) // 8 * 8)
        return chosen | {"launch_cooperative_grid": cooperative}

    def spin(self, cycles: Tensor, wanted: int) -> None:
        kernels.spin[(len(cycles),)](cycles, wanted, PTX=self.cuda, **self.options(1))

    def time(self, prepare: Callable[[], object], work: Callable[[], object]) -> float:
        """Microseconds that the device needs for what ``work`` queues; ``prepare`` comes before each attempt.

        Raises:
            RuntimeError: the host cannot queue the work as fast as the device does it, even with much of a lead.
        """
        if not self.cuda:
            prepare()
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e6
        idle = self.new(1, dtype=torch.int64)
        for _ in range(10):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepare()
            self.spin(idle, round(self.lead * self.hardware.clock * 1e3))
            before.record()
            work()
            after.record()
            ahead = not before.query()
            after.synchronize()
            if ahead:
                return before.elapsed_time(after) * 1e3
            # The device had to wait for the host: a first launch compiles, many launches take their time.
            self.lead *= 2
        raise RuntimeError(f"the host needs more than {self.lead / 2:.0f} us to queue what is to be measured")


def slope(run: Callable[[int], float], n: int) -> float:
    """What one more of something costs: run(n) and run(n // 2) say what so many cost together."""
    half = n // 2
    return (run(n) - run(half)) / (n - half)


def _verify(what: str, found: Tensor, expected: Tensor | int) -> None:
    """Raises RuntimeError where any number is another one."""
    wrong = found != expected
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        right = expected if isinstance(expected, int) else expected.expand(found.shape)[where].item()
        raise RuntimeError(
            f"{what}: {int(wrong.sum())} of {found.numel()} results are wrong, the first at {where}: "
            f"{found[where].item()} instead of {right}"
        )


# ---- the exchange -------------------------------------------------------------------------------------------------


def _exchange(machine: Machine, protocol: str, programs: int, payload: int) -> Callable[[], float]:
    """Microseconds per exchange. One slot per step, so that none is written while another program reads it."""
    scale = machine.scale
    share = kernels.lines_of(protocol, programs, payload)
    lines = programs * share
    # Filled with the reserved NaN, which under the other protocol shows what was got before it was put.
    buffer = machine.new(max(scale.exchanges * lines, 1), 8, dtype=torch.float16)
    counter, stale = machine.new(1), machine.new(1)
    error = machine.error_word()
    sums = machine.new(programs, scale.lines, dtype=torch.float32)
    how = Exchange(protocol=protocol, poll="ptx" if machine.cuda else "atomic", spin_limit=scale.spin_limit)
    tiles = {"PUTS": -(-share // scale.lines), "GETS": -(-lines // scale.lines), "LINES": scale.lines}
    expected = lru_cache(lambda steps: kernels.received(steps, lines, scale.lines).to(machine.device))

    def prepare() -> None:
        buffer.view(torch.int16).fill_(-1)
        counter.zero_()
        stale.zero_()
        sums.fill_(-1)

    def work(steps: int) -> None:
        kernels.exchange_rounds[(programs,)](
            buffer, counter, error, stale, sums, steps, share, **tiles, exchange=how,
            **machine.options(max(scale.lines // 32, 1), cooperative=True),
        )  # fmt: skip

    def run(steps: int) -> float:
        what = f"exchange by {protocol}, {programs} programs, {payload} bytes, {steps} steps"
        microseconds = machine.time(prepare, partial(work, steps))
        if error[0]:
            raise RuntimeError(f"{what}: a program gave up waiting for another; is the device shared?")
        _verify(f"{what}: what was got before it was put", stale, 0)
        _verify(f"{what}: sums", sums, expected(steps))
        _verify(f"{what}: announcements", counter, steps * programs if protocol == "counter" else 0)
        return microseconds

    return lambda: slope(run, scale.exchanges)


# ---- the others ---------------------------------------------------------------------------------------------------


def _broadcast(machine: Machine, payload: int) -> Callable[[], float]:
    """Bytes per clock and multiprocessor, all reading the same buffer past L1."""
    programs = machine.multiprocessors
    blocks = payload // (LINES_READ * kernels.LINE)
    turns = machine.scale.read // payload
    buffer = torch.randint(-128, 128, (blocks, LINES_READ, 4), dtype=torch.int32, device=machine.device)
    expected = int(buffer.sum()) * turns
    sums, cycles = machine.new(programs), machine.new(programs, dtype=torch.int64)

    def once() -> float:
        sums.fill_(0)
        kernels.read_again[(programs,)](
            buffer, sums, cycles, turns, blocks, LINES=LINES_READ, PTX=machine.cuda, **machine.options(16)
        )
        _verify(f"reading {payload} bytes {turns} times: sums", sums, expected)
        return turns * payload / statistics.median(cycles.tolist())

    return once


def _sweep(machine: Machine, depth: int) -> Callable[[], float]:
    """Bytes per clock and multiprocessor."""
    programs, steps = machine.multiprocessors, machine.scale.steps
    t = kernels.swept(depth, not machine.cuda)
    # Whole numbers, so that sums are exact in any order; not zeros, which need less power.
    weight = torch.randint(-1, 2, (t.gates * depth, depth), device=machine.device).half()
    operand = torch.randint(-1, 2, (t.batch_tile, depth), device=machine.device).half()
    expected = steps * (weight.float().view(t.gates, depth, depth)[:, : t.units] @ operand.float().T)
    sums = machine.new(programs, t.gates, t.units, t.batch_tile, dtype=torch.float32)
    cycles = machine.new(programs, dtype=torch.int64)

    def once() -> float:
        sums.fill_(-0.5)
        kernels.sweep_shared[(programs,)](
            weight, operand, sums, cycles, steps, tiling=t, exchange=Exchange(), PTX=machine.cuda,
            **machine.options(kernels.WARPS),
        )  # fmt: skip
        _verify(f"sweeping K={depth} {steps} times: products", sums, expected)
        return steps * kernels.bytes_swept(t) / statistics.median(cycles.tolist())

    return once


def _counted(machine: Machine, what: str, n: int, queue: Callable[[Tensor, int], object]) -> Callable[[], float]:
    """Microseconds for one more of what ``queue(count, n)`` does n times, count being what the programs count."""
    count = machine.new(machine.multiprocessors)

    def run(times: int) -> float:
        microseconds = machine.time(count.zero_, partial(queue, count, times))
        _verify(f"{what}: how many", count, times)
        return microseconds

    return lambda: slope(run, n)


def _barrier(machine: Machine) -> Callable[[], float]:
    """Of the warps of a program that have nothing else to do."""

    def queue(count: Tensor, steps: int) -> None:
        kernels.barriers[(len(count),)](count, steps, **machine.options(kernels.WARPS))

    return _counted(machine, "barriers", machine.scale.barriers, queue)


def _launches(machine: Machine, cooperative: bool) -> Callable[[], float]:
    """Of next to nothing, one behind the other in a queue that is never empty."""

    def queue(count: Tensor, n: int) -> None:
        for _ in range(n):
            kernels.touch[(len(count),)](count, **machine.options(4, cooperative))

    return _counted(machine, "launches", machine.scale.launches, queue)


def _clock(machine: Machine) -> Callable[[], float]:
    """GHz: cycles that the multiprocessors count, against event time."""
    cycles = machine.new(machine.multiprocessors, dtype=torch.int64)

    def spun(wanted: int) -> tuple[int, float]:
        microseconds = machine.time(cycles.zero_, lambda: machine.spin(cycles, wanted))
        if int(cycles.min()) < wanted:
            raise RuntimeError(f"a spin of {wanted} cycles took {int(cycles.min())}")
        return int(cycles.max()), microseconds

    def once() -> float:
        (more, longer), (less, shorter) = spun(machine.scale.cycles), spun(machine.scale.cycles // 2)
        return (more - less) / (longer - shorter) * 1e-3

    return once


def _memory(machine: Machine) -> Callable[[], float]:
    """GB/s of a copy, bytes read and bytes written."""
    n = machine.scale.copied // 4
    source = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device=machine.device)
    target = torch.empty_like(source)
    sample = slice(None, None, max(1, n >> 20))

    def once() -> float:
        microseconds = machine.time(target.zero_, lambda: target.copy_(source))
        _verify("copy", target[sample], source[sample])
        return 2 * machine.scale.copied / microseconds * 1e-3

    return once


# ---- all of them --------------------------------------------------------------------------------------------------


def items(machine: Machine) -> list[Item]:
    """What there is to measure, in the order in which a short run should take it."""
    scale, here = machine.scale, machine.multiprocessors
    found = [Item("clock", here, 0, "GHz", lambda: _clock(machine))]
    for protocol in ("counter", "flags"):
        for programs in sorted(scale.programs, reverse=True):
            skip = f"{programs} programs on {here} multiprocessors" if programs > here else ""
            for payload in scale.payloads:
                start = partial(_exchange, machine, protocol, programs, payload)
                found.append(Item(f"exchange {protocol}", programs, payload, "us", start, skip))
    rate = "bytes per clock"
    found += [Item("l2", here, payload, rate, partial(_broadcast, machine, payload)) for payload in scale.broadcast]
    for depth in scale.sweep:
        t = kernels.swept(depth, not machine.cuda)
        needed, room = shared_bound(t, 2, 2)[2], machine.hardware.shared
        skip = f"{needed:,} bytes of shared memory, there are {room:,}" if needed > room else ""
        found.append(Item("shared", here, t.m * depth * 2, rate, partial(_sweep, machine, depth), skip))
    found.append(Item("barrier", here, 0, "us", lambda: _barrier(machine)))
    found.append(Item("launch", here, 0, "us", lambda: _launches(machine, False)))
    found.append(Item("launch cooperative", here, 0, "us", lambda: _launches(machine, True)))
    free = machine.free()
    skip = f"{free:,} bytes of memory are free" if free < 3 * scale.copied else ""
    found.append(Item("memory", here, scale.copied, "GB/s", lambda: _memory(machine), skip))
    return found


def measured(machine: Machine, item: Item) -> Micro:
    """Median and quartiles of one measurement, after those that do not count.

    Raises:
        RuntimeError: a result is wrong, a wait ran out, or the median is not above 0: what was timed takes no more time
            than it varies by.
    """
    scale = machine.scale
    machine.lead = LEAD
    once = item.start()
    settled = time.monotonic() + scale.settle
    warm = 0
    while warm < scale.warmups or time.monotonic() < settled:
        once()
        warm += 1
    low, median, high = statistics.quantiles([once() for _ in range(scale.rounds)], n=4, method="inclusive")
    if machine.cuda and median <= 0:
        raise RuntimeError(f"{item}: {median:.3g} {item.unit}; the times vary by more than what was to be measured")
    low, median, high = (max(value, 0.0) for value in (low, median, high))
    return Micro(item.name, item.programs, item.payload, median, low, high, item.unit, scale.rounds)


def first_call() -> Micro:
    """Seconds of the first forward and backward in a process of its own that has nothing compiled yet.

    Raises:
        RuntimeError: it failed; what it said.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the first call failed with status {done.returncode}: {done.stderr[-1500:]}")
    seconds = float(done.stdout.split()[-1])
    return Micro("first call", 1, 0, seconds, seconds, seconds, "s", 1)


# Constant of the plan -> its measurement, and which of several: the one with the smallest of these.
_RULES: dict[Constant, tuple[str, Callable[[Micro], Any]]] = {
    "exchange": ("exchange counter", lambda m: (-m.programs, m.payload)),
    "l2_rate": ("l2", lambda m: m.payload),
    "shared_rate": ("shared", lambda m: -m.payload),
    "barrier": ("barrier", lambda m: m.programs),
    "launch": ("launch", lambda m: m.programs),
    "memory_rate": ("memory", lambda m: -m.payload),
    "clock": ("clock", lambda m: m.programs),
}


def constants(micros: list[Micro]) -> dict[Constant, float]:
    """The plan's constants (``measurements.MEASURABLE``) of which there is a measurement.

    exchange: by counter, of the most programs, with data (as it is defined) but as few bytes as there are.
    l2_rate: of the smallest buffer, for what all programs read alike is a tile of h, some tens of KiB.
    shared_rate: of the most weights, beside which the barrier in each step counts least. memory_rate: of the largest
    copy. launch: not cooperative. The others are one measurement each.
    """
    found = {}
    for constant, (name, preference) in _RULES.items():
        needed = 1 if constant == "exchange" else 0
        candidates = [m for m in micros if m.name == name and m.value > 0 and m.payload >= needed]
        if candidates:
            found[constant] = min(candidates, key=preference).value
    return found
