"""The report: numbers that were worked out by hand, losses in sight, text that stays text, and its command."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import Page
from synthetic import CASE, add, case, everything, many, pair, predicted, raced, results, skipped, timing

from bench.report import __main__ as report
from bench.report import tables
from bench.report.results import ARMS, Check, Results, Stress, Tuning
from bench.report.rows import rows


def read(*runs: Results) -> Page:
    """The page without its plots, which take long."""
    return Page(report.page(runs, []))


def write(found: Results, folder: Path) -> str:
    """A whole report, by its command."""
    found.save(folder / "results.json")
    assert report.main([str(folder / "results.json"), "--output", str(folder / "out")]) == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["report.html"]
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_geometric_mean_worst_and_losses_are_those_of_the_numbers() -> None:
    page = read(raced())
    suite, best, other, other_best = page.rows("Speed-up of persistrnn, by suite, dtype and mode")
    # (4 * 1/2 * 4) ** (1/3) = 2
    assert suite == [
        "suite", "bf16", "forward", "torch", "3 of 3", "2.00x", "0.500x: a name: lstm H=512 B=16 T=100", "1 of 3",
    ]  # fmt: skip
    assert best[3:] == ["torch-best", "0 of 3", "not yet measured", "not yet measured", "0 of 0"]
    assert other[:6] == ["other", "bf16", "training", "torch", "1 of 1", "8.00x"]
    assert other_best[4] == "0 of 1"
    assert page.rows("Losses") == [["a name: lstm H=512 B=16 T=100", "suite", "bf16", "forward", "torch", "0.500x"]]
    assert "persistrnn loses 1 of 4 comparisons, all listed below" in page.sections["Summary"]
    almost = read(add(results(), *pair(256, 1000.0, 999.9)))
    assert [row[5] for row in almost.rows("Losses")] == ["0.999x"], "what is below 1 never looks like 1"


def test_every_loss_to_every_arm_is_listed_the_worst_first() -> None:
    page = read(many())
    found = [(float(row[5].rstrip("x")), row[4]) for row in page.rows("Losses")]
    # 10 * (n + 1) / i < 100: 9, 19, 29, 39 and 49 values of n
    assert [sum(a == arm for _, a in found) for arm in ARMS[1:]] == [9, 19, 29, 39, 49]
    assert [value for value, _ in found] == sorted(value for value, _ in found)
    assert "loses 145 of 650 comparisons" in page.sections["Summary"]


def test_skipped_arms_have_no_speed_up_and_their_reasons() -> None:
    found = add(results(), timing(CASE), skipped(CASE, "torch", "why not"))
    assert rows(found)[0].speedup("torch") is None
    assert "No speed-up is known" in read(found).sections["Summary"]
    for hidden in (64, 128):
        found.add(skipped(case(hidden=hidden), "xma", "xma is not installed"))
    lines = read(found).rows("Arms that were skipped, and why")
    assert [line[:3] for line in lines] == [["torch", "why not", "1"], ["xma", "xma is not installed", "2"]]
    assert "H=64 B=16 T=100, suite, bf16, forward" in lines[1][3]


def test_timings_have_their_numbers_and_predictions_are_in_columns_of_their_own() -> None:
    page = read(add(results(), timing(CASE), timing(CASE, "torch", 1250.0)))
    (bands, header), (ours, torch) = page.tables["suite, bf16, forward"][:2], page.tables["suite, bf16, forward"][2:]
    assert [band for band in bands if band] == ["measured", "ratios", "predicted", "persistrnn's"]
    case_, arm, *measured, speedup, over, forecast, floor, plan, path = ours
    assert (case_, arm) == ("a name: lstm H=256 B=16 T=100", "persistrnn")
    assert measured == ["bf16", "500.0", "450.0 to 550.0", "11", "5.000", "12.50", "3.000"]
    assert (speedup, over, forecast, floor, plan, path) == ("", "2.50x", "4.000", "2.000", "7 slices", "persistent")
    expected = ["torch", "bf16", "1,250", "1,125 to 1,375", "11", "12.50", "12.50", "3.000", "2.50x"]
    assert torch[1:] == expected + [""] * 5
    assert len(header) == len(ours)
    assert dict(tables.timings(rows(raced())).tables[0].bands) == {
        "": 2, "measured": 7, "ratios": 2, "predicted": 2, "persistrnn's": 2,
    }  # fmt: skip


def test_prediction_is_shown_where_nothing_is_measured() -> None:
    page = read(predicted())
    assert "Nothing is timed" in page.sections["Timings"]
    lines = page.tables["suite, bf16, forward"][2:]
    assert len(lines) == 3
    assert all(line[3] == "not yet measured" and line[11:13] == ["4.000", "2.000"] for line in lines)


def test_red_comes_first_and_is_on_top_of_the_page() -> None:
    found = everything()
    found.add(Stress("breaks", False, 2.0, "it broke"))
    page = read(found)
    captions = list(page.tables)
    assert captions.index("Red checks") < captions.index("Green checks")
    assert [row[3:] for row in page.rows("Red checks")] == [["flashrnn", "RED", "37.50", "c_n is wrong"]]
    assert [row[3] for row in page.rows("Green checks")] == ["persistrnn", "torch"]
    assert [row[:2] for row in page.rows("Stress tests")] == [["breaks", "RED"], ["wakes up", "held"]]
    assert page.banners == ["RED: 1 of 3 checks.", "RED: 1 of 2 stress tests."]
    assert read(raced()).banners == []
    assert ["nothing here was measured on one" in b for b in read(results(rehearsal=True)).banners] == [True]


def test_microbenchmarks_and_tuning_have_their_numbers() -> None:
    found = everything()
    found.add(Tuning(CASE, False, "14 slices", False, 2.0, 2.8))
    page = read(found)
    micro = [["round trip", "7", "4,096", "0.7500", "0.5000 to 1.250", "us", "99"]]
    assert page.rows("Microbenchmarks, measured") == micro
    first, second = page.tables["Choices for one pass of one layer, the fastest first"][2:]
    assert first[2:] == ["forward", "14 slices", "", "2.800", "1.00x", "2.000"]
    assert second[2:] == ["forward", "7 slices", "planned", "3.500", "1.25x", "2.500"]
    assert "fastest of those that were run in 0 of 1 passes" in page.sections["Tuning"]


def test_page_is_sound_and_has_its_plots(tmp_path: Path) -> None:
    text = write(raced(), tmp_path)
    page = Page(text)
    first = "Speed-up of persistrnn: suite, bf16, forward; 3 cases, from 0.5 to 4 times, 1 with a loss"
    assert page.drawings[0].get("aria-label") == first
    assert len(page.drawings) == 6, "speed-ups and times of two suites, floors, memory"
    assert list(page.sections) == [
        "", "Summary", "Provenance", "Speed-up per case", "Time per step", "Share of the floor", "Peak memory",
        "Timings", "Skipped", "Checks", "Microbenchmarks", "Stress", "Tuning", "History",
    ]  # fmt: skip
    assert "var(--ink" in text


def test_history_compares_runs_of_the_same_device_in_order_of_time() -> None:
    first = add(results(date="2025-01-01T00:00:00Z", commit="aaa"), timing(CASE, microseconds=400.0))
    second = add(results(date="2025-01-02T00:00:00+00:00", commit="bbb"), timing(CASE, microseconds=300.0))
    third = add(results(date="2025-01-03", commit="ccc"), timing(CASE, microseconds=600.0))
    other = add(results(date="2025-01-01T12:00:00", device="Other GPU"), timing(CASE))
    add(third, timing(case(hidden=512)), skipped(case(hidden=1024), "persistrnn", "no"))
    page = read(first, other, second, third)
    _, header, *lines = page.tables["Time per step over the runs"]
    assert header[3:6] == ["2025-01-01T00:00 aaa", "2025-01-02T00:00 bbb", "2025-01-03 ccc"]
    assert lines[0][3:] == ["4.000", "3.000", "6.000", "2.00x", "slower"]
    assert lines[1][3:] == ["not yet measured", "not yet measured", "5.000", "", ""]
    assert lines[2][3:6] == ["not yet measured"] * 3
    assert "1 of 4 runs are of other devices" in page.sections["History"]
    assert page.rows("Where the numbers come from")[0][1:] == ["Test GPU", "Other GPU", "Test GPU", "Test GPU"]
    near = [add(results(), timing(CASE, microseconds=us)) for us in (100.0, 115.0)]
    assert read(*near).tables["Time per step over the runs"][2][-2:] == ["1.15x", ""], "quartiles overlap"


def test_latest_run_is_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(date="2026-01-01T23:59:59+00:00", commit="old").save(tmp_path / "old.json")
    new = results(date="2026-01-02T01:00:00+02:00", commit="new")  # an hour before the old one
    new.save(tmp_path / "new.json")
    arguments = [str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--output", str(tmp_path / "out")]
    assert report.main(arguments) == 0
    assert "2026-01-01T23:59:59+00:00, commit old</p>" in (tmp_path / "out" / "report.html").read_text()
    results(date="some day").save(tmp_path / "new.json")
    with pytest.raises(SystemExit):
        report.main([*arguments[:3], str(tmp_path / "two")])
    assert "provenance.date is 'some day', allowed: a date like 2026-" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_empty_sections_say_so() -> None:
    page = read(results(clocks_before=0))
    assert page.tables.keys() == {"Where the numbers come from"}
    assert ["clock before", "unknown"] in page.rows("Where the numbers come from")
    for section, sentence in {
        "Summary": "No speed-up is known",
        "Timings": "Nothing is timed",
        "Skipped": "Nothing was to be timed",
        "Checks": "Nothing was checked",
        "Microbenchmarks": "There are no microbenchmarks",
        "Stress": "There are no stress tests",
        "Tuning": "No choice of the planner's was run",
        "History": "There is no other run",
    }.items():
        assert sentence in page.sections[section]


HOSTILE = "</svg><script>alert('$x^$')</script>\" id=\"x --> {{ 7*7 }} | \u0000 \ud800 \u4e2d $\\frac$"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    suites = [HOSTILE, HOSTILE.upper(), "../../up", ""]
    found = results(device=HOSTILE, commit=HOSTILE, command=HOSTILE)
    for suite, hidden in itertools.product(suites, (64, 128, 256)):
        add(found, *pair(hidden, 100, 300, suite=suite, name=HOSTILE, cell=HOSTILE, batch=suites.index(suite) + 1))
    found.add(skipped(case(hidden=2), "xma", HOSTILE))
    found.add(Check(CASE, "xma", False, 3.0, HOSTILE))
    page = Page(write(found, tmp_path))
    assert "{{ 7*7 }}" in page.sections["Summary"]
    lines = tables.markdown(found).splitlines()
    assert "<script>" not in "\n".join(lines)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {6}


def test_report_is_the_same_every_time_and_whatever_the_style(tmp_path: Path) -> None:
    import matplotlib

    first = write(raced(), tmp_path)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "svg.fonttype": "path"}):
        assert write(raced(), tmp_path) == first
        assert matplotlib.rcParams["svg.hashsalt"] == "other", "the caller's style is left alone"


# README's table


def test_table_has_the_ends_and_the_median_of_each_suite_or_the_median_alone() -> None:
    found = raced()
    lines = tables.markdown(found).splitlines()
    assert lines[0] == "| case | persistrnn us/step | torch us/step | speed-up | floor us/step |"
    assert lines[2:6] == [
        "| a name: lstm H=512 B=16 T=100, bf16, forward | 2.000 | 1.000 | 0.500x | 2.000 |",
        "| a name: lstm H=256 B=16 T=100, bf16, forward | 1.000 | 4.000 | 4.00x | 2.000 |",
        "| a name: lstm H=1024 B=16 T=100, bf16, forward | 3.000 | 12.00 | 4.00x | 2.000 |",
        "| a name: lstm H=256 B=16 T=100, bf16, training | 1.000 | 8.000 | 8.00x | 2.000 |",
    ]
    note = " ".join(lines[7:])
    assert "Of each suite, the lowest, the median and the highest by speed-up over torch" in note
    assert "measured on Test GPU, 2026-01-02, commit 0123456789." in note
    for suite in range(20):
        add(found, *pair(128, 50, 1000, suite=str(suite), batch=suite + 1, steps=7))
    lines = tables.markdown(found).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + 10
    assert lines[2] == "| a name: lstm H=256 B=16 T=100, bf16, forward | 1.000 | 4.000 | 4.00x | 2.000 |"
    assert "the first 10 suites, the median by" in " ".join(lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("found", [predicted(), add(results(rehearsal=True), *pair(64, 100, 400))])
def test_table_without_measurements_says_so_in_every_cell(found: Results) -> None:
    text = tables.markdown(found)
    for line in text.splitlines()[2:-3]:
        assert line.count("not yet measured") == 3
        assert line.endswith("| 2.000 |")
    assert "not yet measured. The floor is predicted." in " ".join(text.split())
    assert "Test GPU" not in text


# The command


def test_command_says_what_it_wrote_and_replaces_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.report", "results.json", "--output", "a/b"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    for found, words in ((results(), "Nothing was checked in this run"), (predicted(), "H=1024")):
        found.save(tmp_path / "results.json")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "wrote a/b/report.html\n", "")
        assert words in (tmp_path / "a/b/report.html").read_text()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_file_of_somebody_else_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    results().save(tmp_path / "results.json")
    path = tmp_path / "report.html"
    make = {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "nowhere")}
    make[kind]()
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "results.json"), "--output", str(tmp_path)])
    assert f"{path} is there, and no report wrote it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "no.json --output out",
            "RESULTS.json: 'no.json' given, and [Errno 2] No such file or directory: 'no.json'; allowed",
        ),
        (". --output out", "RESULTS.json: '.' given, and [Errno 21] Is a directory"),
        ("empty.json --output out", "empty.json is '[]', allowed: an object with"),
        ("results.json --output results.json", "--output: 'results.json' given, and [Errno 17] File exists"),
        ("results.json --output results.json/below", "Not a directory"),
        ("results.json", "required: --output"),
    ],
)
def test_wrong_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    results().save(tmp_path / "results.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(SystemExit):
        report.main(arguments.split())
    assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.json", "results.json"]
