"""W_hh in 8 bits: on the kernels and on torch's own path the products are those of the dequantised weights."""

import copy
import pickle

import pytest
import torch

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
    broken = persistrnn.GRU(3, 4)
    broken.weight_hh_l0.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or an infinity"):
        persistrnn.quantize(broken)
