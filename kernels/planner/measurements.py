"""What was measured on a device: one data file each, ``measured/<name>.json``, read and checked. No torch, no Triton.

    {"provenance": {"device": "NVIDIA H200", "driver": "...", "torch": "...", "triton": "...", "commit": "...",
                    "date": "...", "command": "..."},
     "constants": {"exchange": 0.66, "l2_rate": 58.0},
     "steps": [{"cell": "lstm", "hidden": 1024, "batch": 16, "directions": 1, "dtype": "bf16", "pass": "forward",
                "path": "persistent", "microseconds": 1.23}]}

All three keys and all provenance keys must be there, each provenance value a text that is not empty. ``constants``
holds any of ``MEASURABLE`` in the units of ``hardware.Hardware``. ``steps`` holds measured time steps of one layer:
"pass" is "forward" or "backward", "path" is "persistent" or "torch". A file that is anything else is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"

DTYPES = ("fp16", "bf16", "tf32", "fp32")
MEASURABLE = ("l2_rate", "shared_rate", "exchange", "barrier", "launch", "memory_rate", "clock")
PROVENANCE = ("device", "driver", "torch", "triton", "commit", "date", "command")


@dataclass(frozen=True)
class Step:
    """One measured time step of one layer, in microseconds. ``path`` is "persistent" or "torch"."""

    cell: str
    hidden: int
    batch: int
    directions: int
    dtype: str
    backward: bool
    path: str
    microseconds: float


@dataclass(frozen=True)
class Measurements:
    """What was measured on one device, and under which circumstances. See the module's text."""

    provenance: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, float], ...]
    steps: tuple[Step, ...]


class _Reader:
    """Checks the values of one file; a message has the file, the place, the given value and what is allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, place: str, given: object, allowed: str) -> ValueError:
        return ValueError(f"{self.path}: {place} is {given!r}, allowed: {allowed}")

    def keys(self, place: str, given: Any, allowed: tuple[str, ...], *, all_of_them: bool = True) -> dict[str, Any]:
        names = f"{'all' if all_of_them else 'any'} of {', '.join(allowed)}"
        if not isinstance(given, dict):
            raise self.refuse(place, given, f"an object with {names}")
        unknown = sorted(given.keys() - set(allowed))
        missing = [name for name in allowed if name not in given] if all_of_them else []
        if unknown or missing:
            wrong = [f"unknown: {', '.join(unknown)}"] if unknown else []
            wrong += [f"missing: {', '.join(missing)}"] if missing else []
            raise self.refuse(f"the list of keys of {place} ({'; '.join(wrong)})", sorted(given), names)
        return given

    def text(self, place: str, given: Any) -> str:
        if not isinstance(given, str) or not given.strip():
            raise self.refuse(place, given, "a text that is not empty")
        return given

    def one_of(self, place: str, given: Any, allowed: tuple[str, ...]) -> str:
        if not isinstance(given, str) or given not in allowed:
            raise self.refuse(place, given, ", ".join(allowed))
        return given

    def positive(self, place: str, given: Any) -> float:
        # True is an int in Python, and NaN and Infinity are numbers in its JSON.
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or given <= 0:
            raise self.refuse(place, given, "a positive finite number")
        return float(given)

    def count(self, place: str, given: Any, largest: int | None = None) -> int:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1 or (largest and given > largest):
            raise self.refuse(place, given, f"an integer from 1 to {largest}" if largest else "a positive integer")
        return given

    def step(self, place: str, given: Any) -> Step:
        names = ("cell", "hidden", "batch", "directions", "dtype", "pass", "path", "microseconds")
        found = self.keys(place, given, names)
        return Step(
            cell=self.text(f"{place}.cell", found["cell"]),
            hidden=self.count(f"{place}.hidden", found["hidden"]),
            batch=self.count(f"{place}.batch", found["batch"]),
            directions=self.count(f"{place}.directions", found["directions"], 2),
            dtype=self.one_of(f"{place}.dtype", found["dtype"], DTYPES),
            backward=self.one_of(f"{place}.pass", found["pass"], ("forward", "backward")) == "backward",
            path=self.one_of(f"{place}.path", found["path"], ("persistent", "torch")),
            microseconds=self.positive(f"{place}.microseconds", found["microseconds"]),
        )

    def measurements(self) -> Measurements:
        text = self.path.read_text(encoding="utf-8")
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.refuse("the text", text[:40], f"JSON ({error})") from error
        found = self.keys("the file", given, ("provenance", "constants", "steps"))
        provenance = self.keys("provenance", found["provenance"], PROVENANCE)
        constants = self.keys("constants", found["constants"], MEASURABLE, all_of_them=False)
        if not isinstance(found["steps"], list):
            raise self.refuse("steps", found["steps"], "a list of measured steps")
        steps = tuple(self.step(f"steps[{i}]", step) for i, step in enumerate(found["steps"]))
        seen: set[Step] = set()
        for i, step in enumerate(steps):
            case = replace(step, microseconds=0.0)
            if case in seen:
                raise self.refuse(f"steps[{i}]", found["steps"][i], "each case once")
            seen.add(case)
        return Measurements(
            provenance=tuple((name, self.text(f"provenance.{name}", provenance[name])) for name in PROVENANCE),
            constants=tuple((name, self.positive(f"constants.{name}", constants[name])) for name in sorted(constants)),
            steps=steps,
        )


@lru_cache
def measurements(name: str, folder: Path = MEASURED) -> Measurements | None:
    """What was measured on the device of that name; None if nothing was."""
    path = folder / f"{name}.json"
    return _Reader(path).measurements() if path.is_file() else None
