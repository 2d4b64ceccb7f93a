"""What a run of the benchmarks found on one machine: one JSON file, written, read and checked here.

    {"provenance": {...}, "checks": [...], "timings": [...], "micro": [...], "stress": [...], "tuning": [...]}

with the fields of the classes below. A speed is only kept beside a green check of the same case and arm in the same
run, and a file that is anything else is refused with the place, the given value and what is allowed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from persistrnn.kernels.planner.typed_json import load as load_typed
from persistrnn.kernels.planner.typed_json import read, refused
from persistrnn.profiling.page import write

Dtype: TypeAlias = Literal["fp16", "bf16", "tf32", "fp32"]
Mode: TypeAlias = Literal["forward", "training"]
Mark: TypeAlias = Literal["", "lengths", "resets"]
# In the report's order. "torch" is torch.nn in the case's dtype, "torch-best" in the dtype in which it is fastest.
Arm: TypeAlias = Literal["persistrnn", "torch", "torch-best", "torchrl", "flashrnn", "xma"]
DTYPES, MODES, MARKS, ARMS = (get_args(kind) for kind in (Dtype, Mode, Mark, Arm))


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

    @property
    def when(self) -> datetime:
        """Raises ValueError for a date that is none."""
        try:
            found = datetime.fromisoformat(self.date.replace("Z", "+00:00"))
        except ValueError as error:
            raise refused("provenance.date", self.date, "a date like 2026-01-31T12:00:00+00:00") from error
        return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


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
    dtype: Dtype
    mode: Mode
    marks: Mark = ""

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
    arm: Arm
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
    arm: Arm
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


Entry: TypeAlias = Check | Timing | Micro | Stress | Tuning
KEPT = {Check: "checks", Timing: "timings", Micro: "micro", Stress: "stress", Tuning: "tuning"}  # in lists


@dataclass
class Results:
    """All that one run found; ``add`` keeps the rules."""

    provenance: Provenance
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    micro: list[Micro] = field(default_factory=list)
    stress: list[Stress] = field(default_factory=list)
    tuning: list[Tuning] = field(default_factory=list)

    def __post_init__(self) -> None:
        given, self.timings = self.timings, []
        for i, timing in enumerate(given):
            try:
                self.add(timing)
            except ValueError as error:
                raise ValueError(f"timings[{i}]: {error}") from error

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
        if isinstance(entry, Timing):
            if not entry.skipped and not self.correct(entry.case, entry.arm):
                raise ValueError(
                    f"no speed without correctness: {entry.arm} has no green check of '{entry.case.key}' in this run; "
                    "add its Check first, or a Timing with the reason in 'skipped'"
                )
            if not entry.skipped and not (entry.microseconds and entry.case.steps):
                raise ValueError(
                    f"{entry.arm} has no time of '{entry.case.key}': {entry.microseconds} microseconds, "
                    f"{entry.case.steps} steps given, allowed: more than 0, or the reason in 'skipped'"
                )
            if self.timing(entry.case, entry.arm) is not None:
                raise ValueError(f"{entry.arm} has a timing of '{entry.case.key}' already; one run, one number")
        getattr(self, KEPT[type(entry)]).append(entry)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(asdict(self), indent=1) + "\n")


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
        raise refused("an entry", given, "an object with the entry under the name of its kind")
    ((name, value),) = given.items()
    kinds = {kind.__name__: kind for kind in KEPT}
    if name not in kinds:
        raise refused("the kind of an entry", name, ", ".join(kinds))
    found: Entry = read(kinds[name], value, name)
    return found


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a results file; the message has the place, the given value and what is allowed.
    """
    return load_typed(Results, path)


def named(path: Path, command: argparse.ArgumentParser) -> Results:
    """What is in the results file that a command was given; where it is none, the command ends with an error."""
    try:
        return load(path)
    except (OSError, ValueError) as error:
        command.error(f"argument RESULTS.json: {str(path)!r} given, and {error}; allowed: a file that `make gpu` wrote")
