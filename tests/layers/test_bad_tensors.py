"""Tensors of another layout, dtype, size or kind, in the place of each tensor of a call: refused at the validate."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import persistrnn

LAYERS = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU}
STEPS, BATCH, INPUT, HIDDEN = 3, 2, 4, 6
X, H = torch.zeros(STEPS, BATCH, INPUT), torch.zeros(1, BATCH, HIDDEN)
LENGTHS, MASK = torch.tensor([3, 1]), torch.ones(STEPS, BATCH, dtype=torch.bool)
ROWS = MASK[0]

backends = pytest.mark.parametrize("backend", ["auto", pytest.param("persistent", marks=pytest.mark.interpreter)])
cells = pytest.mark.parametrize("cell", LAYERS)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:UserWarning")
    for text in (
        "Sparse (CSR|CSC|BSR|BSC) tensor support is in beta",
        "The PyTorch API of nested tensors is in prototype",
        "Sparse invariant checks are implicitly disabled",
        "torch.quantize_per_tensor",
    )
]


def weights_of(cell, **options):
    return [w.detach() for w in LAYERS[cell](INPUT, HIDDEN, **options).parameters()]


def matrix(t):
    return t.reshape(-1, t.shape[-1]) if t.dim() > 0 else t.reshape(1, 1)


def quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)


LAYOUTS = {
    "coo": (lambda t: t.to_sparse(), "layout torch.sparse_coo"),
    "csr": (lambda t: matrix(t).to_sparse_csr(), "layout torch.sparse_csr"),
    "csc": (lambda t: matrix(t).to_sparse_csc(), "layout torch.sparse_csc"),
    "bsr": (lambda t: matrix(t).to_sparse_bsr((1, 1)), "layout torch.sparse_bsr"),
    "bsc": (lambda t: matrix(t).to_sparse_bsc((1, 1)), "layout torch.sparse_bsc"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), "layout torch._mkldnn"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "nested"),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "nested"),
}
KINDS = {
    "meta": lambda t: t.to("meta"),
    "quantized": quantized,
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.complex64, torch.int64, torch.float8_e4m3fn, torch.uint8)},
    "bool": lambda t: t.bool(),
    "0-D": lambda t: t.new_zeros(()),
    "5-D": lambda t: t[None, None, None],
}


def places(cell, backend):
    """What a call takes, by name: (the good tensor, a call of what stands in its place)."""
    run, weights = getattr(persistrnn.functional, cell), weights_of(cell)

    def pair(h, c=H):
        return (h, c) if cell == "lstm" else h

    def call(*args, **options):
        return run(*args, backend=backend, **options)

    def stream(state, use):
        made = persistrnn.Streaming(LAYERS[cell](INPUT, HIDDEN, backend=backend))
        made.state = state
        return use(made)

    found = {
        "input": (X, lambda t: call(t, weights)),
        "hx": (H, lambda t: call(X, weights, pair(t))),
        "lengths": (LENGTHS, lambda t: call(X, weights, lengths=t)),
        "mask": (MASK, lambda t: call(X, weights, mask=t)),
        "resets": (MASK, lambda t: call(X, weights, resets=t)),
        "reset_state": (H, lambda t: call(X, weights, resets=MASK, reset_state=pair(t))),
        "state": (H, lambda t: stream(pair(t), lambda s: s(X))),
        "state of a step": (H, lambda t: stream(pair(t), lambda s: s.step(X[0]))),
        "state of a reset": (H, lambda t: stream(pair(t), lambda s: s.reset(ROWS))),
        "rows": (ROWS, lambda t: stream(pair(H), lambda s: s.reset(t))),
    }
    for k, weight in enumerate(weights):
        found[f"weights[{k}]"] = weight, lambda t, k=k: call(X, [*weights[:k], t, *weights[k + 1 :]])
    if cell == "lstm":
        found["c of hx"] = H, lambda t: call(X, weights, (H, t))
        found["c of reset_state"] = H, lambda t: call(X, weights, resets=MASK, reset_state=(H, t))
    return found


PLACES = [(cell, place) for cell in LAYERS for place in places(cell, "auto")]


@backends
@pytest.mark.parametrize(("cell", "place"), PLACES)
def test_layouts_are_refused_everywhere(cell, place, backend):
    good, call = places(cell, backend)[place]
    call(good)
    for make, message in LAYOUTS.values():
        with pytest.raises(RuntimeError, match=rf"is a dense tensor, got .*{message}"):
            call(make(good))


@backends
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("cell", "place"), PLACES)
def test_kinds_are_refused_everywhere(cell, place, autocast, backend):
    good, call = places(cell, backend)[place]
    for kind, make in KINDS.items():
        bad = make(good)
        same = bad.dtype == good.dtype and bad.shape == good.shape and not bad.is_meta
        if same or (kind == "meta" and place == "state of a reset"):
            continue  # a state on any device can be reset, with rows there: the rows are refused
        if place == "lengths" and kind == "torch.uint8":
            continue  # lengths of any integer dtype
        with torch.autocast("cpu", enabled=autocast), pytest.raises((ValueError, RuntimeError)) as told:
            call(bad)
        assert told.type in (ValueError, RuntimeError), kind
        assert told.traceback[-1].path.parent.name == "persistrnn", f"{kind}: the error is ours"


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
@cells
def test_a_call_wholly_of_another_dtype_is_refused(cell, dtype):
    with pytest.raises(ValueError, match=rf"torch.float16, .*got {dtype}; convert them"):
        getattr(persistrnn.functional, cell)(X.to(dtype), [w.to(dtype) for w in weights_of(cell)])


@cells
def test_float64_beside_another_dtype_is_refused_under_autocast(cell):
    """Autocast leaves it alone."""
    layer = LAYERS[cell](INPUT, HIDDEN)
    with torch.autocast("cpu"):
        with pytest.raises(ValueError, match=r"torch.float64.*torch.float32"):
            layer(X.double())
        with pytest.raises(RuntimeError, match=r"dtype \(torch.float64\).*input dtype"):
            layer(X, (H.double(), H.double()) if cell == "lstm" else H.double())


# ---- sizes of weights ----------------------------------------------------------------------------------------------


def of_size(*size):
    return lambda w: torch.zeros(size)


@backends
@pytest.mark.parametrize(
    ("slot", "change", "message"),
    [
        (4, of_size(), r"weight_hr_l0 must have shape \(2, 6\), got \(\)"),
        (4, of_size(2, 5), r"weight_hr_l0 must have shape \(2, 6\), got \(2, 5\)"),
        (4, lambda w: w[None], r"weight_hr_l0 must have shape \(2, 6\), got \(1, 2, 6\)"),
        (1, of_size(), r"weight_hh_l0 must have shape \(24, 2\), got \(\)"),
        (1, of_size(24, 6), r"weight_hh_l0 must have shape \(24, 2\), got \(24, 6\)"),
        (0, of_size(), r"weight_ih_l0 must have shape \(24, 0\), got \(\)"),
        (3, of_size(), r"bias_hh_l0 must have shape \(24,\), got \(\)"),
    ],
)
def test_the_weight_of_a_projection_that_does_not_fit_is_named(slot, change, message, backend):
    weights = weights_of("lstm", proj_size=2)
    weights[slot] = change(weights[slot])
    with pytest.raises(RuntimeError, match=message):
        persistrnn.functional.lstm(X, weights, backend=backend)


@cells
@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("size", [(), (0,), (7, 6), (6,), (0, 6), (24, 6, 1)], ids=str)
def test_the_weight_that_does_not_fit_is_named(cell, slot, size):
    weights = weights_of(cell)
    name = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")[slot]
    weights[slot] = torch.zeros(size)
    with pytest.raises(RuntimeError, match=rf"{name} must have shape .*, got \({', '.join(map(str, size))}"):
        getattr(persistrnn.functional, cell)(X, weights)


@pytest.mark.parametrize("size", [6, 7])
def test_a_projection_is_smaller_than_the_state(size):
    weights = [torch.zeros(s) for s in ((24, 4), (24, size), (24,), (24,), (size, 6))]
    with pytest.raises((ValueError, RuntimeError), match=f"smaller than hidden_size=6, got {size}"):
        persistrnn.functional.lstm(X, weights)


# ---- packed sequences ----------------------------------------------------------------------------------------------

PACKED = pack_sequence([torch.zeros(n, INPUT) for n in (3, 2)])


@backends
@cells
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_sizes": PACKED.batch_sizes[:0]}, "got a PackedSequence without a step"),
        ({"batch_sizes": None}, "batch_sizes of a PackedSequence is a 1-D int64 tensor on the CPU, got NoneType"),
        ({"batch_sizes": [2, 2, 1]}, "got list; make the sequence with"),
        ({"batch_sizes": PACKED.batch_sizes.int()}, r"got torch.int32 of size \[3\] on cpu"),
        ({"batch_sizes": PACKED.batch_sizes.to("meta")}, r"on meta"),
        ({"batch_sizes": torch.tensor([1, 2, 2])}, r"never grow .*got \[1, 2, 2\]"),
        ({"batch_sizes": torch.tensor([4, 2, -1])}, r"at least 1.*got \[4, 2, -1\]"),
        ({"data": PACKED.data[:-1]}, r"sum up to the rows of its data, 4, got \[2, 2, 1\]"),
        ({"data": PACKED.data.to_sparse()}, "layout torch.sparse_coo"),
        ({"sorted_indices": torch.tensor([0, 1, 2])}, r"sorted_indices .* each of its 2 rows, got torch.int64 of size"),
        ({"sorted_indices": [0, 1]}, "sorted_indices .*got list"),
        ({"unsorted_indices": torch.tensor([0.0, 1.0])}, "unsorted_indices .*got torch.float32"),
    ],
)
def test_a_packed_sequence_that_cannot_be_is_refused(cell, changed, message, backend):
    run, packed = getattr(persistrnn.functional, cell), PACKED._replace(**changed)
    for options in ({}, {"bidirectional": True}):
        with pytest.raises(RuntimeError, match=message):
            run(packed, weights_of(cell, **options), backend=backend, **options)


# ---- the state of a stream, which anyone may set -------------------------------------------------------------------

USES = {
    "call": lambda s: s(X),
    "step": lambda s: s.step(X[0]),
    "reset": lambda s: s.reset(ROWS),
    "double": lambda s: s.double(),
}
STATES = {
    "lstm": [
        (3, TypeError, r"state is a pair of tensors \(h, c\), got int"),
        ((H, 3), TypeError, "got tuple"),
        ([H, "x"], TypeError, "got list"),
        (H, RuntimeError, r"got one tensor of shape \(1, 2, 6\)"),
        ((H, H, H), RuntimeError, r"state is a pair of tensors \(h, c\), got 3 of them"),
        ((H, H[:, :1]), RuntimeError, r"state is \[L, B, features\].*got \(1, 2, 6\), \(1, 1, 6\); set what a call"),
    ],
    "gru": [
        (3, TypeError, "state is one tensor h, got int"),
        ([H], TypeError, "got list"),
        ((H, H), TypeError, "got tuple"),
        (H[0, 0], RuntimeError, r"got \(6,\); set what a call of the layer returned, or None"),
    ],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("cell", "state", "exception", "message"), [(cell, *row) for cell, rows in STATES.items() for row in rows]
)
def test_a_stream_refuses_what_is_no_state(cell, state, exception, message, use):
    stream = persistrnn.Streaming(LAYERS[cell](INPUT, HIDDEN))
    stream.state = state
    with pytest.raises(exception, match=message):
        USES[use](stream)
    stream.reset()
    USES[use](stream)


def test_a_state_may_be_a_list_as_hx_may():
    layer = persistrnn.LSTM(INPUT, HIDDEN)
    stream, state = persistrnn.Streaming(layer), torch.ones(2, 1, BATCH, HIDDEN)
    stream.state = list(state)
    stream.reset(torch.tensor([True, False]))
    assert torch.equal(torch.stack(stream.state), state * torch.tensor([0.0, 1.0])[:, None])
    assert torch.equal(stream(X), layer(X, tuple(state * torch.tensor([0.0, 1.0])[:, None]))[0])


@pytest.mark.parametrize("batched", [True, False])
@cells
def test_rows_of_another_size_are_refused(cell, batched):
    stream = persistrnn.Streaming(LAYERS[cell](INPUT, HIDDEN))
    with pytest.raises(ValueError, match="rows is a bool tensor"):
        stream.reset(MASK)
    stream(X if batched else X[:, 0])
    for rows in (MASK, ROWS[:1], ROWS if not batched else ROWS[0], ROWS.long()):
        with pytest.raises(ValueError, match=r"rows is a bool tensor of size \((2,)?\)"):
            stream.reset(rows)
    with pytest.raises(RuntimeError, match="the state is on cpu and rows on meta"):
        stream.reset((ROWS if batched else ROWS[0]).to("meta"))
