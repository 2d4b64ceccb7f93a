"""``python -m bench.report``: what runs of the benchmarks found, as a page with plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import plots, tables
from bench.report.results import Results, named
from bench.report.rows import rows
from persistrnn.profiling import drawing
from persistrnn.profiling.page import Banner, Part, folder, render, write

PAGE = "report.html"


def page(runs: Sequence[Results], drawn: Sequence[Part]) -> str:
    """The whole page, of runs in order of time: of the last, with the others as its history."""
    results = runs[-1]
    found, of = rows(results), results.provenance
    banners = [Banner(plots.REHEARSAL)] if of.rehearsal else []
    for what, entries in (("checks", results.checks), ("stress tests", results.stress)):
        red = sum(not one.ok for one in entries)
        banners += [Banner(f"RED: {red} of {len(entries)} {what}.")] * bool(red)
    parts = [tables.summary(found), tables.provenance(runs), *drawn, tables.timings(found), tables.skipped(found)]
    parts += [make(results) for make in (tables.checks, tables.micro, tables.stress, tables.tuning)]
    parts.append(tables.history(runs))
    heading = f"persistrnn on {of.device}"
    below = f"{of.date}, commit {of.commit}{' with uncommitted changes' if of.dirty else ''}"
    return render(heading, heading, below, banners, parts)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=f"Write {PAGE}, with plots (needs matplotlib), from results files. Of several, the latest is the "
        "report's, the others are its history.",
        allow_abbrev=False,
    )
    options.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what the benchmarks wrote")
    options.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write into")
    given = options.parse_args(arguments)
    runs = [named(path, options) for path in given.results]
    try:
        runs = sorted(runs, key=lambda run: run.provenance.when) if len(runs) > 1 else runs
    except ValueError as error:
        options.error(f"argument RESULTS.json: {error}")
    try:
        with drawing.style():
            text = page(runs, plots.draw(runs[-1]))
        path = folder(given.output, PAGE) / PAGE
        write(path, text)
    except ImportError as error:
        options.error(str(error))
    except OSError as error:
        options.error(f"argument --output: {str(given.output)!r} given, and {error}; allowed: a folder to write into")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
