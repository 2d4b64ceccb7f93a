"""The recurrence in plain PyTorch: the truth that every other path is compared with.

It takes what `persistrnn.autograd.recurrent` takes and returns what it returns, in any floating dtype and on any
device, without an in-place operation, so that it can be differentiated any number of times and mapped by
`torch.func`. It is slow: a Python loop over the time steps.

Letters: T steps, B batch, H hidden, G gates (LSTM 4, GRU 3), D directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of a GRU; each [B, H]


def lstm_cell(x_gates: Tensor, r_gates: Tensor, state: State) -> State:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000).

    x_gates: the input's half of the gates, [B, 4*H], order i, f, g, o
    r_gates: the recurrent half, h_{t-1} @ W_hh^T + b_hh, [B, 4*H]
    """
    _, c = state
    i, f, g, o = (x_gates + r_gates).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x_gates: Tensor, r_gates: Tensor, state: State) -> State:
    """One step of a GRU (Cho et al. 2014, in cuDNN's form: the reset gate acts after the matrix product).

    x_gates: the input's half of the gates, [B, 3*H], order r, z, n
    r_gates: the recurrent half, h_{t-1} @ W_hh^T + b_hh, [B, 3*H]
    """
    (h,) = state
    xr, xz, xn = x_gates.chunk(3, dim=-1)
    rr, rz, rn = r_gates.chunk(3, dim=-1)
    r = (xr + rr).sigmoid()
    z = (xz + rz).sigmoid()
    n = (xn + r * rn).tanh()
    return ((1 - z) * n + z * h,)


CELLS = {"lstm": lstm_cell, "gru": gru_cell}


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, one or two directions, over all time steps.

    Args:
        cell: "lstm" or "gru"
        x_gates: x @ W_ih^T + b_ih, [T, B, D, G*H], T >= 1
        weight_hh: [D, G*H, H]
        bias_hh: [D, G*H]
        h0: [D, B, H]
        c0: [D, B, H] for an LSTM, None for a GRU

    Returns:
        y [T, B, D*H], h_n [D, B, H] and c_n [D, B, H] (None for a GRU). Direction 1 reads the sequence from
        its end; its output for step t stands at y[t], its final state is that of step 0.
    """
    step = CELLS[cell]
    steps, _, directions, _ = x_gates.shape
    outputs, final_states = [], []
    for d in range(directions):
        state: State = (h0[d],) if c0 is None else (h0[d], c0[d])
        hs = []
        for t in range(steps) if d == 0 else reversed(range(steps)):
            r_gates = F.linear(state[0], weight_hh[d], bias_hh[d])
            state = step(x_gates[t, :, d], r_gates, state)
            hs.append(state[0])
        outputs.append(torch.stack(hs if d == 0 else hs[::-1]))
        final_states.append(state)
    y = torch.cat(outputs, dim=-1)
    h_n, *rest = (torch.stack(tensors) for tensors in zip(*final_states, strict=True))
    return y, h_n, rest[0] if rest else None
