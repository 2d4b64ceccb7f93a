"""What was measured on a device: one data file each, ``measured/<name>.json``, read and checked. No torch, no Triton.

    {"provenance": {"device": "NVIDIA H200", "driver": "...", "torch": "...", "triton": "...", "commit": "...",
                    "date": "...", "command": "..."},
     "constants": {"exchange": 0.66, "l2_rate": 58.0},
     "steps": [{"cell": "lstm", "hidden": 1024, "batch": 16, "directions": 1, "dtype": "bf16", "backward": false,
                "path": "persistent", "microseconds": 1.23}]}

``constants`` holds any of ``MEASURABLE`` in the units of ``hardware.Hardware``. Anything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from .typed_json import Count, Positive, Words, load, refused

MEASURED = Path(__file__).parent / "measured"
Constant: TypeAlias = Literal["l2_rate", "shared_rate", "exchange", "barrier", "launch", "memory_rate", "clock"]
MEASURABLE: tuple[str, ...] = get_args(Constant)


@dataclass(frozen=True)
class Provenance:
    """Under which circumstances it was measured."""

    device: Words
    driver: Words
    torch: Words
    triton: Words
    commit: Words
    date: Words
    command: Words


@dataclass(frozen=True)
class Step:
    """One measured time step of one layer, in microseconds."""

    cell: Words
    hidden: Count
    batch: Count
    directions: Literal[1, 2]
    dtype: Literal["fp16", "bf16", "tf32", "fp32"]
    backward: bool
    path: Literal["persistent", "torch"]
    microseconds: Positive


@dataclass(frozen=True)
class Measurements:
    """All of one device."""

    provenance: Provenance
    constants: dict[Constant, Positive]
    steps: list[Step]

    def __post_init__(self) -> None:
        seen: set[Step] = set()
        for i, step in enumerate(self.steps):
            case = replace(step, microseconds=0.0)
            if case in seen:
                raise refused(f"steps[{i}]", step, "each case once")
            seen.add(case)


@lru_cache
def measurements(name: str, folder: Path = MEASURED) -> Measurements | None:
    """What was measured on the device of that name; None if nothing was."""
    path = folder / f"{name}.json"
    return load(Measurements, path) if path.is_file() else None
