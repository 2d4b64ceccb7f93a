"""``save=``: equal results in every mode and chunk length, and the bytes that each keeps."""

import functools
from types import SimpleNamespace

import accuracy
import pytest
import torch
from asked import asked
from grid import Delays, concurrent_grid
from pairs import CELLS, as_hx, make_layer, states, tensors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import persistrnn
from persistrnn import chunk_ops, decide
from persistrnn.kernels import launch
from persistrnn.kernels.planner import memory
from persistrnn.kernels.tensors import Gradients, Kept

MODES = memory.MODES


@pytest.fixture
def short(monkeypatch):
    """short(n): chunks of n steps, in every mode and on every path."""

    def chunks(steps):
        monkeypatch.setattr(memory, "chunk_steps", lambda *_: steps)

    return chunks


@pytest.fixture
def saving(monkeypatch):
    """saving(mode): the layers of accuracy.py save so."""

    def save(mode):
        for cell, (ours, theirs) in accuracy.MODULES.items():
            monkeypatch.setitem(accuracy.MODULES, cell, (functools.partial(ours, save=mode), theirs))

    return save


def run(layer, x, state=None, **given):
    """Results and gradients, of everything that has one."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *(state or ()))]
    hx = as_hx(leaves[1:])
    if "reset_state" in given:
        reset = [t.detach().clone().requires_grad_() for t in given["reset_state"]]
        leaves += reset
        given["reset_state"] = as_hx(reset)
    found = tensors(layer(leaves[0], hx, **given))
    torch.manual_seed(7)
    loss = sum((t.float() * torch.randn(t.shape)).sum() for t in found)
    return found, torch.autograd.grad(loss, [*leaves, *layer.parameters()])


def states_of(layer, batch, dtype=torch.float32):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    return states(layer.mode.lower(), rows, batch, layer.hidden_size, dtype=dtype)


def copies(layer, **changed):
    """The same layer with other attributes."""
    same = {"save": layer.save} | ({"cell_dtype": layer.cell_dtype} if layer.mode == "LSTM" else {})
    again = type(layer)(
        layer.input_size, layer.hidden_size, layer.num_layers, bidirectional=layer.bidirectional, backend=layer.backend,
        dtype=layer.weight_hh_l0.dtype, **same | changed,
    )  # fmt: skip
    again.load_state_dict(layer.state_dict())
    return again


# ---- on the kernels -------------------------------------------------------------------------------------------------

# cell, dtype, layers, bidirectional, what cuts the batch, steps and chunk: the last chunk is full, short, of one step.
CASES = [
    ("lstm", torch.bfloat16, 1, False, "", 6, 3),
    ("gru", torch.bfloat16, 1, True, "", 5, 3),
    ("lstm", torch.float32, 2, False, "resets", 6, 4),
    ("gru", torch.float16, 2, False, "lengths", 5, 2),
    ("lstm", torch.float16, 1, True, "both", 5, 4),
    ("gru", torch.float32, 1, True, "resets", 4, 2),
    ("lstm", torch.float32, 2, True, "lengths", 3, 2),
    ("gru", torch.float32, 2, False, "mask", 4, 1),
]


def cuts(kind, steps, batch, layer, dtype):
    resets = torch.rand(steps, batch) < 0.4
    lengths = torch.tensor([steps, 1, 0])
    return {
        "": {},
        "lengths": {"lengths": lengths},
        "resets": {"resets": resets, "reset_state": states_of(layer, batch, dtype)},
        "both": {"lengths": lengths, "resets": resets},
        "mask": {"mask": torch.rand(steps, batch) < 0.6},
    }[kind]


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "dtype", "layers", "bidirectional", "kind", "steps", "chunk"), CASES)
def test_modes_agree(short, cell, dtype, layers, bidirectional, kind, steps, chunk):
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "backend": "persistent", "dtype": dtype}
    if kind == "both":
        options["cell_dtype"] = torch.float32
    layer = make_layer(cell, 5, 7, layers, **options)
    x, state = torch.randn(steps, 3, 5, dtype=dtype), states_of(layer, 3, dtype)
    given = cuts(kind, steps, 3, layer, dtype)
    if cell == "lstm" and kind:
        given["return_cell_states"] = True
    before = launch.LAUNCHES.copy()
    outputs, grads = run(layer, x, state, **dict(given))
    short(chunk)
    found = {mode: run(copies(layer, save=mode), x, state, **dict(given)) for mode in MODES}
    # The same arithmetic gives the same bits, but for float32 products, whose last bit the CPU decides by alignment.
    exact = {"rtol": 0, "atol": 0} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found["checkpoint"], found["gates"], **exact)
    torch.testing.assert_close(found["state"][0], found["gates"][0], **exact)
    if cell == "lstm":  # and all steps at once: the GRU's h is rounded between chunks
        torch.testing.assert_close(found["gates"][0], outputs, **exact)
        # and the gradients of what the highest layer began from, which pass all chunks in float32
        top = [[d[-2 if bidirectional else -1 :] for d in of[1 : 1 + len(state)]] for of in (found["gates"][1], grads)]
        torch.testing.assert_close(*top, **exact)
    # "state" forms its gates by another product, and gradients of weights are summed chunk by chunk.
    bound = 4 * torch.finfo(dtype).eps
    for mode in ("gates", "state"):
        for ours, theirs in zip([*found[mode][0], *found[mode][1]], [*outputs, *grads], strict=True):
            assert (ours.float() - theirs.float()).norm() <= bound * theirs.float().norm() + 1e-30, (mode, ours.shape)
    pieces = layers * -(-steps // chunk)
    assert launch.LAUNCHES - before == {
        "scan_forward": layers + 4 * pieces, "scan_backward": layers + 3 * pieces, "activate": pieces,
    }  # fmt: skip


def test_gradients_of_weights_are_summed_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    sizes = (8, 3), (8,), (8, 2), (8,)
    layer = chunk_ops.Layer(*(torch.zeros(1, *size, dtype=torch.bfloat16) for size in sizes))
    totals = chunk_ops._Totals(layer)
    gates, x, y = (torch.ones(size, dtype=torch.bfloat16) for size in ((1, 1, 1, 1, 8), (1, 1, 3), (1, 3, 1, 1, 2)))
    for _ in range(512):
        totals.add("lstm", Gradients(gates, gates, (), ()), [x], Kept([y], None), None, None)
    for total, weight in zip(totals.rounded(torch.bfloat16), layer[: len(sizes)], strict=True):
        torch.testing.assert_close(total, torch.full_like(weight, 512), rtol=0, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "dtype", "bidirectional", "save"), [("lstm", "bf16", True, "state"), ("gru", "fp32", False, "checkpoint")]
)
def test_modes_keep_the_bound(short, saving, cell, dtype, bidirectional, save):
    short(2)
    saving(save)
    bound = accuracy.Bound(accuracy.DTYPES[dtype])
    for seed in range(3):
        case = accuracy.Case(cell, dtype, 10, 3, 3, 1 if bidirectional else 2, bidirectional, True, True)
        bound.add((case, seed), *accuracy.run(case, seed))
    bound.check()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "save", "protocol", "bidirectional", "operation"),
    [("lstm", "state", "counter", True, "put"), ("gru", "checkpoint", "flags", False, "get")],
)
def test_modes_in_the_concurrent_grid(short, saving, forced, cell, save, protocol, bidirectional, operation):
    short(2)
    saving(save)
    forced(protocol)
    case = accuracy.Case(cell, "fp32", 19, 3, 5, 1 if bidirectional else 2, bidirectional, True, True)
    with concurrent_grid(Delays(operation, slow=1)):
        assert accuracy.failures(case) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "save"), [("lstm", "gates"), ("lstm", "state"), ("gru", "state"), ("gru", "checkpoint")]
)
def test_transforms(short, cell, save):
    """Per-sample gradients, second derivatives, torch.func: those of one launch over all steps."""
    layer = make_layer(cell, 3, 4, bidirectional=save == "state", backend="persistent")
    chunked = copies(layer, save=save)
    x = torch.randn(2, 2, 2, 3)

    def gradients(layer):
        parameters = dict(layer.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

        def penalty(x):
            return torch.func.grad(loss, argnums=1)(parameters, x).square().sum()

        given = x[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(given)[0].square().sum(), given, create_graph=True)
        twice = torch.autograd.grad(first.square().sum(), [given, *layer.parameters()], allow_unused=True)
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return twice, per_sample, torch.func.grad(penalty)(x[0])

    expected = gradients(layer)
    short(1)
    torch.testing.assert_close(gradients(chunked), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("save", MODES)
def test_compiles_and_keeps_the_contract(short, save):
    short(2)
    torch._dynamo.reset()
    layer = persistrnn.LSTM(7, 9, backend="persistent", save=save)  # sizes that no T or B has
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for steps, batch in ((3, 2), (4, 3)):
        x = torch.randn(steps, batch, 7, requires_grad=True)
        found = []
        for call in (compiled, layer):
            y, (h, c) = call(x)
            found.append([y, h, c, *torch.autograd.grad(y.sum() + c.sum(), [x, *layer.parameters()])])
        torch.testing.assert_close(*found)
    assert counter.frame_count <= 2, "one for all sizes, counted once more for its backward"
    weights = [torch.randn(1, 16, n) for n in (3, 1, 4, 1)]
    weights = [w.squeeze(2) if w.size(2) == 1 else w for w in weights]
    state = torch.randn(1, 2, 4)
    given = "lstm", save, "ieee", 2, None, True, False, 1
    inputs = [torch.randn(3, 2, 3), None, None, state, state.clone(), None, None]
    operators = torch.ops.persistrnn
    torch.library.opcheck(operators.chunked_forward.default, (*given, inputs, weights))
    found = chunk_ops.outputs_of("lstm", save, True, False, operators.chunked_forward(*given, inputs, weights))
    kept = found.before if save == "checkpoint" else [*found.every, *found.saved]
    grads = [torch.randn_like(found.every[0]), None, *(torch.randn_like(s) for s in found.finals)]
    every = (*given, [*grads, *inputs, *kept, *weights])
    torch.library.opcheck(operators.chunked_backward.default, every, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.interpreter
@pytest.mark.parametrize(("save", "strict"), [("gates", True), ("state", False), ("checkpoint", False)])
def test_exports_for_every_length(monkeypatch, save, strict):
    """No condition on T comes from the chunks: one program for what is one chunk, and for what is several."""
    monkeypatch.setitem(memory.CHUNK_BYTES, "gates", 1)
    monkeypatch.setattr(memory, "SHORTEST_CHUNK", 16)
    layer = persistrnn.LSTM(7, 9, backend="persistent", save=save)
    dynamic = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
    program = torch.export.export(layer, (torch.randn(5, 4, 7),), dynamic_shapes=(dynamic,), strict=strict).module()
    for steps, batch in ((3, 2), (40, 3)):
        x = torch.randn(steps, batch, 7)
        torch.testing.assert_close(program(x)[0], layer(x)[0])


# ---- bytes ----------------------------------------------------------------------------------------------------------


def measured_peak(call):
    """The most bytes that torch had allocated at once during the call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    level = highest = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


class Loss(torch.autograd.Function):
    """One whose gradient is new memory, which nobody else holds."""

    @staticmethod
    def forward(ctx, y):
        ctx.like = y.shape, y.dtype
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return torch.zeros(ctx.like[0], dtype=ctx.like[1])


def trained_peak(layer, x):
    """Bytes above those before, of a second training step."""
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)

    def train():
        y = layer(x)[0]  # held, as by the layer that reads it
        Loss.apply(y).backward()

    train()
    return measured_peak(train)


@pytest.fixture
def no_kernels(monkeypatch):
    """Everything but the launches, and products as a GPU forms them: without float32 copies."""
    linear = SimpleNamespace(linear=lambda x, w, b: x.new_zeros(*x.shape[:-1], w.shape[0]))
    monkeypatch.setattr(chunk_ops, "F", linear)
    monkeypatch.setattr(launch, "launch_scan", lambda *_, **__: None)
    monkeypatch.setattr(chunk_ops, "_sum", lambda gates: torch.zeros(gates.size(1)))
    monkeypatch.setattr(chunk_ops, "_product", lambda a, b: torch.zeros(*a.shape[:-1], b.shape[-1]))

    class Nothing(dict):
        def __missing__(self, grid):
            return lambda *_, **options: None

    monkeypatch.setattr(launch, "activate", Nothing())


@pytest.mark.interpreter
@pytest.mark.parametrize("save", MODES)
@pytest.mark.parametrize(
    ("cell", "dtype", "layers", "bidirectional", "needs_x"),
    [
        ("lstm", torch.bfloat16, 2, False, False),
        ("gru", torch.bfloat16, 2, True, True),
        ("lstm", torch.float32, 1, True, False),
        ("gru", torch.float32, 1, False, True),
    ],
)
def test_predicted_bytes_are_those_that_are_allocated(
    short, no_kernels, cell, dtype, layers, bidirectional, needs_x, save
):
    H, batch, steps = 64, 8, 2048
    options = {"bidirectional": bidirectional, "backend": "persistent", "dtype": dtype, "save": save}
    layer = make_layer(cell, H, H, layers, **options)
    x = torch.zeros(steps, batch, H, dtype=dtype, requires_grad=needs_x)
    of = asked(cell, H, num_layers=layers, directions=2 if bidirectional else 1, dtype=dtype).layers
    kept = []

    def keep(t):
        kept.append(t)
        return t

    short(16)  # so that the states before the chunks, which "checkpoint" keeps, count
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = layer(x)
    inputs = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*kept, y]}
    found = sum(size for pointer, size in storages.items() if pointer not in inputs)
    # and the weights of two directions, side by side
    assert found == pytest.approx(memory.kept(save, of, 16) * steps * batch, rel=0.05)
    del y, kept[:], storages

    def peaks(chunk):
        short(chunk)
        return trained_peak(layer, x), memory.peak(save, of, batch, steps, chunk, needs_x)

    if dtype == torch.float32 or save != "gates":  # else the one launch's own products make float32 copies on a CPU
        measured, predicted = peaks(steps)
        assert measured == pytest.approx(predicted, rel=0.1)
    (low, predicted_low), (high, predicted_high) = peaks(256), peaks(1024)
    assert (low, high) == pytest.approx((predicted_low, predicted_high), rel=0.1)
    # Of the peak a chunk's own memory is the smaller part: what it grows by with the chunk is that alone.
    assert high - low == pytest.approx(predicted_high - predicted_low, rel=0.05)


def test_chunks_fit_their_bytes_and_shrink_with_the_sequence():
    sizes = {"gates": 4, "hidden": 1024, "batch": 32, "itemsize": 2, "steps": 65_536}
    found = [memory.chunk_steps(mode, directions=directions, **sizes) for mode in MODES for directions in (1, 2)]
    assert found == [4096, 2048, 512, 256, 512, 256]
    assert memory.chunk_steps("state", directions=1, **sizes | {"batch": 4096}) == 128
    small = sizes | {"hidden": 128, "batch": 8, "directions": 1}
    for steps, long, short in ((64, 128, 32), (256, 128, 32), (1024, 128, 64), (4096, 256, 256), (16_384, 1024, 1024)):
        given = small | {"steps": steps}
        found = [memory.chunk_steps("checkpoint", **given, launches=launches) for launches in (True, False)]
        assert found == [long, short]


# ---- the choice, and torch's own path -------------------------------------------------------------------------------


def test_auto_takes_the_fastest_mode_within_the_budget():
    call = asked("lstm", 8, 2, 1000, input_size=3, num_layers=2)
    x = torch.randn(1000, 2, 3)
    needs = {mode: int(decide.needed_bytes(call, mode, on_kernels=False)) for mode in MODES}
    layer = persistrnn.LSTM(3, 8, 2, save="auto", save_budget=needs["gates"] + 1)
    for mode in ("gates", "state"):  # torch's path has two
        layer.save_budget = needs[mode] + 1
        assert f'save="{mode}"' in persistrnn.explain(layer, batch=2, steps=1000)
        layer(x)
    for mode in MODES:
        need = int(decide.needed_bytes(call, mode, on_kernels=True))
        within = call._replace(backend="persistent", save="auto", save_budget=need + 1)
        assert decide.decide(within).call.save == mode
    layer(x, lengths=torch.tensor([1000, 3]))  # which pack the rows on the CPU
    assert layer(x[:, :0])[0].shape == (1000, 0, 8)
    layer.save_budget = needs["checkpoint"] // 2
    with torch.no_grad():  # nothing is kept
        layer(x)
    with pytest.raises(RuntimeError, match=r"save_budget=\d+ bytes do not hold .* raise the budget, or cut"):
        layer(x)


def test_auto_takes_no_mode_that_needs_more():
    """Where one chunk holds all steps, running again needs more than keeping."""
    for on_kernels, steps in ((True, 128), (False, 32)):
        needs = {mode: decide.needed_bytes(asked("gru", 64, 2, steps), mode, on_kernels) for mode in MODES}
        assert min(needs, key=lambda mode: needs[mode]) == "gates", needs


@pytest.mark.parametrize("save", ["gates", "checkpoint"])
@pytest.mark.parametrize(
    ("cell", "dtype", "layers", "bidirectional", "needs_x", "steps"),
    [
        ("lstm", torch.float32, 1, False, False, 64),
        ("lstm", torch.float32, 2, False, True, 1024),
        ("lstm", torch.float32, 2, True, True, 256),
        ("lstm", torch.float32, 1, False, False, 4096),
        ("lstm", torch.float64, 1, True, False, 256),
        ("gru", torch.float32, 1, False, False, 64),
        ("gru", torch.float32, 2, False, True, 512),
        ("gru", torch.bfloat16, 2, True, True, 256),
    ],
)
def test_predicted_bytes_of_torchs_path_are_those_that_are_allocated(
    cell, dtype, layers, bidirectional, needs_x, steps, save
):
    H, batch, directions = 32, max(2, 8192 // steps), 2 if bidirectional else 1
    layer = make_layer(cell, H, H, layers, bidirectional=bidirectional, dtype=dtype, save=save)
    x = torch.zeros(steps, batch, H, dtype=dtype, requires_grad=needs_x)
    call = asked(cell, H, batch, steps, num_layers=layers, directions=directions, dtype=dtype)
    of, chunk = call.layers, decide.chunk_steps(call, save, launches=False)
    onednn = cell == "lstm" and dtype == torch.float32
    predicted = memory.torch_peak(save, of, batch, steps, chunk, onednn, needs_x)
    assert trained_peak(layer, x) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("save", ["state", "checkpoint"])
@pytest.mark.parametrize(
    ("cell", "layers", "bidirectional", "given"),
    [
        ("lstm", 2, False, {}),
        ("gru", 2, True, {}),
        ("lstm", 1, True, {"lengths": torch.tensor([7, 2])}),
        ("gru", 2, False, {"resets": torch.tensor([[0, 1]] * 7, dtype=torch.bool)}),
    ],
)
def test_torch_path_keeps_its_state_now_and_then(short, cell, layers, bidirectional, given, save):
    layer = make_layer(cell, 3, 5, layers, bidirectional=bidirectional)
    x, state = torch.randn(7, 2, 3), states_of(layer, 2)
    expected = run(layer, x, state, **given)
    short(3)
    chunked = copies(layer, save=save)
    torch.testing.assert_close(run(chunked, x, state, **given), expected, rtol=1e-5, atol=1e-6)
    loops = "resets" in given
    assert chunked.last_path == ("stepwise" if loops else "torch")


@pytest.mark.parametrize("cell", CELLS)
def test_torch_path_cuts_packed_sequences(short, cell):
    layer = make_layer(cell, 3, 5, 2)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(8, 3, 3), [8, 6, 2], enforce_sorted=False)

    def results(layer):
        y, final = layer(packed)
        found = [y.data, *tensors(final)]
        return found, torch.autograd.grad(sum((t * t).sum() for t in found), list(layer.parameters()))

    expected = results(layer)
    short(3)
    torch.testing.assert_close(results(copies(layer, save="checkpoint")), expected, rtol=1e-5, atol=1e-6)
    both = make_layer(cell, 3, 5, bidirectional=True)
    torch.testing.assert_close(results(copies(both, save="checkpoint")), results(both), rtol=1e-5, atol=1e-6)


def test_dropout_is_drawn_once(short):
    """The forward that runs again drops the same units."""
    short(4)
    layer = persistrnn.LSTM(4, 8, 2, dropout=0.5, save="checkpoint")
    x = torch.randn(9, 2, 4, requires_grad=True)

    def loss(x):
        torch.manual_seed(3)
        return layer(x)[0].double().square().sum()

    (found,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        difference = (loss(x + 1e-3 * direction) - loss(x - 1e-3 * direction)) / 2e-3
    torch.testing.assert_close((found * direction).sum().double(), difference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("given", [{}, {"resets": torch.zeros(7, 2, dtype=torch.bool)}])
def test_torch_path_inside_torch_func(short, given):
    layer = persistrnn.LSTM(3, 5)
    x = torch.randn(7, 2, 3)

    def gradients(layer):
        def loss(parameters):
            return torch.func.functional_call(layer, parameters, (x,), given)[0].square().sum()

        return torch.func.grad(loss)(dict(layer.named_parameters()))

    expected = gradients(layer)
    short(3)
    torch.testing.assert_close(gradients(copies(layer, save="checkpoint")), expected)
