"""What runs under load, as far as no load is needed: shapes, verdicts, and what the sanitizer says in other words."""

import random
from pathlib import Path

import pytest
import torch

from bench.gpu import micro, stress
from bench.race.engine import Race
from bench.report.results import Check
from persistrnn.kernels import launch
from persistrnn.kernels.tensors import Kept

CPU = torch.device("cpu")


def test_shapes_stay_in_their_ranges() -> None:
    """And reach everything that there is."""
    generator = random.Random(0)
    shapes = [stress.drawn(generator, 2048, 48) for _ in range(2000)]
    kinds = {(c.cell, c.dtype, c.bidirectional, c.layers) for c in shapes}
    assert len(kinds) == 2 * 4 * 2 * 2
    for name, largest in (("hidden", 2048), ("batch", 200), ("steps", 48), ("input", 64)):
        values = {getattr(c, name) for c in shapes}
        assert min(values) == 1, name
        assert 0.9 * largest < max(values) <= largest, name
    small = [stress.drawn(generator, 20, 4) for _ in range(200)]
    assert (max(max(c.hidden, c.batch) for c in small), max(c.steps for c in small)) == (20, 4)


def test_shapes_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at least; the first wrong one ends it with its name."""
    seen = []

    def check(race: Race, arm: str, runner: object) -> Check:
        seen.append(race.case)
        return Check(race.case, arm, len(seen) != 4, 0.5, "y has error 1")

    monkeypatch.setattr(Race, "check", check)
    monkeypatch.setattr(Race, "runner", lambda race, arm: None)
    assert stress.random_shapes(CPU, 0.0, largest=5, longest=3).startswith("1 shapes, ")
    with pytest.raises(AssertionError) as wrong:
        stress.random_shapes(CPU, 60.0, largest=5, longest=3)
    assert str(wrong.value) == f"{seen[3].key}: y has error 1"
    assert len(seen) == 4
    assert seen[0] == seen[1], "the same seed"


@pytest.mark.interpreter
def test_shapes_on_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stress.random_shapes(CPU, 0.0, largest=5, longest=3, seed=1).startswith("1 shapes, ")
    forward = launch.forward

    def wrong(*arguments: object, **options: object) -> Kept:
        kept = forward(*arguments, **options)
        kept.states[0].mul_(1.1)
        return kept

    monkeypatch.setattr(launch, "forward", wrong)
    with pytest.raises(AssertionError, match=r"training \w+ \w+ I=.*: y has error"):
        stress.random_shapes(CPU, 0.0, largest=5, longest=3, seed=1)


def test_streams_need_a_gpu() -> None:
    assert stress.many_streams(CPU, 1.0) == "not run: no CUDA device"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('echo "ERROR SUMMARY: $1 $2 $3 $4 $6"', "memcheck: ERROR SUMMARY: --tool memcheck --error-exitcode 66 -c"),
        ("echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)'", "memcheck: RACECHECK SUMMARY: 0 "),
        ("echo 'ERROR SUMMARY: 0 errors'; echo 'no debugger here'; exit 1", "refused: ERROR SUMMARY: 0 errors no "),
        ("exit 0", "refused: "),
        ("while :; do :; done", "not finished: memcheck was stopped after 0 s"),
        (
            "echo 'Invalid __global__ read'; echo 'ERROR SUMMARY: 3 errors'; exit 66",
            "WRONG memcheck: ERROR SUMMARY: 3 ",
        ),
        ("echo 'ERROR SUMMARY: 0'; echo 'Traceback (most recent call last)' >&2; exit 1", "WRONG memcheck: ERROR SUMM"),
        (None, "not run: there is no compute-sanitizer on this machine"),
    ],
    ids=["clean", "no hazards", "refused", "silent", "slow", "found something", "the program failed", "not there"],
)
def test_sanitizer(script: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tool by name, a status of its own for errors, and what it says in other words."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    try:
        found = stress.ITEMS["compute-sanitizer memcheck"](CPU, 0.2 if says.startswith("not finished") else 30.0)
    except AssertionError as error:
        found = f"WRONG {error}"
    assert found.startswith(says)


@pytest.mark.parametrize("program", [stress.SANITIZED, micro.FIRST_CALL], ids=["sanitized", "first call"])
def test_programs_of_their_own_run(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU, in small and on torch's path: no name in them is misspelt."""
    for old, new in (
        ('"cuda"', '"cpu"'),
        ('"persistent"', '"torch"'),
        ("torch.cuda.synchronize()", "pass"),
        ("1024", "8"),
    ):
        assert old in program or old == "1024"
        program = program.replace(old, new)
    exec(compile(program, "program", "exec"), {})
    printed = capsys.readouterr().out
    assert printed == "" or 0 < float(printed) < 60
