"""Second derivatives: the formula against autograd of the reference, and the kernels against torch.nn in float64."""

import pytest
import torch
from grid import concurrent_grid
from pairs import CELLS, make_layer, pair, tensors

import persistrnn
from persistrnn import double_backward, reference, step_marks
from persistrnn.kernels.cells import derived
from persistrnn.kernels.tensors import Kept

T, B, H, INPUT = 4, 3, 5, 4


def arguments(cell, directions, marked):
    """Of ``reference.recurrent``, in float64, each a leaf but the marks."""
    G = CELLS[cell].gates

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    states = [leaf(directions, B, H) for _ in range(CELLS[cell].states)]
    reset = [leaf(directions, B, H) for _ in states] if marked else []
    marks = None
    if marked:
        resets = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.4
        marks = step_marks.marks(torch.arange(T).unsqueeze(1) < torch.tensor([4, 0, 3]), resets, directions)
    return leaf(T, B, directions, G * H), leaf(directions, G * H, H), leaf(directions, G * H), states, marks, reset


def kept_by(cell, x_gates, weight, bias, states, marks, reset):
    """What the kernels' forward keeps, as differentiable functions of the arguments: y and c with their edges, and the
    activated gates."""
    y, c, _ = reference.recurrent(cell, x_gates, weight, bias, states, marks, reset)
    directions = x_gates.shape[2]
    anew = reset or [torch.zeros_like(s) for s in states]
    buffers = []
    for every, first, last in zip((y, c), states, anew, strict=False):
        edges = [torch.stack([(last if d else first)[d] for d in range(directions)], 1),
                 torch.stack([(first if d else last)[d] for d in range(directions)], 1)]  # fmt: skip
        buffers.append(torch.cat([edges[0][None], every.unflatten(2, (directions, H)), edges[1][None]]))
    before = []
    for buffer in buffers:
        s = torch.stack([buffer[2:, :, 1] if d else buffer[:-2, :, 0] for d in range(directions)], 2)
        if marks is not None:
            other = torch.stack([buffer[0, :, 1] if d else buffer[-1, :, 0] for d in range(directions)], 1)
            s = torch.where(marks.unsqueeze(-1) == step_marks.BEGINS, other, s)
        before.append(s)
    r_gates = torch.einsum("tbdh,dgh->tbdg", before[0], weight) + bias
    x, r = (g.unflatten(-1, (-1, H)).unbind(3) for g in (x_gates, r_gates))
    _, saved = derived(cell).run_forward(x, r, before)
    return Kept([b[None] for b in buffers], torch.stack(saved, 3)[None])


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_formula_is_the_derivative_of_the_reference(cell, directions, marked):
    """Given gradients of all outputs and of all that is kept."""
    torch.manual_seed(0)
    x_gates, weight, bias, states, marks, reset = arguments(cell, directions, marked)
    y, c, finals = reference.recurrent(cell, x_gates, weight, bias, states, marks, reset)
    kept = kept_by(cell, x_gates, weight, bias, states, marks, reset)
    outputs = [y, *([] if c is None else [c]), *finals, *kept.states, kept.saved]
    cotangents = [torch.randn_like(t) for t in outputs]
    if marks is not None:  # gates of a row that has ended are of no step
        cotangents[-1] = torch.where((marks == step_marks.SKIPPED)[..., None, None], 0.0, cotangents[-1])
    leaves = [x_gates, *states, *reset]
    expected = torch.autograd.grad(outputs, leaves, cotangents)
    given = iter(cotangents)
    d_outputs = [next(given).unflatten(2, (directions, H)) for _ in states]
    d_final = [next(given) for _ in states]
    found = double_backward.backward(cell, weight, None, marks, kept, d_outputs, d_final, list(given))
    actual = [found.dx_gates[0], *found.d_initial, *(found.d_reset if marked else [])]
    torch.testing.assert_close(actual, list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "bidirectional", "cut"),
    [("lstm", False, False), ("lstm", True, True), ("gru", True, False), ("gru", False, True)],
)
def test_gradient_penalty_on_the_kernels(cell, bidirectional, cut):
    """A penalty on the gradient by the input and by the state, differentiated by all parameters, third order too."""
    torch.manual_seed(0)
    module = make_layer(cell, INPUT, H, 2, bidirectional=bidirectional, backend="persistent")
    truth = make_layer(cell, INPUT, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    truth.load_state_dict(module.state_dict())
    x, h0 = torch.randn(T, B, INPUT), torch.randn(4 if bidirectional else 2, B, H)
    options = {"lengths": torch.tensor([4, 0, 3]), "resets": torch.rand(T, B) < 0.3} if cut else {}
    results = []
    for of in (module, truth):
        dtype = of.weight_hh_l0.dtype
        leaf, state = (t.to(dtype).requires_grad_() for t in (x, h0))
        hx = (state, state * 0.5) if cell == "lstm" else state
        y, *final = tensors(of(leaf, hx, **options))
        loss = y.square().sum() + sum(f.sin().sum() for f in final)
        slopes = torch.autograd.grad(loss, (leaf, state), create_graph=True)
        penalty = sum(s.square().sum() for s in slopes)
        weights = list(of.parameters())
        first = torch.autograd.grad(penalty, [leaf, state, *weights], create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *weights])
        results.append([*slopes, *first, *again])
    assert module.last_path == "persistent"
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a - b).norm() <= 2e-4 * b.norm(), number


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", CELLS)
def test_with_frozen_weights_and_a_linear_loss(cell):
    """Only what is kept leads back to x there."""
    torch.manual_seed(0)
    module, truth = pair(cell, INPUT, H, backend="persistent", truth=True)
    module.requires_grad_(False)
    x = torch.randn(T, B, INPUT, requires_grad=True)
    found = []
    for of in (module, truth):
        leaf = x.detach().to(of.weight_hh_l0.dtype).requires_grad_()
        (slope,) = torch.autograd.grad(of(leaf)[0].sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "cut"), [("lstm", True), ("gru", False)])
def test_of_a_pipeline(pipelines, cell, cut):
    """The same as of layers that run one after the other."""
    torch.manual_seed(0)
    module = make_layer(cell, INPUT, 13, 3, backend="persistent")
    plain = make_layer(cell, INPUT, 13, 3, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    options = {"lengths": torch.tensor([4, 0, 3]), "resets": torch.rand(T, B) < 0.3} if cut else {}
    x = torch.randn(T, B, INPUT)
    pipelines()
    results = []
    for of in (module, plain):
        leaf = x.to(of.weight_hh_l0.dtype).requires_grad_()
        with concurrent_grid():
            (slope,) = torch.autograd.grad(of(leaf, **options)[0].square().sum(), leaf, create_graph=True)
            weights = list(of.parameters())
            results.append([slope, *torch.autograd.grad(slope.square().sum(), [leaf, *weights])])
    assert module.last_path == "persistent"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)


@pytest.mark.interpreter
def test_of_half_precision_is_of_its_dtype():
    module = persistrnn.LSTM(INPUT, H, backend="persistent", dtype=torch.bfloat16)
    x = torch.randn(T, B, INPUT, dtype=torch.bfloat16, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.bfloat16 for p in module.parameters())
