"""The GPU command without a GPU: what it refuses, and which steps run into which file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import PROVENANCE, results

from bench.gpu import command as gpu
from bench.gpu.steps import FIRST
from bench.gpu.supervisor import Run
from bench.report import provenance
from bench.report.results import Stress, load
from persistrnn.kernels import launch


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
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that do nothing but say so here, in order."""
    begun: list[str] = []
    monkeypatch.setattr(Run, "watch", lambda run, step, seconds: begun.append(step.name))
    return begun


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("machine", "steps")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rase"], "argument PART: 'rase' given, allowed: machine, compile,"),
        (["race", "--minutes", "0"], "argument --minutes: 0 given, allowed: above 0 and at most 60"),
        (["--minutes", "nan"], "argument --minutes: nan given, allowed: above 0 and at most 60"),
        (["--suite", "long"], "argument --suite: invalid choice: 'long' (choose from"),
        (["--arm", "jax"], "argument --arm: invalid choice: 'jax' (choose from"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


def test_no_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device; run this on a machine with one, or --rehearse h200 without" in refused(capsys)
    assert "set TRITON_INTERPRET=1 (make rehearse does)" in refused(capsys, "--rehearse", "h200")


@pytest.mark.usefixtures("steps")
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


@pytest.mark.usefixtures("machine", "steps")
def test_a_file_that_is_none(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("[]")
    assert "results.json is '[]', allowed: an object with provenance," in refused(capsys, "--output", str(path))
    assert "Is a directory" in refused(capsys, "--output", str(path.parent))


def test_steps_run_in_order(
    machine: Callable[..., int], steps: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts, or those that are named, each with its own minutes; the clock is read at the end."""
    assert machine() == 0
    assert steps == ["correctness", "stress", "micro", "race", "tune"]
    found = load(path).provenance
    assert (found.clocks_before, found.clocks_after) == (1000, 1234)
    assert found.command == f"python -m bench.gpu --output {path}"
    assert machine("tune", "smoke") == 0
    assert steps[5:] == ["tune", "smoke"]
    assert "Test GPU, results in" in capsys.readouterr().out
    steps.clear()
    assert machine("first") == 0
    assert steps == [step.name for step in FIRST]
    assert "480 s at most" in capsys.readouterr().out


def test_a_step_that_is_not_green(machine: Callable[..., int], monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def watch(run: Run, step: object, seconds: float) -> None:
        run.note("race: a row, torch", False, 1.0, "y is wrong")

    monkeypatch.setattr(Run, "watch", watch)
    assert machine("race") == 1
    assert load(path).stress == [Stress("race: a row, torch", False, 1.0, "y is wrong")]


@pytest.mark.usefixtures("steps")
def test_names_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Callable[..., int]) -> None:
    """By device and commit, or by what is rehearsed."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["micro"]) == gpu.main(["micro", "--commit", "fedcba9876"]) == 0
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert gpu.main(["micro", "--rehearse", "h200"]) == 0
    names = {file.name for file in (tmp_path / "bench" / "results").iterdir()}
    assert names == {"test-gpu-01234567.json", "test-gpu-fedcba98.json", "rehearsal-h200-01234567.json"}
