"""Random masks that nobody has to keep: each value is a function of a seed and of where it stands.

A mask is written down as keys, a few numbers for each layer, direction and tile, from which any stretch of time of it
can be drawn: by every path, in every memory mode, and again in the backward. So a call keeps the keys, and a chunk of
time has masks of a chunk, one byte per step, row and unit.

The generator is Philox4x32-10 (Salmon et al. 2011): a counter of four words of 32 bits and a key of two become four
words. Here the key is the seed and the counter (step, row, unit // 4, which mask), of which the words are those of four
units. A unit is in the mask where its word is below the threshold, the probability times 2^32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FIELDS = SEED, MASK, THRESHOLD, FIRST_STEP, STRIDE, FIRST_UNIT = range(6)
WORD = 0xFFFFFFFF


def keys(device: torch.device, rows: int, probabilities: Sequence[float], per_sequence: Sequence[bool]) -> Tensor:
    """New keys, of a seed that torch's generator of the device draws: int64 [rows, E, len(FIELDS)].

    Args:
        rows: layers times directions
        probabilities: of each of E masks, that a unit is in it
        per_sequence: of each, whether it is the same at every step
    """
    fields = [
        [0, 0, round(p * 2**32), 0, 0 if same else 1, 0] for p, same in zip(probabilities, per_sequence, strict=True)
    ]
    found = torch.tensor(fields, device=device).repeat(rows, 1, 1)
    seed = torch.randint(2**62, (1,), device=device)
    which = torch.arange(rows * len(fields), device=device).view(rows, -1)
    return torch.stack([seed.expand_as(which), which, *found.unbind(-1)[THRESHOLD:]], -1)


def are_keys(extras: Tensor | None) -> bool:
    """Whether a cell's extras are keys [.., D, E, fields] and not tiles [.., D, E, H]."""
    return extras is not None and extras.dtype == torch.int64


def by_head(of_rows: Tensor, heads: int, width: int) -> Tensor:
    """Keys [rows, E, fields] as [rows * heads, ...], each head's of its own ``width`` units."""
    if heads == 1:
        return of_rows
    found = of_rows.repeat_interleave(heads, 0)
    first = torch.arange(heads, device=found.device).repeat(len(of_rows)) * width
    return torch.cat([found[..., :FIRST_UNIT], first.view(-1, 1, 1).expand(*found.shape[:2], 1)], -1)


def later(of: Tensor, first: Sequence[int]) -> Tensor:
    """Keys [.., D, E, fields] of what begins at the step ``first`` of each of D directions."""
    steps = torch.tensor(first, device=of.device).view(-1, 1) * of[..., STRIDE]
    return torch.cat([of[..., :FIRST_STEP], (of[..., FIRST_STEP] + steps).unsqueeze(-1), of[..., STRIDE:]], -1)


def tiles(extras: Any, steps: int, batch: int, units: int) -> Any:
    """A cell's extras as tiles: what keys [L, D, E, fields] stand for, uint8 [L, T, B, D, E, H]; others as they are."""
    return drawn(extras, steps, batch, units) if are_keys(extras) else extras


@torch.no_grad()
def drawn(of: Tensor, steps: int, batch: int, units: int) -> Tensor:
    """Masks of keys [L, D, E, fields]: uint8 [L, T, B, D, E, H], 1 where a unit is in the mask."""
    seed, mask, threshold, first_step, stride, first_unit = of.unbind(-1)

    def at(size: int, place: int) -> Tensor:
        return torch.arange(size, device=of.device).view([-1 if k == place else 1 for k in range(6)])

    def of_keys(field: Tensor) -> Tensor:
        return field[:, None, None, :, :, None]

    together = 4 if units % 4 == 0 else 1  # units of which the words of a counter are used
    t = of_keys(first_step) + of_keys(stride) * at(steps, 1)
    unit = of_keys(first_unit) + together * at(units // together, 5)
    counter = t, at(batch, 2), unit >> 2, of_keys(mask)
    below = [word < of_keys(threshold) for word in philox(counter, of_keys(seed & WORD), of_keys(seed >> 32))]
    if together == 4:
        return torch.stack(below, -1).flatten(-2).to(torch.uint8)
    first, second, third, fourth = below
    found = torch.where(
        unit & 2 == 0, torch.where(unit & 1 == 0, first, second), torch.where(unit & 1 == 0, third, fourth)
    )
    return found.to(torch.uint8)


def philox(counter: Sequence[Tensor], low: Tensor, high: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Four words of a counter of four words and a key of two, all in int64, whose products wrap as the words do."""
    a, b, c, d = counter
    for _ in range(rounds):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d
