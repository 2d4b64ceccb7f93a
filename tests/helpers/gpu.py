"""What the tests on a GPU share: plans, operands, and the bound of accuracy.py on the kernels and on nothing else."""

import contextlib
import itertools

import accuracy
import pytest
import torch
from accuracy import Bound, Case
from asked import asked

import persistrnn
from persistrnn import autograd, decide
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.scan import scan_backward, scan_forward

DEVICE = "cuda"
SEEDS = 3
REPEATS = 200


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def no_waits():
    """Inside, the host that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def planned(cell, hidden, batch, directions, dtype):
    """The plan of one layer on this device."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    return launch.choose(CELLS[cell], hidden, batch, directions, dtype, persistrnn.calls.precision(), device)


def planned_pipeline(cell, hidden, layers, batch, dtype):
    """The plan of a layer pipeline on this device; None where there is none."""
    if layers == 1:
        return None
    precision = persistrnn.calls.precision()
    return launch.choose_stack(CELLS[cell], hidden, layers, batch, dtype, precision, torch.device(DEVICE, 0))


def needs_plan(cell, hidden, dtype):
    """Skip where the device is too small for the size."""
    device = torch.device(DEVICE, 0)
    reason = decide.unsupported(asked(cell, hidden, dtype=dtype, device=device, precision=persistrnn.calls.precision()))
    if reason is not None:
        pytest.skip(reason)


def check_bound(cell, dtype, precision, shapes, expected=None, pooled=True, seeds=SEEDS):
    """The bound of accuracy.py over the shapes, on the kernels and on nothing else.

    expected(plan): whether the plan is of the kind that the test is about.
    """
    # tf32 rounds operands as float16 does; cuDNN, the witness, is free not to use it: no pooled bound there.
    tf32 = precision == "tf32"
    bound = Bound(torch.float16 if tf32 else accuracy.DTYPES[dtype])
    for shape, seed in itertools.product(shapes, range(seeds)):
        hidden, batch, steps, layers, bidirectional, bias, state = shape
        case = Case(cell, dtype, hidden, batch, steps, layers, bidirectional, bias, state)
        plan = planned(cell, hidden, batch, 2 if bidirectional else 1, accuracy.DTYPES[dtype])
        assert expected is None or expected(plan), str(plan)
        before = launch.LAUNCHES.copy()
        bound.add((case, seed), *accuracy.run(case, seed, device=DEVICE))
        counts = {"scan_forward": layers * plan.forward.rounds, "scan_backward": layers * plan.backward.rounds}
        together = planned_pipeline(cell, hidden, layers, batch, accuracy.DTYPES[dtype]) if not bidirectional else None
        if together is not None and together.faster(steps, True):
            counts = {"scan_forward": together.forward.rounds, "scan_backward": together.backward.rounds}
        assert launch.LAUNCHES - before == counts, case
    if pooled and not tf32:
        bound.check()
    assert not bound.failures, "\n".join(bound.failures)


def one_slice(plan):
    return plan.forward.tiling.slices == plan.backward.tiling.slices == 1


def many_slices(plan):
    return plan.forward.tiling.slices > 1 and plan.backward.tiling.slices > 1


def two_dimensions(plan):
    return plan.forward.tiling.k_parts > 1 or plan.backward.tiling.k_parts > 1


def streams(plan):
    return plan.forward.shares.streamed > 0 and plan.backward.shares.streamed > 0


def operands(cell, hidden, batch, steps, directions, dtype, seed=0):
    """Operands of `autograd.recurrent` by name (no c0 for the GRU), leaves that require gradients, and cotangents."""
    torch.manual_seed(seed)
    rows = CELLS[cell].gates * hidden
    bound = hidden**-0.5
    shapes = {
        "x_gates": (steps, batch, directions, rows),
        "weight_hh": (directions, rows, hidden),
        "bias_hh": (directions, rows),
    } | dict.fromkeys(("h0", "c0")[: CELLS[cell].states], (directions, batch, hidden))
    made = {
        name: torch.randn(shape, dtype=dtype, device=DEVICE).mul_(bound if name in ("weight_hh", "bias_hh") else 1)
        for name, shape in shapes.items()
    }
    for tensor in made.values():
        tensor.requires_grad_()
    state = (directions, batch, hidden)
    shapes = [(steps, batch, directions * hidden), *[state] * CELLS[cell].states]
    return made, [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


def recurrent(cell, x_gates, weight, bias, *states, precision="ieee"):
    """y and the final states."""
    found = autograd.recurrent(cell, x_gates, weight, bias, states, precision)
    return [found.y, *found.finals]


def outputs_and_gradients(cell, made, cotangents):
    """Everything that the kernels make of the operands: outputs, then gradients."""
    outputs = recurrent(cell, *made.values(), precision=persistrnn.calls.precision())
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, list(made.values()), cotangents))


def check_same_bits(layer, x, **given):
    """Outputs and gradients do not change from run to run: a stale or half-written tile would show."""

    def run():
        y, _ = layer(x, **given)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]

    expected = run()
    assert layer.last_path == "persistent"
    assert all(t.isfinite().all() for t in expected)
    assert sum(count_differences(run(), expected) for _ in range(REPEATS)) == 0


def count_differences(found, expected):
    return sum(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def compiled_kernels():
    """How many variants of the scan kernels Triton holds for this device."""
    return sum(len(caches[0]) for kernel in (scan_forward, scan_backward) for caches in kernel.device_caches.values())
