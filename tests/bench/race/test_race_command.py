"""The race as it is started: its options, what it writes, and that a second run repeats nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import CASE, PROVENANCE, timing

from bench.gpu import command as gpu
from bench.race import arithmetic, conftest
from bench.race.correctness import Truth
from bench.race.engine import REHEARSED, Race
from bench.report import provenance
from bench.report.results import ARMS, MODES, Check, Results, load

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = replace(CASE, input=3, hidden=2, batch=2, steps=4, dtype="fp32", mode="training")
SMALL = ["-k", "lstm", "--rehearse", "--suite", "short", "--dtype", "fp16", "--arm", "persistrnn", "torch"]


def environment(**more: str) -> dict[str, str]:
    """Without what tells a pytest that it is a worker of this one, where pytest-benchmark measures nothing."""
    return {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"} | more


def race(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench/race/test_race.py", "-m", "gpu", "--benchmark-only", "-rs"]
    command += [*arguments, "-p", "no:cacheprovider"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=240
    )


def test_a_rehearsal(tmp_path: Path) -> None:
    """Green checks, no speeds; a second run finds all of it; times per call and not per round."""
    path, table = tmp_path / "results.json", tmp_path / "benchmark.json"
    done = race(*SMALL, "--output", str(path), f"--benchmark-json={table}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = load(path)
    assert found.provenance.rehearsal
    assert found.provenance.command.startswith("pytest bench/race/test_race.py -m gpu")
    assert [(c.case.mode, c.arm) for c in found.checks] == [(m, arm) for m in MODES for arm in ("persistrnn", "torch")]
    assert len(found.timings) == 4
    assert all(check.ok for check in found.checks)
    assert {(t.skipped, t.microseconds) for t in found.timings} == {(REHEARSED, 0.0)}
    assert max(check.case.hidden for check in found.checks) < 20
    measured = json.loads(table.read_text())["benchmarks"]
    assert len(measured) == 4
    assert max(entry["stats"]["iterations"] for entry in measured) > 1
    for entry in measured:
        seconds = entry["extra_info"]["us_per_step"] * 4 / 1e6
        assert seconds == pytest.approx(entry["stats"]["median"]), "of a round, or of a call?"
        assert entry["extra_info"]["path"] == {"persistrnn": "persistent"}.get(entry["extra_info"]["arm"], "torch")

    found.provenance = replace(found.provenance, commit="unknown")  # in case someone commits meanwhile
    found.save(path)
    before = path.read_bytes()
    again = race(*SMALL, "--output", str(path))
    assert again.returncode == 0, again.stdout
    assert "[4] bench/race/conftest.py" in again.stdout
    assert "measured before in this results file" in again.stdout
    assert path.read_bytes() == before


def test_a_wrong_name() -> None:
    done = race("--suite", "deepbensh")
    assert done.returncode == 4
    assert done.stderr.startswith("ERROR: --suite must be of flashrnn, models, ")
    assert "got 'deepbensh'" in done.stderr


def uninstalled(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in the checkout's root where, as on a GPU machine, persistrnn is not installed."""
    # -S leaves out what puts an editable installation on the path.
    site = Path(pytest.__file__).parents[1]
    prepare = f"import sys; sys.path.append({str(site)!r}); "
    command = [sys.executable, "-S", "-c", prepare + code, *arguments]
    variables = environment(PYTHONPATH=str(site), TRITON_INTERPRET="1")
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)


def test_the_suites_without_an_installation() -> None:
    """They come from the checkout."""
    arguments = [*gpu.RACE, "-m", "gpu", "--rehearse", "--suite", "short", "--collect-only", "-q"]
    done = uninstalled("import pytest; sys.exit(pytest.main(sys.argv[1:]))", *arguments, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_layer[short-" in done.stdout


def test_the_command_without_an_installation(tmp_path: Path) -> None:
    """It finds the tests of the checkout."""
    arguments = ["correctness", "--rehearse", "h200", "--output", str(tmp_path / "results.json")]
    done = uninstalled("from bench.gpu.command import main; sys.exit(main(sys.argv[1:]))", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_gpu_pipeline.py::" in done.stdout


# Its pieces


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("suite", ["short", "long"], r"--suite must be of flashrnn, .*, deepbench_skip_input, got 'long'"),
        ("dtype", ["fp8"], r"--dtype must be of fp16, bf16, tf32, fp32, got 'fp8'"),
        ("arm", ["torch", "jax"], r"--arm must be of persistrnn, torch, torch-best, torchrl, flashrnn, xma, got 'jax'"),
    ],
)
def test_names(name: str, given: list[str], message: str) -> None:
    right = {"suite": ["short"], "dtype": ["fp16"], "arm": list(ARMS)}
    conftest.pytest_configure(SimpleNamespace(getoption=right.get))
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(SimpleNamespace(getoption=(right | {name: given}).get))


def options(**changed: Any) -> Callable[[str], Any]:
    found = {"--rehearse": True, "--output": None, "--minutes": None} | {f"--{n}": v for n, v in changed.items()}
    return found.__getitem__


def refused(option: Callable[[str], Any]) -> str:
    with pytest.raises(pytest.exit.Exception) as stop:
        conftest.opened(option)
    assert stop.value.returncode == 4
    return str(stop.value)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(options(rehearse=False))
    assert "need a CUDA device, torch sees none; without one leave out `-m gpu`" in message
    assert "or add --rehearse" in message


def test_results_that_do_not_belong_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "set TRITON_INTERPRET=1" in refused(options())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "results.json"
    assert conftest.opened(options(output=path)).results.provenance.rehearsal
    path.write_text("{")
    assert "results.json: not JSON" in refused(options(output=path))
    Results(PROVENANCE).save(path)
    assert "was measured with device 'Test GPU', now it is 'CPU" in refused(options(output=path))
    now = provenance.provenance(CPU)
    Results(replace(now, commit="another")).save(path)
    assert "was measured with commit 'another', now it is" in refused(options(output=path))
    Results(replace(now, commit="unknown", date="")).save(path)
    assert conftest.opened(options(output=path)).results.provenance.date == ""
    assert "--output: " in refused(options(output=tmp_path))


class Benchmark:
    """pytest-benchmark's fixture: every call takes 2 ms."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.asked: list[tuple[int, int]] = []

    def pedantic(self, call: Callable[[], object], rounds: int, iterations: int) -> None:
        call()
        self.asked.append((rounds, iterations))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2e-3] * rounds))


@pytest.fixture
def recorder(tmp_path: Path) -> conftest.Recorder:
    """As on a GPU, of which the recorder knows no more than that times count."""
    made = conftest.Recorder(tmp_path / "results.json", None, CPU)
    made._race = Race(TINY, CPU)
    made.device = SimpleNamespace(type="cuda")
    return made


def test_a_timing_is_kept(recorder: conftest.Recorder) -> None:
    benchmark = Benchmark()
    conftest.run(recorder, benchmark, TINY, "torch")
    found = load(recorder.path)
    (check,), (kept,) = found.checks, found.timings
    assert check.ok
    assert (kept.microseconds, kept.skipped, kept.rounds) == (pytest.approx(2000), "", 3)
    assert benchmark.asked[0][0] == 3
    info = benchmark.extra_info
    assert info["us_per_step"] == pytest.approx(500)
    assert info["gigabytes_per_second"] == pytest.approx(arithmetic.bytes_moved(TINY) / 2e-3 / 1e9)
    assert info["share_of_floor"] == pytest.approx(kept.floor / 500)
    with pytest.raises(pytest.skip.Exception, match="measured before"):
        conftest.run(recorder, None, TINY, "torch")


def test_a_wrong_arm_has_no_speed(recorder: conftest.Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is red, once; what is wrong stands beside it."""
    monkeypatch.setattr(Truth, "check", lambda self, arm, runner: Check(TINY, arm, False, 37.0, "y is upside down"))
    monkeypatch.setattr(conftest, "skipped", lambda case, arm, reason, device: replace(
        timing(case, arm), skipped=reason, microseconds=0.0
    ))  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match=r"torch is wrong on training lstm fp32 .*: y is upside down"):
        conftest.run(recorder, None, TINY, "torch")
    found = load(recorder.path)
    assert [(c.ok, c.error) for c in found.checks] == [(False, 37.0)]
    assert [(t.skipped, t.microseconds) for t in found.timings] == [("wrong: y is upside down", 0.0)]


def test_an_arm_that_does_not_run_says_why(tmp_path: Path) -> None:
    recorder = conftest.Recorder(tmp_path / "results.json", None, CPU)
    with pytest.raises(pytest.skip.Exception, match="cannot leave the input's product out"):
        conftest.run(recorder, None, replace(TINY, input=0), "torch")
    found = load(tmp_path / "results.json")
    assert found.checks == []
    assert [t.skipped for t in found.timings] == ["torch.nn cannot leave the input's product out"]


@pytest.mark.parametrize("minutes", [0.0, 1.0])
def test_nothing_begins_after_the_deadline(minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = time.monotonic()
    recorder = conftest.opened(options(minutes=minutes, output=tmp_path / "results.json"))
    assert before <= recorder.deadline - 60 * minutes <= time.monotonic()
    recorder.deadline -= 60 * minutes
    with pytest.raises(pytest.skip.Exception, match="out of time; the next run with the same --output goes on here"):
        conftest.run(recorder, None, TINY, "torch")
    assert recorder._race is None
    assert not (tmp_path / "results.json").exists()


def test_the_truth_of_a_case_is_made_once() -> None:
    recorder = conftest.Recorder(None, None, CPU)
    first = recorder.race(TINY)
    assert recorder.race(replace(TINY)) is first
    assert recorder.race(replace(TINY, mode="forward")) is not first
