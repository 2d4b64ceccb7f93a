"""The smoke cases are of the kinds that they are named for, and what is wrong with one is seen and reported."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grid import concurrent_grid

from bench.gpu import smoke
from bench.gpu.smoke import SMOKE, VARIANTS, changed, observe, simplest, vary
from bench.race import suites
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
    "two dimensions": lambda p: p.backward.tiling.k_parts > 1,
    "several tiles": lambda p: p.forward.tiling.subtiles > 1,
    "streamed": lambda p: p.forward.shares.streamed > 0 and p.backward.shares.streamed > 0,
}


@pytest.mark.parametrize("one", SMOKE, ids=lambda one: one.name)
def test_a_case_is_of_its_kind_on_an_h200(one: smoke.Smoke) -> None:
    case, shape = one.case, CELLS[one.case.cell]
    if one.wanted == "pipeline":
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
    """Each of the cases and launches that are observed differs from all others."""
    one, seen = SMOKE[4], {}
    monkeypatch.setattr(smoke, "observe", lambda case, device: seen.setdefault((case, *how.items()), []))
    monkeypatch.setattr(smoke, "changed", lambda device, **given: contextlib.nullcontext(how.update(given)))
    for name in VARIANTS:
        how: dict[str, Any] = {}
        assert vary(name, one, CPU).endswith(": right")
    assert len(seen) == len(VARIANTS) == 12


# In the interpreter

(MINI,) = suites.miniatures([SMOKE[4].case])


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_nothing_is_seen_where_all_is_right(cell: str) -> None:
    case = replace(MINI, cell=cell)
    assert re.match(r"error 0\.\d\d of what is allowed; 1x16 R=1", smoke.run(replace(SMOKE[4], case=case), CPU))
    assert observe(simplest(case), CPU) == []


def lose(options: dict[str, Any]) -> None:
    options["states"][0][0, 2:-1, :, :, 8:].view(torch.int16).fill_(-1)


def lose_gradients(options: dict[str, Any]) -> None:
    options["d_gates"][1][0, :3].view(torch.int16).fill_(-1)


def lie(options: dict[str, Any]) -> None:
    options["states"][0][0, 3, 1, 0, 5] = 7


def scale_gradients(options: dict[str, Any]) -> None:
    options["d_gates"][0].mul_(1.1)


def give_up(options: dict[str, Any]) -> None:
    for word in launch._errors.values():
        word.fill_(1)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "spoil", "seen"),
    [
        (
            "forward",
            lose,
            r"forward: step 1 was not put by slices \[1\] of 2 \(2 programs, R=1\); 3 steps of 4 lack some",
        ),
        ("forward", lie, r"y: 1 of 144 wrong, the first at t=2, row 1, unit 5: 7 instead of "),
        ("forward", give_up, r"forward: error word 1 \(a wait ran out\)"),
        ("backward", lose_gradients, r"backward, steps from the end,: step 1 was not put by slices \[0\] of 1"),
        ("backward", scale_gradients, r"d x has error"),
    ],
)
def test_what_is_seen_of_a_red_case(
    kernel: str, spoil: Callable[[dict[str, Any]], None], seen: str, monkeypatch: pytest.MonkeyPatch,
    forced: Callable[..., None],
) -> None:  # fmt: skip
    """A program that did not arrive is named, wrong numbers are shown, and the error word is taken back."""
    inner = launch.launch_scan

    def spoiled(of: Any, *arguments: Any, **options: Any) -> None:
        inner(of, *arguments, **options)
        if of.__name__ == f"scan_{kernel}":
            spoil(options)

    monkeypatch.setattr(launch, "launch_scan", spoiled)
    monkeypatch.setattr(launch, "check", lambda: None)
    one = replace(SMOKE[4], case=replace(MINI, mode={"forward": "forward", "backward": "training"}[kernel]))
    together: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if spoil is lose:
        forced(units=8)  # 12 units: two slices, which wait for each other
        together = concurrent_grid()
    with together, pytest.raises(AssertionError, match=rf"I=0 H=12 .*: {seen}"):
        vary("as it is", one, CPU)
    assert not any(int(word) for word in launch._errors.values())


@pytest.mark.interpreter
def test_a_wait_that_ran_out_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all numbers are right."""
    monkeypatch.setattr(smoke, "synchronize", lambda device: launch._error_word(device).fill_(1))
    with pytest.raises(RuntimeError, match="wait"):
        smoke.run(replace(SMOKE[4], case=replace(MINI, mode="forward")), CPU)
