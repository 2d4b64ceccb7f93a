"""From results to the data file of a device: what is taken, what is refused, and that the plan reads it."""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import add, case, skipped, timing
from synthetic import results as empty

from bench.gpu import calibrate, micro
from bench.report.results import Case, Check, Micro, Results, Timing
from persistrnn.kernels.planner.hardware import DEVICES, corrected
from persistrnn.kernels.planner.measurements import MEASURABLE, Step, measurements

RECORD = DEVICES["h200"]
ROW = case(input=256, steps=100)


def h200(**changes: Any) -> Results:
    return empty(**({"device": "NVIDIA H200", "arch": "sm_90", "multiprocessors": 132} | changes))


def both(of: Case, forward: float, training: float, arm: str = "persistrnn") -> list[Timing]:
    """A forward and a training call of as many microseconds per step."""
    return [
        timing(replace(of, mode=mode), arm, us * of.steps)
        for mode, us in (("forward", forward), ("training", training))
    ]


def measured(name: str, value: float, programs: int = 132, payload: int = 0) -> Micro:
    return Micro(name, programs, payload, value, value, value, "x", 9)


def filled(**changes: Any) -> Results:
    """Two constants and four steps."""
    found = add(h200(**changes), *both(ROW, 1.0, 3.0), *both(ROW, 4.0, 9.0, "torch"))
    found.add(measured("exchange counter", 0.91, payload=4096))
    found.add(measured("clock", 1.5))
    found.add(measured("first call", 7.0, 1))
    return found


def found_of(*timings: Timing) -> dict[tuple[str, bool], float]:
    """(path, backward) -> microseconds."""
    return {(s.path, s.backward): s.microseconds for s in calibrate.steps(add(h200(), *timings))}


# What is taken.


def test_steps_are_those_of_both_paths_and_passes() -> None:
    shape = "lstm", 256, 16, 1, "bf16"
    assert calibrate.steps(filled()) == [
        Step(*shape, False, "persistent", 1.0),
        Step(*shape, False, "torch", 4.0),
        Step(*shape, True, "persistent", 2.0),
        Step(*shape, True, "torch", 5.0),
    ]


def test_two_directions_are_kept_apart() -> None:
    two = replace(ROW, bidirectional=True)
    found = calibrate.steps(add(h200(), *both(ROW, 1.0, 3.0), *both(two, 1.5, 3.5)))
    assert {(s.directions, s.backward): s.microseconds for s in found} == {
        (1, False): 1.0, (1, True): 2.0, (2, False): 1.5, (2, True): 2.0,
    }  # fmt: skip


FORWARD, TRAINING = both(ROW, 1.0, 3.0)
SHORT = both(replace(ROW, steps=8), 9.0, 99.0)
ONE = {("persistent", False): 1.0}


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        ([timing(replace(ROW, layers=2))], {}),
        ([timing(replace(ROW, input=0))], {}),
        ([timing(replace(ROW, marks="lengths"))], {}),
        ([timing(replace(ROW, cell="other"))], {}),
        ([timing(ROW, "torch-best")], {}),
        ([timing(ROW, dtype="fp16")], {}),
        ([skipped(ROW, "persistrnn", "out of time")], {}),
        # A backward needs a forward of the same shape and arm, and has a time.
        ([TRAINING], {}),
        ([timing(ROW, "torch", 100), TRAINING], {("torch", False): 1.0}),
        ([timing(replace(ROW, steps=50), "persistrnn", 50), TRAINING], ONE),
        ([timing(replace(ROW, input=128), "persistrnn", 100), TRAINING], ONE),
        (both(ROW, 1.0, 1.0), ONE),
        (both(ROW, 1.0, 0.5), ONE),
        # The longest sequence counts, pass by pass, then the narrowest input.
        ([*SHORT, FORWARD, TRAINING], ONE | {("persistent", True): 2.0}),
        ([*SHORT, FORWARD], ONE | {("persistent", True): 90.0}),
        ([timing(replace(ROW, input=512), "persistrnn", 400), timing(replace(ROW, input=64), "persistrnn", 100)], ONE),
    ],
)
def test_what_is_a_step_of_one_layer(timings: list[Timing], expected: dict[tuple[str, bool], float]) -> None:
    """Whichever comes first."""
    assert found_of(*timings) == found_of(*timings[::-1]) == expected


def test_constants_are_the_measurable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.measured(filled()).constants == {"exchange": 0.91, "clock": 1.5}
    monkeypatch.setattr(micro, "constants", lambda _: {"barrier": 0.02, "shared": 1.0})
    assert "shared" not in MEASURABLE
    assert calibrate.measured(filled()).constants == {"barrier": 0.02}


# The command.


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """call(results, arguments): (exit status, stdout, stderr); the package's folder of measurements is tmp_path."""
    monkeypatch.setattr(calibrate, "MEASURED", tmp_path)

    def run(given: Results | str, *arguments: object) -> tuple[int, str, str]:
        path = tmp_path / "in" / "results.json"
        if isinstance(given, Results):
            given.save(path)
        else:
            path = tmp_path / given
        try:
            status = calibrate.main([str(path), *map(str, arguments)])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return status, *capsys.readouterr()

    return run


def test_file_is_what_the_plan_reads(call: Callable[..., Any], tmp_path: Path) -> None:
    status, out, err = call(filled())
    assert (status, err) == (0, "")
    assert f"wrote {tmp_path / 'h200.json'}: 2 constants, 4 steps" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h200.json", "in"], "nothing unfinished is left"
    found = measurements("h200", tmp_path)
    assert found is not None
    assert found.steps == calibrate.steps(filled())
    where = filled().provenance
    assert asdict(found.provenance) == {
        "device": "NVIDIA H200", "driver": where.driver, "torch": where.torch, "triton": where.triton,
        "commit": where.commit, "date": where.date, "command": where.command,
    }  # fmt: skip
    assert corrected(RECORD, tmp_path).exchange == 0.91
    assert corrected(RECORD, tmp_path).barrier == RECORD.barrier


def test_changes_are_printed(call: Callable[..., Any]) -> None:
    _, out, _ = call(filled())
    assert re.search(r"^exchange +0\.7 +-> +0\.91 +1\.30$", out, re.MULTILINE)
    assert re.search(r"^clock +1\.98 +-> +1\.5 +0\.76$", out, re.MULTILINE)
    assert "barrier" not in out


def test_what_was_there_is_replaced_when_forced(call: Callable[..., Any], tmp_path: Path) -> None:
    call(filled())
    before = measurements("h200", tmp_path)
    other = filled()
    other.micro[0] = measured("exchange counter", 0.5, payload=4096)
    status, _, err = call(other)
    assert status == 2
    assert "h200.json' is there; allowed: a new file; name another --output, or say --force" in err
    assert measurements("h200", tmp_path) == before
    status, out, _ = call(other, "--force")
    assert status == 0
    assert re.search(r"^exchange +0\.7 +-> +0\.5 ", out, re.MULTILINE), (
        "against the record, not what was measured before"
    )
    after = measurements("h200", tmp_path)
    assert after is not None
    assert after.constants["exchange"] == 0.5, "this process reads it too"


def wrong_elsewhere() -> Results:
    found = filled()
    found.add(Check(case(hidden=77, input=5), "torch", False, 40.0, "y has error 1e0"))
    return found


@pytest.mark.parametrize(
    ("given", "arguments", "says"),
    [
        (filled(rehearsal=True), (), ("a rehearsal on 'NVIDIA H200'", "allowed: a run on a GPU", "make gpu")),
        (filled(dirty=True), (), ("uncommitted changes", "'0123456789abcdef'", "allowed: a clean", "--allow-dirty")),
        (wrong_elsewhere(), (), ("1 checks of torch are red", "H=77", "y has error 1e0", "allowed: none", "make gpu")),
        (filled(device="Other"), (), ("'Other' (sm_90, 132 multiprocessors)", "allowed: a100", "--device")),
        (filled(arch="sm_80"), (), ("'NVIDIA H200' (sm_80", "allowed: a100", "--device")),
        (filled(multiprocessors=16), (), ("(sm_90, 16 multiprocessors)", "allowed: a100", "--device")),
        (filled(), ("--device", "h100"), ("--device h100 given", "'NVIDIA H200'", "allowed: a record of the same")),
        (filled(device="Other"), ("--device", "a100"), ("--device a100 given", "'Other'", "allowed: a record")),
        (filled(device="X", multiprocessors=9), ("--device", "h200"), ("--device h200 given", "9 multi", "allowed:")),
        (filled(), ("--device", "h300"), ("'h300'", "h200")),
        (filled(), ("--output", "h200.txt"), ("--output 'h200.txt' given", "allowed: a name that ends in .json")),
        (h200(), (), ("0 microbenchmarks and 0 timings", "allowed: one at least", "make gpu")),
        (add(h200(), timing(case())), (), ("1 timings", "allowed: one at least")),
        (filled(driver=""), (), ("provenance.driver is ''", "allowed: a text")),
        ("nothing.json", (), ("nothing.json' given", "No such file", "allowed: a file that `make gpu` wrote")),
        ("broken.json", (), ("broken.json: not JSON",)),
    ],
)
def test_refusals(
    call: Callable[..., Any], tmp_path: Path, given: Results | str, arguments: tuple[str, ...], says: tuple[str, ...]
) -> None:
    (tmp_path / "broken.json").write_text("{")
    status, out, err = call(given, *arguments)
    assert (status, out) == (2, "")
    assert [part for part in says if part not in err] == []
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.json"], "nothing is written"


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (filled(dirty=True), ("--allow-dirty",)),
        (filled(device="NVIDIA H200 NVL"), ("--device", "h200")),
        (filled(), ("--device", "h200")),
    ],
)
def test_remedies_help(call: Callable[..., Any], tmp_path: Path, given: Results, arguments: tuple[str, ...]) -> None:
    assert call(given, *arguments)[0] == 0
    assert measurements("h200", tmp_path) is not None


@pytest.mark.parametrize("name", DEVICES)
def test_every_record_is_found_by_the_name_of_its_device(name: str) -> None:
    marketing = {"rtx4090": "NVIDIA GeForce RTX 4090", "rtx5090": "NVIDIA GeForce RTX 5090"}.get(name, name.upper())
    record = DEVICES[name]
    where = empty(device=marketing, arch=record.arch, multiprocessors=record.multiprocessors).provenance
    assert calibrate.record_of(where) is record
