"""Layers of the cells that torch has not, against transcriptions of their papers: a loop in the test, in float64."""

import re
from functools import partial

import pytest
import torch
from accuracy import DTYPES, Bound
from pairs import as_hx, tensors
from torch import sigmoid, tanh
from torch.nn.functional import layer_norm, linear
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


def gru_reset_before(x, h, own):
    """Cho et al. 2014, equations 5 to 8."""
    wr, wz, wn = own["weight_ih"].chunk(3)
    ur, uz, un = own["weight_hh"].chunk(3)
    zeros = x.new_zeros(3 * H)
    br, bz, bn = (own.get("bias_ih", zeros) + own.get("bias_hh", zeros)).chunk(3)
    r, z = sigmoid(wr @ x + ur @ h + br), sigmoid(wz @ x + uz @ h + bz)
    return (z * h + (1 - z) * tanh(wn @ x + un @ (r * h) + bn),)


def normalised(x, h, own):
    """Both halves of the gates, by torch's own layer norm."""
    pairs = ((own["weight_ih"] @ x, "ih"), (own["weight_hh"] @ h, "hh"))
    return (layer_norm(v, v.shape, own[f"weight_ln_{of}"], own.get(f"bias_{of}")) for v, of in pairs)


def layer_norm_lstm(x, h, c, own):
    """Ba, Kiros and Hinton 2016, equations 20 to 22."""
    x, r = normalised(x, h, own)
    i, f, g, o = (x + r).chunk(4)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(layer_norm(c, c.shape, own["weight_ln_c"], own["bias_ln_c"])), c


def layer_norm_gru(x, h, own):
    (xr, xz, xn), (rr, rz, rn) = (t.chunk(3) for t in normalised(x, h, own))
    z = sigmoid(xz + rz)
    return (z * h + (1 - z) * tanh(xn + sigmoid(xr + rr) * rn),)


# of (x_t, *states, the weights by name): what is not pointwise after one product
WHOLE = {f.__name__: f for f in (gru_reset_before, layer_norm_lstm, layer_norm_gru)}

LN = ("weight_ln_ih", "weight_ln_hh")  # [G*H]
LN_C = (*LN, "weight_ln_c", "bias_ln_c")
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
    "gru_reset_before": (partial(persistrnn.GRU, reset_after=False), None, 3, 1, ()),
    "layer_norm_lstm": (persistrnn.LayerNormLSTM, None, 4, 2, LN_C),
    "layer_norm_gru": (persistrnn.LayerNormGRU, None, 3, 1, LN),
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
                    if cell in WHOLE:
                        state = WHOLE[cell](x[t, b], *state, own)
                    else:
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
    layer = CELLS[cell][0](INPUT, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for w in layer.parameters():  # no norm as it begins, with weights of 1 and biases of 0
            w += torch.rand_like(w) - 0.5 if "layer_norm" in cell else 0.0
    layer.to(dtype)
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
RUNS = [(cell, *run) for cell in CELLS for run in RUNS]
RUNS += [pytest.param(c, "persistent", *run, marks=MARK) for c in CELLS if c not in WHOLE for run in ON_KERNELS]
RUNS += [
    pytest.param("layer_norm_lstm", "persistent", {"bidirectional": True, "bias": False}, "resets", marks=MARK),
    pytest.param("layer_norm_gru", "persistent", {"num_layers": 2}, "lengths", marks=MARK),
    pytest.param("gru_reset_before", "persistent", {"bidirectional": True}, "resets", marks=MARK),
]


@pytest.mark.parametrize(("cell", "backend", "options", "cut"), RUNS, ids=str)
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
    if not on_torch and cell in WHOLE:  # a norm of few units that are nearly alike makes much of their last bits
        for a, b in zip(ours, paper, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        return
    rtol, atol = (1e-9, 1e-11) if on_torch else (1e-5, 5e-6)
    torch.testing.assert_close(ours, paper, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("cell", WHOLE)
def test_half_precision_step_by_step_keeps_the_bound(cell, dtype):
    """Of ``helpers/accuracy``: the witness is the paper in that dtype. Of all others the kernels keep it."""
    bound = Bound(DTYPES[dtype])
    layer, x, hx = made(cell, bound.dtype, num_layers=2)
    weights = dict(layer.named_parameters())
    names = ["y", "h_n", "c_n"][: 1 + len(hx)]
    names += [f"d {name}" for name in ("x", "h0", "c0")[: 1 + len(hx)]] + [f"d {name}" for name in weights]
    found = []
    for of in (None, torch.float64, bound.dtype):
        leaves = [t.detach().to(of).requires_grad_() if of else t for t in (x, *hx, *weights.values())]
        x_, hx_ = leaves[0], leaves[1 : 1 + len(hx)]
        own = dict(zip(weights, leaves[1 + len(hx) :], strict=True))
        outputs = transcribed(cell, own, x_, hx_, 2, 1) if of else tensors(layer(x_, as_hx(hx_)))
        torch.manual_seed(1)
        cotangents = [torch.randn(t.shape).to(bound.dtype).to(t.dtype) for t in outputs]
        outputs += torch.autograd.grad(outputs, leaves, cotangents)
        found.append({name: t.detach().double() for name, t in zip(names, outputs, strict=True)})
    bound.add(cell, *found)
    assert bound.failures == []


@pytest.mark.parametrize("cell", FURTHER)
def test_parameters_have_the_documented_names(cell):
    _, _, gates, _, own = CELLS[cell]
    layer = made(cell, num_layers=2, bidirectional=True)[0]
    rows = gates * H
    shapes = {"weight_ih": (rows, INPUT), "weight_hh": (rows, H), "bias_ih": (rows,), "bias_hh": (rows,)}
    shapes |= {name: (rows if name in LN else H,) for name in own}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "_l0" in name} == {
        f"{name}_l0{way}": shape for way in ("", "_reverse") for name, shape in shapes.items()
    }
    if cell not in WHOLE:
        assert all(p.abs().max() <= H**-0.5 and p.std() > 0 for p in layer.parameters())
    other = made(cell, num_layers=2, bidirectional=True)[0]
    other.load_state_dict(layer.state_dict())
    assert list(other.state_dict()) == list(layer.state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize(
    ("cell", "backend"),
    [
        *((cell, "torch") for cell in CELLS if cell != "rnn_relu"),
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


def by_samples_and_twice(call, weights, x, hx):
    """Gradients per sample, and those of a gradient penalty. call: (weights by name, x, hx) -> y."""

    def loss(weights, x, hx):
        return call(weights, x.unsqueeze(1), [s.unsqueeze(1) for s in hx]).sin().sum()

    sides = {name: w.detach() for name, w in weights.items()}, x.detach(), [s.detach() for s in hx]
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1))(*sides)
    leaves = [x, *weights.values()]
    first = torch.autograd.grad(call(weights, x, hx).sin().sum(), leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return [*per_sample.values(), *torch.autograd.grad(penalty, leaves)]


def called(layer):
    return lambda weights, x, hx: torch.func.functional_call(layer, weights, (x, as_hx(hx)))[0]


SECOND = [(cell, "torch") for cell in CELLS if cell not in WHOLE]
SECOND += [pytest.param(cell, "persistent", marks=MARK) for cell in CELLS if cell not in WHOLE]


@pytest.mark.parametrize(("cell", "backend"), SECOND)
def test_second_derivatives_and_a_map_over_samples(cell, backend):
    found = []
    for path, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        layer, x, hx = made(cell, dtype, backend=path)
        found.append(by_samples_and_twice(called(layer), dict(layer.named_parameters()), x, hx))
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("cell", WHOLE)
def test_second_derivatives_of_several_stages(cell):
    layer, x, hx = made(cell)
    given = dict(layer.named_parameters()), x, hx

    def paper(weights, x, hx):
        return transcribed(cell, weights, x, hx, 1, 1)[0]

    ours, theirs = (by_samples_and_twice(call, *given) for call in (called(layer), paper))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


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


@pytest.mark.parametrize(("cell", "save"), [(c, save) for c in WHOLE for save in ("state", "checkpoint")])
def test_steps_of_several_stages_say_what_the_kernels_do_not_run(cell, save):
    layer, x, _ = made(cell, torch.float32, save=save)
    words = f'of {cell}, .* keep what the backward needs of every step, got save="{save}"; use save="gates"'
    assert re.search(rf"path: stepwise, .*\nwhy: .*{words}", persistrnn.explain(layer, B, T))
    layer.backend = "persistent"
    with pytest.raises(RuntimeError, match=words):
        layer(x)
    with pytest.raises(ValueError, match="and no layer of this"):
        layer.to_torch()
    if "layer_norm" in cell:
        with pytest.raises(
            ValueError, match=r"a LAYER_NORM_\w+ normalises over all units, .* got heads=5; use heads=1"
        ):
            CELLS[cell][0](INPUT, H, heads=5)


def test_a_state_dict_of_torchs_gru_loads_into_the_papers_and_is_another_function():
    torchs = torch.nn.GRU(INPUT, H, 2, bidirectional=True)
    layer = persistrnn.GRU(INPUT, H, 2, bidirectional=True, reset_after=False)
    assert layer.load_state_dict(torchs.state_dict()).missing_keys == []
    x = torch.randn(T, B, INPUT)
    assert (layer(x)[0] - torchs(x)[0]).abs().max() > 1e-3
    assert "reset_after=False" in str(layer)
    assert persistrnn.replace(torchs).model.reset_after is True
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        persistrnn.GRU(INPUT, H, reset_after=0)


def test_heads_of_the_papers_gru_are_a_block_diagonal_matrix():
    torch.manual_seed(0)
    whole, parted = (persistrnn.GRU(INPUT, 6, heads=n, reset_after=False, dtype=torch.float64) for n in (1, 2))
    with torch.no_grad():
        for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
            if a.shape == b.shape:
                b.copy_(a)
        whole.weight_hh_l0.zero_()
        gates = whole.weight_hh_l0.view(3, 2, 3, 2, 3)  # gate, head, unit of it, head, unit of it
        for head in range(2):
            gates[:, head, :, head] = parted.weight_hh_l0[head].view(3, 3, 3)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    torch.testing.assert_close(parted(x), whole(x))


@pytest.mark.parametrize("cell", [c for c in WHOLE if "layer_norm" in c])
def test_norms_are_formed_in_float32(cell):
    """In bfloat16 nearer to the truth than torch's operations with its own layer norm, whose results are rounded."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = CELLS[cell][0](16, 32, dtype=torch.float64)
        x = torch.randn(12, 8, 16, dtype=torch.float64)
        with torch.no_grad():
            true = layer(x)[0]
            found = layer.bfloat16()(x.bfloat16())[0]
            own = {name.removesuffix("_l0"): w for name, w in layer.named_parameters()}
            rows = []
            for b in range(8):
                state = [torch.zeros(32, dtype=torch.bfloat16)] * CELLS[cell][3]
                for x_t in x[:, b].bfloat16():
                    state = WHOLE[cell](x_t, *state, own)
                    rows.append(state[0])
        of_torch = torch.stack(rows).view(8, 12, 32).transpose(0, 1)
        ratios.append((found - true).norm() / (of_torch - true).norm())
    assert torch.stack(ratios).mean() < 0.85


def test_norms_begin_as_torchs():
    layer = persistrnn.LayerNormLSTM(INPUT, H)
    begin = {name: w for name, w in layer.named_parameters() if "ln" in name or "bias" in name}
    assert {name: w.unique().tolist() for name, w in begin.items()} == {
        name: [float(name.startswith("weight"))] for name in begin
    }
    assert 0 < layer.weight_hh_l0.abs().max() <= H**-0.5
