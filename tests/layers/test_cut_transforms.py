"""Lengths, masks, resets and projections under torch.compile, torch.export and torch.func."""

import pytest
import torch
from pairs import BACKENDS, CELLS, PATHS, make_layer, states, tensors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import persistrnn
from persistrnn import step_marks
from persistrnn.kernels import cells

SHAPES = [("lstm", 0), ("lstm", 3), ("gru", 0)]


@pytest.mark.parametrize(
    ("cell", "backend"), [("lstm", "auto"), pytest.param("gru", "persistent", marks=pytest.mark.interpreter)]
)
def test_compiles_as_one_graph_for_all_lengths(cell, backend):
    torch._dynamo.reset()
    layer = make_layer(cell, 7, 9, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, lengths, resets):
        return tensors(layer(x, lengths=lengths, resets=resets))

    # One graph for all sizes, and one for each way in which they can be 1: torch itself makes those.
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    sizes = ((4, 3), (5, 3), (5, 2), (1, 2), (3, 1), (2, 2))
    seen = []
    for T, B in sizes:
        x = torch.randn(T, B, 7, requires_grad=True)
        given = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
        found, expected = compiled(x, *given), call(x, *given)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(sum(t.sum() for t in r), [x, *layer.parameters()]) for r in (found, expected)]
        torch.testing.assert_close(*grads)
        seen.append(counter.frame_count)
    assert seen[-1] - seen[0] <= 2


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", CELLS)
def test_vmaps_over_samples(cell):
    layer = make_layer(cell, 3, 6, backend="persistent")
    x, resets = torch.randn(4, 5, 2, 3), torch.rand(4, 5, 2) < 0.4
    lengths = torch.randint(0, 6, (4, 2))

    def loss(x, lengths, resets):
        return layer(x, lengths=lengths, resets=resets)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x, lengths, resets)
    expected = torch.stack([torch.func.grad(loss)(*sample) for sample in zip(x, lengths, resets, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cell", "proj"), SHAPES)
def test_differentiates_twice_step_by_step(cell, proj):
    layer = make_layer(cell, 2, 4, bidirectional=True, dtype=torch.float64, proj_size=proj)
    cut = {"lengths": torch.tensor([3, 0, 2]), "resets": torch.rand(3, 3) < 0.5}
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, **cut)[0], x)


# dynamo's own, on any tensor with a history that crosses a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("return_c", "proj"), [(False, 2), (True, 0)])
def test_compiles_packed_sequences(return_c, proj, backend):
    """The graph breaks, as torch.nn's does, and the result is that of the eager call."""
    torch._dynamo.reset()
    layer = persistrnn.LSTM(3, 6, proj_size=proj, backend=backend)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), [4, 2])
    options = {"return_cell_states": True} if return_c else {}
    compiled = torch.compile(layer, backend="aot_eager")
    (y, states, *c), expected = (call(packed, **options) for call in (compiled, layer))
    found = [y.data, *states, *(t.data for t in c)]
    torch.testing.assert_close(found, [expected[0].data, *expected[1], *(t.data for t in expected[2:])])
    sum(t.sum() for t in found).backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["reset", "mask"])
def test_compiles_projections_with_everything(way, backend):
    torch._dynamo.reset()
    layer = persistrnn.LSTM(3, 6, proj_size=2, backend=backend)
    x = torch.randn(4, 2, 3, requires_grad=True)
    state = torch.randn(1, 2, 2), torch.randn(1, 2, 6)
    bools = torch.rand(4, 2) < 0.5
    cut = {"resets": bools, "reset_state": state} if way == "reset" else {"mask": bools}
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for call in (compiled, layer):
        y, final, c = call(x, state, return_cell_states=True, **cut)
        results.append([y, *final, c, *torch.autograd.grad(y.sum() + c.sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", [*CELLS, "peephole"])
def test_operators_keep_the_contract_of_torch_library(cell):
    rows, own = cells.CELLS[cell].gates, len(cells.CELLS[cell].params)
    shapes = (3, 2, 1, rows * 5), (1, rows * 5, 5), (1, rows * 5), *[(1, own, 5)] * (own > 0)
    given = [torch.randn(shape) for shape in shapes]
    given += states(cell, 1, 2, 5) + states(cell, 1, 2, 5)
    marks = step_marks.marks(None, torch.rand(3, 2) < 0.5, 1)
    operators = torch.ops.persistrnn
    torch.library.opcheck(operators.stepwise.default, (cell, marks, None, given))
    grads = [torch.randn_like(t) for t in operators.stepwise(cell, marks, None, given)]
    torch.library.opcheck(operators.stepwise_backward.default, (cell, marks, None, given, grads))
    torch.library.opcheck(operators.bounded_lengths.default, (torch.tensor([3, 0]), 3))
