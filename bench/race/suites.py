"""The cases of the race: which stacks, inputs and dtypes, in the order in which a short run should take them.

``bench/workloads`` holds the tables: DeepBench's problem set, FlashRNN's grid, and shapes that real projects train and
serve. The other suites are ours: one question each.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.report.results import DTYPES, MODES, Case, Dtype, Mark, Mode

CELLS = ("lstm", "gru")  # that rivals have, too; rows of other cells are left out
IN_ORDER = ("bf16", "fp16", "tf32", "fp32")  # dtypes, the most telling first
WORKLOADS = Path(__file__).parents[1] / "workloads"


def _rows(name: str) -> list[dict[str, str]]:
    with (WORKLOADS / f"{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["cell"] in CELLS]


def _case(suite: str, name: str, cell: str, hidden: int, batch: int, steps: int, dtype: Dtype, mode: Mode, input: int,
          layers: int = 1, bidirectional: bool = False) -> Case:  # fmt: skip
    return Case(suite, name, cell, input, hidden, layers, bidirectional, batch, steps, dtype, mode)


def deepbench(dtype: Dtype) -> Iterator[Case]:
    """DeepBench's LSTM and GRU rows with the input's product (I = H); its training rows both ways."""
    for row in _rows("deepbench"):
        hidden, batch, steps = int(row["hidden"]), int(row["batch"]), int(row["steps"])
        for mode in MODES if row["set"] == "training" else MODES[:1]:
            yield _case("deepbench", row["set"], row["cell"], hidden, batch, steps, dtype, mode, hidden)


def deepbench_skip_input(dtype: Dtype) -> Iterator[Case]:
    """The same rows by DeepBench's own protocol: no product of the input."""
    for case in deepbench(dtype):
        yield replace(case, suite="deepbench_skip_input", input=0)


def flashrnn(dtype: Dtype) -> Iterator[Case]:
    """The only published grid on Hopper."""
    for row in _rows("flashrnn"):
        hidden, batch, steps = int(row["hidden"]), int(row["batch"]), int(row["steps"])
        for mode in MODES:
            yield _case("flashrnn", row["set"], row["cell"], hidden, batch, steps, dtype, mode, hidden)


def models(dtype: Dtype) -> Iterator[Case]:
    """Recurrent parts of real models, padded and without resets."""
    for row in _rows("models"):
        hidden, batch, steps = int(row["hidden"]), int(row["batch"]), int(row["steps"])
        shape = int(row["input"]), int(row["layers"]), row["bidirectional"] == "1"
        yield _case("models", row["model"], row["cell"], hidden, batch, steps, dtype, "training", *shape)


def inference(dtype: Dtype) -> Iterator[Case]:
    """Latency: a few rows of batch."""
    for hidden in (256, 512, 1024):
        for batch in (1, 2, 4):
            for cell in CELLS:
                yield _case("inference", f"B={batch}", cell, hidden, batch, 256, dtype, "forward", hidden)


def short(dtype: Dtype) -> Iterator[Case]:
    """Where launching is what costs: one step and a few."""
    for steps in (1, 8):
        for mode in MODES:
            for cell in CELLS:
                yield _case("short", f"T={steps}", cell, 256, 16, steps, dtype, mode, 256)


def directions(dtype: Dtype) -> Iterator[Case]:
    """Two directions against one."""
    for hidden in (256, 512, 1024):
        for bidirectional in (False, True):
            for cell in CELLS:
                name = "two" if bidirectional else "one"
                yield _case("directions", name, cell, hidden, 16, 256, dtype, "training", hidden, 1, bidirectional)


def stacked(dtype: Dtype) -> Iterator[Case]:
    """Several layers against one."""
    for hidden in (256, 512):
        for layers in (1, 2, 4):
            for cell in CELLS:
                yield _case("stacked", f"L={layers}", cell, hidden, 16, 256, dtype, "training", hidden, layers)


def first() -> list[Case]:
    """What the first minutes on a GPU measure: rows of the other suites, and two that have marks; most telling first.

    One layer of H=512 is there for what a second direction and three more layers cost, H=1024 with B=64 for what
    lengths and resets do.
    """

    def row(cell: str, dtype: Dtype, mode: Mode, hidden: int, batch: int, steps: int, layers: int = 1,
            bidirectional: bool = False, marks: Mark = "") -> Case:  # fmt: skip
        name = marks or f"H={hidden}"
        case = _case("first", name, cell, hidden, batch, steps, dtype, mode, hidden, layers, bidirectional)
        return replace(case, marks=marks)

    return [
        row("lstm", "fp16", "forward", 768, 16, 1024),
        row("lstm", "fp16", "training", 768, 16, 1024),
        row("lstm", "bf16", "training", 1024, 64, 256),
        row("lstm", "bf16", "forward", 1024, 1, 256),
        row("lstm", "bf16", "forward", 768, 16, 1024),
        row("lstm", "bf16", "training", 768, 16, 1024),
        row("lstm", "bf16", "training", 512, 16, 256),
        row("lstm", "bf16", "training", 512, 16, 256, layers=4),
        row("lstm", "bf16", "training", 512, 16, 256, bidirectional=True),
        row("gru", "bf16", "forward", 512, 2, 256),
        row("lstm", "bf16", "forward", 256, 1, 256),
        row("lstm", "bf16", "forward", 256, 16, 1),
        row("lstm", "fp32", "training", 512, 16, 256),
        row("lstm", "bf16", "training", 1024, 64, 256, marks="resets"),
        row("lstm", "bf16", "training", 1024, 64, 256, marks="lengths"),
    ]


SUITES = {
    "flashrnn": flashrnn,
    "models": models,
    "inference": inference,
    "directions": directions,
    "stacked": stacked,
    "short": short,
    "deepbench": deepbench,
    "deepbench_skip_input": deepbench_skip_input,
}


def cases(suites: Iterable[str] = tuple(SUITES), dtypes: Iterable[Dtype] = DTYPES) -> list[Case]:
    """All cases of some suites and dtypes, equal work once; all suites in the first dtype come first."""
    suites = list(suites)
    found: dict[str, Case] = {}
    for dtype in dtypes:
        for name in suites:
            for case in SUITES[name](dtype):
                found.setdefault(case.key, case)
    return list(found.values())


def miniatures(cases: Iterable[Case]) -> list[Case]:
    """The same cases at sizes that the interpreter can run, equal work once: for rehearsals."""
    found: dict[str, Case] = {}
    for case in cases:
        mini = replace(case, input=min(case.input, 5), hidden=12, layers=min(case.layers, 2), batch=3, steps=4)
        found.setdefault(mini.key, mini)
    return list(found.values())
