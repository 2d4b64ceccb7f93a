"""Compiled kernels whose W_hh is of 8 bits, run on a CPU: right against float64 of the dequantised weights, without a
race, alone and in several slices."""

import pytest
import torch
from emulated import ARCHITECTURES
from emulator import Schedule

import persistrnn

pytestmark = pytest.mark.emulator

# One slice, several, both splits, shared memory and streams, two directions, units past H, both protocols.
CASES = [
    # cell, dtype, weights, protocol, hidden, batch, options, chosen
    ("lstm", "bfloat16", "int8", "counter", 13, 3, {}, {"units": 16, "homes": "shared"}),
    ("lstm", "bfloat16", "int8", "counter", 45, 3, {}, {"homes": "shared"}),
    ("gru", "float16", "float8_e4m3fn", "counter", 45, 19, {}, {"homes": "shared and stream", "splits": 4}),
    ("lstm", "bfloat16", "float8_e4m3fn", "flags", 61, 3, {}, {"k_parts": 2, "units": 16, "homes": "shared"}),
    ("gru", "bfloat16", "int8", "flags", 61, 3, {"bidirectional": True}, {"homes": "shared", "splits": 4}),
    ("slstm", "float16", "int8", "counter", 48, 3, {"heads": 2}, {"homes": "shared"}),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:5])))
def test_compiled(emulated, forced, index, arch):
    cell, dtype, weights, protocol, hidden, batch, options, chosen = CASES[index]
    session = emulated(arch, units="programs", schedule=Schedule(seed=index, slow=((index % 2, None, None),)))
    forced(protocol, **chosen)
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(cell, 5, hidden, dtype=getattr(torch, dtype), backend="persistent", **options)
    persistrnn.quantize(layer, getattr(torch, weights))
    x = torch.randn(5, batch, 5, dtype=layer.weight_ih_l0.dtype)
    ours = layer(x)[0].double()
    assert layer.last_path == "persistent"
    plain = persistrnn.dequantize(layer)
    plain.backend = "torch"
    with torch.no_grad():
        theirs = plain(x)[0].double()
        truth = plain.double()(x.double())[0]
    print(((ours - truth).norm() / truth.norm()).item(), ((theirs - truth).norm() / truth.norm()).item())
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 4 * torch.finfo(x.dtype).eps * truth.norm()
    assert {report.kernel.name for report in session.reports} == {"scan_forward"}
