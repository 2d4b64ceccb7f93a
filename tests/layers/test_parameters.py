"""Parameters that are not plain: parametrized, tied, frozen, with odd strides, or views of a buffer of the caller's."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from pairs import PAIRS, PATHS, as_hx, assert_close, make_layer, tensors
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from persistrnn import functional

FUNCTIONS = {"lstm": functional.lstm, "gru": functional.gru}
STEPS, BATCH, INPUT, HIDDEN = 2, 2, 4, 6


def make(cell, backend="torch", **options):
    return make_layer(cell, INPUT, HIDDEN, backend=backend, **options)


def plain_of(layer, **options):
    """torch.nn's with the same weights."""
    plain = PAIRS[layer.mode.lower()][1](INPUT, HIDDEN, **options)
    plain.load_state_dict(layer.state_dict())
    return plain


def run(layer, x, hx=None):
    """(outputs, a loss that every output is in)."""
    outputs = tensors(layer(x, hx))
    return outputs, sum((k + 1) * t.sin().sum() for k, t in enumerate(outputs))


# --- parametrizations -------------------------------------------------------------------------------------------


class Decayed(nn.Module):
    """Of the user's own: units that are far apart know little of each other."""

    def forward(self, weight):
        unit = torch.arange(HIDDEN)
        distance = (unit[:, None] - unit).abs().repeat(weight.size(0) // HIDDEN, 1)
        return weight * 0.8**distance

    def right_inverse(self, weight):
        return weight


class WeightDrop(nn.Module):
    """Merity et al. 2018: dropout on the recurrent weights, one mask for all steps of a call."""

    def forward(self, weight):
        return F.dropout(weight, 0.5, self.training)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": lambda layer, name: parametrize.register_parametrization(layer, name, Decayed()),
    "weight_drop": lambda layer, name: parametrize.register_parametrization(layer, name, WeightDrop()),
}
KINDS = [("lstm", "weight_norm"), ("gru", "spectral_norm"), ("gru", "custom"), ("lstm", "weight_drop")]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("cell", "kind"), KINDS)
def test_parametrized_layer_has_the_gradients_of_the_weights_it_makes(cell, kind, backend):
    """torch.nn's layer with the made weights as plain parameters gives the outputs and, through the parametrization,
    the gradients."""
    layer = make(cell, backend, num_layers=2)
    plain = PAIRS[cell][1](INPUT, HIDDEN, num_layers=2)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        PARAMETRIZATIONS[kind](layer, name)
    twin = copy.deepcopy(layer)  # some parametrizations have a state
    x = torch.randn(STEPS, BATCH, INPUT)

    torch.manual_seed(1)
    outputs, loss = run(layer, x)
    loss.backward()
    assert layer.last_path == backend

    torch.manual_seed(1)
    made = dict(zip(dict(plain.named_parameters()), itertools.chain(*twin.all_weights), strict=True))
    plain.load_state_dict(made)
    expected, loss = run(plain, x)
    loss.backward()
    torch.autograd.backward(list(made.values()), [p.grad for p in plain.parameters()])
    assert_close(outputs, expected)
    for (name, actual), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert actual.grad.any(), name
        assert_close(actual.grad, other.grad)


# --- tied and frozen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PATHS)
def test_tied_layers_get_the_sum_of_their_gradients(backend):
    """Two modules share a Parameter, and so do the two layers of one of them."""
    model = nn.ModuleList([make("lstm", backend, num_layers=2), make("lstm", backend)])
    untied = copy.deepcopy(model)
    shared = model[0].weight_hh_l0
    model[0].weight_hh_l1 = model[1].weight_hh_l0 = shared
    assert sum(p is shared for p in model.parameters()) == 1
    copies = [untied[0].weight_hh_l0, untied[0].weight_hh_l1, untied[1].weight_hh_l0]
    with torch.no_grad():
        for weight in copies:
            weight.copy_(shared)
    x = torch.randn(STEPS, BATCH, INPUT)
    for layers in (model, untied):
        sum(run(layer, x)[1] for layer in layers).backward()
    assert_close(shared.grad, sum(weight.grad for weight in copies))
    assert_close(model[0].weight_ih_l1.grad, untied[0].weight_ih_l1.grad)

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model[0].weight_hh_l0 is model[0].weight_hh_l1 is model[1].weight_hh_l0
    torch.testing.assert_close(shared, copies[0] - 0.1 * shared.grad)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("cell", "frozen", "options"),
    [
        ("lstm", "weight_ih", {}),
        ("gru", "weight_hh", {}),
        ("lstm", "bias", {"bidirectional": True}),
        ("gru", "reverse", {"bidirectional": True}),
        ("gru", "l0", {"num_layers": 2}),
        ("lstm", "l1", {"num_layers": 2}),
    ],
)
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(cell, frozen, options, backend):
    layer = make(cell, backend, **options)
    x = torch.randn(STEPS, BATCH, INPUT)
    plain = plain_of(layer, **options)
    run(plain, x)[1].backward()
    chosen = [name for name, _ in layer.named_parameters() if frozen in name]
    assert 0 < len(chosen) < len(list(layer.parameters()))
    for name in chosen:
        getattr(layer, name).requires_grad_(False)
    run(layer, x)[1].backward()
    for name, parameter in layer.named_parameters():
        if name in chosen:
            assert parameter.grad is None, name
        else:
            assert_close(parameter.grad, plain.get_parameter(name).grad)


# --- strides ----------------------------------------------------------------------------------------------------


# How a leaf is made from a contiguous tensor, and the tensor's shape from the leaf.
LAYOUTS = {
    "transposed": (
        lambda t: t.movedim(0, -1).clone(memory_format=torch.contiguous_format),
        lambda leaf, shape: leaf.movedim(-1, 0),
    ),
    "every second": (lambda t: torch.stack([t, t], -1), lambda leaf, shape: leaf[..., 0]),
    "expanded": (lambda t: t[:1].clone(), lambda leaf, shape: leaf.expand(shape)),
}


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("cell", "layout"), [("lstm", "transposed"), ("gru", "every second"), ("lstm", "expanded"), ("gru", "expanded")]
)
def test_any_strides_give_torch_nn_values_and_gradients(cell, layout, backend):
    """Of input, states and weights; torch.nn's layer has contiguous copies."""
    torch.manual_seed(0)
    plain = PAIRS[cell][1](INPUT, HIDDEN, bidirectional=True)
    states = torch.randn(2 if cell == "lstm" else 1, 2, BATCH, HIDDEN)
    given = [torch.randn(STEPS, BATCH, INPUT), *states, *(p.detach() for p in plain.parameters())]
    make_leaf, view = LAYOUTS[layout]
    leaves = [make_leaf(t).requires_grad_() for t in given]
    tensors = [view(leaf, t.shape) for leaf, t in zip(leaves, given, strict=True)]
    assert not any(t.is_contiguous() for t in tensors if t.dim() > 1)
    copies = [t.detach().contiguous().requires_grad_() for t in tensors]
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), copies[1 + len(states) :], strict=True):
            parameter.copy_(value)

    def split(tensors):
        x, *rest = tensors
        hx, weights = rest[: len(states)], rest[len(states) :]
        return x, as_hx(hx), weights

    x, hx, weights = split(tensors)
    outputs, loss = run(lambda x, hx: FUNCTIONS[cell](x, weights, hx, bidirectional=True, backend=backend), x, hx)
    expected, expected_loss = run(plain, *split(copies)[:2])
    assert_close(outputs, expected)
    inputs = [*copies[: 1 + len(states)], *plain.parameters()]
    assert_close(
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(tensors, leaves, torch.autograd.grad(expected_loss, inputs)),
    )


@pytest.mark.parametrize("backend", PATHS)
def test_parameters_stay_where_they_are(backend):
    """In the caller's order in one buffer, as optimizers and FSDP lay them out: a change of the buffer is a change of
    the layer, before and after a call."""
    layer, plain = make("gru", backend, num_layers=2), make("gru", num_layers=2)
    sizes = [p.numel() for p in layer.parameters()]
    buffer = torch.empty(sum(sizes) + 3)  # nothing in it is aligned
    for name, piece in zip(dict(layer.named_parameters()), buffer[3:].split(sizes), strict=True):
        parameter = layer.get_parameter(name)
        setattr(layer, name, nn.Parameter(piece.view_as(parameter).copy_(parameter.detach())))
    addresses = [p.data_ptr() for p in layer.parameters()]
    x = torch.randn(STEPS, BATCH, INPUT)
    for factor in (1.0, 0.5):
        buffer.mul_(factor)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(factor)
        (outputs, loss), (expected, expected_loss) = run(layer, x), run(plain, x)
        assert_close(outputs, expected)
        assert_close(
            torch.autograd.grad(loss, list(layer.parameters())),
            torch.autograd.grad(expected_loss, list(plain.parameters())),
        )
    assert [p.data_ptr() for p in layer.parameters()] == addresses


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "bidirectional": True}], ids=["plain", "projected"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_gradients_are_contiguous(options, backend):
    """As torch.nn's, whose users view them."""
    layer = make_layer("lstm", 3, 4, backend=backend, **options)
    y, state = layer(torch.randn(3, 2, 3, requires_grad=True))
    found = torch.autograd.grad(sum(t.sin().sum() for t in (y, *state)), list(layer.parameters()))
    assert all(g.is_contiguous() for g in found)
