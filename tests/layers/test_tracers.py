"""torch.fx has a layer as one node; torch.jit.trace gives a trace for every B and T; TensorBoard's graph."""

import copy
import io
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn

ROOT = Path(__file__).resolve().parents[2]
INPUT, HIDDEN = 3, 5

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")


class Call(nn.Module):
    """A layer with what a test does around it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *tensors: Any) -> Any:
        return self.call(self.layer, *tensors)


def targets(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op in ("call_module", "call_function")]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- torch.fx -------------------------------------------------------------------------------------------------------


def step_by_step(layer: Any, x: Tensor) -> Tensor:
    y, state = layer.step(x)
    for _ in range(2):
        y, state = layer.step(x, state)
    return y


FX = {
    "plain": (lambda layer, x: layer(x)[0][:, -1], ["layer"]),
    "hx": (lambda layer, x, h: layer(x, h)[1], ["layer"]),
    "state_by_name": (lambda layer, x, h: layer(x, hx=h)[0], ["layer"]),
    "lengths": (lambda layer, x, n: layer(x, lengths=n)[0], ["layer"]),
    "resets": (lambda layer, x, r, h: layer(x, resets=r, reset_state=h)[0], ["layer"]),
    "constant_input": (lambda layer, h: layer(torch.ones(2, 4, INPUT), h)[0], ["layer"]),
}


@pytest.mark.parametrize("name", FX)
def test_fx_has_a_layer_as_one_node(name: str) -> None:
    call, expected = FX[name]
    layer = persistrnn.GRU(INPUT, HIDDEN, batch_first=True)
    x, h = torch.randn(2, 4, INPUT), torch.randn(1, 2, HIDDEN)
    given = {"n": torch.tensor([2, 4]), "r": torch.rand(2, 4) < 0.3, "x": x, "h": h}
    tensors = [given[letter] for letter in call.__code__.co_varnames[1 : call.__code__.co_argcount]]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

    # torch.fx takes no forward with a variable number of arguments
    names = ", ".join(call.__code__.co_varnames[1 : call.__code__.co_argcount])
    scope: dict[str, Any] = {"call": call}
    exec(f"def forward(self, {names}): return call(self.layer, {names})", scope)
    Model.forward = scope["forward"]  # type: ignore[method-assign]
    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == expected
    same(graph(*tensors), model(*tensors))
    same(copy.deepcopy(graph)(*tensors), model(*tensors))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(2, INPUT), (INPUT,)], ids=["batch", "unbatched"])
def test_fx_has_steps(batch_first: bool, shape: tuple[int, ...]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = persistrnn.LSTM(INPUT, HIDDEN, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            return step_by_step(self.layer, x)

    model, x = Model(), torch.randn(shape)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["layer"] * 3
    same(graph(x), model(x))


def test_fx_has_a_stream_as_one_node() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream = persistrnn.Streaming(persistrnn.GRU(INPUT, HIDDEN))

        def forward(self, x: Tensor, one: Tensor) -> Tensor:
            return self.stream(x).sum() + self.stream.step(one).sum()

    model, given = Model(), (torch.randn(4, 2, INPUT), torch.randn(2, INPUT))
    graph = torch.fx.symbolic_trace(model)
    assert model.stream.state is None
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["stream"] * 2
    found = [graph(*given) for _ in range(2)]
    model.stream.reset()
    same(found, [model(*given) for _ in range(2)])


def test_fx_has_a_functional_call_as_one_node() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = persistrnn.LSTM(INPUT, HIDDEN)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
            return persistrnn.functional.lstm(x, list(self.layer.parameters()), (h, c))[0]

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert persistrnn.functional.lstm in targets(graph)
    given = torch.randn(4, 2, INPUT), torch.randn(1, 2, HIDDEN), torch.randn(1, 2, HIDDEN)
    same(graph(*given), model(*given))


# ---- torch.jit.trace ------------------------------------------------------------------------------------------------


def packed(layer: Any, x: Tensor, lengths: Tensor) -> Any:
    y, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y)[0], state


def ends(steps: int, batch: int) -> Tensor:
    return torch.tensor([steps, *range(1, batch)])


JIT: dict[str, tuple[Callable[..., Any], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "plain": (lambda layer, x: layer(x), lambda T, B: ()),
    "hx": (lambda layer, x, h: layer(x, (h, h)), lambda T, B: (torch.randn(2, B, HIDDEN),)),  # two layers
    "packed": (packed, lambda T, B: (ends(T, B),)),
    "lengths": (lambda layer, x, n: layer(x, lengths=n), lambda T, B: (ends(T, B),)),
    "mask": (lambda layer, x, m: layer(x, mask=m), lambda T, B: (torch.rand(T, B) < 0.7,)),
    "resets": (
        lambda layer, x, r, h: layer(x, resets=r, reset_state=(h, h), return_cell_states=True),
        lambda T, B: (torch.rand(T, B) < 0.3, torch.randn(1, B, HIDDEN)),
    ),
    "step": (lambda layer, x: layer.step(x[0]), lambda T, B: ()),
    "unbatched": (lambda layer, x: layer(x[:, 0]), lambda T, B: ()),
}


def traced_alike(layer: nn.Module, name: str) -> None:
    """A trace, saved and loaded, has the layer's results and gradients for another T and B."""
    call, more = JIT[name]
    model = Call(layer, call)
    with warnings.catch_warnings():  # of pack_padded_sequence, torch's own
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (torch.randn(2, 1, INPUT), *more(2, 1)), check_trace=False)
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    loaded = torch.jit.load(file)
    given = torch.randn(4, 3, INPUT), *more(4, 3)
    found, expected = loaded(*given), model(*given)
    same(found, expected)
    for outputs in (found, expected):
        sum(t.sum() for t in torch.utils._pytree.tree_leaves(outputs)).backward()
    same([p.grad for p in loaded.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", JIT)
def test_a_trace_holds_for_every_size(name: str) -> None:
    traced_alike(persistrnn.LSTM(INPUT, HIDDEN, num_layers=1 if name == "resets" else 2, backend="torch"), name)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["hx", "packed", "resets"])
def test_a_trace_of_the_kernels_holds_for_every_size(name: str) -> None:
    traced_alike(persistrnn.LSTM(INPUT, HIDDEN, num_layers=2 if name == "hx" else 1, backend="persistent"), name)


@pytest.mark.parametrize("save", ["state", "checkpoint", "auto"])
def test_a_trace_holds_in_all_save_modes(save: str) -> None:
    options: dict[str, Any] = {"save_budget": 10_000_000} if save == "auto" else {}
    traced_alike(persistrnn.LSTM(INPUT, HIDDEN, 2, backend="torch", save=save, **options), "hx")


@pytest.mark.interpreter
@pytest.mark.parametrize("save", ["state", "checkpoint"])
def test_a_trace_of_the_kernels_holds_in_all_save_modes(save: str) -> None:
    traced_alike(persistrnn.GRU(INPUT, HIDDEN, backend="persistent", save=save), "plain")


@persistrnn.cell(gates=("f", "n"), extras=("noise",))
def noisy(x: Any, r: Any, state: Any, e: Any) -> Tensor:
    f = torch.sigmoid(x.f + r.f) * e.noise
    return state.h + f * (torch.tanh(x.n + f * r.n) - state.h)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_trace_holds_for_other_cells() -> None:
    backend: Any = "auto"
    for layer in (
        persistrnn.SLSTM(INPUT, HIDDEN, bidirectional=True, backend=backend),
        persistrnn.LSTM(INPUT, 6, heads=2, backend=backend),
        persistrnn.LSTM(INPUT, HIDDEN, proj_size=2, backend=backend),
        persistrnn.Recurrent(noisy, INPUT, HIDDEN, backend=backend),
    ):
        extras = {"noise": None} if layer.cell.startswith("noisy") else {}

        def call(layer: Any, x: Tensor, extras: Any = extras) -> Any:
            given = {name: x.new_ones(1, *x.shape[:2], HIDDEN) for name in extras}
            return layer(x, **given)[0]

        model = Call(layer, call)
        traced = torch.jit.trace(model, (torch.randn(4, 2, INPUT),), check_trace=False)
        assert layer.last_path in ("torch", "stepwise")
        for T, B in ((4, 2), (7, 3)):
            x = torch.randn(T, B, INPUT)
            same(traced(x), model(x))


def test_a_trace_of_torch_s_own_path_needs_nothing_else(tmp_path: Path) -> None:
    """And one that has our operator says so where persistrnn is not imported."""
    for name, layer in (("alone", persistrnn.GRU(INPUT, HIDDEN)), ("ours", persistrnn.MGU(INPUT, HIDDEN))):
        torch.jit.save(torch.jit.trace(layer, torch.randn(4, 2, INPUT)), tmp_path / f"{name}.pt")
    code = """
        import sys, torch, warnings
        warnings.simplefilter("ignore")
        print(torch.jit.load("alone.pt")(torch.randn(7, 3, 3))[0].shape)
        try:
            torch.jit.load("ours.pt")
        except RuntimeError as error:
            print("Unknown builtin op: persistrnn::call" in str(error))
        sys.path.append(sys.argv[1])
        import persistrnn
        print(torch.jit.load("ours.pt")(torch.randn(7, 3, 3))[0].shape)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = [sys.executable, "-c", textwrap.dedent(code), str(ROOT)]
    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split("\n")[:-1] == ["torch.Size([7, 3, 5])", "True", "torch.Size([7, 3, 5])"], found.stderr


def test_a_trace_of_a_cell_that_is_not_there_says_so() -> None:
    with pytest.raises(RuntimeError, match="the cell 'gone:1', which is not defined here; import the module"):
        torch.ops.persistrnn.call("gone:1", "", torch.ones(1), [], [], [], None, None, None, [], [], [])


def test_bad_input_is_refused_while_it_is_traced() -> None:
    layer = persistrnn.GRU(INPUT, HIDDEN, save="state")
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        torch.jit.trace(layer, torch.randn(4, 2, INPUT + 1))
    with pytest.raises(TypeError, match="hx is one tensor"):
        torch.jit.trace(Call(layer, lambda layer, x, h: layer(x, (h,))), (torch.ones(4, 2, INPUT), torch.ones(1, 2, 5)))
