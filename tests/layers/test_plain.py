"""The call that goes the short way: torch.nn's numbers, and nothing is missed that the whole way would see."""

import copy
import gc
import pickle

import pytest
import torch
from pairs import make_layer
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, weight_norm

import persistrnn
from persistrnn import plain, recurrent

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
INPUT, H, T, B = 5, 7, 3, 2


@pytest.fixture
def whole(monkeypatch):
    """Requests that went the whole way."""
    seen = []
    run = recurrent.run
    monkeypatch.setattr(recurrent, "run", lambda request: seen.append(request) or run(request))
    return seen


def known(cell="lstm", **options):
    """A layer that has been called."""
    layer = make_layer(cell, INPUT, H, **options)
    layer(torch.randn(T, B, INPUT, dtype=layer.weight_ih_l0.dtype))
    return layer


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("cell", "options"), [("lstm", {"proj_size": 3}), *((cell, options) for cell in CELLS for options in OPTIONS)]
)
def test_numbers_are_torchs(whole, cell, options, given):
    layer = known(cell, dtype=torch.float64, **options)
    theirs = layer.to_torch()
    assert len(whole) == 1
    for rows in (1, 4):  # another batch and length, too
        x = torch.randn(rows, rows, INPUT, dtype=torch.float64)
        hx = [torch.randn_like(s) for s in flat(theirs(x)[1])] if given else None
        hx = hx and (tuple(hx) if len(hx) > 1 else hx[0])
        ours, expected = ([y, *flat(s)] for y, s in (layer(x, hx), theirs(x, hx)))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        of = [torch.autograd.grad([t.sum() for t in found], list(layer.parameters())) for found in (ours, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*of, strict=True))
    assert len(whole) == 1
    assert layer.last_path == "torch"


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


WHOLE_WAY = {
    "another dropout": lambda m: setattr(m, "dropout", 0.0 * 2 + 1e-9),
    "another backend": lambda m: setattr(m, "backend", "torch"),
    "another mode": lambda m: m.eval(),
    "a weight of another shape": lambda m: setattr(m.weight_hh_l0, "data", torch.zeros(4 * H, H + 1)),
    "a weight of another dtype": lambda m: setattr(m.bias_hh_l0, "data", torch.zeros(4 * H, dtype=torch.float64)),
    "a weight elsewhere": lambda m: m.to("meta"),
    "a weight less": lambda m: delattr(m, "bias_hh_l0"),
    "a weight of None": lambda m: setattr(m, "bias_hh_l0", None),
    "a weight more": lambda m: setattr(m, "weight_ih_l1", nn.Parameter(torch.zeros(1))),
    "an attribute like a weight": lambda m: setattr(m, "weight_ih_l1", torch.zeros(1)),
    "parametrized": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "a mode deleted": lambda m: delattr(m, "training"),
    "a size that is none": lambda m: setattr(m, "num_layers", True),
    "a flag that is none": lambda m: setattr(m, "bias", 1),
    "another hidden size": lambda m: setattr(m, "hidden_size", H + 1),
    "another recipe": lambda m: setattr(m, "recipe", persistrnn.Recipe(weight_drop=0.5)),
    "another class": lambda m: setattr(m, "__class__", type("Own", (persistrnn.LSTM,), {})),
    "another save": lambda m: setattr(m, "save", "state"),
}


@pytest.mark.parametrize("change", WHOLE_WAY)
def test_a_changed_layer_goes_the_whole_way(change):
    layer, x = known(), torch.randn(T, B, INPUT)
    assert plain.run(layer, x, None) is not None
    WHOLE_WAY[change](layer)
    assert plain.run(layer, x, None) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_the_old_kind():
    layer, x = known(), torch.randn(T, B, INPUT)
    weight_norm(layer, "weight_hh_l0")
    expected = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0_g.mul_(2)
    assert not torch.equal(layer(x)[0], expected)


GIVEN = {
    "unbatched": (torch.randn(T, INPUT), None),
    "no step": (torch.randn(0, B, INPUT), None),
    "no row": (torch.randn(T, 0, INPUT), None),
    "other features": (torch.randn(T, B, INPUT + 1), None),
    "another dtype": (torch.randn(T, B, INPUT).double(), None),
    "sparse": (torch.randn(T, B, INPUT).to_sparse(), None),
    "a subclass": (nn.Parameter(torch.randn(T, B, INPUT)).as_subclass(type("Mine", (torch.Tensor,), {})), None),
    "elsewhere": (torch.randn(T, B, INPUT, device="meta"), None),
    "no tensor": ([1.0], None),
    "packed": (nn.utils.rnn.pack_sequence([torch.randn(T, INPUT)]), None),
    "one state of two": (torch.randn(T, B, INPUT), torch.zeros(1, B, H)),
    "a list": (torch.randn(T, B, INPUT), [torch.zeros(1, B, H)] * 2),
    "another batch": (torch.randn(T, B, INPUT), (torch.zeros(1, B + 1, H),) * 2),
    "states of another dtype": (torch.randn(T, B, INPUT), (torch.zeros(1, B, H), torch.zeros(1, B, H).double())),
    "three states": (torch.randn(T, B, INPUT), (torch.zeros(1, B, H),) * 3),
}


@pytest.mark.parametrize("name", GIVEN)
def test_other_arguments_go_the_whole_way(name):
    x, hx = GIVEN[name]
    layer = known()
    assert plain.run(layer, torch.randn(T, B, INPUT), None) is not None
    assert plain.run(layer, x, hx) is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_input_is_refused():
    layer = known()
    nested = torch.nested.nested_tensor([torch.randn(T, INPUT)])
    assert plain.run(layer, nested, None) is None


@pytest.mark.parametrize(
    ("given", "error"),
    [({"return_cell_states": 1}, TypeError), ({"unknown": None}, TypeError), ({"reset_state": 0}, ValueError)],
)
def test_bad_keywords_are_refused_at_the_second_call_too(given, error):
    layer, x = known(), torch.randn(T, B, INPUT)
    with pytest.raises(error):
        layer(x, **given)


def test_observers_send_it_the_whole_way(whole, monkeypatch):
    layer, x = known(dtype=torch.float32), torch.randn(T, B, INPUT)
    weights = {name: w.detach() for name, w in layer.named_parameters()}

    def loss(weights, x):
        return functional_call(layer, weights, (x,))[0].sum()

    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    grad(loss)(weights, x)
    vmap(loss, (None, 0))(weights, x.expand(2, *x.shape))
    jvp(lambda x: layer(x)[0], (x,), (x,))
    assert len(whole) == 5
    monkeypatch.setattr(torch._C, "_get_tracing_state", lambda: object())  # as within torch.jit.trace
    assert plain.run(layer, x, None) is None


def test_weights_of_the_moment_are_used(whole):
    """In place, through ``data``, by functional_call, by load_state_dict: none is remembered."""
    layer, x = known("gru", dtype=torch.float32), torch.randn(T, B, INPUT)
    theirs, before = layer.to_torch(), layer(x)[0]
    changes = [
        lambda: layer.weight_hh_l0.data.mul_(2),
        lambda: setattr(layer.weight_ih_l0, "data", layer.weight_ih_l0.data + 1),
        lambda: layer.load_state_dict({name: w + 0.1 for name, w in layer.state_dict().items()}),
    ]
    for change in changes:
        change()
        found = layer(x)[0]
        assert torch.equal(found, theirs(x)[0])
        assert not torch.equal(found, before)
        before = found
    other = {name: w.detach() * 0 for name, w in layer.named_parameters()}
    assert not functional_call(layer, other, (x,))[0].any()
    assert len(whole) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_looked_at_anew(copied):
    layer, x = known(), torch.randn(T, B, INPUT)
    other = copied(layer)
    assert vars(other).keys() == vars(layer).keys()
    assert plain.run(other, x, None) is None
    assert torch.equal(other(x)[0], layer(x)[0])


def test_nothing_outlives_its_layer():
    layer = known()
    number = id(layer)
    assert number in plain._known
    del layer
    gc.collect()
    assert number not in plain._known


class Scaled(persistrnn.GRU):
    scale = 1.0

    @property
    def all_weights(self):
        return [[weight * self.scale for weight in weights] for weights in super().all_weights]


class Begun(persistrnn.GRU):
    scale = 1.0

    def initial_states(self):
        return [torch.full((1, H), self.scale)]


class Unbiased(persistrnn.GRU):
    scale = 1.0

    @property
    def bias(self):
        return self.scale == 1.0

    @bias.setter
    def bias(self, value):
        pass


class Masked(persistrnn.GRU):
    """Which gives the parameter itself at first."""

    scale = 1.0

    def __getattribute__(self, name):
        found = super().__getattribute__("_parameters") if name == "weight_hh_l0" else {}
        return found[name] * self.scale if found and self.scale != 1.0 else super().__getattribute__(name)


class Chosen(persistrnn.GRU):
    scale = 1.0

    @property
    def options(self):
        return super().options._replace(backend="auto" if self.scale == 1.0 else "none")


@pytest.mark.parametrize("kind", [Scaled, Begun, Unbiased, Masked, Chosen])
def test_what_a_subclass_says_is_asked_at_every_call(kind):
    layer, x = kind(INPUT, H), torch.randn(T, B, INPUT)
    before = layer(x)[0]
    assert torch.equal(layer(x)[0], before)
    layer.scale = 0.0
    if kind in (Unbiased, Chosen):  # which are wrong then
        with pytest.raises((RuntimeError, ValueError), match=r"leave it out|backend"):
            layer(x)
    else:
        assert not torch.equal(layer(x)[0], before)


def test_a_subclass_with_a_forward_of_its_own_goes_the_short_way(whole):
    class Doubled(persistrnn.GRU):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    layer = Doubled(INPUT, H)
    for _ in range(2):
        layer(torch.randn(T, B, INPUT))
    assert len(whole) == 1


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "initial_states"])
def test_an_attribute_in_the_place_of_another(name):
    layer, x = known(), torch.randn(T, B, INPUT)
    layer.note = None
    assert plain.run(layer, x, None) is not None
    del layer.note
    layer.__dict__[name] = torch.zeros(1)
    assert plain.run(layer, x, None) is None


def test_the_whole_way_is_for_all_else(whole):
    """What has no kernels of torch's own, and what runs in chunks or step by step."""
    x = torch.randn(T, B, INPUT)
    others = [
        persistrnn.MGU(INPUT, H), persistrnn.GRU(INPUT, H, reset_after=False), persistrnn.LSTM(INPUT, 8, heads=2),
        persistrnn.LSTM(INPUT, H, save="checkpoint"), persistrnn.LSTM(INPUT, H, recipe=persistrnn.Recipe(zoneout=0.1)),
        persistrnn.LSTM(INPUT, H, recipe=persistrnn.Recipe(learned_state=True)),
    ]  # fmt: skip
    for layer in others:
        layer(x)
        layer(x)
        assert id(layer) not in plain._known, layer
    assert len(whole) == 2 * len(others)
