"""The launches of the kernels that make marks, and that read the states by them."""

import torch
import triton
from torch import Tensor

from .compilation import on_device, start
from .device.marks import gather_before, make_marks

BLOCK = 256
FUSION = {"enable_fp_fusion": True}  # else Triton 3.9.0 warns that its default will change


def made(
    lengths: Tensor | None,
    active: Tensor | None,
    resets: Tensor | None,
    steps: int,
    batch: int,
    directions: int,
    out_of_range: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `persistrnn.step_marks.marks` has them: uint8 [T, B, D]; and where rows run, bool [T, B].

    Args:
        lengths: integers [B]; active, resets: bool [T, B]; None: there are none.
        out_of_range: int32 [1], set to 1 if a length is not within [0, T]; it is taken as 0 or T.
    """
    device = next(t.device for t in (lengths, active, resets) if t is not None)
    marks = torch.empty(steps, batch, directions, dtype=torch.uint8, device=device)
    runs = torch.empty(steps, batch, dtype=torch.bool, device=device)
    bytes_of = [None if t is None else t.view(torch.uint8) for t in (active, resets, runs)]
    strides = [n for t in bytes_of[:2] for n in ((0, 0) if t is None else t.stride())]
    with on_device(device):
        grid = (triton.cdiv(steps * batch, BLOCK),)
        sizes = steps, batch, *strides, directions, BLOCK
        start(device, make_marks, grid, lengths, *bytes_of[:2], marks, bytes_of[2], out_of_range, *sizes, **FUSION)
    return marks, runs


def before(states: Tensor, marks: Tensor, heads: int) -> Tensor:
    """Of states [L, T + 2, B, D, H] what each step goes on from, zero where it is skipped: [D, L, T, B, H]. All
    contiguous."""
    layers, slots, batch, directions, units = states.shape
    found = states.new_empty(directions, layers, slots - 2, batch, units)
    grid = triton.cdiv(found[0, 0].numel(), BLOCK), layers, directions
    with on_device(states.device):
        sizes = slots - 2, batch, directions, heads, units, BLOCK
        start(states.device, gather_before, grid, states, marks, found, *sizes, **FUSION)
    return found
