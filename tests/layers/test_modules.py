"""The modules against torch.nn's: parameters, state_dict, results to the bit, and what explain says of them."""

import inspect
import itertools
from functools import partial

import pytest
import torch
from pairs import PAIRS, as_hx, results, states, tensors
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persistrnn
from persistrnn import decide

pytestmark = pytest.mark.torch_path

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6
STACKS = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first"), values, strict=True))
    for values in itertools.product([1, 2], [False, True], [True, False], [False, True])
]


# Strides too.
assert_same_bits = partial(torch.testing.assert_close, rtol=0, atol=0, check_stride=True)


def make_pair(cell, **options):
    """Ours, which takes a path by itself, and torch.nn's, from one seed."""
    layers = []
    for constructor in PAIRS[cell]:
        torch.manual_seed(0)
        layers.append(constructor(INPUT, HIDDEN, **options))
    return layers


def same(ours, theirs):
    assert_same_bits(tensors(ours), tensors(theirs))


# --- parameters ---------------------------------------------------------------------------------------------


PROJECTED = [{"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": bias} for bias in (True, False)]


OF_PARAMETERS = [options for options in STACKS if not options["batch_first"]]


@pytest.mark.parametrize(
    ("cell", "options"), [*itertools.product(PAIRS, OF_PARAMETERS), *(("lstm", p) for p in PROJECTED)]
)
def test_parameters_are_torch_nn_to_the_bit(cell, options):
    """And drawn anew in the same order."""
    ours, theirs = make_pair(cell, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]
    assert repr(ours) == repr(theirs)
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


# With a state for every second form, and for both values of each option.
FORMS = [(cell, STACKS[k], (k + k // 2 + k // 4 + k // 8) % 2 == 1) for cell in PAIRS for k in range(len(STACKS))]
FORMS += [("lstm", PROJECTED[0], given) for given in (False, True)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("cell", "options", "with_state"), FORMS, ids=str)
def test_forward_and_gradients_are_torch_nn_to_the_bit(cell, options, with_state):
    pair = make_pair(cell, **options)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    x = torch.randn((BATCH, STEPS, INPUT) if options.get("batch_first") else (STEPS, BATCH, INPUT))
    widths = (options.get("proj_size", HIDDEN), HIDDEN)[: len(states(cell, 1))]
    hx = as_hx(torch.randn(rows, BATCH, width) for width in widths) if with_state else None
    assert_same_bits(*(results(layer, x, hx, layer.parameters()) for layer in pair))
    same(*(layer(x, hx) for layer in pair))
    assert pair[0].last_path == "torch"


@pytest.mark.parametrize("cell", PAIRS)
def test_dropout_bits_are_torch_nn(cell):
    pair = make_pair(cell, num_layers=3, dropout=0.4)
    x = torch.randn(STEPS, BATCH, INPUT)
    found = []
    for layer in pair:
        torch.manual_seed(9)
        found.append(layer(x))
    same(*found)
    assert not torch.equal(found[0][0], pair[0](x)[0])
    same(pair[0].eval()(x), pair[1].eval()(x))


@pytest.mark.parametrize(("with_state", "batch_first"), [(False, False), (True, True)])
@pytest.mark.parametrize("cell", PAIRS)
def test_unbatched_input(cell, with_state, batch_first):
    ours, theirs = make_pair(cell, num_layers=2, batch_first=batch_first)
    x, hx = torch.randn(STEPS, INPUT), as_hx(states(cell, 2, HIDDEN)) if with_state else None
    same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("cell", PAIRS)
def test_packed_sequences(cell, ordered):
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True)
    lengths = [5, 3, 2] if ordered else [2, 5, 3]
    packed = pack_padded_sequence(torch.randn(STEPS, 3, INPUT), lengths, enforce_sorted=ordered)
    for hx in (None, as_hx(states(cell, 4, 3, HIDDEN))):
        actual, expected = ours(packed, hx), theirs(packed, hx)
        assert isinstance(actual[0], PackedSequence)
        same(actual, expected)
        assert all(torch.equal(a, e) for a, e in zip(actual[0][1:], expected[0][1:], strict=True) if e is not None)
    assert ours.last_path == "torch"


# --- living in a torch program --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", PAIRS)
def test_weights_are_read_at_each_call(cell):
    ours, theirs = make_pair(cell)
    x = torch.randn(STEPS, BATCH, INPUT)
    ours(x)
    replacement = nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    ours.weight_hh_l0 = replacement
    theirs.weight_hh_l0 = replacement
    same(ours(x), theirs(x))
    ours.double()
    assert ours(x.double())[0].dtype == torch.float64


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
    text = persistrnn.explain(layer, BATCH, STEPS)
    assert path in text
    assert why in text
    if path == "path: torch" and "device" not in options:
        layer(torch.zeros(STEPS, BATCH, INPUT))
        assert f"path: {layer.last_path}" in text, "as the call"


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((nn.LSTM(2, 3), 1, 1), TypeError, "such as persistrnn.LSTM, got torch.nn.modules.rnn.LSTM"),
        ((persistrnn.GRU(2, 3), 0, 1), ValueError, "batch must be greater than zero, got 0"),
        ((persistrnn.GRU(2, 3), 1, -2), ValueError, "steps must be greater than zero, got -2"),
        ((persistrnn.GRU(2, 3), 1, True), TypeError, "steps should be of type int, got: bool"),
    ],
)
def test_explain_refuses(arguments, exception, message):
    with pytest.raises(exception, match=message):
        persistrnn.explain(*arguments)
