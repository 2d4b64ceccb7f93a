"""On a real GPU: no data race in the exchange, by Triton's own detector (GSan)."""

import os
import subprocess
import sys
from pathlib import Path

import gsan_runs
import pytest
from test_gpu import a_gpu

pytestmark = pytest.mark.gpu

__all__ = ["a_gpu"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]


def run(name: str) -> subprocess.CompletedProcess[str]:
    """A program of gsan_runs; the test is skipped, with the reason, where GSan is not there or cannot be enabled."""
    if reason := gsan_runs.missing():
        pytest.skip(reason)
    command = [sys.executable, gsan_runs.__file__, name]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)
    if done.returncode == gsan_runs.NOT_ENABLED:
        pytest.skip(f"GSan cannot be enabled here: {done.stdout[-500:]}")
    return done


def test_a_race_is_seen() -> None:
    """Else the silence of the next test would mean nothing."""
    done = run("race")
    assert done.returncode != 0
    assert "race detected" in done.stdout + done.stderr


def test_the_exchange_has_no_race() -> None:
    done = run("exchange")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert "no race" in done.stdout
