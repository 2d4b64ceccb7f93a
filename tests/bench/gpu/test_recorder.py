"""The plugin that keeps outcomes: each lands in the file at once, green ones are not run again, a hang has a name."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import results

from bench.gpu import recorder
from bench.report.results import Stress, load

ROOT = Path(__file__).parents[3]
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
def test_wrong_afterwards(late): pass
def test_elsewhere(): pytest.skip("needs more memory")
"""
HANGS = """
import time
def test_first(): pass
def test_hangs(): time.sleep(300)
def test_last(): pass
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "results.json"
    results().save(made)
    return made


def arguments(path: Path, content: str) -> list[str]:
    """Of pytest on a file of that content beside the results file, with outcomes kept and no other plugin."""
    (path.parent / "test_it.py").write_text(content)
    names = [f"no:{name}" for name in ("cacheprovider", "timeout", "benchmark", "xdist")]
    plugins = [option for name in ("bench.gpu.recorder", *names) for option in ("-p", name)]
    file = str(path.parent / "test_it.py")
    return [file, "--rootdir", str(path.parent), "-c", os.devnull, "--outcomes", str(path), "-v", "-rs", *plugins]


@pytest.fixture
def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """run(content, ...): its exit status and what it prints."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file changes faster than its time of change

    def inside(content: str, *more: str) -> tuple[int, str]:
        printed = io.StringIO()
        sys.modules.pop("test_it", None)
        options = ["--capture=no", "--import-mode=importlib", "-W", "ignore", *more]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = pytest.main([*arguments(path, content), *options])
        return int(status), printed.getvalue()

    return inside


def test_outcomes(run: Callable[..., tuple[int, str]], path: Path) -> None:
    status, output = run(TESTS)
    assert status == 1, output
    found = [(entry.name.removeprefix("test_it.py::test_"), entry.ok, entry.message) for entry in load(path).stress]
    assert found == [
        ("right", True, ""),
        ("wrong", False, "AssertionError: 1 is not 2\nassert 1 == 2"),
        ("without_setup", False, "ValueError: no such thing"),
        ("wrong_afterwards", True, ""),
        ("wrong_afterwards", False, "AssertionError: found out afterwards\nassert False"),
    ]
    assert not recorder.running(path).exists()

    # What is green is done, and what was not seen yet comes before what was red.
    repaired = TESTS.replace("assert 1 == 2", "assert 1 == 1").replace("raise ValueError", "ValueError")
    status, output = run(repaired.replace("assert False", "assert True") + "def test_new(): pass\n")
    assert status == 0, output
    again = [entry.name.removeprefix("test_it.py::test_") for entry in load(path).stress[5:]]
    assert again == ["new", "wrong", "without_setup", "wrong_afterwards"]
    assert "1 deselected" in output

    # All that there is is green.
    status, output = run("def test_right(): pass\n")
    assert status == 0, output
    assert "1 deselected" in output
    assert len(load(path).stress) == 9


def test_a_hang_has_a_name(run: Callable[..., tuple[int, str]], path: Path) -> None:
    """Killed from outside, and the next time it is nobody's obstacle."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments(path, HANGS)]
    process = subprocess.Popen(command, cwd=path.parent, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not recorder.running(path).exists() or "hangs" not in recorder.running(path).read_text():
            assert process.poll() is None, "it has ended"
            time.sleep(0.05)  # how often to look; how long is bounded by this test's own limit
    finally:
        process.kill()
        process.wait()
    assert recorder.running(path).read_text() == "test_it.py::test_hangs"
    assert [(entry.name, entry.ok) for entry in load(path).stress] == [("test_it.py::test_first", True)]

    found = load(path)
    found.add(Stress("test_it.py::test_hangs", False, 60.0, "killed"))
    found.save(path)
    status, output = run(HANGS.replace("time.sleep(300)", "pass"))
    assert status == 0, output
    assert [entry.name.split("::test_")[1] for entry in load(path).stress[2:]] == ["last", "hangs"]


def test_the_most_telling_come_first(run: Callable[..., tuple[int, str]], path: Path) -> None:
    """In the order of the option, what was red after what was not seen; and all names are in a file."""
    names = path.with_name("collected")
    options = ("--telling", "afterwards", "setup", "--collected", str(names))
    status, output = run(TESTS, *options)
    assert status == 1, output
    order = [entry.name.removeprefix("test_it.py::test_") for entry in load(path).stress]
    assert order == ["wrong_afterwards", "wrong_afterwards", "without_setup", "right", "wrong"]
    assert len(names.read_text().splitlines()) == 5
    run(TESTS + "def test_new(): pass\n", *options)
    order = [entry.name.removeprefix("test_it.py::test_") for entry in load(path).stress[5:]]
    assert order == ["new", "wrong_afterwards", "wrong_afterwards", "without_setup", "wrong"]


def test_no_time(run: Callable[..., tuple[int, str]], path: Path) -> None:
    status, output = run(TESTS, "--within", "0")
    assert status == 0, output
    assert "out of time; the next run goes on here" in output
    assert load(path).stress == []


def test_outcomes_without_a_file(run: Callable[..., tuple[int, str]], path: Path) -> None:
    path.unlink()
    status, output = run(TESTS)
    assert status == 4, output
    assert "--outcomes must be a results file, as `make gpu` writes it: " in output
    assert "Traceback" not in output


def test_the_last_outcome_counts() -> None:
    found = results()
    for name, ok in (("a", True), ("b", False), ("a", False), ("b", True)):
        found.add(Stress(name, ok, 1.0, ""))
    assert recorder.outcomes(found) == {"a": False, "b": True}
