"""GRU(reset_after=False) is Keras's GRU of that option and ONNX's with linear_before_reset=0.

The packages are the extra `models`; without one of them its test is skipped.
"""

import pytest
import torch

import persistrnn

T, B, INPUT, H = 6, 3, 4, 5
REASON = "does not import: pip install 'persistrnn[models]'"


def reordered(weight):
    """r, z, n as z, r, n, which both have."""
    r, z, n = weight.chunk(3)
    return torch.cat([z, r, n])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason=f"keras {REASON}")
    assert keras.backend.backend() == "torch"
    torch.manual_seed(0)
    layer = persistrnn.GRU(INPUT, H, batch_first=True, reset_after=False)
    theirs = keras.layers.GRU(H, reset_after=False, return_sequences=True, return_state=True)
    theirs.build((B, T, INPUT))
    bias = reordered(layer.bias_ih_l0 + layer.bias_hh_l0)
    turned = reordered(layer.weight_ih_l0).T, reordered(layer.weight_hh_l0).T, bias
    theirs.set_weights([w.detach().numpy() for w in turned])
    x, h0 = torch.randn(B, T, INPUT, requires_grad=True), torch.randn(B, H, requires_grad=True)
    y, h_n = layer(x, h0.unsqueeze(0))
    of_y, of_h = theirs(x, initial_state=h0)
    torch.testing.assert_close([of_y, of_h], [y, h_n[0]])
    values = [w.value for w in theirs.weights]
    expected = torch.autograd.grad(of_y.sin().sum() + of_h.square().sum(), [x, h0, *values])
    leaves = [x, h0, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    *found, of_ih, of_hh = torch.autograd.grad(y.sin().sum() + h_n.square().sum(), leaves)
    torch.testing.assert_close(of_ih, of_hh)
    in_order = [*found[:2], reordered(found[2]).T, reordered(found[3]).T, reordered(of_ih)]
    torch.testing.assert_close(in_order, list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", [0, 1])
def test_onnxruntime(before):
    """In both directions, with lengths."""
    onnx = pytest.importorskip("onnx", reason=f"onnx {REASON}")
    runtime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {REASON}")
    torch.manual_seed(0)
    layer = persistrnn.GRU(INPUT, H, bidirectional=True, reset_after=bool(before))
    x, h0, lengths = torch.randn(T, B, INPUT), torch.randn(2, B, H), torch.tensor([T, 2, 5])
    sides = [
        {name[: -len(s)]: w for name, w in layer.named_parameters() if name.endswith(s)} for s in ("_l0", "_reverse")
    ]
    sides[1] = {name.removesuffix("_l0"): w for name, w in sides[1].items()}
    of = {name: torch.stack([reordered(side[name]) for side in sides]) for name in sides[0]}
    given = {
        "X": x, "W": of["weight_ih"], "R": of["weight_hh"], "B": torch.cat([of["bias_ih"], of["bias_hh"]], 1),
        "lens": lengths.int(), "h0": h0,
    }  # fmt: skip
    make, kinds = onnx.helper, onnx.TensorProto
    node = make.make_node(
        "GRU", list(given), ["Y", "Y_h"], hidden_size=H, direction="bidirectional", linear_before_reset=before
    )
    typed = [
        make.make_tensor_value_info(k, kinds.INT32 if k == "lens" else kinds.FLOAT, t.shape) for k, t in given.items()
    ]
    outputs = [make.make_tensor_value_info(name, kinds.FLOAT, None) for name in ("Y", "Y_h")]
    model = make.make_model(
        make.make_graph([node], "gru", typed, outputs), opset_imports=[make.make_opsetid("", 21)], ir_version=10
    )
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, last = session.run(None, {name: t.detach().numpy() for name, t in given.items()})
    with torch.no_grad():
        ours, h_n = layer(x, h0, lengths=lengths)
    theirs = torch.from_numpy(y).transpose(1, 2).flatten(2)
    torch.testing.assert_close([ours, h_n], [theirs, torch.from_numpy(last)], rtol=1e-5, atol=1e-6)
