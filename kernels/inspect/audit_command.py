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
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

from ..cells import CELLS
from ..planner import plan as planning
from .audit import DEVICE_OF_ARCH, DTYPES, Case, Row, audit, key, planned, row_of

FIELDS = [f.name for f in fields(Row)]
SHOWN = [name for name in FIELDS if name not in ("failures", "refused")]
BEGIN = '{"key": '  # of a line of finished rows
# What executes the kernels: of the tests, which an installation does not have.
CHECKOUT = Path(__file__).resolve().parents[2]
COUNTS = CHECKOUT / "tests" / "helpers" / "counted.py"

HIDDEN = (64, 128, 256, 320, 512, 768, 1024, 2048, 4096)


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
    found = []
    for row in rows:
        if row["cell"] not in CELLS:
            continue
        try:
            sizes = int(row["hidden"]), int(row["batch"])
        except (TypeError, ValueError):
            sizes = 0, 0
        if min(sizes) < 1:
            raise ValueError(f"{path} has the row {row}, allowed for hidden and batch: integers of at least 1")
        found.append((row["cell"], *sizes, 2 if row.get("bidirectional") == "1" else 1))
    return found


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
    version wrote.

    Raises:
        ValueError: a line that no audit wrote.
    """
    rows = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        if not line.startswith(BEGIN):
            raise ValueError(f"its line {number} is no row of an audit")
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry.get("row"), dict) and list(entry["row"]) == FIELDS and not entry["row"]["failures"]:
            rows[entry["key"]] = Row(**entry["row"])
    return rows


def _file(given: str) -> Path:
    """A file that can be written, there or not, in folders that are there or can be made."""
    path = Path(given)
    try:
        try:
            path.open("r+b").close()
        except FileNotFoundError:
            above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
            with tempfile.TemporaryFile(dir=above):
                pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{given!r} given, and it cannot be written ({error.strerror}); allowed: a file that you may write"
        ) from error
    return path


def _resume(given: str) -> Path:
    path = _file(given)
    try:
        kept(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{given!r} given, and {error}; allowed: a new file, or one that --resume wrote"
        ) from error
    return path


def _output(given: str) -> Path:
    path = _file(given)
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(200)
        if begin and not begin.startswith(",".join(FIELDS[:7]).encode()):
            raise argparse.ArgumentTypeError(
                f"{given!r} given, and it is no table of an audit; allowed: a new file, or a table to replace"
            )
    return path


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
                with resume.open("a+b") as file:
                    file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                    if file.read(1) not in (b"", b"\n"):
                        file.write(b"\n")  # below what an interrupted run left half written
                    file.write(json.dumps({"key": k, "row": asdict(row)}).encode() + b"\n")
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
    cells, dtypes, archs = ["lstm", "gru"], list(DTYPES), ["sm_80", "sm_90", "sm_100"]

    def several(name: str, choices: Sequence[str], default: Sequence[str], what: str) -> None:
        shown = f"{what} (default: {' '.join(default)})"
        result.add_argument(name, nargs="+", choices=choices, default=default, metavar="NAME", help=shown)

    several("--cells", sorted(CELLS), cells, ", ".join(CELLS))
    several("--dtypes", sorted(DTYPES), dtypes, ", ".join(dtypes))
    several("--arch", list(DEVICE_OF_ARCH), archs, f"architectures: {', '.join(DEVICE_OF_ARCH)}")
    sizes = f"hidden sizes (default: {' '.join(map(str, HIDDEN))})"
    result.add_argument("--hidden", nargs="+", type=int, metavar="H", help=sizes)
    result.add_argument("--batch", nargs="+", type=int, default=[16], metavar="B", help="batch sizes (default: 16)")
    result.add_argument(
        "--directions", nargs="+", type=int, choices=(1, 2), default=[1], metavar="D", help="1 and 2 (default: 1)"
    )
    result.add_argument(
        "--workloads", nargs="+", type=Path, metavar="FILE.csv",
        help="tables of shapes, in place of --hidden, --batch and --directions: columns cell, hidden, batch, and if "
        "need be bidirectional (1)",
    )  # fmt: skip
    result.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    result.add_argument(
        "--resume", type=_resume, metavar="FILE.jsonl",
        help="keep finished rows here; those of the same kernel, plan and Triton are not compiled again",
    )  # fmt: skip
    result.add_argument("--output", type=_output, metavar="FILE.csv", help="also write the table here")
    result.add_argument("--failures", action="store_true", help="print only rows that are not ok")
    result.add_argument(
        "--run", action="store_true",
        help="count what the compiled kernels do per step, in the emulator of a checkout's tests, and write its table",
    )  # fmt: skip
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
    for name in ("hidden", "batch", "jobs"):
        values = getattr(arguments, name)
        if values is not None and min([values] if isinstance(values, int) else values) < 1:
            options.error(f"--{name} must be at least 1, got {values}")
    if arguments.workloads and arguments.hidden:
        options.error("--workloads and --hidden are two ways to say which shapes: give one of them")
    if arguments.output and arguments.resume and os.path.abspath(arguments.output) == os.path.abspath(arguments.resume):
        options.error(f"--output and --resume are two files, got {str(arguments.output)!r} for both")
    try:
        shapes = [shape for path in arguments.workloads or () for shape in shapes_of(path)]
    except (OSError, ValueError) as error:
        options.error(f"--workloads: {error}")
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
