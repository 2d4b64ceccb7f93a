"""The built-in cells that torch's layers do not cover, on the scan kernels: the bound of ``helpers/accuracy``, in every
dtype, both directions, with rows that end and begin anew, over short and over long sequences."""

import numpy as np
import pytest
import torch
from accuracy import DTYPES, Bound, exact_gemms

from persistrnn import autograd, reference, segments
from persistrnn.kernels import launch
from persistrnn.kernels.cells import BUILT_IN, CELLS

NAMES = BUILT_IN[2:]


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes in NumPy, which warns of what a cell makes of the zeros where there is no unit."""
    with np.errstate(all="ignore"):
        yield


def drawn(cell, dtype, hidden, steps, batch, directions, marked, seed):
    """Arguments of a recurrence, of numbers that the dtype has."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, size=1.0, around=0.0):
        return (torch.randn(shape, generator=generator) * size + around).to(dtype)

    def states():  # a normaliser is positive, and no smaller than what it normalises
        return [tensor(directions, batch, hidden, size=0.3, around=2.0 * (i == 2)) for i in range(cell.states)]

    D = directions
    found = {
        "x_gates": tensor(steps, batch, D, cell.inputs * hidden),
        "weight_hh": tensor(D, cell.gates * hidden, hidden, size=hidden**-0.5),
        "bias_hh": tensor(D, cell.gates * hidden, size=0.2),
        "initial": states(),
    }
    if cell.params:
        found["params"] = tensor(D, len(cell.params), hidden, size=0.3)
    if marked:
        active, begins = (torch.rand(steps, batch, generator=generator) < p for p in (0.8, 0.2))
        found |= {"marks": segments.marks(active, begins, D), "reset": states()}
    return found


def run(recurrence, cell, given, weights, dtype, **options):
    """Outputs and gradients by name, in float64."""

    def leaf(t):
        return t.to(dtype).requires_grad_() if t.is_floating_point() else t

    given = {name: list(map(leaf, v)) if isinstance(v, list) else leaf(v) for name, v in given.items()}
    y, _, finals = recurrence(cell.name, **given, **options)
    outputs = {"y": y} | {f"state {i}": s for i, s in enumerate(finals)}
    leaves = {
        f"{name} {i}": t for name, v in given.items() for i, t in enumerate(v if isinstance(v, list) else [v])
        if t.is_floating_point()
    }  # fmt: skip
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [w.to(dtype) for w in weights[: len(outputs)]],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    found = outputs | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach().double() for name, t in found.items()}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_kept(name, dtype):
    cell, bound = CELLS[name], Bound(DTYPES[dtype])
    # hidden, steps, batch, directions, marked: units past H, and a bfloat16 sequence in which an outcome computed again
    # from rounded tiles was 54% of sLSTM's gradient
    shapes = [(18, 6, 3, 2, True), *([(16, 48, 2, 1, False)] if dtype == "bf16" else [])]
    before = launch.LAUNCHES["scan_backward"]
    for shape in shapes:
        given = drawn(cell, bound.dtype, *shape, seed=0)
        hidden, steps, batch, directions, _ = shape
        generator, final = torch.Generator().manual_seed(99), (directions, batch, hidden)
        sizes = (steps, batch, directions * hidden), *[final] * cell.states
        weights = [torch.randn(size, generator=generator).to(bound.dtype) for size in sizes]
        with exact_gemms("cpu"):
            ours = run(autograd.recurrent, cell, given, weights, bound.dtype, precision="ieee")
        truth, witness = (run(reference.recurrent, cell, given, weights, d) for d in (torch.float64, bound.dtype))
        bound.add((name, shape), ours, truth, witness)
    assert launch.LAUNCHES["scan_backward"] == before + len(shapes)
    assert not bound.failures, "\n".join(bound.failures)  # one case of a class leaves nothing to pool
