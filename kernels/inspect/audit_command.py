"""The audit as a command: which kernels to read, on how many processes, and the table that is kept.

Run as ``python -m persistrnn audit``; the exit status is 1 if any row fails. With ``--workloads`` what is asked is in
tables (``table_cases``); two shapes with the same kernel are one row.
Green rows are kept in ``--resume`` (JSON lines) and not compiled again while the kernel, its plan and Triton are the
same. ``--run`` executes kernels instead, in the emulator of a checkout.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..cells import CELLS
from ..planner import plan as planning
from .audit import DEVICE_OF_ARCH, DTYPES, Case, Row, audit, key, planned, row_of
from .plan_command import positive

# What counts in a checkout; an installation does not have it.
CHECKOUT = Path(__file__).resolve().parents[2]
COUNTS = CHECKOUT / "tests" / "helpers" / "counted.py"
FIELDS = [f.name for f in fields(Row)]
SHOWN = [name for name in FIELDS if name not in ("failures", "refused")]
BEGIN = '{"key": '  # of a line of finished rows
HIDDEN = (64, 128, 256, 320, 512, 768, 1024, 2048, 4096)


def cases(asked: Iterable[Case]) -> dict[str, Case]:
    """By key, every kernel among those asked for; where two are the same, the first."""
    found: dict[str, Case] = {}
    for case in asked:
        try:
            found.setdefault(key(case, planned(case)), case)
        except planning.PlanError:
            found[f"refused: {case}"] = case
    return found


def table_cases(path: Path, dtypes: Sequence[str], archs: Sequence[str]) -> Iterator[Case]:
    """What a table asks for: columns cell, hidden, batch, and if need be bidirectional (1), pipeline (layers), weights
    (of 8 bits: forward alone), marks and chunked (1), dtypes and archs (several, in place of those given)."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        try:
            here = [(row.get(name) or "").split() or given for name, given in (("archs", archs), ("dtypes", dtypes))]
            unknown = {row["cell"], *here[0], *here[1]}.difference(CELLS, DEVICE_OF_ARCH, DTYPES)
            if unknown:
                raise KeyError(*unknown)
            sizes = positive(row["hidden"] or ""), positive(row["batch"] or "")
            how: dict[str, Any] = {name: row.get(name) == "1" for name in ("marks", "chunked")}
            how |= {"layers": int(row.get("pipeline") or 1), "directions": 1 + (row.get("bidirectional") == "1")}
        except (KeyError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(
                f"{path} has the row {row} ({error}); allowed: columns cell, hidden and batch, the last two integers"
            ) from error
        weights = row.get("weights") or ""
        for arch, dtype, backward in product(*here, (False,) if weights else (False, True)):
            yield Case(row["cell"], backward, dtype, sizes[0], arch, sizes[1], **how, weight_dtype=weights)


def asked(arguments: argparse.Namespace) -> Iterator[Case]:
    """What a command line asks for.

    Raises:
        OSError, ValueError: a table cannot be read
    """
    archs, dtypes, cells = arguments.arch, arguments.dtypes, arguments.cells
    if arguments.workloads:
        return (case for path in arguments.workloads for case in table_cases(path, dtypes, archs))
    shapes = product(archs, dtypes, cells, arguments.hidden, arguments.batch, arguments.directions, (False, True))
    return (Case(cell, way, dtype, H, arch, B, D) for arch, dtype, cell, H, B, D, way in shapes)


def attempt(case: Case) -> Row:
    """A row, also where the compiler gives up: one kernel's failure is not the end of the table."""
    try:
        return audit(case)
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return row_of(case, failures=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def kept(path: Path) -> dict[str, Row]:
    """Green rows by key. What failed is tried again, as is what an interrupted run left half written, or another
    version wrote."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if list(entry.get("row", ())) == FIELDS and not entry["row"]["failures"]:
            rows[entry["key"]] = Row(**entry["row"])
    return rows


def _file(begin: str) -> Callable[[str], Path]:
    """An argparse type: a file that can be written, new or empty or one that begins so. It is there afterwards."""

    def convert(given: str) -> Path:
        path = Path(given)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                found = file.read(len(begin))
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"{given!r} given, and it cannot be written ({error.strerror}); allowed: a file that you may write"
            ) from error
        if not begin.encode().startswith(found):
            raise argparse.ArgumentTypeError(
                f"{given!r} given, and it is another kind of file; allowed: a new one, or one that begins with {begin}"
            )
        return path

    return convert


def run(wanted: dict[str, Case], jobs: int, resume: Path | None = None) -> list[Row]:
    """Audit the cases on ``jobs`` processes, with progress, reusing finished rows from ``resume``."""
    done = kept(resume) if resume is not None else {}
    missing = {k: case for k, case in wanted.items() if k not in done}
    if missing and resume is not None and resume.stat().st_size:
        with resume.open("a") as file:
            file.write("\n")  # below what an interrupted run left half written
    # Threads of a forked parent are not copied: start each worker afresh.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(attempt, case): k for k, case in missing.items()}
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            k, row = futures[future], future.result()
            done[k] = row
            if resume is not None:
                with resume.open("a") as file:
                    file.write(json.dumps({"key": k, "row": asdict(row)}) + "\n")
            if sys.stderr.isatty():
                end = "" if n < len(missing) else "\n"
                print(f"\r{n}/{len(missing)} kernels compiled", end=end, file=sys.stderr, flush=True)
    # A row that another shape made names that shape: the one asked for is this one.
    return [replace(done[k], H=case.hidden, B=case.batch, D=case.directions) for k, case in wanted.items()]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [[*SHOWN, "result"]]
    for row in rows:
        result = "refused by the plan" if row.refused else f"FAILED: {row.failures}" if row.failures else "ok"
        lines.append([*(str(getattr(row, name)) for name in SHOWN), result])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write(rows: list[Row], path: Path) -> None:
    """The rows as CSV, in an order that does not depend on which kernel was done first."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(map(astuple, rows)))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="persistrnn audit",
        description="Compile the kernels for GPUs that need not be there, and prove from the compiled code where they "
        "keep W_hh, that nothing spills, and that tensor cores are used. One row for each kernel; the exit status is 1 "
        "where one fails.",
        allow_abbrev=False,
    )
    add = result.add_argument

    def several(name: str, default: Sequence[Any], what: str, **how: Any) -> None:
        add(name, nargs="+", default=default, help=f"{what} (default: {' '.join(map(str, default))})", **how)

    several("--cells", ["lstm", "gru"], "of the layers", choices=list(CELLS))
    several("--dtypes", list(DTYPES), "of the layers", choices=list(DTYPES))
    several("--arch", ["sm_80", "sm_90", "sm_100"], "architectures", choices=list(DEVICE_OF_ARCH))
    shapes = result.add_mutually_exclusive_group()
    text = f"hidden sizes (default: {' '.join(map(str, HIDDEN))})"
    shapes.add_argument("--hidden", nargs="+", type=positive, default=HIDDEN, metavar="H", help=text)
    text = "tables of what to compile, in place of --cells, --hidden, --batch and --directions: columns cell, hidden, "
    text += "batch, and if need be bidirectional (1), and dtypes and archs in place of --dtypes and --arch"
    shapes.add_argument("--workloads", nargs="+", type=Path, default=[], metavar="FILE.csv", help=text)
    several("--batch", [16], "batch sizes", type=positive)
    several("--directions", [1], "1 and 2", type=int, choices=(1, 2))
    text = "keep finished rows here; those of the same kernel, plan and Triton are not compiled again"
    add("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    add("--resume", type=_file(BEGIN), metavar="FILE.jsonl", help=text)
    add("--output", type=_file(",".join(FIELDS[:7])), metavar="FILE.csv", help="also write the table here")
    add("--failures", action="store_true", help="print only rows that are not ok")
    text = "count what the compiled kernels do per step, in the emulator of a checkout's tests, and write its table"
    add("--run", action="store_true", help=text)
    return result


def main(given: Sequence[str] | None = None) -> int:
    options = parser()
    arguments = options.parse_args(given)
    if arguments.run:
        if not COUNTS.exists():
            options.error(f"--run needs a checkout, whose tests hold the emulator: there is no {COUNTS}")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        folders = str(CHECKOUT), str(CHECKOUT / "tests"), os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        scripts = COUNTS, COUNTS.with_name("counted_rivals.py")
        return int(any(subprocess.run([sys.executable, str(script)], env=environment).returncode for script in scripts))
    if arguments.output and arguments.resume and arguments.output.samefile(arguments.resume):
        options.error(f"--output and --resume are two files, got {str(arguments.output)!r} for both")
    try:
        wanted = list(asked(arguments))
    except (OSError, ValueError) as error:
        options.error(f"--workloads: {error}")
    rows = run(cases(wanted), arguments.jobs, arguments.resume)
    failed = [row for row in rows if row.failures]
    refused = [row for row in rows if row.refused]
    shown = failed + refused if arguments.failures else rows
    if shown:
        print(table(shown))
    if arguments.output is not None:
        write(rows, arguments.output)
    print(f"{len(rows) - len(failed) - len(refused)} ok, {len(refused)} refused by the plan, {len(failed)} failed")
    return 1 if failed else 0
