"""Options of the suites, and the file that a run writes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch

from bench import UsageError
from bench.race import suites
from bench.race.arithmetic import bytes_moved
from bench.race.arms import Skip
from bench.race.engine import REHEARSED, Race, skipped
from bench.report import provenance, results
from bench.report.results import ARMS, DTYPES, Case, Check, Results, Timing

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("persistrnn")
    group.addoption("--suite", nargs="+", default=list(suites.SUITES), help=f"of {', '.join(suites.SUITES)}")
    group.addoption("--dtype", nargs="+", default=["bf16", "fp16", "tf32", "fp32"], help=f"of {', '.join(DTYPES)}")
    group.addoption("--arm", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    group.addoption("--output", type=Path, help="keep what is measured in this file; what is in it is not repeated")
    group.addoption("--minutes", type=float, help="begin nothing after so many minutes")
    group.addoption("--rehearse", action="store_true", help="in Triton's interpreter, in small, without speeds")
    if not pluginmanager.hasplugin("timeout"):  # as on a GPU machine without a package index
        parser.addini("timeout", "of pytest-timeout, which is not installed here")


def pytest_configure(config: pytest.Config) -> None:
    for name, allowed in (("suite", tuple(suites.SUITES)), ("dtype", DTYPES), ("arm", ARMS)):
        for given in config.getoption(name):
            if given not in allowed:
                raise pytest.UsageError(f"--{name} must be of {', '.join(allowed)}, got {given!r}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "arm"} <= set(metafunc.fixturenames):
        option = metafunc.config.getoption
        cases = suites.cases(option("suite"), option("dtype"))
        cases = suites.miniatures(cases) if option("rehearse") else cases
        # Arm by arm within a case: the truth is computed once.
        metafunc.parametrize(
            ("case", "arm"),
            [(case, arm) for case in cases for arm in option("arm")],
            ids=lambda value: value if isinstance(value, str) else f"{value.suite}-{value.key}".replace(" ", ","),
        )


class Recorder:
    """The results of this run, saved after every entry, and whether there is time for more."""

    def __init__(self, path: Path | None, minutes: float | None, device: torch.device) -> None:
        self.path, self.device = path, device
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.results = Results(provenance.provenance(device))
        if path is not None and path.exists():
            now, self.results = self.results.provenance, results.load(path)
            provenance.refuse_another(path, self.results.provenance, now)
        self._race: Race | None = None

    def race(self, case: Case) -> Race:
        """The case's inputs and truth, kept while the arms take their turns."""
        if self._race is None or self._race.case != case:
            self._race = None  # its memory first
            self._race = Race(case, self.device)
        return self._race

    def add(self, entry: Check | Timing) -> None:
        self.results.add(entry)
        if self.path is not None:
            self.results.save(self.path)

    def skip(self, case: Case, arm: str, reason: str) -> NoReturn:
        self.add(skipped(case, arm, reason, self.device))
        pytest.skip(reason)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return opened(request.config.getoption)


def opened(option: Callable[[str], Any]) -> Recorder:
    """The recorder that the options ask for, or the end of the session."""
    if option("--rehearse"):
        device = torch.device("cpu")
        if os.environ.get("TRITON_INTERPRET") != "1":
            _end("--rehearse runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        _end(
            "these suites need a CUDA device, torch sees none; without one leave out `-m gpu`, for what a CPU can "
            "measure, or add --rehearse and set TRITON_INTERPRET=1"
        )
    try:
        return Recorder(option("--output"), option("--minutes"), device)
    except (UsageError, ValueError, OSError) as error:
        _end(f"--output: {error}")


def _end(message: str) -> NoReturn:
    """Each of some thousand tests would say the same."""
    pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def compete(recorder: Recorder) -> Callable[[BenchmarkFixture, Case, str], None]:
    """compete(benchmark, case, arm): check, then time, then keep."""
    return functools.partial(run, recorder)


def run(recorder: Recorder, benchmark: BenchmarkFixture, case: Case, arm: str) -> None:
    if recorder.results.timing(case, arm) is not None:
        pytest.skip("measured before in this results file")
    if recorder.deadline is not None and time.monotonic() >= recorder.deadline:
        pytest.skip("out of time; the next run with the same --output goes on here")
    race = recorder.race(case)
    try:
        runner = race.runner(arm)
    except Skip as reason:
        recorder.skip(case, arm, str(reason))
    check = race.check(arm, runner)
    recorder.add(check)
    if not check.ok:
        recorder.add(skipped(case, arm, f"wrong: {check.message}", recorder.device))
        pytest.fail(f"{arm} is wrong on {case.key}: {check.message}")

    def timer(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        if benchmark.stats is None:
            pytest.fail("pytest-benchmark takes no times here; run with --benchmark-only, and without -n")
        return list(benchmark.stats.stats.data)  # per call, not per round

    timing = race.time(arm, runner, timer)
    keep(benchmark, timing)
    if recorder.device.type == "cpu":
        recorder.skip(case, arm, REHEARSED)
    recorder.add(timing)


def keep(benchmark: BenchmarkFixture, timing: Timing) -> None:
    """What pytest-benchmark's own file says of a timing."""
    seconds = timing.microseconds / 1e6
    benchmark.group = timing.case.key
    benchmark.extra_info.update(
        arm=timing.arm,
        dtype=timing.dtype,
        us_per_step=timing.per_step,
        tflops=timing.tflops,
        bytes=bytes_moved(timing.case),
        gigabytes_per_second=bytes_moved(timing.case) / seconds / 1e9,
        share_of_floor=timing.floor / timing.per_step,
        predicted_us_per_step=timing.predicted,
        peak_bytes=timing.peak,
        plan=timing.plan,
        path=timing.path,
    )
