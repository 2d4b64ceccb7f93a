"""torch's transforms, and the older forms of the same, on every path: against loops and torch.nn in float64."""

import pytest
import torch
from pairs import BACKENDS, PAIRS, make_layer, tensors
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persistrnn
from persistrnn import stepwise

T, B, INPUT, H, N = 3, 2, 2, 4, 3
PACKED = pack_padded_sequence(torch.zeros(T, B, INPUT), torch.tensor([2, 3]), enforce_sorted=False)
OPTIONS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([3, 1])},
    "mask": {"mask": torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()},
    "resets": {"resets": torch.tensor([[0, 0], [0, 1], [1, 0]]).bool()},
}
LAYERS = {
    "lstm": ("lstm", {}),
    "gru, two layers in two directions": ("gru", {"num_layers": 2, "bidirectional": True}),
    "projections": ("lstm", {"proj_size": 2, "bias": False}),
    "heads": ("gru", {"heads": 2}),
    "state": ("lstm", {"save": "state"}),
    "checkpoint": ("rnn_tanh", {"save": "checkpoint", "num_layers": 2}),
}
close = torch.testing.assert_close


def layer_of(name, backend="auto", **more):
    cell, options = LAYERS[name]
    return make_layer(cell, INPUT, H, backend=backend, **options | more)


def as_packed(x):
    """The rows of x [T, B, I] that a PackedSequence has, as one."""
    return PackedSequence(torch.cat([x[t, :n] for t, n in enumerate(PACKED.batch_sizes.tolist())]), *PACKED[1:])


def function_of(layer, given):
    if given == "packed":
        return lambda x: layer(as_packed(x))[0].data
    return lambda x: layer(x, **OPTIONS[given])[0]


def truth_of(name, given):
    """Its Jacobian, and its Hessian of the sum of squares, in float64: one backward after the other."""
    layer = layer_of(name).double()
    x = torch.randn(T, B, INPUT, generator=torch.Generator().manual_seed(1))
    f = function_of(layer, given)
    return x, functional.jacobian(f, x.double()), functional.hessian(lambda a: f(a).square().sum(), x.double())


def of_dual_numbers(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def rows_of(f, x):
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    basis = torch.eye(y.numel()).unflatten(1, y.shape)
    return torch.autograd.grad(y, leaf, basis, is_grads_batched=True)[0].unflatten(0, y.shape)


JACOBIANS = {
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "batched backward": rows_of,
    "vectorized": lambda f, x: functional.jacobian(f, x, vectorize=True),
    "forward mode": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "vmap of vjp": lambda f, x: vmap(vjp(f, x)[1])(torch.eye(f(x).numel()).unflatten(1, f(x).shape))[0].unflatten(
        0, f(x).shape
    ),
}
PRODUCTS = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "dual numbers": of_dual_numbers,
    "without grad mode": torch.no_grad()(of_dual_numbers),
    "vmap of jvp": lambda f, x, v: vmap(lambda v: jvp(f, (x,), (v,))[1])(v.unsqueeze(0))[0],
    "of the backward": lambda f, x, v: functional.jvp(f, x, v)[1],
}
HESSIANS = {
    "hessian": lambda f, x: hessian(f)(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(f))(x),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(f))(x),
    "vectorized": lambda f, x: functional.hessian(f, x, vectorize=True),
    "forward over reverse": lambda f, x: functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "vmap of it": lambda f, x: vmap(hessian(f))(torch.stack([2 * x, x]))[1],
}
# Of layers and of what cuts their rows, those that differ in the path or in what is differentiated.
TRIED = [
    ("lstm", "plain"),
    ("lstm", "lengths"),
    ("gru, two layers in two directions", "plain"),
    ("gru, two layers in two directions", "packed"),
    ("projections", "mask"),
    ("heads", "resets"),
    ("state", "plain"),
    ("checkpoint", "plain"),
]
ON_KERNELS = [0, 6]  # of these, as each launch is interpreted
EVERYWHERE = [(*tried, "auto") for tried in TRIED]
EVERYWHERE += [pytest.param(*TRIED[k], "persistent", marks=pytest.mark.interpreter) for k in ON_KERNELS]


@pytest.mark.parametrize(("name", "given", "backend"), EVERYWHERE)
def test_derivatives_in_every_form(name, given, backend):
    x, jacobian, second = truth_of(name, given)
    layer = layer_of(name, backend)
    f = function_of(layer, given)
    v = torch.linspace(-1, 1, x.numel()).view_as(x)
    product = (jacobian * v).sum((-3, -2, -1))
    # The kernels are interpreted, and in chunks of time they run once for each row of a Jacobian.
    short = backend == "persistent"
    forms = ["batched backward"] if short and "save" in LAYERS[name][1] else list(JACOBIANS)[: 4 if short else None]
    for form in forms:
        of = JACOBIANS[form]
        close(of(f, x).double(), jacobian, rtol=1e-4, atol=1e-5, msg=lambda m, form=form: f"{form}: {m}")
    for form, of in PRODUCTS.items():
        close(of(f, x, v).double(), product, rtol=1e-4, atol=1e-5, msg=lambda m, form=form: f"{form}: {m}")
    for form, of in list(HESSIANS.items())[: 1 if short else None]:
        found = of(lambda a: f(a).square().sum(), x).double()
        close(found, second, rtol=1e-3, atol=1e-4, msg=lambda m, form=form: f"{form}: {m}")


@pytest.mark.parametrize(("name", "given", "backend"), EVERYWHERE)
def test_maps_over_inputs_and_samples(name, given, backend):
    layer = layer_of(name, backend)
    f, xs = function_of(layer, given), torch.randn(N, T, B, INPUT)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    close(vmap(f)(xs), torch.stack([f(x) for x in xs]))

    def loss(parameters, x):
        return function_of(lambda *a, **k: functional_call(layer, parameters, a, k), given)(x).square().sum()

    samples = [torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for x in xs]
    per_sample = vmap(grad(loss), (None, 0))(parameters, xs)
    together = grad(lambda p: vmap(loss, (None, 0))(p, xs).sum())(parameters)
    for found, total, *expected in zip(per_sample.values(), together.values(), *samples, strict=True):
        close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
        close(total, sum(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "given", "backend"), EVERYWHERE)
def test_maps_over_models(name, given, backend):
    models = []
    for k in range(N):
        models.append(layer_of(name, backend))
        with torch.no_grad():
            for p in models[-1].parameters():
                p.mul_(1 + k / 2)
    parameters, _ = stack_module_state(models)
    x = torch.randn(T, B, INPUT)

    def call(parameters):
        return function_of(lambda *a, **k: functional_call(models[0], parameters, a, k), given)(x)

    close(vmap(call)(parameters), torch.stack([function_of(m, given)(x) for m in models]))
    found = vmap(grad(lambda p: call(p).square().sum()))(parameters)
    for k, model in enumerate(models):
        expected = torch.autograd.grad(function_of(model, given)(x).square().sum(), list(model.parameters()))
        close([g[k] for g in found.values()], list(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", PAIRS)
def test_maps_over_steps_and_states(cell, backend):
    layer = make_layer(cell, INPUT, H, batch_first=True, backend=backend)
    xs, v = torch.randn(N, B, INPUT), torch.randn(B, INPUT)
    _, state = layer.step(xs[0])
    steps = tensors([layer.step(x, state) for x in xs])
    found = vmap(lambda x: layer.step(x, state))(xs)
    close(tensors([layer.step(xs[0], state)]), [t[0] for t in tensors(found)])
    close(found[0], torch.stack(steps[:: len(steps) // N]))
    tangent = jvp(lambda x: layer.step(x, state)[0], (xs[0],), (v,))[1]
    close(tangent, functional.jvp(lambda x: layer.step(x, state)[0], xs[0], v)[1], rtol=1e-4, atol=1e-5)
    several = [torch.stack([s, -s]) for s in tensors(state)]
    given = tuple(several) if len(several) > 1 else several[0]
    found = vmap(lambda s: layer.step(xs[0], s)[0])(given)
    one = tuple(s[1] for s in several) if len(several) > 1 else several[0][1]
    close(found[1], layer.step(xs[0], one)[0])


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_a_map_over_inputs_is_one_call_of_torchs_kernels(in_dim, monkeypatch):
    """As `last_path` says it; with batch_first too, and two maps deep step by step."""
    layer = make_layer("lstm", INPUT, H, batch_first=in_dim == 1)
    monkeypatch.setattr(stepwise.reference, "recurrent", None)
    xs = torch.randn(N, T, B, INPUT)
    expected = torch.stack([layer(x)[0] for x in xs])
    close(vmap(lambda x: layer(x)[0], in_dim)(xs.movedim(0, in_dim)), expected)
    assert layer.last_path == "torch"
    monkeypatch.undo()
    close(vmap(vmap(lambda x: layer(x)[0]))(xs.unsqueeze(0))[0], expected)
    assert layer.last_path == "stepwise"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_under_each_randomness(backend):
    layer = make_layer("gru", INPUT, H, 2, dropout=0.5, backend=backend)
    xs = torch.randn(1, T, B, INPUT).expand(N, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: layer(x)[0])(xs)
    same = vmap(lambda x: layer(x)[0], randomness="same")(xs)
    close(same[0], same[1])
    different = vmap(lambda x: layer(x)[0], randomness="different")(xs)
    assert not torch.allclose(different[0], different[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_cells_and_cell_states(backend):
    layer = persistrnn.Recurrent("peephole", INPUT, H, backend=backend)
    x, v = torch.randn(T, B, INPUT), torch.randn(T, B, INPUT)

    def f(x):
        return layer(x, return_cell_states=True)[2]

    expected = functional.jvp(f, x, v)[1]
    close(jvp(f, (x,), (v,))[1], expected, rtol=1e-4, atol=1e-5)
    close(of_dual_numbers(f, x, v), expected, rtol=1e-4, atol=1e-5)
    close(vmap(f)(torch.stack([x, v])), torch.stack([f(x), f(v)]))


# dynamo's own, on any tensor with a history that crosses a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("of", "backend"),
    [(of, "auto") for of in ("jvp", "vmap", "grad", "jacrev", "jacrev of weights", "vmap of grad")]
    + [pytest.param("jacrev of weights", "persistent", marks=pytest.mark.interpreter)],
)
def test_compiles_or_breaks_the_graph(of, backend):
    torch._dynamo.reset()
    layer, x = make_layer("lstm", INPUT, H, backend=backend), torch.randn(T, B, INPUT)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def call(weights, x):
        return functional_call(layer, weights, (x,))[0]

    forms = {
        "jvp": lambda x: jvp(lambda x: layer(x)[0], (x,), (x,))[1],
        "vmap": lambda x: vmap(lambda x: layer(x)[0])(torch.stack([x, 2 * x])),
        "grad": grad(lambda x: layer(x)[0].square().sum()),
        "jacrev": jacrev(lambda x: layer(x)[0][-1].sum(0)),
        "jacrev of weights": lambda x: jacrev(lambda w: call(w, x)[-1].sum(0))(weights),
        "vmap of grad": lambda x: vmap(grad(lambda w, x: call(w, x).square().sum()), (None, 0))(
            weights, torch.stack([x, 2 * x])
        ),
    }
    compiled = torch.compile(forms[of], backend="aot_eager", fullgraph=of in ("grad", "jacrev", "jacrev of weights"))
    close(compiled(x), forms[of](x))


JACREV = {
    "lengths": ("gru", {"num_layers": 2, "bidirectional": True}, {"lengths": torch.tensor([3, 1])}),
    "chunks of time": ("lstm", {"save": "checkpoint"}, {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", JACREV)
def test_a_compiled_jacobian_of_each_operator(name, backend):
    torch._dynamo.reset()
    cell, options, given = JACREV[name]
    layer, x = make_layer(cell, INPUT, H, backend=backend, **options), torch.randn(T, B, INPUT)
    f = jacrev(lambda x: layer(x, **given)[0][-1].sum(0))
    close(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_jacobian_of_a_cells_own_parameters(backend):
    torch._dynamo.reset()
    layer, x = persistrnn.PeepholeLSTM(INPUT, H, backend=backend), torch.randn(T, B, INPUT)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    f = jacrev(lambda w: functional_call(layer, w, (x,))[0][-1].sum(0))
    close(torch.compile(f, backend="aot_eager", fullgraph=True)(weights), f(weights))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own, of linearize
@pytest.mark.parametrize("given", ["plain", "lengths", "packed"])
@pytest.mark.parametrize("cell", PAIRS)
def test_linearizes(cell, given):
    layer, x = make_layer(cell, INPUT, H, bidirectional=True), torch.randn(T, B, INPUT)
    f = function_of(layer, given)
    close(linearize(f, x)[1](x), functional.jvp(f, x, x)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_of_weights_without_gradients(backend):
    layer = make_layer("lstm", INPUT, H, bidirectional=True, backend=backend).requires_grad_(False)
    x, weights = torch.randn(T, B, INPUT), dict(layer.named_parameters())
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(w, w) for name, w in weights.items()}
        found = forward_ad.unpack_dual(functional_call(layer, duals, (x,))[0]).tangent
    expected = jvp(lambda weights: functional_call(layer, weights, (x,))[0], (weights,), (weights,))[1]
    close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_path_is_told(backend):
    layer = make_layer("lstm", INPUT, H, backend=backend)

    def told(x):
        text = persistrnn.explain(layer, B, T)
        assert ("stepwise" in text.split("why")[0]) == expected
        layer(x)
        return x

    x = torch.randn(T, B, INPUT)
    expected = True
    jvp(told, (x,), (x,))
    assert layer.last_path == "stepwise"
    expected = False
    told(x)
    vmap(told)(x.unsqueeze(0))
    assert layer.last_path == ("torch" if backend == "auto" else "persistent")


def test_torch_nn_agrees_where_it_has_a_rule():
    layer, theirs = make_layer("gru", INPUT, H, dtype=torch.float64), nn.GRU(INPUT, H, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    x, v = torch.randn(2, T, B, INPUT, dtype=torch.float64)
    close(*(jvp(lambda x, m=m: m(x)[0], (x,), (v,))[1] for m in (layer, theirs)))
