"""What a run shows while it goes: bars, and the most memory that it took."""

import ctypes
import functools
import gc
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

# tqdm on stderr, from the first second on; where that is no terminal, with an update every half minute.
LOG = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}
bar = functools.partial(tqdm, leave=False, delay=1, **LOG)


class PeakMemory:
    """Measures from its creation on: on a GPU what torch has allocated at most, on the CPU by how much the process's
    resident memory grew at most. NaN where the kernel lets no process begin its high-water mark anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not count
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        except (AttributeError, OSError):
            self.before = math.nan

    @property
    def added(self) -> float:
        """GiB at most since the creation."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return math.nan if math.isnan(self.before) else resident("VmHWM") - self.before


def resident(field: str) -> float:
    """GiB, of a field of this process's status: VmRSS is now, VmHWM the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 2**20
