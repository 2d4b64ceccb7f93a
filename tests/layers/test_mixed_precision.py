"""Autocast, GradScaler, parameters in half precision and float32's precision: dtypes and values are torch.nn's."""

import copy
import inspect

import pytest
import torch
from anywhere import anywhere
from pairs import CELLS, PATHS, as_hx, assert_same_bits, make_layer, pair, results, states, tensors
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.torch_path

HALVES = [torch.float16, torch.bfloat16]
STEPS, BATCH, INPUT, HIDDEN = 3, 2, 4, 6


def make_pair(cell, backend="torch", **options):
    return pair(cell, INPUT, HIDDEN, backend=backend, **options)


def state_of(cell, *shape, dtype=torch.float32):
    return as_hx(states(cell, *shape, dtype=dtype))


def to_dtype(state, dtype):
    return tree_map(lambda t: t.to(dtype), state)


def run(layer, x, hx=None, autocast=None, parameters=None):
    """(outputs, gradients of the input, the states and the parameters); the loss is outside of autocast."""

    def call(*given):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return layer(*given)

    return results(call, x, hx, parameters or layer.parameters())


def dtypes(outputs):
    return [t.dtype for t in tensors(outputs)]


# --- autocast -------------------------------------------------------------------------------------------------


# In which every two occur together.
GIVEN = pytest.mark.parametrize(
    ("half", "input_dtype", "state_dtype"),
    [
        (torch.float16, "float32", None), (torch.bfloat16, "half", None),
        (torch.float16, "half", "float32"), (torch.bfloat16, "float32", "float32"),
        (torch.float16, "float32", "half"), (torch.bfloat16, "half", "half"),
    ],
)  # fmt: skip


@GIVEN
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_outputs_and_gradients_are_torch_nn(cell, half, input_dtype, state_dtype):
    given = {"float32": torch.float32, "half": half}
    x = torch.randn(STEPS, BATCH, INPUT).to(given[input_dtype])
    hx = None if state_dtype is None else state_of(cell, 4, BATCH, HIDDEN, dtype=given[state_dtype])
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True)
    parameters = list(theirs.parameters())
    actual, expected = run(ours, x, hx, half), run(anywhere(theirs), x, hx, half, parameters)
    assert_same_bits(actual, expected)
    assert {g.dtype for g in actual[1][-len(list(ours.parameters())) :]} == {torch.float32}


SHAPES = {
    "lstm": {},
    "gru": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "gru stack": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "proj_size": 2},
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@GIVEN
@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_has_one_dtype_whatever_is_asked_for(shape, half, input_dtype, state_dtype):
    """And one result, to rounding; so on every CPU."""
    cell, options = "gru" if "gru" in shape else "lstm", SHAPES[shape]
    given = {"float32": torch.float32, "half": half}
    ours, theirs = make_pair(cell, **options)
    x = torch.randn(STEPS, BATCH, INPUT).to(given[input_dtype])
    hx = None
    if state_dtype is not None:
        rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        state = torch.randn(2, rows, BATCH, HIDDEN).to(given[state_dtype])
        hx = (state[0, ..., : options.get("proj_size", HIDDEN)], state[1]) if cell == "lstm" else state[0]
    everywhere = torch.ones(STEPS, BATCH, dtype=torch.bool)
    calls = {
        "lengths": {"lengths": torch.full((BATCH,), STEPS)},
        "mask": {"mask": everywhere},
        "resets": {"resets": ~everywhere},
        "both": {"lengths": torch.full((BATCH,), STEPS), "resets": ~everywhere, "reset_state": hx},
    }
    with torch.autocast("cpu", dtype=half):
        expected = anywhere(theirs)(x, hx)
        assert dtypes(ours(x, hx)) == dtypes(expected)
        for name, asked in calls.items():
            found = ours(x, hx, **asked)
            assert dtypes(found) == dtypes(expected), name
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        if state_dtype == "float32" and input_dtype == "float32" and half == torch.bfloat16:
            torch._dynamo.reset()
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
            for asked in ({}, calls["both"]):
                found = compiled(x, hx, **asked)
                assert dtypes(found) == dtypes(expected)
                torch.testing.assert_close(found, ours(x, hx, **asked), rtol=1e-6, atol=1e-6)
        if cell == "lstm":
            output, final, c = ours(x, hx, return_cell_states=True)
            assert dtypes((output, final)) == dtypes(expected)
            assert c.dtype == final[1].dtype
        if not options.get("bidirectional"):
            y, final = ours.step(x[0], hx)
            assert dtypes((y, final)) == dtypes(expected)
        if "proj_size" not in options:
            for save in ("state", "checkpoint"):
                ours.save = save
                for asked in ({}, *calls.values()):
                    assert dtypes(ours(x, hx, **asked)) == dtypes(expected), save
        nothing = None if hx is None else tree_map(lambda t: t[:, :0], hx)
        ours.save = "gates"
        for asked in ({}, {"mask": everywhere[:, :0]}):
            assert dtypes(ours(x[:, :0], nothing, **asked)) == dtypes(expected)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 2]])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_of_a_packed_sequence_is_torch_nn(cell, half, lengths):
    """In the dtype that torch.nn has where the rows are equally long: where they are not, it has another one."""
    ours, theirs = make_pair(cell, num_layers=2)
    packed = pack_padded_sequence(torch.randn(STEPS, BATCH, INPUT), lengths)
    with torch.autocast("cpu", dtype=half):
        output, final = ours(packed)
        expected = anywhere(theirs)(packed)
        assert_same_bits([output.data, *tensors(final)], [expected[0].data, *tensors(expected[1])])
        assert set(dtypes((output.data, final))) == {half if cell == "lstm" else torch.float32}
        if cell == "lstm":
            output, final, c = ours(packed, return_cell_states=True)
            assert set(dtypes((output.data, final, c.data))) == {half}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "half", "input_dtype"), [("lstm", torch.float16, torch.float32), ("gru", torch.bfloat16, torch.bfloat16)]
)
def test_autocast_on_the_kernels_is_the_cast_layer(cell, half, input_dtype):
    """Outputs in autocast's dtype, as torch.nn has them on a GPU, and each gradient in its own tensor's dtype."""
    layer, _ = make_pair(cell, "persistent", num_layers=2)
    x, hx = torch.randn(STEPS, BATCH, INPUT).to(input_dtype), state_of(cell, 2, BATCH, HIDDEN)
    outputs, gradients = run(layer, x, hx, half)
    assert layer.last_path == "persistent"
    assert {t.dtype for t in outputs} == {half}
    assert [g.dtype for g in gradients] == [x.dtype] + [torch.float32] * (len(gradients) - 1)

    cast = copy.deepcopy(layer).to(half)
    expected_outputs, expected_gradients = run(cast, x.to(half), to_dtype(hx, half))
    assert_same_bits(outputs, expected_outputs)
    assert_same_bits(gradients, [e.to(g.dtype) for e, g in zip(expected_gradients, gradients, strict=True)])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_switched_off_inside_gives_float32(cell, backend):
    layer, _ = make_pair(cell, backend)
    x = torch.randn(STEPS, BATCH, INPUT)
    expected = tensors(layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same_bits(tensors(layer(x)), expected)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_takes_the_state_it_returned(cell, backend):
    """A sequence in two pieces, the second with the first one's state, is the whole sequence, to the state's dtype."""
    layer, _ = make_pair(cell, backend)
    x = torch.randn(2 * STEPS, BATCH, INPUT).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, last = layer(x)
        first, state = layer(x[:STEPS])
        second, end = layer(x[STEPS:], state)
    assert first.dtype == tensors(state)[0].dtype == second.dtype
    torch.testing.assert_close((torch.cat([first, second]), end), (whole, last), rtol=0.02, atol=5e-3)


@pytest.mark.interpreter
def test_compiled_kernels_follow_autocast():
    """One compiled layer, called without autocast and with it."""
    layer, _ = make_pair("gru", "persistent")
    x = torch.randn(STEPS, BATCH, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for autocast in (None, torch.bfloat16):
        actual, expected = run(compiled, x, autocast=autocast), run(layer, x, autocast=autocast)
        assert {t.dtype for t in actual[0]} == {autocast or torch.float32}
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# --- GradScaler -----------------------------------------------------------------------------------------------


def train(layer, x, scaler, steps):
    """Steps with autocast in float16 and a scaled loss; the scale after each."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    scales = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            y, _ = layer(x)
        loss = (y.float() - 0.25).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def values_of(layer):
    return [p.detach().clone() for p in layer.parameters()]


# of the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_step_with_overflow_is_skipped(cell, backend):
    """2^40 times a gradient is no float16; 2^8 times it is one."""
    layer, _ = make_pair(cell, backend, num_layers=2)
    before = values_of(layer)
    x = torch.randn(STEPS, BATCH, INPUT).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32, growth_interval=100)
    assert train(layer, x, scaler, 1) == [2.0**8]
    assert not any(p.grad.isfinite().all() for p in layer.parameters())
    assert_same_bits(values_of(layer), before)
    assert train(layer, x, scaler, 1) == [2.0**8]
    for old, new in zip(before, values_of(layer), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(new, old)


# --- parameters in half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("half", [*HALVES, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_of_another_dtype_have_torch_nn_gradients(cell, half):
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True, dtype=half)
    x, hx = torch.randn(STEPS, BATCH, INPUT).to(half), state_of(cell, 4, BATCH, HIDDEN, dtype=half)
    actual = run(ours, x, hx)
    assert {t.dtype for t in tensors(actual)} == {half}
    assert_same_bits(actual, run(theirs, x, hx))


# --- float32 --------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "compiled"), [("lstm", False), ("gru", False), ("lstm", True)])
def test_fp32_precision_reaches_forward_and_backward(cell, compiled, monkeypatch):
    """As it is at the forward: a backward has its forward's precision, and a compiled layer follows the setting."""
    from persistrnn.kernels import launch

    seen = []

    def recorded(name, original):
        def call(*args, **kwargs):
            seen.append((name, inspect.signature(original).bind(*args, **kwargs).arguments["precision"]))
            return original(*args, **kwargs)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, recorded(name, getattr(launch, name)))
    layer, _ = make_pair(cell, "persistent")
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for setting, other in (("ieee", "tf32"), ("tf32", "ieee")):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", setting)
        y, _ = call(torch.randn(STEPS, BATCH, INPUT))
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", other)
        y.sum().backward()
        assert seen == [("forward", setting), ("backward", setting)]
        seen.clear()


@pytest.mark.parametrize("given", HALVES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_where_autocast_is_of_the_other_half(cell, given):
    """Rows of 17 steps, which torch's path joins from parts; autocast itself joins no float16 with bfloat16."""
    layer, (other,) = make_layer(cell, INPUT, HIDDEN, dtype=given), [h for h in HALVES if h != given]
    x, lengths = torch.randn(17, BATCH, INPUT, dtype=given), torch.arange(17, 17 - BATCH, -1)
    with torch.autocast("cpu", dtype=other):
        y = layer(x, lengths=lengths)[0]
        assert y.dtype == layer(x)[0].dtype
    y.float().sum().backward()
    expected = layer.float()(x.float(), lengths=lengths)[0]
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
