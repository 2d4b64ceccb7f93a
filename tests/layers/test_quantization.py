"""W_hh in 8 bits: on the kernels and on torch's own path the products are those of the dequantised weights."""

import copy
import pickle

import pytest
import torch

import persistrnn
from persistrnn.eight_bits import dequantized, quantized
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem

DTYPES = (torch.int8, torch.float8_e4m3fn)


def made(cell, dtype, **options):
    torch.manual_seed(0)
    return persistrnn.quantize(persistrnn.Recurrent(cell, 5, 24, dtype=torch.bfloat16, **options), dtype)


def error(layer, x):
    """(ours, torch's in bfloat16) against float64, each with the same dequantised weights."""
    plain = persistrnn.dequantize(copy.deepcopy(layer))
    plain.backend = "torch"
    with torch.no_grad():
        ours, theirs = layer(x)[0], plain(x)[0]
        truth = plain.double()(x.double())[0]
    return tuple(((y.double() - truth).norm() / truth.norm()).item() for y in (ours, theirs))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "options"), [
    ("lstm", {"bidirectional": True, "num_layers": 2}), ("gru", {"bias": False}), ("slstm", {"heads": 2}),
])  # fmt: skip
def test_the_kernels_add_no_error_of_their_own(cell, options, dtype):
    layer = made(cell, dtype, backend="persistent", **options)
    ours, theirs = error(layer, torch.randn(5, 3, 5).bfloat16())
    assert layer.last_path == "persistent"
    assert ours <= 1.5 * theirs + 4 * torch.finfo(torch.bfloat16).eps


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


def test_twice_the_weights_are_resident():
    sizes = CELLS["lstm"], 2176, 16, 1, "bf16", DEVICES["h200"]
    eight, sixteen = plan_layer(Problem(*sizes, weight_dtype="int8")), plan_layer(Problem(*sizes))
    assert eight.forward.shares.resident == 2 * sixteen.forward.shares.resident
    assert "W_hh in int8" in str(eight)


@pytest.mark.parametrize(("cell", "hidden", "arch", "weights"), [
    ("lstm", 512, "sm_80", "int8"), ("gru", 512, "sm_90", "fp8"),
])  # fmt: skip
def test_eight_bits_are_in_shared_memory(cell, hidden, arch, weights):
    from persistrnn.kernels.inspect.audit import Case, audit

    row = audit(Case(cell, False, "bf16", hidden, arch, weight_dtype=weights))
    assert row.failures == ""
    assert row.in_shared > 0 == row.in_registers == row.streamed == row.spills
