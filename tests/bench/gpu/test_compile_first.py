"""Kernels that are compiled beforehand, without a GPU, are the very ones that a launch will ask for."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import compile_first, smoke
from bench.gpu.compile_first import Driver, compile_task, fill, tasks
from bench.gpu.smoke import SMOKE, Smoke
from bench.race import suites
from bench.report.results import Case
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner.hardware import DEVICES

pytestmark = pytest.mark.audit

H200 = DEVICES["h200"]
SMALL = Case("smoke", "", "gru", 16, 16, 1, False, 2, 9, "fp16", "training")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache on disk, and at each compilation a device whose kernels nobody holds in memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    devices = itertools.count(100)
    monkeypatch.setattr(Driver, "get_current_device", lambda self: next(devices))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_tasks_are_all_that_the_first_run_launches() -> None:
    found = tasks(H200)
    cases = [one for one in found if isinstance(one, Smoke)]
    asked = [(one.case, one.protocol) for one in cases]
    assert len(set(asked)) == len(asked)
    assert set(asked) == {(one.case, one.protocol) for one in SMOKE} | {(case, "counter") for case in suites.first()}
    assert cases[: len(SMOKE)] == list(SMOKE), "in their order"
    measured = [one for one in found if not isinstance(one, Smoke)]
    assert {(name, n) for name, n, _ in measured if name.startswith("exchange")} == {
        (f"exchange {protocol}", n) for protocol in ("counter", "flags") for n in (4, 16, 64, 128)
    }
    assert {"l2", "shared", "barrier", "launch", "launch cooperative"} <= {name for name, _, _ in measured}


def test_the_exchange_is_that_of_a_launch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's key has it: with another one nothing would be found."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "hardware", lambda _: H200)
    assert launch.exchange_for(cuda) == Exchange(protocol="counter", poll="ptx")
    for protocol in ("counter", "flags"):
        with smoke.changed(cuda, protocol=protocol):
            launched = launch.exchange_for(cuda)
        with compile_first.compiling(H200, protocol, 1):
            assert launch.exchange_for(torch.device("cpu")) == launched == Exchange(protocol=protocol, poll="ptx")


def compiled(**changes: Any) -> int:
    """How many kernels of a small case that is changed so were not in the cache."""
    return len(compile_task(Smoke("small", replace(SMALL, **changes)), H200))


def test_a_second_time_all_is_in_the_cache() -> None:
    """Whatever T is."""
    assert compiled() == 2
    assert compiled() == compiled(steps=1) == 0
    assert compiled(mode="forward") == 1, "it saves nothing"
    assert compiled(mode="forward", marks="resets") == 2, "and one that makes the marks"


BARRIER = ("barrier", 132, 0)


def test_a_measurements_kernels() -> None:
    assert BARRIER in tasks(H200)
    assert len(compile_task(BARRIER, H200)) == 2, "the barriers, and the spin that is ahead of all that is timed"
    assert compile_task(BARRIER, H200) == []


def test_whether_a_stack_is_a_pipeline_is_that_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the two that are run here."""
    stack = next(one for one in SMOKE if one.wanted == "pipeline")
    asked: list[int] = []
    faster, layers = compile_first.Pipeline.faster, []

    def watched(self: compile_first.Pipeline, steps: int, backward: bool) -> bool:
        asked.append(steps)
        return faster(self, steps, backward)

    monkeypatch.setattr(compile_first.Pipeline, "faster", watched)
    monkeypatch.setattr(compile_first.JITFunction, "run", lambda *_, tiling, **__: layers.append(tiling.layers))
    compile_task(replace(stack, case=replace(stack.case, mode="forward")), H200)
    assert asked
    assert set(asked) == {stack.case.steps}
    assert set(layers) == {stack.case.layers}


@pytest.mark.parametrize("marks", ["", "lengths", "resets"])
def test_marks_reach_the_kernels(marks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU rows with lengths would else run as a PackedSequence."""
    seen = []
    monkeypatch.setattr(compile_first.JITFunction, "run", lambda *_, **named: seen.append(named.get("step_data")))
    compiled(mode="forward", marks=marks)
    assert [data[0] is not None for data in seen if data] == [bool(marks)]
    assert len(seen) == 1 + bool(marks), "one makes the marks"


def test_what_cannot_be_compiled_is_said_and_the_others_are(capfd: pytest.CaptureFixture[str]) -> None:
    message, wrong = fill(H200, [("no such thing", 1, 0), BARRIER])
    assert message.startswith("2 kernels in ")
    assert len(wrong) == 1
    assert wrong[0].startswith("no such thing, 1 programs, 0 bytes: ValueError: ")
    assert "barrier, 132 programs, 0 bytes: " in capfd.readouterr().out
    assert any(Path(os.environ["TRITON_CACHE_DIR"]).iterdir())
