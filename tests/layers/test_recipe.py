"""What a `Recipe` does to a layer, against a transcription of the papers: a loop in the test, in float64."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from forced import force_pipelines
from grid import concurrent_grid
from pairs import PATHS, as_hx, tensors
from torch import nn, sigmoid, tanh

import persistrnn
from persistrnn import Recipe, masks
from persistrnn.kernels import launch
from persistrnn.kernels.planner import memory

T, B, INPUT, H = 4, 3, 4, 6


@persistrnn.cell(gates=("a", "z"), states=("h", "s"), params=("rate",), extras=("gain",))
def gained(x, r, state, p, e):
    """With all that a cell may have beside its gates; reads h by itself."""
    s = state.s + e.gain * torch.tanh(x.a + r.a)
    return torch.sigmoid(x.z + r.z) * torch.tanh(s) + p.rate * state.h, s


def lstm(x, r, state, own, extra):
    i, f, g, o = (x + r).chunk(4, -1)
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru(x, r, state, own, extra):
    (xr, xz, xn), (rr, rz, rn) = x.chunk(3, -1), r.chunk(3, -1)
    z = sigmoid(xz + rz)
    return ((1 - z) * tanh(xn + sigmoid(xr + rr) * rn) + z * state[0],)


def gained_(x, r, state, own, extra):
    (xa, xz), (ra, rz) = x.chunk(2, -1), r.chunk(2, -1)
    s = state[1] + extra * tanh(xa + ra)
    return sigmoid(xz + rz) * tanh(s) + own["rate"] * state[0], s


CELLS = {
    "lstm": (persistrnn.LSTM, lstm, 2),
    "gru": (persistrnn.GRU, gru, 1),
    "gained": (partial(persistrnn.Recurrent, gained), gained_, 2),
}


def transcribed(cell, weights, x, hx, recipe, training, masked, dropped_weights, options, given):
    """y and the final states. masked: bool [L, T, B, D, E, H], None in evaluation; dropped_weights: of each W_hh."""
    step, states = CELLS[cell][1:]
    zoneout = recipe.zoneout if isinstance(recipe.zoneout, tuple) else (recipe.zoneout,) * states
    directions, finals = 1 + options.get("bidirectional", False), []
    lengths, resets = given.get("lengths", [T] * B), given.get("resets")
    for layer in range(options.get("num_layers", 1)):
        ways = []
        for d in range(directions):
            suffix, row = f"_l{layer}{'_reverse' * d}", layer * directions + d
            own = {name.removesuffix(suffix): w for name, w in weights.items() if name.endswith(suffix)}
            rows = []
            for b in range(B):
                state = [weights[f"{'hcs'[k] if cell != 'gained' else 'hs'[k]}0"][row] for k in range(states)]
                begin = state if recipe.learned_state else [torch.zeros_like(s) for s in state]
                state = begin if hx is None else [s[row, b] for s in hx]
                steps = list(range(int(lengths[b])))
                y = [x.new_zeros(H)] * T
                for t in reversed(steps) if d else steps:
                    if resets is not None and (t < steps[-1] and resets[t + 1, b] if d else resets[t, b]):
                        state = begin
                    w, h = own["weight_hh"], state[0]
                    of_step = [] if masked is None else list(masked[layer, t, b, d])
                    if training and recipe.recurrent_dropout:
                        h = h * of_step.pop(0).logical_not() / (1 - recipe.recurrent_dropout)
                    if training and recipe.weight_drop:
                        w = w * dropped_weights[row] / (1 - recipe.weight_drop)
                    r = F.linear(h, w, own["bias_hh"])
                    extra = given["gain"][row, t, b] if cell == "gained" else None
                    new = step(F.linear(x[t, b], own["weight_ih"], own["bias_ih"]), r, state, own, extra)
                    keeps = [(of_step.pop(0).to(x) if p else 0.0) if training else p for p in zoneout]
                    state = [k * s + (1 - k) * n for k, s, n in zip(keeps, state, new, strict=True)]
                    y[t] = state[0]
                rows.append((torch.stack(y), *state))
            y, *final = (torch.stack(part, dim=1 if k == 0 else 0) for k, part in enumerate(zip(*rows, strict=True)))
            ways.append(y)
            finals.append(final)
        x = torch.cat(ways, -1)
    return [x, *(torch.stack(s) for s in zip(*finals, strict=True))]


@pytest.fixture
def drawn(monkeypatch):
    """The keys that calls have drawn."""
    found, keys = [], masks.keys
    monkeypatch.setattr(masks, "keys", lambda *given: found.append(keys(*given)) or found[-1])
    return found


def made(cell, recipe, dtype, cut="whole", **options):
    """A layer, its input, hx (None where the states are learned), and what else a call of it takes."""
    torch.manual_seed(0)
    layer = CELLS[cell][0](INPUT, H, recipe=recipe, **options).to(dtype)
    rows = layer.num_layers * (1 + layer.bidirectional)
    with torch.no_grad():
        for name in layer._names_of_states() if recipe.learned_state else ():
            getattr(layer, name).normal_()
    x, hx = torch.randn(T, B, INPUT, dtype=dtype), [torch.randn(rows, B, H, dtype=dtype) for _ in range(CELLS[cell][2])]
    given = {"lengths": torch.tensor([T, 2, 4])} if cut == "lengths" else {}
    given |= {"resets": torch.rand(T, B) < 0.3} if cut == "resets" else {}
    given |= {"gain": torch.rand(rows, T, B, H, dtype=dtype)} if cell == "gained" else {}
    leaves = [t.requires_grad_() for t in (x, *(() if recipe.learned_state else hx))]
    return layer, leaves[0], leaves[1:] or None, given


ONE, FOUR = {}, {"num_layers": 2, "bidirectional": True}
ZONED, DROPPED = Recipe(zoneout=0.4), Recipe(recurrent_dropout=0.4)
EVERY = Recipe(zoneout=(0.2, 0.6), recurrent_dropout=0.3, weight_drop=0.4, learned_state=True, forget_bias=None)
EVERY_GRU = EVERY._replace(zoneout=0.3)
RUNS = [
    ("torch", "lstm", ZONED, FOUR, "lengths"), ("torch", "lstm", DROPPED, ONE, "resets"),
    ("torch", "lstm", EVERY, FOUR, "whole"), ("torch", "lstm", EVERY, ONE, "lengths"),
    ("torch", "lstm", Recipe(weight_drop=0.4, learned_state=True), FOUR, "whole"),
    ("torch", "lstm", Recipe(learned_state=True), FOUR, "lengths"),
    ("torch", "gru", ZONED, ONE, "whole"), ("torch", "gru", EVERY_GRU, FOUR, "resets"),
    ("torch", "gained", EVERY, FOUR, "resets"),
]  # fmt: skip
KERNELS = [
    ("persistent", "lstm", EVERY, FOUR, "resets"), ("persistent", "gru", EVERY_GRU, FOUR, "lengths"),
    ("persistent", "lstm", ZONED, {"num_layers": 2}, "whole"), ("persistent", "gained", EVERY, ONE, "whole"),
]  # fmt: skip
RUNS += [pytest.param(*run, marks=pytest.mark.interpreter) for run in KERNELS]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("backend", "cell", "recipe", "options", "cut"), RUNS, ids=str)
def test_layers_are_the_papers(drawn, backend, cell, recipe, options, cut, training):
    dtype = torch.float64 if backend == "torch" else torch.float32
    layer, x, hx, given = made(cell, recipe, dtype, cut, backend=backend, **options)
    layer.train(training)
    torch.manual_seed(7)
    y, state = layer(x, None if hx is None else as_hx(hx), **given)
    torch.manual_seed(7)
    rates = F.dropout, recipe.weight_drop
    of = [rates[0](torch.ones_like(w), rates[1]) != 0 for n, w in layer.named_parameters() if "weight_hh" in n]
    masked = None
    if training and (recipe.zoneout or recipe.recurrent_dropout):
        masked = masks.drawn(drawn[0].unflatten(0, (-1, 1 + layer.bidirectional)), T, B, H).bool()
    else:
        assert not drawn
    found = [y, *tensors(state)]
    names = [name for name, _ in layer.named_parameters()]
    leaves = [x, *(hx or ()), *layer.parameters()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weights = dict(zip(names, exact[1 + len(hx or ()) :], strict=True))
    for name in ("h0", "c0", "s0"):
        weights.setdefault(name, torch.zeros(len(state if cell == "gru" else state[0]), H).double())
    given = given | ({"gain": given["gain"].double()} if "gain" in given else {})
    of_hx = None if hx is None else exact[1 : 1 + len(hx)]
    paper = transcribed(cell, weights, exact[0], of_hx, recipe, training, masked, of, options, given)
    for results, of_leaves in ((found, leaves), (paper, exact)):
        loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(results))
        results += torch.autograd.grad(loss, of_leaves, allow_unused=True, materialize_grads=True)
    rtol, atol = (1e-9, 1e-11) if backend == "torch" else (1e-5, 5e-6)
    torch.testing.assert_close(found, paper, rtol=rtol, atol=atol, check_dtype=False)


NOISY = Recipe(zoneout=0.3, recurrent_dropout=0.3, weight_drop=0.3)


def results(layer, x, given):
    torch.manual_seed(11)
    outputs = tensors(layer(x, **given))
    loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [x, *layer.parameters()])]


LSTM_HEADS, GRU_HEADS = {"bidirectional": True, "heads": 2}, {"num_layers": 2, "heads": 3}
MODES = [("torch", *run, save) for run in (("lstm", LSTM_HEADS), ("gru", GRU_HEADS)) for save in memory.MODES]
ON_KERNELS_TOO = [("lstm", LSTM_HEADS, "gates"), ("gru", GRU_HEADS, "state"), ("gru", GRU_HEADS, "checkpoint")]
MODES += [pytest.param("persistent", *run, marks=pytest.mark.interpreter) for run in ON_KERNELS_TOO]


@pytest.mark.parametrize(("backend", "cell", "options", "save"), MODES, ids=str)
def test_a_seed_has_its_masks_on_every_path_and_in_every_memory_mode(monkeypatch, backend, cell, options, save):
    """Chunks of three steps, heads whose units share no counter, rows of several lengths."""
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 3)
    recipe = NOISY if cell == "lstm" or save == "state" else NOISY._replace(recurrent_dropout=0.0)
    layer, x, _, given = made(cell, recipe, torch.float32, "lengths", save=save, backend=backend, **options)
    found = results(layer, x, given)
    layer.save, layer.backend = "gates", "torch"
    torch.testing.assert_close(found, results(layer, x, given), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_the_layers_of_a_pipeline_have_masks_of_their_own(monkeypatch):
    torch.manual_seed(0)
    layer, x = persistrnn.LSTM(INPUT, 13, 2, recipe=ZONED), torch.randn(3, B, INPUT, requires_grad=True)
    expected, before = results(layer, x, {}), launch.LAUNCHES.copy()
    layer.backend = "persistent"
    force_pipelines(monkeypatch)
    with concurrent_grid():
        torch.testing.assert_close(results(layer, x, {}), expected, rtol=1e-5, atol=1e-5)
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}


@pytest.mark.parametrize("save", ["gates", "checkpoint"])
@pytest.mark.interpreter
def test_second_derivatives_have_the_masks_too(save):
    found = []
    for path in ("persistent", "torch"):
        layer, x, _, given = made("lstm", NOISY, torch.float32, save=save, backend=path)
        torch.manual_seed(5)
        (first,) = torch.autograd.grad(layer(x, **given)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", PATHS)
def test_compiled_it_is_one_graph_with_the_same_masks(backend):
    layer, x, _, given = made("lstm", NOISY._replace(learned_state=True), torch.float32, backend=backend)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), x[:2].detach().requires_grad_()
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(results(compiled, x, given), results(layer, x, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_mapped_samples_have_the_masks_that_were_asked_for(backend, randomness):
    layer, _, _, _ = made("gru", ZONED, torch.float32, backend=backend)
    x = torch.randn(1, T, B, INPUT).expand(2, -1, -1, -1)
    torch.manual_seed(3)
    first, second = torch.func.vmap(lambda x: layer(x)[0], randomness=randomness)(x)
    assert torch.equal(first, second) == (randomness == "same")


def test_compiled_for_every_size_a_probability_is_a_constant():
    """Where torch.compile makes variables of numbers, and after a change of one."""
    layer, x, _, _ = made("lstm", NOISY, torch.float32, num_layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for zoneout, training, rows in ((0.3, True, 3), (0.3, True, 2), (0.6, False, 2)):
        layer.recipe = NOISY._replace(zoneout=zoneout)
        layer.train(training)
        found, expected = (results(call, x[:, :rows].detach().requires_grad_(), {}) for call in (compiled, layer))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_drawn_in_evaluation():
    layer, x, _, given = made("lstm", NOISY, torch.float32)
    before, _ = torch.get_rng_state(), layer.eval()
    layer(x, **given)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", [EVERY, ZONED], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_steps_and_a_stream_are_the_sequence_in_evaluation(cell, recipe):
    recipe = recipe if cell == "lstm" else recipe._replace(zoneout=0.3)
    layer, x, _, _ = made(cell, recipe, torch.float64, num_layers=2)
    layer.eval()
    expected, final = layer(x)
    stream, state, y = persistrnn.Streaming(layer), None, []
    for x_t in x:
        y_t, state = layer.step(x_t, state)
        y.append(y_t)
    torch.testing.assert_close([torch.stack(y), *tensors(state)], [expected, *tensors(final)])
    torch.testing.assert_close(torch.cat([stream(part) for part in x.split(2)]), expected)
    stream.reset(torch.tensor([True, False, True]))
    y, going_on = stream(x), layer(x, final)[0]
    torch.testing.assert_close(y, torch.stack([expected[:, 0], going_on[:, 1], expected[:, 2]], 1))


def test_learned_states_have_names_begin_as_zeros_and_yield_to_hx():
    plain, x, _, _ = made("lstm", Recipe(), torch.float64, num_layers=2, proj_size=2)
    torch.manual_seed(0)
    layer = persistrnn.LSTM(INPUT, H, num_layers=2, proj_size=2, recipe=Recipe(learned_state=True)).double()
    assert {name: tuple(s.shape) for name, s in layer.named_parameters() if name[1] == "0"} == {
        "h0": (2, 2), "c0": (2, H)
    }  # fmt: skip
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    missing, _ = layer.load_state_dict(nn.LSTM(INPUT, H, 2, proj_size=2).state_dict(), strict=False)
    assert missing == ["h0", "c0"]
    y, _ = layer(x, (torch.zeros(2, B, 2).double(), torch.zeros(2, B, H).double()))
    assert [g is None for g in torch.autograd.grad(y.sum(), [layer.h0, layer.c0], allow_unused=True)] == [True, True]
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
    torch.testing.assert_close(
        nn.utils.rnn.pad_packed_sequence(layer(packed)[0])[0], layer(x, lengths=torch.tensor([2, 4, 3]))[0]
    )


@pytest.mark.parametrize(("cell", "first"), [(persistrnn.LSTM, H), (persistrnn.MGU, 0)])
def test_the_forget_gate_begins_with_its_bias(cell, first):
    layer = cell(INPUT, H, 2, bidirectional=True, recipe=Recipe(forget_bias=-1.5))
    for _, _, bias_ih, bias_hh in layer.all_weights:
        of_gate = slice(first, first + H)
        assert (bias_ih[of_gate] == -1.5).all()
        assert not bias_hh[of_gate].any()
        assert bias_hh.count_nonzero() == len(bias_hh) - H
        assert bias_ih.ne(-1.5).sum() == len(bias_ih) - H


def test_all_else_begins_as_in_torch():
    torch.manual_seed(0)
    theirs = nn.LSTM(INPUT, H)
    torch.manual_seed(0)
    ours = persistrnn.LSTM(INPUT, H, recipe=EVERY)
    assert all(torch.equal(w, ours.get_parameter(name)) for name, w in theirs.named_parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied):
    layer, x, _, given = made("lstm", EVERY, torch.float32)
    other = copied(layer)
    assert other.recipe == EVERY
    torch.testing.assert_close(results(other, x, given), results(layer, x, given), rtol=0, atol=0)


def test_in_words():
    layer = persistrnn.LSTM(4, 64, recipe=Recipe(zoneout=0.5))
    assert repr(layer) == (
        "LSTM(4, 64, recipe=Recipe(zoneout=0.5, recurrent_dropout=0.0, weight_drop=0.0, learned_state=False, "
        "forget_bias=None))"
    )
    assert "path: stepwise" in persistrnn.explain(layer, 4, 8)
    layer.recipe = Recipe(weight_drop=0.5)
    assert "path: torch" in persistrnn.explain(layer, 4, 8)


def test_torch_has_an_equal_only_of_the_first_weights():
    assert isinstance(persistrnn.LSTM(4, 6, recipe=Recipe(forget_bias=1.0)).to_torch(), nn.LSTM)
    for recipe in (ZONED, DROPPED, Recipe(weight_drop=0.1), Recipe(learned_state=True)):
        with pytest.raises(
            ValueError, match=r"torch\.nn has no LSTM with Recipe\(.*persistrnn\.Recipe\(\) has an equal"
        ):
            persistrnn.LSTM(4, 6, recipe=recipe).to_torch()


BAD = [
    (persistrnn.GRU, {"recipe": 0.5}, TypeError, r"persistrnn\.Recipe, got float; give persistrnn\.Recipe"),
    (persistrnn.GRU, Recipe(zoneout=1.5), ValueError, r"zoneout is .* \[0, 1\].*got 1\.5"),
    (persistrnn.GRU, Recipe(zoneout=True), ValueError, "zoneout is .*got True"),
    (persistrnn.GRU, Recipe(zoneout=(0.1, 0.2)), ValueError, r"each of its states \(h\), got \(0\.1, 0\.2\)"),
    (persistrnn.LSTM, Recipe(zoneout=(0.1,)), ValueError, r"each of its states \(h, c\), got \(0\.1,\)"),
    (persistrnn.SLSTM, Recipe(zoneout=0.1), ValueError, r"of 4 states is a tuple.*give \(0\.1, 0, 0, 0\)"),
    (persistrnn.GRU, Recipe(recurrent_dropout=1), ValueError, r"recurrent_dropout .* \[0, 1\), got 1"),
    (persistrnn.GRU, Recipe(weight_drop="1"), ValueError, r"weight_drop .* \[0, 1\), got '1'"),
    (persistrnn.GRU, Recipe(learned_state=1), TypeError, "learned_state .* bool, got 1; give True or False"),
    (persistrnn.GRU, Recipe(forget_bias=1.0), ValueError, "a gate f, got 1.0 for a layer of gates r, z, n and no f"),
    (persistrnn.LSTM, Recipe(forget_bias="1"), ValueError, "forget_bias is a finite number or None, got '1'"),
    (partial(persistrnn.LSTM, bias=False), Recipe(forget_bias=1), ValueError, "got 1 for a layer of bias=False"),
    (partial(persistrnn.LSTM, proj_size=2), ZONED, ValueError, r"zoneout is not for .*zoneout=0\.4 and proj_size=2"),
    (partial(persistrnn.LSTM, proj_size=2), DROPPED, ValueError, r"recurrent_dropout=0\.4 and proj_size=2; leave one"),
    (partial(persistrnn.GRU, reset_after=False), DROPPED, ValueError, "recurrent_dropout is for cells of one stage"),
    (persistrnn.LayerNormLSTM, ZONED, ValueError, r"zoneout=0\.4 for layer_norm_lstm.*use weight_drop"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "recipe", "error", "message"), BAD)
def test_bad_recipes_are_refused(make, recipe, error, message):
    given = recipe if isinstance(recipe, dict) else {"recipe": recipe}
    with pytest.raises(error, match=message):
        make(4, 6, **given)
    layer = make(4, 6)
    with pytest.raises(error, match=message):
        layer.recipe = given["recipe"]


def test_what_a_call_or_a_changed_layer_cannot_have():
    layer = persistrnn.LSTM(4, 6, recipe=DROPPED)
    with pytest.raises(ValueError, match=r"return_cell_states .* recurrent_dropout.*leave one of them out"):
        layer(torch.randn(2, 1, 4), return_cell_states=True)
    layer.recipe = Recipe(learned_state=True)
    with pytest.raises(RuntimeError, match=r"has no h0, c0.*make a layer with this recipe"):
        layer(torch.randn(2, 1, 4))
    layer = persistrnn.LSTM(4, 6, recipe=Recipe(learned_state=True))
    layer.recipe = Recipe()
    with pytest.raises(RuntimeError, match=r"has h0, and .* leaves it out; set learned_state=True"):
        layer(torch.randn(2, 1, 4))


def test_an_slstm_keeps_h_alone():
    layer = persistrnn.SLSTM(INPUT, H, recipe=Recipe(zoneout=(1.0, 0, 0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layer(torch.randn(T, B, INPUT))[0].any()


def test_the_forget_bias_of_a_normalised_layer_is_what_was_asked_for():
    layer = persistrnn.LayerNormLSTM(3, 4, recipe=Recipe(forget_bias=1.5))
    assert torch.equal(layer.bias_ih_l0 + layer.bias_hh_l0, torch.tensor([0.0, 1.5, 0.0, 0.0]).repeat_interleave(4))


def test_a_parameter_h0_of_the_user_s_own_is_no_learned_state():
    layer = persistrnn.LSTM(3, 4)
    layer.h0, layer.c0 = nn.Parameter(torch.ones(1, 2, 4)), nn.Parameter(torch.ones(1, 2, 4))
    layer(torch.randn(5, 2, 3), (layer.h0, layer.c0))[0].sum().backward()
    assert layer.h0.grad is not None


def test_a_changed_reset_after_is_refused_with_noise():
    layer = persistrnn.GRU(3, 4, recipe=Recipe(zoneout=0.3))
    layer.reset_after = False
    with pytest.raises(ValueError, match="are for cells of one stage, and gru_reset_before"):
        layer(torch.randn(5, 2, 3))
