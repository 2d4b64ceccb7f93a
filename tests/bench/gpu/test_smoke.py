"""The smoke cases are of the kinds that they are named for, and what is wrong with one is seen and told."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu import smoke
from bench.gpu.smoke import SMOKE, VARIANTS, changed, vary
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
    "two dimensions": lambda p: p.backward.tiling.rows > 1,
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
    one, seen = SMOKE[4], {}
    monkeypatch.setattr(smoke, "checked", lambda case, device, **how: seen.setdefault((case, *how.items()), "right"))
    for name in VARIANTS:
        assert vary(name, one, CPU).endswith(": right")
    assert len(seen) == len(VARIANTS), "each differs from all others"


# In the interpreter


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_case_is_right_or_wrong(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan and how exact it is; a wait that ran out; and what is wrong, as the check of the race says it."""
    (case,) = suites.miniatures([replace(SMOKE[4].case, cell=cell)])
    one = replace(SMOKE[4], case=case)
    assert re.match(r"error 0\.\d\d of what is allowed; 1x16 R=1", smoke.run(one, CPU))
    inner = launch.launch_scan

    def spoiled(kernel: Any, *arguments: Any, **options: Any) -> None:
        inner(kernel, *arguments, **options)
        if kernel.__name__ == "scan_backward":
            spoil(options)

    monkeypatch.setattr(launch, "launch_scan", spoiled)
    spoil = lambda options: options["d_gates"][0].mul_(1.1)  # noqa: E731
    with pytest.raises(AssertionError, match=r"training .* I=0 H=12 .*: d x has error"):
        vary("as it is", one, CPU)
    spoil = lambda options: launch._error_word(CPU).fill_(1)  # noqa: E731
    with pytest.raises(RuntimeError, match="wait"):
        smoke.run(one, CPU)
