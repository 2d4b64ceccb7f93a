"""Lengths, resets, projections and every c: exact in float64 step by step, within the bound on the kernels."""

import accuracy
import pytest
import torch
from accuracy import CUT, Case
from grid import Delays, concurrent_grid
from pairs import BACKENDS, CELLS, as_hx, make_layer, pair, states, tensors
from torch import nn

import persistrnn
from persistrnn import step_marks
from persistrnn.kernels import launch
from persistrnn.kernels.device import marks

WAYS = [
    {"lengths": True},
    {"lengths": True, "state": True},
    {"resets": True},
    {"resets": True, "state": True},
    {"resets": True, "state": True, "reset_state": True},
    CUT,
]
SHAPES = [("lstm", 0), ("lstm", 3), ("gru", 0)]


# Each shape and each stack with every second way, each way with every shape and stack.
EPISODES = [
    (*shape, *stack, way)
    for k, shape in enumerate(SHAPES)
    for m, stack in enumerate([(1, False), (1, True), (2, True)])
    for way in WAYS[(k + m) % 2 :: 2]
]


@pytest.mark.parametrize(("cell", "proj", "layers", "bidirectional", "way"), EPISODES)
def test_step_by_step_is_torch_nn_on_each_episode(cell, proj, layers, bidirectional, way):
    case = Case(cell, "fp64", 6, 5, 7, layers, bidirectional, proj=proj, **way)
    found, truth, _ = accuracy.run(case, seed=1, backend="auto")
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_marks_are_those_of_the_kernels():
    assert (marks.BEGINS.value, marks.SKIPPED.value) == (step_marks.BEGINS, step_marks.SKIPPED)


# ---- on the kernels ------------------------------------------------------------------------------------------------

KERNEL_CASES = [
    Case("lstm", "fp32", 10, 5, 6, 1, False, lengths=True, state=True),
    Case("gru", "fp32", 10, 5, 6, 1, True, lengths=True, state=True),
    Case("lstm", "bf16", 18, 3, 5, 2, True, **CUT),
    Case("gru", "fp16", 18, 3, 5, 2, True, **CUT),
    Case("lstm", "fp16", 10, 17, 5, 1, True, resets=True, state=True, reset_state=True),
    Case("gru", "bf16", 10, 17, 5, 1, False, resets=True),
    Case("lstm", "fp32", 10, 3, 4, 2, True, resets=True, reset_state=True),
    Case("lstm", "fp32", 10, 5, 6, 2, True, proj=4, **CUT),
    Case("lstm", "bf16", 18, 3, 5, 1, False, proj=7),
    Case("gru", "fp32", 10, 3, 1, 1, True, **CUT),  # one step
    Case("lstm", "bf16", 18, 3, 5, 2, True, proj=7, state=True),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_keep_the_bound(case):
    before = launch.LAUNCHES.copy()
    assert [accuracy.failures(case, seed) for seed in range(2)] == [[], []]
    assert launch.LAUNCHES - before == {"scan_forward": 2 * case.layers, "scan_backward": 2 * case.layers}


SLICED = [
    # protocol, chosen, case
    ("counter", {}, Case("lstm", "fp32", 13, 5, 5, 1, True, **CUT)),
    ("flags", {}, Case("gru", "fp32", 13, 5, 5, 1, True, **CUT)),
    ("flags", {"homes": "shared"}, Case("lstm", "bf16", 14, 3, 5, 1, False, resets=True, state=True, reset_state=True)),
    ("counter", {"homes": "all three"}, Case("gru", "bf16", 40, 3, 4, 1, False, lengths=True, resets=True, state=True)),
    ("counter", {"k_parts": 2}, Case("lstm", "fp16", 29, 3, 4, 1, True, lengths=True, resets=True, reset_state=True)),
    ("flags", {"subtiles": 2, "batch_tile": 8}, Case("gru", "fp16", 14, 11, 4, 1, True, **CUT)),
    ("counter", {"subtiles": 2, "batch_tile": 8}, Case("lstm", "fp32", 13, 11, 4, 1, False, proj=5, **CUT)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("index", range(len(SLICED)))
def test_slices_keep_the_bound(forced, index):
    protocol, chosen, case = SLICED[index]
    forced(protocol, **chosen)
    with concurrent_grid(Delays(("put", "arrive", "wait", "get")[index % 4], slow=index % 2)):
        assert accuracy.failures(case) == []


PIPELINES = [
    ("counter", {}, Case("lstm", "fp32", 13, 5, 5, 2, False, **CUT)),
    ("flags", {}, Case("gru", "bf16", 14, 3, 5, 3, False, **CUT)),
    ("counter", {"subtiles": 2, "batch_tile": 8}, Case("gru", "fp32", 13, 11, 4, 2, False, lengths=True, state=True)),
    # Where a row begins anew the own half of the gradient is cut, and not the neighbour's, in one exchange of both.
    ("counter", {"k_parts": 2}, Case("lstm", "fp32", 29, 5, 5, 2, False, **CUT)),
    ("flags", {"k_parts": 2, "subtiles": 2, "batch_tile": 8}, Case("gru", "bf16", 30, 11, 4, 2, False, resets=True)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("index", range(len(PIPELINES)))
def test_pipelines_keep_the_bound(pipelines, index):
    protocol, chosen, case = PIPELINES[index]
    pipelines(protocol, **chosen)
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(("put", "arrive", "get", "announce", "read")[index], slow=index % 2)):
        assert accuracy.failures(case) == []
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "given"), [(cell, given) for cell in CELLS for given in (True, False)])
def test_without_gradients_the_same_bits(cell, given):
    """Of c then only the edges are in memory: initial, reset and final."""
    layer = make_layer(cell, 5, 10, bidirectional=True, backend="persistent")
    hx, reset = (as_hx(states(cell, 2, 3, 10)) for _ in range(2))
    hx = hx if given else None
    cut = {"lengths": torch.tensor([4, 0, 3]), "resets": torch.rand(4, 3) < 0.5, "reset_state": reset}
    x = torch.randn(4, 3, 5)
    expected = layer(x, hx, **cut)
    with torch.no_grad():
        found = layer(x, hx, **cut)
    for a, b in zip(*(map(tensors, (found, expected))), strict=True):
        assert torch.equal(a, b.detach())
    layer.backend = "torch"
    torch.testing.assert_close(layer(x, hx, **cut), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cell", "proj"), SHAPES)
def test_mask_is_the_sequence_without_its_gaps(cell, proj, backend):
    torch.manual_seed(0)
    T, B = 6, 4
    layer = make_layer(cell, 3, 6, 2, bidirectional=True, batch_first=True, backend=backend, proj_size=proj)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]]).bool()
    x = torch.randn(B, T, 3, requires_grad=True)
    states = [torch.randn(4, B, n, requires_grad=True) for n in (proj or 6, 6)][: CELLS[cell].states]
    hx = as_hx(states)
    y, final = layer(x, hx, mask=mask)
    final = tensors(final)
    counts = mask.sum(1)
    order = torch.argsort(~mask, dim=1, stable=True)  # each row's steps first
    dense = x.gather(1, order[..., None].expand_as(x))
    y_dense, expected = layer(dense, hx, lengths=counts)
    expected = tensors(expected)
    back = torch.argsort(order, dim=1)[..., None].expand_as(y_dense)
    outputs = [y, *final], [y_dense.gather(1, back), *expected]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    cotangents = [torch.randn_like(t) for t in outputs[0]]
    leaves = [x, *states, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(o, leaves, cotangents) for o in outputs), rtol=1e-4, atol=1e-5)


# ---- every c -------------------------------------------------------------------------------------------------------


def prefixes(layer, x, hx):
    """Every c of the highest layer of a forward stack: the final one of each prefix."""
    return torch.cat([layer(x[: t + 1], hx)[1][1][-1:] for t in range(x.shape[0])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("proj", [0, 3])
def test_every_c_and_its_gradients(backend, layers, proj):
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "auto" else torch.float32
    layer = persistrnn.LSTM(4, 10, layers, proj_size=proj, backend=backend, dtype=dtype)
    truth = nn.LSTM(4, 10, layers, proj_size=proj, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 4, dtype=dtype, requires_grad=True)
    hx = [torch.randn(layers, 3, n, dtype=dtype, requires_grad=True) for n in (proj or 10, 10)]
    y, final, c = layer(x, hx, return_cell_states=True)
    assert torch.equal(c[-1], final[1][-1])
    cotangents = [torch.randn_like(t) for t in (y, *final, c)]
    inputs = [x, *hx, *layer.parameters()]
    grads = torch.autograd.grad([y, *final, c], inputs, cotangents)
    x64, *hx64 = (t.detach().double().requires_grad_() for t in (x, *hx))
    y64, final64 = truth(x64, tuple(hx64))
    c64 = prefixes(truth, x64, tuple(hx64))
    inputs = [x64, *hx64, *truth.parameters()]
    expected = torch.autograd.grad([y64, *final64, c64], inputs, [t.double() for t in cotangents])
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if backend == "auto" else {"rtol": 2e-5, "atol": 2e-6}
    for a, b in zip((y, c, *grads), (y64, c64, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.interpreter
def test_every_c_without_gradients_and_in_float32():
    layer = persistrnn.LSTM(4, 10, bidirectional=True, backend="persistent", dtype=torch.bfloat16)
    exact = persistrnn.LSTM(
        4, 10, bidirectional=True, backend="persistent", dtype=torch.bfloat16, cell_dtype=torch.float32
    )
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 4, dtype=torch.bfloat16)
    _, (_, c_n), c = layer(x, return_cell_states=True)
    with torch.no_grad():
        assert torch.equal(layer(x, return_cell_states=True)[2], c.detach())
    y, (_, c_n_exact), c_exact = exact(x, return_cell_states=True)
    assert (c.dtype, c_exact.dtype) == (torch.bfloat16, torch.float32)
    assert c_n_exact.dtype == torch.bfloat16
    assert torch.equal(c_exact.to(torch.bfloat16), c)
    assert torch.equal(c_n_exact, c_n)
    assert not torch.equal(c_exact, c.float())
    (y.float().sum() + c_exact.sum()).backward()
    assert all(p.grad.isfinite().all() for p in exact.parameters())


# ---- packed sequences ----------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "proj", "batch_first", "sort"),
    [(*shape, first, first == (k % 2 == 0)) for k, shape in enumerate(SHAPES) for first in (True, False)],
)
def test_packed_sequences_on_the_kernels(cell, proj, batch_first, sort):
    torch.manual_seed(0)
    options = {"bidirectional": True, "batch_first": batch_first, "proj_size": proj}
    layer, truth = pair(cell, 4, 10, backend="persistent", **options)
    lengths = torch.tensor([5, 4, 2] if sort else [2, 5, 4])
    hx = as_hx(torch.randn(2, 3, n) for n in (proj or 10, 10)[: CELLS[cell].states])
    x = torch.randn((3, 5, 4) if batch_first else (5, 3, 4))
    results = []
    for module in (layer, truth):
        leaf = x.clone().requires_grad_()
        packed = nn.utils.rnn.pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=sort)
        output, final = module(packed, hx)
        assert isinstance(output, nn.utils.rnn.PackedSequence)
        y, found = nn.utils.rnn.pad_packed_sequence(output, batch_first)
        assert torch.equal(found, lengths)
        outputs = [y, *tensors(final)]
        grads = torch.autograd.grad(outputs, [leaf, *module.parameters()], [torch.ones_like(o) for o in outputs])
        results.append([*outputs, *grads])
    assert layer.last_path == "persistent"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


# ---- reinforcement learning ----------------------------------------------------------------------------------------


def test_marks():
    lengths = torch.tensor([4, 0, 3, 2])
    resets = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    active = torch.arange(4).unsqueeze(1) < lengths
    forward, reverse = step_marks.marks(active, resets, 2).unbind(2)
    B, E = step_marks.BEGINS, step_marks.SKIPPED
    assert forward.tolist() == [[B, E, 0, 0], [0, E, 0, 0], [B, E, 0, E], [0, E, E, E]]
    assert reverse.tolist() == [[0, E, 0, 0], [B, E, 0, 0], [0, E, 0, E], [0, E, E, E]]
    assert forward.dtype == torch.uint8
    assert step_marks.marks(active, None, 1).squeeze(2).eq(E).equal(~active)
    assert step_marks.marks(None, resets, 1).squeeze(2).eq(B).equal(resets)
    assert step_marks.first_steps(active, 2)[:, 2].tolist() == [
        [True, False],
        [False, False],
        [False, True],
        [False] * 2,
    ]
    assert not step_marks.first_steps(active, 2)[:, 1].any()


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_c_has_its_dtype_on_every_path(batch, backend):
    layer = persistrnn.LSTM(3, 6, dtype=torch.bfloat16, cell_dtype=torch.float32, backend=backend)
    x = torch.zeros(4, batch, 3, dtype=torch.bfloat16)
    assert layer(x, return_cell_states=True)[2].dtype == torch.float32


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cell", "proj"), SHAPES)
def test_an_empty_batch(cell, proj, backend):
    layer = make_layer(cell, 3, 6, 2, backend=backend, proj_size=proj)
    x = torch.randn(4, 0, 3, requires_grad=True)
    nothing = torch.zeros(4, 0, dtype=torch.bool)
    y, _ = layer(x, lengths=torch.zeros(0, dtype=torch.long), resets=nothing)
    assert y.shape == (4, 0, proj or 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    assert layer(x, mask=nothing)[0].shape == layer(x)[0].shape == (4, 0, proj or 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_without_a_step(cell, backend):
    """All of length zero: the initial state comes out, and its gradient is the final one's."""
    layer = make_layer(cell, 3, 6, bidirectional=True, backend=backend)
    states = [torch.randn(2, 2, 6, requires_grad=True) for _ in range(CELLS[cell].states)]
    y, final = layer(torch.randn(3, 2, 3), as_hx(states), lengths=torch.zeros(2).int())
    assert not y.any()
    final = tensors(final)
    assert all(torch.equal(a, b) for a, b in zip(final, states, strict=True))
    cotangents = [torch.randn_like(s) for s in states]
    grads = torch.autograd.grad(final, states, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(grads, cotangents, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "proj"), SHAPES)
def test_lengths_of_cpu_tensors_run_on_torchs_kernels(cell, proj, bidirectional):
    """What a mask, which they cannot run, gives step by step."""
    layer = make_layer(cell, 3, 6, 2, bidirectional=bidirectional, batch_first=True, proj_size=proj)
    x, lengths = torch.randn(4, 5, 3, requires_grad=True), torch.tensor([2, 5, 0, 4])
    results, paths = [], []
    for given in ({"lengths": lengths}, {"mask": torch.arange(5) < lengths.unsqueeze(1)}):
        y, final = layer(x, **given)
        found = [y, *tensors(final)]
        grads = torch.autograd.grad(sum(t.square().sum() for t in found), [x, *layer.parameters()])
        results.append([*found, *grads])
        paths.append(layer.last_path)
    torch.testing.assert_close(*results)
    assert paths == ["torch", "stepwise"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_lengths_of_few_bits(dtype):
    """More steps than the dtype can count."""
    layer = persistrnn.GRU(2, 3)
    x, lengths = torch.randn(300, 2, 2), torch.tensor([100, 0])
    assert torch.equal(layer(x, lengths=lengths.to(dtype))[0], layer(x, lengths=lengths)[0])


@pytest.mark.interpreter
def test_lengths_out_of_range_after_inference_mode(monkeypatch):
    """A tensor that was made in that mode cannot be written outside: the word in which they are noted is none."""
    monkeypatch.setattr(step_marks, "_words", {})
    layer, x = persistrnn.GRU(2, 3, backend="persistent"), torch.randn(3, 2, 2)
    for inference in (True, False, False):
        with torch.inference_mode(inference), pytest.raises(ValueError, match=r"within \[0, T=3\], got \[3, 4\]"):
            layer(x, lengths=torch.tensor([3, 4]))
    layer(x, lengths=torch.tensor([3, 2]))
