"""What the cost model is fitted to: cycles per time step, by the clock, of compiled kernels of many plans.

PYTHONPATH=.:tests python tests/helpers/clock_sample.py [--again] [--seconds N]

adds to bench/results/clock-sample.csv what of the sample is not there yet, or with --again clocks the choices of that
file anew (2 to 10 s a kernel on one core, 3 GB; both go on where they were stopped). The sample: of every shape the
choice of today's plan, the best of several batch tiles and of one slice, and some drawn at random from all that the
planner weighs. Without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import clock_table

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import hardware, plan
from persistrnn.kernels.planner.choices import choices
from persistrnn.kernels.planner.plan import Pass
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice

RESULTS = clock_table.ROOT / "bench" / "results" / "clock-sample.csv"
PATIENCE = 40  # seconds for one kernel
DRAWN = 8  # choices of a shape at most, that of the plan among them


@dataclass(frozen=True)
class Kernel:
    """One pass of one layer in one choice."""

    device: str
    dtype: str
    cell: str
    hidden: int
    batch: int
    way: str
    choice: Choice

    @property
    def problem(self) -> Problem:
        return Problem(CELLS[self.cell], self.hidden, self.batch, 1, self.dtype, hardware.named(self.device))

    @property
    def part(self) -> Pass:
        """With the model's prediction."""
        found = plan.finish(self.problem, self.way == "backward", self.choice, strict=False)
        if found is None:
            raise ValueError(f"{self} does not fit any more")
        return found

    def row(self) -> dict[str, object]:
        found = asdict(self)
        choice = found.pop("choice")
        return found | {name: choice[name] for name in CHOSEN}


# Streams through a ring are not in the sample (``understood``).
CHOSEN = [f.name for f in fields(Choice) if f.name != "ring"]


def kernel_of(row: dict[str, str]) -> Kernel:
    choice = Choice(**{name: int(row[name]) for name in CHOSEN})
    sizes = {name: int(row[name]) for name in ("hidden", "batch")}
    return Kernel(**{name: row[name] for name in ("device", "dtype", "cell", "way")}, **sizes, choice=choice)


FIELDS = [f.name for f in fields(Kernel) if f.name != "choice"] + CHOSEN
FIELDS += ["cycles", "barriers"]

# (dtypes, cells, H, B) of both devices and passes.
SHAPES = [
    (("bf16",), ("lstm", "gru"), (32, 128, 256, 512, 768, 1024, 2048), (1, 16, 64)),
    (("bf16",), ("lstm", "gru"), (320, 1000, 1536), (4, 32)),
    (("bf16",), ("lstm", "gru"), (16, 64), (1, 16, 64)),
    (("bf16",), ("lstm", "gru"), (512, 1024, 1536, 2048), (32, 128)),
    (("fp16", "tf32"), ("lstm", "gru"), (96, 256, 512, 1024), (1, 32)),
    (("bf16",), ("rnn_tanh", "peephole", "coupled", "mgu", "janet", "slstm"), (64, 256, 512, 1024), (16,)),
    (("tf32",), ("rnn_relu", "mgu", "slstm"), (256, 640), (8,)),
    (("fp32",), ("lstm", "gru"), (64, 256), (8,)),
    (("bf16",), ("gru_reset_before", "layer_norm_lstm", "layer_norm_gru"), (256, 512, 1024), (16,)),
]


@cache
def at_random(problem: Problem, backward: bool) -> list[Choice]:
    every = [c for c in choices(problem, backward) if plan.finish(problem, backward, c)]
    return random.Random(str(problem)).sample(every, min(DRAWN - 1, len(every)))


@cache
def of_kinds(problem: Problem, backward: bool) -> list[Choice]:
    """What a sample at random has too few of: the best, by the model, of several batch tiles and of one slice."""
    every = [p for c in choices(problem, backward) if c.blocks == 1 and (p := plan.finish(problem, backward, c))]
    kinds = [p for p in every if p.choice.subtiles > 1], [p for p in every if p.tiling.slices == 1]
    return [min(parts, key=lambda part: part.predicted).choice for parts in kinds if parts]


def understood(one: Kernel) -> bool:
    """By the fit, whose terms are not those of a stream through a ring; and of a size that the clock soon gets
    through."""
    # Of one slice in full float32 the product is 2 to 4 times as fast as in several, and that of sm_90's forward is not
    # (LSTM 64, B=8: 11,685 cycles, on sm_80 5,597): one number for both is the slower one.
    full = one.dtype == "fp32" and one.choice.units >= one.hidden
    return not full and one.choice.ring == 0 and one.part.streamed <= 256 * 1024


def sample() -> Iterator[Kernel]:
    """The plans first, then ``of_kinds``, then one more of each shape in turn; shapes in one order of chance."""
    shapes = [
        (device, dtype, cell, hidden, batch, way)
        for dtypes, cells, sizes, batches in SHAPES
        for device in ("h200", "a100")
        for dtype in dtypes
        for cell in cells
        for hidden in sizes
        for batch in batches
        for way in ("forward", "backward")
    ]
    random.Random(0).shuffle(shapes)
    for number in range(DRAWN + 1):
        for shape in shapes:
            device, dtype, cell, hidden, batch, way = shape
            problem = Problem(CELLS[cell], hidden, batch, 1, dtype, hardware.named(device))
            backward = way == "backward"
            if number == 0:
                found = plan.best(plan.of_class(problem), backward)
                drawn = [found] if found else []
            elif number == 1:
                drawn = of_kinds(problem, backward)
            else:
                drawn = at_random(problem, backward)[number - 2 : number - 1]
            yield from (one for one in (Kernel(*shape, choice) for choice in drawn) if understood(one))


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {PATIENCE} seconds")


def clocked(one: Kernel) -> dict[str, object] | str:
    """Its row; why there is none."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(PATIENCE)
    try:
        step = clock_table.clocked(one.problem, one.part, one.way == "backward")
    except Exception as failed:  # of one kernel, which the sample can do without
        return f"{type(failed).__name__}: {str(failed)[:200]}"
    finally:
        signal.alarm(0)
    return one.row() | {"cycles": round(step.cycles), "barriers": step.barriers}


def read(file: Path = RESULTS) -> dict[Kernel, dict[str, str]]:
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        return {kernel_of(row): row for row in csv.DictReader(lines)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="the choices of the file anew, instead of more of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no kernel after so long")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    wanted, file = sample(), asked.output
    if asked.again:
        wanted, file = iter(read(asked.output)), asked.output.with_suffix(".again.csv")
    there, ends = set(read(file)), time.monotonic() + asked.seconds
    begins = not there
    with file.open("a", newline="") as lines, get_context("spawn").Pool(1, maxtasksperchild=40) as pool:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        if begins:
            writer.writeheader()
        todo = (one for one in wanted if one not in there)
        for one in todo:
            if one in there:
                continue
            there.add(one)
            if time.monotonic() > ends:
                print(f"{file} is not whole", file=sys.stderr)
                return
            found = pool.apply(partial(clocked, one))
            if isinstance(found, str):
                print(one, found, file=sys.stderr, flush=True)
            else:
                writer.writerow(found)
                lines.flush()
    if asked.again:
        file.replace(asked.output)


if __name__ == "__main__":
    main(sys.argv[1:])
