"""Flags and sizes of a wrong type or value: refused alike by constructors, functions and changed modules, with the type
of error that torch.nn has, and before a path is chosen."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import persistrnn

LAYERS = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU}
TORCHS = {"lstm": nn.LSTM, "gru": nn.GRU}
STEPS, BATCH, INPUT, HIDDEN = 3, 2, 4, 6
X = torch.zeros(STEPS, BATCH, INPUT)

backends = pytest.mark.parametrize("backend", ["auto", pytest.param("persistent", marks=pytest.mark.interpreter)])
cells = pytest.mark.parametrize("cell", LAYERS)

FLAGS = [
    ("num_layers", 1.0, TypeError, r"num_layers should be of type int, got: float \(1.0\)"),
    ("num_layers", True, TypeError, r"num_layers should be of type int, got: bool \(True\)"),
    ("num_layers", 0, ValueError, "num_layers must be greater than zero, got 0"),
    ("bias", 2, TypeError, r"bias should be of type bool, got: int \(2\); give True or False"),
    ("batch_first", 2, TypeError, "batch_first should be of type bool, got: int"),
    ("bidirectional", None, TypeError, "bidirectional should be of type bool, got: NoneType"),
    ("training", "x", TypeError, r"training should be of type bool, got: str \('x'\)"),
    ("dropout", True, ValueError, r"dropout should be a number in range \[0, 1\].*got True"),
    ("dropout", "x", ValueError, "got 'x'"),
    ("dropout", float("nan"), ValueError, "got nan"),
    ("dropout", 1j, ValueError, "got 1j"),
    ("dropout", torch.tensor(0.5), ValueError, r"got tensor\(0.5"),
    ("backend", 3, ValueError, "'auto', 'persistent', 'torch', got 3"),
    ("backend", X, ValueError, "'auto', 'persistent', 'torch', got tensor"),
    ("cell_dtype", "x", ValueError, "cell_dtype is None .* or torch.float32, got 'x'"),
    ("save", 3, ValueError, "'gates', 'state', 'checkpoint', 'auto', got 3"),
    ("save", X, ValueError, "'gates', 'state', 'checkpoint', 'auto', got tensor"),
    ("save_budget", "x", TypeError, "save_budget should be of type int, got: str"),
    ("return_cell_states", "no", TypeError, r"return_cell_states should be of type bool, got: str \('no'\)"),
    ("return_cell_states", 0, TypeError, "return_cell_states should be of type bool, got: int"),
]
OF_A_CALL = ("training", "return_cell_states")
OF_AN_LSTM = ("cell_dtype", "return_cell_states")


def weights_of(cell, **options):
    return [w.detach() for w in LAYERS[cell](INPUT, HIDDEN, **options).parameters()]


def flags(left_out=()):
    """(cell, name, value, exception, message)."""
    return [
        pytest.param(cell, *row, id=f"{cell}-{row[0]}={str(row[1])[:9]!r}")
        for cell in LAYERS
        for row in FLAGS
        if row[0] not in left_out and (cell == "lstm" or row[0] not in OF_AN_LSTM)
    ]


@backends
@pytest.mark.parametrize(("cell", "name", "value", "exception", "message"), flags())
def test_functions_check_their_flags(cell, name, value, exception, message, backend):
    options = {"backend": backend, name: value}
    with pytest.raises(exception, match=message):
        getattr(persistrnn.functional, cell)(X, weights_of(cell), **options)


def refused_by_torch(cell, **options):
    """The type of torch.nn's error; None where it has none."""
    try:
        TORCHS[cell](**{"input_size": INPUT, "hidden_size": HIDDEN} | options)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize(("cell", "name", "value", "exception", "message"), flags(OF_A_CALL))
def test_constructors_check_the_same_as_torch_nn(cell, name, value, exception, message):
    with pytest.raises(exception, match=message) as refused:
        LAYERS[cell](INPUT, HIDDEN, **{name: value})
    if name in ("num_layers", "bias", "batch_first", "dropout") and not isinstance(value, complex):
        assert refused_by_torch(cell, **{name: value}) in (refused.type, None)


@backends
@pytest.mark.parametrize(("cell", "name", "value", "exception", "message"), flags(["return_cell_states"]))
def test_a_changed_module_checks_the_same(cell, name, value, exception, message, backend):
    layer = LAYERS[cell](INPUT, HIDDEN, backend=backend)
    setattr(layer, name, value)
    for call in (lambda: layer(X), lambda: layer.step(X[0]), lambda: persistrnn.explain(layer, BATCH, STEPS)):
        with pytest.raises(exception, match=message):
            call()


def test_an_lstm_checks_return_cell_states():
    with pytest.raises(TypeError, match=r"return_cell_states should be of type bool, got: str \('yes'\)"):
        persistrnn.LSTM(INPUT, HIDDEN)(X, return_cell_states="yes")


@cells
@pytest.mark.parametrize(
    "weights", [None, 3, "weights", torch.zeros(4, 6), {}, iter(())], ids=lambda w: type(w).__name__
)
def test_weights_are_a_list_or_tuple(cell, weights):
    message = rf"weights is a list or tuple .* got {type(weights).__name__}.*give list\(layer.parameters\(\)\)"
    with pytest.raises(TypeError, match=message):
        getattr(persistrnn.functional, cell)(X, weights)
    for kind in (list, tuple, nn.ParameterList):
        getattr(persistrnn.functional, cell)(X, kind(weights_of(cell)))


# ---- attributes and weights of a module, changed since it was made -------------------------------------------------

CHANGES = [
    # (constructor's options, attribute, value, what the error names)
    ({}, "num_layers", 2, "has no weight_ih_l1, weight_hh_l1, bias_ih_l1, bias_hh_l1, and num_layers=2"),
    ({}, "bidirectional", True, "has no weight_ih_l0_reverse"),
    ({"bias": False}, "bias", True, "has no bias_ih_l0, bias_hh_l0"),
    ({"num_layers": 2}, "num_layers", 1, "has weight_ih_l1, and num_layers=1.* leave it out"),
    ({"bidirectional": True}, "bidirectional", False, "has weight_ih_l0_reverse, and .*bidirectional=False"),
    ({}, "bias", False, "has bias_ih_l0, and .*bias=False"),
    ({}, "hidden_size", 7, "hidden_size of the layer is 7, and its weights are those of hidden_size=6; set it back"),
    ({}, "hidden_size", 3, "hidden_size of the layer is 3, .* hidden_size=6"),
    ({}, "input_size", 5, "input_size of the layer is 5, .* input_size=4"),
    ({"proj_size": 2}, "proj_size", 0, "has weight_hr_l0, and .*proj_size=0"),
    ({"proj_size": 2}, "proj_size", 3, "proj_size of the layer is 3, .* proj_size=2"),
]


def changes():
    return [pytest.param(cell, *row) for cell in LAYERS for row in CHANGES if cell == "lstm" or row[1] != "proj_size"]


def failure(layer):
    with pytest.raises(RuntimeError) as told:
        layer(X)
    return str(told.value)


@backends
@pytest.mark.parametrize(("cell", "options", "name", "value", "message"), changes())
def test_a_size_that_is_not_the_weights_is_refused_as_torch_nn_does(cell, options, name, value, message, backend):
    ours, theirs = LAYERS[cell](INPUT, HIDDEN, backend=backend, **options), TORCHS[cell](INPUT, HIDDEN, **options)
    for layer in (ours, theirs):
        setattr(layer, name, value)
    assert re.search(message, failure(ours))
    if cell == "gru":  # torch.nn.LSTM runs on oneDNN with what it finds, some of these changes to no effect
        failure(theirs)
    with pytest.raises(RuntimeError, match=message):
        persistrnn.explain(ours, BATCH, STEPS)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_layer_left_out_is_seen_below_a_parametrization(wrap):
    layer = wrap(persistrnn.GRU(INPUT, HIDDEN, 2), "weight_ih_l1")
    layer(X)
    layer.num_layers = 1
    assert "has weight_ih_l1" in failure(layer)


@cells
def test_weights_and_attributes_may_change_together(cell):
    layer, other = LAYERS[cell](INPUT, HIDDEN), LAYERS[cell](INPUT, 3)
    for name, parameter in other.named_parameters():
        setattr(layer, name, parameter)
    layer.hidden_size = 3
    assert torch.equal(layer(X)[0], other(X)[0])


@backends
@cells
@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1"])
def test_a_missing_weight_is_named(cell, name, backend):
    layer = LAYERS[cell](INPUT, HIDDEN, num_layers=2, backend=backend)
    setattr(layer, name, None)
    with pytest.raises(TypeError, match=f"weights are tensors, got NoneType as {name}"):
        layer(X)
    delattr(layer, name)
    assert f"the layer has no {name}, and num_layers=2" in failure(layer)
    for error in (RuntimeError, AttributeError):
        with pytest.raises(error, match=f"the layer has no {name}, and num_layers=2"):
            persistrnn.Streaming(layer)(X)
    with pytest.raises(RuntimeError, match=f"the layer has no {name}, and num_layers=2"):
        _ = layer.all_weights  # of an AttributeError in a property, Module.__getattr__ would hide what it says


@pytest.mark.parametrize("value", [0, -1, "x", 2.0, True, X, None], ids=str)
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "proj_size"])
def test_sizes_of_a_wrong_kind_are_refused_by_constructor_and_call(name, value):
    if name == "proj_size" and isinstance(value, int) and value == 0:
        return
    with pytest.raises((TypeError, ValueError), match=name) as at_first:
        persistrnn.LSTM(**{"input_size": INPUT, "hidden_size": HIDDEN, name: value})
    if not isinstance(value, torch.Tensor):
        assert refused_by_torch("lstm", **{name: value}) in (at_first.type, None)
    layer = persistrnn.LSTM(INPUT, HIDDEN)
    setattr(layer, name, value)
    with pytest.raises(at_first.type, match=name):
        layer(X)


@pytest.mark.parametrize("value", [3, "x", None])
def test_detach_of_a_stream_is_a_bool(value):
    with pytest.raises(TypeError, match="detach should be of type bool, got: "):
        persistrnn.Streaming(persistrnn.GRU(INPUT, HIDDEN), detach=value)
    stream = persistrnn.Streaming(persistrnn.GRU(INPUT, HIDDEN))
    stream.detach = value
    with pytest.raises(TypeError, match="detach should be of type bool, got: "):
        stream(X)


@pytest.mark.parametrize(
    ("name", "by_property"),
    [
        ("num_layers", ["options", "all_weights", "_all_weights", "_flat_weights"]),
        ("bidirectional", ["options", "all_weights", "_all_weights", "_flat_weights_names"]),
        ("dropout", ["options"]),
        ("training", ["options"]),
        ("nonlinearity", ["cell", "mode", "all_weights"]),
    ],
)
def test_a_deleted_attribute_is_named(name, by_property):
    """And not the property that reads it: by a call as by torch.nn's, by a property as a RuntimeError."""
    layer = persistrnn.RNN(4, 6)
    delattr(layer, name)
    with pytest.raises((AttributeError, RuntimeError), match=f"'RNN' object has no attribute '{name}'"):
        layer(torch.zeros(5, 3, 4))
    for of in by_property:
        with pytest.raises(RuntimeError, match=f"'RNN' object has no attribute '{name}'"):
            getattr(layer, of)
