"""The built-in cells, each one PyTorch function of one time step.

    step(x, r, state[, p][, e]) -> new_state

Named tuples of tensors of one shape [B, H]: ``x`` the input's half of the gates, ``W_ih x_t + b_ih``, ``r`` the
recurrent half, ``W_hh h_{t-1} + b_hh``, ``state`` h first, ``p`` parameters per unit [H], ``e`` extras per step.
Pointwise: each unit and row by itself. The pair of Triton functions, and all else, is derived from it (``derive``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, exp, sigmoid, tanh
from torch.nn.functional import logsigmoid

from .derive import Derived, Names
from .registration import of_step

Tiles = tuple[Tensor, ...]


def lstm(x: Any, r: Any, state: Any) -> Tiles:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; gates in torch's order."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru(x: Any, r: Any, state: Any) -> Tiles:
    """Cho et al. 2014, in cuDNN's and torch.nn.GRU's form: the reset gate acts after the product."""
    reset, z = sigmoid(x.r + r.r), sigmoid(x.z + r.z)
    n = tanh(x.n + reset * r.n)
    return (n + z * (state.h - n),)


def rnn_tanh(x: Any, r: Any, state: Any) -> Tiles:
    """Elman 1990."""
    return (tanh(x.h + r.h),)


def rnn_relu(x: Any, r: Any, state: Any) -> Tiles:
    """Elman 1990, with the nonlinearity of Le, Jaitly and Hinton 2015."""
    return (torch.relu(x.h + r.h),)


def peephole(x: Any, r: Any, state: Any, p: Any) -> Tiles:
    """Gers, Schraudolph and Schmidhuber 2002: the gates see c, the output gate the new one."""
    i = sigmoid(x.i + r.i + p.weight_ci * state.c)
    f = sigmoid(x.f + r.f + p.weight_cf * state.c)
    c = f * state.c + i * tanh(x.g + r.g)
    return sigmoid(x.o + r.o + p.weight_co * c) * tanh(c), c


def coupled(x: Any, r: Any, state: Any) -> Tiles:
    """CIFG of Greff et al. 2015: the input gate is 1 - f."""
    f = sigmoid(x.f + r.f)
    c = f * state.c + (1 - f) * tanh(x.g + r.g)
    return sigmoid(x.o + r.o) * tanh(c), c


def mgu(x: Any, r: Any, state: Any) -> Tiles:
    """Zhou et al. 2016, in the form of the GRU here: the gate acts after the product."""
    f = sigmoid(x.f + r.f)
    n = tanh(x.n + f * r.n)
    return (state.h + f * (n - state.h),)


def janet(x: Any, r: Any, state: Any) -> Tiles:
    """Van der Westhuizen and Lasenby 2018, with beta = 1."""
    f = x.f + r.f
    c = sigmoid(f) * state.c + (1 - sigmoid(f - 1)) * tanh(x.g + r.g)
    return c, c


def slstm(x: Any, r: Any, state: Any) -> Tiles:
    """xLSTM's, Beck et al. 2024: exponential gates, a normaliser n, a stabiliser m."""
    i, f, z, o = (a + b for a, b in zip(x, r, strict=True))
    f = logsigmoid(f) + state.m
    m = torch.maximum(f, i)
    i, f = exp(i - m), exp(f - m)
    c, n = f * state.c + i * tanh(z), f * state.n + i
    return sigmoid(o) * c / n, c, n, m


CELLS: dict[str, tuple[Callable[..., Tiles], Names]] = {
    "lstm": (lstm, Names(("i", "f", "g", "o"), ("h", "c"))),
    "gru": (gru, Names(("r", "z", "n"), ("h",))),
    "rnn_tanh": (rnn_tanh, Names(("h",), ("h",))),
    "rnn_relu": (rnn_relu, Names(("h",), ("h",))),
    "peephole": (peephole, Names(("i", "f", "g", "o"), ("h", "c"), ("weight_ci", "weight_cf", "weight_co"))),
    "coupled": (coupled, Names(("f", "g", "o"), ("h", "c"))),
    "mgu": (mgu, Names(("f", "n"), ("h",))),
    "janet": (janet, Names(("f", "g"), ("h", "c"))),
    "slstm": (slstm, Names(("i", "f", "z", "o"), ("h", "c", "n", "m"))),
}


def built_in(name: str) -> Derived:
    step, names = CELLS[name]
    return of_step(step, name, names, built_in=True)
