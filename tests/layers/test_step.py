"""`layer.step`: one time step after the other is the sequence."""

import pytest
import torch
from pairs import as_hx, states

import persistrnn

CLASSES = [persistrnn.LSTM, persistrnn.GRU]


def stepwise(layer, x, hx, time):
    outputs = []
    for x_t in x.unbind(time):
        y, hx = layer.step(x_t, hx)
        outputs.append(y)
    return torch.stack(outputs, time), hx


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("cls", CLASSES)
def test_steps_are_the_sequence(cls, given, batch_first):
    torch.manual_seed(0)
    layer = cls(5, 8, 2, batch_first=batch_first)
    x = torch.randn(3, 4, 5)
    hx = as_hx(states(layer.mode.lower(), 2, 3 if batch_first else 4, 8)) if given else None
    found = stepwise(layer, x, hx, 1 if batch_first else 0)
    torch.testing.assert_close(found, layer(x, hx))


@pytest.mark.parametrize("cls", CLASSES)
def test_unbatched(cls):
    layer = cls(5, 8, 2, batch_first=True)
    x = torch.randn(6, 5)
    hx = as_hx(states(layer.mode.lower(), 2, 8))
    torch.testing.assert_close(stepwise(layer, x, hx, 0), layer(x, hx))


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_go_through_the_steps(cls):
    layer = cls(5, 8, 2)
    x = torch.randn(3, 4, 5, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(stepwise(layer, x, None, 0)[0].square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(layer(x)[0].square().sum(), leaves))


def test_bad_steps():
    with pytest.raises(ValueError, match="a bidirectional layer has no steps"):
        persistrnn.GRU(5, 8, bidirectional=True).step(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\[B, I\] or \[I\], got 3-D"):
        persistrnn.GRU(5, 8).step(torch.zeros(1, 2, 5))
