"""The race on a GPU: every arm on every case of the suites, checked against float64 before it is timed.

    pytest bench/race -m gpu --benchmark-only --suite deepbench --dtype bf16 --benchmark-json FILE

``bench/race/suites.py`` has the cases; each suite is forward only or forward and backward as its cases say. A results
file that is resumed comes from `make gpu ARGS=race`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from bench.race.timing import EventClock

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from bench.report.results import Case


@pytest.mark.gpu
@pytest.mark.benchmark(timer=EventClock())
def test_layer(benchmark: BenchmarkFixture, compete: Callable[..., None], case: Case, arm: str) -> None:
    compete(benchmark, case, arm)
