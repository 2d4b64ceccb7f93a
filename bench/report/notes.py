"""What a results file says in the column "measured" of the notebook's table.

python -m bench.report.notes RESULTS.json [--write]       prints the cells, or puts them into bench/NOTES.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import UsageError
from bench.race import suites
from bench.report import targets
from bench.report.results import Case, Micro, Results, Timing, load

NOTES = Path(__file__).parents[1] / "NOTES.md"
COLUMN = 3  # of the cells of a row


def _micro(results: Results, name: str, payload: int | None = None) -> list[Micro]:
    """Measurements of a name, the fewest programs first, then the fewest bytes."""
    found = [one for one in results.micro if one.name == name and payload in (None, one.payload)]
    return sorted(found, key=lambda one: (one.programs, one.payload))


def _row(results: Results, **wanted: object) -> Timing | None:
    """persistrnn's time of the one row of the first run that has these fields and, else, no marks and one layer."""
    plain = {"layers": 1, "bidirectional": False, "marks": ""} | wanted

    def fits(case: Case) -> bool:
        return all(getattr(case, name) == value for name, value in plain.items())

    (case,) = (case for case in suites.first() if fits(case))
    found = results.timing(case, "persistrnn")
    return None if found is None or found.skipped else found


def _flags(results: Results) -> str | None:
    with_data = [one for one in _micro(results, "exchange counter") if one.payload]
    others = {(one.programs, one.payload): one for one in _micro(results, "exchange flags")}
    both = [(one, others[one.programs, one.payload]) for one in with_data if (one.programs, one.payload) in others]
    if not both:
        return None
    counter, flags = min(both, key=lambda pair: (-pair[0].programs, pair[0].payload))
    where = f"among {counter.programs} programs, {counter.payload:,} bytes"
    return f"an exchange {where}: {counter.value:.2f} -> {flags.value:.2f} us"


def _poller(results: Results) -> str | None:
    found = _micro(results, "exchange counter", 0)
    told = [f"{one.value:.2f} us among {one.programs}" for one in (found[:1] + found[-1:])]
    return f"an announcement: {', '.join(told)}" if len(found) > 1 else None


def _rate(name: str, what: str, largest: bool) -> Callable[[Results], str | None]:
    def rate(results: Results) -> str | None:
        found = _micro(results, name)
        return f"{what}: {found[-1 if largest else 0].value:.0f} bytes per clock" if found else None

    return rate


def _over(what: str, base: dict[str, object], **more: object) -> Callable[[Results], str | None]:
    """One row beside another one, both of the first run."""

    def over(results: Results) -> str | None:
        less, extra = _row(results, **base), _row(results, **(base | more))
        if less is None or extra is None:
            return None
        ratio = extra.microseconds / less.microseconds
        return f"{what}: {less.per_step:.2f} -> {extra.per_step:.2f} us per step, {ratio:.2f} times"

    return over


def _call(results: Results) -> str | None:
    found = _row(results, steps=1)
    return f"a call of T=1, H=256: {found.microseconds:.1f} us" if found else None


def _step(what: str, **wanted: object) -> Callable[[Results], str | None]:
    def step(results: Results) -> str | None:
        found = _row(results, **wanted)
        return f"{what}: {found.per_step:.2f} us per step" if found else None

    return step


LAYER: dict[str, object] = {"hidden": 512, "batch": 16, "dtype": "bf16", "mode": "training"}
WIDE: dict[str, object] = {"hidden": 1024, "batch": 64}
# The beginning of a row's first cell -> what is measured of it.
CELLS: dict[str, Callable[[Results], str | None]] = {
    "self-flagging exchange": _flags,
    "one poller per group": _poller,
    "weights in registers": _rate("shared", "from shared memory", True),
    "staggered reads of h": _rate("l2", "from L2, all the same", False),
    "CUDA graphs": _call,
    "several batch tiles": _step("LSTM 1024, B=64, training with the input's product", **WIDE),
    "stack as a wavefront": _over("LSTM 512, B=16, training, 1 -> 4 layers", LAYER, layers=4),
    "marks instead of masks": _over("LSTM 1024, B=64, training, without -> with resets", WIDE, marks="resets"),
}


def cells(results: Results, origin: str) -> dict[str, str]:
    """The cells that these results fill.

    Raises:
        UsageError: they are a rehearsal, or of another device than the table's.
    """
    if not targets.suitable(results):
        raise UsageError(
            f"the results are of {results.provenance.device!r}; allowed: a run on a whole {targets.DEVICE}, for which "
            "the notebook predicts; make one with `make gpu ARGS=first`"
        )
    found = {name: measure(results) for name, measure in CELLS.items()}
    return {name: f"{text} ({origin})" for name, text in found.items() if text}


def filled(text: str, found: dict[str, str]) -> str:
    """The notebook with these cells.

    Raises:
        UsageError: it has no row of that name, or several.
    """
    for name, content in found.items():
        pattern = re.compile(rf"^\| \[{re.escape(name)}\b.*\|$", re.MULTILINE)
        rows = pattern.findall(text)
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
    print(f"{len(found)} of {len(CELLS)} cells {'written' if given.write else 'found; --write puts them there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
