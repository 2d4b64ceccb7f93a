"""The planner against the device: for some shapes, the choices that it ranks highest are run, and timed per step.

What comes out says whether the cost model ranks rightly, and where it does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.race import arms, timing
from bench.race.engine import Race
from bench.report.results import Case, Dtype, Tuning
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import plan as planning
from persistrnn.kernels.planner.choices import choices
from persistrnn.kernels.planner.hardware import Hardware
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice
from persistrnn.kernels.tensors import Weights

STEPS = 256
MOST = 6  # choices per shape and pass
ROUNDS = 9
SHAPES = [
    ("lstm", 256, 16), ("lstm", 512, 16), ("lstm", 768, 16), ("lstm", 1024, 1), ("lstm", 1024, 16), ("lstm", 1024, 64),
    ("lstm", 1024, 128), ("lstm", 2048, 32), ("lstm", 128, 256), ("lstm", 4096, 16), ("gru", 1024, 16),
    ("gru", 1024, 64), ("gru", 2048, 32),
]  # fmt: skip


def cases(dtype: Dtype = "bf16") -> Iterator[Case]:
    for cell, hidden, batch in SHAPES:
        yield Case("tune", f"H={hidden}", cell, 0, hidden, 1, False, batch, STEPS, dtype, "training")


def ranked(case: Case, backward: bool, hardware: Hardware) -> list[planning.Pass]:
    """The best passes by prediction, of different slices, splits or batch tiles: the planner's first."""
    problem = Problem(CELLS[case.cell], case.hidden, case.batch, 1, case.dtype, hardware)
    found = planning.plan_layer(problem)
    first = found.backward if backward else found.forward
    finished = (planning.finish(problem, backward, choice) for choice in choices(problem, backward))
    passes = [part for part in finished if part is not None]
    kinds = {_kind(first.choice): first}
    for part in sorted(passes, key=lambda part: part.predicted):
        kinds.setdefault(_kind(part.choice), part)
    return list(kinds.values())[:MOST]


def _kind(choice: Choice) -> tuple[int, ...]:
    return choice.units, choice.k_parts, choice.batch_tile, choice.subtiles, choice.splits


def words(choice: Choice) -> str:
    return (
        f"U={choice.units} R={choice.k_parts} BB={choice.batch_tile}x{choice.subtiles} P={choice.splits} "
        f"warps={choice.warps} burst={choice.burst} registers={choice.in_registers} shared={choice.in_shared}"
    )


def items(device: torch.device) -> Iterator[tuple[str, Callable[[], Tuning]]]:
    """Names of what there is to run, and what runs it; the names tell choices apart."""
    hardware = launch.hardware(device)
    present: list[Race] = []

    def take(case: Case, backward: bool, part: planning.Pass, planned: bool) -> Tuning:
        if not present or present[0].case != case:
            present.clear()  # its memory first
            present.append(Race(case, device))
        return Tuning(case, backward, words(part.choice), planned, part.predicted, run(present[0], part, backward))

    for case in cases():
        for backward in (False, True):
            parts = ranked(case, backward, hardware)
            for part in parts:
                name = f"{case.key} {'backward' if backward else 'forward'} {words(part.choice)}"
                yield name, partial(take, case, backward, part, part is parts[0])


def counted(case: Case, hardware: Hardware) -> str:
    forward, backward = (len(ranked(case, backward, hardware)) for backward in (False, True))
    return f"{forward} choices forward, {backward} backward"


def run(race: Race, part: planning.Pass, backward: bool) -> float:
    """Microseconds per step of one pass with a forced choice, checked first.

    Raises:
        AssertionError: the choice computes something wrong.
    """
    planned, case = launch.choose, race.case

    def choose(*arguments: Any) -> planning.Plan:
        found = planned(*arguments)
        return replace(found, backward=part) if backward else replace(found, forward=part)

    with mock.patch.object(launch, "choose", choose), arms.precision(case.dtype):
        check = race.check("persistrnn", race.runner("persistrnn"))
        if not check.ok:
            raise AssertionError(f"{case.key} with {words(part.choice)}: {check.message}")
        call = scan(race, backward)
        call()
        calls = timing.per_round(timing.seconds_of_rounds(call, 1, 1)[0])
        seconds = statistics.median(timing.seconds_of_rounds(call, ROUNDS, calls))
    return seconds * 1e6 / case.steps


def scan(race: Race, backward: bool) -> Callable[[], object]:
    """One pass over time and nothing around it."""
    case, cell = race.case, CELLS[race.case.cell]
    x = race.truth.x.unsqueeze(2)
    weights = Weights(*(race.truth.parameters[f"{name}_l0"][None].to(x) for name in ("weight_hh", "bias_hh")))
    states = [x.new_zeros(1, case.batch, case.hidden)] * cell.states
    asked = "tf32" if case.dtype == "tf32" else "ieee"
    kept = launch.forward(cell, x, weights, states, asked, save=True)
    if not backward:
        return lambda: launch.forward(cell, x, weights, states, asked, save=True)
    dy = race.truth.dy.unsqueeze(2)
    return lambda: launch.backward(cell, [dy], states, weights.weight_hh, None, kept, asked)
