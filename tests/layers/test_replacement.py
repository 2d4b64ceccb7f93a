"""`persistrnn.replace` and `to_torch`: the same parameters, results and hooks, and a reason for what is left."""

import warnings

import pytest
import torch
from pairs import PAIRS
from torch import nn

import persistrnn

X = torch.randn(5, 3, 7)


class Tagger(nn.Module):
    """Layers in every place that a model may have for them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(7, 8, 2, bidirectional=True)
        self.decoder = nn.Sequential(nn.Linear(16, 6), nn.ReLU())
        self.rest = nn.ModuleDict({"a": nn.ModuleList([nn.GRU(6, 4, bias=False)])})

    def forward(self, x):
        return self.rest["a"][0](self.decoder(self.encoder(x)[0]))[0]


def test_every_layer_is_swapped_and_computes_the_same():
    model = Tagger()
    expected, keys, random = model(X), list(model.state_dict()), torch.get_rng_state()
    found = persistrnn.replace(model)
    assert found.model is model
    assert set(found.swapped) == {"encoder", "rest.a.0"}
    assert found.left == {}
    assert type(model.encoder) is persistrnn.LSTM
    assert type(model.rest["a"][0]) is persistrnn.GRU
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)
    assert torch.equal(torch.get_rng_state(), random)


def test_optimizer_made_before_the_swap_trains_the_new_layers():
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: id(p) for name, p in model.named_parameters()}
    persistrnn.replace(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    assert model(X).square().mean() < loss


@pytest.mark.parametrize("cell", PAIRS)
def test_the_model_itself(cell):
    layer = PAIRS[cell][1](7, 8, batch_first=True)
    found = persistrnn.replace(layer, backend="torch")
    assert found.model is found.swapped[""]
    assert found.model.backend == "torch"
    assert torch.equal(found.model(X)[0], layer(X)[0])
    assert not isinstance(found.model, nn.RNNBase)


def test_options_survive():
    old = nn.LSTM(7, 8, 2, bias=False, batch_first=True, dropout=0.25, bidirectional=True, proj_size=3).eval().double()
    old.weight_hh_l0.requires_grad_(False)
    old.note = "mine"
    new = persistrnn.replace(old).model
    sizes = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"
    for name in sizes.split():
        assert getattr(new, name) == getattr(old, name), name
    assert not new.training
    assert new.weight_ih_l0.dtype == torch.float64
    assert not new.weight_hh_l0.requires_grad
    assert new.note == "mine"
    assert torch.equal(new(X.double())[0], old(X.double())[0])


def test_a_layer_in_two_places_is_swapped_once():
    shared = nn.GRU(7, 7)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    found = persistrnn.replace(model)
    assert model[0] is model[1][0]
    assert len(found.swapped) == 1


def test_hooks_still_fire_and_still_come_off():
    model = nn.Sequential(nn.LSTM(7, 8))
    seen = []
    handles = [
        model[0].register_forward_hook(lambda module, given, result: seen.append(("after", type(module)))),
        model[0].register_forward_pre_hook(lambda module, given: seen.append(("before", type(module)))),
        model[0].register_full_backward_hook(lambda module, grads, outer: seen.append(("backward", type(module)))),
    ]
    persistrnn.replace(model)
    x = X.clone().requires_grad_()
    model(x)[0].sum().backward()
    assert seen == [(when, persistrnn.LSTM) for when in ("before", "after", "backward")]
    for handle in handles:
        handle.remove()
    model(x)[0].sum().backward()
    assert len(seen) == 3


def test_dropout_without_effect_is_not_warned_of_again():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.LSTM(7, 8, dropout=0.5)
    assert persistrnn.replace(layer).model.dropout == 0.5


class Mine(nn.LSTM):
    pass


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.LSTM(7, 8), "weight_hh_l0")


def patched():
    layer = nn.GRU(7, 8)
    layer.forward = lambda x: (x, None)
    return layer


def extended():
    layer = nn.GRU(7, 8)
    layer.register_buffer("scale", torch.ones(1))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mine(7, 8), r"it is a .*Mine; only torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN themselves are swapped"),
        (parametrized, r"it is parametrized; swap before you parametrize"),
        (patched, r"it has a forward of its own, set on the instance"),
        (extended, r"its parameters are not those of GRU \(by scale\)"),
    ],
    ids=["subclass", "parametrized", "forward", "buffer"],
)
def test_what_is_left_has_a_reason(make, reason):
    model = nn.ModuleDict({"layer": make(), "other": nn.GRU(7, 8)})
    layer = model["layer"]
    found = persistrnn.replace(model)
    assert model["layer"] is layer
    assert list(found.swapped) == ["other"]
    assert list(found.left) == ["layer"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.left["layer"])
    assert "1 swapped, 1 left" in str(found)
    assert "layer left: it" in str(found)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, got list"):
        persistrnn.replace([nn.LSTM(7, 8)])
    with pytest.raises(ValueError, match=r"backend is one of 'auto', 'persistent', 'torch', got 'cuda'"):
        persistrnn.replace(nn.LSTM(7, 8), backend="cuda")


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]
)
@pytest.mark.parametrize("cls", [persistrnn.LSTM, persistrnn.GRU])
def test_to_torch_is_torchs_layer_with_the_same_parameters(cls, options):
    ours = cls(7, 8, **options).eval()
    theirs = ours.to_torch()
    assert type(theirs) is getattr(nn, cls.__name__)
    assert [id(p) for p in theirs.parameters()] == [id(p) for p in ours.parameters()]
    assert torch.equal(theirs(X)[0], ours(X)[0])
    assert not theirs.training
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    assert torch.equal(theirs(X)[0], ours(X)[0]), "what it multiplies is the parameter, not a copy"
    assert not {"backend", "last_path"} & vars(theirs).keys()


def test_to_torch_refuses_what_torch_has_not():
    layer = nn.utils.parametrizations.weight_norm(persistrnn.GRU(7, 8), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"a parametrized GRU has no equal in torch.nn; .*remove_parametrizations"):
        layer.to_torch()
