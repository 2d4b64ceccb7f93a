"""Other people's code computes the same: Keras on torch, ONNX's reference evaluator, ONNX Runtime.

The packages are the extra `models`; without one of them, its tests are skipped. How their weights are made of ours:

    ONNX     W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H]: weight_ih, weight_hh, bias_ih and bias_hh with their gates in
             ONNX's order; P [D, 3*H]: weight_ci, weight_co, weight_cf. With input_forget=1 the gate is i, and f is
             1 - i: the rows of i are those of our f with the other sign
    Keras    kernel [I, G*H], recurrent_kernel [H, G*H]: transposed, gates in Keras's order; bias: the sum of both, of a
             GRU with reset_after=True both [2, G*H]
"""

import warnings
from typing import Any

import pytest
import torch
from pairs import as_hx, tensors
from torch import Tensor, nn

import persistrnn
from persistrnn.kernels.cells import BUILT_IN

T, B, INPUT, H = 6, 3, 4, 5
LENGTHS = [4, T, 1]
BOUND = {"rtol": 1e-5, "atol": 2e-6}  # float32, on either side

# Our gates in our order, the same in ONNX's order, ONNX's operator and its attributes.
ONNX: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "lstm": ("ifgo", "iofg", "LSTM", {}),
    "peephole": ("ifgo", "iofg", "LSTM", {}),
    "coupled": ("fgo", "iofg", "LSTM", {"input_forget": 1}),
    "gru": ("rzn", "zrn", "GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("rzn", "zrn", "GRU", {"linear_before_reset": 0}),
    "rnn_tanh": ("h", "h", "RNN", {"activations": ["Tanh"]}),
    "rnn_relu": ("h", "h", "RNN", {"activations": ["Relu"]}),
}
PEEPHOLES = ("weight_ci", "weight_co", "weight_cf")
DIRECTIONS = {"forward": [0], "reverse": [1], "bidirectional": [0, 1]}
# ONNX's reference evaluator (of 1.23) ignores sequence_lens and input_forget and knows no Relu: there ONNX Runtime is
# the only witness.
ONLY_RUNTIME = {"coupled", "rnn_relu"}


def module(name: str) -> Any:
    """The module, or a skipped test. Its own warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} does not import: pip install 'persistrnn[models]'")


def made(cell: str, backend: str = "torch") -> tuple[nn.Module, Tensor, list[Tensor]]:
    """Our layer of both directions, an input, and first states."""
    torch.manual_seed(0)
    layer = persistrnn.Recurrent(cell, INPUT, H, bidirectional=True, backend=backend)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.7)  # gates far from a half, biases and peepholes that matter
    count = 2 if ONNX[cell][2] == "LSTM" else 1
    return layer, torch.randn(T, B, INPUT), [torch.randn(2, B, H) for _ in range(count)]


def ours(layer: nn.Module, x: Tensor, hx: list[Tensor], ways: list[int], lengths: Tensor | None) -> list[Tensor]:
    """y [T, D, B, H] and the final states [D, B, H], as ONNX lays them out, of some of the layer's directions."""
    y, *states = tensors(layer(x, as_hx(hx), lengths=lengths))
    return [y.unflatten(-1, (2, H)).transpose(1, 2)[:, ways], *(state[ways] for state in states)]


def of_onnx(cell: str, name: str, given: dict[str, Tensor]) -> Tensor:
    """A weight or a bias with its gates in ONNX's order."""
    here, there, *_ = ONNX[cell]
    gates = dict(zip(here, given[name].chunk(len(here)), strict=True))
    if cell == "coupled":
        gates = {"i": -gates["f"], "f": torch.full_like(gates["f"], 7.0), "g": gates["g"], "o": gates["o"]}  # f: unread
    return torch.cat([gates[gate] for gate in there])


def in_onnx(
    cell: str, layer: nn.Module, x: Tensor, hx: list[Tensor], direction: str, lengths: Tensor | None
) -> tuple[Any, dict[str, Any]]:
    """A model of one node, and what to feed it."""
    onnx = module("onnx")
    inputs: dict[str, Tensor] = {"X": x}
    rows: dict[str, list[Tensor]] = {name: [] for name in ("W", "R", "B", "P")}
    for way in DIRECTIONS[direction]:
        suffix = "_l0" + "_reverse" * way
        own = {name.removesuffix(suffix): w.detach() for name, w in layer.named_parameters() if name.endswith(suffix)}
        rows["W"].append(of_onnx(cell, "weight_ih", own))
        rows["R"].append(of_onnx(cell, "weight_hh", own))
        rows["B"].append(torch.cat([of_onnx(cell, "bias_ih", own), of_onnx(cell, "bias_hh", own)]))
        if cell == "peephole":
            rows["P"].append(torch.cat([own[name] for name in PEEPHOLES]))
    inputs |= {name: torch.stack(parts) for name, parts in rows.items() if parts}
    if lengths is not None:
        inputs["sequence_lens"] = lengths.int()
    inputs |= {name: state[DIRECTIONS[direction]] for name, state in zip(("initial_h", "initial_c"), hx, strict=False)}
    *_, operator, attributes = ONNX[cell]
    repeated = {k: v * len(DIRECTIONS[direction]) if isinstance(v, list) else v for k, v in attributes.items()}
    of_operator = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
    names = [name if name in inputs else "" for name in of_operator[: 8 if operator == "LSTM" else 6]]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"][: 1 + len(hx)]
    node = onnx.helper.make_node(operator, names, outputs, hidden_size=H, direction=direction, **repeated)
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    infos = [onnx.helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in inputs.items()]
    ranks = zip(outputs, (4, 3, 3), strict=False)
    results = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None] * rank) for n, rank in ranks]
    opset = [onnx.helper.make_opsetid("", 14)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "witness", infos, results), opset_imports=opset, ir_version=8
    )
    onnx.checker.check_model(model)
    return model, {name: tensor.numpy() for name, tensor in inputs.items()}


def by_reference(model: Any, fed: dict[str, Any]) -> list[Tensor]:
    found = module("onnx.reference").ReferenceEvaluator(model).run(None, fed)
    return [torch.tensor(array) for array in found]


def by_runtime(model: Any, fed: dict[str, Any]) -> list[Tensor]:
    runtime = module("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.tensor(array) for array in session.run(None, fed)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", [cell for cell in ONNX if cell not in ONLY_RUNTIME])
def test_onnx_s_reference_evaluator(cell: str, direction: str) -> None:
    layer, x, hx = made(cell)
    theirs = by_reference(*in_onnx(cell, layer, x, hx, direction, None))
    torch.testing.assert_close(ours(layer, x, hx, DIRECTIONS[direction], None), theirs, **BOUND)


RUNS = [(cell, "torch", way, lengths) for cell in ONNX for way in DIRECTIONS for lengths in (None, LENGTHS)]
MARK = pytest.mark.interpreter
RUNS += [pytest.param(cell, "persistent", "bidirectional", LENGTHS, marks=MARK) for cell in ONNX if cell in BUILT_IN]


@pytest.mark.parametrize(("cell", "backend", "direction", "lengths"), RUNS, ids=str)
def test_onnx_runtime(cell: str, backend: str, direction: str, lengths: list[int] | None) -> None:
    layer, x, hx = made(cell, backend)
    given = None if lengths is None else torch.tensor(lengths)
    theirs = by_runtime(*in_onnx(cell, layer, x, hx, direction, given))
    torch.testing.assert_close(ours(layer, x, hx, DIRECTIONS[direction], given), theirs, **BOUND)


# Our gates in our order, the same in Keras's order, Keras's layer and its arguments.
KERAS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "lstm": ("ifgo", "ifgo", "LSTM", {}),
    "gru": ("rzn", "zrn", "GRU", {"reset_after": True}),
    "gru_reset_before": ("rzn", "zrn", "GRU", {"reset_after": False}),
    "rnn_tanh": ("h", "h", "SimpleRNN", {"activation": "tanh"}),
    "rnn_relu": ("h", "h", "SimpleRNN", {"activation": "relu"}),
}


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keras on torch: the backend is chosen when it is first imported."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    found = module("keras")
    if found.backend.backend() != "torch":
        pytest.fail(f"Keras was imported with the backend {found.backend.backend()!r} before; these tests need torch")
    return found


def in_keras(keras: Any, cell: str, layer: nn.Module, way: int) -> tuple[Any, dict[str, Tensor]]:
    """Keras's layer of one of our directions, and the weights that it has, made of ours with their gradients."""
    here, there, kind, arguments = KERAS[cell]
    suffix = "_l0" + "_reverse" * way
    own = {name.removesuffix(suffix): w for name, w in layer.named_parameters() if name.endswith(suffix)}

    def ordered(name: str) -> Tensor:
        return torch.cat([own[name].chunk(len(here))[here.index(gate)] for gate in there])

    biases = ordered("bias_ih"), ordered("bias_hh")
    weights = {
        "kernel": ordered("weight_ih").T,
        "recurrent_kernel": ordered("weight_hh").T,
        "bias": torch.stack(biases) if arguments.get("reset_after") else sum(biases),
    }
    made = getattr(keras.layers, kind)(
        H, return_sequences=True, return_state=True, go_backwards=bool(way), zero_output_for_mask=True, **arguments
    )
    made.build((B, T, INPUT))
    made.set_weights([weight.detach().numpy() for weight in weights.values()])
    return made, weights


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("cell", KERAS)
def test_keras_on_torch(keras: Any, cell: str, lengths: list[int] | None) -> None:
    """Outputs, final states and all gradients, one direction after the other."""
    layer, x, hx = made(cell)
    given = None if lengths is None else torch.tensor(lengths)
    mask = None if given is None else torch.arange(T) < given[:, None]
    for way in (0, 1):
        theirs_of, weights = in_keras(keras, cell, layer, way)
        leaves = [t.clone().requires_grad_() for t in (x, *hx)]
        found = ours(layer, leaves[0], leaves[1:], [way], given)
        found = [found[0][:, 0], *(state[0] for state in found[1:])]
        others = [t.clone().requires_grad_() for t in (x, *hx)]
        first = [state[way] for state in others[1:]]
        y, *last = theirs_of(others[0].transpose(0, 1), initial_state=first, mask=mask)
        y = (y.flip(1) if way else y).transpose(0, 1)
        torch.testing.assert_close(found, [y, *last], **BOUND)
        losses = [sum((k + 1) * t.sin().sum() for k, t in enumerate(each)) for each in (found, [y, *last])]
        theirs = [variable.value for variable in theirs_of.trainable_variables]
        of_theirs = torch.autograd.grad(losses[1], [*others, *theirs])
        # Ours in Keras's layout, a function of our parameters: its gradient is theirs through that function.
        parameters = [w for name, w in layer.named_parameters() if name.endswith("_reverse") == bool(way)]
        of_ours = torch.autograd.grad(losses[0], [*leaves, *parameters])
        through = sum((w * d).sum() for w, d in zip(weights.values(), of_theirs[len(others) :], strict=True))
        expected = [*of_theirs[: len(others)], *torch.autograd.grad(through, parameters)]
        torch.testing.assert_close(list(of_ours), expected, rtol=1e-4, atol=1e-5)
