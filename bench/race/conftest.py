"""Options of the suites, and how an arm is raced in them: checked, then timed by pytest-benchmark."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench.race import suites
from bench.race.arithmetic import bytes_moved
from bench.race.arms import Skip
from bench.race.engine import REHEARSED, Race
from bench.report.provenance import provenance
from bench.report.results import ARMS, Arm, Case

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("persistrnn")
    for name, allowed in (("suite", suites.SUITES), ("dtype", suites.IN_ORDER), ("arm", ARMS)):
        group.addoption(f"--{name}", nargs="+", choices=list(allowed), default=list(allowed))
    group.addoption("--rehearse", action="store_true", help="in Triton's interpreter, in small, without speeds")
    if not pluginmanager.hasplugin("timeout"):  # as on a GPU machine without a package index
        parser.addini("timeout", "of pytest-timeout, which is not installed here")


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


def device_of(config: pytest.Config) -> torch.device:
    """The device that is raced on, or the end of the session: each of some thousand tests would say the same."""
    if config.getoption("--rehearse"):
        if os.environ.get("TRITON_INTERPRET") == "1":
            return torch.device("cpu")
        message = "--rehearse runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1"
    elif torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    else:
        message = (
            "these suites need a CUDA device, torch sees none; without one leave out `-m gpu`, for what a CPU can "
            "measure, or add --rehearse and set TRITON_INTERPRET=1"
        )
    pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.hookimpl(optionalhook=True)  # of pytest-benchmark
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_json["provenance"] = asdict(provenance(device))


# The truth of a case is computed once, and gone before that of the next.
race_of = lru_cache(maxsize=1)(Race)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture
def compete(device: torch.device) -> Callable[[BenchmarkFixture, Case, Arm], None]:
    """compete(benchmark, case, arm): check, then time."""
    return lambda benchmark, case, arm: run(benchmark, race_of(case, device), arm)


def run(benchmark: BenchmarkFixture, race: Race, arm: Arm) -> None:
    try:
        runner = race.runner(arm)
    except Skip as reason:
        pytest.skip(str(reason))
    check = race.check(arm, runner)
    if not check.ok:
        pytest.fail(f"{arm} is wrong on {race.case.key}: {check.message}")

    def timer(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        if benchmark.stats is None:
            pytest.fail("pytest-benchmark takes no times here; run with --benchmark-only, and without -n")
        return list(benchmark.stats.stats.data)  # per call, not per round

    timing = race.time(arm, runner, timer)
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
    if race.device.type == "cpu":
        pytest.skip(REHEARSED)
