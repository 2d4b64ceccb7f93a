"""Where a row of the batch begins anew or has no step: one byte, a mark, per time step, row and direction. Kernels that
make marks, and what the scans do with them.

A step that is not marked follows the one before. Marked BEGINS, it follows the reset state instead: an episode begins.
Marked SKIPPED, it is none of this row's (padding, a masked step): the state stays as it is, and the gradient passes by.

The reset state of h stands in the slot of y that no step of a direction writes or reads, at the other end than the
initial state: what the other slices read of it needs no wait, and is only another address.
"""

import triton
import triton.language as tl

from .tile_tuples import load_states
from .tiles import edge_offset, edge_offsets, previous_slot, row_offset, tile_offset, unit_offsets

# The values stand in persistrnn/step_marks.py too, which has the marks in torch.
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
    position = tile_offset(reset_slot(program.reverse, T), tile, program, B, H, tiling)
    offsets = unit_offsets(program, tile.rows, H, tiling)
    begins = program.unit_mask & is_marked(mark, BEGINS)
    h = load_states(states[:1], position, offsets, begins)
    if not KEEP:
        position = edge_offset(1, tile, program, B, tiling)
        offsets = edge_offsets(program, tile.rows, tiling)
    return h + load_states(states[1:], position, offsets, begins)


@triton.jit
def _runs(cuts, t, b, inside, T):
    """Which rows b run at times t: within their lengths, or where a mask has it."""
    lengths, active, stride_t, stride_b = cuts
    runs = inside
    if lengths is not None:
        runs = runs & (t < tl.load(lengths + b, mask=inside, other=0).to(tl.int64))
    if active is not None:
        runs = runs & (tl.load(active + t * stride_t + b * stride_b, mask=inside, other=0) != 0)
    return runs


@triton.jit(do_not_specialize=["T", "B", "stride_t", "stride_b", "reset_t", "reset_b"])
def make_marks(
    lengths, active, resets, marks, runs, out_of_range, T, B, stride_t, stride_b, reset_t, reset_b, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """lengths: of any integers [B]; active, resets: a byte each for [T, B], with their strides; None where there are
    none. marks: uint8 [T, B, D]; runs: a byte each for [T, B], or None. out_of_range: int32 [1], where a length that is
    not within [0, T] is noted."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, b = index // B, index % B
    inside = t < T
    cuts = lengths, active, stride_t, stride_b
    runs_now = _runs(cuts, t, b, inside, T)
    if runs is not None:
        tl.store(runs + index, runs_now.to(tl.uint8), mask=inside)
    if lengths is not None:
        length = tl.load(lengths + b, mask=inside, other=0).to(tl.int64)
        tl.store(out_of_range + index * 0, 1, mask=inside & (t == 0) & ((length < 0) | (length > T)))
    # In reverse a row begins anew one step before, in time, where the next episode begins.
    for d in tl.static_range(D):
        mark = tl.where(runs_now, 0, SKIPPED)
        if resets is not None:
            begins = runs_now & (t + d < T)
            if d > 0:
                begins = begins & _runs(cuts, t + d, b, begins, T)
            begins = begins & (tl.load(resets + (t + d) * reset_t + b * reset_b, mask=begins, other=0) != 0)
            mark = tl.where(begins, BEGINS, mark)
        tl.store(marks + index * D + d, mark.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["T", "B"])
def gather_before(
    states, marks, found, T, B, D: tl.constexpr, heads: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):
    """Of states [L, T + 2, B, D, H] what each step goes on from, zero where it is skipped: [D, L, T, B, H]. The axes of
    the grid are T*B*H elements, L and D."""
    layer, direction = tl.program_id(1).to(tl.int64), tl.program_id(2)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = T.to(tl.int64) * B * H
    inside = index < count
    row, unit = index // H, index % H
    reverse = direction // heads
    mark = tl.load(marks + row * (D // heads) + reverse, mask=inside, other=0)
    slots = tl.where(reverse == 0, (T + 1).to(tl.int64) * B, 0)
    before = tl.where(mark == BEGINS, row % B + slots, row + previous_slot(0, reverse) * B)
    at = ((layer * (T + 2) * B + before) * D + direction) * H + unit
    value = tl.load(states + at, mask=inside & (mark != SKIPPED), other=0.0)
    tl.store(found + (direction * tl.num_programs(1) + layer) * count + index, value, mask=inside)
