"""The race as it is started: its options, what it writes, and that a second run repeats nothing."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import CASE, results

from bench.race import __main__ as race
from bench.race import engine
from bench.race.correctness import Truth
from bench.race.engine import REHEARSED, Race
from bench.report.results import MODES, Check, Results, load

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = replace(CASE, input=3, hidden=2, batch=2, steps=4, dtype="fp32", mode="training")


@pytest.mark.interpreter
def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Green checks, no speeds; a second run finds all of it."""
    path = tmp_path / "results.json"
    arguments = ["--rehearse", "--suite", "short", "--dtype", "fp16", "--arm", "persistrnn", "torch"]
    assert race.main([*arguments, "--output", str(path)]) == 0
    found = load(path)
    assert found.provenance.rehearsal
    lstm = [(c.case.mode, c.arm) for c in found.checks if c.case.cell == "lstm"]
    assert lstm == [(mode, arm) for mode in MODES for arm in ("persistrnn", "torch")]
    assert all(check.ok for check in found.checks)
    assert {(t.skipped, t.microseconds) for t in found.timings} == {(REHEARSED, 0.0)}
    assert max(check.case.hidden for check in found.checks) < 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json"]

    capsys.readouterr()
    found.provenance = replace(found.provenance, commit="unknown")  # in case someone commits meanwhile
    found.save(path)
    before = path.read_bytes()
    assert race.main([*arguments, "--output", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before


def test_the_command_without_an_installation(tmp_path: Path) -> None:
    """On a GPU machine persistrnn is not installed: the tests, and all else, come from the checkout."""
    # -S leaves out what puts an editable installation on the path.
    site = Path(pytest.__file__).parents[1]
    code = f"import sys; sys.path.append({str(site)!r}); from bench.gpu import command; sys.exit(command.main())"
    arguments = ["correctness", "--rehearse", "h200", "--output", str(tmp_path / "results.json")]
    variables = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_gpu_wave.py::" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rehearse"], "set TRITON_INTERPRET=1"),
        ([], "torch sees no CUDA device; run this on a machine with one, or --rehearse"),
        (["--suite", "short", "long"], "argument --suite: invalid choice: 'long' (choose from"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8' (choose from"),
        (["--arm", "torch", "jax"], "argument --arm: invalid choice: 'jax' (choose from"),
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        race.main(["--output", "results.json", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_results_that_do_not_belong_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "broken.json").write_text("{")
    results().save(tmp_path / "other.json")
    for name, message in (
        ("broken.json", "broken.json: not JSON"),
        ("other.json", "was measured with device 'Test GPU', now it is 'CPU"),
        (".", "Is a directory"),
    ):
        with pytest.raises(SystemExit):
            race.main(["--rehearse", "--output", str(tmp_path / name)])
        assert f"argument --output: {tmp_path / name}"[:18] in (err := capsys.readouterr().err)
        assert message in err


def run(path: Path, *arms: str, cases: tuple = (TINY,), until: float = float("inf")) -> tuple[bool, Results]:
    found = load(path) if path.exists() else results()
    ok = race.run(found, path, cases, arms, CPU, until)
    return ok, found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: times count, and every call takes 2 ms."""
    monkeypatch.setattr(engine, "REHEARSED", "")
    monkeypatch.setattr(engine, "skipped", lambda case, arm, reason, device: race_time(case, arm, reason))
    monkeypatch.setattr(engine.timing, "seconds_of", lambda call, clock, calls=1: call() is None or 2e-3)


def race_time(case: object, arm: str, reason: str) -> object:
    from synthetic import skipped, timing

    return skipped(case, arm, reason) if reason else timing(case, arm, 2000.0)


@pytest.mark.usefixtures("timed")
def test_a_timing_is_kept_and_not_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(path, "torch")[0]
    found = load(path)
    (check,), (kept,) = found.checks, found.timings
    assert check.ok
    assert (kept.microseconds, kept.skipped) == (2000, "")
    monkeypatch.setattr(Race, "entries", lambda *_: pytest.fail("measured again"))
    assert run(path, "torch") == (True, found)


@pytest.mark.usefixtures("timed")
def test_a_wrong_arm_has_no_speed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is red, once; what is wrong stands beside it."""
    monkeypatch.setattr(Truth, "check", lambda self, arm, runner: Check(TINY, arm, False, 37.0, "y is upside down"))
    assert not run(path, "torch")[0]
    found = load(path)
    assert [(c.ok, c.error) for c in found.checks] == [(False, 37.0)]
    assert [(t.skipped, t.microseconds) for t in found.timings] == [("wrong: y is upside down", 0.0)]


def test_an_arm_that_does_not_run_says_why(path: Path) -> None:
    assert run(path, "torch", cases=(replace(TINY, input=0),))[0]
    assert load(path).checks == []
    assert [t.skipped for t in load(path).timings] == ["torch.nn cannot leave the input's product out"]


def test_an_error_is_red_and_ends_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner: Callable[..., object] = Race.runner

    def broken(self: Race, arm: str) -> object:
        if arm == "torch-best":
            assert path.with_suffix(".running").read_text() == f"race: {TINY.key}, torch-best"
            raise TypeError("no such size")
        return runner(self, arm)

    monkeypatch.setattr(Race, "runner", broken)
    ok, found = run(path, "torch-best", "torch")
    assert not ok
    assert [t.arm for t in found.timings] == ["torch"]
    assert "torch-best: TypeError: no such size" in capsys.readouterr().out
    assert not path.with_suffix(".running").exists()


def test_nothing_begins_after_the_deadline(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok, found = run(path, "torch", until=time.monotonic())
    assert ok
    assert not found.timings
    assert "out of time; the next run with the same --output goes on here" in capsys.readouterr().out
    assert not path.exists()
