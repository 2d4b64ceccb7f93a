"""W_hh of 8 bits on chip: widened exactly, right against float64 of the dequantised weights, in shared memory."""

import copy

import pytest
import torch
import triton
import triton.language as tl
from emulator import Schedule
from forced import tilings
from grid import EXCHANGE, Delays, concurrent_grid

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.widen import widened
from persistrnn.kernels.inspect.audit import Case, audit
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import WEIGHTS, Problem

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def keeps_the_bound(cell, dtype, weights, hidden, batch, **options):
    """Of all outputs, against float64, with torch's own path in dtype as the witness."""
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(cell, 5, hidden, dtype=TORCH[dtype], backend="persistent", **options)
    persistrnn.quantize(layer, TORCH[weights])
    x = torch.randn(5, batch, 5, dtype=TORCH[dtype])
    y, states = layer(x)
    assert layer.last_path == "persistent"
    layer.backend = "torch"
    others = layer(x), persistrnn.dequantize(copy.deepcopy(layer).double())(x.double())
    found, witness, truth = ([o[0], *(o[1] if isinstance(o[1], tuple) else o[1:])] for o in ((y, states), *others))
    for ours, theirs, exact in zip(found, witness, truth, strict=True):
        errors = [((of.double() - exact).norm() / exact.norm()).item() for of in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1] + 4 * torch.finfo(x.dtype).eps


# One slice, several, both splits, streams, batch tiles, directions, heads, units past H, both protocols.
CASES = [
    # cell, dtype, weights, protocol, hidden, batch, options, chosen
    ("lstm", "bf16", "int8", "counter", 21, 3, {"bidirectional": True}, {"homes": "shared"}),
    ("gru", "fp16", "fp8", "flags", 62, 9, {}, {"k_parts": 2, "units": 16, "homes": "shared and stream", "splits": 2}),
    ("slstm", "bf16", "fp8", "counter", 32, 9, {"heads": 2}, {"homes": "stream", "subtiles": 2, "batch_tile": 8}),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:5])))
def test_many_slices_keep_the_bound(forced, index):
    cell, dtype, weights, protocol, hidden, batch, options, chosen = CASES[index]
    forced(protocol, **chosen)
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(tuple(EXCHANGE)[index % len(EXCHANGE)], slow=1)):
        keeps_the_bound(cell, dtype, weights, hidden, batch, **options)
    assert launch.LAUNCHES - before == {"scan_forward": 1}


@triton.jit
def _widen(bits, numbers, tiling: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(numbers + i, widened(tl.load(bits + i), tiling))


@pytest.mark.emulator
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_number_is_widened_exactly(emulated, dtype, weights):
    emulated("sm_80")
    tiling = tilings("lstm", 13, dtype=dtype, weight_dtype=weights, units=16)[0][1]
    every = torch.arange(256).to(torch.uint8)
    numbers = every.view(TORCH[weights]).double()
    found = torch.zeros(256, dtype=TORCH[dtype])
    _widen[(1,)](every if weights == "fp8" else every.view(torch.int8), found, tiling, enable_fp_fusion=True)
    known = ~numbers.isnan()
    assert known.sum() >= 254
    assert torch.equal(found.double()[known], numbers[known])


COMPILED = [
    ("sm_90", "lstm", "bf16", "int8", "counter", 29, {"homes": "shared"}),
    ("sm_80", "gru", "fp16", "fp8", "flags", 62,
     {"k_parts": 2, "units": 16, "homes": "shared and stream", "splits": 4}),
]  # fmt: skip


@pytest.mark.emulator
@pytest.mark.parametrize("index", range(len(COMPILED)), ids=lambda i: "-".join(map(str, COMPILED[i][:6])))
def test_compiled_kernels_keep_the_bound(emulated, forced, index):
    arch, cell, dtype, weights, protocol, hidden, chosen = COMPILED[index]
    session = emulated(arch, schedule=Schedule(seed=index, slow=((index % 2, None, None),)))
    forced(protocol, **chosen)
    keeps_the_bound(cell, dtype, weights, hidden, 3)
    assert [report.kernel.name for report in session.reports] == ["scan_forward"]


@pytest.mark.parametrize(("cell", "hidden", "arch", "weights"), [
    ("lstm", 512, "sm_80", "int8"), ("gru", 512, "sm_90", "fp8"),
])  # fmt: skip
def test_eight_bits_are_in_shared_memory(cell, hidden, arch, weights):
    row = audit(Case(cell, False, "bf16", hidden, arch, weight_dtype=weights))
    assert row.failures == ""
    slices = hidden // 8
    assert row.in_shared * slices == CELLS[cell].gates * hidden**2
    assert row.in_registers == row.streamed == row.spills == 0


def test_what_only_8_bits_hold_on_chip():
    """An LSTM of 1728 on an A100, and half the bytes of one that streams either way."""
    for hidden, resident in ((1728, 1.0), (2560, None)):
        sizes = CELLS["lstm"], hidden, 16, 1, "bf16", DEVICES["a100"]
        eight, sixteen = (plan_layer(Problem(*sizes, weight_dtype=of)).forward for of in ("int8", ""))
        assert eight.shares.resident > sixteen.shares.resident
        assert resident in (None, eight.shares.resident)
        assert eight.shares.registers == 0
        assert 2 * sum((eight.shares.shared, eight.shares.streamed)) == sum(
            (sixteen.shares.registers, sixteen.shares.shared, sixteen.shares.streamed)
        )


def test_what_is_refused():
    sizes = CELLS["lstm"], 64, 16, 1
    with pytest.raises(ValueError, match=r"int8 or fp8, with dtype fp16 or bf16, got 'int4' with dtype bf16"):
        Problem(*sizes, "bf16", DEVICES["h200"], weight_dtype="int4")
    with pytest.raises(ValueError, match=r"got 'int8' with dtype tf32"):
        Problem(*sizes, "tf32", DEVICES["h200"], weight_dtype="int8")
