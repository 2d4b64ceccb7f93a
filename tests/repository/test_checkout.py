"""A test that leaves something in the checkout fails, and by its name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from checkout import ROOT, changes, listing

TESTS = """
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope="module")
def careless():
    (ROOT / "bench" / "careless.json").touch()

def test_clean(): Path("here").touch()
def test_alone(): assert os.listdir() == []
def test_run(): (ROOT / "runs" / "mine").mkdir(parents=True)
def test_in_the_run(): (ROOT / "runs" / "mine" / "checkpoint.pt").touch()
def test_after(): pass
def test_result(): (ROOT / "bench" / "results" / "h200.json").write_text("{}")
def test_fixture(careless): pass
def test_file(): (ROOT / "out.svg").touch()
def test_tidy_up(): (ROOT / "out.svg").unlink()
@pytest.mark.gpu
def test_on_a_gpu(): (ROOT / "bench" / "results" / "h200.json").write_text("{} ")
"""


def test_the_guilty_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "h200.json").touch()
    (tmp_path / "tests" / "helpers").mkdir(parents=True)
    for name in ("conftest.py", "helpers/checkout.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path / "tests" / "helpers")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            "--rootdir",
            str(tmp_path),
            "-p",
            "no:cacheprovider",
            "tests",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "10 passed" in done.stdout, done.stdout + done.stderr
    blamed = dict(
        re.findall(r"ERROR at teardown of (\w+) _+\nleft in the checkout, .*? meanwhile: (.*); a test", done.stdout)
    )
    assert blamed == {
        "test_run": f"{tmp_path}/runs (new), {tmp_path}/runs/mine (new)",
        "test_in_the_run": f"{tmp_path}/runs/mine/checkpoint.pt (new)",
        "test_result": f"{tmp_path}/bench/results/h200.json (changed)",
        "test_fixture": f"{tmp_path}/bench/careless.json (new)",
        "test_file": f"{tmp_path}/out.svg (new)",
        "test_tidy_up": f"{tmp_path}/out.svg (gone)",
    }


def test_what_goes_on_beside_the_tests_is_nobodys_fault(tmp_path: Path) -> None:
    """A log of them, a training that saves, Python's own caches."""
    run = tmp_path / "runs" / "language_model"
    run.mkdir(parents=True)
    for path in (tmp_path / "test.log", run / "checkpoint.pt"):
        path.write_text("begun")
    before = listing(tmp_path)
    assert len(before) == 4
    for path in (tmp_path / "test.log", run / "checkpoint.pt", run / "checkpoint.pt.tmp", tmp_path / "x.egg-info"):
        path.write_text("and gone on")
    (tmp_path / "__pycache__").mkdir()
    assert changes(before, listing(tmp_path)) == []
