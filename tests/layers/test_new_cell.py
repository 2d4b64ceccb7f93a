"""A cell of one's own is one function, and all works: kernels, marks, second derivatives, a plan."""

import pytest
import torch

from persistrnn import autograd, reference, step_marks
from persistrnn.kernels import cells
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.cells.registration import register
from persistrnn.kernels.inspect import audit

T, B, H = 5, 3, 12


def leaky(x, r, state):
    return (0.5 * state.h + 0.5 * torch.tanh(x.g + r.g),)


@pytest.fixture(autouse=True)
def name(monkeypatch):
    monkeypatch.setattr(cells, "_registered", dict(cells._registered))
    torch.manual_seed(0)
    return register(leaky, gates=("g",)).cell.name


def drawn(directions, dtype):
    shapes = (T, B, directions, H), (directions, H, H), (directions, H), (directions, B, H), (directions, B, H)
    return [torch.randn(shape, dtype=dtype).mul(0.4).requires_grad_() for shape in shapes]


def marks_of(directions):
    active, resets = torch.rand(T, B) < 0.8, torch.rand(T, B) < 0.3
    return step_marks.marks(active, resets, directions)


@pytest.mark.interpreter
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_kernels_run_it(name, directions, marked):
    given = drawn(directions, torch.float32)
    marks = marks_of(directions) if marked else None
    found = []
    for recurrent, dtype in ((autograd.recurrent, torch.float32), (reference.recurrent, torch.float64)):
        x, weight, bias, h0, reset = (t.detach().to(dtype).requires_grad_() for t in given)
        options = {"marks": marks, "reset": [reset] if marked else []}
        if recurrent is autograd.recurrent:
            options["precision"] = "ieee"
        y, _, (h_n,) = recurrent(name, x, weight, bias, [h0], **options)
        leaves = [x, weight, bias, h0, *([reset] if marked else [])]
        first = torch.autograd.grad(y.square().sum() + h_n.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([y, h_n, *first, *second])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.audit
@pytest.mark.parametrize("backward", [False, True])
def test_it_is_planned_and_compiled(name, backward):
    row = audit.audit(audit.Case(name, backward, "bf16", 512, "sm_90"))
    assert row.failures == ""
    assert CELLS[name].gates == 1
