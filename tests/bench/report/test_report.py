"""The report: numbers that were worked out by hand, losses in sight, and text that stays text."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic import CASE, add, case, everything, many, pair, predicted, raced, results, skipped, timing

from bench.report import __main__ as report
from bench.report import tables
from bench.report.results import ARMS, Check, Results, Stress, Tuning
from bench.report.rows import rows, summaries


class Page(HTMLParser):
    """Headings, banners, tables and plots of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.banners: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._section = self._caption = ""
        self._into: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in ("h2", "caption", "td", "th") or (given.get("class") or "").startswith("banner"):
            self._into = []

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into.append(data)
        self.sections[self._section] = self.sections.get(self._section, "") + data

    def handle_endtag(self, tag: str) -> None:
        if self._into is None or tag not in ("h2", "caption", "td", "th", "p"):
            return
        text, self._into = "".join(self._into), None
        if tag == "h2":
            self._section = text
        elif tag == "caption":
            self._caption = text
            self.tables[text] = []
        elif tag == "p":
            self.banners.append(text)
        else:
            self.tables[self._caption][-1].append(text)

    def rows(self, caption: str) -> list[list[str]]:
        """Without the header."""
        return self.tables[caption][1:] if caption in self.tables else []


def read(*runs: Results) -> Page:
    """The page without its plots, which take long."""
    return Page(report.page(runs, []))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report."""
    folder = tmp_path_factory.mktemp("report")
    report.write([raced()], folder)
    return folder


# Summary


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


def test_every_loss_to_every_arm_is_listed_the_worst_first() -> None:
    page = read(many())
    found = [(float(row[5].rstrip("x")), row[4]) for row in page.rows("Losses")]
    # 10 * (n + 1) / i < 100: 9, 19, 29, 39 and 49 values of n
    assert {arm: sum(a == arm for _, a in found) for arm in ARMS[1:]} == dict(
        zip(ARMS[1:], (9, 19, 29, 39, 49), strict=True)
    )
    assert [value for value, _ in found] == sorted(value for value, _ in found)
    assert "loses 145 of 650 comparisons" in page.sections["Summary"]


def test_speed_up_just_below_one_does_not_look_like_one() -> None:
    page = read(add(results(), *pair(256, 1000.0, 999.9)))
    assert [row[5] for row in page.rows("Losses")] == ["0.999x"]


def test_skipped_arms_have_no_speed_up() -> None:
    found = add(results(), timing(CASE), skipped(CASE, "torch", "why not"))
    assert rows(found)[0].speedup("torch") is None
    assert all(one.mean is None and one.losses == 0 for one in summaries(rows(found)))
    assert "No speed-up is known" in read(found).sections["Summary"]


# Tables


def test_timings_have_their_numbers_and_predictions_are_in_columns_of_their_own() -> None:
    page = read(add(results(), timing(CASE), timing(CASE, "torch", 1250.0)))
    (bands, header), (ours, torch) = page.tables["suite, bf16, forward"][:2], page.tables["suite, bf16, forward"][2:]
    assert [band for band in bands if band] == ["measured", "ratios", "predicted", "persistrnn's"]
    case_, arm, *measured, speedup, over, predicted, floor, plan, path = ours
    assert (case_, arm) == ("a name: lstm H=256 B=16 T=100", "persistrnn")
    assert measured == ["bf16", "500.0", "450.0 to 550.0", "11", "5.000", "12.50", "3.000"]
    assert (speedup, over, predicted, floor, plan, path) == ("", "2.50x", "4.000", "2.000", "7 slices", "persistent")
    assert (
        torch[1:] == ["torch", "bf16", "1,250", "1,125 to 1,375", "11", "12.50", "12.50", "3.000", "2.50x"] + [""] * 5
    )
    assert len(header) == len(ours)


def test_bands_are_over_their_columns() -> None:
    part = tables.timings(rows(raced()))
    widths = dict(part.tables[0].bands)
    assert widths == {"": 2, "measured": 7, "ratios": 2, "predicted": 2, "persistrnn's": 2}
    for part in (tables.timings(rows(raced())), tables.tuning(everything()), tables.history([raced(), raced()])):
        for table in part.tables:
            for column in table.columns:
                kinds = [kind in f"{column.band} {column.name}" for kind in ("measured", "predicted")]
                assert sum(kinds) <= 1 or column.band == "ratios"


def test_prediction_is_shown_where_nothing_is_measured() -> None:
    page = read(predicted())
    assert "Nothing is timed" in page.sections["Timings"]
    lines = page.tables["suite, bf16, forward"][2:]
    assert len(lines) == 3
    assert all(line[3] == "not yet measured" and line[11:13] == ["4.000", "2.000"] for line in lines)


def test_skipped_arms_are_shown_with_their_reasons() -> None:
    found = results()
    for hidden in (64, 128, 256):
        found.add(skipped(case(hidden=hidden), "xma", "xma is not installed"))
    found.add(skipped(case(hidden=64), "flashrnn", "no GRU"))
    page = read(found)
    assert page.rows("Arms that were skipped, and why") == [
        ["flashrnn", "no GRU", "1"],
        ["xma", "xma is not installed", "3"],
    ]
    assert len(page.rows("Every skipped arm")) == 4


def test_red_checks_come_first_and_are_on_top_of_the_page() -> None:
    found = everything()
    found.add(Stress("breaks", False, 2.0, "it broke"))
    page = read(found)
    captions = list(page.tables)
    assert captions.index("Red checks") < captions.index("Green checks")
    assert [row[3:] for row in page.rows("Red checks")] == [["flashrnn", "RED", "37.50", "c_n is wrong"]]
    assert [row[3] for row in page.rows("Green checks")] == ["persistrnn", "torch"]
    assert [row[:2] for row in page.rows("Stress tests")] == [["breaks", "RED"], ["wakes up", "held"]]
    assert page.banners == ["RED: 1 of 3 checks.", "RED: 1 of 2 stress tests."]


def test_microbenchmarks_and_tuning_have_their_numbers() -> None:
    found = everything()
    found.add(Tuning(CASE, False, "14 slices", False, 2.0, 2.8))
    page = read(found)
    assert page.rows("Microbenchmarks, measured") == [
        ["round trip", "7", "4,096", "0.7500", "0.5000 to 1.250", "us", "99"]
    ]
    first, second = page.tables["Choices for one pass of one layer, the fastest first"][2:]
    assert first[2:] == ["forward", "14 slices", "", "2.800", "1.00x", "2.000"]
    assert second[2:] == ["forward", "7 slices", "planned", "3.500", "1.25x", "2.500"]
    assert "fastest of those that were run in 0 of 1 passes" in page.sections["Tuning"]


def test_rehearsal_has_a_banner_and_a_gpu_run_has_none() -> None:
    assert ["no GPU: nothing here was measured on one" in b for b in read(results(rehearsal=True)).banners] == [True]
    assert read(raced()).banners == []


def test_empty_sections_say_so() -> None:
    page = read(results())
    assert page.tables.keys() == {"Where the numbers come from"}
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


# History


def test_history_compares_runs_of_the_same_device_in_order_of_time() -> None:
    first = add(results(date="2025-01-01T00:00:00Z", commit="aaa"), timing(CASE, microseconds=400.0))
    second = add(results(date="2025-01-02T00:00:00+00:00", commit="bbb"), timing(CASE, microseconds=300.0))
    third = add(results(date="2025-01-03", commit="ccc"), timing(CASE, microseconds=600.0))
    other = add(results(date="2025-01-01T12:00:00", device="Other GPU"), timing(CASE))
    add(third, timing(case(hidden=512)), skipped(case(hidden=1024), "persistrnn", "no"))
    page = read(*sorted([third, other, first, second], key=lambda run: run.provenance.when))
    _, header, *lines = page.tables["Time per step over the runs"]
    assert header[3:6] == ["2025-01-01T00:00 aaa", "2025-01-02T00:00 bbb", "2025-01-03 ccc"]
    assert lines[0][3:] == ["4.000", "3.000", "6.000", "2.00x", "slower"]
    assert lines[1][3:] == ["not yet measured", "not yet measured", "5.000", "", ""]
    assert lines[2][3:6] == ["not yet measured"] * 3
    assert "1 of 4 runs are of other devices" in page.sections["History"]


def test_overlapping_quartiles_are_not_called_slower() -> None:
    runs = [add(results(), timing(CASE, microseconds=us)) for us in (100.0, 115.0)]
    assert read(*runs).tables["Time per step over the runs"][2][-2:] == ["1.15x", ""]


def test_latest_run_is_the_page(tmp_path: Path) -> None:
    old = results(date="2026-01-01T23:59:59+00:00", commit="old")
    new = results(date="2026-01-02T01:00:00+02:00", commit="new")  # an hour before the old one
    report.write([new, old], tmp_path)
    assert "2026-01-01T23:59:59+00:00, commit old</p>" in (tmp_path / "report.html").read_text()


def test_runs_without_a_date_cannot_be_compared(tmp_path: Path) -> None:
    report.write([results(date="some day")], tmp_path / "one")
    with pytest.raises(ValueError, match=r"provenance\.date is 'some day', allowed: a date like 2026-"):
        report.write([results(date="some day"), results()], tmp_path / "two")
    assert not (tmp_path / "two").exists()


# The page


def test_page_is_whole_accessible_and_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "image"}
    for name in ("href", "src", "xlink:href"):
        assert all((given[name] or "").startswith(("#", "data:,")) for _, given in page.tags if name in given)
    assert set(re.findall(r"https?://[^\"<\s]+", text)) == {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(given.get("name") == "viewport" for _, given in page.tags)
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    for _, given in page.tags:
        for name in ("href", "xlink:href"):
            assert (given.get(name) or "#")[1:] in {"", "ata:,", *ids}
    scopes = {given.get("scope") for tag, given in page.tags if tag == "th"}
    assert scopes == {"col", "row", "colgroup"}
    drawings = [given for tag, given in page.tags if tag == "svg"]
    assert drawings
    assert all(given["role"] == "img" and given["aria-label"] for given in drawings)


def test_plots_are_files_and_drawings_in_the_page(written: Path) -> None:
    from PIL import Image

    text = (written / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    files = sorted(written.glob("*.png"))
    assert [path.stem for path in files] == [
        "floor", "memory", "speedup-other-bf16-training-1", "speedup-suite-bf16-forward-1",
        "step-bf16-forward-1", "step-bf16-training-1",
    ]  # fmt: skip
    assert len(drawings) == len(files)
    for path in files:
        assert f"The same as {path.name}." in text
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 200
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 30
        assert "var(--ink" in drawing
    assert (
        'aria-label="Speed-up of persistrnn: suite, bf16, forward; 3 cases, from 0.5 to 4 times, 1 with a loss"' in text
    )


HOSTILE = "</svg><script>alert('$x^$')</script>\" id=\"x --> {{ 7*7 }} | \u0000 \ud800 \u4e2d $\\frac$"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    suites = [HOSTILE, HOSTILE.upper(), "../../up", "/etc/passwd", ""]
    found = results(device=HOSTILE, commit=HOSTILE, command=HOSTILE)
    for suite, hidden in itertools.product(suites, (64, 128, 256)):
        add(found, *pair(hidden, 100, 300, suite=suite, name=HOSTILE, cell=HOSTILE, batch=suites.index(suite) + 1))
    found.add(skipped(case(hidden=2), "xma", HOSTILE))
    found.add(Check(CASE, "xma", False, 3.0, HOSTILE))
    written = report.write([found], tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(written), "no name leads out of the folder, and none comes twice"
    assert len(written) == 1 + len(suites) + 3
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "{{ 7*7 }}" in text
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    for drawing in re.findall(r"<svg .*?</svg>", text, flags=re.S):
        ElementTree.fromstring(drawing)
    lines = tables.markdown(found).splitlines()
    assert "<script>" not in "\n".join(lines)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {6}


def test_report_is_the_same_every_time_and_whatever_the_style(written: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "svg.fonttype": "path"}):
        again = report.write([raced()], tmp_path)
        assert matplotlib.rcParams["svg.hashsalt"] == "other", "the caller's style is left alone"
    assert len(again) == 7
    for path in again:
        assert path.read_bytes() == (written / path.name).read_bytes()


# README's table


def test_table_has_the_lowest_the_median_and_the_highest_of_each_suite() -> None:
    found = raced()
    add(found, *pair(2048, 100, 300), *pair(128, 50, 1000, suite="third"))
    lines = tables.markdown(found).splitlines()
    assert lines[0] == "| case | persistrnn us/step | torch us/step | speed-up | floor us/step |"
    assert lines[2:7] == [
        "| a name: lstm H=512 B=16 T=100, bf16, forward | 2.000 | 1.000 | 0.500x | 2.000 |",
        "| a name: lstm H=256 B=16 T=100, bf16, forward | 1.000 | 4.000 | 4.00x | 2.000 |",
        "| a name: lstm H=1024 B=16 T=100, bf16, forward | 3.000 | 12.00 | 4.00x | 2.000 |",
        "| a name: lstm H=256 B=16 T=100, bf16, training | 1.000 | 8.000 | 8.00x | 2.000 |",
        "| a name: lstm H=128 B=16 T=100, bf16, forward | 0.5000 | 10.00 | 20.00x | 2.000 |",
    ]
    told = " ".join(lines[8:])
    assert "Of each suite, the lowest, the median and the highest by speed-up over torch" in told
    assert "measured on Test GPU, 2026-01-02, commit 0123456789." in told
    assert "predicted" in told


@pytest.mark.parametrize("found", [predicted(), add(results(rehearsal=True), *pair(64, 100, 400))])
def test_table_without_measurements_says_so_in_every_cell(found: Results) -> None:
    text = tables.markdown(found)
    for line in text.splitlines()[2:-3]:
        assert line.count("not yet measured") == 3
        assert line.endswith("| 2.000 |")
    assert "not yet measured. The floor is predicted." in " ".join(text.split())
    assert "Test GPU" not in text


@pytest.mark.parametrize(("suites", "expected"), [(0, 0), (1, 3), (4, 8), (40, 10)])
def test_table_has_at_most_ten_rows(suites: int, expected: int) -> None:
    found = results()
    for suite, hidden in itertools.product(range(suites), (64, 128, 256, 512)):
        add(found, *pair(hidden, 100, hidden, suite=str(suite), batch=suite + 1))
    lines = tables.markdown(found).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + expected
    assert max(map(len, lines)) <= 120
