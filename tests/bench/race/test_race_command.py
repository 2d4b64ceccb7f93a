"""The race as it is started with pytest: its options, its file, and that an arm is checked before it is timed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import CASE

from bench.race import arithmetic, conftest
from bench.race.correctness import Truth
from bench.race.engine import Race
from bench.report.results import Check

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = replace(CASE, input=3, hidden=2, batch=2, steps=4, dtype="fp32", mode="training")


def started(*arguments: str, **more: str) -> str:
    """What a process of Python prints, without what tells a pytest that it is a worker of this one, where
    pytest-benchmark measures nothing."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | more
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rehearsal(tmp_path: Path) -> None:
    """Green checks and no speeds; the file says where it comes from, and times are per call and not per round."""
    file = tmp_path / "benchmark.json"
    options = ["-m", "gpu", "--benchmark-only", f"--benchmark-json={file}", "-p", "no:cacheprovider", "-rs"]
    small = ["-k", "lstm and forward", "--rehearse", "--suite", "short", "--dtype", "fp16", "--arm"]
    shown = started("-m", "pytest", "bench/race/test_race.py", *options, *small, "persistrnn", "torch")
    assert "[2] bench/race/conftest.py" in shown
    assert "not measured: a rehearsal without a GPU" in shown
    found = json.loads(file.read_text())
    assert found["provenance"]["rehearsal"]
    assert found["provenance"]["command"].startswith("pytest bench/race/test_race.py -m gpu")
    assert [one["extra_info"]["path"] for one in found["benchmarks"]] == ["persistent", "torch"]
    assert max(one["stats"]["iterations"] for one in found["benchmarks"]) > 1
    for one in found["benchmarks"]:
        seconds = one["extra_info"]["us_per_step"] * 4 / 1e6
        assert seconds == pytest.approx(one["stats"]["median"]), "of a round, or of a call?"


def test_the_gpu_command_without_an_installation(tmp_path: Path) -> None:
    """As on a GPU machine: it finds the tests of the checkout. -S leaves out what an editable installation added."""
    site = str(Path(pytest.__file__).parents[1])
    code = f"import sys; sys.path.append({site!r}); from bench.gpu.command import main; sys.exit(main(sys.argv[1:]))"
    output = str(tmp_path / "results.json")
    shown = started("-S", "-c", code, "correctness", "--rehearse", "h200", "--output", output, PYTHONPATH=site)
    assert "tests/kernels/test_gpu.py: " in shown


@pytest.mark.parametrize(
    ("rehearse", "message"),
    [(False, "need a CUDA device, torch sees none; without one leave out `-m gpu`"), (True, "set TRITON_INTERPRET=1")],
)
def test_without_a_gpu(rehearse: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = SimpleNamespace(getoption={"--rehearse": rehearse}.__getitem__)
    with pytest.raises(pytest.exit.Exception, match=message) as stop:
        conftest.device_of(config)
    assert stop.value.returncode == 4
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if rehearse:
        assert conftest.device_of(config) == CPU


class Benchmark:
    """pytest-benchmark's fixture: every call takes 2 ms."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Callable[[], object], rounds: int, iterations: int) -> None:
        call()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2e-3] * rounds))


def test_what_is_said_of_a_timing() -> None:
    benchmark, race = Benchmark(), Race(TINY, CPU)
    with pytest.raises(pytest.skip.Exception, match="a rehearsal without a GPU"):
        conftest.run(benchmark, race, "torch")
    info = benchmark.extra_info
    assert info["us_per_step"] == pytest.approx(500)
    assert info["gigabytes_per_second"] == pytest.approx(arithmetic.bytes_moved(TINY) / 2e-3 / 1e9)


def test_a_wrong_arm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Truth, "check", lambda self, arm, runner: Check(TINY, arm, False, 37.0, "y is upside down"))
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as stop:
        conftest.run(Benchmark(), Race(TINY, CPU), "torch")
    assert isinstance(stop.value, pytest.fail.Exception), "a skip would end this test green"
    assert re.match(r"torch is wrong on training lstm fp32 .*: y is upside down", str(stop.value))


def test_an_arm_that_does_not_run_says_why() -> None:
    with pytest.raises(pytest.skip.Exception, match="cannot leave the input's product out"):
        conftest.run(Benchmark(), Race(replace(TINY, input=0), CPU), "torch")
