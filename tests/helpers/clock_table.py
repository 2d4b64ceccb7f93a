"""The clock's table: predicted cycles per time step of the compiled kernels, and what they wait for.

PYTHONPATH=.:tests python tests/helpers/clock_table.py [--output FILE] [--write]

makes bench/results/clock.csv anew (about ten minutes on one core, 6 GB; --resume keeps the rows that are there; --only
CELL-HIDDEN-BATCH for one shape, printed; --exchanges makes exchange.csv, of every exchange) or puts the tables of these
files into bench/NOTES.md. It needs no GPU. One group of slices is emulated, for three steps, and one of its programs
clocked.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from emulator import Report, clock, emulate
from emulator.trace import Trace

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner import hardware, plan
from persistrnn.kernels.planner.problem import Problem

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "clock.csv"
NOTES = ROOT / "bench" / "NOTES.md"
DEVICE, ARCH, DTYPE, STEPS, SHARES = "h200", "sm_90", "bf16", 3, 5
SHAPES = [(cell, hidden, batch) for cell in ("lstm", "gru") for hidden in (256, 512, 1024) for batch in (1, 16, 64)]
FIELDS = ["device", "dtype", "cell", "hidden", "batch", "pass"]
FIELDS += ["clock_cycles", "clock_us", "model_us", "ratio", "barriers"]
FIELDS += [f"{what}_{n}" for n in range(1, SHARES + 1) for what in ("line", "share")]
# One polling warp is counted and clocked as one polling thread is.
EXCHANGES = {
    "counter, all poll": {},
    "counter, one thread polls": {"pollers": "thread"},
    "flags": {"protocol": "flags"},
}
EXCHANGE_RESULTS = RESULTS.with_name("exchange.csv")
EXCHANGE_SHAPES = [shape for shape in SHAPES if shape[2] < 64]  # the same kernels, or two batch tiles in turn
EXCHANGE_FIELDS = ["cell", "hidden", "batch", "pass", "exchange"]
EXCHANGE_FIELDS += ["instructions", "barriers", "clock_cycles", "clock_us"]
MODULES = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU}


@lru_cache
def functions(file: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of the functions of a file of the kernels."""
    tree = ast.parse((ROOT / "kernels" / "device" / file).read_text())
    return [(n.lineno, n.end_lineno or 0, n.name) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def named(line: str) -> str:
    """ "pointwise.py:28" as "cells.py:28 sigmoid"."""
    file, _, row = line.partition(":")
    if not row.isdecimal() or not (ROOT / "kernels" / "device" / file).exists():
        return line
    return " ".join([line, *(name for first, last, name in functions(file) if first <= int(row) <= last)])


def row(cell: str, hidden: int, batch: int, way: str, trace: Trace, predicted: float) -> dict[str, str]:
    device = hardware.named(DEVICE)
    step = clock.second_step(trace, STEPS, ARCH, device)
    us = step.cycles / device.clock / 1e3
    found = [DEVICE, DTYPE, cell, hidden, batch, way]
    found += [f"{step.cycles:.0f}", f"{us:.2f}", f"{predicted:.2f}", f"{us / predicted:.2f}", step.barriers]
    for line, cycles in step.shares[:SHARES]:
        found += [named(line), f"{cycles / step.cycles:.2f}"]
    return dict(zip(FIELDS, map(str, found), strict=True))


def runs(cell: str, hidden: int, batch: int, **exchange: str) -> tuple[list[tuple[str, Trace, float]], list[Report]]:
    """Of the forward and of the backward of one layer: (which, what it executed, what is predicted), and the reports.
    exchange: attributes of ``Exchange`` that differ from the default."""
    planned = plan.plan_layer(Problem(CELLS[cell], hidden, batch, 1, DTYPE, hardware.named(DEVICE)))
    torch.manual_seed(0)
    x = torch.randn(STEPS, batch, 16, dtype=torch.bfloat16)
    layer = MODULES[cell](16, hidden, dtype=torch.bfloat16, backend="persistent")
    traces = []
    with pytest.MonkeyPatch.context() as patch:
        # The other groups stay out: what they do not compute is garbage, which nobody here reads.
        session = emulate(patch, ARCH, units="rows", tolerate=True)
        patch.setattr(launch, "exchange_for", lambda _: Exchange(**exchange))

        def follow(slices: int) -> None:
            traces.append(Trace())
            session.options |= {"trace": traces[-1], "absent": range(slices, 1 << 12)}

        follow(planned.forward.tiling.slices)
        y, _ = layer(x)
        follow(planned.backward.tiling.slices)
        y.backward(torch.ones_like(y))
    if [report.kernel.name for report in session.reports] != ["scan_forward", "scan_backward"]:
        raise RuntimeError(
            f"other launches than of the two scans: {[report.kernel.name for report in session.reports]}"
        )
    predicted = planned.forward.predicted, planned.backward.predicted
    return list(zip(("forward", "backward"), traces, predicted, strict=True)), session.reports


def rows(cell: str, hidden: int, batch: int) -> list[dict[str, str]]:
    """Of the forward and of the backward of one layer."""
    return [row(cell, hidden, batch, *run) for run in runs(cell, hidden, batch)[0]]


def exchange_rows(cell: str, hidden: int, batch: int, name: str) -> list[dict[str, str]]:
    """The same with one of ``EXCHANGES``: instructions, as ``counted`` counts them, and barriers of a step."""
    device, found = hardware.named(DEVICE), []
    both, reports = runs(cell, hidden, batch, **EXCHANGES[name])
    for (way, trace, _), report in zip(both, reports, strict=True):
        step = clock.second_step(trace, STEPS, ARCH, device)
        executed = round(sum(count for _, count in report.executed(STEPS)))
        numbers = executed, step.barriers, f"{step.cycles:.0f}", f"{step.cycles / device.clock / 1e3:.2f}"
        found.append([cell, hidden, batch, way, name, *numbers])
    return [dict(zip(EXCHANGE_FIELDS, map(str, one), strict=True)) for one in found]


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write(found: list[dict[str, str]], file: Path) -> None:
    part = file.with_suffix(".part")
    with part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    os.replace(part, file)


def table(found: list[dict[str, str]]) -> str:
    """As it stands in the notebook."""
    lines = [
        "| layer, bf16 | pass | clock: cycles | us | model: us | ratio | barriers | five largest shares, by clock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        shares = [(one[f"line_{n}"], float(one[f"share_{n}"])) for n in range(1, SHARES + 1)]
        told = ", ".join(f"{line} {share:.0%}" for line, share in shares)
        layer = f"{one['cell'].upper()} {one['hidden']}, B={one['batch']}"
        numbers = [one[n] for n in ("clock_cycles", "clock_us", "model_us", "ratio", "barriers")]
        lines.append(f"| {' | '.join([layer, one['pass'], *numbers, told])} |")
    return "\n".join(lines)


def exchange_table(found: list[dict[str, str]]) -> str:
    """As it stands in the notebook: a line per layer and pass, of each exchange instructions, barriers and cycles."""
    names = list(EXCHANGES)
    lines = [["layer, bf16", "pass", *names], ["---"] * (2 + len(names))]
    for n in range(0, len(found), 2 * len(names)):
        for way in (0, 1):
            of = found[n + way : n + 2 * len(names) : 2]
            told = [f"{r['instructions']}, {r['barriers']}, {r['clock_cycles']} ({r['clock_us']} us)" for r in of]
            lines.append([f"{of[0]['cell'].upper()} {of[0]['hidden']}, B={of[0]['batch']}", of[0]["pass"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(notes: str, what: str, made: str) -> str:
    """The notebook with a table in its place. what: "clock" or "exchange"."""
    begin = f"<!-- {what}: made by tests/helpers/clock_table.py from results/{what}.csv -->\n"
    before, _, rest = notes.partition(begin)
    _, end, after = rest.partition(f"\n<!-- end of {what} -->")
    if not end:
        raise ValueError(f"no {begin.strip()} and its end")
    return before + begin + made + end + after


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has, and go on")
    parser.add_argument("--exchanges", action="store_true", help="of every exchange, to exchange.csv")
    parser.add_argument("--only", help="one shape, e.g. lstm-256-1: its rows are printed and nothing is written")
    parser.add_argument(
        "--write", action="store_true", help="put the tables of the results into the notebook, and no more"
    )
    asked = parser.parse_args(arguments)
    if asked.write:
        notes = put(NOTES.read_text(), "clock", table(read()))
        NOTES.write_text(put(notes, "exchange", exchange_table(read(EXCHANGE_RESULTS))))
        return
    if asked.only:
        cell, hidden, batch = asked.only.split("-")
        print(table(rows(cell, int(hidden), int(batch))))
        return
    made: Callable[..., list[dict[str, str]]] = rows
    tasks: list[tuple[str | int, ...]] = [*SHAPES]
    if asked.exchanges:
        made, tasks = exchange_rows, [(*shape, name) for shape in EXCHANGE_SHAPES for name in EXCHANGES]
        asked.output = EXCHANGE_RESULTS if asked.output == RESULTS else asked.output
    found = read(asked.output) if asked.resume and asked.output.exists() else []
    there = {(one["cell"], int(one["hidden"]), int(one["batch"]), one.get("exchange")) for one in found}
    # A process each: what the emulator keeps of a launch would fill the memory.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for task in tasks:
            if (*task, None)[:4] not in there:
                found += pool.apply(made, task)
                write(found, asked.output)
                print(*task, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
