"""The smoke cases are of the kinds that they are named for, and what is wrong with one is seen and told."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu import smoke
from bench.gpu.smoke import SMOKE, VARIANTS, changed, observe, simplest, vary
from bench.race import suites
from bench.report.results import Case
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.pipeline import plan_pipeline
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem

CPU = torch.device("cpu")
KINDS: dict[str, Callable[[Any], bool]] = {
    "one slice": lambda p: p.forward.tiling.slices == p.backward.tiling.slices == 1,
    "several slices": lambda p: p.forward.tiling.slices > 1 and p.backward.tiling.slices > 1,
    "two dimensions": lambda p: p.backward.tiling.rows > 1,
    "several tiles": lambda p: p.forward.tiling.subtiles > 1,
    "streamed": lambda p: p.forward.shares.streamed > 0 and p.backward.shares.streamed > 0,
}


@pytest.mark.parametrize("one", SMOKE, ids=lambda one: one.name)
def test_a_case_is_of_its_kind_on_an_h200(one: smoke.Smoke) -> None:
    case, shape = one.case, CELLS[one.case.cell]
    if one.wanted == "wave":
        found = plan_pipeline(Problem(shape, case.hidden, case.batch, 1, case.dtype, DEVICES["h200"]), case.layers)
        assert found is not None
        assert found.faster(case.steps, case.mode == "training")
        return
    directions = 2 if case.bidirectional else 1
    found = plan_layer(Problem(shape, case.hidden, case.batch, directions, case.dtype, DEVICES["h200"]))
    assert KINDS[one.wanted](found), str(found)


def test_names_are_of_one_case_each_and_the_simplest_come_first() -> None:
    assert len({one.name for one in SMOKE}) == len(SMOKE) == 16
    assert [one.name for one in SMOKE if one.name in smoke.FIRST] == list(smoke.FIRST)
    assert SMOKE[0].case.mode == "forward"


# What launches differ in


def test_changes_reach_the_launch_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "hardware", lambda _: DEVICES["h200"])
    part = plan_layer(Problem(CELLS["lstm"], 256, 16, 1, "fp16", DEVICES["h200"])).forward
    usual = launch.options(part, "sm_90")
    assert usual["launch_cooperative_grid"]
    assert "maxnreg" in usual
    with changed(device, cooperative=False):
        assert launch.options(part, "sm_90") == usual | {"launch_cooperative_grid": False}
    with changed(device, maxnreg=False):
        assert launch.options(part, "sm_90") == {n: v for n, v in usual.items() if n != "maxnreg"}
    with changed(device, poll="atomic", spin_limit=5, protocol="flags"):
        assert launch.exchange_for(device) == Exchange("flags", "atomic", 5)
        assert launch.options(part, "sm_90") == usual
    with changed(CPU, word_on_device=True):
        assert launch._error_word(CPU).device == CPU
    assert launch.options(part, "sm_90") == usual
    assert launch.exchange_for(device) == Exchange()
    assert CPU not in launch._errors or launch._errors[CPU].device == CPU


def test_every_variant_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = SMOKE[4], {}

    def watch(case: Case, device: torch.device) -> list[str]:
        part = plan_layer(Problem(CELLS["lstm"], 256, 16, 1, "fp16", DEVICES["h200"])).forward
        exchange = launch.exchange_for(torch.device("cuda", 0))
        word = launch._errors.get(device)
        seen[name] = case, exchange, tuple(launch.options(part, "sm_90").items()), word is None
        return []

    monkeypatch.setattr(smoke, "observe", watch)
    monkeypatch.setattr(launch, "exchange_for", lambda device: Exchange())  # a GPU's
    for name in VARIANTS:
        launch._errors.pop(CPU, None)
        assert vary(name, one, CPU).endswith(": right")
    assert len(set(seen.values())) == len(VARIANTS), "each differs from all others"


# What is seen of a red case (in the interpreter)

MINI = suites.miniatures([SMOKE[4].case])[0]


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_nothing_is_seen_where_all_is_right(cell: str, mode: str) -> None:
    assert observe(simplest(replace(MINI, cell=cell, mode=mode)), CPU) == []


def touched(monkeypatch: pytest.MonkeyPatch, which: str, change: Callable[[dict[str, Any]], None]) -> None:
    """What a pass has written is changed afterwards."""
    inner = launch.launch_scan

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        inner(kernel, *arguments, **options)
        if kernel.__name__ == which:
            change(options)

    monkeypatch.setattr(launch, "launch_scan", run)


@pytest.mark.interpreter
def test_a_program_that_did_not_arrive_is_named(monkeypatch: pytest.MonkeyPatch, forced: Callable[..., None]) -> None:
    forced(units=8)  # 12 units: two slices, which wait for each other
    from grid import concurrent_grid

    def lose(options: dict[str, Any]) -> None:
        options["states"][0][0, 2:-1, :, :, 8:].view(torch.int16).fill_(-1)

    touched(monkeypatch, "scan_forward", lose)
    with concurrent_grid():
        (seen,) = observe(simplest(replace(MINI, mode="forward")), CPU)
    assert seen == "forward: step 1 was not put by columns [1] of 2 (2 programs, R=1); 3 steps of 4 lack some"


@pytest.mark.interpreter
def test_a_program_of_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(options: dict[str, Any]) -> None:
        options["d_gates"][1][0, :3].view(torch.int16).fill_(-1)

    touched(monkeypatch, "scan_backward", lose)
    (seen,) = observe(simplest(MINI), CPU)
    assert seen.startswith("backward, steps from the end,: step 1 was not put by columns [0] of 1")


@pytest.mark.interpreter
def test_wrong_numbers_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(options: dict[str, Any]) -> None:
        options["states"][0][0, 3, 1, 0, 5] = 7

    touched(monkeypatch, "scan_forward", lie)
    (seen,) = observe(simplest(replace(MINI, mode="forward")), CPU)
    assert seen.startswith("y: 1 of 144 wrong, the first at t=2, row 1, unit 5: 7 instead of ")


@pytest.mark.interpreter
def test_wrong_gradients_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    touched(monkeypatch, "scan_backward", lambda options: options["d_gates"][0].mul_(1.1))
    with pytest.raises(AssertionError, match="d x has error"):
        vary("as it is", replace(SMOKE[4], case=MINI), CPU)


@pytest.mark.interpreter
def test_the_error_word_is_told_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def gave_up(options: dict[str, Any]) -> None:
        for word in launch._errors.values():
            word.fill_(1)

    monkeypatch.setattr(launch, "check", lambda: None)
    touched(monkeypatch, "scan_forward", gave_up)
    (seen,) = observe(simplest(replace(MINI, mode="forward")), CPU)
    assert seen == "forward: error word 1 (a wait ran out)"
    assert not any(int(word) for word in launch._errors.values())
