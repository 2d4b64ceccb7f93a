"""The forward and the backward scan over time, for every cell, one slice or many, one direction or two.

Grid: (S slices, groups). A group takes one job, a batch tile in one direction: its programs load their shares of W_hh
once and keep them for all T steps. Only h (forward) or the gate gradients (backward) of one step move between the
slices of a group, through the very tensors that hold the result. With S = 1 nothing moves. Jobs that cannot be
resident at the same time follow in launches of their own (``first_job``): a loop over jobs inside the kernel kept
addresses alive through the loop over time, and spilled (seen: LSTM and GRU backward in every dtype, Triton 3.9.0).

    forward    r_t = W_hh h_{t-1} + b_hh;  state_t, saved_t = cell.forward(x_t, r_t, state_{t-1})
    backward   dx_t, dr_t, e_t = cell.backward(dstate_t, saved_t, state_{t-1});  dh_{t-1} = e_t + W_hh^T dr_t

Gates (or units) are the M of the product and the batch is its N. Rows past B repeat the last row and are not
stored; units past H have zero weights and stay zero.

Room left in the contract: lengths and resets are a mask over the batch tile applied to ``state`` between two steps;
masks on h and c likewise; a projection makes the tile that is put narrower than the tile of units. None of them
changes the number of exchanges, which is the same for every program of a group.
"""

import triton
import triton.language as tl

from .exchange import arrive, get, put, wait
from .tiles import (
    accumulator,
    k_index,
    load_weight,
    narrow,
    operand_mask,
    operand_offsets,
    previous_slot,
    row_offset,
    split_gates,
    time_of,
    unit_offsets,
)


@triton.jit
def resident(weight, m, m_mask, m_stride: tl.constexpr, k_stride: tl.constexpr, tiling: tl.constexpr):
    """This program's rows of the product, one tile per chunk of K, to stay on chip for all steps."""
    tiles = ()
    for i in tl.static_range(len(tiling.chunks)):
        k = k_index(tiling.chunks[i].size, tiling.splits)
        corner = weight + tiling.chunks[i].start * k_stride
        tile = load_weight(corner, m, m_mask, m_stride, k, k_stride, tiling.chunks[i].length, tiling.splits)
        tiles = tiles + (tile,)
        # Else all tiles are loaded into registers at once on their way to shared memory, and spill there.
        tl.debug_barrier()
    return tiles


@triton.jit
def dot(weight, operand, acc, tiling: tl.constexpr):
    if tiling.interpreted:
        # The interpreter's dot returns garbage on bfloat16 (seen on 3.6.0 and 3.9.0).
        return acc + tl.dot(weight.to(tl.float32), operand.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(weight, operand, acc, input_precision=tiling.precision)


@triton.jit
def accumulators(tiling: tl.constexpr):
    accs = ()
    for p in tl.static_range(len(tiling.packs)):
        accs = accs + (accumulator(tiling.packs[p] * tiling.units, tiling.batch_tile, tiling.splits),)
    return accs


@triton.jit
def advance(weights, operand, i: tl.constexpr, accs, tiling: tl.constexpr):
    """Add chunk i of the product to the accumulator of each pack of gates."""
    result = ()
    for p in tl.static_range(len(tiling.packs)):
        result = result + (dot(weights[p][i], operand, accs[p], tiling),)
    return result


@triton.jit
def gather(accs, tiling: tl.constexpr):
    """The product as a tuple of tiles [U, BB], one per gate."""
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tiles = tiles + split_gates(accs[p], tiling.packs[p], tiling.units, tiling.batch_tile, tiling.splits)
    return tiles


@triton.jit
def product_local(weights, operands, dtype: tl.constexpr, tiling: tl.constexpr):
    """One slice: the operand never leaves the chip."""
    accs = accumulators(tiling)
    for i in tl.static_range(len(tiling.chunks)):
        accs = advance(weights, narrow(operands[i], dtype, tiling.interpreted), i, accs, tiling)
    return gather(accs, tiling)


@triton.jit
def product_shared(
    weights, pointer, rows, row_stride: tl.constexpr, patience, error, tiling: tl.constexpr, exchange: tl.constexpr
):
    """Many slices: the operand is what all slices of the group have put at ``pointer``."""
    accs = accumulators(tiling)
    for i in tl.static_range(len(tiling.chunks)):
        k = k_index(tiling.chunks[i].size, tiling.splits)
        corner = pointer + tiling.chunks[i].start
        offsets = operand_offsets(k, rows, row_stride, tiling.splits)
        # Offsets that all chunks share, and masks only where needed: kept per chunk they cost registers and spilled.
        if tiling.chunks[i].length == tiling.chunks[i].size:
            operand, patience = get(corner + offsets, None, patience, error, exchange)
        else:
            inside = operand_mask(k, tiling.chunks[i].length, tiling.splits)
            operand, patience = get(corner + offsets, inside, patience, error, exchange)
        accs = advance(weights, operand, i, accs, tiling)
    return gather(accs, tiling), patience


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tiles(pointer, offsets, mask, stride: tl.constexpr, n: tl.constexpr):
    """n tiles [U, BB], ``stride`` elements apart."""
    tiles = ()
    for i in tl.static_range(n):
        tiles = tiles + (load(pointer + offsets + i * stride, mask),)
    return tiles


@triton.jit
def load_states(states, position, offsets, mask):
    """The tuple of states at one 64-bit position of every state's tensor."""
    tiles = ()
    for i in tl.static_range(len(states)):
        tiles = tiles + (load(states[i] + position + offsets, mask),)
    return tiles


@triton.jit
def store(pointers, tile, mask, tiling: tl.constexpr):
    tl.store(pointers, narrow(tile, pointers.dtype.element_ty, tiling.interpreted), mask=mask)


@triton.jit
def store_tiles(pointer, offsets, mask, stride: tl.constexpr, tiles, tiling: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        store(pointer + offsets + i * stride, tiles[i], mask, tiling)


@triton.jit
def publish(pointer, offsets, mask, stride: tl.constexpr, tiles, counter, tiling: tl.constexpr, exchange: tl.constexpr):
    """Store what the other slices need of this one; with one slice there are none to tell."""
    if tiling.slices == 1:
        store_tiles(pointer, offsets, mask, stride, tiles, tiling)
    else:
        for i in tl.static_range(len(tiles)):
            value = narrow(tiles[i], pointer.dtype.element_ty, tiling.interpreted)
            put(pointer + offsets + i * stride, value, mask, exchange)
        arrive(counter, exchange)


@triton.jit(do_not_specialize=["first_job", "T", "B"])
def scan_forward(
    x_gates,
    weight,
    bias,
    states,
    saved,
    sync,
    first_job,
    T,
    B,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
    SAVE: tl.constexpr,
):
    """states: tuple of [T + 2, B, D, H], of which those after h have only 2 slots unless SAVE. saved: [T, B, D, n, H].
    sync: (counters int32 [jobs * exchange.stride], error word int32 [1])."""
    H: tl.constexpr = tiling.hidden
    D: tl.constexpr = tiling.directions
    G: tl.constexpr = tiling.gates
    U: tl.constexpr = tiling.units
    BB: tl.constexpr = tiling.batch_tile
    K: tl.constexpr = tiling.saved
    counters, error = sync
    batch_tiles = tl.cdiv(B, BB)
    job = first_job + tl.program_id(1)
    direction = job // batch_tiles
    b0 = (job % batch_tiles) * BB
    counter = counters + job * exchange.stride
    patience = tl.full((), exchange.patience, tl.int32)
    first_unit = tl.program_id(0) * U
    units = first_unit + tl.arange(0, U)
    rows = tl.minimum(tl.arange(0, BB), B - 1 - b0)
    mask = (units < H)[:, None]
    store_mask = mask & (b0 + tl.arange(0, BB) < B)[None, :]
    gate_offsets = unit_offsets(units, rows, D * G * H)
    state_offsets = unit_offsets(units, rows, D * H)
    saved_offsets = unit_offsets(units, rows, D * K * H)

    weights = ()
    biases = ()
    corner = weight + direction.to(tl.int64) * (G * H * H)
    for p in tl.static_range(len(tiling.packs)):
        m = tl.arange(0, tiling.packs[p] * U)
        row = (tiling.first_gates[p] + m // U) * H + first_unit + m % U
        weights = weights + (resident(corner, row, first_unit + m % U < H, H, 1, tiling),)
    for g in tl.static_range(G):
        biases = biases + (load(bias + direction * (G * H) + g * H + units, units < H)[:, None],)

    t = time_of(0, direction, T)
    state = ()
    for i in tl.static_range(len(states)):
        slot = previous_slot(t, direction)
        if i > 0 and not SAVE:
            slot = tl.minimum(slot, 1)
        state = state + (load(states[i] + row_offset(slot, b0, direction, B, D, H) + state_offsets, mask),)

    for step in range(T):
        t = time_of(step, direction, T)
        # Loaded before the wait: the exchange's latency hides it.
        x = load_tiles(x_gates + row_offset(t, b0, direction, B, D, G * H), gate_offsets, mask, H, G)
        if tiling.slices == 1:
            product = product_local(weights, (state[0],), weight.dtype.element_ty, tiling)
        else:
            patience = wait(counter, step * tiling.slices, patience, error, exchange)
            h = states[0] + row_offset(previous_slot(t, direction), b0, direction, B, D, H)
            product, patience = product_shared(weights, h, rows, D * H, patience, error, tiling, exchange)
        r = ()
        for g in tl.static_range(G):
            r = r + (product[g] + biases[g],)
        state, kept = cell(x, r, state)
        position = row_offset(t + 1, b0, direction, B, D, H)
        publish(states[0] + position, state_offsets, store_mask, 0, (state[0],), counter, tiling, exchange)
        if SAVE:
            for i in tl.static_range(1, len(states)):
                store(states[i] + position + state_offsets, state[i], store_mask, tiling)
            position = row_offset(t, b0, direction, B, D, K * H)
            store_tiles(saved + position, saved_offsets, store_mask, H, kept, tiling)

    if not SAVE:
        for i in tl.static_range(1, len(states)):
            position = row_offset(direction * 0 + 1, b0, direction, B, D, H)
            store(states[i] + position + state_offsets, state[i], store_mask, tiling)


@triton.jit(do_not_specialize=["first_job", "T", "B"])
def scan_backward(
    dy,
    weight,
    states,
    saved,
    d_final,
    d_gates,
    d_initial,
    sync,
    first_job,
    T,
    B,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
):
    """dy: [T, B, D, H]. d_final, d_initial: tuples of [B, D, H], one per state. d_gates: (dx, dr), [T, B, D, G*H] each,
    the same tensor where the cell's two gradients are the same. Others as in the forward, with SAVE."""
    H: tl.constexpr = tiling.hidden
    D: tl.constexpr = tiling.directions
    G: tl.constexpr = tiling.gates
    U: tl.constexpr = tiling.units
    BB: tl.constexpr = tiling.batch_tile
    K: tl.constexpr = tiling.saved
    counters, error = sync
    dx_gates, dr_gates = d_gates
    batch_tiles = tl.cdiv(B, BB)
    job = first_job + tl.program_id(1)
    direction = job // batch_tiles
    b0 = (job % batch_tiles) * BB
    counter = counters + job * exchange.stride
    patience = tl.full((), exchange.patience, tl.int32)
    units = tl.program_id(0) * U + tl.arange(0, U)
    rows = tl.minimum(tl.arange(0, BB), B - 1 - b0)
    mask = (units < H)[:, None]
    store_mask = mask & (b0 + tl.arange(0, BB) < B)[None, :]
    gate_offsets = unit_offsets(units, rows, D * G * H)
    state_offsets = unit_offsets(units, rows, D * H)
    saved_offsets = unit_offsets(units, rows, D * K * H)

    corner = weight + direction.to(tl.int64) * (G * H * H)
    weights = (resident(corner, units, units < H, 1, H, tiling),)
    edge = row_offset(direction * 0, b0, direction, B, D, H)
    d_state = load_states(d_final, edge, state_offsets, mask)

    t = time_of(T - 1, direction, T)
    position = row_offset(t, b0, direction, B, D, H)
    dh = load(dy + position + state_offsets, mask)
    kept = load_tiles(saved + position * K, saved_offsets, mask, H, K)
    before = row_offset(previous_slot(t, direction), b0, direction, B, D, H)
    previous = load_states(states, before, state_offsets, mask)

    for step in range(T):
        dx, dr, d_previous = cell((d_state[0] + dh,) + d_state[1:], kept, previous)
        gates = row_offset(t, b0, direction, B, D, G * H)
        publish(dr_gates + gates, gate_offsets, store_mask, H, dr, counter, tiling, exchange)
        if tiling.recurrent_gradient:
            store_tiles(dx_gates + gates, gate_offsets, store_mask, H, dx, tiling)

        # What the next step reads from the forward is loaded before the wait: the exchange's latency hides it.
        t = time_of(tl.maximum(T - 2 - step, 0), direction, T)
        position = row_offset(t, b0, direction, B, D, H)
        dh = load(dy + position + state_offsets, mask)
        kept = load_tiles(saved + position * K, saved_offsets, mask, H, K)
        before = row_offset(previous_slot(t, direction), b0, direction, B, D, H)
        previous = load_states(states, before, state_offsets, mask)

        if tiling.slices == 1:
            product = product_local(weights, dr, weight.dtype.element_ty, tiling)
        else:
            patience = wait(counter, (step + 1) * tiling.slices, patience, error, exchange)
            product, patience = product_shared(
                weights, dr_gates + gates, rows, D * G * H, patience, error, tiling, exchange
            )
        d_state = (d_previous[0] + product[0],) + d_previous[1:]

    for i in tl.static_range(len(d_initial)):
        store(d_initial[i] + edge + state_offsets, d_state[i], store_mask, tiling)
