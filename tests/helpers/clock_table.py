"""The clock's tables: predicted cycles per time step of the compiled kernels, and what they wait for.

PYTHONPATH=.:tests python tests/helpers/clock_table.py [--output FILE] [--jobs N] [--resume] [--write]

makes bench/results/clock.csv anew (a quarter of an hour on one core, 5 GB a job; --resume keeps the rows it has;
--only [DEVICE-]CELL-HIDDEN-BATCH for one shape, printed; --exchanges makes exchange.csv, of every exchange) or puts the
tables of these into bench/NOTES.md. It needs no GPU. One program is emulated, for three steps, without the others.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
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
BEFORE = RESULTS.with_name("clock-before.csv")
NOTES = ROOT / "bench" / "NOTES.md"
DEVICES, DTYPE, STEPS, SHARES = ("h200", "a100"), "bf16", 3, 5
SIZES = (128, 256, 512, 768, 1024, 2048)
SHAPES = [(cell, hidden, batch) for cell in ("lstm", "gru") for hidden in SIZES for batch in (1, 16, 64)]
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
TOLD_SIZES = (256, 512, 1024)  # of the tables of shares and of exchanges, both of the first device
# What is said of each device: ratios below, and barriers of a step above.
WORSE, MANY = 0.98, {"forward": 6, "backward": 8}
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


@dataclass(frozen=True)
class Row:
    """One pass of one layer, by today's plan."""

    device: str
    cell: str
    hidden: int
    batch: int
    way: str
    exchange: str = ""  # one of EXCHANGES, of a row of that table

    @property
    def key(self) -> tuple[str, ...]:
        return self.cell, str(self.hidden), str(self.batch), self.way, self.exchange or self.device

    @property
    def problem(self) -> Problem:
        return Problem(CELLS[self.cell], self.hidden, self.batch, 1, DTYPE, hardware.named(self.device))

    @property
    def part(self) -> Pass:
        planned = plan.plan_layer(self.problem)
        return planned.forward if self.way == "forward" else planned.backward

    @property
    def kernel(self) -> tuple[object, ...]:
        """What is clocked: alike in batches whose first group has as many rows."""
        t = self.part.tiling
        rows = min(self.batch, t.batch_tile * t.subtiles)
        return self.device, self.cell, self.hidden, self.way, self.exchange, self.part.choice, rows


WAYS = ("forward", "backward")
ROWS = [Row(device, *shape, way) for device in DEVICES for shape in SHAPES for way in WAYS]
EXCHANGE_ROWS = [
    Row(DEVICES[0], *shape, way, name)
    for shape in SHAPES
    if shape[1] in TOLD_SIZES and shape[2] < 64
    for name in EXCHANGES
    for way in WAYS
]


def rows(alike: list[Row]) -> list[dict[str, str]]:
    """Of passes that are one and the same kernel."""
    one = alike[0]
    step, report = run(one.problem, one.part, one.way == "backward", **EXCHANGES.get(one.exchange, {}))
    return [exchange_row(of, step, report) if of.exchange else row(of, step) for of in alike]


def row(one: Row, step: clock.Step) -> dict[str, str]:
    """The time of a step is that of the layer: of all its launches."""
    device, predicted, found = one.problem.hardware, one.part.predicted, dict.fromkeys(FIELDS, "")
    found |= {"device": one.device, "dtype": DTYPE, "cell": one.cell, "hidden": str(one.hidden)}
    found |= {"batch": str(one.batch), "pass": one.way, "model_us": f"{predicted:.2f}"}
    cycles = step.cycles * one.part.rounds
    us = cycles / device.clock / 1e3
    found |= {"clock_cycles": f"{cycles:.0f}", "clock_us": f"{us:.2f}", "ratio": f"{us / predicted:.2f}"}
    for n, (line, of_line) in enumerate(step.shares[:SHARES], 1):
        found |= {f"line_{n}": named(line), f"share_{n}": f"{of_line / step.cycles:.2f}"}
    return found | {"barriers": str(step.barriers)}


def exchange_row(one: Row, step: clock.Step, report: Report) -> dict[str, str]:
    """Instructions, as ``counted`` counts them, and barriers of a step, and its cycles."""
    instructions = round(sum(count for _, count in report.executed(STEPS)))
    us = step.cycles / one.problem.hardware.clock / 1e3
    numbers = instructions, step.barriers, f"{step.cycles:.0f}", f"{us:.2f}"
    found = one.cell, one.hidden, one.batch, one.way, one.exchange, *numbers
    return dict(zip(EXCHANGE_FIELDS, map(str, found), strict=True))


def key_of(one: dict[str, str]) -> tuple[str, ...]:
    """As ``Row.key``, of a row of any of the files."""
    return one["cell"], one["hidden"], one["batch"], one["pass"], one.get("exchange") or one["device"]


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


def layer(one: dict[str, str]) -> str:
    return f"{one['cell'].upper()} {one['hidden']}, B={one['batch']}"


def lined(lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """What the table of shares tells of."""
    return [one for one in found if one["device"] == DEVICES[0] and int(one["hidden"]) in TOLD_SIZES]


def table(found: list[dict[str, str]]) -> str:
    """As it stands in the notebook."""
    lines = [
        [
            "layer, bf16",
            "pass",
            "clock: cycles",
            "us",
            "model: us",
            "ratio",
            "barriers",
            "five largest shares, by clock",
        ],
        ["---"] * 8,
    ]
    for one in found:
        shares = [(one[f"line_{n}"], one[f"share_{n}"]) for n in range(1, SHARES + 1)]
        said = ", ".join(f"{line} {float(share):.0%}" for line, share in shares if share)
        numbers = [one[n] for n in ("clock_cycles", "clock_us", "model_us", "ratio", "barriers")]
        lines.append([layer(one), one["pass"], *numbers, said])
    return lined(lines)


def before_table(before: list[dict[str, str]], now: list[dict[str, str]]) -> str:
    """As it stands in the notebook: of each device what its rows say in all, then a line per layer and pass."""
    of_now = {key_of(one): one for one in now}
    lines: dict[str, list[str]] = {}
    ratios: dict[str, dict[str, float]] = {device: {} for device in DEVICES}
    many: dict[str, list[str]] = {device: [] for device in DEVICES}
    for one in before:
        now_one, name = of_now[key_of(one)], f"{layer(one)}, {one['pass']}"
        cycles, ratio = (one["cycles"], now_one["clock_cycles"]), ""
        if all(map(str.isdecimal, cycles)):
            ratios[one["device"]][name] = int(cycles[0]) / int(cycles[1])
            ratio = f"{ratios[one['device']][name]:.2f}"
        if now_one["barriers"] and int(now_one["barriers"]) > MANY[one["pass"]]:
            many[one["device"]].append(f"{name} ({now_one['barriers']})")
        barriers = ", ".join(filter(None, (one["barriers"], now_one["barriers"])))
        lines.setdefault(name, [layer(one), one["pass"]]).extend([", ".join(cycles), ratio, barriers])
    columns = [f"{device}: {what}" for device in DEVICES for what in ("cycles before, now", "ratio", "barriers")]
    table = lined([["layer, bf16", "pass", *columns], ["---"] * 8, *lines.values()])
    return "\n".join([*(said(device, ratios[device], many[device]) for device in DEVICES), "", table])


def said(device: str, ratios: dict[str, float], many: list[str]) -> str:
    least = min(ratios, key=ratios.__getitem__)
    worse = "; ".join(f"{name} ({ratio:.3f})" for name, ratio in ratios.items() if ratio < WORSE)
    mean, limits = geometric_mean(ratios.values()), " or ".join(f"{n} {way}" for way, n in MANY.items())
    return (
        f"**{device}:** geometric mean {mean:.2f} of the {len(ratios)} rows clocked in both, the least "
        f"{ratios[least]:.2f} ({least}); more than 2% slower: {worse or 'none'}; more than {limits} barriers now: "
        f"{'; '.join(many) or 'none'}."
    )


def exchange_table(found: list[dict[str, str]]) -> str:
    """As it stands in the notebook: a line per layer and pass, of each exchange instructions, barriers and cycles."""
    names = list(EXCHANGES)
    lines = [["layer, bf16", "pass", *names], ["---"] * (2 + len(names))]
    for n in range(0, len(found), 2 * len(names)):
        for way in (0, 1):
            of = found[n + way : n + 2 * len(names) : 2]
            numbers = [f"{r['instructions']}, {r['barriers']}, {r['clock_cycles']} ({r['clock_us']} us)" for r in of]
            lines.append([layer(of[0]), of[0]["pass"], *numbers])
    return lined(lines)


def put(notes: str, what: str, made: str) -> str:
    """The notebook with a table in its place. what: "clock", "clock-before" or "exchange"."""
    begin = f"<!-- {what}: made by tests/helpers/clock_table.py from results/{what}.csv -->\n"
    before, _, rest = notes.partition(begin)
    _, end, after = rest.partition(f"\n<!-- end of {what} -->")
    if not end:
        raise ValueError(f"no {begin.strip()} and its end")
    return before + begin + made + end + after


def written(notes: str) -> str:
    """The notebook with all tables of the files."""
    now = read()
    notes = put(notes, "clock", table(told(now)))
    notes = put(notes, "clock-before", before_table(read(BEFORE), now))
    return put(notes, "exchange", exchange_table(read(EXCHANGE_RESULTS)))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has, and go on")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--exchanges", action="store_true", help="of every exchange, to exchange.csv")
    parser.add_argument("--only", help="one shape, e.g. lstm-256-1: its rows are printed and nothing is written")
    parser.add_argument(
        "--write", action="store_true", help="put the tables of the results into the notebook, and no more"
    )
    asked = parser.parse_args(arguments)
    if asked.write:
        NOTES.write_text(written(NOTES.read_text()))
        return
    if asked.only:
        *device, cell, hidden, batch = asked.only.split("-")
        these = [Row(*(device or DEVICES[:1]), cell, int(hidden), int(batch), way) for way in WAYS]
        print(table([made for one in these for made in rows([one])]))
        return
    wanted = EXCHANGE_ROWS if asked.exchanges else ROWS
    output = asked.output or (EXCHANGE_RESULTS if asked.exchanges else RESULTS)
    found = {key_of(one): one for one in read(output)} if asked.resume and output.exists() else {}
    alike = defaultdict(list)
    for one in wanted:
        if one.key not in found:
            alike[one.kernel].append(one)
    # What the emulator keeps of a launch would fill the memory of a process in the end.
    with get_context("spawn").Pool(asked.jobs, maxtasksperchild=8) as pool:
        for made in pool.imap_unordered(rows, alike.values()):
            found |= {key_of(one): one for one in made}
            write([found[one.key] for one in wanted if one.key in found], output)
            print(*map(key_of, made), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
