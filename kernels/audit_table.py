"""The audit as a command: which kernels to read, on how many processes, and the table that is kept.

Run as ``python -m persistrnn audit``; the exit status is 1 if any row fails. With ``--workloads`` the shapes are those
of tables with the columns cell, hidden, batch (and bidirectional); two shapes with the same kernel are one row.
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
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

from . import plan as planning
from .audit import DEVICE_OF_ARCH, DTYPES, Case, Row, audit, key, planned
from .cells import CELLS

# What executes the kernels: of the tests, which an installation does not have.
COUNTS = Path(__file__).resolve().parent.parent / "tests" / "counted.py"

HIDDEN = (64, 128, 256, 320, 512, 768, 1024, 2048, 4096)
SHOWN = [f.name for f in fields(Row) if f.name not in ("failures", "refused")]


def cases(
    shapes: list[tuple[str, int, int, int]], dtypes: list[str], archs: list[str]
) -> dict[str, Case]:  # fmt: skip
    """By key, every kernel that some (cell, hidden, batch, directions) needs, forward and backward."""
    found: dict[str, Case] = {}
    for arch in archs:
        for dtype in dtypes:
            for cell, hidden, batch, directions in shapes:
                for backward in (False, True):
                    case = Case(cell, backward, dtype, hidden, arch, batch, directions)
                    try:
                        found.setdefault(key(case, planned(case)), case)
                    except planning.PlanError:
                        found[f"refused: {case}"] = case
    return found


def shapes_of(path: Path) -> list[tuple[str, int, int, int]]:
    """The LSTM and GRU rows of a workload table."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"cell", "hidden", "batch"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: a workload table has cell, hidden, batch")
    return [
        (row["cell"], int(row["hidden"]), int(row["batch"]), 2 if row.get("bidirectional") == "1" else 1)
        for row in rows
        if row["cell"] in CELLS
    ]


def attempt(case: Case) -> Row:
    """A row, also where the compiler gives up: one kernel's failure is not the end of the table."""
    try:
        return audit(case)
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        name = f"{case.cell} {'backward' if case.backward else 'forward'}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        version = key_version()
        return Row(name, case.dtype, case.hidden, case.batch, case.directions, case.arch, version, failures=reason)


def key_version() -> str:
    import triton

    return str(triton.__version__)


def kept(path: Path) -> dict[str, Row]:
    """Green rows by key. What failed is tried again, as is what an interrupted run left half written."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not entry["row"]["failures"]:
            rows[entry["key"]] = Row(**entry["row"])
    return rows


def run(wanted: dict[str, Case], jobs: int, resume: Path | None = None) -> list[Row]:
    """Audit the cases on ``jobs`` processes, with progress, reusing finished rows from ``resume``."""
    done = kept(resume) if resume is not None else {}
    missing = {k: case for k, case in wanted.items() if k not in done}
    # Threads of a forked parent are not copied: start each worker afresh.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(attempt, case): k for k, case in missing.items()}
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            k, row = futures[future], future.result()
            done[k] = row
            if resume is not None:
                resume.parent.mkdir(parents=True, exist_ok=True)
                with resume.open("a") as file:
                    file.write(json.dumps({"key": k, "row": asdict(row)}) + "\n")
            if sys.stderr.isatty():
                print(f"\r{n}/{len(missing)} kernels compiled", end="", file=sys.stderr, flush=True)
    if missing and sys.stderr.isatty():
        print(file=sys.stderr)
    # A row that another shape made names that shape: the one asked for is this one.
    return [
        replace(done[k], H=case.hidden, B=case.batch, D=case.directions) for k, case in wanted.items()
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [[*SHOWN, "result"]]
    for row in rows:
        cells = [str(getattr(row, name)) for name in SHOWN]
        if row.refused:
            lines.append(cells[:7] + ["-"] * (len(SHOWN) - 7) + ["refused by the plan"])
        else:
            lines.append([*cells, f"FAILED: {row.failures}" if row.failures else "ok"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(SHOWN))]
    return "\n".join(
        "  ".join([cell.ljust(w) for cell, w in zip(line, widths, strict=False)] + [line[-1]]) for line in lines
    )


def write(rows: list[Row], path: Path) -> None:
    """The rows as CSV, in an order that does not depend on which kernel was done first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(sorted(map(astuple, rows)))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="persistrnn audit", description="Prove from compiled code where the kernels keep W_hh. Needs no GPU."
    )
    parser.add_argument("--cells", nargs="+", choices=sorted(CELLS), default=sorted(CELLS, reverse=True))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=list(DTYPES))
    parser.add_argument("--hidden", nargs="+", type=int, help=f"hidden sizes (default: {' '.join(map(str, HIDDEN))})")
    parser.add_argument("--batch", nargs="+", type=int, default=[16], help="batch sizes (default: 16)")
    parser.add_argument("--directions", nargs="+", type=int, choices=(1, 2), default=[1])
    parser.add_argument("--workloads", nargs="+", type=Path, help="tables of shapes, in place of --hidden and --batch")
    parser.add_argument("--arch", nargs="+", choices=list(DEVICE_OF_ARCH), default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--resume", type=Path, help="JSON lines file that keeps finished rows")
    parser.add_argument("--output", type=Path, help="write the table here, as CSV")
    parser.add_argument("--failures", action="store_true", help="print only rows that are not ok")
    parser.add_argument(
        "--run", action="store_true",
        help="count what the compiled kernels do per step, in the emulator of a checkout's tests, and write its table",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.run:
        if not COUNTS.exists():
            parser.error(f"--run needs a checkout, whose tests hold the emulator: there is no {COUNTS}")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, str(COUNTS)], env=environment).returncode
    for name in ("hidden", "batch", "jobs"):
        values = getattr(arguments, name)
        if values is not None and min([values] if isinstance(values, int) else values) < 1:
            parser.error(f"--{name} must be at least 1, got {values}")
    if arguments.workloads and arguments.hidden:
        parser.error("--workloads and --hidden are two ways to say which shapes: give one of them")
    try:
        shapes = [shape for path in arguments.workloads or () for shape in shapes_of(path)]
    except (OSError, ValueError) as error:
        parser.error(f"--workloads: {error}")
    shapes = [shape for shape in shapes if shape[0] in arguments.cells] or [
        (cell, hidden, batch, directions)
        for cell in arguments.cells
        for hidden in arguments.hidden or HIDDEN
        for batch in arguments.batch
        for directions in arguments.directions
    ]
    rows = run(cases(shapes, arguments.dtypes, arguments.arch), arguments.jobs, arguments.resume)
    failed = [row for row in rows if row.failures]
    refused = [row for row in rows if row.refused]
    shown = failed + refused if arguments.failures else rows
    if shown:
        print(table(shown))
    if arguments.output is not None:
        write(rows, arguments.output)
    print(f"{len(rows) - len(failed) - len(refused)} ok, {len(refused)} refused by the plan, {len(failed)} failed")
    return 1 if failed else 0
