"""Bad input, one by one: an exception of torch.nn's type, with the given value, what is allowed, and the remedy."""

import re
from functools import partial

import pytest
import torch
from pairs import PAIRS
from torch.nn.utils.rnn import pack_sequence

import persistrnn
from persistrnn import functional, step_marks

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6
FUNCTIONS = {"lstm": functional.lstm, "gru": functional.gru, "rnn_tanh": functional.rnn}
FUNCTIONS["rnn_relu"] = partial(functional.rnn, nonlinearity="relu")


def make_pair(cell, *args, **options):
    """Ours and torch.nn's."""
    return [c(INPUT, HIDDEN, *args, **options) for c in PAIRS[cell]]


def exception_of(call):
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_other_cells_refuse_any_proj_size(name):
    for proj_size in (0, 2):
        with pytest.raises(ValueError, match=f"only supported for LSTM, not RNN or GRU, got {proj_size}"):
            getattr(persistrnn, name)(INPUT, HIDDEN, proj_size=proj_size)


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"save": "all"}, ValueError, "'gates', 'state', 'checkpoint', 'auto', got 'all'"),
        ({"save": None}, ValueError, "got None"),
        ({"save": "auto"}, ValueError, "goes with save_budget.* got save='auto' and save_budget=None"),
        ({"save": "state", "save_budget": 10}, ValueError, "got save='state' and save_budget=10"),
        ({"save": "auto", "save_budget": 0}, ValueError, "save_budget must be greater than zero, got 0"),
        ({"save": "auto", "save_budget": 1e9}, TypeError, "save_budget should be of type int, got: float"),
        ({"save": "auto", "save_budget": True}, TypeError, "save_budget should be of type int, got: bool"),
    ],
)
def test_save_is_a_mode_or_auto_with_a_budget(cell, options, error, message):
    with pytest.raises(error, match=message):
        PAIRS[cell][0](INPUT, HIDDEN, **options)
    layer = PAIRS[cell][0](INPUT, HIDDEN)
    weights = [w for of_layer in layer.all_weights for w in of_layer]
    with pytest.raises(error, match=message):
        FUNCTIONS[cell](torch.zeros(STEPS, BATCH, INPUT), weights, **options)


def test_save_has_no_projections():
    with pytest.raises(ValueError, match=r"save='state' and proj_size=2; use save='gates', or torch.utils.checkpoint"):
        persistrnn.LSTM(INPUT, HIDDEN, proj_size=2, save="state")


@pytest.mark.parametrize("cell", PAIRS)
def test_dropout_of_one_layer_warns_at_the_caller(cell):
    for constructor in PAIRS[cell]:
        with pytest.warns(UserWarning, match=r"dropout=0.5 and num_layers=1") as record:
            constructor(INPUT, HIDDEN, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout") as record:
        PAIRS[cell][0](INPUT, HIDDEN, dropout=0.5)
    assert record[0].filename == __file__


X = torch.zeros(STEPS, BATCH, INPUT)
H = torch.zeros(2, BATCH, HIDDEN)


def bad_calls():
    """(what is wrong, cells, input, hx, message of ours). For an LSTM a tensor h stands for (h, h)."""
    both = ("lstm", "gru")
    packed = pack_sequence([torch.zeros(n, INPUT) for n in (3, 2, 1)])
    return [
        ("1-D", both, X[0, 0], None, "Expected input to be 2D or 3D, got 1D"),
        ("4-D", both, X[None], None, "Expected input to be 2D or 3D, got 4D"),
        ("float64", both, X.double(), None, r"input dtype \(torch.float64\) .* weight dtype \(torch.float32\)"),
        ("int64", both, X.long(), None, r"input.to\(torch.float32\)"),
        ("features", both, X[..., :-1], None, "Expected 4, got 3"),
        ("unbatched features", both, X[0, :, :-1], None, "Expected 4, got 3"),
        ("no steps", both, X[:0], None, r"larger than 0 in RNN, got input of shape \(0, 3, 4\)"),
        ("no unbatched steps", both, X[:0, 0], None, "larger than 0 in RNN"),
        ("input device", both, X.to("meta"), None, "found input tensor at meta and parameter tensor at cpu"),
        ("hx device", both, X, H.to("meta"), "found input tensor at cpu and hidden tensor at meta"),
        ("hx rows", both, X, H[:1], r"Expected hidden.* size \(2, 3, 6\), got \[1, 3, 6\]"),
        ("hx batch", both, X, H[:, :2], r"Expected hidden.* size \(2, 3, 6\), got \[2, 2, 6\]"),
        ("hx features", both, X, H[..., :2], r"Expected hidden.* size \(2, 3, 6\), got \[2, 3, 2\]"),
        ("hx dtype", both, X, H.double(), r"\.to\(torch.float32\)"),
        ("2-D hx", both, X, H[:, 0], "For batched 3-D input, .* should also be 3-D but got 2-D"),
        ("3-D hx", both, X[:, 0], H, "For unbatched 2-D input, .* should also be 2-D but got 3-D"),
        ("unbatched hx rows", both, X[:, 0], H[:1, 0], r"size \(2, 1, 6\), got \[1, 1, 6\]"),
        ("c0 alone", ("lstm",), X, (H, H[:, :2]), r"Expected hidden\[1\] size \(2, 3, 6\), got \[2, 2, 6\]"),
        ("three states", ("lstm",), X, (H, H, H), "pair of tensors .h0, c0., got 3 of them"),
        ("packed hx rows", both, packed, H[:1], r"size \(2, 3, 6\), got \[1, 3, 6\]"),
        ("packed features", both, packed._replace(data=packed.data[:, :-1]), None, "Expected 4, got 3"),
    ]


@pytest.mark.parametrize(
    ("cell", "input", "hx", "message"),
    [pytest.param(cell, row[2], row[3], row[4], id=f"{cell}-{row[0]}") for row in bad_calls() for cell in row[1]],
)
def test_call_refuses_as_torch_nn(cell, input, hx, message):
    if cell == "lstm" and isinstance(hx, torch.Tensor):
        hx = (hx, hx)
    ours, theirs = (exception_of(lambda layer=layer: layer(input, hx)) for layer in make_pair(cell, num_layers=2))
    assert type(ours) is type(theirs) is not type(None)
    assert re.search(message, str(ours))


def test_lstm_refuses_h0_without_c0_as_torch_nn():
    for layer in make_pair("lstm", num_layers=2):
        with pytest.raises(RuntimeError):
            layer(X, H)
    with pytest.raises(RuntimeError, match=r"pair of tensors \(h0, c0\), got one tensor of shape \(2, 3, 6\)"):
        make_pair("lstm", num_layers=2)[0](X, H)


def test_persistent_on_a_cpu_names_what_it_needs():
    with pytest.raises(RuntimeError) as refused:
        persistrnn.GRU(INPUT, HIDDEN, backend="persistent")(X)
    for part in ('backend="persistent"', "got a tensor on cpu", "'cuda'", "backend='torch'", "TRITON_INTERPRET=1"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("cell", "input", "hx", "message"),
    [
        ("lstm", [1.0], None, "input is a tensor or a PackedSequence, got list"),
        ("gru", None, None, "input is a tensor or a PackedSequence, got NoneType"),
        ("gru", X, (H, H), "GRU: hx is one tensor h0, got tuple"),
        ("lstm", X, "h", r"LSTM: hx is a pair of tensors \(h0, c0\), got str"),
        ("lstm", X, (H, None), "pair of tensors"),
    ],
)
def test_call_refuses_other_types(cell, input, hx, message):
    """TypeError where torch.nn meets an AttributeError on the way."""
    with pytest.raises(TypeError, match=message):
        PAIRS[cell][0](INPUT, HIDDEN, 2)(input, hx)


# ---- parameters ----------------------------------------------------------------------------------------------------


def wrong_weights():
    """(what is wrong, cell, weights, options, exception, message)."""
    lstm, gru = ([p.detach() for p in PAIRS[cell][0](INPUT, HIDDEN).parameters()] for cell in ("lstm", "gru"))
    w_ih, w_hh, *biases = lstm
    deep = [p.detach() for p in persistrnn.GRU(INPUT, HIDDEN, 2, bidirectional=True).parameters()]
    deep[13] = deep[13][:, :-1]
    both = {"num_layers": 2, "bidirectional": True}
    return [
        ("too few", "lstm", lstm[:3], {}, ValueError, "take 4 weights .5 with projections., got 3"),
        ("none", "lstm", [], {}, ValueError, "got 0"),
        ("layers", "lstm", lstm, {"num_layers": 2}, ValueError, "2 layers x 1 directions .* take 8"),
        ("no tensor", "lstm", [w_ih, w_hh, biases[0], None], {}, TypeError, "weights are tensors, got NoneType"),
        ("dtypes", "lstm", [w_ih, w_hh.double(), *biases], {}, ValueError, r"weight_hh_l0 torch.float64; convert it"),
        ("empty", "lstm", [w_ih[:0], w_hh[:0, :0], *(b[:0] for b in biases)], {}, RuntimeError, "H > 0"),
        ("device", "lstm", [w_ih, w_hh.to("meta"), *biases], {}, RuntimeError, "parameter tensor at meta"),
        ("projection", "lstm", [*lstm, torch.zeros(2, HIDDEN)], {}, RuntimeError, r"weight_hh_l0 .*\(24, 2\)"),
        ("of a GRU", "gru", [*gru, gru[0]], {}, ValueError, "a GRU has no projections: it takes 4 weights, got 5"),
        ("named", "gru", deep, both, RuntimeError, r"weight_hh_l1_reverse must have shape \(18, 6\), got \(18, 5\)"),
    ]


@pytest.mark.parametrize(
    ("cell", "weights", "options", "exception", "message"),
    [pytest.param(*row[1:], id=row[0]) for row in wrong_weights()],
)
def test_functional_refuses_weights(cell, weights, options, exception, message):
    with pytest.raises(exception, match=message):
        getattr(persistrnn.functional, cell)(X, weights, **options)


# ---- lengths, masks, resets ----------------------------------------------------------------------------------------

LENGTHS, MASK = torch.tensor([5, 0, 2]), torch.ones(STEPS, BATCH, dtype=torch.bool)
PACKED = pack_sequence([torch.zeros(n, INPUT) for n in (3, 2, 1)])
CUTS = [
    # what is wrong, input, options, exception, message
    ("lengths list", X, {"lengths": [5, 0, 2]}, TypeError, r"got list; use torch.tensor\(lengths, device=input.device"),
    ("lengths float", X, {"lengths": LENGTHS.float()}, ValueError, r"got torch.float32; convert it: lengths.long"),
    ("lengths too many", X, {"lengths": torch.ones(5).long()}, RuntimeError, r"lengths size \(3,\).*got \[5\]"),
    ("lengths 2-D", X, {"lengths": LENGTHS[:, None]}, RuntimeError, r"got \[3, 1\]"),
    ("lengths negative", X, {"lengths": LENGTHS - 1}, ValueError, r"within \[0, T=5\], got \[4, -1, 1\]"),
    ("lengths too large", X, {"lengths": LENGTHS + 1}, ValueError, r"within \[0, T=5\], got \[6, 1, 3\]"),
    ("lengths device", X, {"lengths": LENGTHS.to("meta")}, RuntimeError, r"input at cpu and lengths at meta; move it"),
    ("lengths unbatched", X[:, 0], {"lengths": LENGTHS[:1]}, ValueError, r"unbatched input; cut it: input\[:length\]"),
    ("lengths packed", PACKED, {"lengths": LENGTHS}, ValueError, r"PackedSequence has lengths of its own"),
    ("resets list", X, {"resets": [True] * 5}, TypeError, r"bool tensor \[T, B\].*got list"),
    ("resets int", X, {"resets": MASK.long()}, ValueError, r"got torch.int64; convert it: resets.bool"),
    ("resets swapped", X, {"resets": MASK.mT}, RuntimeError, r"size \(5, 3\), \[T, B\] as the input, got \[3, 5\]"),
    ("resets unbatched", X[:, 0], {"resets": MASK}, RuntimeError, r"size \(5,\), \[T\] as the input, got \[5, 3\]"),
    ("resets packed", PACKED, {"resets": MASK}, ValueError, r"resets goes with a padded tensor, got a PackedSequence"),
    ("mask packed", PACKED, {"mask": MASK}, ValueError, r"mask goes with a padded tensor, got a PackedSequence"),
    ("mask and lengths", X, {"mask": MASK, "lengths": LENGTHS}, ValueError, r"got lengths too; give one of them"),
    ("mask and resets", X, {"mask": MASK, "resets": MASK}, ValueError, r"got resets too; give one of them"),
    ("mask and state", X, {"mask": MASK, "reset_state": H}, ValueError, r"a mask has no resets, got reset_state too"),
    ("reset_state alone", X, {"reset_state": H}, ValueError, r"got it without resets; give resets too, or hx instead"),
    ("reset_state rows", X, {"resets": MASK, "reset_state": H[:1]}, RuntimeError, r"size \(2, 3, 6\), got \[1"),
    ("reset_state dtype", X, {"resets": MASK, "reset_state": H.double()}, RuntimeError, r"e.* \(torch.float64\)"),
    ("reset_state 2-D", X, {"resets": MASK, "reset_state": H[0]}, RuntimeError, r"should also be 3-D but got 2-D"),
]


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(
    ("input", "options", "exception", "message"), [row[1:] for row in CUTS], ids=[r[0] for r in CUTS]
)
def test_call_refuses_bad_cuts(cell, input, options, exception, message):
    if cell == "lstm" and "reset_state" in options:
        options = options | {"reset_state": (options["reset_state"],) * 2}
    with pytest.raises(exception, match=message):
        PAIRS[cell][0](INPUT, HIDDEN, 2)(input, **options)


@pytest.mark.parametrize(
    ("cell", "reset_state", "exception", "message"),
    [
        ("lstm", H, RuntimeError, r"LSTM: reset_state is a pair of tensors \(h, c\), got one tensor of shape"),
        ("lstm", (H, H, H), RuntimeError, r"reset_state is a pair of tensors \(h, c\), got 3 of them"),
        ("lstm", "zeros", TypeError, r"reset_state is a pair of tensors \(h, c\), got str"),
        ("gru", (H, H), TypeError, r"GRU: reset_state is one tensor h, got tuple"),
    ],
)
def test_reset_state_has_the_form_of_hx(cell, reset_state, exception, message):
    with pytest.raises(exception, match=message):
        PAIRS[cell][0](INPUT, HIDDEN, 2)(X, resets=MASK, reset_state=reset_state)


def test_a_gru_has_no_cell_states():
    with pytest.raises(ValueError, match="return_cell_states is for cells with a state beside h, and a GRU has none"):
        persistrnn.GRU(INPUT, HIDDEN)(X, return_cell_states=True)
    with pytest.raises(ValueError, match="cell_dtype is for cells with a state beside h, and a GRU has none"):
        persistrnn.GRU(INPUT, HIDDEN, cell_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"LSTM: got an unexpected keyword argument 'zone'; it takes none"):
        persistrnn.LSTM(INPUT, HIDDEN)(X, zone=X)


def test_lengths_out_of_range_on_a_device_are_clamped_and_raised_once(monkeypatch):
    """What a GPU does, on the CPU: noted when it is seen, raised by the next look."""
    monkeypatch.setattr(step_marks, "_out_of_range", {})
    with torch.inference_mode():  # what it makes is written outside, too
        step_marks._note(torch.tensor(False))
    step_marks.check()
    step_marks._note(torch.tensor(True))
    step_marks._note(torch.tensor(False))  # a good call does not hide a bad one
    with pytest.raises(RuntimeError, match=r"not within \[0, T\].*lengths.clamp\(0, T\)"):
        step_marks.check()
    step_marks.check()
    monkeypatch.setattr(step_marks, "check", lambda: (_ for _ in ()).throw(RuntimeError("as told")))
    for look in (persistrnn.check, lambda: persistrnn.GRU(INPUT, HIDDEN)(X, lengths=LENGTHS)):
        with pytest.raises(RuntimeError, match="as told"):
            look()
