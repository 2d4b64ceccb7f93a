"""The kernels that make marks, and read the states by them, against torch's operations: bit for bit."""

import pytest
import torch

from persistrnn import autograd, step_marks
from persistrnn.kernels import marks as kernel

pytestmark = pytest.mark.interpreter

STEPS, BATCH = 37, 61  # of several programs


def cuts(given, transposed):
    """lengths, active and resets, of which some are given."""
    lengths = torch.randint(0, STEPS + 1, (BATCH,)) if "lengths" in given else None
    found = [torch.rand(BATCH, STEPS).T if transposed else torch.rand(STEPS, BATCH) for _ in range(2)]
    return lengths, *((f < 0.3 if name in given else None) for f, name in zip(found, ("mask", "resets"), strict=True))


def in_torch(lengths, mask, resets, directions):
    active = mask if lengths is None else torch.arange(STEPS).unsqueeze(1) < lengths
    return step_marks.marks(active, resets, directions), torch.ones(STEPS, BATCH) == 1 if active is None else active


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("given", ["lengths", "mask", "resets", "lengths, resets", "mask, resets"])
def test_marks_are_torchs(given, directions, transposed):
    torch.manual_seed(0)
    of = cuts(given, transposed)
    word = torch.zeros(1, dtype=torch.int32)
    found = kernel.made(*of, STEPS, BATCH, directions, word)
    for ours, theirs in zip(found, in_torch(*of, directions), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert not word


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("length", [-1, STEPS + 1, STEPS, 0])
def test_lengths_out_of_range_are_noted_and_clamped(length, dtype):
    if length < 0 and dtype == torch.uint8:
        pytest.skip("it has none")
    lengths, word = torch.full((BATCH,), 3), torch.zeros(1, dtype=torch.int32)
    lengths[-1] = length
    marks, runs = kernel.made(lengths.to(dtype), None, None, STEPS, BATCH, 1, word)
    expected = in_torch(lengths.clamp(0, STEPS), None, None, 1)
    assert torch.equal(marks, expected[0])
    assert torch.equal(runs, expected[1])
    assert word.item() == (not 0 <= length <= STEPS)


@pytest.mark.parametrize(("layers", "directions", "heads"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2)])
def test_the_state_before_each_step_is_torchs(layers, directions, heads):
    torch.manual_seed(0)
    marks = kernel.made(*cuts("lengths, resets", False), STEPS, BATCH, directions // heads, torch.zeros(1).int())[0]
    y = torch.randn(layers, STEPS + 2, BATCH, directions, 5)
    for dtype in (torch.float32, torch.bfloat16):
        states = y.to(dtype)
        found = kernel.before(states, marks, heads)
        expected = [autograd.h_before(states, marks, d, heads) for d in range(directions)]
        assert torch.equal(found, torch.stack(expected))
