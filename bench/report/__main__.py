"""``python -m bench.report``: what runs of the benchmarks found, as a page with plots."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import plots, tables
from bench.report.results import Results, named
from bench.report.rows import rows
from persistrnn.profiling.drawing import MissingMatplotlib
from persistrnn.profiling.page import Banner, Part, ours, refuse_others, render

PAGE = "report.html"


def page(runs: Sequence[Results], drawn: Sequence[Part]) -> str:
    """The whole page, of runs in order of time."""
    main = runs[-1]
    found, of = rows(main), main.provenance
    banners = [Banner(plots.REHEARSAL)] if of.rehearsal else []
    for what, oks in (("checks", [one.ok for one in main.checks]), ("stress tests", [one.ok for one in main.stress])):
        if not all(oks):
            banners.append(Banner(f"RED: {oks.count(False)} of {len(oks)} {what}."))
    parts = [tables.summary(found), tables.provenance(runs), Part("Plots", parts=list(drawn))]
    parts += [tables.timings(found), tables.skipped(found), tables.checks(main), tables.micro(main)]
    parts += [tables.stress(main), tables.tuning(main), tables.history(runs)]
    heading = f"persistrnn on {of.device}"
    below = f"{of.date}, commit {of.commit}{' with uncommitted changes' if of.dirty else ''}"
    return render(heading, heading, below, banners, parts)


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
    runs = sorted(results, key=lambda run: run.provenance.when) if len(results) > 1 else results
    drawn = plots.draw(runs[-1])
    contents = {PAGE: page(runs, drawn).encode("utf-8", "replace")}
    contents |= {f"{plot.name}.png": plot.png for part in drawn for plot in part.plots}
    folder.mkdir(parents=True, exist_ok=True)
    refuse_others(folder / name for name in contents)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _folder(given: str) -> Path:
    # os.path, because Path.exists raises where a name is too long.
    if os.path.lexists(given) and not os.path.isdir(given):
        raise argparse.ArgumentTypeError(f"{given!r} given, and that is a file; allowed: a folder, which is made")
    return Path(given)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.report",
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
    found = [named(path, options) for path in given.results]
    try:
        written = write(found, given.output)
    except MissingMatplotlib as error:
        options.error(str(error))
    except ValueError as error:
        options.error(f"argument RESULTS.json: {error}")
    except OSError as error:
        options.error(f"argument --output: {str(given.output)!r} given, and {error}; allowed: a folder to write into")
    print("\n".join(f"wrote {path}" for path in written))
    left = [path for path in sorted(given.output.glob("*.png")) if path not in written and ours(path)]
    if left:
        print(f"left of an earlier report: {', '.join(map(str, left))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
