"""The built-in cells, each one PyTorch function of one time step.

    step(x, r, state[, p[, e]]) -> new_state

Tuples of tensors of one shape [B, H]: ``x`` the input's half of the gates, ``W_ih x_t + b_ih``, ``r`` the recurrent
half, ``W_hh h_{t-1} + b_hh``, one tile per gate in torch's order; ``state`` h first; ``p`` parameters per unit, ``e``
extras per step. Pointwise: each unit and row by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tiles = tuple[Tensor, ...]


def lstm(x: Tiles, r: Tiles, state: Tiles) -> Tiles:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; gates i, f, g, o."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x: Tiles, r: Tiles, state: Tiles) -> Tiles:
    """Cho et al. 2014, in cuDNN's and torch.nn.GRU's form: the reset gate acts after the product; gates r, z, n."""
    reset, z = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + reset * r[2])
    return (n + z * (state[0] - n),)


STEPS: dict[str, Callable[..., Tiles]] = {"lstm": lstm, "gru": gru}
