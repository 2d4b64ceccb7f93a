"""``persistrnn report``: what runs of the benchmarks found, as a page with plots, and the README's table. No torch."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import jinja2

from . import plots, tables
from . import results as results_file
from .results import Results
from .rows import OURS, Row, label, printable, rows
from .tables import NOTHING, Part, known, number, times

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
README_ROWS = 10
EMPTY_ROWS = 3  # of a table without a number


# The README's table.


def markdown(results: Results) -> str:
    """At most README_ROWS rows (EMPTY_ROWS before anything is measured), chosen by the rule that stands below them;
    without a line break at the end."""
    of = results.provenance
    suites: dict[str, list[Row]] = {}
    for row in rows(results):
        suites.setdefault(row.case.suite, []).append(row)
    measured = not of.rehearsal and any(not timing.skipped for timing in results.timings)
    most = README_ROWS if measured else EMPTY_ROWS
    each = max(1, min(3, most // max(1, len(suites))))
    lines = [f"| case | {OURS} us/step | torch us/step | speed-up | floor us/step |", "|---|---|---|---|---|"]
    for members in list(suites.values())[:most]:
        for row in _chosen(members, each, of.rehearsal):
            ours, theirs = (None if of.rehearsal else row.measured(arm) for arm in (OURS, "torch"))
            cells = [f"{label(row.case)}, {row.case.dtype}, {row.case.mode}"]
            cells += [number(timing.per_step if timing else None) for timing in (ours, theirs)]
            cells += [times(row.speedup("torch") if ours else None), known(row.floor)]
            lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    which = {1: "the median", 2: "the lowest and the highest", 3: "the lowest, the median and the highest"}[each]
    where = f"measured on {of.device}, {of.date[:10]}, commit {of.commit[:10]}"
    origin = printable(where, 100) if measured else NOTHING
    suite = "each suite" if len(suites) <= most else f"the first {most} suites"
    told = f"Of {suite}, {which} by speed-up over torch (by hidden size where none is known); {origin}. "
    told += "The floor is predicted."
    return "\n".join([*lines, "", textwrap.fill(_plain(told), 120, break_on_hyphens=False)])


def _chosen(members: Sequence[Row], count: int, rehearsal: bool) -> list[Row]:
    """The median, or the ends, or all three, by speed-up; by hidden size if no speed-up is known."""
    known = [] if rehearsal else [row for row in members if row.speedup("torch") is not None]
    order = sorted(known, key=lambda row: row.speedup("torch") or 0) or sorted(members, key=lambda row: row.case.hidden)
    places = {1: [len(order) // 2], 2: [0, -1], 3: [0, len(order) // 2, -1]}[count]
    return list(dict.fromkeys(order[place] for place in places))


def _plain(text: str) -> str:
    """Words that Markdown leaves alone in a table."""
    return escape(" ".join(text.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")


# The page.


def _date(run: Results) -> datetime:
    given = run.provenance.date
    try:
        found = datetime.fromisoformat(given.replace("Z", "+00:00"))
    except ValueError as error:
        raise ValueError(
            f"provenance.date is {given!r}, allowed where several runs are compared: a date like "
            "2026-01-31T12:00:00+00:00"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def page(runs: Sequence[Results], drawn: Sequence[plots.Section]) -> str:
    """The whole page, of runs in order of time."""
    main = runs[-1]
    found = rows(main)
    banners = [plots.REHEARSAL] if main.provenance.rehearsal else []
    for what, oks in (("checks", [one.ok for one in main.checks]), ("stress tests", [one.ok for one in main.stress])):
        if not all(oks):
            banners.append(f"RED: {oks.count(False)} of {len(oks)} {what}.")
    parts = [tables.summary(found), tables.provenance(runs), Part("Plots", plots=list(drawn))]
    parts += [tables.timings(found), tables.skipped(found), tables.checks(main), tables.micro(main)]
    parts += [tables.stress(main), tables.tuning(main), tables.history(runs)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(main=main.provenance, mark=plots.MARK, banners=banners, parts=parts)


def _ours(path: Path) -> bool:
    """Whether a report wrote that file: it has our mark near its start."""
    with open(path, "rb") as file:
        return plots.MARK.encode() in file.read(2048)


def write(results: list[Results], folder: Path) -> list[Path]:
    """Write the page and its plots into a folder, which is made; files of an earlier report are replaced.

    The latest run is the page's, the others are its history. Returns what was written, the page first.

    Raises:
        MissingMatplotlib: it is not installed.
        ValueError: no results, or several of which one has no date.
        OSError: the folder cannot be written, or has a file of such a name that no report wrote. Nothing is written.
    """
    if not results:
        raise ValueError("no results given, allowed: one or more")
    runs = sorted(results, key=_date) if len(results) > 1 else results
    drawn = plots.draw(runs[-1])
    contents = {PAGE: page(runs, drawn).encode("utf-8", "replace")}
    contents |= {f"{plot.name}.png": plot.png for section in drawn for plot in section.plots}
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents:
        path = folder / name
        if os.path.lexists(path) and not (path.is_file() and _ours(path)):
            raise FileExistsError(f"{path} is there, and no report wrote it: move it, or name another folder")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


# The command.


def _folder(given: str) -> Path:
    # os.path, because Path.exists raises where a name is too long.
    if os.path.lexists(given) and not os.path.isdir(given):
        raise argparse.ArgumentTypeError(f"{given!r} given, and that is a file; allowed: a folder, which is made")
    return Path(given)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="persistrnn report",
        description=f"Write {PAGE} and its plots (needs matplotlib) from results files. Of several, the latest is the "
        "report's, the others are its history.",
        allow_abbrev=False,
    )
    result.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what the benchmarks wrote")
    result.add_argument("--output", type=_folder, required=True, metavar="DIR", help="the folder to write into")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    found = []
    for path in given.results:
        try:
            found.append(results_file.load(path))
        except OSError as error:
            options.error(
                f"argument RESULTS.json: {str(path)!r} given, and it cannot be read ({error.strerror}); allowed: a "
                "file that the benchmarks wrote"
            )
        except ValueError as error:
            options.error(f"argument RESULTS.json: {error}")
    try:
        written = write(found, given.output)
    except plots.MissingMatplotlib as error:
        options.error(str(error))
    except ValueError as error:
        options.error(f"argument RESULTS.json: {error}")
    except OSError as error:
        options.error(f"argument --output: {str(given.output)!r} given, and {error}; allowed: a folder to write into")
    print("\n".join(f"wrote {path}" for path in written))
    left = [path for path in sorted(given.output.glob("*.png")) if path not in written and _ours(path)]
    if left:
        print(f"left of an earlier report: {', '.join(map(str, left))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
