"""A cell that persistrnn has not: h_t = h_{t-1} / 2 + tanh(x_t + W_hh h_{t-1}) / 2, added as CONTRIBUTING.md says."""

import triton
import triton.language as tl  # noqa: F401  # the interpreter looks for it

from persistrnn import double_backward
from persistrnn.kernels import cells
from persistrnn.kernels.cells import Cell, library
from persistrnn.kernels.device import pointwise
from persistrnn.kernels.device.pointwise import tanh

NAME = "leaky"


@triton.jit
def leaky_forward(x_gates, r_gates, state, p, e):
    g = tanh(x_gates[0] + r_gates[0])
    return (0.5 * state[0] + 0.5 * g,), (g,)


@triton.jit
def leaky_backward(d_state, saved, previous_state, p, e):
    g = saved[0]
    d = 0.5 * d_state[0] * (1.0 - g * g)
    return (d,), (d,), (0.5 * d_state[0],)


def eager(x, r, state):
    return (0.5 * state[0] + 0.5 * (x[0] + r[0]).tanh(),)


def eager_backward(d_state, saved, d_saved, before):
    d = (0.5 * d_state[0] + d_saved[0]) * (1 - saved[0].square())
    return (d,), (d,), (0.5 * d_state[0],)


def add(monkeypatch):
    monkeypatch.setitem(cells.CELLS, NAME, Cell(NAME, gates=1, states=1, saved=1, recurrent_gradient=False))
    monkeypatch.setitem(pointwise.FORWARD, NAME, leaky_forward)
    monkeypatch.setitem(pointwise.BACKWARD, NAME, leaky_backward)
    monkeypatch.setitem(library.STEPS, NAME, eager)
    monkeypatch.setitem(double_backward.CELLS, NAME, double_backward.without_params(eager_backward))
