"""What libraries read of torch.nn.RNNBase, on our layers as on torch.nn's."""

import copy

import pytest
import torch
from pairs import ON_KERNELS, PAIRS, as_hx, make_layer, pair, states
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import persistrnn

INPUT, HIDDEN, STEPS, BATCH = 3, 4, 3, 2


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("cell", PAIRS)
def test_flat_weights_are_torchs_names_and_our_parameters(cell, options):
    ours, theirs = pair(cell, INPUT, HIDDEN, **options)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours.mode == theirs.mode
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in ours.parameters()]
    assert [id(w) for weights in ours.all_weights for w in weights] == [id(w) for w in ours._flat_weights]
    with torch.no_grad():
        double = [nn.Parameter(2 * w) for w in ours._flat_weights]
    ours._flat_weights = double
    assert all(p is w for p, w in zip(ours.parameters(), double, strict=True))
    with pytest.raises(ValueError, match="shorter"):
        ours._flat_weights = double[:-1]


# torch's own deprecation of the older of the two forms:
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["torch", ON_KERNELS])
@pytest.mark.parametrize(
    ("cell", "name"), [("lstm", "weight_hh_l0"), ("gru", "weight_ih_l0"), ("lstm", "weight_hr_l0")]
)
def test_weight_norm_of_torch_nn_utils_and_back(cell, name, backend):
    options = {"proj_size": 2} if name == "weight_hr_l0" else {}
    layer, x = make_layer(cell, INPUT, HIDDEN, backend=backend, **options), torch.randn(STEPS, BATCH, INPUT)
    expected, count = layer(x)[0], len(layer._flat_weights)
    nn.utils.weight_norm(layer, name)
    assert sum(isinstance(w, nn.Parameter) for w in layer._flat_weights) == count - 1
    y = layer(x)[0]
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.get_parameter(f"{name}_g").grad.any()
    nn.utils.remove_weight_norm(layer, name)
    assert sum(isinstance(w, nn.Parameter) for w in layer._flat_weights) == count
    assert name in dict(layer.named_parameters())
    assert layer.last_path == backend


def test_a_deleted_weight_is_none_and_moves_and_comes_back():
    layer, x = make_layer("lstm", INPUT, HIDDEN), torch.randn(STEPS, BATCH, INPUT)
    expected, weight = layer(x)[0], layer.weight_hh_l0
    del layer.weight_hh_l0
    assert not hasattr(layer, "weight_hh_l0")
    assert layer._flat_weights[1] is None
    copy.deepcopy(layer).double()
    layer.flatten_parameters()
    layer.weight_hh_l0 = weight
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}, {"proj_size": 2}])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_checks_by_name_are_torchs(cell, options):
    if cell == "gru":
        options = {name: value for name, value in options.items() if name != "proj_size"}
    ours, theirs = pair(cell, INPUT, HIDDEN, **options)
    x = torch.randn(2, 3, INPUT)
    size = theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_hidden_size(x, None) == size
    given = states(cell, *size)
    if cell == "lstm":
        given[1] = torch.randn(theirs.get_expected_cell_size(x, None))
        assert ours.get_expected_cell_size(x, None) == given[1].shape
    hx = as_hx(given)
    ours.check_forward_args(x, hx, None)
    order = torch.arange(size[1]).flip(0)
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx
    packed = pack_padded_sequence(torch.randn(3, 2, INPUT), [3, 1])
    assert ours.get_expected_hidden_size(*packed[:2]) == theirs.get_expected_hidden_size(*packed[:2])
    bad = [
        (x[0], hx, None), (x[..., 1:], hx, None), (x.double(), hx, None), (x, as_hx(s[:, 1:] for s in given), None),
        (x, hx, torch.tensor([2, 1])),
    ]  # fmt: skip
    for arguments in bad:
        messages = []
        for layer in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError)) as found:
                layer.check_forward_args(*arguments)
            messages.append((found.type, str(found.value).split(".")[0]))
        assert messages[0][0] is messages[1][0]
        assert messages[0][1].split("),")[0].split(" (torch")[0] == messages[1][1].split("),")[0].split(" (torch")[0]


@pytest.mark.parametrize("cell", PAIRS)
def test_without_a_training_flag_it_is_the_flag_that_is_missed(cell):
    """As torch.nn's say, and not some property of ours."""
    layer = make_layer(cell, INPUT, HIDDEN)
    del layer.training
    with pytest.raises(AttributeError, match="has no attribute 'training'"):
        layer(torch.randn(STEPS, BATCH, INPUT))


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_the_text_that_says_where_projections_are_is_torchs(name):
    messages = []
    for namespace in (nn, persistrnn):
        with pytest.raises(ValueError, match="proj_size") as found:
            getattr(namespace, name)(INPUT, HIDDEN, proj_size=2)
        messages.append(str(found.value))
    assert messages[1].startswith(messages[0])


def test_qconfig_comes_and_goes():
    layer = persistrnn.GRU(INPUT, HIDDEN)
    assert not hasattr(layer, "qconfig")
    with pytest.warns(UserWarning, match="torch.ao.quantization goes by type"):
        layer.qconfig = None
    assert hasattr(copy.deepcopy(layer), "qconfig")
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


@pytest.mark.parametrize("make", [persistrnn.LSTM, lambda *sizes: persistrnn.Stacked([persistrnn.LSTM(*sizes)])])
def test_states_that_are_no_tuple_are_refused_as_by_torch_nn(make):
    states = torch.zeros(2, 1, BATCH, HIDDEN)
    for layer in (make(INPUT, HIDDEN), nn.LSTM(INPUT, HIDDEN)):
        with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
            layer(torch.randn(STEPS, BATCH, INPUT), *states)
