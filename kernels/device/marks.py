"""Where a row of the batch begins anew or has no step: one byte, a mark, per time step, row and direction.

A step that is not marked follows the one before. Marked BEGINS, it follows the reset state instead: an episode begins.
Marked SKIPPED, it is none of this row's (padding, a masked step): the state stays as it is, and the gradient passes by.

The reset state of h stands in the slot of y that no step of a direction writes or reads, at the other end than the
initial state: what the other slices read of it needs no wait, and is only another address.
"""

import triton
import triton.language as tl

from .tile_tuples import load_states
from .tiles import previous_slot, row_offset, tile_offset, unit_offsets

# The values stand in persistrnn/step_marks.py too, which makes the marks.
BEGINS = tl.constexpr(1)
SKIPPED = tl.constexpr(2)


@triton.jit
def load_marks(marks, t, tile, program, B, tiling: tl.constexpr):
    """Of the rows of a batch tile: [BB]."""
    D: tl.constexpr = tiling.directions // tiling.heads
    return tl.load(marks + row_offset(t, tile.first, program.reverse, B, D, 1) + tile.rows * D)


@triton.jit
def is_marked(mark, code: tl.constexpr):
    """[BB, 1]: which rows have this mark."""
    return (mark == code)[:, None]


@triton.jit
def reset_slot(reverse, T):
    """Slot of the reset state: the one that this direction has no other use for."""
    return tl.where(reverse == 0, T + 1, 0)


@triton.jit
def rows_before(mark, rows, t, reverse, T, B):
    """Rows of the states before time t, counted from those of its own slot; where a row begins anew, that of the reset
    state's slot. In 64 bits."""
    slots = reset_slot(reverse, T) - previous_slot(t, reverse)
    return rows.to(tl.int64) + tl.where(mark == BEGINS, slots.to(tl.int64) * B, 0)


@triton.jit
def load_reset(states, mark, tile, program, T, B, KEEP: tl.constexpr, tiling: tl.constexpr):
    """The reset states of the rows that begin anew, zero in the others."""
    H: tl.constexpr = tiling.hidden
    slot = reset_slot(program.reverse, T)
    offsets = unit_offsets(program, tile.rows, H, tiling)
    begins = program.unit_mask & is_marked(mark, BEGINS)
    h = load_states(states[:1], tile_offset(slot, tile, program, B, H, tiling), offsets, begins)
    if not KEEP:
        slot = program.direction * 0 + 2
    return h + load_states(states[1:], tile_offset(slot, tile, program, B, H, tiling), offsets, begins)
