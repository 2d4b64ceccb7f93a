"""The clock's table: predicted cycles per time step of the compiled kernels, and what they wait for.

PYTHONPATH=.:tests python tests/helpers/clock_table.py [--output FILE] [--write]

makes bench/results/clock.csv anew (about three minutes on one core, 3 GB; --resume keeps the rows that are there;
--only CELL-HIDDEN-BATCH for one shape, printed; --exchanges makes exchange.csv, of every exchange) or puts the tables
of these files into bench/NOTES.md. It needs no GPU. One program is emulated, for three steps, without the others.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator import Report, clock, emulate
from emulator.trace import Trace

from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import exchange_on
from persistrnn.kernels.planner import hardware, plan
from persistrnn.kernels.planner.plan import Pass
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.tensors import Kept, Weights

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "clock.csv"
NOTES = ROOT / "bench" / "NOTES.md"
DEVICE, DTYPE, STEPS, SHARES = "h200", "bf16", 3, 5
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
EXCHANGE_SHAPES = [shape for shape in SHAPES if shape[2] < 64]
EXCHANGE_FIELDS = ["cell", "hidden", "batch", "pass", "exchange"]
EXCHANGE_FIELDS += ["instructions", "barriers", "clock_cycles", "clock_us"]


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


def alone(ptx: str) -> str:
    """The kernel of a program that waits for no other: each poll sees enough, and each word is there."""
    ptx = re.sub(r"setp\.ge\.s32 reached, seen, [^;]*;", "setp.eq.s32 reached, seen, seen;", ptx)
    return re.sub(r"setp\.eq\.u32 missing, ([^,]*), 0xffffffff;", r"setp.ne.u32 missing, \1, \1;", ptx)


def clocked(problem: Problem, part: Pass, backward: bool) -> clock.Step:
    return run(problem, part, backward)[0]


def run(problem: Problem, part: Pass, backward: bool, **exchange: str) -> tuple[clock.Step, Report]:
    """One program of a pass, compiled, executed over three steps without the others, and clocked. What it reads of them
    is garbage, which changes no address and no branch. exchange: attributes of ``Exchange`` other than the default."""
    cell, T, H = problem.cell, STEPS, problem.hidden
    t, D = part.tiling, problem.recurrences
    B = min(problem.batch, t.batch_tile * t.subtiles)  # of the first group
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(problem.dtype, torch.float32)
    trace = Trace()

    def some(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        session = emulate(
            patch, problem.hardware.arch, alone, tolerate=True, units="programs", trace=trace, absent=range(1, 1 << 16)
        )
        patch.setattr(launch, "exchange_for", lambda _: replace(exchange_on(problem.hardware.arch), **exchange))
        patch.setattr(launch, "hardware", lambda _: problem.hardware)
        patch.setattr(launch, "plan_of", lambda *_: SimpleNamespace(forward=part, backward=part))
        params = some(D, cell.step_params, H) if cell.step_params else None
        weights = Weights(some(D, cell.gates * H, H), some(D, cell.gates * H), params=params)
        if backward:
            states = [some(1, T + 2, B, D, H) for _ in range(cell.states)]
            kept = Kept(states, some(1, T, B, D, cell.saved, H))
            launch.backward(
                cell, [some(T, B, D, H)], [None] * cell.states, weights.weight_hh, None, kept, problem.precision,
                params=params,
            )  # fmt: skip
        else:
            launch.forward(cell, some(T, B, D, cell.inputs * H), weights, (), problem.precision, save=True)
    return clock.second_step(trace, T, problem.hardware.arch, problem.hardware), session.reports[0]


def row(cell: str, hidden: int, batch: int, way: str, step: clock.Step, predicted: float) -> dict[str, str]:
    us = step.cycles / hardware.named(DEVICE).clock / 1e3
    found = [DEVICE, DTYPE, cell, hidden, batch, way]
    found += [f"{step.cycles:.0f}", f"{us:.2f}", f"{predicted:.2f}", f"{us / predicted:.2f}", step.barriers]
    for line, cycles in step.shares[:SHARES]:
        found += [named(line), f"{cycles / step.cycles:.2f}"]
    return dict(zip(FIELDS, map(str, found), strict=True))


def both(cell: str, hidden: int, batch: int, **exchange: str) -> list[tuple[str, Pass, clock.Step, int]]:
    """Of the forward and of the backward of one layer: (which, its plan, the step, its instructions as ``counted``
    counts them)."""
    problem = Problem(CELLS[cell], hidden, batch, 1, DTYPE, hardware.named(DEVICE))
    planned, found = plan.plan_layer(problem), []
    for way, part in (("forward", planned.forward), ("backward", planned.backward)):
        step, report = run(problem, part, way == "backward", **exchange)
        found.append((way, part, step, round(sum(count for _, count in report.executed(STEPS)))))
    return found


def rows(cell: str, hidden: int, batch: int) -> list[dict[str, str]]:
    """Of the forward and of the backward of one layer."""
    return [row(cell, hidden, batch, way, step, part.predicted) for way, part, step, _ in both(cell, hidden, batch)]


def exchange_rows(cell: str, hidden: int, batch: int, name: str) -> list[dict[str, str]]:
    """The same with one of ``EXCHANGES``: instructions and barriers of a step, and its cycles."""
    found = []
    for way, _, step, instructions in both(cell, hidden, batch, **EXCHANGES[name]):
        us = step.cycles / hardware.named(DEVICE).clock / 1e3
        numbers = instructions, step.barriers, f"{step.cycles:.0f}", f"{us:.2f}"
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
