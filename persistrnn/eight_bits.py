"""W_hh in 8 bits with a scale per row, for inference alone: quantised and dequantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from persistrnn.tracing import by_torch_jit

# The planner's name of each dtype, and its largest number.
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class EightBits(NamedTuple):
    """W_hh of each layer and direction: int8, or uint8, the bits of float8_e4m3fn, [G*H, H] ([n, G*H/n, H/n] with
    heads), and float32 scales [G*H] ([n, G*H/n])."""

    dtype: torch.dtype
    bits: Sequence[Tensor]
    scales: Sequence[Tensor]

    def among(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """All weights of a layer, with the bits in the places of W_hh."""
        found, each = list(weights), len(weights) // len(self.bits)
        found[1::each] = self.bits
        return found

    def dequantized(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The same with what the bits stand for, in the dtype of the other weights."""
        matrices = [dequantized(b, s, weights[0].dtype) for b, s in zip(self.bits, self.scales, strict=True)]
        return self._replace(bits=matrices).among(weights)


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
    return (_numbers(bits).float() * scale.unsqueeze(-1)).to(dtype)


def _numbers(bits: Tensor) -> Tensor:
    """That the bits stand for."""
    if bits.dtype == torch.int8:
        return bits
    if not by_torch_jit():  # which knows no view of another dtype
        return bits.view(torch.float8_e4m3fn)
    exponent, fraction = (bits >> 3 & 15).int(), (bits & 7).int()
    magnitude = torch.ldexp((fraction + 8 * (exponent > 0)).float(), exponent.clamp(min=1) - 10)
    return torch.where(bits < 128, magnitude, -magnitude)
