"""Cells with parameters, extras, states after the step and wider inputs, on every path that the kernels have."""

import numpy as np
import own_cells
import pytest
import torch

from persistrnn import autograd, reference, segments
from persistrnn.kernels import launch

T, B, H = 5, 3, 12
NAMES = list(own_cells.DECLARED)


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes in NumPy, which warns of what a cell makes of the zeros where there is no unit."""
    with np.errstate(all="ignore"):
        yield


def given(cell, directions=1, dtype=torch.float32, hidden=H, batch=B, steps=T, marked=False, seed=0):
    """Arguments of a recurrence by name, leaves but for marks and extras."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, size=0.4, around=0.0):
        return (torch.randn(shape, generator=generator) * size + around).to(dtype).requires_grad_()

    D, H = directions, hidden
    # The normaliser of an sLSTM is positive.
    states = [leaf(D, batch, H, size=0.3, around=float(i == 2)) for i in range(cell.states)]
    found = {
        "x_gates": leaf(steps, batch, D, cell.inputs * H, size=1.0),
        "weight_hh": leaf(D, cell.gates * H, H, size=H**-0.5),
        "bias_hh": leaf(D, cell.gates * H),
        "initial": states,
    }
    if cell.params:
        found["params"] = leaf(D, len(cell.params), H, size=0.3, around=1.0)
    if cell.extras:
        masks = torch.rand(1, steps, batch, D, len(cell.extras), H, generator=generator) < 0.3
        found["extras"] = masks.to(torch.uint8)
    if marked:
        active = torch.rand(steps, batch, generator=generator) < 0.8
        begins = torch.rand(steps, batch, generator=generator) < 0.3
        found["marks"] = segments.marks(active, begins, D)
        found["reset"] = [leaf(D, batch, H, size=0.3, around=float(i == 2)) for i in range(cell.states)]
    return found


def leaves_of(arguments):
    flat = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if t.requires_grad]


def in_dtype(arguments, dtype):
    def of(t):
        return t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t

    return {name: list(map(of, v)) if isinstance(v, list) else of(v) for name, v in arguments.items()}


def results(recurrence, cell, arguments, orders=1, **how):
    """Outputs by name, and gradients of the first and, asked for, of the second order."""
    y, c, finals = recurrence(cell.name, **arguments, **how)
    outputs = {"y": y, **{f"final {i}": s for i, s in enumerate(finals)}}
    if c is not None and how.get("return_c", recurrence is reference.recurrent) and cell.states > 1:
        outputs["c"] = c
    generator, leaves = torch.Generator().manual_seed(7), leaves_of(arguments)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs.values()]
    grads = torch.autograd.grad(
        list(outputs.values()), leaves, weights, create_graph=orders > 1, allow_unused=True, materialize_grads=True
    )
    found = outputs | {f"d {i}": g for i, g in enumerate(grads)}
    if orders > 1:
        loss = sum((g * torch.randn(g.shape, generator=generator).to(g.dtype)).sum() for g in grads)
        second = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found |= {f"dd {i}": g for i, g in enumerate(second)}
    return {name: t.detach().double() for name, t in found.items()}


def assert_true(found, truth, within=2e-6):
    assert set(found) == set(truth)
    for name, exact in truth.items():
        assert (found[name] - exact).norm() <= within * exact.norm() + 1e-9, name


@pytest.mark.interpreter
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_derivatives_are_those_of_the_step(name, directions, marked):
    """In one slice, with units past H; both orders of derivatives, every c among the outputs."""
    cell = own_cells.cell_of(name)
    arguments = given(cell, directions, marked=marked)
    before = launch.LAUNCHES.copy()
    found = results(autograd.recurrent, cell, arguments, 2, precision="ieee", return_c=True)
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}
    assert_true(found, results(reference.recurrent, cell, in_dtype(arguments, torch.float64), 2))
