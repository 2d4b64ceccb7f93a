"""torch.onnx.export by both exporters: ONNX's own operators, whose results onnxruntime agrees on for other T and B."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persistrnn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters
INPUT, HIDDEN = 3, 5


class Model(nn.Module):
    """A layer, and which of hx and lengths it is given."""

    def __init__(self, layer: Any, hx: bool, lengths: bool) -> None:
        super().__init__()
        self.layer, self.hx, self.lengths = layer, hx, lengths
        self.states = 2 if "LSTM" in type(layer).__name__ else 1

    def forward(self, x: Tensor, *given: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"lengths": given[-1]} if self.lengths else {}
        if self.hx:
            options["hx"] = given[:2] if self.states == 2 else given[0]
        y, state = self.layer(x, **options)
        return [y, *(state if self.states == 2 else (state,))]

    def tensors(self, steps: int, batch: int) -> list[Tensor]:
        layer = self.layer
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        found = [torch.randn(*((batch, steps) if layer.batch_first else (steps, batch)), INPUT)]
        found += [torch.randn(rows, batch, HIDDEN) for _ in range(self.states)] if self.hx else []
        return found + ([torch.arange(batch) % (steps + 1)] if self.lengths else [])

    def dynamic(self, batch: Any, steps: Any) -> list[dict[int, Any]]:
        found = [{0: batch, 1: steps} if self.layer.batch_first else {0: steps, 1: batch}]
        found += [{1: batch}] * self.states if self.hx else []
        return found + ([{0: batch}] if self.lengths else [])


def export(model: Model, file: Path, dynamo: bool) -> None:
    given = tuple(model.tensors(4, 3))
    if dynamo:
        x, *others = model.dynamic(torch.export.Dim("batch"), torch.export.Dim("steps"))
        shapes = (x, *([tuple(others)] if others else []))
        torch.onnx.export(model, given, file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        names = [f"given{k}" for k in range(len(given))]
        axes = dict(zip(names, model.dynamic("batch", "steps"), strict=True))
        torch.onnx.export(model, given, file, dynamo=False, input_names=names, dynamic_axes=axes)


def agrees(model: Model, file: Path, sizes: tuple[tuple[int, int], ...] = ((4, 3), (7, 2), (1, 4))) -> None:
    session = onnxruntime.InferenceSession(file)
    for steps, batch in sizes:
        given = model.tensors(steps, batch)
        named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        found = [torch.from_numpy(t) for t in session.run(None, named)]
        torch.testing.assert_close(found, [t.detach() for t in model(*given)], rtol=2e-5, atol=2e-6)


BUILT_IN = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN", "PeepholeLSTM": "LSTM", "CoupledLSTM": "LSTM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "unbiased": {"bias": False, "num_layers": 2},
}


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", BUILT_IN)
def test_onnx_s_operators_agree(make: str, options: str, dynamo: bool, tmp_path: Path) -> None:
    layer = getattr(persistrnn, make)(INPUT, HIDDEN, **OPTIONS[options]).eval()
    for given in (False, True) if options == "deep" else (options == "unbiased",):
        model = Model(layer, hx=given, lengths=given)
        export(model, tmp_path / "model.onnx", dynamo)
        types = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert types.count(BUILT_IN[make]) == layer.num_layers
        agrees(model, tmp_path / "model.onnx")


def test_relu(tmp_path: Path) -> None:
    model = Model(persistrnn.RNN(INPUT, HIDDEN, nonlinearity="relu", bidirectional=True), hx=True, lengths=False)
    export(model, tmp_path / "model.onnx", dynamo=False)
    agrees(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (persistrnn.LSTM, {}),
        (persistrnn.GRU, {"hx": torch.randn(1, 3, HIDDEN), "lengths": torch.tensor([4, 0, 2])}),
        (lambda *sizes: persistrnn.Stacked([persistrnn.RNN(*sizes)]), {"lengths": torch.tensor([1, 2, 4])}),
    ],
)
def test_a_layer_by_itself(make: Any, given: dict[str, Any], tmp_path: Path) -> None:
    """The exporter on torch.jit.trace hands all that it takes over by position."""
    layer, x = make(INPUT, HIDDEN).eval(), torch.randn(4, 3, INPUT)
    calls: list[Any] = []
    with layer.register_forward_hook(lambda *of: calls.append(of)):
        torch.onnx.export(layer, (x,), tmp_path / "m.onnx", kwargs=given, dynamo=False)
    assert len(calls) == 1
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), [x, *given.values()], strict=True)}
    expected = [t.detach() for t in torch.utils._pytree.tree_leaves(layer(x, **given))]
    found = [torch.from_numpy(t) for t in session.run(None, named)]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_a_call_with_a_state_too_many_is_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = persistrnn.LSTM(INPUT, HIDDEN)

        def forward(self, x: Tensor, h: Tensor) -> Any:
            return self.layer(x, h, h)

    given = torch.randn(4, 3, INPUT), torch.zeros(1, 3, HIDDEN)
    with pytest.raises(TypeError, match="but 4 were given; a state of several tensors is a tuple"):
        torch.onnx.export(Model(), given, tmp_path / "m.onnx", dynamo=False)


def test_a_swapped_model_exports_as_before(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(INPUT, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, x = persistrnn.replace(Tagger().eval()).model, torch.randn(2, 4, INPUT)
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in ((2, 4), (5, 9)):
        x = torch.randn(*size, INPUT)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=2e-5, atol=2e-6)


REFUSED = {
    "the cell 'mgu'": lambda: persistrnn.MGU(INPUT, HIDDEN),
    "the cell 'slstm'": lambda: persistrnn.SLSTM(INPUT, HIDDEN),
    "projections": lambda: persistrnn.LSTM(INPUT, HIDDEN, proj_size=2),
    "heads=5": lambda: persistrnn.GRU(INPUT, HIDDEN, heads=5),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_onnx_has_not_is_unrolled_or_refused(what: str, tmp_path: Path) -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = REFUSED[what]()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths=lengths)[0]

    model, given = Output().eval(), (torch.randn(4, 3, INPUT), torch.tensor([4, 0, 2]))
    with pytest.raises(RuntimeError, match=f"ONNX has no recurrent operator with {what}; export with dynamo=True"):
        torch.onnx.export(model, given, tmp_path / "m.onnx", dynamo=False)
    shapes = ({0: torch.export.Dim("steps")}, None)
    with pytest.raises(Exception, match=f"ONNX has no recurrent operator with {what}; export with dynamo=True"):
        torch.onnx.export(model, given, tmp_path / "m.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    torch.onnx.export(model, given, tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    found = torch.from_numpy(session.run(None, named)[0])
    torch.testing.assert_close(found, model(*given).detach(), rtol=2e-5, atol=2e-6)
