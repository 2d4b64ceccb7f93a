"""The tensors that go into a scan and come out of it, by name and in one order everywhere: states h first.

Letters: L layers, T steps, B batch, D directions, H hidden, G gates, X tiles of their input half, n tensors kept per
step, P parameters per unit and E extras per step of a cell that has such. L or D is 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """weight_hh [L*D, G*H, H], bias_hh [L*D, G*H], or None if no layer has biases; of the layers after the lowest,
    where there are any, weight_ih [L - 1, G*H, H] and bias_ih [L - 1, G*H]; params [L*D, P, H] if the cell has
    parameters per unit; scale float32 [D, G*H], of the rows of a weight_hh of 8 bits: int8, or uint8, the bits of
    float8_e4m3fn."""

    weight_hh: Tensor
    bias_hh: Tensor | None
    weight_ih: Tensor | None = None
    bias_ih: Tensor | None = None
    params: Tensor | None = None
    scale: Tensor | None = None


class Kept(NamedTuple):
    """What a forward leaves.

    states: y [L, T + 2, B, D, H] with h0 in the slot before each direction's first step (slot 0; slot T + 1 in reverse)
        and, with marks, the reset state in the other one; the other states alike if every step's is kept.
    saved: [L, T, B, D, n, H] if a backward follows; n may be 0.
    finals: the states after the last step, each [L*D, B, H], in the dtype of ``states``.
    """

    states: Sequence[Tensor]
    saved: Tensor | None
    finals: Sequence[Tensor] = ()


class Gradients(NamedTuple):
    """dx_gates [L, T, B, D, X*H], with what the cell has in ``more_gradients`` behind, and dr_gates [L, T, B, D, G*H],
    the same tensor in cells whose two gradients are the same; of the initial and, where they are asked for, of the
    reset states, each [L*D, B, H]. d_params [L*D, P, H]: only where a second derivative has formed them."""

    dx_gates: Tensor
    dr_gates: Tensor
    d_initial: Sequence[Tensor]
    d_reset: Sequence[Tensor]
    d_params: Tensor | None = None


def host_word(device: torch.device) -> Tensor:
    """An int32 zero [1] that kernels on a device set to 1: pinned, so that reading it waits for nothing."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")


def taken(word: Tensor) -> bool:
    """Whether such a word is set; it is set back.

    Not by torch: two operations at every call, and one that was made in inference mode cannot be written outside.
    """
    number = ctypes.c_int32.from_address(word.data_ptr())
    found = number.value != 0
    if found:
        number.value = 0
    return found
