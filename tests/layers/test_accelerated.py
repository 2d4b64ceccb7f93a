"""`persistrnn.accelerated`: torch's own recurrent functions run on the kernels, and who calls them is unchanged."""

import threading
import warnings

import pytest
import torch
from pairs import CELLS as TWO_CELLS
from pairs import ON_KERNELS, PAIRS, assert_close, assert_same_bits, results, states, tensors
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persistrnn

INPUT, HIDDEN, STEPS, BATCH = 3, 4, 3, 2
interpreter = pytest.mark.interpreter


class Forecaster(nn.LSTM):
    """A layer as a library has it: a subclass with a forward of its own around torch.nn's."""

    def forward(self, x, hx=None):
        y, state = super().forward(2 * x, hx)
        return y + 1, state


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(INPUT, HIDDEN)

    def forward(self, x):
        return self.layer(x)[0]


def layer_and_input(cell="lstm", **options):
    torch.manual_seed(0)
    layer = PAIRS[cell][1](INPUT, HIDDEN, **options)
    return layer, torch.randn((BATCH, STEPS, INPUT) if options.get("batch_first") else (STEPS, BATCH, INPUT))


def accelerated_results(layer, x, hx=None, parameters=None):
    """`results` on the kernels, which must have run each call."""
    with persistrnn.accelerated(backend="persistent") as calls:
        found = results(layer, x, hx, layer.parameters() if parameters is None else parameters)
    assert sum(calls.taken.values()) == 1
    assert not calls.left
    return found


@interpreter
@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("lstm", {"num_layers": 2}),
        ("gru", {"bidirectional": True, "batch_first": True}),
        ("rnn_tanh", {"bias": False}),
        ("rnn_relu", {"num_layers": 2}),
        ("lstm", {"proj_size": 2, "bidirectional": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_torchs_layers_have_torchs_numbers_and_gradients(cell, options, given_state):
    layer, x = layer_and_input(cell, **options)
    hx = None
    if given_state:
        directions = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        given = states(cell, directions, BATCH, HIDDEN)
        if "proj_size" in options:
            given[0] = given[0][..., : options["proj_size"]].contiguous()
        hx = given[0] if len(given) == 1 else tuple(given)
    expected = results(layer, x, hx, layer.parameters())
    assert_close(accelerated_results(layer, x, hx), expected)
    assert type(layer) is PAIRS[cell][1] or isinstance(layer, nn.RNN)


@interpreter
def test_subclass_runs_unchanged():
    layer = Forecaster(INPUT, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUT)
    assert_close(accelerated_results(layer, x), results(layer, x, None, layer.parameters()))


@interpreter
@pytest.mark.parametrize("cell", TWO_CELLS)
def test_packed_rows_in_any_order(cell):
    layer, x = layer_and_input(cell, num_layers=2, bidirectional=True)

    def call(x, hx):
        y, state = layer(pack_padded_sequence(x, torch.tensor([2, 3]), enforce_sorted=False), hx)
        assert isinstance(y, PackedSequence)
        return y.data, state

    expected = results(call, x, None, layer.parameters())
    assert_close(accelerated_results(call, x, None, layer.parameters()), expected)


@interpreter
@pytest.mark.parametrize("function", [torch.gru, torch._VF.gru, torch.ops.aten.gru.input])
def test_functions_are_taken(function):
    layer, x = layer_and_input("gru")
    h0 = torch.zeros(1, BATCH, HIDDEN)
    given = x, h0, list(layer.parameters()), True, 1, 0.0, True, False, False
    expected = function(*given)
    with persistrnn.accelerated(backend="persistent") as calls:
        found = function(*given)
    assert_close(found, expected)
    assert list(calls.taken) == ["gru: input 3, state 4, 1 layers, float32 on cpu"]


@interpreter
def test_script_without_gradients_and_inference_mode_are_taken():
    layer, x = Wrapped(), torch.randn(STEPS, BATCH, INPUT)
    expected = tensors(layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(layer)
    for mode in (torch.no_grad, torch.inference_mode):
        for call in (layer, script):
            with mode(), persistrnn.accelerated(backend="persistent") as calls:
                found = tensors(call(x))
            assert_close(found, expected)
            assert sum(calls.taken.values()) == 1


@interpreter
def test_backward_outside_of_the_block_and_checkpoint_inside():
    layer, x = layer_and_input()
    expected = torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))
    with persistrnn.accelerated(backend="persistent") as calls:
        loss = layer(x)[0].sin().sum()
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)[0].sin().sum()
            of_checkpoint = torch.autograd.grad(again, list(layer.parameters()))
    assert_close(torch.autograd.grad(loss, list(layer.parameters())), expected)
    assert_close(of_checkpoint, expected)
    assert sum(calls.taken.values()) == 3


@interpreter
def test_other_threads_are_in_the_block():
    """As those of DataParallel and of autograd are."""
    layer, x = layer_and_input()
    expected, found = layer(x)[0], []
    with persistrnn.accelerated(backend="persistent") as calls:
        threads = [threading.Thread(target=lambda: found.append(layer(x)[0])) for _ in range(2)]
        for thread in threads:  # one after the other: Triton's interpreter is not for two threads at once
            thread.start()
            thread.join()
    assert_close(found, [expected] * 2)
    assert sum(calls.taken.values()) == 2


@interpreter
def test_nesting_exceptions_and_the_switch():
    layer, x = layer_and_input()
    everywhere = persistrnn.accelerate(backend="persistent")
    try:
        layer(x)
        with persistrnn.accelerated(backend="torch") as inner:
            layer(x)
            innermost = persistrnn.accelerated(backend="persistent")
            with pytest.raises(RuntimeError, match="input"), innermost:
                layer(torch.cat([layer(x)[0], x], -1))
            layer(x)
        layer(x)
    finally:
        assert persistrnn.accelerate(False) is everywhere
    layer(x)
    assert [sum(calls.taken.values()) for calls in (everywhere, inner, innermost)] == [2, 0, 1]
    assert not inner.left, "backend='torch' counts nothing"


@interpreter
def test_blocks_that_do_not_nest():
    layer, x = layer_and_input()
    first, second = persistrnn.accelerated(backend="persistent"), persistrnn.accelerated(backend="persistent")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    layer(x)
    second.__exit__(None, None, None)
    layer(x)
    assert [sum(calls.taken.values()) for calls in (first, second)] == [0, 1]


@interpreter
def test_compiled_inside_and_outside():
    """torch.compile breaks its graph at torch.nn's layers, and what runs between the graphs is taken."""
    layer, x = layer_and_input()
    expected = results(lambda x, hx: layer(x.sin())[0].cos(), x, None, layer.parameters())
    compiled = torch.compile(lambda x, hx: layer(x.sin())[0].cos(), backend="aot_eager")
    assert_close(accelerated_results(compiled, x, None, layer.parameters()), expected)
    assert_same_bits(results(compiled, x, None, layer.parameters()), expected)
    torch._dynamo.reset()


@interpreter
def test_autocast():
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16), persistrnn.accelerated(backend="persistent") as calls:
        found = layer(x)[0]
    assert found.dtype == torch.bfloat16
    assert sum(calls.taken.values()) == 1
    torch.testing.assert_close(found.float(), layer(x)[0], rtol=2e-2, atol=2e-2)


@interpreter
def test_what_the_kernels_cannot_run_is_an_error_where_they_are_asked_for():
    layer, x = layer_and_input(dtype=torch.float64)
    message = 'backend="persistent" cannot run this call: the kernels run float16'
    with persistrnn.accelerated(backend="persistent"), pytest.raises(RuntimeError, match=message):
        layer(x.double())


@interpreter
def test_our_own_layers_keep_their_own_backend():
    layer, x = persistrnn.GRU(INPUT, HIDDEN, backend="torch"), torch.randn(STEPS, BATCH, INPUT)
    expected = layer(x)
    with persistrnn.accelerated(backend="persistent") as calls:
        assert_same_bits(layer(x), expected)
    assert layer.last_path == "torch"
    assert not calls.taken


@pytest.mark.parametrize("backend", ["auto", ON_KERNELS])
@pytest.mark.parametrize("cell", TWO_CELLS)
def test_transforms_are_torchs(cell, backend):
    layer, x = layer_and_input(cell)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].sin().sum()

    expected = torch.func.grad(loss)(parameters, x)
    with persistrnn.accelerated(backend=backend) as calls:
        found = torch.func.grad(loss)(parameters, x)
        with forward_ad.dual_level(), torch.backends.mkldnn.flags(enabled=False):
            dual = layer(forward_ad.make_dual(x, torch.ones_like(x)))[0]
            assert forward_ad.unpack_dual(dual).tangent.abs().sum() > 0
    assert_same_bits(found, expected)
    assert not calls.taken


def test_on_a_cpu_all_is_torchs_and_says_why():
    layer, x = layer_and_input("gru", num_layers=2)
    expected = results(layer, x, None, layer.parameters())
    with persistrnn.accelerated() as calls:
        found = results(layer, x, None, layer.parameters())
    assert_same_bits(found, expected)
    assert not calls.taken
    assert str(calls) == (
        "0 calls on the kernels, 1 left to torch\n"
        "  1 x gru: input 3, state 4, 2 layers, float32 on cpu left: "
        'backend="auto" runs CPU tensors on torch\'s own kernels; move the tensors to a GPU.'
    )


def test_torch_says_what_is_wrong_with_a_call():
    layer, _ = layer_and_input("gru")
    given = torch.randn(STEPS, BATCH, INPUT + 1), torch.zeros(1, BATCH, HIDDEN), list(layer.parameters())
    how = True, 1, 0.0, True, False, False
    with pytest.raises(RuntimeError) as expected:
        torch.gru(*given, *how)
    with persistrnn.accelerated() as calls, pytest.raises(RuntimeError) as found:
        torch.gru(*given, *how)
    assert str(found.value) == str(expected.value)
    ((_, reason),) = calls.left
    assert reason.startswith("it is no call of persistrnn's: ")


def test_compilers_and_exporters_see_torchs_operators():
    """Also after they were given an implementation of ours: the program is the one without it."""
    layer, x = layer_and_input()

    def exported():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export's own, of the layer's flat weights
            program = torch.export.export(layer, (x,))
            return [str(node.target) for node in program.run_decompositions().graph.nodes]

    expected, eager = exported(), layer(x)
    with persistrnn.accelerated():
        inside = exported()
    assert inside == exported() == expected
    assert_same_bits(layer(x), eager)


def test_a_record_stays_small():
    with persistrnn.accelerated() as calls:
        for size in range(1, 80):
            nn.GRU(size, 1)(torch.zeros(1, 1, size))
    assert sum(calls.left.values()) == 79
    assert len(calls.left) == 65


def test_decorated_function_and_bad_arguments():
    layer, x = layer_and_input()
    calls = persistrnn.accelerated()
    calls(layer)(x)
    assert sum(calls.left.values()) == 1
    with pytest.raises(ValueError, match="backend is one of 'auto', 'persistent', 'torch', got 'cuda'"):
        persistrnn.accelerated(backend="cuda")
    with pytest.raises(TypeError, match="on should be of type bool, got: int"):
        persistrnn.accelerate(1)
