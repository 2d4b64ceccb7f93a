"""Bad input, one by one: an exception of torch.nn's type, with the given value, what is allowed, and the remedy."""

import re
from functools import partial

import pytest
import torch
from pairs import PAIRS
from torch.nn.utils.rnn import pack_sequence

import persistrnn
from persistrnn import decide, functional, segments

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.5}, r"dropout .* \[0, 1\] .*got 1.5"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": float("nan")}, "got nan"),
        ({"dropout": True}, "got True"),
        ({"dropout": "half"}, "got 'half'"),
        ({"bias": 1}, "bias should be of type bool, got: int"),
        ({"batch_first": None}, "batch_first should be of type bool, got: NoneType"),
        ({"input_size": 0}, "input_size must be greater than zero, got 0"),
        ({"input_size": 2.0}, "input_size should be of type int, got: float"),
        ({"hidden_size": -3}, "hidden_size must be greater than zero, got -3"),
        ({"hidden_size": "6"}, "hidden_size should be of type int, got: str"),
        ({"num_layers": 0}, "num_layers must be greater than zero, got 0"),
        ({"num_layers": 2.0}, "num_layers should be of type int, got: float"),
        ({"num_layers": None}, "num_layers should be of type int, got: NoneType"),
        ({"proj_size": -1}, "smaller than hidden_size=6, got -1"),
        ({"proj_size": HIDDEN}, "smaller than hidden_size=6, got 6"),
        ({"proj_size": 1.5}, "proj_size should be of type int, got: float"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", PAIRS)
def test_constructor_refuses_as_torch_nn(cell, options, message):
    if cell != "lstm" and "proj_size" in options:
        message = "only supported for LSTM"
    arguments = {"input_size": INPUT, "hidden_size": HIDDEN, **options}
    ours, theirs = (exception_of(lambda c=c: c(**arguments)) for c in PAIRS[cell])
    assert type(ours) is type(theirs) is not type(None)
    assert re.search(message, str(ours))


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_other_cells_refuse_any_proj_size(name):
    for proj_size in (0, 2):
        with pytest.raises(ValueError, match=f"only supported for LSTM, not for {name}, got {proj_size}"):
            getattr(persistrnn, name)(INPUT, HIDDEN, proj_size=proj_size)


@pytest.mark.parametrize("cell", PAIRS)
def test_constructor_refuses_a_bidirectional_that_is_no_bool(cell):
    """torch.nn takes it and fails with the same TypeError at the first call."""
    with pytest.raises(TypeError, match="bidirectional should be of type bool, got: int"):
        PAIRS[cell][0](INPUT, HIDDEN, bidirectional=1)
    with pytest.raises(TypeError):
        PAIRS[cell][1](INPUT, HIDDEN, bidirectional=1)(torch.randn(STEPS, BATCH, INPUT))


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


def test_persistent_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(decide, "unsupported", lambda call: "the tensors are on cpu; move them to a GPU.")
    with pytest.raises(RuntimeError, match="the tensors are on cpu; move them to a GPU"):
        persistrnn.GRU(INPUT, HIDDEN, backend="persistent")(X)


# ---- layouts, parameters -------------------------------------------------------------------------------------------


def nested():
    return torch.nested.nested_tensor([torch.zeros(2, INPUT), torch.zeros(3, INPUT)], layout=torch.jagged)


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(
    ("input", "message"),
    [
        (nested, r"a nested one; pad it, torch.nested.to_padded_tensor\(input, 0.0\), and give.*lengths"),
        (lambda: X.to_sparse(), r"got layout torch.sparse_coo; convert it: .to_dense\(\)"),
        (lambda: X[0].to_sparse_csr(), r"got layout torch.sparse_csr"),
        (lambda: X.to(torch.complex64), r"torch.complex64.*torch.float32"),
        (lambda: X.bool(), r"torch.bool.*torch.float32"),
    ],
    ids=["nested", "sparse", "csr", "complex", "bool"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_call_refuses_layouts_and_kinds_as_torch_nn(cell, input, message):
    ours, theirs = (exception_of(lambda layer=layer: layer(input())) for layer in make_pair(cell))
    assert type(ours) is type(theirs) is not type(None)
    assert re.search(message, str(ours))


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
    ("lengths int", X, {"lengths": 3}, TypeError, r"integer tensor \[B\].*got int"),
    ("lengths float", X, {"lengths": LENGTHS.float()}, ValueError, r"got torch.float32; convert it: lengths.long"),
    ("lengths bool", X, {"lengths": LENGTHS.bool()}, ValueError, r"got torch.bool"),
    (
        "lengths too many",
        X,
        {"lengths": torch.ones(5).long()},
        RuntimeError,
        r"Expected lengths size \(3,\).*got \[5\]",
    ),
    ("lengths 2-D", X, {"lengths": LENGTHS[:, None]}, RuntimeError, r"got \[3, 1\]"),
    ("lengths negative", X, {"lengths": LENGTHS - 1}, ValueError, r"within \[0, T=5\], got \[4, -1, 1\]"),
    ("lengths too large", X, {"lengths": LENGTHS + 1}, ValueError, r"within \[0, T=5\], got \[6, 1, 3\]"),
    ("lengths device", X, {"lengths": LENGTHS.to("meta")}, RuntimeError, r"input at cpu and lengths at meta; move it"),
    ("lengths unbatched", X[:, 0], {"lengths": LENGTHS[:1]}, ValueError, r"unbatched input; cut it: input\[:length\]"),
    ("lengths packed", PACKED, {"lengths": LENGTHS}, ValueError, r"PackedSequence has lengths of its own"),
    ("resets list", X, {"resets": [True] * 5}, TypeError, r"bool tensor \[T, B\].*got list"),
    ("resets int", X, {"resets": MASK.long()}, ValueError, r"got torch.int64; convert it: resets.bool"),
    ("resets float", X, {"resets": MASK.float()}, ValueError, r"got torch.float32"),
    (
        "resets swapped",
        X,
        {"resets": MASK.mT},
        RuntimeError,
        r"resets size \(5, 3\), \[T, B\] as the input, got \[3, 5\]",
    ),
    ("resets 1-D", X, {"resets": MASK[0]}, RuntimeError, r"\[T, B\] as the input, got \[3\]"),
    (
        "resets unbatched",
        X[:, 0],
        {"resets": MASK},
        RuntimeError,
        r"resets size \(5,\), \[T\] as the input, got \[5, 3\]",
    ),
    ("resets device", X, {"resets": MASK.to("meta")}, RuntimeError, r"input at cpu and resets at meta; move it"),
    ("resets packed", PACKED, {"resets": MASK}, ValueError, r"resets goes with a padded tensor, got a PackedSequence"),
    ("mask packed", PACKED, {"mask": MASK}, ValueError, r"mask goes with a padded tensor, got a PackedSequence"),
    ("mask int", X, {"mask": MASK.int()}, ValueError, r"mask is a bool tensor, got torch.int32"),
    ("mask swapped", X, {"mask": MASK.mT}, RuntimeError, r"mask size \(5, 3\), \[T, B\] as the input, got \[3, 5\]"),
    ("mask and lengths", X, {"mask": MASK, "lengths": LENGTHS}, ValueError, r"got lengths too; give one of them"),
    ("mask and resets", X, {"mask": MASK, "resets": MASK}, ValueError, r"got resets too; give one of them"),
    ("mask and state", X, {"mask": MASK, "reset_state": H}, ValueError, r"a mask has no resets, got reset_state too"),
    ("reset_state alone", X, {"reset_state": H}, ValueError, r"got it without resets; give resets too, or hx instead"),
    (
        "reset_state rows",
        X,
        {"resets": MASK, "reset_state": H[:1]},
        RuntimeError,
        r"reset_state.* size \(2, 3, 6\), got \[1",
    ),
    (
        "reset_state dtype",
        X,
        {"resets": MASK, "reset_state": H.double()},
        RuntimeError,
        r"reset_state.* \(torch.float64\)",
    ),
    (
        "reset_state device",
        X,
        {"resets": MASK, "reset_state": H.to("meta")},
        RuntimeError,
        r"reset_state tensor at meta",
    ),
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


def test_resets_are_laid_out_as_the_input():
    layer = persistrnn.GRU(INPUT, HIDDEN, batch_first=True)
    with pytest.raises(RuntimeError, match=r"resets size \(3, 5\), \[B, T\] as the input, got \[5, 3\]"):
        layer(X.transpose(0, 1), resets=MASK)


@pytest.mark.parametrize(
    ("reset_state", "exception", "message"),
    [
        (H, RuntimeError, r"LSTM: reset_state is a pair of tensors \(h, c\), got one tensor of shape"),
        ((H, H, H), RuntimeError, r"reset_state is a pair of tensors \(h, c\), got 3 of them"),
        ("zeros", TypeError, r"reset_state is a pair of tensors \(h, c\), got str"),
    ],
)
def test_reset_state_of_an_lstm_is_a_pair(reset_state, exception, message):
    with pytest.raises(exception, match=message):
        persistrnn.LSTM(INPUT, HIDDEN, 2)(X, resets=MASK, reset_state=reset_state)


def test_reset_state_of_a_gru_is_a_tensor():
    with pytest.raises(TypeError, match=r"GRU: reset_state is one tensor h, got tuple"):
        persistrnn.GRU(INPUT, HIDDEN, 2)(X, resets=MASK, reset_state=(H, H))


def test_a_gru_has_no_cell_states():
    with pytest.raises(ValueError, match="return_cell_states is for cells with a state beside h, and a GRU has none"):
        persistrnn.GRU(INPUT, HIDDEN)(X, return_cell_states=True)
    with pytest.raises(ValueError, match="cell_dtype is for cells with a state beside h, and a GRU has none"):
        persistrnn.GRU(INPUT, HIDDEN, cell_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"LSTM: got an unexpected keyword argument 'zone'; it takes none"):
        persistrnn.LSTM(INPUT, HIDDEN)(X, zone=X)


def test_lengths_out_of_range_on_a_device_are_clamped_and_raised_once(monkeypatch):
    """What a GPU does, on the CPU: noted when it is seen, raised by the next look."""
    noted = segments._OutOfRange()
    noted.note(torch.tensor(False))
    noted.check()
    noted.note(torch.tensor(True))
    noted.note(torch.tensor(False))  # a good call does not hide a bad one
    with pytest.raises(RuntimeError, match=r"not within \[0, T\].*lengths.clamp\(0, T\)"):
        noted.check()
    noted.check()
    monkeypatch.setattr(segments, "check", lambda: (_ for _ in ()).throw(RuntimeError("as told")))
    with pytest.raises(RuntimeError, match="as told"):
        persistrnn.check()
