"""W_hh in 8 bits: on the kernels and on torch's own path the products are those of the dequantised weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

import persistrnn
from persistrnn.eight_bits import dequantized, quantized

DTYPES = (torch.int8, torch.float8_e4m3fn)


def made(cell, dtype, **options):
    torch.manual_seed(0)
    return persistrnn.quantize(persistrnn.Recurrent(cell, 5, 24, dtype=torch.bfloat16, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_off_by_at_most_half_a_step(dtype):
    torch.manual_seed(0)
    weight = torch.randn(12, 30) * torch.logspace(-6, 3, 12).unsqueeze(1)
    weight[3] = 0
    bits, scale = quantized(weight, dtype)
    off = (dequantized(bits, scale, torch.float64) - weight.double()).abs()
    half = scale.double().unsqueeze(1) * (
        0.5 if dtype == torch.int8 else (weight.abs() / scale.unsqueeze(1) / 16).clamp(2**-10)
    )
    assert (off <= half * (1 + 1e-6)).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_layer_is_a_module_as_any(dtype):
    layer = made("lstm", dtype)
    x = torch.randn(4, 3, 5).bfloat16()
    y = layer(x)[0]
    assert f"weight_dtype={dtype}" in repr(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    loaded = persistrnn.quantize(persistrnn.Recurrent("lstm", 5, 24, dtype=torch.bfloat16), dtype)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], y)
    wide = copy.deepcopy(layer).double().to(torch.bfloat16)
    assert torch.equal(wide.weight_hh_l0_scale, layer.weight_hh_l0_scale)
    assert torch.equal(wide(x)[0], y)
    assert torch.equal(persistrnn.dequantize(copy.deepcopy(layer))(x)[0], y)
    stream = persistrnn.Streaming(layer)
    parts = torch.cat([stream(x[:1]), stream.step(x[1]).unsqueeze(0), stream(x[2:])])
    torch.testing.assert_close(parts, y, rtol=0, atol=0.02)
    assert "path: torch" in persistrnn.explain(layer, 3, 4)
    assert "in training" not in persistrnn.explain(layer, 3, 4)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], y)
    assert torch.equal(torch.jit.trace(layer, (x,))(x)[0], y)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(layer)(x.unsqueeze(0))[0][0], y)
    assert layer(x[:, :0])[0].shape == (4, 0, 24)


@pytest.mark.interpreter
def test_on_the_kernels():
    layer = made("lstm", torch.float8_e4m3fn, backend="persistent", num_layers=2)
    x = torch.randn(4, 3, 5).bfloat16()
    y = layer(x)[0]
    assert "W_hh in fp8" in persistrnn.explain(layer, 3, 4)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], y)
    mixed = persistrnn.quantize(persistrnn.LSTM(5, 24, backend="persistent"), torch.float8_e4m3fn)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(x.float())[0].dtype == torch.bfloat16
    assert layer(x[:, :0])[0].shape == (4, 0, 24)
    lengths = torch.tensor([4, 0, 2])
    assert torch.equal(layer(x, lengths=lengths)[0][:, 0], y[:, 0])
    with pytest.raises(RuntimeError, match=r"convert layer and input to one of these"):
        persistrnn.quantize(persistrnn.LSTM(5, 24, backend="persistent"))(x.float())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated")
def test_every_number_is_the_same_in_a_trace():
    bits = torch.arange(256).to(torch.uint8).view(2, 128)[:, :127]  # without NaN
    traced = torch.jit.trace(lambda b: dequantized(b, torch.ones(2), torch.float32), (bits,))
    assert torch.equal(traced(bits), bits.contiguous().view(torch.float8_e4m3fn).float())


def test_a_model_and_back():
    torch.manual_seed(0)
    model = nn.Sequential(persistrnn.Stacked([persistrnn.LSTM(5, 8), persistrnn.GRU(8, 8)]))
    before = copy.deepcopy(model.state_dict())
    assert persistrnn.quantize(model) is model
    assert model[0].layers[0].weight_dtype == model[0].layers[1].weight_dtype == torch.int8
    y = model(x := torch.randn(4, 3, 5))[0]
    persistrnn.dequantize(model)
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(x)[0], y)
    for name, weight in model.state_dict().items():
        most = before[name].abs().max() / 254 * (1 + 1e-6) if "weight_hh" in name else 0
        assert (weight - before[name]).abs().max() <= most


def test_weights_of_another_kind_do_not_load():
    layer, plain = made("lstm", torch.int8), persistrnn.Recurrent("lstm", 5, 24)
    for into, of in ((layer, plain), (plain, layer), (layer, made("lstm", torch.float8_e4m3fn))):
        with pytest.raises(RuntimeError, match=r"before it loads, persistrnn.quantize the layer to the dtype of what"):
            into.load_state_dict(of.state_dict(), strict=False)


def test_what_is_refused():
    layer = made("gru", torch.int8)
    with pytest.raises(RuntimeError, match=r"for inference.*torch.no_grad"):
        layer(torch.randn(4, 3, 5).bfloat16().requires_grad_())
    with pytest.raises(ValueError, match=r"quantised already.*dequantize it first"):
        persistrnn.quantize(layer)
    with pytest.raises(ValueError, match=r"dtype is torch.int8 or torch.float8_e4m3fn, got torch.int4"):
        persistrnn.quantize(persistrnn.GRU(3, 4), torch.int4)
    with pytest.raises(ValueError, match=r"persistrnn.replace"):
        persistrnn.quantize(torch.nn.GRU(3, 4))
    with pytest.raises(ValueError, match=r"dequantize it first"):
        layer.to_torch()
    dropping = persistrnn.quantize(persistrnn.LSTM(5, 24, recipe=persistrnn.Recipe(weight_drop=0.5)))
    with pytest.raises(RuntimeError, match=r"for inference, and Recipe.*weight_drop=0.5.*call eval\(\)"):
        dropping(torch.randn(4, 3, 5))
    dropping.eval()(torch.randn(4, 3, 5))
    broken = persistrnn.GRU(3, 4)
    broken.weight_hh_l0.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or an infinity"):
        persistrnn.quantize(broken)
