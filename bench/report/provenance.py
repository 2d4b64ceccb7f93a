"""Where numbers come from: device, versions, clocks, commit. What cannot be read says so instead of failing."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import triton

from bench import UsageError
from bench.report.results import Provenance

ROOT = Path(__file__).resolve().parents[2]  # bench may be a link
UNKNOWN = "unknown"
# Numbers of one file have these in common.
SAME = ("device", "driver", "torch", "triton", "commit")


def _output(*command: str) -> str:
    """What a command prints, or "" where it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _query(name: str) -> str:
    """One property of the first GPU, as nvidia-smi prints it."""
    found = _output("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader,nounits").splitlines()
    return found[0].strip() if found else ""


def clock() -> int:
    """The multiprocessors' clock now, in MHz; 0 where it cannot be read."""
    found = _query("clocks.sm")
    return int(found) if found.isdigit() else 0


def state() -> str:
    """What the first GPU is doing before it is measured, as nvidia-smi tells it."""
    names = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,compute_mode,mig.mode.current"
    return f"{names}: {_query(names) or UNKNOWN}"


def provenance(device: torch.device, command: list[str] | None = None, commit: str = "") -> Provenance:
    """The present circumstances. commit: for a checkout without its history, where git cannot say."""
    cuda = device.type == "cuda"
    program = Path(sys.argv[0])  # ``python -m pytest`` is called .../pytest/__main__.py
    typed = [program.parent.name if program.stem == "__main__" else program.name, *sys.argv[1:]]
    properties = torch.cuda.get_device_properties(device) if cuda else None
    cudnn = torch.backends.cudnn.version() if cuda else None
    return Provenance(
        device=properties.name if properties else f"CPU ({platform.machine()})",
        arch=f"sm_{properties.major}{properties.minor}" if properties else "cpu",
        multiprocessors=properties.multi_processor_count if properties else 0,
        driver=(_query("driver_version") or UNKNOWN) if cuda else "none",
        cuda=torch.version.cuda or "none",
        cudnn=str(cudnn) if cudnn else "none",
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        commit=commit or _output("git", "rev-parse", "HEAD") or UNKNOWN,
        dirty=bool(_output("git", "status", "--porcelain")),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(typed if command is None else command),
        clocks_before=clock() if cuda else 0,
        clocks_after=0,
        rehearsal=not cuda,
    )


def refuse_another(path: Path, before: Provenance, now: Provenance) -> None:
    """Numbers of two machines, or of two versions, do not go into one file; what is unknown may be the same.

    Raises:
        UsageError: something else than before.
    """
    for name in SAME:
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now and UNKNOWN not in (was, is_now):
            raise UsageError(f"{path} was measured with {name} {was!r}, now it is {is_now!r}; name another --output")
