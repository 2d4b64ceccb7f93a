"""The planner's choices against each other: which are run, in which order, and that none is timed unchecked."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from forced import tilings
from torch import Tensor

from bench.gpu import tune
from bench.race.engine import Race
from bench.report.results import Case, Tuning
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import plan
from persistrnn.kernels.planner.hardware import INTERPRETER, named
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
    kinds = {(c.units, c.rows, c.batch_tile, c.subtiles, c.splits) for c in (part.choice for part in found)}
    assert len(kinds) == len({tune.words(part.choice) for part in found}) == len(found)


def test_the_planners_choice_is_first_even_if_another_is_predicted_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = next(tune.cases())
    planned = plan.plan_layer(Problem(CELLS[case.cell], case.hidden, case.batch, 1, case.dtype, H200))
    fastest, _, slower, *_ = tune.ranked(case, False, H200)
    monkeypatch.setattr(plan, "plan_layer", lambda *_: replace(planned, forward=slower))
    found = tune.ranked(case, False, H200)
    assert found[:2] == [slower, fastest]
    assert found.count(slower) == 1


def test_words_tell_choices_apart() -> None:
    """They are the key by which a choice is not run twice."""
    first = tune.ranked(next(tune.cases()), False, H200)[0].choice
    for name in ("units", "rows", "batch_tile", "subtiles", "splits", "warps", "burst", "in_registers", "in_shared"):
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
def test_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice once, really run, the planner's marked; what is done is not repeated, what is late is named."""
    run: list[tuple[str, int]] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, counted(name, getattr(launch, name), run))
    found: list[Tuning] = []
    lines: list[str] = []
    assert tune.tune(found.append, set(), CPU, lines.append, None) == []
    assert [(t.backward, t.planned, t.case, t.predicted) for t in found] == [
        (False, True, TINY, 7.5), (False, False, TINY, 7.5), (True, True, TINY, 7.5), (True, False, TINY, 7.5),
    ]  # fmt: skip
    assert all(t.microseconds > 0 for t in found)
    assert len(lines) == 4
    assert "us per step" in lines[0]
    tiles = {name: [tile for what, tile in run if what == name] for name in ("forward", "backward")}
    assert set(tiles["forward"]) == set(tiles["backward"]) == {16, 32}, "both choices have run"

    done = {(t.case.key, t.backward, t.choice) for t in found}
    again: list[Tuning] = []
    assert tune.tune(again.append, done - {(TINY.key, True, found[3].choice)}, CPU, lines.append, None) == []
    assert [(t.backward, t.planned, t.choice) for t in again] == [(True, False, found[3].choice)]
    left = tune.tune(again.append, {(TINY.key, False, found[0].choice)}, CPU, lines.append, 0.0)
    assert left == [f"{TINY.key} {'backward' if t.backward else 'forward'} {t.choice}" for t in found[1:]]
    assert len(again) == 1


def counted(name: str, function: Callable[..., object], run: list[tuple[str, int]]) -> Callable[..., object]:
    def call(cell: object, first: Tensor | tuple[Tensor, ...], *others: object, **options: object) -> object:
        dtype = (first if isinstance(first, Tensor) else first[0]).dtype
        made = launch.choose(cell, TINY.hidden, TINY.batch, 1, dtype, "ieee", CPU)
        run.append((name, getattr(made, name).tiling.batch_tile))
        return function(cell, first, *others, **options)

    return call


@pytest.mark.interpreter
@pytest.mark.usefixtures("choices")
def test_a_wrong_choice_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = launch.backward

    def wrong(*arguments: object, **options: object) -> Gradients:
        found = backward(*arguments, **options)
        found.dx_gates.mul_(1.01)
        return found

    monkeypatch.setattr(launch, "backward", wrong)
    found: list[Tuning] = []
    with pytest.raises(AssertionError, match=r"training lstm fp32 I=0 H=10 .* with U=16 R=1 BB=16x1 .*: d x has error"):
        tune.tune(found.append, set(), CPU, print, None)
    assert found == []


@pytest.mark.interpreter
def test_the_plan_is_as_before_afterwards() -> None:
    planned = launch.choose
    race = Race(TINY, CPU)
    assert tune.run(race, forced(True, units=16), True, CPU) > 0
    assert launch.choose is planned
    assert launch.hardware(CPU) is INTERPRETER
