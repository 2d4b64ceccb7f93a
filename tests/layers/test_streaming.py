"""A stream in pieces is the sequence as a whole."""

import pytest
import torch
from pairs import BACKENDS, CELLS, make_layer, tensors

import persistrnn


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_pieces_are_the_whole_with_its_gradients(cell, batch_first, backend):
    torch.manual_seed(0)
    layer = make_layer(cell, 3, 6, 2, batch_first=batch_first, backend=backend)
    x = torch.randn((2, 7, 3) if batch_first else (7, 2, 3), requires_grad=True)
    stream, time = persistrnn.Streaming(layer, detach=False), 1 if batch_first else 0
    y = torch.cat([stream(piece) for piece in x.split([3, 1, 3], dim=time)], dim=time)
    expected, final = layer(x)
    torch.testing.assert_close([y, *tensors(stream.state)], [expected, *tensors(final)])
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_steps_unbatched_and_batched(cell):
    layer = make_layer(cell, 3, 6)
    stream = persistrnn.Streaming(layer)
    for x in (torch.randn(4, 2, 3), torch.randn(4, 3)):
        stream.reset()
        torch.testing.assert_close(torch.stack([stream.step(x_t) for x_t in x]), layer(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_ends_at_a_call_unless_asked(cell):
    layer = make_layer(cell, 3, 6)
    for detach in (True, False):
        stream = persistrnn.Streaming(layer, detach=detach)
        first, second = torch.randn(2, 2, 3, requires_grad=True), torch.randn(2, 2, 3)
        stream(first)
        gradients = torch.autograd.grad(stream(second).sum(), first, allow_unused=True)
        assert (gradients[0] is None) == detach


@pytest.mark.parametrize("cell", CELLS)
def test_reset_of_some_rows(cell):
    layer = make_layer(cell, 3, 6, 2)
    stream = persistrnn.Streaming(layer)
    stream(torch.randn(4, 3, 3))
    before = [s.clone() for s in tensors(stream.state)]
    stream.reset(torch.tensor([True, False, True]))
    for s, old in zip(tensors(stream.state), before, strict=True):
        assert not s[:, [0, 2]].any()
        assert torch.equal(s[:, 1], old[:, 1])
    with pytest.raises(ValueError, match=r"size \(3,\).*got torch.bool of size \(2,\)"):
        stream.reset(torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"got torch.int64"):
        stream.reset(torch.tensor([0, 1, 0]))
    stream.reset()
    assert stream.state is None


def test_the_layer_s_arguments_go_through():
    layer = persistrnn.LSTM(3, 6)
    stream = persistrnn.Streaming(layer)
    x, resets = torch.randn(4, 2, 3), torch.rand(4, 2) < 0.5
    y, c = stream(x, resets=resets, return_cell_states=True)
    expected, _, c_expected = layer(x, resets=resets, return_cell_states=True)
    assert torch.equal(y, expected)
    assert torch.equal(c, c_expected)
    assert stream.state_dict().keys() == {f"layer.{name}" for name in layer.state_dict()}


def test_another_batch_is_refused_by_the_layer():
    stream = persistrnn.Streaming(persistrnn.GRU(3, 6))
    stream(torch.randn(2, 4, 3))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 5, 6\), got \[1, 4, 6\]"):
        stream(torch.randn(2, 5, 3))


def test_refuses_what_has_no_stream():
    with pytest.raises(ValueError, match=r"second direction.*bidirectional=False"):
        persistrnn.Streaming(persistrnn.LSTM(3, 6, bidirectional=True))
    with pytest.raises(TypeError, match=r"got torch.nn.*LSTM; persistrnn.replace"):
        persistrnn.Streaming(torch.nn.LSTM(3, 6))
    with pytest.raises(TypeError, match=r"got hx; set .state"):
        persistrnn.Streaming(persistrnn.GRU(3, 6))(torch.randn(2, 2, 3), hx=None)
    with pytest.raises(TypeError, match=r"bool tensor \[B\], got list"):
        persistrnn.Streaming(persistrnn.GRU(3, 6)).reset([True])
    with pytest.raises(TypeError, match=r"tensor \[B, I\] or \[I\], got list"):
        persistrnn.GRU(3, 6).step([1.0, 2.0, 3.0])


@pytest.mark.parametrize("cell", CELLS)
def test_the_state_follows_the_layer(cell):
    stream = persistrnn.Streaming(make_layer(cell, 3, 6))
    x = torch.randn(2, 2, 3)
    with torch.inference_mode():
        stream(x)
    stream(x).sum().backward()
    stream.double()
    assert stream(x.double()).dtype == torch.float64
