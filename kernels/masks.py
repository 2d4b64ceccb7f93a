"""The launch of the kernel that draws masks."""

import torch
import triton
from torch import Tensor

from .compilation import on_device, start
from .device.masks import BLOCK, draw


def drawn(keys: Tensor, steps: int, batch: int, units: int) -> Tensor:
    """Masks of keys, as `persistrnn.masks.drawn` has them: uint8 [L, T, B, D, E, H] of int64 [L, D, E, fields]."""
    layers, directions, masks, fields = keys.shape
    found = torch.empty(layers, steps, batch, directions, masks, units, dtype=torch.uint8, device=keys.device)
    grid = (triton.cdiv(steps * batch * directions * masks * units, BLOCK), layers)
    with on_device(keys.device):
        sizes = steps, batch, directions * masks, units, fields, BLOCK
        start(keys.device, draw, grid, keys.contiguous(), found, *sizes)
    return found
