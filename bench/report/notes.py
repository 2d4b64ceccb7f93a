"""What a results file says in the column "measured" of the notebook's table.

python -m bench.report.notes RESULTS.json [--write]       prints the cells, or puts them into bench/NOTES.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import UsageError
from bench.race import suites
from bench.report import targets
from bench.report.results import Results, Timing, load

NOTES = Path(__file__).parents[1] / "NOTES.md"
COLUMN = 3  # of the cells of a row


def _timing(results: Results, **wanted: object) -> Timing | None:
    """persistrnn's time of the one row of the first run that has these fields and, else, no marks and one layer."""
    wanted = {"layers": 1, "bidirectional": False, "marks": ""} | wanted
    (case,) = (c for c in suites.first() if all(getattr(c, name) == value for name, value in wanted.items()))
    found = results.timing(case, "persistrnn")
    return None if found is None or found.skipped else found


def _measured(results: Results) -> Iterator[tuple[str, str]]:
    """(the beginning of a row's first cell, what is measured of it)."""
    micro = sorted(results.micro, key=lambda one: (one.programs, one.payload))
    counter = [one for one in micro if one.name == "exchange counter"]
    flags = {(one.programs, one.payload): one.value for one in micro if one.name == "exchange flags"}
    both = [one for one in counter if one.payload and (one.programs, one.payload) in flags]
    if both:
        one = min(both, key=lambda one: (-one.programs, one.payload))
        where = f"an exchange among {one.programs} programs, {one.payload:,} bytes"
        yield "self-flagging exchange", f"{where}: {one.value:.2f} -> {flags[one.programs, one.payload]:.2f} us"
    bare = [one for one in counter if not one.payload]
    if len(bare) > 1:
        each = (f"{one.value:.2f} us among {one.programs}" for one in (bare[0], bare[-1]))
        yield "one poller per group", f"an announcement: {', '.join(each)}"
    for row, name, what, at in (
        ("weights in registers", "shared", "from shared memory", -1),
        ("staggered reads of h", "l2", "from L2, all the same", 0),
    ):
        if rates := [one.value for one in micro if one.name == name]:
            yield row, f"{what}: {rates[at]:.0f} bytes per clock"
    if call := _timing(results, steps=1):
        yield "CUDA graphs", f"a call of T=1, H=256: {call.microseconds:.1f} us"
    layer: dict[str, object] = {"hidden": 512, "batch": 16, "dtype": "bf16", "mode": "training"}
    wide: dict[str, object] = {"hidden": 1024, "batch": 64}
    single, stack = _timing(results, **layer), _timing(results, **layer, layers=4)
    plain, marked = _timing(results, **wide), _timing(results, **wide, marks="resets")
    if plain:
        what = "LSTM 1024, B=64, training with the input's product"
        yield "several batch tiles", f"{what}: {plain.per_step:.2f} us per step"
    for row, what, less, more in (
        ("stack as a wavefront", "LSTM 512, B=16, training, 1 -> 4 layers", single, stack),
        ("marks instead of masks", "LSTM 1024, B=64, training, without -> with resets", plain, marked),
    ):
        if less and more:
            ratio = more.microseconds / less.microseconds
            yield row, f"{what}: {less.per_step:.2f} -> {more.per_step:.2f} us per step, {ratio:.2f} times"


def cells(results: Results, origin: str) -> dict[str, str]:
    """The cells that these results fill, by the beginning of their row.

    Raises:
        UsageError: they are a rehearsal, or of another device than the table's.
    """
    targets.check_device(results)
    return {row: f"{text} ({origin})" for row, text in _measured(results)}


def filled(text: str, found: dict[str, str]) -> str:
    """The notebook with these cells.

    Raises:
        UsageError: it has no row of that name, or several.
    """
    for name, content in found.items():
        rows = re.findall(rf"^\| \[{re.escape(name)}\b.*\|$", text, re.MULTILINE)
        if len(rows) != 1:
            raise UsageError(f"the notebook has {len(rows)} rows that begin with {name!r}; allowed: one")
        columns = rows[0].strip("|").split("|")
        columns[COLUMN] = f" {content} "
        text = text.replace(rows[0], f"|{'|'.join(columns)}|")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.report.notes", description=__doc__.split("\n")[0])
    p.add_argument("results", type=Path, metavar="RESULTS.json", help="what `make gpu` wrote")
    p.add_argument("--write", action="store_true", help=f"put the cells into {NOTES.name}")
    given = p.parse_args(argv)
    try:
        found = cells(load(given.results), given.results.name)
        text = filled(NOTES.read_text(encoding="utf-8"), found)
    except (OSError, ValueError, UsageError) as error:
        p.error(str(error))
    for name, content in found.items():
        print(f"{name}: {content}")
    if given.write:
        NOTES.write_text(text, encoding="utf-8")
    print(f"{len(found)} cells {'written' if given.write else 'found; --write puts them there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
