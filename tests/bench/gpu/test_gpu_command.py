"""The GPU command without a GPU: what it refuses, what it keeps, and that nothing that goes wrong is lost or green."""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import CASE, PROVENANCE, add, everything, results, timing

from bench.gpu import command as gpu
from bench.gpu import micro, recorder, stress, tune
from bench.race import suites
from bench.report import provenance
from bench.report.results import Check, Micro, Results, Stress, Tuning, load
from persistrnn.kernels import launch
from persistrnn.kernels.planner.hardware import named

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., int]:
    """machine(part, ...): the command on a machine that seems to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(provenance, "provenance", lambda device, command=None, commit="": replace(
        PROVENANCE, clocks_after=0, command=" ".join(command or []), commit=commit or PROVENANCE.commit
    ))  # fmt: skip
    monkeypatch.setattr(provenance, "clock", lambda: 1234)
    return lambda *arguments: gpu.main([*arguments, "--output", str(path)])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that do nothing but say so here, in order."""
    done: list[str] = []
    for name in gpu.PARTS:
        monkeypatch.setitem(gpu.DO, name, lambda run, name=name: done.append(name) or True)
    return done


def run_of(path: Path, rehearse: str | None = None, minutes: float = 8.0, **changed: Any) -> gpu.Run:
    """A run without its validate."""
    run = object.__new__(gpu.Run)
    run.path, run.device, run.results = path, CPU, results()
    run.arguments = Namespace(
        **({"minutes": minutes, "suite": ["short"], "dtype": ["fp16"], "arm": ["torch"]} | changed)
    )
    run.hardware = named(rehearse) if rehearse else None
    run.save()
    return run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# The door


@pytest.mark.usefixtures("machine", "parts")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rase"], "PART must be of correctness, stress, micro, race, tune, or first alone, got 'rase'"),
        (["race", "--minutes", "0"], "--minutes must be above 0 and at most 60, got 0.0"),
        (["--minutes", "61"], "--minutes must be above 0 and at most 60, got 61.0"),
        (["--minutes", "nan"], "--minutes must be above 0 and at most 60, got nan"),
        (["--suite", "long"], "argument --suite: invalid choice: 'long' (choose from"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8' (choose from"),
        (["--arm", "jax"], "argument --arm: invalid choice: 'jax' (choose from"),
        (["--rehearse", "h900"], "argument --rehearse: invalid choice: 'h900' (choose from"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.usefixtures("parts")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device; run this on a machine with one, or --rehearse h200 without" in refused(capsys)


@pytest.mark.usefixtures("parts")
def test_a_rehearsal_needs_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert "set TRITON_INTERPRET=1 (make rehearse does)" in refused(capsys, "--rehearse", "h200")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "commit"])
def test_a_file_from_elsewhere(
    name: str, machine: Callable[..., int], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results(**{name: "another"}).save(path)
    before = path.read_bytes()
    error = refused(capsys, "micro", "--output", str(path))
    assert f"was measured with {name} 'another', now it is '{getattr(PROVENANCE, name)}'; name another" in error
    assert path.read_bytes() == before
    results(**{name: "unknown"}).save(path)
    assert machine("micro") == 0, "what is not known may be the same"
    results(command="another", date="another").save(path)
    assert machine("micro") == 0


@pytest.mark.usefixtures("machine", "parts")
def test_a_file_that_is_none(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("[]")
    assert "results.json is '[]', allowed: an object with provenance," in refused(capsys, "--output", str(path))
    assert "Is a directory" in refused(capsys, "--output", str(path.parent))


# All parts


def test_parts_run_in_order(
    machine: Callable[..., int], parts: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, or those that are named; the clock is read at the end."""
    assert machine() == 0
    assert parts == ["correctness", "stress", "micro", "race", "tune"]
    found = load(path).provenance
    assert (found.clocks_before, found.clocks_after) == (1000, 1234)
    assert found.command == f"python -m bench.gpu --output {path}"
    assert machine("tune", "micro") == 0
    assert parts[5:] == ["tune", "micro"]
    shown = capsys.readouterr().out
    assert "Test GPU, results in" in shown
    assert "== tune: ok, 0 s" in shown


def test_a_part_that_raises_is_red_and_ends_no_other(
    machine: Callable[..., int], parts: list[str], path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(run: gpu.Run) -> bool:
        raise TypeError("no such size")

    monkeypatch.setitem(gpu.DO, "micro", broken)
    assert machine() == 1
    assert parts == ["correctness", "stress", "race", "tune"]
    assert [(e.name, e.ok, e.message) for e in load(path).stress] == [("micro", False, "TypeError: no such size")]
    assert load(path).provenance.clocks_after == 1234
    shown = capsys.readouterr()
    assert "== micro: NOT OK" in shown.out
    assert "Traceback" in shown.err


@pytest.mark.usefixtures("parts")
def test_a_part_that_is_not_green(
    machine: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.DO, "race", lambda run: False)
    assert machine() == 1
    assert "== race: NOT OK" in capsys.readouterr().out
    assert machine("tune") == 0


@pytest.mark.usefixtures("parts")
def test_names_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Callable[..., int]) -> None:
    """By device and commit, or by what is rehearsed."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["micro"]) == gpu.main(["micro", "--commit", "fedcba9876"]) == 0
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert gpu.main(["micro", "--rehearse", "h200"]) == 0
    names = {file.name for file in (tmp_path / "bench" / "results").iterdir()}
    assert names == {"test-gpu-01234567.json", "test-gpu-fedcba98.json", "rehearsal-h200-01234567.json"}


# Suites in processes of their own


class Process:
    """In place of ``subprocess.run``: notes the commands, and does what a test wants."""

    def __init__(self, act: Callable[[list[str]], int]) -> None:
        self.act, self.commands, self.timeouts = act, [], []

    def __call__(self, command: list[str], timeout: float, **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.timeouts.append(timeout)
        return SimpleNamespace(returncode=self.act(command), stdout="", stderr="it broke")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Process]:
    def install(act: Callable[[list[str]], int]) -> Process:
        made = Process(act)
        monkeypatch.setattr(subprocess, "run", made)
        return made

    return install


def following(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize(("status", "ok"), [(0, True), (1, False), (2, False), (5, False)])
def test_a_suite_and_its_status(status: int, ok: bool, process: Callable[..., Process], path: Path) -> None:
    """What it has added to the file is there afterwards."""

    def suite(command: list[str]) -> int:
        found = load(path)
        found.add(Stress("test_it", True, 1.0, ""))
        found.save(path)
        return status

    run, made = run_of(path), process(suite)
    assert gpu.correctness(run) is ok
    assert [entry.name for entry in run.results.stress] == ["test_it"]
    assert made.commands[0][:3] == [sys.executable, "-m", "pytest"]
    assert "tests/kernels/test_gpu.py" in made.commands[0]
    assert following(made.commands[0], "--outcomes") == str(path)
    assert following(made.commands[0], "--within") == "8.0"
    assert made.timeouts == [540.0]


@pytest.mark.parametrize("known", [True, False])
def test_a_suite_that_hangs(known: bool, process: Callable[..., Process], path: Path) -> None:
    def hang(command: list[str]) -> int:
        if known:
            recorder.running(path).write_text("test_gpu.py::test_endless")
        raise subprocess.TimeoutExpired(command, 60.0)

    run = run_of(path, minutes=0.5)
    recorder.running(path).write_text("test_gpu.py::test_of_long_ago")
    process(hang)
    assert gpu.correctness(run) is False
    (entry,) = load(path).stress
    assert (entry.name, entry.ok) == ("test_gpu.py::test_endless" if known else "tests", False)
    assert entry.message == "tests was killed after 90 s: it hung, or was too slow"


@pytest.mark.parametrize(("status", "running"), [(-11, False), (139, True)])
def test_a_suite_that_dies(status: int, running: bool, process: Callable[..., Process], path: Path) -> None:
    def die(command: list[str]) -> int:
        if running:
            recorder.running(path).write_text("test_gpu.py::test_wild")
        return status

    run = run_of(path)
    process(die)
    assert gpu.correctness(run) is False
    (entry,) = load(path).stress
    assert (entry.name, entry.ok) == ("test_gpu.py::test_wild" if running else "tests", False)
    assert entry.message == f"tests died with status {status}"


def test_race(process: Callable[..., Process], path: Path) -> None:
    """The suites that were asked for, into the same file; what was wrong once is not green because it is old."""
    run, made = run_of(path, suite=["short", "models"], arm=["torch", "xma"]), process(lambda command: 0)
    assert gpu.race_part(run)
    (command,) = made.commands
    assert "bench/race/test_race.py" in command
    assert following(command, "--output") == str(path)
    assert following(command, "--minutes") == "8.0"
    for option, given in (("--suite", ["short", "models"]), ("--dtype", ["fp16"]), ("--arm", ["torch", "xma"])):
        at = command.index(option) + 1
        assert command[at : at + len(given)] == given
        assert command[at + len(given)].startswith("--")
    run.add(Check(CASE, "torch", False, 37.0, "y is wrong"))
    assert not gpu.race_part(run)


def test_race_of_a_rehearsal(process: Callable[..., Process], path: Path) -> None:
    """Predictions of every case once, and miniatures into a file of their own."""
    run, made = run_of(path, rehearse="h200"), process(lambda command: 0)
    for _ in range(2):
        assert gpu.race_part(run)
        found = load(path)
        assert [t.case for t in found.timings] == suites.cases(["short"], ["fp16"])
        assert {(t.arm, t.skipped) for t in found.timings} == {
            ("persistrnn", "not measured: a rehearsal without a GPU")
        }
        assert all(t.predicted > t.floor > 0 for t in found.timings)
    assert {"--rehearse", "--benchmark-quiet"} < set(made.commands[0])
    assert following(made.commands[0], "--output") != str(path)


def test_correctness_of_a_rehearsal_is_collected(process: Callable[..., Process], path: Path) -> None:
    made = process(lambda command: 0)
    assert gpu.correctness(run_of(path, rehearse="h200"))
    assert "--collect-only" in made.commands[0]


# Stress


def test_stress(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item once, whatever the others do; the next call repeats what is not green."""
    asked: list[tuple[str, float]] = []
    broken = {"two": ValueError("does not fit"), "three": AssertionError("y has error 1")}

    def item(name: str) -> Callable[[torch.device, float], str]:
        def run(device: torch.device, seconds: float) -> str:
            asked.append((name, seconds))
            if name in broken:
                raise broken[name]
            return f"{name} seen"

        return run

    monkeypatch.setattr(stress, "ITEMS", {name: item(name) for name in ("one", "two", "three", "four")})
    run = run_of(path)
    assert gpu.stress_part(run) is False
    assert asked == [(name, 90.0) for name in ("one", "two", "three", "four")]
    assert [(e.name, e.ok, e.message) for e in load(path).stress] == [
        ("one", True, "one seen"),
        ("two", False, "ValueError: does not fit"),
        ("three", False, "AssertionError: y has error 1"),
        ("four", True, "four seen"),
    ]
    broken.clear()
    run.arguments.minutes = 1.0
    assert gpu.stress_part(run)
    assert asked[4:] == [("two", 15.0), ("three", 15.0)]
    assert gpu.stress_part(run)
    assert len(asked) == 6


def test_stress_without_time(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stress, "ITEMS", {"one": lambda device, seconds: "seen"})
    run = run_of(path)
    monkeypatch.setattr(gpu.Run, "deadline", lambda run: time.monotonic())
    assert gpu.stress_part(run)
    assert load(path).stress == []
    assert "out of time before one" in capsys.readouterr().out


def test_deadline(path: Path) -> None:
    before = time.monotonic()
    deadline = run_of(path, minutes=2.0).deadline()
    assert before <= deadline - 120 <= time.monotonic()


# Micro and tune


def test_micro_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the file has is done; what is new is kept; what is left is named."""
    run = run_of(path, minutes=2.0)
    run.add(Micro("first call", 1, 0, 9.0, 9.0, 9.0, "s", 1))
    run.add(Micro("l2", 7, 4096, 1.0, 1.0, 1.0, "us", 3))
    seen = {}

    def measure(
        keep: Callable[[Micro], None], done: set[object], device: torch.device, progress: object, deadline: float
    ) -> list[str]:
        seen.update(done=done, device=device, deadline=deadline)
        keep(Micro("barrier", 7, 0, 1.0, 1.0, 1.0, "us", 3))
        return ["launch", "memory"]

    monkeypatch.setattr(gpu.Run, "deadline", lambda run: 17.0)
    monkeypatch.setattr(micro, "measure", measure)
    assert gpu.micro_part(run)
    assert seen["done"] == {("first call", 1, 0), ("l2", 7, 4096)}
    assert seen["device"] == CPU
    assert seen["deadline"] == 17.0
    assert [entry.name for entry in load(path).micro] == ["first call", "l2", "barrier"]
    assert "micro: out of time before launch, memory" in capsys.readouterr().out


def test_the_first_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own that has nothing compiled yet; what it says when it fails is kept."""
    run, environments = run_of(path), []

    def process(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        environments.append(env)
        assert command == [sys.executable, "-c", gpu.FIRST_CALL]
        assert list(Path(env["TRITON_CACHE_DIR"]).iterdir()) == []
        return SimpleNamespace(returncode=len(environments) % 2, stdout="compiling\n3.25\n", stderr="it broke")

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(micro, "measure", lambda *_: [])
    with pytest.raises(RuntimeError, match="the first call failed with status 1: it broke"):
        gpu.micro_part(run)
    assert gpu.micro_part(run)
    assert load(path).micro == [Micro("first call", 1, 0, 3.25, 3.25, 3.25, "s", 1)]
    assert gpu.micro_part(run)
    assert len(environments) == 2


def test_tune_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(path, minutes=2.0)
    run.add(Tuning(CASE, True, "U=8", True, 1.0, 2.0))
    seen = {}

    def tuned(
        keep: Callable[[Tuning], None], done: set[object], device: torch.device, progress: object, deadline: float
    ) -> list[str]:
        seen.update(done=done, deadline=deadline)
        keep(Tuning(CASE, True, "U=16", False, 1.0, 2.0))
        return ["one", "two"]

    monkeypatch.setattr(gpu.Run, "deadline", lambda run: 17.0)
    monkeypatch.setattr(tune, "tune", tuned)
    assert gpu.tune_part(run)
    assert seen["done"] == {(CASE.key, True, "U=8")}
    assert seen["deadline"] == 17.0
    assert [entry.choice for entry in load(path).tuning] == ["U=8", "U=16"]
    assert "tune: out of time before 2 choices" in capsys.readouterr().out


def test_micro_and_tune_of_a_rehearsal(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is kept."""
    first = next(tune.cases())
    monkeypatch.setattr(tune, "cases", lambda: iter([first]))
    run = run_of(path, rehearse="h200")
    assert gpu.micro_part(run)
    assert gpu.tune_part(run)
    assert load(path) == results()
    assert f"tune: {first.key}: 6 choices forward, 6 backward" in capsys.readouterr().out


@pytest.mark.interpreter
def test_a_rehearsal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["stress", "micro", "--rehearse", "h200", "--output", str(path)]) == 0
    found = load(path)
    assert found.provenance.rehearsal
    assert found == Results(found.provenance)
    assert "outputs and all gradients within the bound; nothing kept" in capsys.readouterr().out


def test_entries_are_saved_at_once(path: Path) -> None:
    run = run_of(path)
    for entry in everything().micro + everything().stress + everything().tuning:
        run.add(entry)
        assert load(path) == run.results
    add(run.results, timing(CASE))
    run.save()
    assert load(path).timings == [timing(CASE)]
