"""A cell of one's own: declared, made a layer of, explained, refused where it is none."""

import pickle

import pytest
import torch
from pairs import PAIRS, PATHS, tensors

import persistrnn
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.cells.stages import Mean, Product

T, B, INPUT, H = 5, 3, 4, 6


@persistrnn.cell(gates=("f", "n"), states=("h",), params=("slope",), extras=("keep",))
def damped(x, r, state, p, e):
    f = torch.sigmoid(x.f + r.f)
    n = p.slope * torch.tanh(x.n + f * r.n)
    return (state.h + (1 - e.keep) * f * (n - state.h),)


@persistrnn.cell(gates=("z",), more_inputs=("skip",))
def highway(x, r, state):
    z = torch.sigmoid(x.z + r.z)
    return (z * state.h + (1 - z) * x.skip,)


@persistrnn.cell(gates=("r", "z", "n"), params=("slope",), extras=("keep",))
def reset_before(x, r, state, p, e):
    """With a second product, and what Cho's has not."""
    reset, z = torch.sigmoid(x.r + r.r), torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + (yield Product(reset * state.h)))
    new = p.slope * (n + z * (state.h - n))
    return e.keep * state.h + (1 - e.keep) * new


@persistrnn.cell(gates=("a", "b"), params=("unread",))
def centred(x, r, state, p):
    h = torch.tanh(x.a + r.a)
    return h - (yield Mean(h))


def by_hand(layer, x, keep):
    """Of one layer in two directions."""
    found, finals = [], []
    for d, way in enumerate(("", "_reverse")):
        w = {name: getattr(layer, f"{name}_l0{way}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        h, y = x.new_zeros(B, H), [None] * T
        for t in reversed(range(T)) if d else range(T):
            (xf, xn), (rf, rn) = (
                (v @ w[f"weight_{k}"].T + w[f"bias_{k}"]).chunk(2, -1) for v, k in ((x[t], "ih"), (h, "hh"))
            )
            f = torch.sigmoid(xf + rf)
            n = getattr(layer, f"slope_l0{way}") * torch.tanh(xn + f * rn)
            h = torch.where(keep[d, t], h, (1 - f) * h + f * n)
            y[t] = h
        found.append(torch.stack(y))
        finals.append(h)
    return [torch.cat(found, -1), torch.stack(finals)]


@pytest.mark.parametrize("backend", PATHS)
def test_a_layer_of_it_is_the_function(backend):
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(damped, INPUT, H, bidirectional=True, backend=backend)
    x, keep = torch.randn(T, B, INPUT, requires_grad=True), torch.rand(2, T, B, H) < 0.4
    found = []
    for outputs in (tensors(layer(x, keep=keep)), by_hand(layer, x, keep)):
        loss = sum(t.sin().sum() for t in outputs)
        found.append(outputs + list(torch.autograd.grad(loss, [x, *layer.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x, keep=keep)[0], found[0][0])
    assert list(layer.state_dict())[:5] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "slope_l0"]
    assert repr(layer).startswith("Recurrent(damped, 4, 6, bidirectional=True")


@pytest.mark.parametrize("backend", PATHS)
def test_extras_go_with_each_layer_and_through_lengths(backend):
    """What a row skips is not read, not even a NaN; without a batch the extras have none either."""
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(damped, INPUT, H, 2, backend=backend, batch_first=True)
    x, keep = torch.randn(B, T, INPUT), (torch.rand(2, T, B, H) < 0.4).float()
    lengths = torch.tensor([T, 2, 0])
    spoilt = keep.clone()
    spoilt[:, 2:, 1] = spoilt[:, :, 2] = float("nan")
    torch.testing.assert_close(layer(x, keep=spoilt, lengths=lengths), layer(x, keep=keep, lengths=lengths))
    loss = layer(x, keep=spoilt, lengths=lengths)[0].sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(layer.parameters())))
    nobody, _ = layer(x[:0], keep=keep[:, :, :0])
    assert nobody.shape == (0, T, H)
    assert not any(g.any() for g in torch.autograd.grad(nobody.sum(), list(layer.parameters())))
    row = layer(x[0], keep=keep[:, :, 0])[0]
    torch.testing.assert_close(row, layer(x, keep=keep)[0][0])


@pytest.mark.parametrize("backend", PATHS)
def test_inputs_wider_than_the_gates(backend):
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(highway, INPUT, H, backend=backend)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight_ih_l0": (2 * H, INPUT), "weight_hh_l0": (H, H), "bias_ih_l0": (2 * H,), "bias_hh_l0": (H,),
    }  # fmt: skip
    x, h, y = torch.randn(T, B, INPUT), torch.zeros(B, H), []
    for x_t in x:
        of_z, skip = (x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(2, -1)
        z = torch.sigmoid(of_z + h @ layer.weight_hh_l0.T + layer.bias_hh_l0)
        h = z * h + (1 - z) * skip
        y.append(h)
    ours = layer(x)[0]
    torch.testing.assert_close(ours, torch.stack(y), rtol=1e-5, atol=1e-6)
    weights = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), weights), torch.autograd.grad(torch.stack(y).sin().sum(), weights),
        rtol=1e-5, atol=2e-6,
    )  # fmt: skip


@persistrnn.cell(gates=("a", "b"), states=("h", "c"), params=("gain",), extras=("keep",))
def moments(x, r, state, p, e):
    """Two means, of which the second takes the first, and an extra within the first."""
    a = (x.a + r.a) * (1 - e.keep)
    a = a - (yield Mean(a))
    a = p.gain * a * torch.rsqrt((yield Mean(a * a)) + 0.1)
    c = torch.sigmoid(x.b + r.b) * state.c + a
    return torch.tanh(c), c


@persistrnn.cell(gates=("r", "z", "n"))
def both(x, r, state):
    n = torch.tanh(x.n + (yield Product(r.r * state.h)))
    return n - torch.sigmoid(r.z) * (yield Mean(n))


def test_a_step_of_several_stages():
    torch.manual_seed(0)
    theirs = persistrnn.GRU(INPUT, H, 2, bidirectional=True, reset_after=False)
    layer = persistrnn.Recurrent(reset_before, INPUT, H, 2, bidirectional=True)
    assert layer.load_state_dict(theirs.state_dict(), strict=False).missing_keys == [
        f"slope_l{k}{way}" for k in range(2) for way in ("", "_reverse")
    ]
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.fill_(1.0) if "slope" in name else None
    x, keep = torch.randn(T, B, INPUT, requires_grad=True), torch.zeros(4, T, B, H)
    found = []
    for outputs, of in ((tensors(layer(x, keep=keep)), layer), (tensors(theirs(x)), theirs)):
        weights = [p for name, p in of.named_parameters() if "slope" not in name]
        found.append(outputs + list(torch.autograd.grad(sum(t.sin().sum() for t in outputs), [x, *weights])))
    torch.testing.assert_close(*found)
    assert layer.last_path == "stepwise"
    kept = layer(x, keep=torch.ones_like(keep))[0]
    assert not kept.any()
    layer = persistrnn.Recurrent(centred, INPUT, H)
    y = layer(x)[0]
    torch.testing.assert_close(y.sum(-1), torch.zeros(T, B), rtol=0, atol=1e-5)
    assert "never read by the step: x.b, r.b, p.unread" in persistrnn.check_cell(centred)


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", [reset_before, moments])
def test_stages_on_kernels_are_those_step_by_step(cell):
    """Both orders of derivatives; what a row skips is not read, in no stage."""
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(cell, INPUT, H, bidirectional=True, backend="persistent")
    truth = persistrnn.Recurrent(cell, INPUT, H, bidirectional=True, backend="torch", dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    x, keep = torch.randn(T, B, INPUT), (torch.rand(2, T, B, H) < 0.4).float()
    x[2:, 1] = keep[:, 2:, 1] = keep[:, :, 2] = float("nan")
    found = []
    for of, dtype in ((layer, torch.float32), (truth, torch.float64)):
        given = x.to(dtype).requires_grad_()
        outputs = tensors(of(given, keep=keep.to(dtype), lengths=torch.tensor([T, 2, 0])))
        leaves = [given, *of.parameters()]
        first = torch.autograd.grad(sum(t.sin().sum() for t in outputs), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([t.double() for t in (*outputs, *first, *second)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert (layer.last_path, truth.last_path) == ("persistent", "stepwise")


@pytest.mark.interpreter
def test_stages_without_kernels():
    x = torch.randn(T, B, INPUT)
    with pytest.raises(
        RuntimeError, match=r"each step of both.* has 1 further products and 1 means; use backend='torch'"
    ):
        persistrnn.Recurrent(both, INPUT, H, backend="persistent")(x)
    with pytest.raises(RuntimeError, match=r'of centred.* got save="state"; use save="gates"'):
        persistrnn.Recurrent(centred, INPUT, H, backend="persistent", save="state")(x)


def test_the_function_is_the_layer():
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(damped, INPUT, H, 2, bidirectional=True)
    x, keep = torch.randn(T, B, INPUT), torch.rand(4, T, B, H) < 0.4
    found = persistrnn.functional.recurrent(
        damped.cell, x, list(layer.parameters()), num_layers=2, bidirectional=True, keep=keep
    )
    torch.testing.assert_close(found, layer(x, keep=keep), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"cell is one of 'lstm', .* got 'lstn'"):
        persistrnn.functional.recurrent("lstn", x, list(layer.parameters()))


def test_it_is_explained():
    text = persistrnn.check_cell(damped, hidden_size=256, batch=16, device="a100")
    for part in ("gates: f, n", "states: h", "params: slope", "extras: keep", "tiles saved per unit and step: 3"):
        assert part in text
    assert f"{damped.cell} H=256 B=16 D=1 bf16 on a100" in text
    assert "def damped_backward(d_state, saved, previous_state, p, e):" in text
    assert "states: h, c, n, m" in persistrnn.check_cell("slstm")
    assert "never read" not in persistrnn.check_cell("layer_norm_lstm") + persistrnn.check_cell("janet")


@pytest.mark.audit
def test_and_audited():
    text = persistrnn.check_cell(damped, hidden_size=64, batch=16, arch="sm_80")
    rows = [line.split() for line in text.splitlines() if line.startswith(f"{damped.cell} ")]
    assert [(row[1], row[-1]) for row in rows[1:]] == [("forward", "ok"), ("backward", "ok")]
    assert "on a100 (sm_80" in " ".join(rows[0])
    with pytest.raises(ValueError, match=r"arch is one of 'sm_80', .* got 'sm_81'"):
        persistrnn.check_cell(damped, arch="sm_81")


@pytest.mark.parametrize("cell", PAIRS)
def test_built_in_cells_by_their_names(cell):
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(cell, INPUT, H)
    torch.manual_seed(0)
    theirs, x = PAIRS[cell][1](INPUT, H), torch.randn(T, B, INPUT)
    torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=0)
    back = layer.to_torch()
    assert (type(back), back.mode) == (type(theirs), theirs.mode)
    torch.testing.assert_close(back(x), theirs(x), rtol=0, atol=0)


def plain(x, r, state):
    return (x.a + r.a,)


def test_what_is_refused():
    layer, x = persistrnn.Recurrent(damped, INPUT, H), torch.randn(T, B, INPUT)
    keep = torch.zeros(1, T, B, H)
    for given, error, text in (
        ({}, TypeError, r"damped: keep=, a tensor \[L\*D, T, B, H\], is missing"),
        ({"keep": keep[0]}, RuntimeError, r"Expected keep size \(1, 5, 3, 6\), got \[5, 3, 6\]"),
        ({"keep": keep.tolist()}, TypeError, r"keep is a tensor \[L\*D, T, B, H\], got list"),
        ({"keep": keep, "zone": keep}, TypeError, r"unexpected keyword argument 'zone'; it takes keep"),
        ({"keep": keep.to("meta")}, RuntimeError, r"Input and keep are not at the same device"),
    ):
        with pytest.raises(error, match=text):
            layer(x, **given)
    with pytest.raises(
        TypeError, match=r"made a cell by @persistrnn.cell, or one of 'lstm'.*got function; decorate it"
    ):
        persistrnn.Recurrent(plain, INPUT, H)
    with pytest.raises(ValueError, match=r"or one of 'lstm', 'gru'.* got 'lstn'"):
        persistrnn.Recurrent("lstn", INPUT, H)
    known = set(CELLS)
    with pytest.raises(ValueError, match=r"params has 'weight_hh', a name that layers use themselves"):
        persistrnn.cell(gates=("a",), params=("weight_hh",))(plain)
    with pytest.raises(ValueError, match=r"extras has 'lengths', a name that layers use themselves"):
        persistrnn.cell(gates=("a",), extras=("lengths",))(plain)
    with pytest.raises(ValueError, match=r"gates='ab'; allowed"):
        persistrnn.cell(gates="ab")(plain)
    assert set(CELLS) == known


def test_check_cell_shows_a_step_of_stages_part_by_part():
    told = persistrnn.check_cell("gru_reset_before", 512, 16)
    assert "gates: r, z, n" in told
    assert "tiles saved per unit and step: 4;" in told
    assert "gru_reset_before H=512 B=16" in told
    assert "if part == 0:\n        v9 = x_gates[0] + r_gates[0]" in told
