"""The reference against torch.nn in float64, and what it promises to torch.func and double backward."""

import pytest
import torch
import torch.nn.functional as F
from pairs import CELLS, PAIRS, as_hx, tensors
from pairs import states as drawn
from torch import nn

from persistrnn import reference

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6


def make(cell: str, directions: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(seed)
    layer = PAIRS[cell][1](INPUT, HIDDEN, bidirectional=directions == 2).double()
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    return layer, x, drawn(cell, directions, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)


def through_reference(cell, x, states, weights):
    """One layer from torch.nn's flat weights, by the reference."""
    directions = len(weights) // 4
    w_ih, w_hh, b_ih, b_hh = (torch.stack(weights[k::4]) for k in range(4))
    x_gates = torch.stack([F.linear(x, w_ih[d], b_ih[d]) for d in range(directions)], dim=2)
    found = reference.recurrent(cell, x_gates, w_hh, b_hh, states)
    return [found.y, *found.finals]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch_nn_with_all_gradients(cell, directions):
    layer, x, states = make(cell, directions)
    weights = list(layer.parameters())
    expected = tensors(layer(x, as_hx(states)))
    actual = through_reference(cell, x, states, weights)
    cotangents = [torch.randn_like(t) for t in expected]
    leaves = [x, *states, *weights]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        rtol=1e-11,
        atol=1e-12,
    )
