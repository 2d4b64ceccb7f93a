"""The scan kernels in Triton's interpreter, one slice, against float64 (the bound stands in accuracy.py)."""

import itertools
import math

import accuracy
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from forced import tilings

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.device.tiles import row_offset

pytestmark = pytest.mark.interpreter

CASES = accuracy.cases()
CLASSES = sorted({(case.cell, case.dtype) for case in CASES})
SEEDS = 2


@pytest.mark.parametrize(("cell", "dtype"), CLASSES)
@pytest.mark.timeout(1200)
def test_outputs_and_gradients_keep_the_bound(cell, dtype):
    bound = accuracy.Bound(accuracy.DTYPES[dtype])
    chosen = [case for case in CASES if (case.cell, case.dtype) == (cell, dtype)]
    for case, seed in itertools.product(chosen, range(SEEDS)):
        before = launch.LAUNCHES.copy()
        bound.add((case, seed), *accuracy.run(case, seed))
        # One launch per layer and pass, whatever the number of directions: no eager path made these numbers.
        assert launch.LAUNCHES - before == {"scan_forward": case.layers, "scan_backward": case.layers}
    bound.check()


@pytest.mark.parametrize(("cell", "bidirectional"), [("lstm", True), ("gru", False)])
def test_one_hidden_unit(cell, bidirectional):
    """At most a ten-thousandth of a gradient is wrong: its terms nearly cancel, and what is left of them is small."""
    ours, truth, _ = accuracy.run(accuracy.Case(cell, "fp32", 1, 9, 5, 2, bidirectional, True, True), seed=1)
    for name, true in truth.items():
        assert (ours[name] - true).norm() <= 1e-4 * true.norm(), name


def test_bound_rejects_a_lost_term():
    """An error of half a percent of one gradient must not pass in float32, nor a nonzero where the truth is 0."""
    case = accuracy.Case("gru", "fp32", 10, 3, 2, 1, False, True, True)
    ours, truth, witness = accuracy.run(case, 0)
    spoilt = ours | {"d h0": ours["d h0"] * 1.005}
    bound = accuracy.Bound(torch.float32)
    bound.add(case, spoilt, truth, witness)
    with pytest.raises(AssertionError, match="d h0"):
        bound.check()
    bound = accuracy.Bound(torch.float32)
    bound.add(case, ours, {n: torch.zeros_like(t) for n, t in truth.items()}, witness)
    with pytest.raises(AssertionError, match="is not 0"):
        bound.check()


@pytest.mark.parametrize(
    ("cell", "value"), [("lstm", math.nan), ("gru", math.nan), ("lstm", math.inf), ("gru", -math.inf)]
)
def test_nan_and_inf_flow_through_as_in_torch(cell, value):
    ours_class, torch_class = accuracy.MODULES[cell]
    torch.manual_seed(0)
    ours = ours_class(5, 10, bidirectional=True, backend="persistent")
    theirs = torch_class(5, 10, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 3, 5)
    x[2, 1, 3] = value
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of inf - inf
        y = ours(x)[0]
    y_torch = theirs(x)[0]
    assert torch.equal(y.isnan(), y_torch.isnan())
    torch.testing.assert_close(y, y_torch, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert not y[:, [0, 2]].isnan().any()  # other rows of the batch know nothing of it


def test_equal_inputs_give_equal_bits():
    torch.manual_seed(0)
    layer = persistrnn.LSTM(5, 18, 2, bidirectional=True, backend="persistent", dtype=torch.bfloat16)
    x = torch.randn(4, 17, 5, dtype=torch.bfloat16)

    def bits():
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(bits(), bits(), strict=True))


ONE_SLICE = [
    # cell, dtype, hidden, batch, bidirectional, chosen
    ("lstm", "fp32", 10, 3, True, {"units": 16, "homes": "registers"}),
    ("gru", "bf16", 10, 3, False, {"units": 16, "homes": "shared"}),
    # Of the backward's gates the first is in registers, the others in shared memory.
    ("lstm", "fp16", 25, 17, False, {"units": 32, "homes": "registers and shared", "in_registers": 32}),
    ("gru", "fp32", 18, 5, True, {"units": 32, "homes": "registers and shared", "in_registers": 32, "subtiles": 2}),
    # The last batch tile is empty.
    ("gru", "fp16", 25, 19, True, {"units": 32, "homes": "shared", "subtiles": 2, "batch_tile": 8}),
    ("lstm", "bf16", 16, 35, False, {"units": 16, "homes": "registers", "subtiles": 4}),
]


@pytest.mark.parametrize(("cell", "dtype", "hidden", "batch", "bidirectional", "chosen"), ONE_SLICE)
def test_one_slice_keeps_the_bound_with_any_choice(forced, cell, dtype, hidden, batch, bidirectional, chosen):
    """Weights in registers or in shared memory, one batch tile or several: nothing here needs a concurrent grid."""
    forced(**chosen)
    for _, t in tilings(cell, hidden, **chosen):
        assert t.slices == 1
        homes = {"registers"} if t.in_registers else set()
        homes |= {"shared"} if t.in_registers < len(t.k_blocks) else set()
        # The forward has one tile of K, and so one home.
        assert " and ".join(sorted(homes)) in (chosen["homes"], "registers")
    case = accuracy.Case(cell, dtype, hidden, batch, 3, 1, bidirectional, True, True)
    before = launch.LAUNCHES.copy()
    assert accuracy.failures(case) == []
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}


@triton.jit
def offset_kernel(out, t, b, direction, B, D: tl.constexpr, width: tl.constexpr):
    tl.store(out, row_offset(tl.load(t), b, direction, B, D, width))


def test_offsets_are_64_bit_where_a_tensor_passes_2_to_the_31():
    """The offset of an element far out, without the memory to hold the tensor."""
    out = torch.zeros(1, dtype=torch.int64)
    t, b, direction, B, D, width = 70_000, 60, 1, 64, 2, 4 * 1024
    offset_kernel[(1,)](out, torch.tensor([t], dtype=torch.int32), b, direction, B, D=D, width=width)
    assert out.item() == ((t * B + b) * D + direction) * width > 2**31
