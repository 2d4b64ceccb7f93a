"""The modules against torch.nn's: parameters, state_dict, results to the bit, and what explain says of them."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from anywhere import anywhere
from pairs import PAIRS
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persistrnn
from persistrnn import autograd, decide, reference

pytestmark = pytest.mark.torch_path

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6
STACKS = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first"), values, strict=True))
    for values in itertools.product([1, 2], [False, True], [True, False], [False, True])
]


def tensors_of(outputs):
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_same_bits(actual, expected):
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        assert torch.equal(a, e)


def make_pair(cell, *args, **options):
    """Ours and torch.nn's, from one seed."""
    layers = []
    for constructor in PAIRS[cell]:
        torch.manual_seed(0)
        layers.append(constructor(*(args or (INPUT, HIDDEN)), **options))
    return layers


def make_state(cell, rows, batch, hidden=HIDDEN, dtype=torch.float32):
    h, c = torch.randn(2, rows, batch, hidden, dtype=dtype)
    return (h, c) if cell == "lstm" else h


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STACKS, ids=str)
@pytest.mark.parametrize("cell", PAIRS)
def test_parameters_are_torch_nn_to_the_bit(cell, options):
    ours, theirs = make_pair(cell, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]
    assert_same_bits(ours.all_weights, theirs.all_weights)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_projection_parameters_are_torch_nn_to_the_bit(bias):
    ours, theirs = make_pair("lstm", num_layers=2, bidirectional=True, bias=bias, proj_size=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_bits(ours.all_weights, theirs.all_weights)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("cell", PAIRS)
def test_state_dict_goes_both_ways(cell):
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True)
    x = torch.randn(STEPS, BATCH, INPUT)
    theirs.reset_parameters()
    assert not torch.equal(ours(x)[0], theirs(x)[0])
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours(x), theirs(x))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    assert_same_bits(ours(x), theirs(x))


@pytest.mark.parametrize("cell", PAIRS)
def test_reset_parameters_draws_in_torch_nn_order(cell):
    ours, theirs = make_pair(cell, num_layers=2)
    for layer in (ours, theirs):
        torch.manual_seed(5)
        layer.reset_parameters()
    assert_same_bits(ours.all_weights, theirs.all_weights)


@pytest.mark.parametrize("cell", PAIRS)
def test_constructor_is_torch_nn(cell):
    layer = PAIRS[cell][0](INPUT, HIDDEN)
    ours = inspect.signature(type(layer)).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    sizes, others = ["input_size", "hidden_size", "num_layers"], ["bias", "batch_first", "dropout", "bidirectional"]
    nonlinearity = ["nonlinearity"] if "rnn" in cell else []
    assert positional == [*sizes, *nonlinearity, *others, *(["proj_size"] if cell == "lstm" else []), "device", "dtype"]
    assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    layer = PAIRS[cell][0](INPUT, HIDDEN, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_repr_shows_a_chosen_backend():
    assert repr(persistrnn.GRU(2, 3, backend="torch")) == "GRU(2, 3, backend=torch)"


# --- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", STACKS, ids=str)
@pytest.mark.parametrize("cell", PAIRS)
def test_forward_and_gradients_are_torch_nn_to_the_bit(cell, options, with_state):
    ours, theirs = make_pair(cell, **options)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    x = torch.randn((BATCH, STEPS, INPUT) if options["batch_first"] else (STEPS, BATCH, INPUT), requires_grad=True)
    hx = make_state(cell, rows, BATCH) if with_state else None
    outputs = [layer(x, hx) for layer in (ours, theirs)]
    assert_same_bits(*outputs)
    losses = [sum(t.sin().sum() for t in tensors_of(o)) for o in outputs]
    ours_grads, theirs_grads = (
        torch.autograd.grad(loss, [x, *layer.parameters()]) for loss, layer in zip(losses, (ours, theirs), strict=True)
    )
    assert_same_bits(ours_grads, theirs_grads)
    assert ours.last_path == "torch"


@pytest.mark.parametrize("cell", PAIRS)
def test_dropout_bits_are_torch_nn(cell):
    pair = make_pair(cell, num_layers=3, dropout=0.4)
    x = torch.randn(STEPS, BATCH, INPUT)
    results = []
    for layer in pair:
        torch.manual_seed(9)
        results.append(layer(x))
    assert_same_bits(*results)
    assert not torch.equal(results[0][0], pair[0](x)[0])
    assert_same_bits(pair[0].eval()(x), pair[1].eval()(x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("cell", PAIRS)
def test_unbatched_input(cell, with_state, batch_first):
    ours, theirs = make_pair(cell, num_layers=2, batch_first=batch_first)
    x = torch.randn(STEPS, INPUT)
    state = make_state(cell, 2, 1)
    state = tuple(s[:, 0] for s in state) if cell == "lstm" else state[:, 0]
    hx = state if with_state else None
    assert [t.shape for t in tensors_of(ours(x, hx))] == [t.shape for t in tensors_of(theirs(x, hx))]
    for a, e in zip(tensors_of(ours(x, hx)), tensors_of(theirs(x, hx)), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("cell", PAIRS)
def test_packed_sequences(cell, ordered, with_state):
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True)
    lengths = [5, 3, 2] if ordered else [2, 5, 3]
    packed = pack_padded_sequence(torch.randn(STEPS, 3, INPUT), lengths, enforce_sorted=ordered)
    hx = make_state(cell, 4, 3) if with_state else None
    actual, expected = ours(packed, hx), theirs(packed, hx)
    assert isinstance(actual[0], PackedSequence)
    assert_same_bits(actual, expected)
    assert ours.last_path == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", PAIRS)
def test_other_dtypes(cell, dtype):
    ours, theirs = make_pair(cell, dtype=dtype)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=dtype)
    assert_same_bits(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projection():
    ours, theirs = make_pair("lstm", num_layers=2, bidirectional=True, proj_size=2)
    x = torch.randn(STEPS, BATCH, INPUT)
    assert_same_bits(ours(x), theirs(x))
    hx = torch.randn(4, BATCH, 2), torch.randn(4, BATCH, HIDDEN)
    assert_same_bits(ours(x, hx), theirs(x, hx))
    assert ours.last_path == "torch"


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("cell", PAIRS)
def test_autocast_is_torch_nn(cell, with_state, input_dtype):
    ours, theirs = make_pair(cell, num_layers=2)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=input_dtype)
    hx = make_state(cell, 2, BATCH) if with_state else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(ours(x, hx), anywhere(theirs)(x, hx))


# --- living in a torch program --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", PAIRS)
def test_copies_and_pickles(cell):
    layer = PAIRS[cell][0](INPUT, HIDDEN, 2, bidirectional=True, backend="torch")
    x = torch.randn(STEPS, BATCH, INPUT)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    for other in copies:
        assert repr(other) == repr(layer)
        assert_same_bits(other(x), expected)


@pytest.mark.parametrize("cell", PAIRS)
def test_weights_are_read_at_each_call(cell):
    ours, theirs = make_pair(cell)
    x = torch.randn(STEPS, BATCH, INPUT)
    ours(x)
    replacement = nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    ours.weight_hh_l0 = replacement
    theirs.weight_hh_l0 = replacement
    assert_same_bits(ours(x), theirs(x))
    ours.double()
    assert ours(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("cell", PAIRS)
def test_functional_call_differentiates_the_given_weights(cell):
    layer = PAIRS[cell][0](INPUT, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUT)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
    output, _ = torch.func.functional_call(layer, weights, (x,))
    output.square().sum().backward()
    other = copy.deepcopy(layer)
    other.load_state_dict(weights)
    other(x)[0].square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("cell", PAIRS)
def test_meta_device(cell):
    layer = PAIRS[cell][0](INPUT, HIDDEN, 2, device="meta")
    y, _ = layer(torch.empty(STEPS, BATCH, INPUT, device="meta"))
    assert y.shape == (STEPS, BATCH, HIDDEN)
    assert y.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(STEPS, BATCH, INPUT))[0].isfinite().all()


@pytest.mark.parametrize("cell", PAIRS)
def test_flatten_parameters_changes_nothing(cell):
    layer = PAIRS[cell][0](INPUT, HIDDEN)
    before = [(p.data_ptr(), p.detach().clone()) for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    for (address, value), p in zip(before, layer.parameters(), strict=True):
        assert p.data_ptr() == address
        assert torch.equal(p, value)


def test_last_path_tells_what_ran(monkeypatch):
    monkeypatch.setattr(decide, "unsupported", lambda call: None)
    monkeypatch.setattr(autograd, "recurrent", lambda *args, **_: reference.recurrent(*args))
    layer = persistrnn.LSTM(INPUT, HIDDEN, 2, backend="persistent")
    assert layer.last_path is None
    x = torch.randn(STEPS, BATCH, INPUT)
    persistent = layer(x)
    assert layer.last_path == "persistent"
    layer.backend = "auto"
    automatic = layer(x)
    assert layer.last_path == "torch"
    torch.testing.assert_close(persistent, automatic)
    layer.backend = "kernels"
    with pytest.raises(ValueError, match="got 'kernels'"):
        layer(x)


# --- explain ------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """Kernels that support everything but H=7, with a plan to print. Yields the calls whose plan was printed."""
    calls = []

    def plan(decision):
        calls.append(decision.call)
        return "8 slices\n16 rows"

    monkeypatch.setattr(decide.Decision, "plan", property(plan))
    monkeypatch.setattr(decide, "unsupported", lambda call: "H=7 is odd." if call.hidden_size == 7 else None)
    return calls


def test_explain_prints_the_plan(planned):
    layer = persistrnn.GRU(INPUT, HIDDEN, 2, bidirectional=True, backend="persistent", dtype=torch.bfloat16)
    lines = persistrnn.explain(layer, batch=3, steps=70).splitlines()
    assert lines[0] == f"{layer!r}, batch 3, steps 70, bfloat16 on cpu"
    kept = 2 * 2 * HIDDEN * 5 * 2  # in each layer and direction y and four more, in two bytes
    most = kept + 2 * 2 * HIDDEN * 2 * 3  # with the gradients of both halves of the gates
    kept_line = f'save="gates": {kept} bytes per step and row are kept; {most * 3 * 70:,} bytes at most in training, '
    kept_line += "without the input and the gradients of input and output (predicted)"
    assert lines[1:] == ["path: persistent", "8 slices", "16 rows", kept_line]
    assert (planned[0].cell, planned[0].batch, planned[0].dtype) == ("gru", 3, torch.bfloat16)
    assert layer.last_path is None


def test_explain_reads_autocast(planned):
    layer = persistrnn.LSTM(INPUT, HIDDEN, backend="persistent")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "bfloat16 on cpu" in persistrnn.explain(layer, 1, 1)
    assert planned[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "path", "why"),
    [
        ({}, "path: torch", "CPU tensors"),
        ({"backend": "torch"}, "path: torch", "asks for torch's own kernels"),
        ({"backend": "persistent", "hidden_size": 7}, "would raise", "H=7 is odd."),
        ({"device": "meta", "hidden_size": 7}, "path: torch", "H=7 is odd."),
        ({"device": "meta"}, "path: persistent", ""),
    ],
    ids=str,
)
def test_explain_says_why_not(planned, options, path, why):
    layer = persistrnn.LSTM(**{"input_size": INPUT, "hidden_size": HIDDEN, **options})
    text = persistrnn.explain(layer, 2, 3)
    assert path in text
    assert why in text


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_explain_agrees_with_the_call(planned, backend):
    layer = persistrnn.LSTM(INPUT, HIDDEN, backend=backend)
    layer(torch.zeros(STEPS, BATCH, INPUT))
    assert f"path: {layer.last_path}" in persistrnn.explain(layer, BATCH, STEPS)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((nn.LSTM(2, 3), 1, 1), TypeError, "such as persistrnn.LSTM, got torch.nn.modules.rnn.LSTM"),
        ((persistrnn.GRU(2, 3), 0, 1), ValueError, "batch must be greater than zero, got 0"),
        ((persistrnn.GRU(2, 3), 1, -2), ValueError, "steps must be greater than zero, got -2"),
        ((persistrnn.GRU(2, 3), 1.0, 1), TypeError, "batch should be of type int, got: float"),
        ((persistrnn.GRU(2, 3), 1, True), TypeError, "steps should be of type int, got: bool"),
    ],
)
def test_explain_refuses(arguments, exception, message):
    with pytest.raises(exception, match=message):
        persistrnn.explain(*arguments)
