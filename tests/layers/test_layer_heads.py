"""heads=n: the layer is the ordinary one whose W_hh has its blocks on the diagonal of each gate and zeros elsewhere."""

import copy

import pytest
import torch
from pairs import PATHS, as_hx, tensors
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn
from persistrnn import decide, functional
from persistrnn.kernels import cells, launch

# Triton's interpreter computes what it masks: sLSTM's 0 / 0 in units past H.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")

T, B, INPUT, H, HEADS = 5, 3, 4, 6, 2


@persistrnn.cell(gates=("f", "n"), states=("h", "c"), params=("slope",), extras=("drop",), more_inputs=("skip",))
def everything(x, r, state, p, e):
    f = torch.sigmoid(x.f + r.f)
    c = torch.where(e.drop > 0, state.c, f * state.c + (1 - f) * torch.tanh(x.n + f * r.n))
    return p.slope * torch.tanh(c) + torch.sigmoid(x.skip) * state.h, c


LAYERS = {
    "lstm": persistrnn.LSTM, "gru": persistrnn.GRU, "rnn_tanh": persistrnn.RNN, "peephole": persistrnn.PeepholeLSTM,
    "coupled": persistrnn.CoupledLSTM, "mgu": persistrnn.MGU, "janet": persistrnn.JANET, "slstm": persistrnn.SLSTM,
}  # fmt: skip
CELLS = [*LAYERS, "everything"]
MARK = pytest.mark.interpreter


def made(cell, *, heads=HEADS, dtype=torch.float64, **options):
    """A layer, always from the same numbers."""
    torch.manual_seed(0)
    given = {"heads": heads, "dtype": torch.float64, **options}
    if cell == "everything":
        return persistrnn.Recurrent(everything, INPUT, H, **given).to(dtype)
    return LAYERS[cell](INPUT, H, **given).to(dtype)


def drawn(layer, cut="whole", steps=T):
    """x, the states, and what else a call takes, in the layer's dtype."""
    rows, of = layer.num_layers * (1 + layer.bidirectional), cells.CELLS[layer.cell]
    torch.manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).to(layer.bias_ih_l0 if layer.bias else layer.weight_ih_l0)

    def states():
        found = [leaf(rows, B, H) for _ in range(of.states)]
        if of.name == "slstm":
            found[2] = found[2].abs() + 0.5  # a normaliser is positive
        return found

    x, hx, given = leaf(steps, B, INPUT), states(), {}
    if cut == "lengths":
        given["lengths"] = torch.tensor([steps, 0, 2])
    elif cut == "mask":
        given["mask"] = torch.rand(steps, B) < 0.6
    elif cut == "resets":
        given |= {"resets": torch.rand(steps, B) < 0.4, "reset_state": as_hx(states())}
    for name in of.extras:
        given[name] = (torch.rand(rows, steps, B, H) < 0.3).to(x.dtype)
    return x.requires_grad_(), [s.requires_grad_() for s in hx], given


def whole(layer, weights):
    """The weights of the ordinary layer: blocks on the diagonal of each gate, the gates one below the other."""
    gates = cells.CELLS[layer.cell].gates

    def matrix(blocks):
        tiles = blocks.unflatten(1, (gates, H // HEADS))
        return torch.cat([torch.block_diag(*tiles[:, g]) for g in range(gates)])

    return {name: matrix(w) if name.startswith("weight_hh") else w for name, w in weights.items()}


def ordinary(layer):
    """The layer with one W_hh, as a function of the weights in heads, in float64 on torch's path."""
    other = copy.deepcopy(layer).double()
    other.heads, other.backend, other.save = 1, "torch", "gates"

    def call(weights, *args, **given):
        return functional_call(other, whole(layer, weights), args, given)

    return call


def with_gradients(call, leaves, create_graph=False):
    found = tensors(call())
    loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(found))
    return found + list(
        torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )


def compared(layer, x, hx, given, call=None):
    """(results and gradients of the layer, or of a call of it, those of the ordinary one in float64)."""
    weights, reset = dict(layer.named_parameters()), tensors(given.get("reset_state"))
    run = layer if call is None else call
    given = given | ({"reset_state": as_hx([r.requires_grad_() for r in reset])} if reset else {})
    ours = with_gradients(lambda: run(x, as_hx(hx), **given), [x, *hx, *reset, *weights.values()])
    of_all = [t.detach().double().requires_grad_() for t in (x, *hx, *reset, *weights.values())]
    x, hx, reset = of_all[0], of_all[1 : 1 + len(hx)], of_all[1 + len(hx) : 1 + len(hx) + len(reset)]
    exact = dict(zip(weights, of_all[1 + len(hx) + len(reset) :], strict=True))
    given = {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in given.items()
    }
    given |= {"reset_state": as_hx(reset)} if reset else {}
    return ours, with_gradients(lambda: ordinary(layer)(exact, x, as_hx(hx), **given), of_all)


ONE, FOUR = {}, {"num_layers": 2, "bidirectional": True}
ON_TORCH = [(ONE, "whole"), (FOUR, "resets"), ({**FOUR, "bias": False}, "lengths"), (ONE, "mask")]
ON_KERNELS = [(FOUR, "resets"), ({"bias": False}, "lengths"), ({"num_layers": 2}, "mask")]
# Each cell with two of the forms, each form with several cells.
RUNS = [(cell, "torch", *ON_TORCH[(k + n) % 4]) for k, cell in enumerate(CELLS) for n in (0, 1)]
RUNS += [pytest.param(cell, "persistent", *ON_KERNELS[k % 3], marks=MARK) for k, cell in enumerate(CELLS)]


@pytest.mark.parametrize(("cell", "backend", "options", "cut"), RUNS, ids=str)
def test_heads_are_the_blocks_of_w_hh(cell, backend, options, cut):
    on_torch = backend == "torch"
    layer = made(cell, dtype=torch.float64 if on_torch else torch.float32, backend=backend, **options)
    found = compared(layer, *drawn(layer, cut))
    assert layer.last_path == ("stepwise" if on_torch else "persistent")
    rtol, atol = (1e-10, 1e-12) if on_torch else (1e-5, 5e-6)
    torch.testing.assert_close(*found, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("cell", CELLS)
def test_parameters(cell):
    layer, gates = made(cell, num_layers=2, bidirectional=True), cells.CELLS[made(cell).cell].gates
    plain = made(cell, heads=1, num_layers=2, bidirectional=True)
    shapes = {name: tuple(w.shape) for name, w in plain.named_parameters()}
    blocks = (HEADS, gates * H // HEADS, H // HEADS)
    expected = {name: blocks if name.startswith("weight_hh") else shape for name, shape in shapes.items()}
    assert {name: tuple(w.shape) for name, w in layer.named_parameters()} == expected
    assert all(w.abs().max() <= H**-0.5 and w.std() > 0 for w in layer.parameters())
    assert f"heads={HEADS}" in repr(layer)
    assert "heads" not in repr(plain)
    other = made(cell, num_layers=2, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        plain.load_state_dict(layer.state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("backend", PATHS)
def test_compiled_in_one_graph(backend):
    torch._dynamo.reset()
    layer = made("everything", dtype=torch.float32, backend=backend, bidirectional=True)
    x, hx, given = drawn(layer, "lengths")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compared(layer, x, hx, given, compiled)
    torch.testing.assert_close(*found, rtol=1e-5, atol=5e-6, check_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, as_hx(hx), **given)[0], found[0][0], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_second_derivatives_and_a_map_over_samples(cell, backend):
    layer = made(cell, dtype=torch.float32, backend=backend)
    x = drawn(layer)[0].detach()
    found = []
    for call, dtype in (
        (lambda weights, *args: functional_call(layer, weights, args), torch.float32),
        (ordinary(layer), torch.float64),
    ):
        weights = {name: w.detach().to(dtype) for name, w in layer.named_parameters()}

        def loss(weights, x, call=call):
            return call(weights, x.unsqueeze(1))[0].sin().sum()

        per_sample = vmap(grad(loss), in_dims=(None, 1))(weights, x.to(dtype))
        leaves = [t.requires_grad_() for t in (x.to(dtype, copy=True), *weights.values())]
        first = torch.autograd.grad(call(weights, leaves[0])[0].sin().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([*per_sample.values(), *torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_steps_streams_packed_and_unbatched_are_the_sequence(cell, backend):
    layer = made(cell, dtype=torch.float32, num_layers=2, backend=backend)
    x = drawn(layer)[0]
    expected, final = layer(x)
    stream = persistrnn.Streaming(layer)
    pieces = [stream(x[:2]), *(stream.step(x_t).unsqueeze(0) for x_t in x[2:])]
    torch.testing.assert_close([torch.cat(pieces), *tensors(stream.state)], [expected, *tensors(final)])
    torch.testing.assert_close(layer(x[:, 0])[0], expected[:, 0])
    lengths = torch.tensor([2, T, 4])
    y, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, last = layer(x, lengths=lengths)
    torch.testing.assert_close([pad_packed_sequence(y)[0], *tensors(final)], [padded, *tensors(last)])
    empty = layer(x[:, :0])
    assert [t.shape[1] for t in tensors(empty)] == [0] * len(tensors(empty))
    (gradient,) = torch.autograd.grad(empty[0].sum(), [layer.weight_hh_l0])
    assert gradient.shape == layer.weight_hh_l0.shape
    assert not gradient.any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_c_and_chunks_of_time(cell):
    layer = made(cell, **FOUR)
    x, hx, given = drawn(layer, "resets", steps=150)
    given |= {"return_cell_states": True} if cell == "lstm" else {}
    for layer.save in ("gates", "checkpoint", "state"):
        torch.testing.assert_close(*compared(layer, x, hx, given), rtol=1e-9, atol=1e-11)


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "save", "options", "cut"), [
    ("lstm", "gates", FOUR, "resets"), ("everything", "state", FOUR, "lengths"), ("gru", "state", ONE, "mask"),
    ("everything", "checkpoint", {"num_layers": 2}, "resets"), ("gru", "checkpoint", FOUR, "lengths"),
])  # fmt: skip
def test_chunks_of_time_on_the_kernels(monkeypatch, cell, save, options, cut):
    monkeypatch.setattr(decide, "chunk_steps", lambda *_: 2)
    layer = made(cell, dtype=torch.float32, backend="persistent", save=save, **options)
    x, hx, given = drawn(layer, cut)
    before = launch.LAUNCHES.copy()
    found = compared(layer, x, hx, given)
    assert (launch.LAUNCHES - before)["scan_backward"] == 3 * layer.num_layers
    assert layer.last_path == "persistent"
    torch.testing.assert_close(*found, rtol=1e-5, atol=5e-6, check_dtype=False)


@pytest.mark.interpreter
def test_every_c_on_the_kernels():
    layer = made("lstm", dtype=torch.float32, backend="persistent", cell_dtype=torch.float32, **FOUR)
    x, hx, given = drawn(layer)
    found = compared(layer, x, hx, given | {"return_cell_states": True})
    torch.testing.assert_close(*found, rtol=1e-5, atol=5e-6, check_dtype=False)


@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm"])
def test_autocast_gives_what_the_ordinary_layer_gives(cell):
    layer, plain = (made(cell, heads=n, dtype=torch.float32) for n in (HEADS, 1))
    x = drawn(layer)[0]
    mask = torch.ones(T, B, dtype=torch.bool)  # with which torch's own kernels run neither
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(layer(x, mask=mask))
        assert [t.dtype for t in found] == [t.dtype for t in tensors(plain(x, mask=mask))]
    torch.testing.assert_close(found, tensors(layer(x)), rtol=0.03, atol=0.03, check_dtype=False)


@pytest.mark.interpreter
def test_explain_says_heads_and_that_nothing_is_exchanged():
    layer = persistrnn.GRU(8, 32, heads=4, backend="persistent")
    text = persistrnn.explain(layer, batch=2, steps=8)
    assert "GRU(8, 32, backend=persistent, heads=4)" in text
    assert "path: persistent" in text
    assert "H=32 in 4 heads" in text
    assert text.count("no exchange") == 2


def test_explain_where_the_kernels_do_not_run():
    text = persistrnn.explain(persistrnn.LSTM(8, 32, heads=4), batch=2, steps=8)
    assert "path: stepwise, a loop over torch's operations" in text
    assert "runs CPU tensors on torch's own operations" in text


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("heads", "kind", "words"),
    [
        (4, ValueError, "heads divides hidden_size=6: it is one of 1, 2, 3, 6, got 4; give one of them, or another"),
        (0, ValueError, "heads must be greater than zero, got 0"),
        (2.0, TypeError, r"heads should be of type int, got: float \(2.0\)"),
        (True, TypeError, r"heads should be of type int, got: bool \(True\)"),
    ],
)
def test_a_count_that_cannot_be_is_refused(cell, heads, kind, words):
    with pytest.raises(kind, match=words):
        made(cell, heads=heads)
    layer = made(cell)
    layer.heads = heads
    for call in (lambda: layer(torch.zeros(T, B, INPUT)), lambda: persistrnn.explain(layer, B, T)):
        with pytest.raises(kind, match=words):
            call()


def test_what_goes_not_with_heads_is_refused():
    with pytest.raises(ValueError, match="projections has one W_hh, got heads=2; leave heads or proj_size out"):
        persistrnn.LSTM(INPUT, H, proj_size=3, heads=2)
    with pytest.raises(ValueError, match=r"torch.nn has no heads, this GRU has heads=2; one with heads=1 has an equal"):
        made("gru").to_torch()
    x, layer = torch.randn(T, B, INPUT), made("lstm", dtype=torch.float32)
    layer.heads = 3  # which divides H, and is not that of the weights
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have shape \(3, 8, 2\), got \(2, 12, 3\)"):
        layer(x)
    layer.heads = 1
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have shape \(24, 6\), got \(2, 12, 3\)"):
        layer(x)


def test_functions_take_heads():
    x, layer = drawn(made("lstm"))[0], made("lstm")
    weights = list(layer.parameters())
    torch.testing.assert_close(functional.lstm(x, weights, heads=HEADS), layer(x))
    for cell, call in (("gru", functional.gru), ("rnn_tanh", functional.rnn)):
        layer = made(cell)
        torch.testing.assert_close(call(x, list(layer.parameters()), heads=HEADS), layer(x))
    slstm = made("slstm")
    torch.testing.assert_close(functional.recurrent("slstm", x, list(slstm.parameters()), heads=HEADS), slstm(x))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have shape \(2, 12, 3\), got \(24, 6\)"):
        functional.lstm(x, list(made("lstm", heads=1).parameters()), heads=2)
    with pytest.raises(ValueError, match=r"heads divides hidden_size=6.* got 4"):
        functional.lstm(x, weights, heads=4)
    flat = [torch.zeros(0, dtype=torch.float64)] * 4
    with pytest.raises(RuntimeError, match=r"must have shape \(2, 4\*H/2, H/2\) with H > 0, got \(0,\)"):
        functional.lstm(x, flat, heads=2)
    projected = list(persistrnn.LSTM(INPUT, H, proj_size=3, dtype=torch.float64).parameters())
    with pytest.raises(ValueError, match="a layer with projections has one W_hh, got heads=2"):
        functional.lstm(x, projected, heads=2)


def test_replace_makes_no_heads():
    for theirs in (nn.LSTM(INPUT, H), nn.GRU(INPUT, H), nn.RNN(INPUT, H)):
        new = persistrnn.replace(theirs).model
        assert new.heads == 1
        assert "heads" not in vars(new.to_torch())
