"""A pytest plugin (``-p bench.gpu.recorder``) that keeps each test's outcome in a results file as it comes in.

    pytest tests/kernels/test_gpu.py -m gpu -p bench.gpu.recorder --outcomes FILE [--within MINUTES]

What is green in the file is not run again, what is not comes last: a test that hangs keeps none from its turn. The
test that is running stands in FILE.running, so that whoever has to kill a hanging process knows where it hung.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.report import results
from bench.report.results import Results, Stress


def running(path: Path) -> Path:
    """Where the name of the test that is running stands."""
    return path.with_suffix(".running")


def outcomes(found: Results) -> dict[str, bool]:
    """Whether what ran is green, by name; the last time counts, and of a test that includes its teardown."""
    return {entry.name: entry.ok for entry in found.stress}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="a results file, which must exist")
    parser.addoption("--within", type=float, help="begin no test after so many minutes")
    parser.addoption("--telling", nargs="+", default=[], help="tests whose names contain one of these come first")
    parser.addoption("--collected", type=Path, help="a file for the names of all tests that there are")


def pytest_configure(config: pytest.Config) -> None:
    try:
        plugin = Outcomes(config.getoption("--outcomes"), config.getoption("--within"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--outcomes must be a results file, as `make gpu` writes it: {error}") from error
    config.pluginmanager.register(plugin)


class Outcomes:
    def __init__(self, path: Path, minutes: float | None) -> None:
        self.path = path
        self.results: Results = results.load(path)
        self.before = outcomes(self.results)
        self.green: list[pytest.Item] = []
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if (collected := config.getoption("--collected")) is not None:
            collected.write_text("\n".join(item.nodeid for item in items))
        telling = config.getoption("--telling")

        def turn(item: pytest.Item) -> tuple[bool, int]:
            rank = next((i for i, name in enumerate(telling) if name in item.nodeid), len(telling))
            return item.nodeid in self.before, rank

        self.green = [item for item in items if self.before.get(item.nodeid)]
        config.hook.pytest_deselected(items=self.green)
        items[:] = sorted((item for item in items if not self.before.get(item.nodeid)), key=turn)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.green:
            session.exitstatus = pytest.ExitCode.OK  # all that there is was green before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        running(self.path).write_text(item.nodeid)
        result = yield
        running(self.path).unlink()
        return result

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            pytest.skip("out of time; the next run goes on here")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A call's outcome, and what went wrong before or after it."""
        if report.skipped or (report.when != "call" and report.passed):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.passed else str(crash.message if crash else report.longreprtext)[:500]
        self.results.add(Stress(report.nodeid, report.passed, report.duration, message))
        self.results.save(self.path)
