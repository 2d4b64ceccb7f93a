"""Launches on a real GPU: as many as test_launches counts without one, captured in a graph, and compiled ahead."""

import threading

import pytest
import torch
import triton
from gpu import DEVICE, no_waits, synchronize
from pairs import CELLS, make_layer
from test_gpu import a_gpu
from torch.profiler import ProfilerActivity, profile

import persistrnn

pytestmark = pytest.mark.gpu

__all__ = ["a_gpu"]  # a fixture


def layer(cell, hidden=512, **options):
    return make_layer(cell, 32, hidden, device=DEVICE, dtype=torch.bfloat16, backend="persistent", **options)


def states(cell, batch, hidden=512):
    made = [torch.randn(1, batch, hidden, device=DEVICE, dtype=torch.bfloat16) for _ in range(CELLS[cell].states)]
    return tuple(made) if len(made) > 1 else made[0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_forward_is_three_launches(cell, given):
    """Torch's operations on lists are one launch each."""
    module, x = layer(cell), torch.randn(8, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    hx = states(cell, 4) if given else None
    with torch.no_grad():
        for _ in range(2):
            module(x, hx)
        synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, no_waits():
            module(x, hx)
        synchronize()
    found = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(found) == 3, found


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("hidden", [64, 333, 512])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cuda_graph_of_a_short_call(cell, hidden, steps):
    """Captured once; replayed with other inputs, states and weights it gives what the eager call gives, bit for bit,
    beside calls on another stream."""
    module, x = layer(cell, hidden), torch.randn(steps, 3, 32, device=DEVICE, dtype=torch.bfloat16)
    hx, side = states(cell, 3, hidden), torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(x, hx)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, state = module(x, hx)
        captured = [y, *([state] if isinstance(state, torch.Tensor) else state)]
        for _ in range(4):
            for tensor in (x, *([hx] if isinstance(hx, torch.Tensor) else hx)):
                tensor.copy_(torch.randn_like(tensor))
            module.weight_hh_l0.data.mul_(0.9)
            synchronize()
            with torch.cuda.stream(side):
                beside = module(x, hx)[0]
            graph.replay()
            synchronize()
            y, state = module(x, hx)
            expected = [y, *([state] if isinstance(state, torch.Tensor) else state)]
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
            assert torch.equal(beside, y)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_warmup_compiles_what_a_training_step_launches(cell, monkeypatch, tmp_path):
    """On threads of its own, and nothing in the thread of the backward."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found, compiles = [], triton.compiler.compile

    def compile_(source, **options):
        found.append((source.fn.__name__, threading.get_ident()))
        return compiles(source, **options)

    from persistrnn.kernels.device.scan import scan_backward, scan_forward

    for kernel in (scan_forward, scan_backward):
        monkeypatch.setattr(kernel, "compile", triton.compile, raising=False)
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(triton.compiler, "compile", compile_)
    module, x = layer(cell), torch.randn(8, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    assert persistrnn.warmup(module, 4, 8) == 2
    assert sorted(name for name, _ in found) == ["scan_backward", "scan_forward"]
    assert all(thread != threading.get_ident() for _, thread in found)
    module(x)[0].sum().backward()
    assert len(found) == 2


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cuda_graph_of_a_call_with_lengths(cell):
    """Replayed with other lengths and resets."""
    module, x = layer(cell), torch.randn(8, 3, 32, device=DEVICE, dtype=torch.bfloat16)
    cuts = {"lengths": torch.full((3,), 5, device=DEVICE), "resets": torch.zeros(8, 3, dtype=torch.bool, device=DEVICE)}
    side = torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(x, **cuts)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = module(x, **cuts)
        for seed in range(4):
            torch.manual_seed(seed)
            cuts["lengths"].copy_(torch.randint(0, 9, (3,)))
            cuts["resets"].copy_(torch.rand(8, 3) < 0.3)
            graph.replay()
            synchronize()
            assert torch.equal(y, module(x, **cuts)[0])
