"""The forward and the backward scan of cells whose step has several stages: between its pointwise parts are means over
all units (``cells.stages``).

Built from the parts of ``scan``, in kernels of their own: those of steps of one stage are not touched. One job is one
batch tile, in one dimension of slices, one layer. A step is, with K means::

    forward    r = W_hh h;  q_k = mean(cell(k, x, r, state, p, e, q_0 .. q_{k-1}));  state, saved = cell(K, .., q)
    backward   of a result's gradient the operand's is the same mean: from the last to the first, then dx, dr, d

In a slice the sum is local. Between slices each mean is an exchange (``means``), behind that of h or of dr.
"""

import triton
import triton.language as tl

from ..planner.launch_metadata import launch_metadata
from .loads import (
    existing,
    load_bias,
    load_extras,
    load_final,
    load_initial,
    load_params,
    load_saved,
    zeros_like_states,
)
from .marks import BEGINS, SKIPPED, is_marked, load_marks, load_reset, rows_before
from .means import mean_over_units
from .product import corner_of, first_streamed, load_rest, matrix_of, product_local, resident
from .program import locate, own_counter
from .scan import multiply, publish
from .tile_tuples import add_tiles, choose, load_tiles, only_where, store, store_tiles, zero_where
from .tiles import batch_tile, previous_slot, tile_offset, time_of, unit_offsets


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def staged_forward(
    x_gates,
    weight,
    bias,
    states,
    saved,
    step_data,
    sync,
    first_job,
    T,
    B,
    cell: tl.constexpr,
    tiling: tl.constexpr,
    exchange: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Arguments are those of ``scan_forward``. Where the step adds its own bias (``tiling.normalised``), that is behind
    the params."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    X: tl.constexpr = tiling.inputs
    K: tl.constexpr = tiling.means
    n: tl.constexpr = len(states)
    marks, params, extras = step_data
    program, own_sync = locate(sync, first_job, B, tiling, exchange)
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    unit_mask = program.unit_mask

    matrix = matrix_of(corner_of(weight, program, tiling), program.unit_group, program.k_start, tiling)
    in_registers = resident(matrix, 0, tiling.in_registers, tiling, exchange)
    state = load_initial(states, program, T, B, KEEP, tiling)[0]

    # A loop of one turn, which the compiler cannot know: it keeps apart the weights that live in registers, which pass
    # through shared memory above, and those that then live there.
    opaque_one = tl.minimum(T, 1)
    turn = 0
    while turn < opaque_one:
        weights = load_rest(in_registers, matrix, opaque_one, tiling, exchange)
        ahead = first_streamed(matrix, tiling)
        own_bias = ()
        if not tiling.normalised:
            own_bias = load_bias(bias + program.direction * (G * H), program, tiling)
        p = load_params(params, program, tiling)

        step = 0
        while step < T:
            t = time_of(step, program.reverse, T)
            tile = batch_tile(program, 0, B, tiling)
            before = state
            rows_of_h = tile.rows
            if marks is not None:
                mark = load_marks(marks, t, tile, program, B, tiling)
                rows_of_h = rows_before(mark, tile.rows, t, program.reverse, T, B)
                reset = load_reset(states, mark, tile, program, T, B, KEEP, tiling)
                before = choose(is_marked(mark, BEGINS), reset, before)
            # Loaded before the wait: the exchange's latency hides it.
            x_tile = x_gates + tile_offset(t, tile, program, B, X * H, tiling)
            x = load_tiles(x_tile, unit_offsets(program, tile.rows, X * H, tiling), unit_mask, H, X)
            e = load_extras(extras, t, tile, program, B, tiling)
            if tiling.slices == 1:
                inner = existing(before, program, tiling)
                r = product_local(weights, inner, weight.dtype.element_ty, tiling, exchange)
            else:
                h = states[0] + tile_offset(previous_slot(t, program.reverse), tile, program, B, H, tiling)
                r, ahead, spin_limit = multiply(
                    weights, ahead, h, rows_of_h, 0, program, step, step, own_sync, spin_limit, tiling, exchange
                )
            r = add_tiles(r, own_bias)
            q = ()
            for k in tl.static_range(K):
                operand = cell(k, x, r, before, p, e, q)[0]
                mean, spin_limit = mean_over_units(
                    operand, step * K + k, program, own_sync, spin_limit, tiling, exchange
                )
                q = q + (mean,)
            new, to_save = cell(K, x, r, before, p, e, q)
            if marks is not None:
                new = choose(is_marked(mark, SKIPPED), before, new)

            mask = unit_mask & tile.own
            offsets = unit_offsets(program, tile.rows, H, tiling)
            position = tile_offset(t + 1, tile, program, B, H, tiling)
            counter = own_counter(program, 0, own_sync, tiling, exchange)
            publish(states[0] + position, offsets, mask, 0, (new[0],), counter, tiling, exchange)
            if KEEP:
                for i in tl.static_range(1, n):
                    store(states[i] + position + offsets, new[i], mask, tiling, exchange)
            if saved is not None:
                to = saved + tile_offset(t, tile, program, B, tiling.saved * H, tiling)
                offsets = unit_offsets(program, tile.rows, tiling.saved * H, tiling)
                store_tiles(to, offsets, mask, H, to_save, tiling, exchange)
            state = new
            step += 1

        turn += 1

    if not KEEP:
        tile = batch_tile(program, 0, B, tiling)
        position = tile_offset(program.direction * 0 + 1, tile, program, B, H, tiling)
        for i in tl.static_range(1, n):
            pointers = states[i] + position + unit_offsets(program, tile.rows, H, tiling)
            store(pointers, state[i], unit_mask & tile.own, tiling, exchange)


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def staged_backward(
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
    """Arguments are those of ``scan_backward``."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    K: tl.constexpr = tiling.means
    n: tl.constexpr = len(states)
    V: tl.constexpr = tiling.inputs + tiling.more_gradients
    resets: tl.constexpr = len(d_states) == 3 * n
    dx_gates, dr_gates = d_gates
    marks, params, extras = step_data
    program, own_sync = locate(sync, first_job, B, tiling, exchange)
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    unit_mask = program.unit_mask

    matrix = matrix_of(corner_of(weight, program, tiling), program.unit_group, program.k_start, tiling)
    in_registers = resident(matrix, 0, tiling.in_registers, tiling, exchange)
    final = load_final(d_states[:n], program, B, tiling)
    d_state = final[0]
    d_reset = ()  # if asked for
    if resets:
        d_reset = zeros_like_states(final)[0]

    # A loop of one turn, as in the forward.
    opaque_one = tl.minimum(T, 1)
    turn = 0
    while turn < opaque_one:
        weights = load_rest(in_registers, matrix, opaque_one, tiling, exchange)
        ahead = first_streamed(matrix, tiling)
        p = load_params(params, program, tiling)
        tile = batch_tile(program, 0, B, tiling)
        t = time_of(T - 1, program.reverse, T)
        loaded = load_saved(d_outputs, unit_mask, saved, states, marks, extras, t, tile, program, T, B, tiling)

        step = 0
        while step < T:
            t = time_of(T - 1 - step, program.reverse, T)
            t_next = time_of(tl.maximum(T - 2 - step, 0), program.reverse, T)
            given, saved_tiles, before, e, mark = loaded
            d = add_tiles(d_state, given)
            d_operands = ()
            for k in tl.static_range(K):
                dq = cell(k, d, saved_tiles, before, p, e, d_operands)[0]
                mean, spin_limit = mean_over_units(dq, step * K + k, program, own_sync, spin_limit, tiling, exchange)
                d_operands = d_operands + (mean,)
            dx, dr, d_before = cell(K, d, saved_tiles, before, p, e, d_operands)
            if marks is not None:
                skipped = is_marked(mark[0], SKIPPED)
                dx = zero_where(skipped, dx)
                dr = zero_where(skipped, dr)
                d_before = choose(skipped, d, d_before)
            mask = unit_mask & tile.own
            counter = own_counter(program, 0, own_sync, tiling, exchange)
            dr_tile = dr_gates + tile_offset(t, tile, program, B, G * H, tiling)
            publish(
                dr_tile, unit_offsets(program, tile.rows, G * H, tiling), mask, H, dr, counter, tiling, exchange
            )  # fmt: skip
            if tiling.recurrent_gradient:
                wide = dx_gates + tile_offset(t, tile, program, B, V * H, tiling)
                store_tiles(wide, unit_offsets(program, tile.rows, V * H, tiling), mask, H, dx, tiling, exchange)
            # What the next step needs of the forward, while dr is on its way.
            next_loaded = load_saved(
                d_outputs, unit_mask, saved, states, marks, extras, t_next, tile, program, T, B, tiling
            )
            if tiling.slices == 1:
                inner = existing(dr, program, tiling)
                product = product_local(weights, inner, weight.dtype.element_ty, tiling, exchange)
            else:
                product, ahead, spin_limit = multiply(
                    weights, ahead, dr_tile, tile.rows, 0, program, step, step + 1, own_sync, spin_limit, tiling,
                    exchange,
                )  # fmt: skip
            d_before = add_tiles(d_before, product)
            if marks is not None:
                # To the step before goes nothing of the rows that began anew.
                begins = is_marked(mark[0], BEGINS)
                if resets:
                    d_reset = add_tiles(d_reset, only_where(begins, d_before))
                d_before = zero_where(begins, d_before)
            loaded = next_loaded
            d_state = d_before
            step += 1

        turn += 1

    # Outside the loops, lest its addresses stay alive in them.
    tile = batch_tile(program, 0, B, tiling)
    position = tile_offset(program.direction * 0, tile, program, B, H, tiling)
    offsets = unit_offsets(program, tile.rows, H, tiling)
    mask = unit_mask & tile.own
    for i in tl.static_range(n):
        store(d_states[n + i] + position + offsets, d_state[i], mask, tiling, exchange)
        if resets:
            store(d_states[2 * n + i] + position + offsets, d_reset[i], mask, tiling, exchange)
