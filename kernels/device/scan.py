"""The forward and the backward scan over time, for every cell, one slice or many, one direction or two.

Grid: (S slices, groups). A group takes one job, ``subtiles`` batch tiles in one direction: its programs load their
shares of W_hh once and keep what fits for all T steps (``product``). Only h (forward) or the gate gradients (backward)
of one step move between the slices of a group, through the very tensors that hold the result. With S = 1 nothing
moves. Jobs that cannot be resident at the same time follow in launches of their own (``first_job``): a loop over jobs
inside the kernel kept addresses alive through the loop over time, and spilled (seen: LSTM and GRU backward in every
dtype, Triton 3.9.0).

    forward    r_t = W_hh h_{t-1} + b_hh;  state_t, saved_t = cell.forward(x_t, r_t, state_{t-1})
    backward   dx_t, dr_t, e_t = cell.backward(dstate_t, saved_t, state_{t-1});  dh_{t-1} = e_t + W_hh^T dr_t

Gates (or units) are the M of the product and the batch is its N. Rows past B repeat the last row and are not
stored; units past H have zero weights and stay zero. The batch tiles of a job take turns within a step, so that one's
exchange is on its way while another's product is formed.

A stack of L layers as a wave (``tiling.layers``): each group takes a job in one layer, and all layers of a job are
resident together. In every step a layer also multiplies what its neighbour, the layer below (in the backward: above),
has put, while its own exchange is on its way. It is one step behind its neighbour in the forward and two in the
backward, so that the wave takes T + L - 1 and T + 2L - 2 steps:

    forward    x^l_t = W_ih^l h^{l-1}_t + b_ih^l            backward    dy^l_t = (W_ih^{l+1})^T dx^{l+1}_t

The first layer of the wave has zeros for this second matrix and a finite operand, so that all programs are alike.

Rows that begin anew or skip a step (``marks``) change which state a row goes on from and what it keeps, never the
number of exchanges, which is the same for every program of a group.
"""

import triton
import triton.language as tl

from ..planner.launch_metadata import launch_metadata
from .exchange import arrive, put, wait
from .product import add_parts, join, product_local, product_shared, resident, streamed
from .step_flags import BEGINS, SKIPPED, cut, load_marks, reset_slot, rows_before, where_marked, with_begun, zero_marked
from .tile_tuples import add_first, load, load_states, load_tiles, moved, part_of, store, store_tiles, sums, zero_where
from .tiles import batch_rows, job_of, layer_of, narrow, previous_slot, row_offset, time_of, unit_offsets


@triton.jit
def put_tiles(pointer, offsets, mask, stride: tl.constexpr, tiles, tiling: tl.constexpr, exchange: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        value = narrow(tiles[i], pointer.dtype.element_ty, tiling.interpreted)
        put(pointer + offsets + i * stride, value, mask, exchange)


@triton.jit
def publish(pointer, offsets, mask, stride: tl.constexpr, tiles, counter, tiling: tl.constexpr, exchange: tl.constexpr):
    """Store what the other slices need of this one; with one slice there are none to tell."""
    if tiling.slices == 1:
        store_tiles(pointer, offsets, mask, stride, tiles, tiling)
    else:
        put_tiles(pointer, offsets, mask, stride, tiles, tiling, exchange)
        arrive(counter, exchange)


@triton.jit
def multiply(weights, ahead, stream, pointer, rows, j: tl.constexpr, place, once, step, told, channel, patience,
             tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """Wait for the other slices and form batch tile j's product with what they have put at ``pointer``.

    place: (first index of this program's block of K, block, column); channel: (counters, partial products, error word).
    told: how many steps of the group that puts it must be there.
    """
    base, row, column = place
    counters, parts, error = channel
    R: tl.constexpr = tiling.rows
    lane: tl.constexpr = exchange.stride
    counter = counters + j * (tiling.lanes * lane)
    patience = wait(counter + row * lane, told * (tiling.slices // R), patience, error, exchange)
    product, ahead, patience = product_shared(
        weights, ahead, stream, pointer, rows, base, once, patience, error, tiling, exchange
    )
    if R > 1:
        size: tl.constexpr = tiling.outputs * tiling.wide * tiling.batch_tile
        part = parts + ((j * 2 + step % 2) * tiling.slices + column * R) * size
        product, patience = add_parts(
            product, part, row, counter + (R + column) * lane, (step + 1) * R, patience, error, tiling, exchange
        )
    return product, ahead, patience


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def scan_forward(
    x_gates,
    weight,
    bias,
    states,
    saved,
    marks,
    sync,
    first_job,
    T,
    B,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
    KEEP: tl.constexpr,
):
    """states: tuple of [T + 2, B, D, H], of which those after h have few slots unless KEEP (the initial state in slot
    0, or 1 in reverse; the final one in 1; with marks the reset state in 2). saved: [T, B, D, n, H] or None.
    marks: uint8 [T, B, D] or None. sync: (counters int32 [jobs * L * subtiles * lanes * exchange.stride],
    error word int32 [1], partial products fp32 [groups * subtiles, 2, S, outputs * R*U * BB]).
    For a stack as a wave: states [L, T + 2, ...], saved [L, T, ...], weight [L, 2, G*H, stride] and bias [L, 2, G*H],
    of h first and of what comes from below second; x_gates of the lowest layer."""
    H: tl.constexpr = tiling.hidden
    D: tl.constexpr = tiling.directions
    G: tl.constexpr = tiling.gates
    U: tl.constexpr = tiling.units
    BB: tl.constexpr = tiling.batch_tile
    K: tl.constexpr = tiling.saved
    N: tl.constexpr = tiling.subtiles
    R: tl.constexpr = tiling.rows
    W: tl.constexpr = tiling.wide
    n: tl.constexpr = len(states)
    lane: tl.constexpr = exchange.stride
    in_registers: tl.constexpr = tiling.in_registers
    chunks: tl.constexpr = len(tiling.chunks)
    counters, error, parts = sync
    L: tl.constexpr = tiling.layers
    group = tl.program_id(1)
    turn_of_job, layer = layer_of(group, tiling)
    job, direction, b0 = job_of(first_job + turn_of_job, B, N * BB)
    counters += (job * L + layer) * (N * tiling.lanes * lane)
    parts += group.to(tl.int64) * (N * 2 * tiling.slices * tiling.outputs * W * BB)
    patience = tl.full((), exchange.patience, tl.int32)
    slice_id = tl.program_id(0)
    column = slice_id // R
    row = slice_id % R
    own_block = slice_id // tiling.columns
    base = row * tiling.block
    place = (base, row, column)
    channel = (counters, parts, error)
    units = slice_id * U + tl.arange(0, U)
    mask = (units < H)[:, None]

    corner = weight + direction.to(tl.int64) * (G * H * tiling.stride)
    if L > 1:
        corner = weight + layer.to(tl.int64) * (2 * G * H * tiling.stride)
        bias += layer * (2 * G * H)
        # One factor after the other in 64 bits: B*K*H alone may pass 2**31.
        if saved is not None:
            saved += layer.to(tl.int64) * T * B * (K * H)
        # From the layer below comes its h of this step; the lowest one multiplies its own h0 by zero.
        rises = tl.minimum(layer, 1)
        given = (units < H * (1 - rises))[:, None]
        lower = states[0] + (layer - rises).to(tl.int64) * (T + 2) * B * H
        channel_below = (counters - rises * (N * tiling.lanes * lane), parts, error)
        slots = T + 2
        if not KEEP:
            slots = 2 if marks is None else 3
        slot_size = layer.to(tl.int64) * B * H
        states = moved(states[:1], slot_size * (T + 2)) + moved(states[1:], slot_size * slots)
    m_rows = ()
    m_masks = ()
    for p in tl.static_range(len(tiling.packs)):
        m = tl.arange(0, tiling.packs[p] * W)
        unit = column * W + m % W
        m_rows = m_rows + ((tiling.first_gates[p] + m // W) * H + unit,)
        m_masks = m_masks + (unit < H,)
    held = resident(corner, m_rows, m_masks, base, 0, in_registers, tiling, exchange)
    if L > 1:
        second = corner + G * H * tiling.stride
        held_below = resident(second, m_rows, m_masks, base, 0, in_registers, tiling, exchange)
    t = time_of(0, direction, T)
    state = ()
    for j in tl.static_range(N):
        first, rows, own = batch_rows(b0 + j * BB, B, tiling)
        for i in tl.static_range(n):
            slot = previous_slot(t, direction)
            if i > 0 and not KEEP:
                slot = tl.minimum(slot, 1)
            offsets = row_offset(slot, first, direction, B, D, H) + unit_offsets(units, rows, D * H)
            state = state + (load(states[i] + offsets, mask),)

    # One turn, which the compiler cannot know: what goes to registers has left shared memory before the rest is loaded.
    once = tl.minimum(T, 1)
    turn = 0
    while turn < once:
        shared = resident(corner, m_rows, m_masks, base, in_registers, chunks, tiling, exchange)
        weights = join(held, shared)
        if L > 1:
            shared_below = resident(second, m_rows, m_masks, base, in_registers, chunks, tiling, exchange)
            weights_below = join(held_below, shared_below)
            biases_below = ()
            for g in tl.static_range(G):
                biases_below = biases_below + (load(bias + (G + g) * H + units, units < H)[:, None],)
        stream = (corner, m_rows, m_masks)
        ahead = ()
        if tiling.streamed > 0:
            ahead = streamed(corner, m_rows, m_masks, 0, base, tiling)
        biases = ()
        for g in tl.static_range(G):
            biases = biases + (load(bias + direction * (G * H) + g * H + units, units < H)[:, None],)

        step = 0
        while step < T:
            t = time_of(step, direction, T)
            after = ()
            for j in tl.static_range(N):
                first, rows, own = batch_rows(b0 + j * BB, B, tiling)
                counter = counters + j * (tiling.lanes * lane)
                before = part_of(state, j, n)
                rows_of_h = rows
                if marks is not None:
                    mark = load_marks(marks, t, first, rows, direction, B, D)
                    edge = reset_slot(direction, T)
                    rows_of_h = rows_before(mark, rows, previous_slot(t, direction), edge, B)
                    new_offsets = unit_offsets(units, rows, D * H)
                    begins = mask & (mark == BEGINS)[None, :]
                    anew = (load(states[0] + row_offset(edge, first, direction, B, D, H) + new_offsets, begins),)
                    if not KEEP:
                        edge = direction * 0 + 2
                    anew = anew + load_states(
                        states[1:], row_offset(edge, first, direction, B, D, H), new_offsets, begins
                    )
                    before = where_marked(mark, BEGINS, anew, before)
                # Loaded before the wait: the exchange's latency hides it.
                gates = x_gates + row_offset(t, first, direction, B, D, G * H)
                if L == 1:
                    x = load_tiles(gates, unit_offsets(units, rows, D * G * H), mask, H, G)
                else:
                    x = load_tiles(gates, unit_offsets(units, rows, D * G * H), given, H, G)
                    slot = (t + 1) * rises
                    below = lower + row_offset(slot, first, direction, B, D, H)
                    risen, ahead, patience = multiply(
                        weights_below, ahead, stream, below, rows, j, place, once, step, (step + 1) * rises,
                        channel_below, patience, tiling, exchange,
                    )  # fmt: skip
                    # Into the lowest layer nothing rises: zero times its own h0, which may be a NaN that nobody reads.
                    x = sums(x, zero_where(rises == 0, risen), biases_below)
                if tiling.slices == 1:
                    product = product_local(weights, before, once, weight.dtype.element_ty, tiling, exchange)
                else:
                    h = states[0] + row_offset(previous_slot(t, direction), first, direction, B, D, H)
                    product, ahead, patience = multiply(
                        weights, ahead, stream, h, rows_of_h, j, place, once, step, step, channel, patience, tiling,
                        exchange,
                    )  # fmt: skip
                r = ()
                for g in tl.static_range(G):
                    r = r + (product[g] + biases[g],)
                new, kept = cell(x, r, before)
                if marks is not None:
                    new = where_marked(mark, SKIPPED, before, new)
                store_mask = mask & own
                state_offsets = unit_offsets(units, rows, D * H)
                position = row_offset(t + 1, first, direction, B, D, H)
                told = counter + own_block * lane
                publish(states[0] + position, state_offsets, store_mask, 0, (new[0],), told, tiling, exchange)
                if KEEP:
                    for i in tl.static_range(1, n):
                        store(states[i] + position + state_offsets, new[i], store_mask, tiling)
                if saved is not None:
                    position = row_offset(t, first, direction, B, D, K * H)
                    store_tiles(saved + position, unit_offsets(units, rows, D * K * H), store_mask, H, kept, tiling)
                after = after + new
            state = after
            step += 1

        turn += 1

    if not KEEP:
        for j in tl.static_range(N):
            first, rows, own = batch_rows(b0 + j * BB, B, tiling)
            position = row_offset(direction * 0 + 1, first, direction, B, D, H)
            for i in tl.static_range(1, n):
                pointers = states[i] + position + unit_offsets(units, rows, D * H)
                store(pointers, state[j * n + i], mask & own, tiling)


@triton.jit
def load_saved(d_outputs, heard, saved, states, marks, t, first, rows, units, mask, direction, T, B,
               tiling: tl.constexpr):  # fmt: skip
    """What a step of the backward reads: (gradients of the states that were given, where ``heard``; saved tiles; states
    before; the rows' marks, if any)."""
    H: tl.constexpr = tiling.hidden
    D: tl.constexpr = tiling.directions
    K: tl.constexpr = tiling.saved
    offsets = unit_offsets(units, rows, D * H)
    position = row_offset(t, first, direction, B, D, H)
    given = load_states(d_outputs, position, offsets, heard)
    kept = load_tiles(saved + position * K, unit_offsets(units, rows, D * K * H), mask, H, K)
    slot = previous_slot(t, direction)
    rows_of_states = rows
    mark = ()
    if marks is not None:
        mark = (load_marks(marks, t, first, rows, direction, B, D),)
        rows_of_states = rows_before(mark[0], rows, slot, reset_slot(direction, T), B)
    before = row_offset(slot, first, direction, B, D, H)
    return given + kept + load_states(states, before, unit_offsets(units, rows_of_states, D * H), mask) + mark


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def scan_backward(
    d_outputs,
    weight,
    states,
    saved,
    marks,
    d_states,
    d_gates,
    sync,
    first_job,
    T,
    B,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
):
    """d_outputs: gradients of h, and of c where it was given out, of every step, [T, B, D, H] each. d_states: tuple of
    [B, D, H], for each state that of the final one, then room for those of the initial ones, then, where they are asked
    for, of the reset ones. d_gates: (dx, dr), [T, B, D, G*H] each,
    the same tensor where the cell's two gradients are the same. Others as in the forward, with KEEP. For a stack as a
    wave: d_outputs of the highest layer, d_states [L, B, D, H], d_gates [L*T + 1, B, D, G*H], its last row zero,
    and the second matrix is that of the layer above."""
    H: tl.constexpr = tiling.hidden
    D: tl.constexpr = tiling.directions
    G: tl.constexpr = tiling.gates
    U: tl.constexpr = tiling.units
    BB: tl.constexpr = tiling.batch_tile
    K: tl.constexpr = tiling.saved
    N: tl.constexpr = tiling.subtiles
    R: tl.constexpr = tiling.rows
    W: tl.constexpr = tiling.wide
    n: tl.constexpr = len(states)
    m: tl.constexpr = len(d_outputs)
    resets: tl.constexpr = len(d_states) == 3 * n
    lane: tl.constexpr = exchange.stride
    in_registers: tl.constexpr = tiling.in_registers
    chunks: tl.constexpr = len(tiling.chunks)
    counters, error, parts = sync
    dx_gates, dr_gates = d_gates
    L: tl.constexpr = tiling.layers
    group = tl.program_id(1)
    turn_of_job, layer = layer_of(group, tiling)
    job, direction, b0 = job_of(first_job + turn_of_job, B, N * BB)
    counters += (job * L + layer) * (N * tiling.lanes * lane)
    parts += group.to(tl.int64) * (N * 2 * tiling.slices * tiling.outputs * W * BB)
    patience = tl.full((), exchange.patience, tl.int32)
    slice_id = tl.program_id(0)
    column = slice_id // R
    row = slice_id % R
    own_block = slice_id // tiling.columns
    base = row * tiling.block
    place = (base, row, column)
    channel = (counters, parts, error)
    units = slice_id * U + tl.arange(0, U)
    mask = (units < H)[:, None]
    heard = mask

    corner = weight + direction.to(tl.int64) * (G * H * tiling.stride)
    if L > 1:
        corner = weight + layer.to(tl.int64) * (2 * G * H * tiling.stride)
        saved += layer.to(tl.int64) * T * B * (K * H)
        # From the layer above comes its dx of this step; above the highest is a row of zeros, and nobody to wait for.
        falls = tl.minimum(L - 1 - layer, 1)
        upper = dx_gates + (layer + 1).to(tl.int64) * T * B * (G * H)
        channel_above = (counters + falls * (N * tiling.lanes * lane), parts, error)
        dx_gates += layer.to(tl.int64) * T * B * (G * H)
        dr_gates += layer.to(tl.int64) * T * B * (G * H)
        heard = (units < H * (1 - falls))[:, None]
        slot_size = layer.to(tl.int64) * B * H
        states = moved(states, slot_size * (T + 2))
        d_states = moved(d_states, slot_size)
    outputs = (column * W + tl.arange(0, W),)
    m_mask = (outputs[0] < H,)
    held = resident(corner, outputs, m_mask, base, 0, in_registers, tiling, exchange)
    if L > 1:
        second = corner + G * H * tiling.stride
        held_above = resident(second, outputs, m_mask, base, 0, in_registers, tiling, exchange)
    d_state = ()
    for j in tl.static_range(N):
        first, rows, own = batch_rows(b0 + j * BB, B, tiling)
        edge = row_offset(direction * 0, first, direction, B, D, H)
        d_state = d_state + load_states(d_states[:n], edge, unit_offsets(units, rows, D * H), mask)
    d_reset = ()
    if resets:
        for _ in tl.static_range(N * n):
            d_reset = d_reset + (tl.zeros((U, BB), tl.float32),)

    # One turn, which the compiler cannot know: what goes to registers has left shared memory before the rest is loaded.
    once = tl.minimum(T, 1)
    turn = 0
    while turn < once:
        shared = resident(corner, outputs, m_mask, base, in_registers, chunks, tiling, exchange)
        weights = join(held, shared)
        if L > 1:
            shared_above = resident(second, outputs, m_mask, base, in_registers, chunks, tiling, exchange)
            weights_above = join(held_above, shared_above)
        stream = (corner, outputs, m_mask)
        ahead = ()
        if tiling.streamed > 0:
            ahead = streamed(corner, outputs, m_mask, 0, base, tiling)

        read_ahead = ()
        t = time_of(T - 1, direction, T)
        for j in tl.static_range(N):
            first, rows, own = batch_rows(b0 + j * BB, B, tiling)
            read_ahead = read_ahead + load_saved(
                d_outputs, heard, saved, states, marks, t, first, rows, units, mask, direction, T, B, tiling
            )
        width: tl.constexpr = len(read_ahead) // N

        if L > 1:
            after = ()
            for j in tl.static_range(N):
                first, rows, own = batch_rows(b0 + j * BB, B, tiling)
                d = part_of(d_state, j, n)
                above = upper + row_offset(t * falls, first, direction, B, D, G * H)
                fallen, ahead, patience = multiply(
                    weights_above, ahead, stream, above, rows, j, place, once, 0, falls, channel_above, patience,
                    tiling, exchange,
                )  # fmt: skip
                after = after + (d[0] + fallen[0],) + d[1:]
            d_state = after

        step = 0
        while step < T:
            t = time_of(T - 1 - step, direction, T)
            t_next = time_of(tl.maximum(T - 2 - step, 0), direction, T)
            after = ()
            read_next = ()
            codes = ()
            for j in tl.static_range(N):
                first, rows, own = batch_rows(b0 + j * BB, B, tiling)
                counter = counters + j * (tiling.lanes * lane)
                read = part_of(read_ahead, j, width)
                d = add_first(part_of(d_state, j, n), read, m)
                dx, dr, d_previous = cell(d, read[m : m + K], read[m + K : m + K + n])
                if marks is not None:
                    mark = read[m + K + n]
                    codes = codes + (mark,)
                    dx = zero_marked(mark, SKIPPED, dx)
                    dr = zero_marked(mark, SKIPPED, dr)
                    d_previous = where_marked(mark, SKIPPED, d, d_previous)
                store_mask = mask & own
                gate_offsets = unit_offsets(units, rows, D * G * H)
                gates = row_offset(t, first, direction, B, D, G * H)
                told = counter + own_block * lane
                if tiling.recurrent_gradient and L > 1:
                    # Told together with dr: the layer below multiplies it.
                    put_tiles(dx_gates + gates, gate_offsets, store_mask, H, dx, tiling, exchange)
                publish(dr_gates + gates, gate_offsets, store_mask, H, dr, told, tiling, exchange)
                if tiling.recurrent_gradient and L == 1:
                    store_tiles(dx_gates + gates, gate_offsets, store_mask, H, dx, tiling)
                # What the next step reads from the forward is loaded before the wait: the exchange's latency hides it.
                read_next = read_next + load_saved(
                    d_outputs, heard, saved, states, marks, t_next, first, rows, units, mask, direction, T, B, tiling
                )
                if tiling.slices == 1:
                    product = product_local(weights, dr, once, weight.dtype.element_ty, tiling, exchange)
                    after = after + (d_previous[0] + product[0],) + d_previous[1:]
                else:
                    after = after + d_previous
            read_ahead = read_next
            neighbours = ()
            if tiling.slices > 1:
                d_state = after
                after = ()
                for j in tl.static_range(N):
                    first, rows, own = batch_rows(b0 + j * BB, B, tiling)
                    d = part_of(d_state, j, n)
                    gates = row_offset(t, first, direction, B, D, G * H)
                    dh = d[0]
                    if L > 1:
                        # The neighbour's part of the next step, while this group's own exchange is on its way.
                        above = upper + row_offset(t_next * falls, first, direction, B, D, G * H)
                        fallen, ahead, patience = multiply(
                            weights_above, ahead, stream, above, rows, j, place, once, step,
                            tl.minimum(step + 2, T) * falls, channel_above, patience, tiling, exchange,
                        )  # fmt: skip
                        fallen = (tl.where(step + 1 < T, fallen[0], 0.0),)
                        if marks is None:
                            dh = dh + fallen[0]  # at once: two tiles alive through the product would cost registers
                        else:
                            neighbours = neighbours + fallen
                    product, ahead, patience = multiply(
                        weights, ahead, stream, dr_gates + gates, rows, j, place, once, step, step + 1, channel,
                        patience, tiling, exchange,
                    )  # fmt: skip
                    after = after + (dh + product[0],) + d[1:]
            if marks is not None:
                if resets:
                    d_reset = with_begun(d_reset, after, codes, n)
                after = cut(after, codes, neighbours, n)
            d_state = after
            step += 1

        turn += 1

    # Outside the loops, lest its addresses stay alive in them, and spill (seen: LSTM backward, H=4096).
    for j in tl.static_range(N):
        first, rows, own = batch_rows(b0 + j * BB, B, tiling)
        edge = row_offset(direction * 0, first, direction, B, D, H)
        for i in tl.static_range(n):
            offsets = unit_offsets(units, rows, D * H)
            store(d_states[n + i] + edge + offsets, d_state[j * n + i], mask & own, tiling)
            if resets:
                store(d_states[2 * n + i] + edge + offsets, d_reset[j * n + i], mask & own, tiling)
