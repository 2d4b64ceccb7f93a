"""The planner's choices against each other: which are run, in which order, and that none is timed unchecked."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from forced import tilings

from bench.gpu import tune
from bench.report.results import Case
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import plan
from persistrnn.kernels.planner.hardware import named
from persistrnn.kernels.planner.plan import Pass
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.tensors import Gradients

CPU = torch.device("cpu")
H200 = named("h200")
TINY = Case("tune", "H=10", "lstm", 0, 10, 1, False, 2, 3, "fp32", "training")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "case", [next(tune.cases()), list(tune.cases())[3], list(tune.cases())[8]], ids=lambda c: c.key
)
def test_ranked(case: Case, backward: bool) -> None:
    """The planner's own choice, then others of another kind by prediction."""
    planned = plan.plan_layer(Problem(CELLS[case.cell], case.hidden, case.batch, 1, case.dtype, H200))
    found = tune.ranked(case, backward, H200)
    assert found[0] == (planned.backward if backward else planned.forward)
    assert 1 < len(found) <= tune.MOST
    others = [part.predicted for part in found[1:]]
    assert others == sorted(others)
    kinds = {(c.units, c.k_parts, c.batch_tile, c.subtiles, c.splits) for c in (part.choice for part in found)}
    assert len(kinds) == len({tune.words(part.choice) for part in found}) == len(found)


def test_words_tell_choices_apart() -> None:
    """They are the key by which a choice is not run twice."""
    first = tune.ranked(next(tune.cases()), False, H200)[0].choice
    for name in ("units", "k_parts", "batch_tile", "subtiles", "splits", "warps", "burst", "in_registers", "in_shared"):
        assert tune.words(replace(first, **{name: getattr(first, name) + 1})) != tune.words(first), name


# In the interpreter


def forced(backward: bool, **chosen: str | int) -> Pass:
    choice, tiling = tilings("lstm", TINY.hidden, **chosen)[backward]
    return Pass(tiling, choice, 1, 1, 0, 0, 0, 0, 0, None, None)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case with two choices for each pass, on one program each."""
    alone = [{"units": 16}, {"units": 16, "batch_tile": 32}]
    monkeypatch.setattr(tune, "cases", lambda: iter([TINY]))
    monkeypatch.setattr(tune, "ranked", lambda case, backward, hardware: [forced(backward, **c) for c in alone])
    monkeypatch.setattr(Pass, "predicted", 7.5)
    monkeypatch.setattr(tune, "ROUNDS", 1)


@pytest.mark.interpreter
@pytest.mark.usefixtures("choices")
def test_each_choice_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's is marked, and afterwards the plan is as before."""
    run: list[tuple[bool, int]] = []
    scan, planned = launch.launch_scan, launch.choose

    def watched(kernel: Any, part: Pass, *arguments: Any, **options: Any) -> None:
        run.append((kernel.__name__ == "scan_backward", part.tiling.batch_tile))
        scan(kernel, part, *arguments, **options)

    monkeypatch.setattr(launch, "launch_scan", watched)
    expected = [(backward, tile) for backward in (False, True) for tile in (16, 32)]
    for (name, take), (backward, tile) in zip(tune.items(CPU), expected, strict=True):
        run.clear()
        found = take()
        assert (found.backward, found.planned, found.case, found.predicted) == (backward, tile == 16, TINY, 7.5)
        assert found.microseconds > 0
        assert name == f"{TINY.key} {'backward' if backward else 'forward'} {found.choice}"
        assert (backward, tile) in run
    assert launch.choose is planned


@pytest.mark.interpreter
@pytest.mark.usefixtures("choices")
def test_a_wrong_choice_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = launch.backward

    def wrong(*arguments: object, **options: object) -> Gradients:
        found = backward(*arguments, **options)
        found.dx_gates.mul_(1.01)
        return found

    monkeypatch.setattr(launch, "backward", wrong)
    take = next(take for name, take in tune.items(CPU) if " backward " in name)
    with pytest.raises(AssertionError, match=r"training lstm fp32 I=0 H=10 .* with U=16 R=1 BB=16x1 .*: d x has error"):
        take()
