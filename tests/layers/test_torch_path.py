"""torch's own path: torch.nn's bits when eager, one operator per layer when compiled."""

import functools
import warnings

import pytest
import torch
from pairs import PAIRS, as_hx, states, tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import persistrnn
from persistrnn import torch_path
from persistrnn.options import Options

pytestmark = [
    pytest.mark.torch_path,
    # dynamo's own, on any autograd.Function that it traces
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

INPUT, HIDDEN = 3, 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors_for(cell: str, directions: int, bias: bool, steps: int = 4, batch: int = 2) -> list[torch.Tensor]:
    """What the layer operator takes: input, states, weights."""
    torch.manual_seed(0)
    layer = PAIRS[cell][1](INPUT, HIDDEN, bias=bias, bidirectional=directions == 2)
    return [
        torch.randn(steps, batch, INPUT),
        *states(cell, directions, batch, HIDDEN),
        *(p.detach() for p in layer.parameters()),
    ]


@pytest.mark.parametrize(
    ("directions", "bias", "autocast"), [(1, False, None), (2, True, None), (2, True, torch.bfloat16)]
)
@pytest.mark.parametrize("cell", PAIRS)
def test_operators_pass_opcheck(cell, directions, bias, autocast):
    given = tensors_for(cell, directions, bias)
    options = (cell, bias, directions == 2, autocast)
    outputs = torch_path.layer_forward(*options, given)
    grads = [torch.randn_like(t) for t in outputs]
    torch.library.opcheck(torch_path.layer_forward, (*options, given))
    torch.library.opcheck(torch_path.layer_backward, (*options, given, grads))


def test_shared_storage_is_copied():
    """cuDNN returns all weight gradients as views of one buffer."""
    given, buffer = torch.ones(2, 3), torch.arange(4.0)
    outputs = torch_path.unaliased([given, buffer[:2], buffer[2:], given.new_ones(3, 2).t()], [given])
    storages = [t.untyped_storage().data_ptr() for t in (given, *outputs)]
    assert len(set(storages)) == len(storages)
    assert all(t.is_contiguous() for t in outputs)
    assert [t.sum() for t in outputs] == [6, 1, 5, 6]


def test_autograd_records_inside_an_operator():
    """Under a dispatch mode autograd is shut off the most: nothing is recorded, and views are not tracked."""
    seen = []

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            x = torch.ones(2, requires_grad=True)
            with torch_path.autograd_inside_an_operator():
                y = x * 1
                y[0].mul_(5)
                seen.append(torch.autograd.grad(y.sum(), x)[0].tolist())
            return function(*args, **(kwargs or {}))

    with Inside():
        torch.zeros(1)
    assert seen == [[5, 1]]


@pytest.mark.parametrize(
    ("cell", "bias", "batch_first"),
    [("lstm", True, False), ("lstm", False, True), ("gru", True, True), ("gru", False, False)],
)
def test_compiled_training_equals_eager(cell, bias, batch_first):
    """Forward and backward in one graph; aot_eager draws the same dropout bits as eager."""
    options = {"bias": bias, "batch_first": batch_first, "dropout": 0.5, "bidirectional": True}
    layer = PAIRS[cell][0](INPUT, HIDDEN, 2, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, INPUT, requires_grad=True)
    state = torch.randn(4, 5 if batch_first else 4, HIDDEN, requires_grad=True)
    hx = as_hx([state] * (1 + (cell == "lstm")))
    results = []
    for call in (layer, compiled):
        torch.manual_seed(1)
        outputs = tensors(call(x, hx))
        loss = sum(((k + 1) * t).sin().sum() for k, t in enumerate(outputs))
        results.append((outputs, torch.autograd.grad(loss, [x, state, *layer.parameters()])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    assert results[0][0][0].stride() == results[1][0][0].stride()


@pytest.mark.parametrize("cell", PAIRS)
def test_steps_and_batch_do_not_recompile(cell):
    """Two graphs, the first call's static one and the dynamic one, serve every T and B."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = PAIRS[cell][0](INPUT, HIDDEN, 2, bidirectional=True)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for steps, batch in ((5, 4), (6, 7), (31, 16)):
        x = torch.randn(steps, batch, INPUT)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    assert counter.frame_count == 2


@pytest.mark.parametrize(("input_dtype", "with_state"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("cell", PAIRS)
def test_compiled_autocast_equals_eager(cell, input_dtype, with_state):
    layer = PAIRS[cell][0](INPUT, HIDDEN, 2, bidirectional=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, INPUT, dtype=input_dtype, requires_grad=True)
    state = torch.randn(4, 4, HIDDEN)
    hx = as_hx([state] * (1 + (cell == "lstm")) * with_state)
    results = []
    for call in (layer, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = tensors(call(x, hx))
        gradients = torch.autograd.grad(outputs[0].float().sin().sum(), [x, *layer.parameters()])
        results.append((outputs, gradients))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # of its flags
def test_compiled_autocast_without_onednn_trains():
    """There ATen's bfloat16 LSTM has another dtype of its own."""
    layer = persistrnn.LSTM(INPUT, HIDDEN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, INPUT)
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = compiled(x)
        gradients = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_compiled_projection_equals_eager():
    layer = persistrnn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, INPUT)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("cell", PAIRS)
def test_compiles_inside_a_checkpoint(cell):
    """A checkpointed region may not write to the module, so that a compiled call leaves last_path alone."""
    layer = PAIRS[cell][0](INPUT, HIDDEN)
    x = torch.randn(5, 4, INPUT, requires_grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)[0]

    (actual,) = torch.autograd.grad(run(x).sin().sum(), x)
    assert layer.last_path is None
    (expected,) = torch.autograd.grad(layer(x)[0].sin().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_silences_the_flat_weight_warning_and_no_other():
    with torch_path._no_flat_weight_warning():
        warnings.warn("RNN module weights are not part of single contiguous chunk of memory.", stacklevel=1)
    with pytest.warns(UserWarning, match="another"), torch_path._no_flat_weight_warning():
        warnings.warn("another", stacklevel=1)


@pytest.mark.parametrize(("batch_first", "packed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layer_by_layer_is_the_stack(cell, batch_first, packed):
    """As a GPU runs dropout; ATen draws the same masks from the same seed."""
    torch.manual_seed(0)
    module = getattr(torch.nn, cell.upper())(3, 6, 3, bidirectional=True, batch_first=batch_first)
    x = torch.randn((2, 5, 3) if batch_first else (5, 2, 3))
    batch_sizes = None
    if packed:
        sequence = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        x, batch_sizes = sequence.data, sequence.batch_sizes
    state = states(cell, 6, 2, 6)
    weights = [w for layer in module.all_weights for w in layer]
    torch.manual_seed(1)
    run = functools.partial(torch_path.layer, cell, True, True, batch_sizes)
    options = Options(3, True, batch_first, 0.4, True, training=True)
    found = torch_path.by_layers(run, x, state, weights, options)
    torch.manual_seed(1)
    expected = torch_path.stack(cell, x, batch_sizes, state, weights, options)
    torch.testing.assert_close(found, expected)


def test_tied_weights_compile():
    layer = persistrnn.LSTM(6, 6, 2)
    layer.bias_hh_l0 = layer.bias_ih_l0
    layer.weight_hh_l1 = layer.weight_ih_l1
    x = torch.randn(4, 2, 6)
    found, expected = (
        torch.autograd.grad(call(x)[0].square().sum(), list(layer.parameters()))
        for call in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer)
    )
    torch.testing.assert_close(found, expected)
