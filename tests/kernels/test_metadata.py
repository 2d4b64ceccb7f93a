"""What the kernels tell Triton's profiler: flops and bytes of each launch, against the tensors of that launch."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import triton

from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.scan import scan_backward, scan_forward
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.planner import hardware, pipeline
from persistrnn.kernels.planner import launch_metadata as metadata
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.tensors import Weights

SHAPES = [
    # cell, H, B, D, T, dtype
    ("lstm", 48, 3, 1, 4, torch.float32),
    ("gru", 40, 17, 2, 3, torch.float32),
    ("lstm", 320, 5, 2, 2, torch.bfloat16),
    ("gru", 16, 700, 1, 2, torch.float16),
]


class Launches:
    """Stands for a kernel: keeps what Triton would give to ``launch_metadata``, and what that returns."""

    def __init__(self, kernel) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__
        self.found, self.arguments = [], []

    def __getitem__(self, grid):
        def run(**given):
            arguments = {name: given[name] for name in self.kernel.arg_names}  # Triton gives arguments, not options
            self.arguments.append(arguments)
            compiled = SimpleNamespace(name=self.__name__)
            self.found.append(metadata.launch_metadata(grid, compiled, arguments))

        return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    found = {kernel.__name__: Launches(kernel) for kernel in (scan_forward, scan_backward)}
    for name, stand_in in found.items():
        monkeypatch.setattr(launch, name, stand_in)
    return found


def inner(states: torch.Tensor, steps: int) -> int:
    """Bytes of a states' buffer without the slots before and after the sequence."""
    return states.nbytes * steps // states.size(1)


@pytest.mark.parametrize(("cell", "hidden", "batch", "directions", "steps", "dtype"), SHAPES)
def test_scans(launches, cell, hidden, batch, directions, steps, dtype):
    gates = CELLS[cell].gates * hidden
    new = lambda *shape: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    weight, bias = new(directions, gates, hidden), new(directions, gates)
    initial = [new(directions, batch, hidden)] * CELLS[cell].states
    x_gates = new(steps, batch, directions, gates)
    kept = launch.forward(CELLS[cell], x_gates, Weights(weight, bias), initial, "ieee", save=True)
    dy, saved = kept.states[0][0, 1:-1], kept.saved
    launch.backward(CELLS[cell], [dy], initial, weight, None, kept, "ieee")
    bits = 8 * weight.element_size()
    states = sum(inner(s, steps) for s in kept.states)
    d_gates = x_gates.nbytes * (1 if cell == "lstm" else 2)
    expected = {
        "scan_forward": x_gates.nbytes + states + saved.nbytes,
        "scan_backward": d_gates + states + saved.nbytes + dy.nbytes,
    }
    for name, moved in expected.items():
        found = launches[name].found
        assert sum(one[f"flops{bits}"] for one in found) == 2 * gates * hidden * batch * steps * directions
        # Each launch of those in turn reads the weights of its directions anew.
        assert sum(one["bytes"] for one in found) - moved == pytest.approx(
            weight.nbytes, abs=(len(found) - 1) * weight.nbytes
        )
        assert (sum(one["bytes"] for one in found) - moved) % (weight.nbytes // directions) == 0
        for one in found:
            assert set(one) == {"name", f"flops{bits}", "bytes"}
            assert one["name"].startswith(f"{name} [")
            assert f"H={hidden}, B={batch}, T={steps}, D={directions}" in one["name"]
            assert isinstance(one["bytes"], int)
            assert isinstance(one[f"flops{bits}"], float)


def test_launches_in_turn_share_the_batch(launches, monkeypatch):
    """As many groups at a time as fit: here one, so that there are many launches, the last with part of a tile."""
    monkeypatch.setattr(launch, "hardware", lambda device: hardware.named("a100"))
    choose = launch.choose
    monkeypatch.setattr(launch, "choose", lambda *given: _one_group(choose(*given)))
    batch, hidden, steps, directions = 75, 32, 3, 2
    new = torch.zeros
    weights, state = Weights(new(directions, 128, hidden), new(directions, 128)), new(directions, batch, hidden)
    launch.forward(CELLS["lstm"], new(steps, batch, directions, 128), weights, [state, state], "tf32", save=False)
    found = launches["scan_forward"].found
    assert len(found) > 3
    rows = [one["flops32"] / (2 * 128 * hidden * steps) for one in found]
    assert sum(rows) == batch * directions
    assert len(set(rows)) == 2, "full batch tiles, and the last one of each direction"


def _one_group(plan):
    passes = (dataclasses.replace(part, groups=1) for part in (plan.forward, plan.backward))
    return dataclasses.replace(plan, **dict(zip(("forward", "backward"), passes, strict=True)))


def test_no_saved_and_marks(launches):
    """Inference keeps h alone of the states; marks are read."""
    steps, batch, hidden = 5, 2, 24
    x_gates, h0 = torch.zeros(steps, batch, 1, 96), torch.zeros(1, batch, hidden)
    weights = Weights(torch.zeros(1, 96, hidden), torch.zeros(1, 96))
    marks = torch.zeros(steps, batch, 1, dtype=torch.uint8)
    for given, more in ((None, 0), (marks, marks.nbytes)):
        launch.forward(CELLS["lstm"], x_gates, weights, [h0, h0], "ieee", save=False, marks=given)
        moved = launches["scan_forward"].found[-1]["bytes"]
        assert moved == x_gates.nbytes + steps * batch * hidden * 4 + weights.weight_hh.nbytes + more


def test_pipeline(launches, monkeypatch):
    """A stack in one launch: a second matrix for all layers but one, what enters at one end only."""
    layers, steps, batch, hidden = 3, 4, 6, 64
    shape = CELLS["gru"]
    found = pipeline.plan_pipeline(Problem(shape, hidden, batch, 1, "fp16", hardware.named("h200")), layers)
    assert found is not None
    monkeypatch.setattr(launch, "choose_stack", lambda *given: found)
    monkeypatch.setattr(launch, "hardware", lambda device: hardware.named("h200"))
    new = lambda *size: torch.zeros(*size, dtype=torch.float16)  # noqa: E731
    x_gates, h0 = new(steps, batch, 1, 192), new(layers, batch, hidden)
    given = Weights(new(layers, 192, hidden), new(layers, 192), new(layers - 1, 192, hidden), new(layers - 1, 192))
    kept = launch.forward(CELLS["gru"], x_gates, given, [h0], "ieee", True)
    (y,), saved, _ = kept
    dy = y[-1, 1:-1]
    launch.backward(CELLS["gru"], [dy], [h0], given.weight_hh, given.weight_ih, kept, "ieee")
    weights = given.weight_hh.nbytes + given.weight_ih.nbytes
    states = inner(y, steps)
    (forward,), (backward,) = (launches[name].found for name in ("scan_forward", "scan_backward"))
    flops = 2 * 192 * hidden * batch * steps * (2 * layers - 1)
    assert forward["flops16"] == backward["flops16"] == flops
    assert forward["bytes"] == weights + x_gates.nbytes + states + saved.nbytes
    assert backward["bytes"] == weights + dy.nbytes + states + saved.nbytes + 2 * layers * x_gates.nbytes
    assert "L=3" in forward["name"]


@pytest.mark.audit
@pytest.mark.parametrize("backward", [False, True])
def test_triton_asks_for_it(launches, monkeypatch, backward):
    """A compiled kernel gives it to a profiler that listens, from the arguments of the launch, in their order."""
    h0 = torch.zeros(1, 3, 64, dtype=torch.bfloat16)
    given = torch.zeros(5, 3, 1, 256, dtype=torch.bfloat16), torch.zeros(1, 256, 64, dtype=torch.bfloat16)
    x_gates, weights = given[0], Weights(given[1], given[1].new_zeros(1, 256))
    kept = launch.forward(CELLS["lstm"], x_gates, weights, [h0, h0], "ieee", save=True)
    launch.backward(CELLS["lstm"], [kept.states[0][0, 1:-1]], [h0, h0], weights.weight_hh, None, kept, "ieee")
    case = audit.Case("lstm", backward, "bf16", 64, "sm_90", 3)
    compiled = audit.compile_pass(case, audit.planned(case))
    monkeypatch.setattr(compiled, "_init_handles", lambda: None)  # for which there is no GPU
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda told: None)
    stand_in = launches["scan_backward" if backward else "scan_forward"]
    told = compiled.launch_metadata((1, 1, 1), 0, *stand_in.arguments[0].values()).get()
    expected = stand_in.found[0]
    assert {name: told[name] for name in expected} == expected
    assert expected["flops16"] == 2 * 256 * 64 * 3 * 5
