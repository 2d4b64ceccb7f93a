"""Where a row of the batch begins anew or has no step: one byte per time step, row and direction.

A step that is not marked follows the one before. Marked BEGINS, it follows the reset state instead: an episode begins.
Marked SKIPPED, it is none of this row's (padding, a masked step): the state stays as it is, and the gradient passes by.

The reset state of h stands in the slot of y that no step of a direction writes or reads, at the other end than the
initial state: what the other slices read of it needs no wait, and is only another address.
"""

import triton
import triton.language as tl

from .tiles import row_offset

# The values stand in persistrnn/segments.py too, which makes the marks.
BEGINS = tl.constexpr(1)
SKIPPED = tl.constexpr(2)


@triton.jit
def load_marks(marks, t, first, rows, direction, B, D: tl.constexpr):
    """Of the rows of a batch tile: [BB]."""
    return tl.load(marks + row_offset(t, first, direction, B, D, 1) + rows * D)


@triton.jit
def reset_slot(direction, T):
    """Slot of the reset state: the one that this direction has no other use for."""
    return tl.where(direction == 0, T + 1, 0)


@triton.jit
def rows_before(mark, rows, slot, edge, B):
    """Rows of the batch, counted from those of ``slot``: where a row begins anew, that of slot ``edge``. In 64 bits."""
    return rows.to(tl.int64) + tl.where(mark == BEGINS, (edge - slot).to(tl.int64) * B, 0)


@triton.jit
def where_marked(mark, code: tl.constexpr, marked, tiles):
    """A tuple of tiles [U, BB], those of ``marked`` in the rows with this mark."""
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where((mark == code)[None, :], marked[i], tiles[i]),)
    return chosen


@triton.jit
def zero_marked(mark, code: tl.constexpr, tiles):
    """The same with zero instead."""
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where((mark == code)[None, :], 0.0, tiles[i]),)
    return chosen


@triton.jit
def with_begun(d_reset, after, codes, n: tl.constexpr):
    """The gradients of the reset states, with those of the rows that began anew at this step."""
    total = ()
    for i in tl.static_range(len(after)):
        total = total + (d_reset[i] + tl.where((codes[i // n] == BEGINS)[None, :], after[i], 0.0),)
    return total


@triton.jit
def cut(after, codes, neighbours, n: tl.constexpr):
    """The gradients for the step before: none in the rows that began anew, but for the neighbour's part of it."""
    left = ()
    for i in tl.static_range(len(after)):
        tile = tl.where((codes[i // n] == BEGINS)[None, :], 0.0, after[i])
        if i % n == 0 and len(neighbours) > 0:
            tile = tile + neighbours[i // n]
        left = left + (tile,)
    return left
