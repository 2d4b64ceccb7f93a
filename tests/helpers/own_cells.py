"""Cells that ask for what the LSTM and the GRU do not: parameters, extras, states after the step, wider inputs."""

import torch
from torch import sigmoid, tanh
from torch.nn.functional import logsigmoid

from persistrnn.kernels.cells import BUILT_IN, CELLS, Cell
from persistrnn.kernels.cells.registration import register
from persistrnn.kernels.cells.variants import variant


def rnn(x, r, state):
    """Elman 1990. Nothing is saved: the backward reads the new h."""
    return (tanh(x.h + r.h),)


def peephole(x, r, state, p):
    """Gers et al. 2002."""
    i, f = sigmoid(x.i + r.i + p.i * state.c), sigmoid(x.f + r.f + p.f * state.c)
    c = f * state.c + i * tanh(x.g + r.g)
    return sigmoid(x.o + r.o + p.o * c) * tanh(c), c


def zoneout(x, r, state, e):
    """Krueger et al. 2017: where the mask is 1, a unit keeps its state."""
    c = sigmoid(x.f + r.f) * state.c + sigmoid(x.i + r.i) * tanh(x.g + r.g)
    c = torch.where(e.keep_c > 0.5, state.c, c)
    return torch.where(e.keep_h > 0.5, state.h, sigmoid(x.o + r.o) * tanh(c)), c


def slstm(x, r, state):
    """Beck et al. 2024."""
    i, f, z, o = (a + b for a, b in zip(x, r, strict=True))
    f = logsigmoid(f) + state.m
    m = torch.maximum(f, i)
    i, f = torch.exp(i - m), torch.exp(f - m)
    c, n = f * state.c + i * tanh(z), f * state.n + i
    return sigmoid(o) * c / n, c, n, m


def highway(x, r, state, p):
    """A tile of input beside the gates, with a scale of its own: more than dx is stored for the scale's gradient."""
    h = tanh(p.scale * x.h + r.h + state.h * x.skip)
    return (h + torch.sin(p.shift * x.skip) * state.h,)


def gated(x, r, state):
    """A step only where the input says so: both halves have equal gradients, and are not only added."""
    return (torch.where(x.g > 0, tanh(x.h + r.h), state.h),)


def everything(x, r, state, p, e):
    """All at once, and a gradient that is no number where there is no unit: that of a root of 0."""
    h = tanh(x.a + r.a) * sigmoid(x.b + r.b * p.scale)
    c = e.keep * state.c + (1 - e.keep) * h
    root = torch.sqrt(p.size * p.size * (1 + (x.more + r.b) * (x.more + r.b)))
    return c / (1 + p.size * p.size) + 0.2 * root, c, state.third * 0.5 + h


DECLARED = {
    "rnn": (rnn, {"gates": ("h",)}),
    "peephole": (peephole, {"gates": ("i", "f", "g", "o"), "states": ("h", "c"), "params": ("i", "f", "o")}),
    "zoneout": (zoneout, {"gates": ("i", "f", "g", "o"), "states": ("h", "c"), "extras": ("keep_h", "keep_c")}),
    "slstm": (slstm, {"gates": ("i", "f", "z", "o"), "states": ("h", "c", "n", "m")}),
    "highway": (highway, {"gates": ("h",), "more_inputs": ("skip",), "params": ("scale", "shift")}),
    "gated": (gated, {"gates": ("g", "h")}),
    "everything": (everything, {
        "gates": ("a", "b"), "states": ("h", "c", "third"), "params": ("scale", "size"), "extras": ("keep",),
        "more_inputs": ("more",),
    }),
}  # fmt: skip


# What a recipe makes of a cell: in training all its noise, in evaluation each state's expectation.
VARIANTS = {"lstm_noise": ("lstm", (1.0, 1.0), True, True), "gru_expected": ("gru", (0.3,), False, False)}


def cell_of(name: str) -> Cell:
    """Registered, once; built-in ones and variants by their names, too."""
    if name in BUILT_IN:
        return CELLS[name]
    if name in VARIANTS:
        return CELLS[variant(*VARIANTS[name])]
    step, declared = DECLARED[name]
    return register(step, **declared).cell
