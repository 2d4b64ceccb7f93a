"""Results with made-up numbers, on a device that does not exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.report.results import ARMS, Case, Check, Micro, Provenance, Results, Stress, Timing, Tuning

PROVENANCE = Provenance(
    device="Test GPU", arch="sm_00", multiprocessors=7, driver="1.2", cuda="3.4", cudnn="5.6", torch="7.8",
    triton="9.0", python="3.11", commit="0123456789abcdef", dirty=False, date="2026-01-02T03:04:05+00:00",
    command="make test", clocks_before=1000, clocks_after=900, rehearsal=False,
)  # fmt: skip
CASE = Case("suite", "a name", "lstm", 0, 256, 1, False, 16, 100, "bf16", "forward")


def results(**changes: Any) -> Results:
    """Empty, with changes to the provenance."""
    return Results(replace(PROVENANCE, **changes))


def case(**changes: Any) -> Case:
    return replace(CASE, **changes)


def timing(of: Case, arm: str = "persistrnn", microseconds: float = 500.0, **changes: Any) -> Timing:
    """persistrnn's with a prediction of 4 us per step and a floor of 2 us."""
    ours = arm == "persistrnn"
    made = Timing(
        of, arm, "", of.dtype, microseconds, 0.9 * microseconds, 1.1 * microseconds, 11, 3 << 20, 12.5,
        4.0 * ours, 2.0 * ours, "7 slices" * ours, "persistent" * ours,
    )  # fmt: skip
    return replace(made, **changes)


def skipped(of: Case, arm: str, reason: str, **changes: Any) -> Timing:
    none = {"microseconds": 0.0, "low": 0.0, "high": 0.0, "rounds": 0, "peak": 0, "tflops": 0.0}
    return replace(timing(of, arm), skipped=reason, **(none | changes))


def add(to: Results, *timings: Timing) -> Results:
    """Each with the green check that it needs."""
    for one in timings:
        if not one.skipped and not to.correct(one.case, one.arm):
            to.add(Check(one.case, one.arm, True, 0.5, ""))
        to.add(one)
    return to


def everything() -> Results:
    """One of each kind of entry at least."""
    found = add(results(), timing(CASE), timing(CASE, "torch", 1000.0), skipped(CASE, "xma", "not installed"))
    found.add(Check(CASE, "flashrnn", False, 37.5, "c_n is wrong"))
    found.add(Micro("round trip", 7, 4096, 0.75, 0.5, 1.25, "us", 99))
    found.add(Stress("wakes up", True, 1.5, "it did"))
    found.add(Tuning(CASE, False, "7 slices", True, 2.5, 3.5))
    return found


def pair(hidden: int, ours: float, torch: float, **changes: Any) -> list[Timing]:
    of = case(hidden=hidden, **changes)
    return [timing(of, "persistrnn", ours), timing(of, "torch", torch)]


def raced() -> Results:
    """Two suites; over torch the speed-ups are 4, 1/2 and 4 in the first, 8 in the second."""
    found = add(results(), *pair(256, 100, 400), *pair(512, 200, 100), *pair(1024, 300, 1200))
    return add(found, *pair(256, 100, 800, suite="other", mode="training"))


def predicted() -> Results:
    """No time, but plans."""
    return add(results(), *(skipped(case(hidden=h), "persistrnn", "no GPU") for h in (256, 512, 1024)))


def many() -> Results:
    """130 cases of one suite with all arms, half of them losses."""
    found = results()
    for n in range(130):
        of = case(hidden=64 * (n % 40 + 1), batch=1 << n % 7, steps=50 + n, name=f"a long name of a model, number {n}")
        for i, arm in enumerate(ARMS):
            add(found, timing(of, arm, 100.0 if i == 0 else 10.0 * (n + 1) / i, predicted=5.0, floor=3.0))
    return found
