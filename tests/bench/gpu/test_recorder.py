"""The plugin that runs tests as items of a step: each outcome is in the journal at once, and none is run twice."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu.journal import Task
from bench.report.results import entry

TESTS = """
import pytest

@pytest.fixture
def broken():
    raise ValueError("no such thing")

@pytest.fixture
def late():
    yield
    assert False, "found out afterwards"

def test_right(): pass
def test_wrong(): assert 1 == 2, "1 is not 2"
def test_without_setup(broken): pass
def test_streamed_but_wrong_afterwards(late): pass
def test_elsewhere(): pytest.skip("needs more memory")
"""
Runs = Callable[..., tuple[int, list[tuple[str, bool, str]]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """run(content, done=...): its exit status, and what is in the journal then."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file changes faster than its time of change

    def inside(content: str, *done: str, seconds: float = 600) -> tuple[int, list[tuple[str, bool, str]]]:
        task = Task("correctness", str(tmp_path / "x.journal"), time.monotonic() + seconds, frozenset(done))
        task.save()
        file = tmp_path / "test_it.py"
        file.write_text(content)
        sys.modules.pop("test_it", None)
        none = [f"no:{name}" for name in ("cacheprovider", "timeout", "benchmark", "xdist")]
        options = [option for name in ("bench.gpu.recorder", *none) for option in ("-p", name)]
        options += ["--rootdir", str(tmp_path), "-c", os.devnull, "--capture=no", "--import-mode=importlib"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = pytest.main([str(file), *options, "-W", "ignore", "--task", str(task.file)])
        journal = Path(task.journal)
        found = [entry(text) for text in journal.read_text().splitlines()] if journal.exists() else []
        journal.unlink(missing_ok=True)
        prefix = "correctness: test_it.py::test_"
        assert all(one.name.startswith(prefix) for one in found)
        return int(status), [(one.name.removeprefix(prefix), one.ok, one.message) for one in found]

    return inside


def test_outcomes(run: Runs, tmp_path: Path) -> None:
    """What is red stands in the journal and is no error of the process; the most telling one comes first."""
    assert run(TESTS) == (0, [
        ("streamed_but_wrong_afterwards", True, ""),
        ("streamed_but_wrong_afterwards", False, "AssertionError: found out afterwards\nassert False"),
        ("right", True, ""),
        ("wrong", False, "AssertionError: 1 is not 2\nassert 1 == 2"),
        ("without_setup", False, "ValueError: no such thing"),
    ])  # fmt: skip
    assert not (tmp_path / "x.running").exists()


def test_what_is_done_is_not_run_again(run: Runs) -> None:
    right = "correctness: test_it.py::test_right"
    assert run("def test_right(): assert False\ndef test_new(): pass\n", right) == (0, [("new", True, "")])
    assert run("def test_right(): pass\n", right) == (0, []), "all that there is"


def test_no_time(run: Runs, tmp_path: Path) -> None:
    """What is left is named."""
    assert run("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n", seconds=0) == (0, [("a", True, "")])
    left = [f"correctness: test_it.py::test_{name}" for name in "bc"]
    assert (tmp_path / "x.running").read_text().split("\n") == ["", *left]


@pytest.mark.parametrize(("content", "status"), [("import nothing_like_it\n", 2), ("", 5)])
def test_what_cannot_be_collected_is_an_error(content: str, status: int, run: Runs) -> None:
    assert run(content) == (status, [])
