"""The operators and the autograd around them: every transform of torch that should work does, the others say no.

What the kernels compute is tested in test_scan.py; here one path of torch is compared with another, on the same
kernels, and with `persistrnn.reference` where a derivative is new.
"""

import pytest
import torch
from asked import asked
from pairs import CELLS, make_layer
from pairs import tensors as values
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import persistrnn
from persistrnn import autograd, decide, reference
from persistrnn.kernels import launch
from persistrnn.kernels.planner.hardware import DEVICES

pytestmark = pytest.mark.interpreter

H, B, T, INPUT = 10, 3, 2, 5
NAMES = ("x_gates", "weight_hh", "bias_hh", "h0", "c0")


def layer(cell, **options):
    return make_layer(cell, INPUT, H, backend="persistent", **options)


def tensors(cell, directions=1, steps=T, batch=B, requires_grad=False):
    """x_gates, weight_hh, bias_hh and the states that the cell has."""
    torch.manual_seed(1)
    rows = CELLS[cell].gates * H
    shapes = [(steps, batch, directions, rows), (directions, rows, H), (directions, rows)]
    shapes += [(directions, batch, H)] * CELLS[cell].states
    return [torch.randn(shape).mul_(0.5).requires_grad_(requires_grad) for shape in shapes]


def run(cell, arguments):
    x_gates, weight, bias, *states = arguments
    found = autograd.recurrent(cell, x_gates, weight, bias, states, "ieee")
    return [found.y, *found.finals]


def expected_of(cell, arguments):
    x_gates, weight, bias, *states = arguments
    found = reference.recurrent(cell, x_gates, weight, bias, states)
    return [found.y, *found.finals]


def forward_arguments(cell, save, tensors):
    x_gates, weight, bias, *states = tensors
    return cell, "ieee", save, False, None, 1, x_gates, [weight, bias], None, None, states, []


@pytest.fixture
def launches():
    """launches(): kernel launches since the last call, by name."""
    last = launch.LAUNCHES.copy()

    def since():
        nonlocal last
        before, last = last, launch.LAUNCHES.copy()
        return dict(last - before)

    return since


# ---- the operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "directions", "save"), [("lstm", 1, True), ("lstm", 2, False), ("gru", 2, True), ("gru", 1, False)]
)
def test_forward_operator_keeps_the_contract_of_torch_library(cell, directions, save):
    arguments = forward_arguments(cell, save, tensors(cell, directions))
    torch.library.opcheck(torch.ops.persistrnn.scan_forward.default, arguments)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_operator_keeps_the_contract_of_torch_library(cell, directions):
    arguments = tensors(cell, directions)
    kept = torch.ops.persistrnn.scan_forward(*forward_arguments(cell, True, arguments))
    d_final = [torch.randn(directions, B, H) for _ in arguments[3:]]
    given = cell, "ieee", True, 1, arguments[1], *(None,) * 4, kept, d_final, [torch.randn(T, B, directions, H)]
    torch.library.opcheck(torch.ops.persistrnn.scan_backward.default, given)


# ---- saving only what is needed ------------------------------------------------------------------------------------


@pytest.fixture
def saved_sizes(monkeypatch):
    """Elements of each state's buffer and of saved, of every forward launch."""
    sizes = []
    original = launch.forward

    def forward(*arguments):
        kept = original(*arguments)
        sizes.append([t.numel() for t in (*kept.states, kept.saved) if t is not None])
        return kept

    monkeypatch.setattr(launch, "forward", forward)
    return sizes


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_inference_keeps_nothing_and_equals_training(cell, directions, saved_sizes):
    arguments = tensors(cell, directions, steps=4, requires_grad=True)
    training = run(cell, arguments)
    with torch.no_grad():
        inference = run(cell, arguments)
    detached = run(cell, [t.detach() for t in arguments])
    state, others = directions * B * H, CELLS[cell].states - 1
    full, bare = [6 * state, *[6 * state] * others, 4 * 4 * state], [6 * state]
    assert saved_sizes == [full, bare, bare]
    assert not any(t.requires_grad for t in (*inference, *detached))
    torch.testing.assert_close(inference, [t.detach() for t in training], rtol=0, atol=0)
    torch.testing.assert_close(detached, inference, rtol=0, atol=0)


class Work(TorchDispatchMode):
    """Counts matrix products and sums over some of the dimensions."""

    def __init__(self):
        super().__init__()
        self.products = self.sums = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        self.sums += function is torch.ops.aten.sum.dim_IntList
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_made_for_what_requires_them(cell, needed):
    arguments = dict(zip(NAMES, tensors(cell, 2), strict=False))
    if needed not in arguments:
        pytest.skip("the GRU has no c0")
    expected_leaf = arguments[needed].clone().requires_grad_()
    expected = expected_of(cell, (arguments | {needed: expected_leaf}).values())
    sum(t.square().sum() for t in expected).backward()

    arguments[needed].requires_grad_()
    loss = sum(t.square().sum() for t in run(cell, arguments.values()))
    with Work() as work:
        loss.backward()
    torch.testing.assert_close(arguments[needed].grad, expected_leaf.grad, rtol=1e-4, atol=1e-5)
    for name, tensor in arguments.items():
        assert (tensor.grad is None) == (name != needed), name
    assert work.products == (2 if needed == "weight_hh" else 0), "one product per direction, only for the weights"
    assert work.sums == (1 if needed == "bias_hh" else 0)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_each_output_alone_gives_its_gradient(cell, which):
    """A gradient that autograd does not bring (None) counts as zero."""
    arguments = tensors(cell, 2, requires_grad=True)
    copies = [t.detach().clone().requires_grad_() for t in arguments]
    found, expected = run(cell, arguments), expected_of(cell, copies)
    if which >= len(found):
        pytest.skip("the GRU has no c_n")
    torch.autograd.backward([found[which].square().sum(), expected[which].square().sum()])
    for name, a, b in zip(NAMES, arguments, copies, strict=False):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_backward_twice_over_a_kept_graph_is_the_same():
    arguments = tensors("gru", requires_grad=True)
    loss = run("gru", arguments)[0].square().sum()
    first, second = (torch.autograd.grad(loss, arguments[:4], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_changing_what_the_backward_needs_is_an_error(cell):
    """Not a silently wrong gradient: the output y and the weights are read again by the backward."""
    arguments = tensors(cell, requires_grad=True)
    y, *_ = run(cell, arguments)
    with pytest.raises(RuntimeError, match="modified"):
        y.mul_(2).sum().backward()
    y, *_ = run(cell, arguments)
    with torch.no_grad():
        arguments[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        run(cell, arguments)[0].mul_(2)  # nothing depends on it


# ---- torch.compile, torch.export, checkpoint -----------------------------------------------------------------------


def outputs_and_gradients(function, module, x):
    x = x.clone().requires_grad_()
    outputs = values(function(x))
    sum(t.square().sum() for t in outputs).backward()
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    return [t.detach() for t in outputs], [x.grad, *grads]


@pytest.mark.parametrize("cell", CELLS)
def test_compile_to_a_full_graph_equals_eager(cell, launches):
    module = layer(cell, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(compiled, module, x)
    assert launches() == {"scan_forward": 2, "scan_backward": 2}
    torch.testing.assert_close(found, outputs_and_gradients(module, module, x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-6, atol=1e-6)


# ---- torch.func ----------------------------------------------------------------------------------------------------


def loss_of(module):
    def loss(parameters, x):
        return sum(t.square().sum() for t in values(functional_call(module, parameters, (x,))))

    return loss


@pytest.mark.parametrize(("cell", "in_dim"), [("lstm", 0), ("gru", 1), ("lstm", 2)])
def test_vmap_over_inputs_is_one_launch(cell, in_dim, launches):
    module = layer(cell, bidirectional=True)
    xs = torch.randn(4, T, B, INPUT)
    expected = [torch.stack(ts) for ts in zip(*(values(module(x)) for x in xs), strict=True)]
    assert launches() == {"scan_forward": 4}
    found = vmap(lambda x: values(module(x)), in_dims=in_dim)(xs.movedim(0, in_dim))
    assert launches() == {"scan_forward": 1}, "the mapped dimension is part of the batch"
    torch.testing.assert_close(list(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cell", "mapped"), [("gru", "all"), ("lstm", "weight_hh_l0"), ("gru", "bias_hh_l0")])
def test_vmap_over_weights_is_one_launch_each(cell, mapped, launches):
    module = layer(cell)
    x = torch.randn(T, B, INPUT)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    chosen = list(parameters) if mapped == "all" else [mapped]
    ensembles = {n: torch.stack([parameters[n] * k for k in (1, -1, 2)]) for n in chosen}

    def outputs(own):
        return values(functional_call(module, parameters | own, (x,)))

    found = vmap(outputs)(ensembles)
    assert launches() == {"scan_forward": 3}
    members = [outputs({n: e[i] for n, e in ensembles.items()}) for i in range(3)]
    expected = [torch.stack(ts) for ts in zip(*members, strict=True)]
    torch.testing.assert_close(list(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients_equal_a_loop(cell, launches):
    module = layer(cell, bidirectional=True)
    xs = torch.randn(4, T, 1, INPUT)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    found = vmap(grad(loss_of(module)), in_dims=(None, 0))(parameters, xs)
    assert launches() == {"scan_forward": 1, "scan_backward": 1}
    for i, x in enumerate(xs):
        _, (_, *expected) = outputs_and_gradients(module, module, x)
        torch.testing.assert_close([g[i] for g in found.values()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_jacrev_equals_the_reference(cell, launches):
    arguments = tensors(cell, 2, batch=2)
    numbers = tuple(range(len(arguments)))
    found = jacrev(lambda *a: run(cell, a)[0], argnums=numbers)(*arguments)
    assert launches() == {"scan_forward": 1, "scan_backward": 1}, "all rows of the Jacobian are one batch"
    expected = jacrev(lambda *a: expected_of(cell, a)[0], argnums=numbers)(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "save"), [("lstm", "gates"), ("gru", "gates"), ("lstm", "state")])
def test_tangents_of_a_backward_made_before_are_refused(cell, save):
    """Never tangents of zero."""
    module, x = layer(cell, save=save), torch.randn(T, B, INPUT)
    y, backward = torch.func.vjp(lambda x: module(x)[0], x)
    with pytest.raises(NotImplementedError, match="forward mode: differentiate"):
        jvp(backward, (y,), (y,))


def unsupported(**changed):
    return decide.unsupported(asked(**({"hidden": H, "batch": B} | changed)))


@pytest.fixture
def a_gpu(monkeypatch):
    """A CUDA device of the A100's size, as far as the questions before a launch can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(launch, "hardware", lambda device: DEVICES["a100"])
    return torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_supported(cell, dtype, a_gpu):
    assert unsupported(cell=cell, dtype=dtype) is None
    assert unsupported(cell=cell, dtype=dtype, device=a_gpu, hidden=512, directions=2) is None


REFUSED = [
    ({"dtype": torch.float64}, ("float16, bfloat16 and float32", "got torch.float64")),
    ({"dtype": torch.int64}, ("float16, bfloat16 and float32", "got torch.int64")),
    ({"dtype": torch.float8_e4m3fn}, ("float16, bfloat16 and float32", "got torch.float8_e4m3fn")),
    ({"device": torch.device("meta")}, ("NVIDIA GPUs", "got 'meta'", "'cuda'")),
    ({"hidden": 30_000}, ("hidden_size=30000", "31 bits", "allow hidden_size up to")),
    ({"hip": "6.4"}, ("NVIDIA GPUs", "got an AMD GPU")),
    ({"capability": (7, 5)}, ("8.0", "a GPU with (7, 5)")),
]


@pytest.mark.parametrize(("changed", "parts"), REFUSED)
def test_what_is_refused(a_gpu, monkeypatch, changed, parts):
    if "hip" in changed:
        monkeypatch.setattr(torch.version, "hip", changed["hip"])
    if "capability" in changed:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: changed["capability"])
    given = {name: value for name, value in changed.items() if name not in ("hip", "capability")}
    text = unsupported(**{"device": a_gpu} | given)
    for part in (*parts, "backend='torch'"):
        assert part in text, text


def test_module_raises_what_unsupported_says():
    module = layer("gru", dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"(?s)got torch.float64.*backend='torch'"):
        module(torch.randn(T, B, INPUT, dtype=torch.float64))


# ---- the error word ------------------------------------------------------------------------------------------------


@pytest.fixture
def gave_up():
    """gave_up(): as if a wait of an earlier launch had run out."""
    word = launch._error_word(torch.device("cpu"))
    assert word.tolist() == [0]
    yield lambda: word.fill_(1)
    word.zero_()


GAVE_UP = r"(?s)on cpu gave up waiting.*results are invalid.*PERSISTRNN_DEBUG=1.*backend='torch'"


@pytest.mark.parametrize("cell", CELLS)
def test_next_call_raises_after_a_wait_ran_out(cell, gave_up, launches):
    arguments = tensors(cell, requires_grad=True)
    gave_up()
    with pytest.raises(RuntimeError, match=GAVE_UP):
        run(cell, arguments)
    assert launches() == {}, "nothing is computed from invalid numbers"
    persistrnn.check()  # the word was cleared
    y, *_ = run(cell, arguments)
    gave_up()
    launches()
    with pytest.raises(RuntimeError, match=GAVE_UP):
        y.sum().backward()
    assert launches() == {}


def test_debug_variable_is_read_at_every_launch(monkeypatch):
    """PERSISTRNN_DEBUG checks right after a launch; on the CPU every launch is checked."""
    calls = []
    monkeypatch.setattr(launch, "check", lambda: calls.append(None))
    run("gru", tensors("gru"))
    assert len(calls) == 2, "before and after"
