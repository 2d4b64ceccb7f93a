"""The forward and the backward scan over time, for every cell, one slice or many, one direction or two.

Grid: (S slices, groups). A group takes one job, ``subtiles`` batch tiles in one direction: its programs load their
shares of W_hh once and keep what fits for all T steps (``product``). Only h (forward) or the gate gradients (backward)
of one step move between the slices of a group, through the very tensors that hold the result. With S = 1 nothing
moves. Jobs that cannot be resident at the same time follow in launches of their own (``first_job``): a loop over jobs
inside the kernel kept addresses alive through the loop over time, and spilled (seen: LSTM and GRU backward in every
dtype, Triton 3.9.0).

    forward    r_t = W_hh h_{t-1} + b_hh;  state_t, saved_t = cell.forward(x_t, r_t, state_{t-1}, p, e_t)
    backward   dx_t, dr_t, d_t = cell.backward(dstate_t, saved_t, state_{t-1}, p, e_t);  dh_{t-1} = d_t + W_hh^T dr_t

with p the cell's parameters per unit, in registers for all steps, and e_t what it takes per step besides its gates.

Gates (or units) are the M of the product and the batch is its N. Rows past B repeat the last row and are not
stored; units past H have zero weights, and what a cell makes of zeros stays with them. The batch tiles of a job take
turns within a step, so that one's exchange is on its way while another's product is formed.

A stack of L layers as a pipeline (``tiling.layers``): each group takes a job in one layer, and all layers of a job are
resident together. In every step a layer also multiplies what its neighbour, the layer below (in the backward: above),
has put, while its own exchange is on its way. It is one step behind its neighbour in the forward and two in the
backward, so that the pipeline takes T + L - 1 and T + 2L - 2 steps:

    forward    x^l_t = W_ih^l h^{l-1}_t + b_ih^l            backward    dy^l_t = (W_ih^{l+1})^T dx^{l+1}_t

The layer without a neighbour has zeros for this second matrix and a finite operand, so that all programs are alike.
Where both products are only added (in the backward; in the forward of a cell that adds the halves of its gates) the own
one starts from the neighbour's accumulators: one sum over the parts of K (clock, 4 x LSTM 512, B=16, bf16, sm_90,
forward: 3,514 -> 2,859 cycles per step) and, in two dimensions, which only the backward has, one exchange of partial
sums. The product before the loop has one of its own in every layer, so that those of the loop count from one.

Why no wait is for ever: partial sums go round within a layer, and a layer waits but for itself and its neighbour. The
layer without one is a layer alone and comes to its end; so does, in turn, each next one, whose waits for its neighbour
are then over. Nor is a partial sum overwritten: two exchanges later its writer has seen the sums of the one between,
which are announced after the earlier ones were read.

Rows that begin anew or skip a step (``marks``) change which state a row goes on from and what it keeps, never the
number of exchanges, which is the same for every program of a group.

In names, ``own`` is of the layer itself, ``below`` and ``above`` of its neighbour; ``state`` and ``d_state`` are what
goes from step to step in registers, in float32, for each batch tile a tuple of tiles [BB, U].
"""

import triton
import triton.language as tl

from ..planner.launch_metadata import launch_metadata
from .exchange import arrive, put
from .exchanged_product import accumulate, multiply, sum_parts
from .loads import (
    existing,
    load_bias,
    load_extras,
    load_final,
    load_initial,
    load_params,
    load_saved,
    load_step,
    zeros_like_states,
)
from .marks import BEGINS, SKIPPED, is_marked, load_marks, load_reset, rows_before
from .product import corner_of, first_streamed, gather, load_rest, matrix_of, product_local, resident
from .program import Neighbour, locate, own_counter, sync_of_layer
from .tile_tuples import (
    add_tiles,
    choose,
    load,
    load_tiles,
    moved,
    only_where,
    store,
    store_tiles,
    widen_tiles,
    zero_where,
)
from .tiles import batch_tile, edge_offset, edge_offsets, narrow, previous_slot, tile_offset, time_of, unit_offsets
from .widen import scaled


@triton.jit
def put_tiles(pointer, offsets, mask, stride: tl.constexpr, tiles, tiling: tl.constexpr, exchange: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        value = narrow(tiles[i], pointer.dtype.element_ty, tiling.interpreted)
        put(pointer + offsets + i * stride, value, mask, exchange)


@triton.jit
def publish(pointer, offsets, mask, stride: tl.constexpr, tiles, arrival_counter, tiling: tl.constexpr,
            exchange: tl.constexpr):  # fmt: skip
    """Store what the other slices need of this one; with one slice there are none to tell."""
    if tiling.slices == 1:
        store_tiles(pointer, offsets, mask, stride, tiles, tiling, exchange)
    else:
        put_tiles(pointer, offsets, mask, stride, tiles, tiling, exchange)
        arrive(arrival_counter, exchange)


@triton.jit
def store_final(finals, state, y, tile, program, T, B, first: tl.constexpr, tiling: tl.constexpr,
                exchange: tl.constexpr):  # fmt: skip
    """The states after the last step of a batch tile, of which ``first`` is the program's first one."""
    H: tl.constexpr = tiling.hidden
    mask = program.unit_mask & tile.own
    offsets = edge_offset(0, tile, program, B, tiling) + edge_offsets(program, tile.rows, tiling)
    for i in tl.static_range(1, len(finals)):
        store(finals[i] + offsets, state[i], mask, tiling, exchange)
    # Read again what this program has put: kept in registers it would cost them in every step.
    own = y + tile_offset(time_of(T - 1, program.reverse, T) + 1, tile, program, B, H, tiling)
    if first:
        tl.debug_barrier()  # a thread need not have put what it reads
    h = load(own + unit_offsets(program, tile.rows, H, tiling), program.unit_mask)
    store(finals[0] + offsets, h, mask, tiling, exchange)


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def scan_forward(
    x_gates,
    weight,
    gate_data,
    states,
    saved,
    step_data,
    sync,
    first_job,
    T,
    B,
    KEEP: tl.constexpr,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
):
    """states: tuple of [T + 2, B, D, H] for each state, then of room for each final one, [L*D, B, H]. Unless every
    state is kept (KEEP) of those after h there is only the initial one and, with marks, the reset one behind it,
    [L*D, B, H] each. x_gates: [T, B, D, X*H]. gate_data: (bias [D, G*H] or None, scale float32 [D, G*H] of the rows
    of a weight of 8 bits, else None). saved: [T, B, D, n, H] or None. step_data: (marks uint8
    [T, B, D], params [D, P, H], extras [T, B, D, E, H]), None each where there are none. sync: (counters int32
    [jobs * L * subtiles * counters_per_tile * exchange.stride], error word int32 [1], partial sums fp32
    [groups * subtiles, 2, S, tiling.sums * BB * R*U]).
    For a stack as a pipeline: states [L, T + 2, ...], saved and extras [L, T, ...], params [L, P, H], weight
    [L, 2, G*H, stride] and bias [L, 2, G*H], of h first and of what comes from below second; x_gates of the lowest
    layer."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    X: tl.constexpr = tiling.inputs
    L: tl.constexpr = tiling.layers
    N: tl.constexpr = tiling.subtiles
    n: tl.constexpr = len(states) // 2
    finals = states[n:]
    states = states[:n]
    # Nothing else hides the loads of a step from the program, or those of one batch tile from the others' turns.
    AHEAD: tl.constexpr = tiling.slices == 1 or tiling.subtiles > 1
    bias, scale = gate_data
    marks, params, extras = step_data
    program, own_sync = locate(sync, first_job, B, tiling, exchange)
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    units, unit_mask = program.units, program.unit_mask
    x_mask = unit_mask
    corner = corner_of(weight, program, tiling)
    if L > 1:
        layer = program.layer
        if bias is not None:
            bias += layer * (2 * G * H)
        # One factor after the other in 64 bits: B*K*H alone may pass 2**31.
        if saved is not None:
            saved += layer.to(tl.int64) * T * B * (tiling.saved * H)
        if extras is not None:
            extras += layer.to(tl.int64) * T * B * (tiling.extras * H)
        # The lowest layer has x_gates, and multiplies its own h0 by zero; to the others comes the h of the layer below.
        exists = tl.minimum(layer, 1)
        x_mask = (units < H * (1 - exists))[None, :]
        h_below = states[0] + (layer - exists).to(tl.int64) * (T + 2) * B * H
        below = Neighbour(exists, h_below, sync_of_layer(own_sync, -exists, tiling, exchange))
        of_layer = layer.to(tl.int64) * B * H * (T + 2)
        states = moved(states, of_layer) if KEEP else moved(states[:1], of_layer) + states[1:]

    own_matrix = matrix_of(corner, program.unit_group, program.k_start, tiling)
    own_in_registers = resident(own_matrix, 0, tiling.in_registers, tiling, exchange)
    if L > 1:
        below_matrix = matrix_of(corner + G * H * tiling.stride, program.unit_group, program.k_start, tiling)
        below_in_registers = resident(below_matrix, 0, tiling.in_registers, tiling, exchange)
    state = load_initial(states, program, T, B, KEEP, tiling)

    # A loop of one turn, which the compiler cannot know: it keeps apart the weights that live in registers, which pass
    # through shared memory above, and those that then live there.
    opaque_one = tl.minimum(T, 1)
    turn = 0
    while turn < opaque_one:
        own_weights = load_rest(own_in_registers, own_matrix, opaque_one, tiling, exchange)
        if L > 1:
            below_weights = load_rest(below_in_registers, below_matrix, opaque_one, tiling, exchange)
            below_bias = () if bias is None else load_bias(bias + G * H, program, tiling)
        ahead = first_streamed(own_matrix, tiling)
        own_bias = ()
        if bias is not None:
            own_bias = load_bias(bias + program.direction * (G * H), program, tiling)
        scales = ()
        if scale is not None:
            scales = load_bias(scale + program.direction * (G * H), program, tiling)
        p = load_params(params, program, tiling)

        loaded = ()  # per batch tile what the next step reads of its own
        if AHEAD:
            t = time_of(0, program.reverse, T)
            for j in tl.static_range(N):
                tile = batch_tile(program, j, B, tiling)
                of_tile = load_step(
                    x_gates, x_mask, extras, marks, t, tile, program, B, state[j][0], tiling, exchange
                )  # fmt: skip
                loaded = loaded + (of_tile,)

        step = 0
        while step < T:
            t = time_of(step, program.reverse, T)
            after = ()
            next_loaded = ()
            for j in tl.static_range(N):
                tile = batch_tile(program, j, B, tiling)
                before = state[j]
                rows_of_h = tile.rows
                mark = ()
                if AHEAD:
                    x, e, mark = loaded[j]
                    x = widen_tiles(x)
                    e = widen_tiles(e)
                    t_next = time_of(tl.minimum(step + 1, T - 1), program.reverse, T)
                    of_tile = load_step(
                        x_gates, x_mask, extras, marks, t_next, tile, program, B, before[0], tiling, exchange
                    )  # fmt: skip
                    next_loaded = next_loaded + (of_tile,)
                elif marks is not None:
                    mark = (load_marks(marks, t, tile, program, B, tiling),)
                if marks is not None:
                    rows_of_h = rows_before(mark[0], tile.rows, t, program.reverse, T, B)
                    reset = load_reset(states, mark[0], tile, program, T, B, KEEP, tiling)
                    before = choose(is_marked(mark[0], BEGINS), reset, before)
                if not AHEAD:
                    x_tile = x_gates + tile_offset(t, tile, program, B, X * H, tiling)
                    x_offsets = unit_offsets(program, tile.rows, X * H, tiling)
                    if tiling.ring == 0:  # before the wait: the exchange's latency hides it
                        x = load_tiles(x_tile, x_offsets, x_mask, H, X)
                    e = load_extras(extras, t, tile, program, B, tiling)
                accs = ()
                if L > 1:
                    h = below.pointer + tile_offset((t + 1) * below.exists, tile, program, B, H, tiling)
                    accs, ahead, spin_limit = accumulate(
                        below_weights, ahead, (), h, tile.rows, j, program, (step + 1) * below.exists, below.sync,
                        spin_limit, tiling, exchange,
                    )  # fmt: skip
                    # Into the lowest layer nothing comes: zero times its own h0, which may be a NaN that nobody reads.
                    if tiling.recurrent_gradient:
                        x = add_tiles(x, zero_where(below.exists == 0, gather(accs, tiling)))
                        accs = ()
                    else:
                        # The cell only adds both halves: one sum over the parts of K for both products.
                        accs = zero_where(below.exists == 0, accs)
                    x = add_tiles(x, below_bias)
                if tiling.slices == 1:
                    inner = existing(before, program, tiling)
                    product = product_local(own_weights, inner, states[0].dtype.element_ty, tiling, exchange)
                else:
                    h = states[0] + tile_offset(previous_slot(t, program.reverse), tile, program, B, H, tiling)
                    product, ahead, spin_limit = multiply(
                        own_weights, ahead, accs, h, rows_of_h, j, program, step, step, own_sync, spin_limit, tiling,
                        exchange,
                    )  # fmt: skip
                if tiling.ring > 0:  # a wide tile's are many registers, and its product takes long
                    x = load_tiles(x_tile, x_offsets, x_mask, H, X)
                new, to_save = cell(x, add_tiles(scaled(product, scales), own_bias), before, p, e)
                if marks is not None:
                    new = choose(is_marked(mark[0], SKIPPED), before, new)

                mask = unit_mask & tile.own
                offsets = unit_offsets(program, tile.rows, H, tiling)
                position = tile_offset(t + 1, tile, program, B, H, tiling)
                counter = own_counter(program, j, own_sync, tiling, exchange)
                publish(states[0] + position, offsets, mask, 0, (new[0],), counter, tiling, exchange)
                if KEEP:
                    for i in tl.static_range(1, n):
                        store(states[i] + position + offsets, new[i], mask, tiling, exchange)
                if saved is not None:
                    to = saved + tile_offset(t, tile, program, B, tiling.saved * H, tiling)
                    offsets = unit_offsets(program, tile.rows, tiling.saved * H, tiling)
                    store_tiles(to, offsets, mask, H, to_save, tiling, exchange)
                after = after + (new,)
            state = after
            loaded = next_loaded
            step += 1

        turn += 1

    for j in tl.static_range(N):
        tile = batch_tile(program, j, B, tiling)
        store_final(finals, state[j], states[0], tile, program, T, B, j == 0, tiling, exchange)


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def scan_backward(
    d_outputs,
    weight,
    states,
    saved,
    step_data,
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
    """d_outputs: gradients of h, and of c where it was given out, of every step, [T, B, D, H] each. states: tuple of
    [T + 2, B, D, H]. d_states: tuple of [L*D, B, H], for each state that of the final one, then room for those of the
    initial ones, then, where they are asked for, of the reset ones. d_gates: (dx [T, B, D, V*H], dr [T, B, D, G*H]),
    V = X and what is stored behind dx, the same tensor where the cell's two gradients are the same. Others as in the
    forward. For a stack as a pipeline: d_outputs of the highest layer, d_gates [L*T + 1, B, D, G*H], its last row zero,
    and the second matrix is that of the layer above."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    L: tl.constexpr = tiling.layers
    N: tl.constexpr = tiling.subtiles
    n: tl.constexpr = len(states)
    V: tl.constexpr = tiling.inputs + tiling.more_gradients
    resets: tl.constexpr = len(d_states) == 3 * n
    HELD: tl.constexpr = tiling.slices == 1  # whose tiles would pass through shared memory
    dx_gates, dr_gates = d_gates
    marks, params, extras = step_data
    program, own_sync = locate(sync, first_job, B, tiling, exchange)
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    units, unit_mask = program.units, program.unit_mask
    dy_mask = unit_mask
    corner = corner_of(weight, program, tiling)
    if L > 1:
        layer = program.layer
        if saved is not None:
            saved += layer.to(tl.int64) * T * B * (tiling.saved * H)
        if extras is not None:
            extras += layer.to(tl.int64) * T * B * (tiling.extras * H)
        # The highest layer has d_outputs, and a row of zeros above it; to the others comes the dx of the layer above.
        exists = tl.minimum(L - 1 - layer, 1)
        dx_above = dx_gates + (layer + 1).to(tl.int64) * T * B * (G * H)
        above = Neighbour(exists, dx_above, sync_of_layer(own_sync, exists, tiling, exchange))
        dx_gates += layer.to(tl.int64) * T * B * (G * H)
        dr_gates += layer.to(tl.int64) * T * B * (G * H)
        dy_mask = (units < H * (1 - exists))[None, :]
        states = moved(states, layer.to(tl.int64) * B * H * (T + 2))

    own_matrix = matrix_of(corner, program.unit_group, program.k_start, tiling)
    own_in_registers = resident(own_matrix, 0, tiling.in_registers, tiling, exchange)
    if L > 1:
        above_matrix = matrix_of(corner + G * H * tiling.stride, program.unit_group, program.k_start, tiling)
        above_in_registers = resident(above_matrix, 0, tiling.in_registers, tiling, exchange)
    d_state = load_final(d_states[:n], program, B, tiling)
    d_reset = ()  # if asked for
    if resets:
        d_reset = zeros_like_states(d_state)

    # A loop of one turn, which the compiler cannot know: it keeps apart the weights that live in registers, which pass
    # through shared memory above, and those that then live there.
    opaque_one = tl.minimum(T, 1)
    turn = 0
    while turn < opaque_one:
        own_weights = load_rest(own_in_registers, own_matrix, opaque_one, tiling, exchange)
        if L > 1:
            above_weights = load_rest(above_in_registers, above_matrix, opaque_one, tiling, exchange)
        ahead = first_streamed(own_matrix, tiling)
        p = load_params(params, program, tiling)

        loaded = ()  # per batch tile what the next step needs of the forward
        t = time_of(T - 1, program.reverse, T)
        for j in tl.static_range(N):
            tile = batch_tile(program, j, B, tiling)
            of_tile = load_saved(
                d_outputs, dy_mask, saved, states, marks, extras, t, tile, program, T, B, tiling,
                d_state[j][0] if HELD else None, exchange,
            )  # fmt: skip
            loaded = loaded + (of_tile,)

        if L > 1:
            after = ()
            for j in tl.static_range(N):
                tile = batch_tile(program, j, B, tiling)
                dx = above.pointer + tile_offset(t * above.exists, tile, program, B, G * H, tiling)
                from_above, ahead, spin_limit = multiply(
                    above_weights, ahead, (), dx, tile.rows, j, program, 0, above.exists, above.sync, spin_limit,
                    tiling, exchange,
                )  # fmt: skip
                after = after + (add_tiles(d_state[j], from_above),)
            d_state = after

        step = 0
        while step < T:
            t = time_of(T - 1 - step, program.reverse, T)
            t_next = time_of(tl.maximum(T - 2 - step, 0), program.reverse, T)
            # First what is elementwise, of all batch tiles: the gate gradients are on their way to the other slices
            # while what the next step needs is loaded.
            before = ()
            next_loaded = ()
            for j in tl.static_range(N):
                tile = batch_tile(program, j, B, tiling)
                given, saved_tiles, states_before, e, mark = loaded[j]
                if HELD:  # Before what is stored here, past which no load is moved.
                    of_tile = load_saved(d_outputs, dy_mask, saved, states, marks, extras, t_next, tile, program, T, B,
                                         tiling, d_state[j][0], exchange)  # fmt: skip
                d = add_tiles(d_state[j], widen_tiles(given))
                dx, dr, d_before = cell(d, widen_tiles(saved_tiles), widen_tiles(states_before), p, widen_tiles(e))
                if marks is not None:
                    skipped = is_marked(mark[0], SKIPPED)
                    dx = zero_where(skipped, dx)
                    dr = zero_where(skipped, dr)
                    d_before = choose(skipped, d, d_before)
                mask = unit_mask & tile.own
                offsets = unit_offsets(program, tile.rows, G * H, tiling)
                position = tile_offset(t, tile, program, B, G * H, tiling)
                counter = own_counter(program, j, own_sync, tiling, exchange)
                if tiling.recurrent_gradient and L > 1:
                    # Announced together with dr: the layer below multiplies it.
                    put_tiles(dx_gates + position, offsets, mask, H, dx, tiling, exchange)
                publish(dr_gates + position, offsets, mask, H, dr, counter, tiling, exchange)
                if tiling.recurrent_gradient and L == 1:
                    wide = dx_gates + tile_offset(t, tile, program, B, V * H, tiling)
                    store_tiles(wide, unit_offsets(program, tile.rows, V * H, tiling), mask, H, dx, tiling, exchange)
                if not HELD:
                    of_tile = load_saved(d_outputs, dy_mask, saved, states, marks, extras, t_next, tile, program, T, B,
                                         tiling)  # fmt: skip
                next_loaded = next_loaded + (of_tile,)
                if tiling.slices == 1:
                    inner = existing(dr, program, tiling)
                    product = product_local(own_weights, inner, weight.dtype.element_ty, tiling, exchange)
                    d_before = add_tiles(d_before, product)
                before = before + (d_before,)
            # Then the products.
            neighbours = ()
            if tiling.slices > 1:
                elementwise = before
                before = ()
                for j in tl.static_range(N):
                    tile = batch_tile(program, j, B, tiling)
                    accs, neighbour = (), ()
                    if L > 1:
                        # The neighbour's part of the next step, while this group's own exchange is on its way; in the
                        # last one there is none: the row of zeros.
                        t_above = tl.where(step + 1 < T, t_next * above.exists, (L - 1 - program.layer) * T)
                        dx = above.pointer + tile_offset(t_above, tile, program, B, G * H, tiling)
                        accs, ahead, spin_limit = accumulate(
                            above_weights, ahead, accs, dx, tile.rows, j, program,
                            tl.minimum(step + 2, T) * above.exists, above.sync, spin_limit, tiling, exchange,
                        )  # fmt: skip
                        if marks is not None:
                            # Where a row begins anew only the own part is cut.
                            neighbour = gather(accs, tiling)
                            accs = ()
                    dr = dr_gates + tile_offset(t, tile, program, B, G * H, tiling)
                    accs, ahead, spin_limit = accumulate(
                        own_weights, ahead, accs, dr, tile.rows, j, program, step + 1, own_sync, spin_limit, tiling,
                        exchange,
                    )  # fmt: skip
                    # One sum over the parts of K, and one exchange of it, for both products.
                    turn_of_sums = step + 1 if L > 1 else step  # a pipeline's first is before the loop
                    product, spin_limit = sum_parts(
                        gather(accs, tiling) + neighbour, j, program, turn_of_sums, own_sync, spin_limit, tiling,
                        exchange,
                    )  # fmt: skip
                    before = before + (add_tiles(elementwise[j], product[:1]),)
                    neighbours = neighbours + (product[1:],)
            if marks is not None:
                # To the step before goes nothing of the rows that began anew, but for the neighbour's part of it.
                uncut = before
                before = ()
                resets_before = d_reset
                d_reset = ()
                for j in tl.static_range(N):
                    _given, _saved, _before, _extras, mark = loaded[j]
                    begins = is_marked(mark[0], BEGINS)
                    if resets:
                        d_reset = d_reset + (add_tiles(resets_before[j], only_where(begins, uncut[j])),)
                    d = zero_where(begins, uncut[j])
                    if L > 1:
                        d = add_tiles(d, neighbours[j])
                    before = before + (d,)
            loaded = next_loaded
            d_state = before
            step += 1

        turn += 1

    # Outside the loops, lest its addresses stay alive in them, and spill (seen: LSTM backward, H=4096).
    for j in tl.static_range(N):
        tile = batch_tile(program, j, B, tiling)
        position = edge_offset(0, tile, program, B, tiling)
        for i in tl.static_range(n):
            offsets = edge_offsets(program, tile.rows, tiling)
            mask = unit_mask & tile.own
            store(d_states[n + i] + position + offsets, d_state[j][i], mask, tiling, exchange)
            if resets:
                store(d_states[2 * n + i] + position + offsets, d_reset[j][i], mask, tiling, exchange)
