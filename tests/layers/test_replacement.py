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
    """And an optimizer that was made before trains it."""
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, keys, random = model(X), list(model.state_dict()), torch.get_rng_state()
    before = {name: id(p) for name, p in model.named_parameters()}
    found = persistrnn.replace(model)
    assert found.model is model
    assert set(found.swapped) == {"encoder", "rest.a.0"}
    assert found.left == {}
    assert type(model.encoder) is persistrnn.LSTM
    assert type(model.rest["a"][0]) is persistrnn.GRU
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(model(X), expected)
    assert torch.equal(torch.get_rng_state(), random)
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


def test_restore_undoes_replace():
    """And an optimizer, hooks, tied and frozen parameters of before are those of after."""
    model = Tagger().eval()
    model.encoder.weight_hh_l1 = model.encoder.weight_hh_l0
    model.rest["a"][0].weight_ih_l0.requires_grad_(False)
    seen = []
    handle = model.encoder.register_forward_hook(lambda module, given, result: seen.append(type(module)))
    before, expected = dict(model.named_parameters(remove_duplicate=False)), model(X)
    persistrnn.replace(model)
    found = persistrnn.restore(model)
    assert set(found.swapped) == {"encoder", "rest.a.0"}
    assert not found.left
    assert not found.lost
    assert type(model.encoder) is nn.LSTM
    assert type(model.rest["a"][0]) is nn.GRU
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(model(X), expected)
    assert not model.encoder.training
    assert seen == [nn.LSTM, nn.LSTM]
    handle.remove()
    model(X)
    assert len(seen) == 2
    assert type(persistrnn.replace(model).model.encoder) is persistrnn.LSTM


@pytest.mark.parametrize("cell", PAIRS)
def test_restore_of_the_model_itself_and_of_one_layer_in_two_places(cell):
    layer = PAIRS[cell][0](7, 7, backend="torch")
    found = persistrnn.restore(layer).model
    assert type(found) is getattr(nn, {"lstm": "LSTM", "gru": "GRU"}.get(cell, "RNN"))
    assert torch.equal(found(X)[0], layer(X)[0])
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    assert len(persistrnn.restore(model).swapped) == 1
    assert model[0] is model[1][0]


class MyGRU(persistrnn.GRU):
    pass


def dropped():
    """Weight drop as it was written before there were parametrizations."""
    layer = persistrnn.LSTM(7, 8)
    raw = layer.weight_hh_l0
    del layer.weight_hh_l0
    layer.weight_hh_l0_raw, layer.weight_hh_l0 = raw, raw * 0.5
    return layer


def ours_patched():
    layer = persistrnn.GRU(7, 8)
    layer.forward = lambda x: (x, None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MyGRU(7, 8), "only persistrnn.LSTM, persistrnn.GRU, persistrnn.RNN themselves are swapped"),
        (lambda: persistrnn.MGU(7, 8), "torch.nn has GRU, LSTM, RNN, and no layer of this MGU's cell"),
        (lambda: persistrnn.GRU(7, 8, heads=2), "torch.nn has no heads"),
        (lambda: nn.utils.parametrizations.weight_norm(persistrnn.GRU(7, 8), "weight_hh_l0"), "a parametrized GRU"),
        (dropped, "its parameters are not those of LSTM (by weight_hh_l0, weight_hh_l0_raw)"),
        (ours_patched, "it has a forward of its own"),
    ],
    ids=["subclass", "cell", "heads", "parametrized", "weight drop", "forward"],
)
def test_what_restore_leaves_has_a_reason(make, reason):
    model = nn.ModuleDict({"layer": make(), "other": persistrnn.GRU(7, 8)})
    layer = model["layer"]
    found = persistrnn.restore(model)
    assert model["layer"] is layer
    assert list(found.swapped) == ["other"]
    assert reason in found.left["layer"]


@pytest.mark.parametrize("hold", [lambda layer: persistrnn.Stacked([layer]), persistrnn.Streaming])
def test_restore_leaves_the_layers_of_what_takes_ours_alone(hold):
    model = nn.ModuleDict({"held": hold(persistrnn.GRU(7, 8)), "other": persistrnn.GRU(7, 8)})
    found = persistrnn.restore(model)
    assert list(found.swapped) == ["other"]
    ((_, reason),) = found.left.items()
    assert reason == f"a {type(model['held']).__name__} takes layers of persistrnn alone"
    model["held"](X)


def test_what_is_lost_is_said():
    layer = persistrnn.LSTM(7, 8, save="state", cell_dtype=torch.float32, backend="persistent")
    found = persistrnn.restore(nn.Sequential(layer))
    assert found.lost == {"0": "save='state', cell_dtype=torch.float32, backend=\"persistent\""}
    assert "  0 lost: save='state'" in str(found)


@pytest.mark.parametrize("hold", [lambda layer: layer, lambda layer: [layer], lambda layer: {"a": layer}])
def test_who_still_holds_the_old_layer_is_said(hold):
    """Outside of the model's modules: in a plain list, say, so that its parameters are not counted twice."""
    model = nn.ModuleDict({"rnn": nn.GRU(7, 8), "head": nn.Linear(8, 2)})
    object.__setattr__(model["head"], "shortcut", hold(model["rnn"]))
    found = persistrnn.replace(model)
    assert found.lost == {"rnn": "head.shortcut still holds the old layer; set it anew"}


def test_bad_arguments_of_restore():
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, got list"):
        persistrnn.restore([persistrnn.LSTM(7, 8)])


# --- tools that go by type --------------------------------------------------------------------------------------


# Of torch, which deprecates torch.ao.quantization and calls its own deprecated storage:
def of_quantization(test):
    ignore = pytest.mark.filterwarnings
    return ignore("ignore:torch.ao.quantization is deprecated:DeprecationWarning")(
        ignore("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")(test)
    )


@of_quantization
@pytest.mark.parametrize(
    "spec", [None, {nn.LSTM, nn.GRU}, {"rnn"}, {"all"}], ids=["default", "types", "name", "parent"]
)
@pytest.mark.parametrize(("cell", "dtype"), [("lstm", torch.qint8), ("gru", torch.qint8), ("lstm", torch.float16)])
def test_dynamic_quantization_makes_of_our_layers_what_it_makes_of_torchs(cell, dtype, spec):
    from torch.ao.quantization import quantize_dynamic

    inner = nn.ModuleDict({"rnn": PAIRS[cell][1](7, 8, 2, bidirectional=True)}).eval()
    inner["rnn"].register_forward_hook(lambda module, given, result: (result[0] + 1, result[1]))
    model = inner if spec == {"rnn"} else nn.ModuleDict({"all": inner})
    expected = quantize_dynamic(model, spec, dtype=dtype)
    persistrnn.replace(model)
    small = quantize_dynamic(model, spec, dtype=dtype)
    found, theirs = (m["rnn"] if spec == {"rnn"} else m["all"]["rnn"] for m in (small, expected))
    assert type(found) is type(theirs)
    assert not list(small.parameters())
    assert torch.equal(found(X)[0], theirs(X)[0])
    assert type(inner["rnn"]) is PAIRS[cell][0]
    assert not hasattr(inner["rnn"], "qconfig")


def in_a_stack():
    return persistrnn.Stacked([persistrnn.GRU(7, 8)])


@of_quantization
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("make", "spec", "mapping", "reason"),
    [
        (lambda: persistrnn.MGU(7, 8), {"rnn"}, None, "torch.nn has no equal of a MGU"),
        (lambda: persistrnn.GRU(7, 8, heads=2), {nn.GRU}, None, "torch.nn has no heads"),
        (lambda: MyGRU(7, 8), {nn.GRU}, None, "takes no subclasses"),
        (lambda: persistrnn.LSTM(7, 8, proj_size=2), {nn.LSTM}, None, "has no projections"),
        (lambda: persistrnn.RNN(7, 8), {nn.RNN}, None, "nothing for a torch.nn.RNN"),
        (lambda: persistrnn.GRU(7, 8), {nn.GRU}, {nn.GRU: None}, "the mapping given to quantize_dynamic has no GRU"),
        (in_a_stack, {nn.GRU}, None, "held by a module of persistrnn"),
    ],
    ids=["cell", "heads", "subclass", "projections", "no type of its", "mapping", "stack"],
)
def test_dynamic_quantization_says_what_it_leaves(make, spec, mapping, reason):
    from torch.ao.quantization import quantize_dynamic

    model = nn.ModuleDict({"rnn": make()}).eval()
    with pytest.warns(UserWarning, match=f"{reason}.*; this persistrnn.* stays as it is"):
        small = quantize_dynamic(model, spec, mapping=mapping)
    assert type(small["rnn"]) is type(model["rnn"])
    expected, found = (m["rnn"](X)[0] for m in (model, small))
    assert torch.equal(found, expected)


@of_quantization
def test_quantization_says_nothing_where_nothing_was_asked_and_warns_where_it_goes_by_type():
    from torch.ao.quantization import prepare, quantize_dynamic

    model = nn.ModuleDict({"rnn": persistrnn.GRU(7, 8), "head": nn.Linear(8, 2)}).eval()
    assert list(quantize_dynamic(model, {nn.Linear})["rnn"].parameters())
    model.qconfig = torch.ao.quantization.default_qconfig
    with pytest.warns(UserWarning, match=r"goes by type; this persistrnn.GRU stays as it is, .*persistrnn.restore"):
        prepare(model)


@pytest.mark.parametrize("cell", PAIRS)
def test_pruning_takes_our_layers_as_they_are(cell):
    from torch.nn.utils import prune

    ours, theirs = PAIRS[cell][0](7, 8), PAIRS[cell][1](7, 8)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    assert torch.equal(ours(X)[0], theirs(X)[0])
    assert "weight_hh_l0_orig" in dict(ours.named_parameters())
    prune.remove(ours, "weight_hh_l0")
    assert (ours.weight_hh_l0 == 0).float().mean() == 0.5
    assert torch.equal(persistrnn.restore(ours).model(X)[0], ours(X)[0])
