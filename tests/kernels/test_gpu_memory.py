"""``save=`` on a real GPU: equal results, the predicted bytes, and what long sequences take."""

import pytest
import torch
from asked import asked
from gpu import DEVICE, synchronize
from pairs import CELLS, make_layer
from test_gpu import a_gpu
from torch import nn

from persistrnn.kernels.planner import memory

pytestmark = pytest.mark.gpu

__all__ = ["a_gpu"]  # a fixture


def layer_of(cell, *sizes, **options):
    return make_layer(cell, *sizes, device=DEVICE, dtype=torch.bfloat16, backend="persistent", **options)


class Loss(torch.autograd.Function):
    """It allocates nothing but the gradient, in y's dtype: at these sizes another would be most of what is measured."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return torch.full_like(ctx.saved_tensors[0], 1e-3)


def train(layer, x):
    Loss.apply(layer(x)[0]).backward()


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_modes_agree(cell, layers, bidirectional, monkeypatch):
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 70)
    x = torch.randn(300, 24, 96, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.randint(0, 301, (24,), device=DEVICE)
    found = {}
    for save in memory.MODES:
        layer = layer_of(cell, 96, 384, layers, bidirectional=bidirectional, save=save)
        y, final = layer(x, lengths=lengths)
        dy = torch.ones_like(y)
        leaves = [x, *layer.parameters()]
        found[save] = [y, *torch.utils._pytree.tree_leaves(final), *torch.autograd.grad(y, leaves, dy)]
    for save in ("state", "checkpoint"):
        assert torch.equal(found[save][0], found["gates"][0])
        for ours, theirs in zip(found[save], found["gates"], strict=True):
            assert (ours.float() - theirs.float()).norm() <= 0.01 * theirs.float().norm()


def peak_of(layer, x):
    """Bytes above those before, of a second training step."""
    for _ in range(2):
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(layer, x)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("save", memory.MODES)
@pytest.mark.parametrize(("cell", "layers"), [("lstm", 2), ("gru", 1)])
def test_predicted_bytes_are_those_that_are_allocated(cell, layers, save):
    steps, batch, hidden = 16_384, 32, 512
    layer = layer_of(cell, hidden, hidden, layers, save=save)
    x = torch.randn(steps, batch, hidden, device=DEVICE, dtype=torch.bfloat16)
    of = asked(cell, hidden, num_layers=layers, dtype=torch.bfloat16).layers
    chunk = memory.chunk_steps(save, CELLS[cell].gates, hidden, batch, 1, 2, steps)
    peak = memory.peak(save, of, batch, steps, chunk, False)
    assert peak_of(layer, x) == pytest.approx(peak, rel=0.1)


def test_long_training_takes_a_quarter_of_cudnns_memory():
    """T = 65,536, B = 32, H = 1024, two layers: cuDNN's peak at a quarter of T, where it can run, times four."""
    steps, batch, hidden = 65_536, 32, 1024
    theirs = nn.LSTM(hidden, hidden, 2, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(steps // 4, batch, hidden, device=DEVICE, dtype=torch.bfloat16)
    cudnn = 4 * peak_of(theirs, x)
    del theirs, x
    ours = layer_of("lstm", hidden, hidden, 2, save="checkpoint")
    found = peak_of(ours, torch.randn(steps, batch, hidden, device=DEVICE, dtype=torch.bfloat16))
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert found <= cudnn / 4, f"{found / 2**30:.1f} GiB against {cudnn / 2**30:.1f}"


def test_state_is_at_most_a_quarter_slower():
    x = torch.randn(8192, 32, 1024, device=DEVICE, dtype=torch.bfloat16)
    seconds = {}
    for save in ("gates", "state"):
        layer = layer_of("lstm", 1024, 1024, save=save)
        times = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            train(layer, x)
            end.record()
            synchronize()
            times.append(start.elapsed_time(end))
        seconds[save] = sorted(times[1:])[2]
    assert seconds["state"] <= 1.25 * seconds["gates"], seconds
