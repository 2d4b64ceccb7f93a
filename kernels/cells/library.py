"""The built-in cells, each one PyTorch function of one time step.

    step(x, r, state[, p][, e]) -> new_state

Tuples of tensors of one shape [B, H], by position or by name: ``x`` the input's half of the gates, ``W_ih x_t + b_ih``,
``r`` the recurrent half, ``W_hh h_{t-1} + b_hh``, ``state`` h first, ``p`` parameters per unit [H], ``e`` extras per
step. Pointwise: each unit and row by itself.
"""

from __future__ import annotations

from torch import Tensor, sigmoid, tanh

from .derive import Derived, Names
from .registration import of_step

Tiles = tuple[Tensor, ...]


def lstm(x: Tiles, r: Tiles, state: Tiles) -> Tiles:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; gates in torch's order."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru(x: Tiles, r: Tiles, state: Tiles) -> Tiles:
    """Cho et al. 2014, in cuDNN's and torch.nn.GRU's form: the reset gate acts after the product."""
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return (n + z * (state[0] - n),)


CELLS = {
    "lstm": (lstm, Names(gates=("i", "f", "g", "o"), states=("h", "c"))),
    "gru": (gru, Names(gates=("r", "z", "n"), states=("h",))),
}


def built_in(name: str) -> Derived:
    step, names = CELLS[name]
    return of_step(step, name, names, built_in=True)
