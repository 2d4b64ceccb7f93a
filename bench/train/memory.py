"""The most memory that a stretch of work takes, on a GPU or on the CPU."""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
FORGET = Path("/proc/self/clear_refs")  # "5" lets the kernel's high-water mark begin anew


class PeakMemory:
    """Measures from its creation on.

    On a GPU what torch has allocated at most; on the CPU the process's resident memory at most.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what was freed before shall not count
            if trim is not None:
                trim(0)
        try:
            FORGET.write_text("5")
            self.before = resident("VmRSS")
        except OSError:
            self.before = math.nan

    @property
    def total(self) -> float:
        """GiB at most since the creation."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        if math.isnan(self.before):  # that of the process, since it began
            kilobyte = 1 if sys.platform == "darwin" else 1024  # of getrusage
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30
        return resident("VmHWM")

    @property
    def added(self) -> float:
        """GiB at most since the creation; on the CPU without what the process held then, Python and torch's code among
        it, and NaN where the system cannot tell (others than Linux)."""
        return self.total if self.device.type == "cuda" else self.total - self.before


def resident(field: str) -> float:
    """GiB, of a field of this process's status: VmRSS is now, VmHWM the most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 2**20
