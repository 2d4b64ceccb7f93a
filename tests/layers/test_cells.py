"""Layers of the cells that torch has not, against transcriptions of their papers: a loop in the test, in float64."""

import pytest
import torch
from pairs import as_hx, tensors
from torch import sigmoid, tanh
from torch.nn.functional import linear

import persistrnn

T, B, INPUT, H = 6, 3, 4, 5


def peephole(x, r, state, own):
    """Gers, Schraudolph and Schmidhuber 2002, equations 1 to 5."""
    (xi, xf, xg, xo), (ri, rf, rg, ro), (_, c) = x.chunk(4, -1), r.chunk(4, -1), state
    i = sigmoid(xi + ri + own["weight_ci"] * c)
    f = sigmoid(xf + rf + own["weight_cf"] * c)
    c = f * c + i * tanh(xg + rg)
    return sigmoid(xo + ro + own["weight_co"] * c) * tanh(c), c


def coupled(x, r, state, own):
    """Greff et al. 2015, CIFG."""
    f, g, o = (x + r).chunk(3, -1)
    c = sigmoid(f) * state[1] + (1 - sigmoid(f)) * tanh(g)
    return sigmoid(o) * tanh(c), c


def mgu(x, r, state, own):
    """Zhou et al. 2016; the gate acts on the product, as cuDNN's GRU has it."""
    (xf, xn), (rf, rn) = x.chunk(2, -1), r.chunk(2, -1)
    f = 1 / (1 + torch.exp(-xf - rf))
    return ((1 - f) * state[0] + f * tanh(xn + f * rn),)


def janet(x, r, state, own):
    """Van der Westhuizen and Lasenby 2018, equation 4, with beta = 1."""
    s, g = (x + r).chunk(2, -1)
    c = sigmoid(s) * state[1] + (1 - sigmoid(s - 1)) * tanh(g)
    return c, c


def slstm(x, r, state, own):
    """Beck et al. 2024, equations 8 to 17, without the stabiliser, which divides out."""
    i, f, z, o = (x + r).chunk(4, -1)
    _, c, n, m = state
    scale = torch.exp(m)  # of what the state before is stored in
    c, n = sigmoid(f) * c * scale + torch.exp(i) * tanh(z), sigmoid(f) * n * scale + torch.exp(i)
    m = torch.maximum(torch.log(sigmoid(f)) + m, i)
    return sigmoid(o) * c / n, c / torch.exp(m), n / torch.exp(m), m


# class, transcription, rows of the gates, states, parameters of its own
CELLS = {
    "peephole": (persistrnn.PeepholeLSTM, peephole, 4, 2, ("weight_ci", "weight_cf", "weight_co")),
    "coupled": (persistrnn.CoupledLSTM, coupled, 3, 2, ()),
    "mgu": (persistrnn.MGU, mgu, 2, 1, ()),
    "janet": (persistrnn.JANET, janet, 2, 2, ()),
    "slstm": (persistrnn.SLSTM, slstm, 4, 4, ()),
}


def transcribed(cell, weights, x, hx, layers, directions, lengths=None, resets=None):
    """y and the final states of a stack, row by row: each row's own steps, each episode from zeros."""
    step = CELLS[cell][1]
    finals = []
    for layer in range(layers):
        ways = []
        for d in range(directions):
            suffix = f"_l{layer}{'_reverse' * d}"
            own = {name.removesuffix(suffix): w for name, w in weights.items() if name.endswith(suffix)}
            rows = []
            for b in range(x.size(1)):
                steps = list(range(T if lengths is None else int(lengths[b])))
                state = tuple(s[layer * directions + d, b] for s in hx)
                y = [x.new_zeros(H)] * T
                for t in reversed(steps) if d else steps:
                    begins = resets is not None and (t < steps[-1] and resets[t + 1, b] if d else resets[t, b])
                    state = tuple(torch.zeros_like(s) for s in state) if begins else state
                    of_x = linear(x[t, b], own["weight_ih"], own.get("bias_ih"))
                    state = step(of_x, linear(state[0], own["weight_hh"], own.get("bias_hh")), state, own)
                    y[t] = state[0]
                rows.append((torch.stack(y), *state))
            y, *final = (torch.stack(part, dim=1 if k == 0 else 0) for k, part in enumerate(zip(*rows, strict=True)))
            ways.append(y)
            finals.append(final)
        x = torch.cat(ways, -1)
    return [x, *(torch.stack(s) for s in zip(*finals, strict=True))]


def made(cell, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = CELLS[cell][0](INPUT, H, dtype=dtype, **options)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = [torch.randn(rows, B, H, dtype=dtype).mul(0.5).requires_grad_() for _ in range(CELLS[cell][3])]
    if cell == "slstm":
        hx[2] = hx[2].detach().abs().add(0.5).requires_grad_()  # a normaliser is positive
    return layer, torch.randn(T, B, INPUT, dtype=dtype, requires_grad=True), hx


@pytest.mark.parametrize("cut", ["whole", "lengths", "resets"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "bidirectional": True}], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_layers_are_the_paper(cell, options, cut):
    layer, x, hx = made(cell, **options)
    given = {"lengths": torch.tensor([T, 2, 5])} if cut == "lengths" else {}
    given |= {"resets": torch.rand(T, B) < 0.3} if cut == "resets" else {}
    weights = dict(layer.named_parameters())
    ours = tensors(layer(x, as_hx(hx), **given))
    assert layer.last_path == "stepwise"
    paper = transcribed(cell, weights, x, hx, layer.num_layers, 2 if layer.bidirectional else 1, **given)
    leaves = [x, *hx, *weights.values()]
    for found in (ours, paper):
        loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(found))
        found += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, paper, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_have_the_documented_names(cell):
    _, _, gates, _, own = CELLS[cell]
    layer = made(cell, num_layers=2, bidirectional=True)[0]
    rows = gates * H
    shapes = {"weight_ih": (rows, INPUT), "weight_hh": (rows, H), "bias_ih": (rows,), "bias_hh": (rows,)}
    shapes |= dict.fromkeys(own, (H,))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "_l0" in name} == {
        f"{name}_l0{way}": shape for way in ("", "_reverse") for name, shape in shapes.items()
    }
    assert all(p.abs().max() <= H**-0.5 and p.std() > 0 for p in layer.parameters())
    other = made(cell, num_layers=2, bidirectional=True)[0]
    other.load_state_dict(layer.state_dict())
    assert list(other.state_dict()) == list(layer.state_dict())
