"""Our layers beside torch.nn's: the same weights, states in the cell's form, results with their gradients."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import persistrnn
from persistrnn.kernels import cells

PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "lstm": (persistrnn.LSTM, nn.LSTM),
    "gru": (persistrnn.GRU, nn.GRU),
    "rnn_tanh": (persistrnn.RNN, nn.RNN),
    "rnn_relu": (partial(persistrnn.RNN, nonlinearity="relu"), partial(nn.RNN, nonlinearity="relu")),
}
CELLS = {name: cells.CELLS[name] for name in ("lstm", "gru")}  # those that every path is tried with
ON_KERNELS = pytest.param("persistent", marks=pytest.mark.interpreter)
PATHS = ["torch", ON_KERNELS]
BACKENDS = ["auto", ON_KERNELS]


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """All but an LSTM take no proj_size, not even 0."""
    return {name: value for name, value in options.items() if name != "proj_size" or value}


def make_layer(cell: str, *sizes: int, **options: Any) -> nn.Module:
    """Ours, from the same numbers at every call."""
    torch.manual_seed(0)
    return PAIRS[cell][0](*sizes, **_known(options))


def pair(cell: str, *sizes: int, backend: str = "torch", truth: bool = False, **options: Any) -> tuple[Any, Any]:
    """Our layer and torch.nn's with the same weights, which ``truth`` has in float64."""
    layer = make_layer(cell, *sizes, backend=backend, **options)
    theirs = PAIRS[cell][1](*sizes, **_known(options) | ({"dtype": torch.float64} if truth else {}))
    theirs.load_state_dict(layer.state_dict())
    return layer, theirs


def states(cell: str, *shape: int, **options: Any) -> list[Tensor]:
    """The cell's states, h first, drawn."""
    return [torch.randn(shape, **options) for _ in range(cells.CELLS[cell].states)]


def as_hx(states: Iterable[Tensor]) -> Any:
    """What a layer takes as its state: the tuple of an LSTM, the tensor of a GRU, None without any."""
    given = tuple(states)
    return given if len(given) > 1 else given[0] if given else None


def tensors(outputs: Any) -> list[Tensor]:
    """All of them: y, h_n, and what else there is."""
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def results(
    call: Callable[..., Any], x: Tensor, hx: Any = None, parameters: Iterable[Tensor] = (), **given: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the input, the states and the parameters), of fresh leaves and a loss of every output."""
    dtype = x.dtype
    leaves = [t.detach().clone().requires_grad_() for t in (x, *tensors(hx))]
    outputs = tensors(call(leaves[0], as_hx(leaves[1:]), **given))
    loss = sum((k + 1) * t.to(torch.promote_types(dtype, torch.float32)).sin().sum() for k, t in enumerate(outputs))
    return [t.detach() for t in outputs], list(torch.autograd.grad(loss, [*leaves, *parameters]))


def assert_same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # dtypes too


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
