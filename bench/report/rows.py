"""The timings of one run by case: what is measured, what is predicted, who is faster."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.report.results import ARMS, DTYPES, MODES, Case, Results, Timing
from persistrnn.profiling.page import printable

OURS, BASELINES = ARMS[0], ARMS[1:]


@dataclass(frozen=True, eq=False)
class Row:
    """One case and all its timings, by arm; skipped ones too."""

    case: Case
    arms: dict[str, Timing] = field(default_factory=dict)

    def measured(self, arm: str) -> Timing | None:
        found = self.arms.get(arm)
        return None if found is None or found.skipped else found

    def speedup(self, over: str) -> float | None:
        """How many times faster persistrnn's call is; below 1 it loses."""
        ours, theirs = self.measured(OURS), self.measured(over)
        return theirs.microseconds / ours.microseconds if ours and theirs else None

    @property
    def per_step(self) -> float | None:
        """persistrnn's, measured."""
        ours = self.measured(OURS)
        return ours.per_step if ours else None

    @property
    def predicted(self) -> float:
        """By the plan, us per step; 0 if unknown."""
        return next((timing.predicted for timing in self.arms.values() if timing.predicted), 0.0)

    @property
    def floor(self) -> float:
        """Of any plan, us per step; 0 if unknown."""
        return next((timing.floor for timing in self.arms.values() if timing.floor), 0.0)

    @property
    def over_floor(self) -> float | None:
        """Measured over floor, both per step."""
        return self.per_step / self.floor if self.per_step and self.floor else None


def rows(results: Results) -> list[Row]:
    """One per case, in the order of the file."""
    found: dict[str, Row] = {}
    for timing in results.timings:
        found.setdefault(timing.case.key, Row(timing.case)).arms[timing.arm] = timing
    return list(found.values())


def groups(found: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """By (suite, dtype, mode): suites as they come, the others in the order of results."""
    result: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        result.setdefault((row.case.suite, row.case.dtype, row.case.mode), []).append(row)
    suites = list(dict.fromkeys(suite for suite, _, _ in result))
    return {key: result[key] for key in itertools.product(suites, DTYPES, MODES) if key in result}


def shape(case: Case) -> str:
    """In a few signs; what is left out is 1, or the input's product."""
    parts = [printable(case.cell, 16), f"H={case.hidden}", f"B={case.batch}", f"T={case.steps}"]
    parts += [f"I={case.input}"] if case.input else []
    parts += [f"L={case.layers}"] if case.layers != 1 else []
    parts += ["D=2"] * case.bidirectional
    return " ".join(parts + [case.marks] * bool(case.marks))


def label(case: Case) -> str:
    """Name and shape; not the name where it says nothing else."""
    return shape(case) if case.name in shape(case) else f"{printable(case.name, 28)}: {shape(case)}"
