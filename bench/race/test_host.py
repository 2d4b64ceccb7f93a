"""What a CPU can measure, and all that it can: Python around the layers, the plan, the compiler. No kernel's speed.

pytest bench/race --benchmark-only
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import persistrnn
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect.audit import Case, compile_pass, planned
from persistrnn.kernels.planner import plan as planning
from persistrnn.kernels.planner.hardware import named
from persistrnn.kernels.planner.problem import Problem

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

HIDDEN, STEPS, BATCH = 128, 64, 16
# The most that our Python may add to a call that repeats one, in calls of torch.nn's own layer timed in turn with it.
# Seen: 0.03 (LSTM) to 0.07 (GRU); a call that is validated and decided in full adds one or more.
OF_A_STEP = 0.25
# The most that a plan may take, in compilations of one kernel timed beside it: it comes before two of them.
OF_A_COMPILATION = 0.02

MODULES = {"lstm": (persistrnn.LSTM, torch.nn.LSTM), "gru": (persistrnn.GRU, torch.nn.GRU)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a matrix product make a call's time a matter of luck."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(module: torch.nn.Module, x: torch.Tensor, training: bool) -> None:
    if training:
        torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    else:
        with torch.no_grad():
            module(x)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("whose", ["persistrnn", "torch"])
@pytest.mark.parametrize("cell", MODULES)
def test_layer_on_torchs_own_path(benchmark: BenchmarkFixture, cell: str, whose: str, training: bool) -> None:
    """H=128, T=64 on the CPU: both run the same operators of torch's; the difference is our Python."""
    ours, theirs = MODULES[cell]
    module = (ours if whose == "persistrnn" else theirs)(HIDDEN, HIDDEN)
    x = torch.randn(STEPS, BATCH, HIDDEN)
    benchmark.group = f"CPU: {cell} {'training' if training else 'forward'}, torch's own path"
    benchmark.extra_info["what"] = "host time of torch's path on a CPU; says nothing about the kernels"
    benchmark(call, module, x, training)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("cell", MODULES)
def test_overhead_of_our_python(benchmark: BenchmarkFixture, cell: str, training: bool) -> None:
    """The difference itself. It does not depend on the input's size, so that it is read where little hides it: one step
    of one row."""
    layers, step = [cls(HIDDEN, HIDDEN) for cls in MODULES[cell]], torch.randn(1, 1, HIDDEN)
    found: list[list[float]] = []

    def seconds(module: torch.nn.Module) -> float:
        start = time.perf_counter()
        module(step)
        return (time.perf_counter() - start) * 1e6

    benchmark.group = f"CPU: {cell}, both layers in turn, one step"
    with torch.set_grad_enabled(training):
        benchmark.pedantic(lambda: found.append([*map(seconds, layers)]), rounds=1500, warmup_rounds=100)
    ours, theirs = map(statistics.median, zip(*found[100:], strict=True))
    benchmark.extra_info |= {"overhead_us": ours - theirs, "of_a_step": ours / theirs - 1}
    assert ours / theirs - 1 < OF_A_STEP, f"{ours:.1f} us against {theirs:.1f}"


@pytest.fixture(scope="module")
def compilation(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the compiler takes for a small kernel; the quickest of three."""
    case = Case("lstm", False, "bf16", 128, "sm_90")
    part, times = planned(case), []
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
            start = time.perf_counter()
            compile_pass(case, part)
            times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("hidden", [64, 256, 1024, 1840, 4096])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_plan(benchmark: BenchmarkFixture, compilation: float, cell: str, hidden: int) -> None:
    """Pure Python, both passes, nothing cached."""

    def forget() -> None:
        planning.plan_layer.cache_clear()
        planning.best.cache_clear()

    problem = Problem(CELLS[cell], hidden, 64, 1, "bf16", named("h200"))
    benchmark.group = "CPU: plan"
    benchmark.pedantic(planning.plan_layer, (problem,), setup=forget, rounds=15)
    assert benchmark.stats is not None
    share = min(benchmark.stats.stats.data) / compilation
    benchmark.extra_info["of_a_compilation"] = share
    assert share < OF_A_COMPILATION, f"{share:.2%} of {compilation:.2f} s"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 128), ("lstm", 1024), ("gru", 2048)])
def test_compile(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cell: str, hidden: int, backward: bool
) -> None:
    """One kernel for sm_90, from source to machine code; the first call in a process pays this twice at most."""
    case = Case(cell, backward, "bf16", hidden, "sm_90")
    part = planned(case)
    folders = iter(range(1000))

    def forget() -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / str(next(folders))))

    benchmark.group = "CPU: compile one kernel"
    benchmark.pedantic(compile_pass, (case, part), setup=forget, rounds=2)
