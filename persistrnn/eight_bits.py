"""W_hh in 8 bits with a scale per row: quantised and dequantised, and the recurrence with it, for inference alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from persistrnn import autograd, ops
from persistrnn.phases import SCAN_FORWARD, phase
from persistrnn.reference import Result

# The planner's name of each dtype, and its largest number.
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class EightBits(NamedTuple):
    """W_hh of each layer and direction: int8, or uint8, the bits of float8_e4m3fn, [G*H, H] ([n, G*H/n, H/n] with
    heads), and float32 scales [G*H] ([n, G*H/n])."""

    dtype: torch.dtype
    bits: Sequence[Tensor]
    scales: Sequence[Tensor]

    def dequantized(self, dtype: torch.dtype) -> list[Tensor]:
        return [dequantized(bits, scale, dtype) for bits, scale in zip(self.bits, self.scales, strict=True)]


def quantized(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(bits, scales of the rows) of a finite weight [.., rows, K]. A row of zeros has scale 1."""
    exact = weight.float()
    scale = exact.abs().amax(-1) / LARGEST[dtype]
    # Of subnormal rows nothing is left.
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
    numbers = (exact / scale.unsqueeze(-1)).clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        return numbers.round().to(torch.int8), scale
    return numbers.to(dtype).view(torch.uint8), scale


def dequantized(bits: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = bits if bits.dtype == torch.int8 else bits.view(torch.float8_e4m3fn)
    return (numbers.float() * scale.unsqueeze(-1)).to(dtype)


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    initial: Sequence[Tensor],
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
    params: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
    scale: Tensor | None = None,
) -> Result:
    """``autograd.recurrent`` of one layer, without a gradient. weight_hh: int8 or uint8 [D, G*H, H], scale: float32
    [D, G*H] of its rows. x_gates is float16 or bfloat16, and so is all else."""
    assert scale is not None
    with phase(SCAN_FORWARD):
        kept = ops.scan_quantized(
            cell, return_c, cell_dtype, heads, x_gates, weight_hh, scale, bias_hh, params, marks, extras,
            list(initial), list(reset),
        )  # fmt: skip
    every, finals = autograd.given_out(cell, kept, return_c, return_c, x_gates, heads)
    return Result(every[0], every[1] if len(every) > 1 else None, finals)
