"""The targets of the race: each is met, missed or open for the rows that it is about, and the table that is shown."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from synthetic import results as empty
from synthetic import skipped, timing

from bench import UsageError
from bench.gpu import command as gpu
from bench.race import suites
from bench.report.results import Case, Micro, Results, Stress, Timing
from bench.report.targets import NOTHING, TESTED, Target, main, markdown, newest, persistent_dtypes, targets, window

ROOT = Path(__file__).parents[3]
README = ROOT / "bench" / "README.md"
CASES = suites.cases()

FP16 = ("fp16",)  # cuDNN's persistent dtypes before 9.13, which the made-up results have

Change = Callable[[Case, str], "float | None"]  # (case, arm) -> factor of its time, None: not measured


@cache
def base() -> tuple[Timing, ...]:
    """Every case of the race in 1 us per step, which is the floor, five times as fast as torch.nn."""
    ours = [timing(of, "persistrnn", of.steps, floor=1.0) for of in CASES]
    return *ours, *(timing(of, "torch", 5.0 * of.steps) for of in CASES if of.input)


def race(change: Change = lambda case, arm: 1.0, **provenance: Any) -> Results:
    """Made whole: entry by entry the rules of so many would take minutes."""
    found = empty(**({"device": "NVIDIA H200"} | provenance))
    for one in base():
        factor = change(one.case, one.arm)
        if factor is not None:
            us = factor * one.microseconds
            found.timings.append(replace(one, microseconds=us, low=0.9 * us, high=1.1 * us))
    found.micro.append(Micro("first call", 1, 0, 9.5, 9.5, 9.5, "s", 1))
    found.stress += [Stress(f"tests/x.py::{name}[512-gru]", True, 1.0, "") for name in TESTED.values()]
    return found


@pytest.mark.parametrize(
    ("cudnn", "expected"),
    [
        ("91300", ["fp16", "bf16"]),
        ("92101", ["fp16", "bf16"]),
        ("91299", ["fp16"]),
        ("8907", ["fp16"]),
        ("none", ["fp16"]),
    ],
)
def test_persistent_dtypes_are_those_of_the_cudnn_that_was_raced(cudnn: str, expected: list[str]) -> None:
    """And with them the rows of a target: a bf16 row that loses to cuDNN's persistent kernel is inside the window."""
    assert list(persistent_dtypes(empty(cudnn=cudnn))) == expected
    bf16 = at(cell="lstm", dtype="bf16", hidden=768, batch=16, steps=1024, layers=1, mode="training")
    lost = missed(race(only(5 / 0.99, bf16), cudnn=cudnn))
    assert any(text.startswith("inside that window (LSTM") for text in lost) == ("bf16" in expected)
    assert any(text.startswith("the same rows: none below") for text in lost) == ("bf16" not in expected)
    assert persistent_dtypes(None) == ("fp16", "bf16")


def only(ours: float, rows: Callable[[Case], bool]) -> Change:
    """persistrnn's time of some rows times a factor."""
    return lambda case, arm: ours if arm == "persistrnn" and rows(case) else 1.0


def at(**wanted: Any) -> Callable[[Case], bool]:
    """Rows with these fields."""
    return lambda case: all(getattr(case, name) == value for name, value in wanted.items())


def met(results: Results | None) -> dict[str, str]:
    return {one.text: one.met for one in targets(results, "r.json")}


def one_of(found: list[Target], start: str) -> Target:
    (result,) = (one for one in found if one.text.startswith(start))
    return result


def missed(results: Results) -> set[str]:
    return {text for text, answer in met(results).items() if answer == "no"}


def test_fast_race_meets_all() -> None:
    assert set(met(race()).values()) == {"yes"}


@pytest.mark.parametrize("results", [None, empty(device="NVIDIA H200")])
def test_without_measurements_nothing_is_said(results: Results | None) -> None:
    found = targets(results)
    assert {(one.measured, one.met) for one in found} == {(NOTHING, NOTHING)}
    assert [one.text for one in found] == [one.text for one in targets(race())]


OUTSIDE = at(cell="lstm", dtype="bf16", hidden=1024, input=1024, batch=16, steps=25, mode="training")
WINDOW = at(cell="lstm", dtype="fp16", hidden=512, input=512, batch=16, steps=25, mode="forward")
PUBLISHED = {"cell": "lstm", "dtype": "fp16", "hidden": 768, "input": 768, "batch": 16, "steps": 1024}
FLOOR = "per step at most 1.5 times the plan's floor, worst row (T >= 64, no product of the input where measured)"


def test_what_was_skipped_is_not_measured() -> None:
    found = empty(device="NVIDIA H200")
    found.timings += [skipped(one.case, one.arm, "out of memory") for one in base()]
    assert set(met(found).values()) == {NOTHING}


@pytest.mark.parametrize(
    ("ours", "rows", "starts"),
    [
        (5 / 1.51, OUTSIDE, []),
        (5 / 1.49, OUTSIDE, ["the same rows: none below 1.5"]),
        (10.0, lambda c: not window(c, FP16) and c.mode == "forward" and c.steps == 25 and c.hidden < 4096, []),
        (5 / 1.01, WINDOW, []),
        (5 / 0.99, WINDOW, ["inside that window (LSTM"]),
        (5 / 0.99, at(**PUBLISHED | {"batch": 64}), ["inside that window (LSTM"]),
        (1.99, at(**PUBLISHED, mode="forward"), []),
        (2.0, at(**PUBLISHED, mode="forward"), ["LSTM fp16 H=768 B=16 T=1024, forward: under"]),
        (4.99, at(**PUBLISHED, mode="training"), []),
        (5.0, at(**PUBLISHED, mode="training"), ["LSTM fp16 H=768 B=16 T=1024, forward and"]),
        (1.5, at(input=0, cell="lstm", dtype="fp32", hidden=256, batch=64, steps=150), []),
        (1.51, at(input=0, cell="lstm", dtype="fp32", hidden=256, batch=64, steps=150), [FLOOR]),
        (9.0, at(input=0, steps=50), []),
        (1.3, at(suite="inference", batch=1, hidden=512), []),
        (1.31, at(suite="inference", batch=1, hidden=256, cell="gru", dtype="tf32"), ["B = 1 inference, H = 256"]),
        (1.31, at(suite="inference", batch=1, hidden=512), ["B = 1 inference, H = 512"]),
        (1.31, at(suite="inference", batch=1, hidden=1024, cell="lstm", dtype="fp16"), ["B = 1 inference, H = 1024"]),
        (1.31, at(suite="inference", batch=2), []),
        (5.0, at(steps=1, mode="forward", cell="gru"), []),
        (5.1, at(steps=1, mode="forward", cell="gru", dtype="bf16"), ["T = 1"]),
        (1.15, at(bidirectional=True, hidden=512, suite="directions"), []),
        (1.16, at(bidirectional=True, hidden=512, suite="directions", dtype="fp32"), ["two directions"]),
        (1 / 1.16, at(bidirectional=False, hidden=1024, suite="directions", cell="gru"), ["two directions"]),
        (5.0, at(hidden=4096, mode="forward", batch=128), []),
        (5.1, at(hidden=4096, mode="forward", batch=128, dtype="tf32"), ["DeepBench's largest rows"]),
        (1.4, at(layers=4, hidden=512, suite="stacked"), []),
        (1.41, at(layers=4, hidden=512, suite="stacked", cell="gru", dtype="bf16"), ["a stack of 4 layers"]),
        (1.41, at(layers=4, hidden=256, suite="stacked"), []),
    ],
)
def test_each_target_is_missed_alone(ours: float, rows: Callable[[Case], bool], starts: list[str]) -> None:
    assert any(map(rows, CASES)), "the race has such rows"
    found = missed(race(only(ours, rows)))
    assert len(found) == len(starts)
    assert all(any(text.startswith(start) for text in found) for start in starts)


@pytest.mark.parametrize(
    ("inside", "speedup", "starts"),
    [
        (True, 1.16, []),
        (True, 1.14, ["inside that window: geometric mean"]),
        (False, 4.01, []),
        (False, 3.99, ["outside cuDNN's persistent window"]),
    ],
)
def test_means_are_over_all_rows_of_a_kind(inside: bool, speedup: float, starts: list[str]) -> None:
    def near(case: Case, arm: str) -> float:
        wanted = window(case, FP16) if inside else case.mode == "training" and not window(case, FP16)
        return speedup / 5 if arm == "torch" and wanted else 1.0

    found = missed(race(near))
    assert [text.startswith(start) for text, start in zip(found, starts, strict=True)] == [True] * len(starts)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"}, {"cell": "gru"}, {"layers": 2}, {"bidirectional": True}, {"hidden": 1152}, {"hidden": 960},
        {"input": 0}, {"input": 100}, {"batch": 12}, {"batch": 136}, {"batch": 1},
    ],
)  # fmt: skip
def test_window_ends_everywhere(change: dict[str, Any]) -> None:
    inside = Case("s", "n", "lstm", 256, 1024, 1, False, 128, 10, "fp16", "training")
    assert window(inside, FP16)
    assert window(replace(inside, mode="forward", hidden=128, batch=8, input=128), FP16)
    assert not window(replace(inside, **change), FP16)


def test_floor_is_compared_with_the_input_product_only_for_want_of_better() -> None:
    slow = only(2.0, lambda case: bool(case.input) and case.steps >= 64)
    assert FLOOR not in missed(race(slow))

    def without(case: Case, arm: str) -> float | None:
        return slow(case, arm) if case.input else None

    assert FLOOR in missed(race(without))
    assert one_of(targets(race(without)), FLOOR).measured.startswith("2.000 (2.000 to 2.000 in ")


def test_floor_of_0_is_unknown() -> None:
    found = race()
    found.timings = [replace(one, floor=0.0) for one in found.timings]
    assert met(found)[FLOOR] == NOTHING


def test_missing_rows_leave_a_target_open() -> None:
    assert met(race(lambda case, arm: None if OUTSIDE(case) and arm == "torch" else 1.0)) == {
        text: "so far" if text.startswith(("outside", "the same rows")) else "yes" for text in met(race())
    }


def test_missing_rows_do_not_save_a_missed_target() -> None:
    wrong = only(5 / 0.9, WINDOW)
    found = race(lambda case, arm: None if window(case, FP16) and case.batch == 128 else wrong(case, arm))
    assert any(text.startswith("inside that window (LSTM") for text in missed(found))


def test_measured_cells_tell_spread_rows_and_origin() -> None:
    found = targets(race(only(5 / 2, OUTSIDE)), "r.json")
    n = sum(1 for case in CASES if case.input and case.mode == "training" and not window(case, FP16))
    low = one_of(found, "the same rows").measured
    key = next(filter(OUTSIDE, CASES)).key
    assert low == f"2.000 (2.000 to 5.000 in {n} of {n} rows; {key}; r.json)"
    mean = one_of(found, "outside").measured
    assert mean.endswith(f" (2.000 to 5.000 in {n} of {n} rows; r.json)")
    assert 4.9 < float(mean.split()[0]) < 5.0
    single = one_of(found, "LSTM fp16 H=768 B=16 T=1024, forward: ").measured
    assert single == "1.000 us (quartiles 0.9000 and 1.100 of 11 rounds; r.json)"
    stack = one_of(found, "a stack of 4").measured
    assert stack.startswith("1.000 (1.000 to 1.000 in 8 of 8 rows; training ")
    assert stack.endswith(" H=512 L=4 D=1 B=16 T=256; r.json)")


@pytest.mark.parametrize(("seconds", "answer"), [(9.99, "yes"), (10.0, "no")])
def test_first_call(seconds: float, answer: str) -> None:
    found = race()
    found.micro = [Micro("clock", 1, 0, 1.5, 1.5, 1.5, "GHz", 9), replace(found.micro[0], value=seconds)]
    one = one_of(targets(found, "r.json"), "first call")
    assert (one.measured, one.met) == (f"{seconds:#.4g} s (1 process; r.json)", answer)


@pytest.mark.parametrize(("text", "name"), TESTED.items())
def test_tested_target_needs_every_outcome(text: str, name: str) -> None:
    assert any(f"def {name}(" in (ROOT / path).read_text() for path in gpu.TESTS), "`make gpu` runs it"
    found = race()
    found.stress.append(Stress("random shapes", False, 1.0, ""))
    assert missed(found) == set()
    found.stress.append(Stress(f"tests/x.py::{name}", False, 1.0, ""))
    one = one_of(targets(found, "r.json"), text)
    assert (one.measured, one.met) == ("1 of 2 tests green (r.json)", "no")
    assert missed(found) == {text}


@pytest.mark.parametrize(
    "change",
    [{"rehearsal": True}, {"device": "NVIDIA H100"}, {"device": "NVIDIA H200 MIG 1g.18gb"}, {"device": "CPU (x)"}],
)
def test_targets_are_for_one_device(change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="allowed: a run on a whole H200"):
        targets(race(**change))
    empty(**{"device": "NVIDIA H200", **change}).save(tmp_path / "r.json")
    with pytest.raises(SystemExit) as leaving:
        main([str(tmp_path / "r.json")])
    assert leaving.value.code == 2
    assert repr(change.get("device", "NVIDIA H200")) in capsys.readouterr().err


# The table.


def test_newest_is_the_latest_of_the_device(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, "")
    for name, changes in {
        "c": {"date": "2026-01-31T12:00:00+00:00"},
        "a": {"date": "2026-02-01T12:00:00+00:00"},
        "b": {"date": "2026-02-01T12:30:00+01:00"},
        "d": {"date": "2026-03-01", "rehearsal": True},
        "e": {"date": "2026-03-01", "device": "NVIDIA H100"},
    }.items():
        empty(**{"device": "NVIDIA H200", **changes}).save(tmp_path / f"{name}.json")
    found, name = newest(tmp_path)
    assert name == "a.json"
    assert found is not None
    assert found.provenance.date == "2026-02-01T12:00:00+00:00"


def test_newest_needs_dates(tmp_path: Path) -> None:
    empty(device="NVIDIA H200", date="yesterday").save(tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"r\.json: provenance.date is 'yesterday', allowed: a date like"):
        newest(tmp_path)


def test_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = empty(device="NVIDIA H200")
    found.add(Micro("first call", 1, 0, 7.25, 7.0, 7.5, "s", 1))
    found.save(tmp_path / "r.json")
    assert main([str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| target | measured | met? |", "|---|---|---|"]
    assert "| first call in a process, compiling included: under 10 s | 7.250 s (1 process; r.json) | yes |" in lines
    assert sum(line.endswith(f"| {NOTHING} | {NOTHING} |") for line in lines) == len(lines) - 3
    assert main([]) == 0
    assert capsys.readouterr().out.rstrip("\n") == markdown(targets(*newest()))


def test_readme_has_the_present_table() -> None:
    """`python -m bench.report.targets` prints it."""
    assert markdown(targets(*newest())) in README.read_text()
