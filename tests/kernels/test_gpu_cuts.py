"""Lengths, resets, packed sequences, projections, graphs and second derivatives on a real GPU."""

import accuracy
import pytest
import torch
from accuracy import Case
from gpu import DEVICE, check_same_bits, no_waits, synchronize
from pairs import CELLS, PAIRS, make_layer, pair
from test_gpu import PROTOCOLS, a_gpu, exchange, precision
from torch import nn

import persistrnn
from persistrnn.kernels import launch

pytestmark = pytest.mark.gpu

__all__ = ["a_gpu", "exchange", "precision"]  # fixtures

# (hidden, batch, steps, layers, bidirectional, lengths, resets, state, reset_state)
CUTS = [
    (64, 17, 33, 2, True, True, True, True, True),
    (100, 3, 20, 1, False, True, False, True, False),
    (512, 20, 20, 2, False, False, True, True, True),
    (1024, 5, 12, 1, True, True, True, False, False),
    (2048, 3, 8, 1, False, True, True, True, True),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("cell", CELLS)
def test_cuts_keep_the_bound(cell, dtype, protocol, exchange, precision):
    precision("ieee")
    exchange(protocol=protocol)
    bound = accuracy.Bound(accuracy.DTYPES[dtype])
    for hidden, batch, steps, layers, bidirectional, *cut in CUTS:
        how = dict(zip(("lengths", "resets", "state", "reset_state"), cut, strict=True))
        case = Case(cell, dtype, hidden, batch, steps, layers, bidirectional, **how)
        before = launch.LAUNCHES.copy()
        bound.add(case, *accuracy.run(case, seed=0, device=DEVICE))
        assert sum((launch.LAUNCHES - before).values()) >= 2, "on the kernels"
    assert not bound.failures, "\n".join(bound.failures)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_projections_keep_the_bound(dtype, precision):
    precision("ieee")
    bound = accuracy.Bound(accuracy.DTYPES[dtype])
    for hidden, proj, layers, bidirectional in ((96, 40, 2, True), (512, 128, 2, False), (1024, 256, 1, True)):
        for cut in (False, True):
            how = {"lengths": cut, "resets": cut, "reset_state": cut}
            case = Case("lstm", dtype, hidden, 9, 16, layers, bidirectional, state=True, proj=proj, **how)
            bound.add(case, *accuracy.run(case, seed=1, device=DEVICE))
    assert not bound.failures, "\n".join(bound.failures)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_agree_with_torch_nn(cell):
    layer, truth = pair(cell, 24, 256, 2, bidirectional=True, device=DEVICE, backend="persistent")
    lengths = torch.randint(1, 60, (19,))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(60, 19, 24, device=DEVICE), lengths, enforce_sorted=False)
    found, expected = layer(packed), truth(packed)
    torch.testing.assert_close(found[0].data, expected[0].data, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_change_between_runs(cell):
    layer = make_layer(cell, 64, 256, 2, bidirectional=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(50, 24, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    cut = {"lengths": torch.randint(0, 51, (24,), device=DEVICE), "resets": torch.rand(50, 24, device=DEVICE) < 0.1}
    check_same_bits(layer, x, **cut)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_never_waits_for_lengths(cell):
    layer = make_layer(cell, 32, 256, 2, bidirectional=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(20, 17, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    lengths, resets = torch.randint(0, 21, (17,), device=DEVICE), torch.rand(20, 17, device=DEVICE) < 0.2

    def step():
        y, _ = layer(x, lengths=lengths, resets=resets)
        y.sum().backward()

    step()
    synchronize()
    with no_waits():
        step()


def test_lengths_out_of_range_are_raised_once():
    """By their own call, where the GPU is quick, else by the next."""
    layer = persistrnn.GRU(8, 64, device=DEVICE, backend="persistent")
    x = torch.randn(10, 3, 8, device=DEVICE)
    lengths = torch.tensor([99, -7, 4], device=DEVICE)
    with pytest.raises(RuntimeError, match=r"lengths on cuda.* not within \[0, T\]"):  # noqa: PT012
        layer(x, lengths=lengths)
        synchronize()
        layer(x)
    synchronize()
    persistrnn.check()


@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_graph_of_a_training_step(cell, hidden):
    """Captured once, replayed with other numbers: what the eager step gives, bit for bit."""
    layer = make_layer(cell, 32, hidden, 2, device=DEVICE, dtype=torch.bfloat16, backend="persistent")
    x = torch.randn(30, 8, 32, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.full((8,), 30, device=DEVICE)

    def step():
        y, _ = layer(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.randint(1, 31, (8,), device=DEVICE))
        graph.replay()
        synchronize()
        persistrnn.check()
        found = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative(cell, hidden, precision):
    precision("ieee")
    layer, truth = pair(cell, 16, hidden, device=DEVICE, backend="persistent", truth=True)
    x = torch.randn(6, 3, 16)
    found = []
    for of in (layer, truth):
        leaf = x.to(of.weight_hh_l0).requires_grad_()
        (slope,) = torch.autograd.grad(of(leaf)[0].square().sum(), leaf, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), [leaf, *of.parameters()])])
    for a, b in zip(*found, strict=True):
        assert (a.cpu().double() - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("backend", ["persistent", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_eval_mode(cell, backend):
    """cuDNN refuses it of torch.nn."""
    layer, _ = pair(cell, 16, 64, 2, dropout=0.5, device=DEVICE, backend=backend)
    truth = PAIRS[cell][1](16, 64, 2, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    x = torch.randn(20, 8, 16)
    grads = []
    for of in (layer.eval(), truth):
        y = of(x.to(of.weight_hh_l0))[0]
        grads.append(torch.autograd.grad(y.square().sum(), list(of.parameters())))
    for a, b in zip(*grads, strict=True):
        assert (a.cpu().double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_the_same_on_all_paths(cell):
    layer = make_layer(cell, 16, 64, 3, dropout=0.5, device=DEVICE, backend="persistent")
    x = torch.randn(20, 8, 16, device=DEVICE)
    found = []
    for backend in ("persistent", "torch", "torch"):
        layer.backend = backend
        torch.manual_seed(7)
        found.append(layer(x)[0])
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_resets_cost_at_most_five_percent(cell):
    torch.manual_seed(0)
    layer = make_layer(cell, 128, 512, device=DEVICE, dtype=torch.bfloat16, backend="persistent")
    x = torch.randn(2000, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    resets = torch.rand(2000, 16, device=DEVICE) < 0.01

    def milliseconds(options):
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            layer(x, **options)[0].sum().backward()
            end.record()
            synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times[2:])[5]

    plain, cut = milliseconds({}), milliseconds({"resets": resets})
    assert cut <= 1.05 * plain, f"{cut:.3f} ms with resets, {plain:.3f} without"
