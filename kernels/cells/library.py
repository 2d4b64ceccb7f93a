"""The built-in cells, each one PyTorch function of one time step.

    step(x, r, state[, p][, e]) -> new_state

Named tuples of tensors of one shape [B, H]: ``x`` the input's half of the gates, ``W_ih x_t + b_ih``, ``r`` the
recurrent half, ``W_hh h_{t-1} + b_hh``, ``state`` h first, ``p`` parameters per unit [H], ``e`` extras per step.
Pointwise: each unit and row by itself. The pair of Triton functions, and all else, is derived from it (``derive``).
Those of ``STAGED`` are generators, with a product or a mean over the units between pointwise parts (``stages``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, exp, rsqrt, sigmoid, tanh
from torch.nn.functional import logsigmoid

from . import LAYER_NORM_EPS
from .derive import Derived, Names
from .registration import of_step
from .stages import Mean, Product

Tiles = tuple[Tensor, ...]
Stages = Generator[Product | Mean, Tensor, Tiles]


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


def gru_reset_before(x: Any, r: Any, state: Any) -> Stages:
    """Cho et al. 2014 as it is written: the reset gate acts on h, before the product with the candidate's rows."""
    reset, z = sigmoid(x.r + r.r), sigmoid(x.z + r.z)
    n = tanh(x.n + (yield Product(reset * state.h)))
    return (n + z * (state.h - n),)


def normalised(tiles: Sequence[Tensor]) -> Stages:
    """Ba, Kiros and Hinton 2016: over the units of all tiles together."""
    mean = yield Mean(sum(tiles[1:], start=tiles[0]) / len(tiles))
    tiles = [t - mean for t in tiles]
    squares = [t * t for t in tiles]
    scale = rsqrt((yield Mean(sum(squares[1:], start=squares[0]) / len(tiles))) + LAYER_NORM_EPS)
    return tuple(t * scale for t in tiles)


def layer_norm_lstm(x: Any, r: Any, state: Any, p: Any) -> Stages:
    """Ba, Kiros and Hinton 2016: c is normalised on its way to h, and goes on as it is."""
    r = yield from normalised(r)
    i, f, g, o = (a + w * b + v for a, b, w, v in zip(x, r, p.weight_ln_hh, p.bias_hh, strict=True))
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    (of_c,) = yield from normalised((c,))
    return sigmoid(o) * tanh(p.weight_ln_c * of_c + p.bias_ln_c), c


def layer_norm_gru(x: Any, r: Any, state: Any, p: Any) -> Stages:
    """Ba, Kiros and Hinton 2016, in the form of the GRU here: the three products are normalised together."""
    r = yield from normalised(r)
    of_r, of_z, of_n = (w * b + v for b, w, v in zip(r, p.weight_ln_hh, p.bias_hh, strict=True))
    reset, z = sigmoid(x.r + of_r), sigmoid(x.z + of_z)
    n = tanh(x.n + reset * of_n)
    return (n + z * (state.h - n),)


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

_HALVES = ("weight_ln_ih", "weight_ln_hh")
STAGED: dict[str, tuple[Callable[..., Stages], Names]] = {
    "gru_reset_before": (gru_reset_before, Names(("r", "z", "n"), ("h",), products=1)),
    "layer_norm_lstm": (
        layer_norm_lstm,
        Names(
            ("i", "f", "g", "o"), ("h", "c"), (*_HALVES, "weight_ln_c", "bias_ln_c"), wide=_HALVES, means=4,
            normalised=True,
        ),
    ),
    "layer_norm_gru": (
        layer_norm_gru, Names(("r", "z", "n"), ("h",), _HALVES, wide=_HALVES, means=2, normalised=True)
    ),
}  # fmt: skip


def built_in(name: str) -> Derived:
    step, names = CELLS[name] if name in CELLS else STAGED[name]
    return of_step(step, name, names, built_in=True)
