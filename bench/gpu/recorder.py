"""A pytest plugin (``-p bench.gpu.recorder --task FILE``) that runs tests as the items of a step: each outcome is in
the journal as it comes in, and what is done is not run again. The most telling tests come first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu import journal
from bench.report.results import Stress

# What the names of the most telling tests contain, the first of them first.
TELLING = (
    "test_results_do_not_change", "test_many_slices", "test_a_wait_that_runs_out", "test_nan_and_inf",
    "test_two_dimensions", "test_stacks_keep", "test_cuts_keep", "test_the_host_never_waits", "test_two_streams",
    "test_only_a_new_class", "test_resets_cost", "test_streamed",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--task", type=Path, required=True, help="what this process is asked (`bench.gpu.journal`)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(journal.load(config.getoption("--task"))))


class Recorder:
    def __init__(self, task: journal.Task) -> None:
        self.task = task
        self.left: list[str] = []
        self.some_done = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def turn(item: pytest.Item) -> int:
            return next((i for i, name in enumerate(TELLING) if name in item.nodeid), len(TELLING))

        done = [item for item in items if self.task.name(item.nodeid) in self.task.done]
        config.hook.pytest_deselected(items=done)
        self.some_done = bool(done)
        items[:] = sorted((item for item in items if item not in done), key=turn)
        self.left = [self.task.name(item.nodeid) for item in items]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.task.mark(self.left[0], self.left[1:])
        result = yield
        self.left = self.left[1:]
        self.task.mark("", self.left)
        if self.left and self.task.late():
            item.session.shouldstop = "out of time; the next run goes on here"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A call's outcome, and what went wrong before or after it."""
        if report.skipped or (report.when != "call" and report.passed):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.passed else str(crash.message if crash else report.longreprtext)[:500]
        self.task.add(Stress(self.task.name(report.nodeid), report.passed, report.duration, message))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """What is red stands in the journal, what is left in its file; all else is an error of pytest's."""
        known = {
            pytest.ExitCode.TESTS_FAILED: True,
            pytest.ExitCode.NO_TESTS_COLLECTED: self.some_done,
            pytest.ExitCode.INTERRUPTED: bool(session.shouldstop),
        }
        if known.get(exitstatus):  # type: ignore[call-overload]
            session.exitstatus = pytest.ExitCode.OK
