"""The functions: plumbing of a stack around the recurrence, the choice of a path, validation at the validate.

The kernels have tests of their own; here the reference stands in for `autograd.recurrent`.
"""

import itertools

import pytest
import torch
from torch import nn

import persistrnn
from persistrnn import autograd, calls, decide, functional, ops, reference, step_marks
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options
from persistrnn.request import Request

pytestmark = pytest.mark.torch_path

PAIRS = {"lstm": (functional.lstm, nn.LSTM), "gru": (functional.gru, nn.GRU), "rnn_tanh": (functional.rnn, nn.RNN)}
STEPS, BATCH, INPUT, HIDDEN = 4, 3, 5, 6


def leaves_of(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that run everything: the reference, with the contract of `autograd.recurrent` checked. Yields the
    list of its calls."""
    calls = []

    def recurrent(cell, x_gates, weight_hh, bias_hh, initial, precision, marks, reset, return_c, cell_dtype, heads):
        directions, rows, hidden = weight_hh.shape
        initial = initial or [x_gates.new_zeros(directions, x_gates.size(1), hidden)] * CELLS[cell].states
        bias_hh = x_gates.new_zeros(directions, rows) if bias_hh is None else bias_hh
        tensors = [x_gates, weight_hh, bias_hh, *initial]
        assert x_gates.shape[2:] == (directions, rows)
        assert bias_hh.shape == (directions, rows)
        assert [s.shape for s in initial] == [(directions, x_gates.size(1), hidden)] * CELLS[cell].states
        assert all(t.is_contiguous() for t in tensors)
        assert len({t.dtype for t in tensors}) == 1
        calls.append({"cell": cell, "dtype": x_gates.dtype, "precision": precision, "shape": x_gates.shape})
        return reference.recurrent(cell, x_gates, weight_hh, bias_hh, initial, marks, reset)

    def unsupported(call):
        return None if call.batch > 0 else "there is no plan for an empty batch."

    def marks(lengths, active, resets, steps, batch, directions):
        assert lengths is None
        return step_marks.marks(active, resets, directions), active

    monkeypatch.setattr(ops, "marks", marks)
    monkeypatch.setattr(autograd, "recurrent", recurrent)
    monkeypatch.setattr(decide, "unsupported", unsupported)
    return calls


def make(cell, **options):
    torch.manual_seed(0)
    layer = PAIRS[cell][1](INPUT, HIDDEN, **options).double()
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(rows, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    shape = (BATCH, STEPS, INPUT) if layer.batch_first else (STEPS, BATCH, INPUT)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return layer, x, tuple(states) if cell == "lstm" else states[0]


def options_of(layer):
    names = ("num_layers", "bias", "dropout", "training", "bidirectional", "batch_first")
    return {name: getattr(layer, name) for name in names}


@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "bias", "batch_first"),
    [*itertools.product([1, 3], [False, True], [True, False], [False]), (2, True, True, True)],
)
@pytest.mark.parametrize("cell", PAIRS)
def test_persistent_stack_equals_torch_nn(kernels, cell, num_layers, bidirectional, bias, batch_first):
    layer, x, hx = make(cell, num_layers=num_layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    weights = list(layer.parameters())
    expected = leaves_of(layer(x, hx))
    actual = leaves_of(PAIRS[cell][0](x, weights, hx, backend="persistent", **options_of(layer)))
    inputs = [x, *leaves_of(hx), *weights]
    cotangents = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangents),
        torch.autograd.grad(expected, inputs, cotangents),
        rtol=1e-10,
        atol=1e-12,
    )
    assert len(kernels) == num_layers


def test_autocast_leaves_float64_alone(kernels):
    layer, x, hx = make("lstm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = functional.lstm(x, list(layer.parameters()), hx, backend="persistent")
    assert y.dtype == kernels[0]["dtype"] == torch.float64


@pytest.fixture
def rnn_precision():
    """torch's float32 setting of recurrent layers, put back by the older flag: it sets that of convolutions, too, and
    torch refuses to work where the two differ from it."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    yield torch.backends.cudnn.rnn
    torch.backends.cudnn.allow_tf32 = before


def test_precision_is_torch_rnn_setting(rnn_precision):
    assert calls.precision() == "tf32"
    for setting, expected in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
        rnn_precision.fp32_precision = setting
        assert calls.precision() == expected
    torch.backends.cudnn.allow_tf32 = False
    assert calls.precision() == "ieee"


def path_of(layer, x, backend, **options):
    arguments = {**options_of(layer), **options}
    cell = type(layer).__name__.lower()
    return calls.run(Request(cell, x, list(layer.parameters()), None, Options(**arguments, backend=backend))).path


@pytest.mark.parametrize("what", ["plain", "projected", "packed"])
def test_auto_runs_cpu_tensors_on_torch_path_even_where_kernels_could(kernels, what):
    layer, x, _ = make("lstm", **({"proj_size": 2} if what == "projected" else {}))
    x = nn.utils.rnn.pack_padded_sequence(x, [STEPS] * BATCH) if what == "packed" else x
    assert [path_of(layer, x, backend) for backend in ("auto", "torch")] == ["torch"] * 2
    assert path_of(layer, x, "persistent") == "persistent"
    assert len(kernels) == 1


@pytest.mark.parametrize("cell", PAIRS)
def test_persistent_checks_devices_before_it_launches(kernels, cell):
    layer, x, hx = make(cell)
    weights = list(layer.parameters())
    away = tuple(s.to("meta") for s in hx) if cell == "lstm" else hx.to("meta")
    with pytest.raises(RuntimeError, match="input tensor at meta and parameter tensor at cpu"):
        PAIRS[cell][0](x.to("meta"), weights, backend="persistent")
    with pytest.raises(RuntimeError, match="parameter tensor at meta"):
        PAIRS[cell][0](x, [*weights[:-1], weights[-1].to("meta")], backend="persistent")
    with pytest.raises(RuntimeError, match="input tensor at cpu and hidden tensor at meta"):
        PAIRS[cell][0](x, weights, away, backend="persistent")
    assert kernels == []


def test_public_names():
    layers = "GRU JANET LSTM MGU RNN SLSTM CoupledLSTM LayerNormGRU LayerNormLSTM PeepholeLSTM Recurrent Stacked"
    functions = "accelerate accelerated cell check check_cell dequantize explain flops functional profile quantize"
    others = "Recipe", "Streaming", "__version__", "replace", "restore", "warmup"
    assert set(persistrnn.__all__) == {*layers.split(), *functions.split(), *others}
    assert all(hasattr(persistrnn, name) for name in persistrnn.__all__)
