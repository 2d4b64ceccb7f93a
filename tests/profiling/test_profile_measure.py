"""What is measured for a profile: time, memory, what does not fit, what is traced; and the plan beside it."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import persistrnn
from persistrnn.kernels.cells import BUILT_IN
from persistrnn.kernels.planner import memory
from persistrnn.profiling import measure as measuring
from persistrnn.profiling import record, tables
from persistrnn.profiling.advice import advice
from persistrnn.profiling.measure import measure
from persistrnn.profiling.record import NO_KERNELS, UNTRACED, Machine, Point, Profile, Settings
from persistrnn.profiling.subject import OURS, TORCH, Built, Sizes, SubjectError, calls, of_callable, on_torch
from persistrnn.profiling.trace import Iteration

SIZES = Sizes("lstm", 6, 8, 2, batch=3)
LAYER = of_callable(SIZES, "cpu")
TWICE = Settings("adam", 2, 1, 20.0)


def failing(at: int, error: BaseException):
    def build(steps: int) -> Built:
        if steps == at:
            raise error
        return LAYER(steps)

    return build


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_one_t_without_memory_leaves_the_others(error):
    found = measure("lstm", {OURS: failing(8, error), TORCH: failing(4, error)}, [4, 8], "cpu", TWICE)
    assert [(point.arm, point.steps, point.failed) for point in found.points] == [
        (OURS, 4, ""), (OURS, 8, "out of memory"), (TORCH, 4, "out of memory"), (TORCH, 8, ""),
    ]  # fmt: skip
    assert ("persistrnn at T = 8: out of memory", True) in tables.banners(found)
    line = tables.summary(found).rows[1]
    assert line.bad
    assert line.cells[:3] == [OURS, "8", "out of memory"]


def test_other_errors_are_errors():
    with pytest.raises(SubjectError, match=r"persistrnn failed at T = 8: RuntimeError: something else"):
        measure("lstm", {OURS: failing(8, RuntimeError("something else"))}, [8], "cpu", TWICE)


def test_what_cannot_fit_a_cpu_is_not_run(monkeypatch):
    monkeypatch.setattr(record, "_host_memory", lambda: 2_000_000)
    found = measure("lstm", {OURS: failing(4096, AssertionError("run"))}, [4, 16, 4096], "cpu", TWICE)
    assert [bool(point.failed) for point in found.points] == [False, False, True]
    assert "not run: it would need more than this machine's 0.0 GiB (extrapolated)" in found.points[-1].failed


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ([], 100, 0),
        ([(10, 100)], 1000, 100),
        ([(1, 999), (10, 150), (20, 250)], 1000, 95),  # by the two longest
        ([(10, 150), (20, 250)], 240, 19),  # what was measured needs more than there is
        ([(10, 100), (20, 100)], 1000, 0),  # no slope
        ([(10, 10)], 123_999, 123_000),
    ],
)
def test_longest(sizes, size, expected):
    points = [Point(OURS, steps, held=total // 4, peak=total - total // 4) for steps, total in sizes]
    machine = Machine("cpu", "", size, 1, False, "", "", "", "")
    assert Profile("", machine, TWICE, points).longest(OURS) == expected


def test_peak_is_what_torch_allocates():
    """Of the same layer on the same kernels, whoever calls them; and it grows with T as the saved tensors do."""
    arms = {OURS: LAYER, TORCH: on_torch(LAYER)}
    found = measure("lstm", arms, [16, 64], "cpu", Settings("none", 2, 1, 20.0))
    ours, theirs = ([point.peak for point in found.of(arm)] for arm in (OURS, TORCH))
    assert ours == theirs
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer, x = SIZES(64)
    fixed = sum(p.nbytes for p in layer.parameters()) + x.nbytes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)[0].square().mean()
    assert output.requires_grad
    assert sum(saved.values()) - fixed <= ours[1] <= 3 * sum(saved.values())
    assert ours[0] < ours[1]


@pytest.mark.parametrize(("cell", "steps"), [("lstm", 65), ("gru", 9)])  # nodes have a name, and have not
def test_recompute_on_torchs_path(cell, steps, monkeypatch):
    """A memory mode: the forward of each chunk again within the backward, and less memory."""
    monkeypatch.setitem(memory.CHUNK_BYTES, "checkpoint", 1)
    monkeypatch.setattr(memory, "SHORTEST_OF_TORCH", 8)
    sizes = [dataclasses.replace(SIZES, cell=cell, save=save) for save in ("gates", "checkpoint")]
    gates, checkpoint = (measure("", {OURS: of_callable(one, "cpu")}, [steps], "cpu", TWICE).points[0] for one in sizes)
    assert gates.phases["torch's layers, forward"].flops == gates.calls[0].flops
    assert gates.phases["torch's layers, backward"].flops == 2 * gates.calls[0].flops
    assert "recompute" not in gates.phases
    assert checkpoint.phases["recompute"].seconds > 0
    assert checkpoint.phases["recompute"].flops == checkpoint.calls[0].flops
    assert (checkpoint.peak < gates.peak) or cell == "gru"


def test_loops_of_many_operators_are_not_traced(monkeypatch):
    """A trace of them is huge: time is measured all the same, and what is missing is said."""
    monkeypatch.setattr(measuring, "MOST_OPERATORS", 150)
    gru = of_callable(dataclasses.replace(SIZES, cell="gru"), "cpu")
    found = measure("gru", {OURS: gru}, [4, 16], "cpu", TWICE)
    short, long = found.points
    assert short.phases
    assert short.peak > 0
    assert (long.phases, long.spans, long.peak, long.failed) == ({}, [], 0, "")
    assert long.seconds > 0
    assert long.calls[0].steps == 16
    assert found.longest(OURS) > 16, "by the short one"
    text = tables.report(found, advice(found))
    assert "not traced: too many operators" in text
    assert "persistrnn at T = 4: time of this CPU by phase" in text


def test_host_time_never_stands_for_kernels():
    """A GPU whose kernels the profiler did not see has no phases, and says why."""
    seen, unseen = (Iteration(1.0, {}, [], 0, device, 0.0) for device in (True, False))
    assert measuring.untraced(seen, cuda=True) == measuring.untraced(unseen, cuda=False) == ""
    assert measuring.untraced(unseen, cuda=True) == NO_KERNELS
    assert measuring.untraced(None, cuda=True) == UNTRACED


def test_the_profiler_is_silent():
    """Its own lines would tear the bar; said once in a process, so in one of its own."""
    program = (
        "import torch, persistrnn\n"
        "make = lambda steps: (persistrnn.LSTM(4, 4), torch.zeros(steps, 2, 4))\n"
        "persistrnn.profile(make, [4], device='cpu', iterations=2, progress=False)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_few_iterations_where_they_are_long():
    seen = []
    found = measure(
        "lstm", {OURS: LAYER}, [4, 8], "cpu", Settings("adam", 50, 3, 0.0), progress=lambda *what: seen.append(what)
    )
    assert [point.iterations for point in found.points] == [2, 2]
    warmups = [sum(what == (OURS, steps, "warm-up") for what in seen) for steps in (4, 8)]
    assert warmups == [3, 2], "the profiled iteration warms up too"


def test_one_iteration_at_least_is_before_the_profiled_one():
    """There the optimizer's state is made: what the profiled one allocates is not more than without one."""
    seen = []
    found = measure("", {OURS: LAYER}, [4, 5], "cpu", TWICE, progress=lambda *what: seen.append(what[1:]))
    assert [what for steps, what in seen if steps == 5][:3] == ["build", "warm-up", "profile"]
    without = measure("", {OURS: LAYER}, [5], "cpu", Settings("none", 2, 1, 20.0))
    assert found.points[1].peak == without.points[0].peak


def test_precision_is_put_back():
    before = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with measuring.precision("fp32"):
        assert torch.backends.cudnn.rnn.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        layer = persistrnn.LSTM(3, 4)
        with calls(layer) as called:
            layer(torch.zeros(2, 5, 3))
    assert (torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before
    (call,) = called
    assert call.dtype == "fp32"
    assert call.flops == 2 * 2 * 5 * 4 * 4 * (3 + 4)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("cell", BUILT_IN)
def test_every_cell_is_seen(cell, heads):
    module, args, kwargs = of_callable(Sizes(cell, 6, 8, 2, batch=3, heads=heads), "cpu")(4)
    with calls(module) as found:
        module(*args, **kwargs)
    (call,) = found
    path = "torch" if cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") and heads == 1 else "stepwise"
    assert (call.cell, call.layers, call.steps, call.batch, call.path, call.heads) == (cell, 2, 4, 3, path, heads)
    weights = sum(p.numel() for name, p in module.named_parameters() if name.startswith(("weight_ih", "weight_hh")))
    assert call.flops == 2 * 4 * 3 * weights
