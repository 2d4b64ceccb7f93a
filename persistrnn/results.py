"""What a run of the benchmarks found on one machine: one JSON file, written, read and checked here. No torch.

    {"provenance": {...}, "checks": [...], "timings": [...], "micro": [...], "stress": [...], "tuning": [...]}

with the fields of the classes below. A speed is only kept beside a green check of the same case and arm in the same
run, and a file that is anything else is refused with the place, the given value and what is allowed.
"""

from __future__ import annotations

import json
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

DTYPES = ("fp16", "bf16", "tf32", "fp32")
MODES = ("forward", "training")
MARKS = ("", "lengths", "resets")
# In the report's order. "torch" is torch.nn in the case's dtype, "torch-best" in the dtype in which it is fastest.
ARMS = ("persistrnn", "torch", "torch-best", "torchrl", "flashrnn", "xma")


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from. rehearsal: on a CPU, where times say nothing about the kernels.

    clocks_before, clocks_after: multiprocessor clock in MHz, at the run's start and end; 0 where unknown.
    """

    device: str
    arch: str
    multiprocessors: int
    driver: str
    cuda: str
    cudnn: str
    torch: str
    triton: str
    python: str
    commit: str
    dirty: bool
    date: str
    command: str
    clocks_before: int
    clocks_after: int
    rehearsal: bool


@dataclass(frozen=True)
class Case:
    """One stack of layers and one input. suite: which benchmark; name: the row's name in its workload table.

    input: I, 0 where the input's product is left out (DeepBench's protocol). mode: "forward" (inference), or "training"
    (forward and backward). marks: rows of several lengths ("lengths"), episodes that begin within rows ("resets"), or
    neither ("").
    """

    suite: str
    name: str
    cell: str
    input: int
    hidden: int
    layers: int
    bidirectional: bool
    batch: int
    steps: int
    dtype: str
    mode: str
    marks: str = ""

    @property
    def key(self) -> str:
        """The same for equal work, whichever suite it is in."""
        directions = 2 if self.bidirectional else 1
        return (
            f"{self.mode} {self.cell} {self.dtype} I={self.input} H={self.hidden} L={self.layers} D={directions} "
            f"B={self.batch} T={self.steps}"
        ) + (f" {self.marks}" if self.marks else "")


@dataclass(frozen=True)
class Check:
    """Whether an arm computes a case rightly. error: the largest, over outputs and gradients, of its relative RMS error
    against float64 over the error that is allowed (at most 1 if ok)."""

    case: Case
    arm: str
    ok: bool
    error: float
    message: str


@dataclass(frozen=True)
class Timing:
    """One arm on one case. skipped: why there is no number (then all numbers are 0), else empty.

    dtype: what the arm ran in. microseconds: the whole call, median over ``rounds``, low and high its quartiles.
    predicted, floor: the plan's, microseconds per step of the whole stack, input product not included. peak: bytes of
    device memory above what is allocated before. plan, path: persistrnn's.
    """

    case: Case
    arm: str
    skipped: str
    dtype: str
    microseconds: float
    low: float
    high: float
    rounds: int
    peak: int
    tflops: float
    predicted: float
    floor: float
    plan: str
    path: str

    @property
    def per_step(self) -> float:
        return self.microseconds / self.case.steps


@dataclass(frozen=True)
class Micro:
    """A microbenchmark: what, for how many programs, with how many bytes each; median and quartiles over ``rounds``."""

    name: str
    programs: int
    payload: int
    value: float
    low: float
    high: float
    unit: str
    rounds: int


@dataclass(frozen=True)
class Stress:
    """One thing that must hold under load; message: what was seen."""

    name: str
    ok: bool
    seconds: float
    message: str


@dataclass(frozen=True)
class Tuning:
    """One choice of the planner's for one pass of one layer, run on the device; microseconds per step.

    planned: whether it is the one that the plan takes; choice: its numbers in words.
    """

    case: Case
    backward: bool
    choice: str
    planned: bool
    predicted: float
    microseconds: float


Entry: typing.TypeAlias = Check | Timing | Micro | Stress | Tuning


@dataclass
class Results:
    """All that one run found; ``add`` keeps the rules."""

    provenance: Provenance
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    micro: list[Micro] = field(default_factory=list)
    stress: list[Stress] = field(default_factory=list)
    tuning: list[Tuning] = field(default_factory=list)

    def correct(self, case: Case, arm: str) -> bool:
        """Whether this run has a check of the same work, and all such are green."""
        key = case.key
        found = [check.ok for check in self.checks if check.arm == arm and check.case.key == key]
        return bool(found) and all(found)

    def timing(self, case: Case, arm: str) -> Timing | None:
        """The timing of the same work by an arm, skipped or not."""
        key = case.key
        return next((t for t in self.timings if t.arm == arm and t.case.key == key), None)

    def add(self, entry: Entry) -> None:
        """Keep an entry.

        Raises:
            ValueError: a speed without a green check of the same case and arm in this run, a second one, or one of 0.
        """
        match entry:
            case Check():
                self.checks.append(entry)
            case Timing():
                if not entry.skipped and not self.correct(entry.case, entry.arm):
                    raise ValueError(
                        f"no speed without correctness: {entry.arm} has no green check of '{entry.case.key}' in this "
                        "run; add its Check first, or a Timing with the reason in 'skipped'"
                    )
                if not entry.skipped and not (entry.microseconds and entry.case.steps):
                    raise ValueError(
                        f"{entry.arm} has no time of '{entry.case.key}': {entry.microseconds} microseconds, "
                        f"{entry.case.steps} steps given, allowed: more than 0, or the reason in 'skipped'"
                    )
                if self.timing(entry.case, entry.arm) is not None:
                    raise ValueError(f"{entry.arm} has a timing of '{entry.case.key}' already; one run, one number")
                self.timings.append(entry)
            case Micro():
                self.micro.append(entry)
            case Stress():
                self.stress.append(entry)
            case Tuning():
                self.tuning.append(entry)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def line(entry: Entry) -> str:
    """An entry by itself, as a line of text that `entry` reads."""
    return json.dumps({type(entry).__name__: asdict(entry)}) + "\n"


def entry(text: str) -> Entry:
    """What `line` wrote.

    Raises:
        ValueError: it is anything else, such as the first half of a line.
    """
    given = json.loads(text)
    if not isinstance(given, dict) or len(given) != 1:
        raise _refuse("an entry", given, "an object with the entry under the name of its kind")
    ((name, value),) = given.items()
    kinds = {kind.__name__: kind for kind in typing.get_args(Entry)}
    if name not in kinds:
        raise _refuse("the kind of an entry", name, ", ".join(kinds))
    found: Entry = _read(kinds[name], value, name)
    return found


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a results file; the message has the place, the given value and what is allowed.
    """
    content = path.read_bytes()
    try:
        given = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of the bytes, of the text, of a number's length, of the nesting
        raise ValueError(f"{path}: not JSON ({error}); a results file is what `make gpu` writes") from error
    raw = _read(Results, given, str(path))
    results = Results(raw.provenance, raw.checks, [], raw.micro, raw.stress, raw.tuning)
    for i, timing in enumerate(raw.timings):
        try:
            results.add(timing)
        except ValueError as error:
            raise ValueError(f"{path}: timings[{i}]: {error}") from error
    return results


_ALLOWED: dict[tuple[type, str], tuple[str, ...]] = {
    (Case, "dtype"): DTYPES,
    (Case, "mode"): MODES,
    (Case, "marks"): MARKS,
    (Check, "arm"): ARMS,
    (Timing, "arm"): ARMS,
}


def _read(kind: Any, given: Any, place: str) -> Any:
    """``given``, as JSON has it, as a ``kind``: a dataclass, a list of one, or a plain type."""
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        if not isinstance(given, list):
            raise _refuse(place, given, "a list")
        return [_read(item, value, f"{place}[{i}]") for i, value in enumerate(given)]
    if not isinstance(kind, type) or kind in (str, int, float, bool):
        return _plain(kind, given, place)
    names = [f.name for f in fields(kind)]
    if not isinstance(given, dict):
        raise _refuse(place, given, f"an object with {', '.join(names)}")
    later = {f.name: f.default for f in fields(kind) if f.default is not MISSING}  # older files lack them
    if set(given) | later.keys() != set(names):
        raise _refuse(f"the list of keys of {place}", sorted(given), f"exactly {', '.join(names)}")
    hints = typing.get_type_hints(kind)
    values = {name: _read(hints[name], (later | given)[name], f"{place}.{name}") for name in names}
    for name, value in values.items():
        allowed = _ALLOWED.get((kind, name))
        if allowed is not None and value not in allowed:
            raise _refuse(f"{place}.{name}", value, ", ".join(allowed))
    return kind(**values)


def _plain(kind: Any, given: Any, place: str) -> Any:
    checks: dict[Any, tuple[Callable[[Any], bool], str]] = {
        str: (lambda v: isinstance(v, str), "a text"),
        bool: (lambda v: isinstance(v, bool), "true or false"),
        int: (
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63,
            "an integer from 0 to 2**63 - 1",
        ),
        # NaN and Infinity are numbers in Python's JSON, and so are integers that no float can hold.
        float: (
            lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= sys.float_info.max,
            "a finite number from 0 on",
        ),
    }
    right, allowed = checks[kind]
    if not right(given):
        raise _refuse(place, given, allowed)
    return float(given) if kind is float else given


def _refuse(place: str, given: Any, allowed: str) -> ValueError:
    return ValueError(f"{place} is {str(given)[:200]!r}, allowed: {allowed}")
