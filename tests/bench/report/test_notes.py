"""The predictions in the notebook are those of the plan as it is, and its measured cells those of a results file."""

import doctest
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import add, timing
from synthetic import results as empty

from bench import UsageError
from bench.gpu import calibrate
from bench.race import suites
from bench.report import notes, tables, targets
from bench.report.results import Check, Micro, Results, Stress

NOTES = Path(__file__).parents[3] / "bench" / "NOTES.md"


def test_predictions_are_those_of_the_plan():
    found = doctest.testfile(str(NOTES), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0, "the plan or its model has changed: correct the numbers in the notebook, and its table"


def first_run() -> Results:
    """As the first run on an H200 may leave it, one torch arm skipped, with made-up numbers."""
    found = empty(device="NVIDIA H200", arch="sm_90", multiprocessors=132, cudnn="91300")
    for protocol, cost in (("counter", 0.8), ("flags", 0.5)):
        for programs in (4, 128):
            for payload in (0, 4096):
                value = cost + programs / 1000 + payload / 1e5
                found.add(Micro(f"exchange {protocol}", programs, payload, value, value, value, "us", 15))
    found.add(Micro("l2", 132, 65536, 58.0, 57.0, 59.0, "bytes per clock", 15))
    found.add(Micro("shared", 132, 196608, 118.0, 117.0, 119.0, "bytes per clock", 15))
    found.add(Micro("clock", 132, 0, 1.9, 1.9, 1.9, "GHz", 15))
    for case in suites.first():
        time = case.steps * (2.0 + case.layers + 0.5 * bool(case.marks)) * (3 if case.mode == "training" else 1)
        add(found, timing(case, "persistrnn", time), timing(case, "torch", 4 * time))
    found.add(Stress("smoke: LSTM forward, one slice", True, 1.0, "seen"))
    found.add(Stress("not run: tests/kernels/test_gpu.py", False, 0.0, "12 tests: no time was left"))
    return found


def test_a_first_run_fills_the_notebook() -> None:
    """Those cells and nothing else."""
    found = notes.cells(first_run(), "r.json")
    assert found.keys() == {
        "self-flagging exchange", "one poller per group", "weights in registers", "staggered reads of h", "CUDA graphs",
        "several batch tiles", "stack as a wavefront", "marks instead of masks",
    }  # fmt: skip
    assert found["self-flagging exchange"] == "an exchange among 128 programs, 4,096 bytes: 0.97 -> 0.67 us (r.json)"
    assert found["one poller per group"] == "an announcement: 0.80 us among 4, 0.93 us among 128 (r.json)"
    assert found["weights in registers"] == "from shared memory: 118 bytes per clock (r.json)"
    assert found["CUDA graphs"] == "a call of T=1, H=256: 3.0 us (r.json)"
    assert found["stack as a wavefront"].endswith("1 -> 4 layers: 9.00 -> 18.00 us per step, 2.00 times (r.json)")
    assert found["marks instead of masks"].endswith("9.00 -> 10.50 us per step, 1.17 times (r.json)")
    before = NOTES.read_text()
    after = notes.filled(before, found)
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == len(found)
    for old, new in changed:
        a, b = old.split("|"), new.split("|")
        assert len(a) == len(b)
        assert [i for i in range(len(a)) if a[i] != b[i]] == [1 + notes.COLUMN]
        assert a[1 + notes.COLUMN].strip() == targets.NOTHING
    assert notes.filled(after, found) == after


@pytest.mark.parametrize("change", [{"rehearsal": True}, {"device": "NVIDIA A100"}])
def test_other_results_fill_nothing(change: dict[str, object]) -> None:
    run = first_run()
    run.provenance = replace(run.provenance, **change)
    with pytest.raises(UsageError, match="allowed: a run on a whole H200"):
        notes.cells(run, "r.json")


def test_the_rest_takes_a_first_run_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan's constants and steps, the targets and the README's table."""
    path, record = tmp_path / "h200.json", tmp_path / "measured" / "h200.json"
    first_run().save(path)
    assert calibrate.main([str(path), "--output", str(record)]) == 0
    assert "exchange" in capsys.readouterr().out
    content = record.read_text()
    assert '"constants"' in content
    assert '"backward"' in content
    shown = {one.text: one.met for one in targets.targets(first_run(), "h200.json")}
    assert sum(met != targets.NOTHING for met in shown.values()) >= 8
    assert targets.NOTHING not in tables.markdown(first_run())
    wrong = first_run()
    wrong.timings = [one for one in wrong.timings if one.case != suites.first()[0]]
    wrong.add(Check(suites.first()[0], "persistrnn", False, 9.0, "y is wrong"))
    wrong.save(path)
    with pytest.raises(SystemExit):
        calibrate.main([str(path), "--output", str(record), "--force"])
    assert "1 checks of persistrnn are red" in capsys.readouterr().err
