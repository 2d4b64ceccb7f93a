"""The mathematics of one time step of each cell, without a pointer in it.

A cell is a pair of functions over float32 tiles. The scan kernels move the data, add the recurrent matrix product, and
never look inside a cell:

    forward(x_gates, r_gates, state, p, e)          -> new_state, saved
    backward(d_state, saved, previous_state, p, e)  -> dx_gates, dr_gates, d_previous_state (elementwise part)

``x_gates`` is ``W_ih x_t + b_ih`` and ``r_gates`` is ``W_hh h_{t-1} + b_hh``, one tile per gate in torch's order.
``state[0]`` is h, the only state that other units see; further states (the LSTM's c) stay with their unit. The
gradient with respect to the recurrent half (``dr_gates``) is kept apart from the one with respect to the input
half (``dx_gates``) because they differ for the GRU, where the reset gate multiplies the recurrent half. ``p`` are the
parameters per unit and ``e`` what a step takes besides its gates, tuples too. Behind ``saved`` come the states after
the step that the backward reads (``Cell.after``), behind ``dx_gates`` what else it stores (``more_gradients``).

Sources: Hochreiter & Schmidhuber, Long Short-Term Memory (1997), with the forget gate of Gers et al. (2000);
Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014), in the variant that applies the
reset gate after the matrix product (as cuDNN and torch.nn.GRU do).
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # 2*sigmoid(2x)-1 cancels near 0 and loses 2 to 4 times in float32: a minimax polynomial serves there instead
    # (coefficients: Cephes, tanhf.c).
    y = tl.abs(x)
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0)
    return tl.where(y < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def lstm_forward(x_gates, r_gates, state, p, e):
    i = sigmoid(x_gates[0] + r_gates[0])
    f = sigmoid(x_gates[1] + r_gates[1])
    g = tanh(x_gates[2] + r_gates[2])
    o = sigmoid(x_gates[3] + r_gates[3])
    c = f * state[1] + i * g
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


@triton.jit
def lstm_backward(d_state, saved, previous_state, p, e):
    i, f, g, o = saved
    c_previous = previous_state[1]
    tanh_c = tanh(f * c_previous + i * g)
    dc = d_state[1] + d_state[0] * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * c_previous * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = d_state[0] * tanh_c * o * (1.0 - o)
    gates = (di, df, dg, do)
    return gates, gates, (tl.zeros_like(dc), dc * f)


@triton.jit
def gru_forward(x_gates, r_gates, state, p, e):
    r = sigmoid(x_gates[0] + r_gates[0])
    z = sigmoid(x_gates[1] + r_gates[1])
    n = tanh(x_gates[2] + r * r_gates[2])
    h = n + z * (state[0] - n)
    return (h,), (r, z, n, r_gates[2])


@triton.jit
def gru_backward(d_state, saved, previous_state, p, e):
    r, z, n, r_n = saved
    dh = d_state[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (previous_state[0] - n) * z * (1.0 - z)
    dr = dn * r_n * r * (1.0 - r)
    return (dr, dz, dn), (dr, dz, dn * r), (dh * z,)


# By the cell's name (``cells.CELLS``).
FORWARD = {"lstm": lstm_forward, "gru": gru_forward}
BACKWARD = {"lstm": lstm_backward, "gru": gru_backward}
