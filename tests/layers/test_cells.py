"""Layers of the cells that torch has not, against transcriptions of their papers: a loop in the test, in float64."""

from functools import partial

import pytest
import torch
from pairs import PATHS, as_hx, tensors
from torch import sigmoid, tanh
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn

# Triton's interpreter computes what it masks: sLSTM's 0 / 0 in units past H.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")

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
    "rnn_tanh": (persistrnn.RNN, lambda x, r, state, own: (tanh(x + r),), 1, 1, ()),
    "rnn_relu": (
        partial(persistrnn.RNN, nonlinearity="relu"),
        lambda x, r, state, own: ((x + r).clamp(min=0),),
        1,
        1,
        (),
    ),
}
FURTHER = [cell for cell in CELLS if "rnn" not in cell]


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
    layer = CELLS[cell][0](INPUT, H, dtype=torch.float64, **options).to(dtype)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    x, *hx = (torch.randn(size, dtype=torch.float64) for size in ((T, B, INPUT), *[(rows, B, H)] * CELLS[cell][3]))
    if cell == "slstm":
        hx[2] = hx[2].abs() + 0.5  # a normaliser is positive
    x, *hx = (t.to(dtype).requires_grad_() for t in (x, *hx))
    return layer, x, hx


MARK = pytest.mark.interpreter
ONE, FOUR = {}, {"num_layers": 2, "bidirectional": True}
RUNS = [("torch", options, cut) for options in (ONE, FOUR) for cut in ("whole", "lengths", "resets")]
RUNS += [("torch", {"bias": False}, "whole")]
ON_KERNELS = [(ONE, "lengths"), (FOUR, "resets"), ({"num_layers": 2, "bias": False}, "whole")]
RUNS += [pytest.param("persistent", *run, marks=MARK) for run in ON_KERNELS]


@pytest.mark.parametrize(("backend", "options", "cut"), RUNS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layers_are_the_paper(cell, backend, options, cut):
    on_torch = backend == "torch"
    layer, x, hx = made(cell, torch.float64 if on_torch else torch.float32, backend=backend, **options)
    given = {"lengths": torch.tensor([T, 2, 5])} if cut == "lengths" else {}
    given |= {"resets": torch.rand(T, B) < 0.3} if cut == "resets" else {}
    ours = tensors(layer(x, as_hx(hx), **given))
    torchs = "torch" if "rnn" in cell and cut != "resets" else "stepwise"
    assert layer.last_path == (torchs if on_torch else "persistent")
    weights = dict(layer.named_parameters())
    exact = [t.detach().double().requires_grad_() for t in (x, *hx, *weights.values())]
    of_paper = dict(zip(weights, exact[1 + len(hx) :], strict=True)), exact[0], exact[1 : 1 + len(hx)]
    paper = transcribed(cell, *of_paper, layer.num_layers, 2 if layer.bidirectional else 1, **given)
    for found, leaves in ((ours, [x, *hx, *weights.values()]), (paper, exact)):
        loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(found))
        found += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    rtol, atol = (1e-9, 1e-11) if on_torch else (1e-5, 5e-6)
    torch.testing.assert_close(ours, paper, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("cell", FURTHER)
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize(
    ("cell", "backend"),
    [
        *((cell, "torch") for cell in FURTHER),
        *(pytest.param(c, "persistent", marks=MARK) for c in ("peephole", "slstm")),
    ],
)
def test_compiled_in_one_graph(cell, backend):
    torch._dynamo.reset()
    layer, x, hx = made(cell, torch.float32, backend=backend, bidirectional=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = {"lengths": torch.tensor([T, 2, 5])}
    leaves = [x, *hx, *layer.parameters()]
    found = []
    for call in (layer, compiled):
        outputs = tensors(call(x, as_hx(hx), **given))
        loss = sum(t.sin().sum() for t in outputs)
        found.append(outputs + list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, as_hx(hx), **given)[0], found[0][0])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", FURTHER)
def test_second_derivatives_and_a_map_over_samples(cell, backend):
    found = []
    for path, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        layer, x, _ = made(cell, dtype, backend=path)
        weights = {name: w.detach() for name, w in layer.named_parameters()}

        def loss(weights, x, layer=layer):
            return torch.func.functional_call(layer, weights, (x.unsqueeze(1),))[0].sin().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, x.detach())
        first = torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([*per_sample.values(), *torch.autograd.grad(penalty, [x, *layer.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("cell", FURTHER)
def test_steps_streams_and_packed_sequences_are_the_sequence(cell):
    layer, x, _ = made(cell, num_layers=2)
    expected, final = layer(x)
    stream = persistrnn.Streaming(layer)
    pieces = [stream(x[:2]), *(stream.step(x_t).unsqueeze(0) for x_t in x[2:])]
    torch.testing.assert_close([torch.cat(pieces), *tensors(stream.state)], [expected, *tensors(final)])
    lengths = torch.tensor([2, T, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = layer(packed)
    mask = torch.arange(T).unsqueeze(1) < lengths
    for given in ({"lengths": lengths}, {"mask": mask}):
        padded, last = layer(x, **given)
        torch.testing.assert_close([pad_packed_sequence(y)[0], *tensors(final)], [padded, *tensors(last)])


@pytest.mark.parametrize("cell", FURTHER)
def test_every_c_and_chunks_of_time(cell):
    layer, x, hx = made(cell, num_layers=2)
    x = torch.randn(150, B, INPUT, dtype=torch.float64)
    if len(hx) > 1:
        y, states, c = layer(x, return_cell_states=True)
        assert c.shape == y.shape
        torch.testing.assert_close(c[-1], states[1][-1])
    found = []
    for layer.save in ("gates", "checkpoint"):
        loss = sum(t.sin().sum() for t in tensors(layer(x)))
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("cell", FURTHER)
def test_autocast_gives_its_dtype(cell):
    layer, x, hx = made(cell, torch.float32, bidirectional=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {t.dtype for t in tensors(layer(x, as_hx(hx)))} == {torch.bfloat16}


def test_what_such_layers_refuse():
    layer = persistrnn.SLSTM(INPUT, H)
    x = torch.randn(T, B, INPUT)
    with pytest.raises(RuntimeError, match=r"SLSTM: hx is a tuple of 4 tensors, h0 first, got 2 of them"):
        layer(x, (x, x))
    with pytest.raises(ValueError, match=r"torch.nn has GRU, LSTM, RNN, and no layer of this SLSTM's cell"):
        layer.to_torch()
    with pytest.raises(ValueError, match=r"only supported for LSTM, not for PeepholeLSTM, got 3"):
        persistrnn.PeepholeLSTM(INPUT, H, proj_size=3)
    peephole = persistrnn.PeepholeLSTM(INPUT, H)
    peephole.weight_cf_l0 = torch.nn.Parameter(torch.zeros(H + 1))
    with pytest.raises(RuntimeError, match=rf"weight_cf_l0 must have shape \({H},\), got \({H + 1},\)"):
        peephole(x)
    assert "path: stepwise, a loop over torch's operations" in persistrnn.explain(layer, B, T)
