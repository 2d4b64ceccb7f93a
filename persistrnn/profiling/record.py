"""What a profile holds: where it ran, how, and what was measured at each T."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .subject import Call
from .trace import Phase, Span

UNTRACED = "not traced: too many operators"
NO_KERNELS = "not traced: the profiler saw no kernels"
GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """optimizer: of OPTIMIZERS; iterations, warmup: at each T; seconds: after which no more than LEAST are timed."""

    optimizer: str
    iterations: int
    warmup: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Where it ran. kind: "cpu" or "cuda"; memory: bytes of the device, on a CPU of the machine or its container."""

    kind: str
    name: str
    memory: int
    threads: int
    interpreted: bool
    torch: str
    triton: str
    python: str
    date: str


@dataclass
class Point:
    """One arm at one T. failed: why there are no numbers (then all are 0), else empty.

    seconds: of an iteration, median; low, high: the quartiles. held: bytes between two iterations (parameters,
    optimizer, batch); peak: bytes above that within one. phases: seconds scaled to the iteration's, on a GPU those of
    kernels and of the idle device; spans: of the profiled iteration, which took ``profiled`` seconds. Where none are
    known ``untraced`` says why, and on a CPU the peak is 0 as well.
    """

    arm: str
    steps: int
    failed: str = ""
    tokens: int = 0
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    iterations: int = 0
    held: int = 0
    peak: int = 0
    profiled: float = 0.0
    phases: dict[str, Phase] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    untraced: str = ""

    @property
    def path(self) -> str:
        return ", ".join(dict.fromkeys(call.path for call in self.calls))

    @property
    def per_step(self) -> float:
        """Microseconds per time step."""
        return self.seconds / self.steps * 1e6

    @property
    def total(self) -> int:
        """Bytes allocated at once, at the highest point."""
        return self.held + self.peak

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bytes_per_token(self) -> float:
        return self.peak / self.tokens


@dataclass
class Profile:
    """What was measured: ``points`` by arm, then by T. subject: what was run, in words. outlook: what the plan predicts
    for the largest recurrent stack in it (``decide.predict_stack``), None where ``no_outlook`` says why."""

    subject: str
    machine: Machine
    settings: Settings
    points: list[Point]
    outlook: Any = None
    no_outlook: str = ""

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(point.arm for point in self.points))

    def of(self, arm: str) -> list[Point]:
        """The points of an arm that have numbers."""
        return [point for point in self.points if point.arm == arm and not point.failed]

    def longest(self, arm: str) -> int:
        """The longest T that fits the memory, by a line through the two longest measured; 0 if none was. Three digits,
        as no more are known."""
        known = [(0, 0), *((point.steps, point.total) for point in self.of(arm) if point.peak)]
        if len(known) == 1:
            return 0
        (fewer, less), (steps, most) = known[-2:]
        slope = (most - less) / (steps - fewer)
        found = int((self.machine.memory - most) / slope) + steps if slope > 0 else 0
        digits = max(len(str(found)) - 3, 0)
        return found // 10**digits * 10**digits


def machine(device: str) -> Machine:
    cuda = torch.device(device).type == "cuda"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return Machine(
        kind="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name(device) if cuda else f"CPU: {_processor()}",
        memory=torch.cuda.get_device_properties(device).total_memory if cuda else _host_memory(),
        threads=torch.get_num_threads(),
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        torch=torch.__version__,
        triton=triton,
        python=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_memory() -> int:
    """Of the machine, or what a container may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole
