"""What a scan reads: before its loop over time, and in each step what is there before the exchange."""

import triton
import triton.language as tl

from .marks import load_marks, rows_before
from .tile_tuples import load, load_states, load_tiles, only_where
from .tiles import batch_tile, edge_offset, edge_offsets, previous_slot, tile_offset, time_of, unit_offsets


@triton.jit
def load_initial(states, program, T, B, KEEP: tl.constexpr, tiling: tl.constexpr):
    """The initial states of all batch tiles."""
    N: tl.constexpr = tiling.subtiles
    n: tl.constexpr = len(states)
    all_tiles = ()
    t = time_of(0, program.reverse, T)
    for j in tl.static_range(N):
        tile = batch_tile(program, j, B, tiling)
        state = ()
        for i in tl.static_range(n):
            if i > 0 and not KEEP:
                offsets = edge_offset(0, tile, program, B, tiling) + edge_offsets(program, tile.rows, tiling)
            else:
                slot = previous_slot(t, program.reverse)
                position = tile_offset(slot, tile, program, B, tiling.hidden, tiling)
                offsets = position + unit_offsets(program, tile.rows, tiling.hidden, tiling)
            state = state + (load(states[i] + offsets, program.unit_mask),)
        all_tiles = all_tiles + (state,)
    return all_tiles


@triton.jit
def load_bias(bias, program, tiling: tl.constexpr):
    """Per gate [1, U], of the program's units."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    tiles = ()
    for g in tl.static_range(G):
        tiles = tiles + (load(bias + g * H + program.units, program.units < H)[None, :],)
    return tiles


@triton.jit
def load_params(params, program, tiling: tl.constexpr):
    """Per parameter [1, U], of the program's units."""
    P: tl.constexpr = tiling.params
    tiles = ()
    if P > 0:
        row = program.layer if tiling.layers > 1 else program.direction
        for i in tl.static_range(P):
            own = params + (row * P + i) * tiling.hidden + program.units
            tiles = tiles + (load(own, program.units < tiling.hidden)[None, :],)
    return tiles


@triton.jit
def load_extras(extras, t, tile, program, B, tiling: tl.constexpr, like=None, exchange: tl.constexpr = None):
    """What the cell takes at time t besides its gates, of a batch tile."""
    E: tl.constexpr = tiling.extras
    H: tl.constexpr = tiling.hidden
    tiles = ()
    if E > 0:
        position = tile_offset(t, tile, program, B, E * H, tiling)
        offsets = unit_offsets(program, tile.rows, E * H, tiling)
        tiles = load_tiles(extras + position, offsets, program.unit_mask, H, E, like, exchange)
    return tiles


@triton.jit
def load_step(x_gates, x_mask, extras, marks, t, tile, program, B, like, tiling: tl.constexpr,
              exchange: tl.constexpr):  # fmt: skip
    """What the forward of time t reads of its own, a step ahead: (input half of the gates; the cell's extras; (marks of
    the rows,), or empty). x_mask: units of which x_gates are given; like: as ``load`` takes it."""
    H: tl.constexpr = tiling.hidden
    X: tl.constexpr = tiling.inputs
    x_tile = x_gates + tile_offset(t, tile, program, B, X * H, tiling)
    x = load_tiles(x_tile, unit_offsets(program, tile.rows, X * H, tiling), x_mask, H, X, like, exchange)
    e = load_extras(extras, t, tile, program, B, tiling, like, exchange)
    mark = ()
    if marks is not None:
        mark = (load_marks(marks, t, tile, program, B, tiling),)
    return x, e, mark


@triton.jit
def existing(tiles, program, tiling: tl.constexpr):
    """Zero past H, where a cell may have made a NaN of zeros, which a weight of zero does not stop."""
    if tiling.guarded:
        return only_where(program.unit_mask, tiles)
    else:
        return tiles


@triton.jit
def load_saved(d_outputs, dy_mask, saved, states, marks, extras, t, tile, program, T, B, tiling: tl.constexpr,
               like=None, exchange: tl.constexpr = None):  # fmt: skip
    """What the backward of time t needs of a batch tile: (gradients of h, and of c where it was given out; the cell's
    saved tiles and the states after the step that it reads; the states before; its extras; (marks of the rows,), or
    empty). dy_mask: units of which d_outputs are given; like: as ``load`` takes it."""
    H: tl.constexpr = tiling.hidden
    K: tl.constexpr = tiling.saved
    A: tl.constexpr = len(tiling.after)
    position = tile_offset(t, tile, program, B, H, tiling)
    given = load_states(d_outputs, position, unit_offsets(program, tile.rows, H, tiling), dy_mask, like, exchange)
    tiles = ()
    if K > 0:
        tiles = load_tiles(
            saved + position * K, unit_offsets(program, tile.rows, K * H, tiling), program.unit_mask, H, K, like,
            exchange,
        )  # fmt: skip
    if A > 0:
        later = tile_offset(t + 1, tile, program, B, H, tiling)
        for i in tl.static_range(A):
            state = states[tiling.after[i]] + later + unit_offsets(program, tile.rows, H, tiling)
            tiles = tiles + (load(state, program.unit_mask, like, exchange),)
    e = load_extras(extras, t, tile, program, B, tiling, like, exchange)
    slot = previous_slot(t, program.reverse)
    rows = tile.rows
    mark = ()
    if marks is not None:
        mark = (load_marks(marks, t, tile, program, B, tiling),)
        rows = rows_before(mark[0], tile.rows, t, program.reverse, T, B)
    position = tile_offset(slot, tile, program, B, H, tiling)
    offsets = unit_offsets(program, rows, H, tiling)
    before = load_states(states, position, offsets, program.unit_mask, like, exchange)
    return given, tiles, before, e, mark


@triton.jit
def load_final(d_states, program, B, tiling: tl.constexpr):
    """The gradients of the final states of all batch tiles."""
    N: tl.constexpr = tiling.subtiles
    final = ()
    for j in tl.static_range(N):
        tile = batch_tile(program, j, B, tiling)
        position = edge_offset(0, tile, program, B, tiling)
        offsets = edge_offsets(program, tile.rows, tiling)
        final = final + (load_states(d_states, position, offsets, program.unit_mask),)
    return final


@triton.jit
def zeros_like_states(states):
    """Zeros of the same shapes."""
    all_tiles = ()
    for j in tl.static_range(len(states)):
        zeros = ()
        for i in tl.static_range(len(states[j])):
            zeros = zeros + (tl.zeros_like(states[j][i]),)
        all_tiles = all_tiles + (zeros,)
    return all_tiles
