"""The forward and the backward scan of cells whose step has several stages: between its pointwise parts are means over
all units, or a second product (``cells.stages``).

Built from the parts of ``scan``, in kernels of their own: those of steps of one stage are not touched. One job is one
batch tile, in one dimension of slices, one layer. A step is, with K stages::

    forward    r = W_hh h;  q_k = stage(cell(k, x, r, state, p, e, q_0 .. q_{k-1}));  state, saved = cell(K, .., q)
    backward   d_k = transposed stage(cell(K - 1 - k, d, .., d_0 .. d_{k-1}));  dx, dr, d = cell(K, d, .., d_0 ..)

A mean is a sum of each slice and, between slices, an exchange of those (``means``); it is its own transpose. A second
product has its own rows of W_hh, the last gate's, in homes of their own, and its operand goes from slice to slice: in
the forward through the first of the saved tiles, in the backward with the gate gradients, of which its are the last.
"""

import triton
import triton.language as tl

from ..planner.launch_metadata import launch_metadata
from .exchanged_product import multiply
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
from .program import Sync, locate, own_counter
from .scan import publish, store_final
from .tile_tuples import add_tiles, choose, load_tiles, only_where, store, store_tiles, zero_where
from .tiles import batch_tile, edge_offset, edge_offsets, previous_slot, tile_offset, time_of, unit_offsets


@triton.jit
def stages_sync(own, exchange: tl.constexpr):
    """Where the later product's operand is counted: behind the state."""
    return Sync(own.counters + exchange.stride, own.counters, own.partial_sums, own.error)


@triton.jit
def later_matrix_of(weight, program, tiling: tl.constexpr):
    """The last gate's rows of W_hh."""
    above: tl.constexpr = (tiling.gates - 1) * tiling.hidden * tiling.stride
    later: tl.constexpr = tiling.later
    corner = corner_of(weight, program, tiling) + above
    return matrix_of(corner, program.unit_group, program.k_start, later)


@triton.jit
def later_product(weights, ahead, operand, pointer, tile, program, step, sync, spin_limit, tiling: tl.constexpr,
                  exchange: tl.constexpr):  # fmt: skip
    """The second product of a step, by what all slices put at ``pointer``: this one a tile [BB, U].

    Returns the product, a tuple of one, what is on its way now, and the spin limit left.
    """
    later: tl.constexpr = tiling.later
    mask = program.unit_mask & tile.own
    offsets = program.units[None, :] + tile.rows[:, None] * later.row_stride
    publish(pointer, offsets, mask, 0, (operand,), own_counter(program, 0, sync, tiling, exchange), tiling, exchange)
    if tiling.slices == 1:
        inner = existing((operand,), program, tiling)
        return product_local(weights, inner, pointer.dtype.element_ty, later, exchange), ahead, spin_limit
    else:
        return multiply(
            weights, ahead, (), pointer, tile.rows, 0, program, step, step + 1, sync, spin_limit, later, exchange
        )


@triton.jit(do_not_specialize=["first_job", "T", "B"], launch_metadata=launch_metadata)
def staged_forward(
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
    """Arguments are those of ``scan_forward``. A step that adds its own bias has it behind the params. Of a step with a
    second product ``saved`` is there in any case, and filled whole only where every state is kept."""
    H: tl.constexpr = tiling.hidden
    G: tl.constexpr = tiling.gates
    X: tl.constexpr = tiling.inputs
    K: tl.constexpr = tiling.means
    n: tl.constexpr = len(states) // 2
    finals = states[n:]
    states = states[:n]
    bias, _scale = gate_data
    marks, params, extras = step_data
    program, own_sync = locate(sync, first_job, B, tiling, exchange)
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    unit_mask = program.unit_mask

    matrix = matrix_of(corner_of(weight, program, tiling), program.unit_group, program.k_start, tiling)
    in_registers = resident(matrix, 0, tiling.in_registers, tiling, exchange)
    if tiling.products > 0:
        later: tl.constexpr = tiling.later
        later_matrix = later_matrix_of(weight, program, tiling)
        later_in_registers = resident(later_matrix, 0, later.in_registers, later, exchange)
        later_sync = stages_sync(own_sync, exchange)
    state = load_initial(states, program, T, B, KEEP, tiling)[0]

    # A loop of one turn, which the compiler cannot know: it keeps apart the weights that live in registers, which pass
    # through shared memory above, and those that then live there.
    opaque_one = tl.minimum(T, 1)
    turn = 0
    while turn < opaque_one:
        weights = load_rest(in_registers, matrix, opaque_one, tiling, exchange)
        ahead = first_streamed(matrix, tiling)
        if tiling.products > 0:
            later_weights = load_rest(later_in_registers, later_matrix, opaque_one, later, exchange)
            later_ahead = first_streamed(later_matrix, later)
        own_bias = ()
        if bias is not None:
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
                    weights, ahead, (), h, rows_of_h, 0, program, step, step, own_sync, spin_limit, tiling, exchange
                )
            r = add_tiles(r, own_bias[: G - tiling.products])
            mask = unit_mask & tile.own
            q = ()
            if saved is not None:
                saved_tile = saved + tile_offset(t, tile, program, B, tiling.saved * H, tiling)
            if tiling.products > 0:
                operand = cell(0, x, r, before, p, e, q)[0]
                product, later_ahead, spin_limit = later_product(
                    later_weights, later_ahead, operand, saved_tile, tile, program, step, later_sync, spin_limit,
                    tiling, exchange,
                )  # fmt: skip
                q = add_tiles(product, own_bias[G - 1 :])
            for k in tl.static_range(K):
                operand = cell(k, x, r, before, p, e, q)[0]
                mean, spin_limit = mean_over_units(
                    operand, step * K + k, program, own_sync, spin_limit, tiling, exchange
                )
                q = q + (mean,)
            new, to_save = cell(K + tiling.products, x, r, before, p, e, q)
            if marks is not None:
                new = choose(is_marked(mark, SKIPPED), before, new)

            offsets = unit_offsets(program, tile.rows, H, tiling)
            position = tile_offset(t + 1, tile, program, B, H, tiling)
            counter = own_counter(program, 0, own_sync, tiling, exchange)
            publish(states[0] + position, offsets, mask, 0, (new[0],), counter, tiling, exchange)
            if KEEP:
                for i in tl.static_range(1, n):
                    store(states[i] + position + offsets, new[i], mask, tiling, exchange)
            if saved is not None and KEEP:
                offsets = unit_offsets(program, tile.rows, tiling.saved * H, tiling)
                to = saved_tile + tiling.products * H
                store_tiles(to, offsets, mask, H, to_save[tiling.products :], tiling, exchange)
            state = new
            step += 1

        turn += 1

    tile = batch_tile(program, 0, B, tiling)
    store_final(finals, state, states[0], tile, program, T, B, True, tiling, exchange)


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
    if tiling.products > 0:
        later: tl.constexpr = tiling.later
        later_matrix = later_matrix_of(weight, program, tiling)
        later_in_registers = resident(later_matrix, 0, later.in_registers, later, exchange)
        later_sync = stages_sync(own_sync, exchange)
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
        if tiling.products > 0:
            later_weights = load_rest(later_in_registers, later_matrix, opaque_one, later, exchange)
            later_ahead = first_streamed(later_matrix, later)
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
            dr_tile = dr_gates + tile_offset(t, tile, program, B, G * H, tiling)
            mask = unit_mask & tile.own
            if tiling.products > 0:
                dq = cell(0, d, saved_tiles, before, p, e, d_operands)
                if marks is not None:
                    dq = zero_where(is_marked(mark[0], SKIPPED), dq)
                d_operands, later_ahead, spin_limit = later_product(
                    later_weights, later_ahead, dq[0], dr_tile + (G - 1) * H, tile, program, step, later_sync,
                    spin_limit, tiling, exchange,
                )  # fmt: skip
            for k in tl.static_range(K):
                dq = cell(k, d, saved_tiles, before, p, e, d_operands)[0]
                mean, spin_limit = mean_over_units(dq, step * K + k, program, own_sync, spin_limit, tiling, exchange)
                d_operands = d_operands + (mean,)
            dx, dr, d_before = cell(K + tiling.products, d, saved_tiles, before, p, e, d_operands)
            if marks is not None:
                skipped = is_marked(mark[0], SKIPPED)
                dx = zero_where(skipped, dx)
                dr = zero_where(skipped, dr)
                d_before = choose(skipped, d, d_before)
            counter = own_counter(program, 0, own_sync, tiling, exchange)
            offsets = unit_offsets(program, tile.rows, G * H, tiling)
            publish(dr_tile, offsets, mask, H, dr, counter, tiling, exchange)
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
                    weights, ahead, (), dr_tile, tile.rows, 0, program, step, step + 1, own_sync, spin_limit, tiling,
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
    position = edge_offset(0, tile, program, B, tiling)
    offsets = edge_offsets(program, tile.rows, tiling)
    mask = unit_mask & tile.own
    for i in tl.static_range(n):
        store(d_states[n + i] + position + offsets, d_state[i], mask, tiling, exchange)
        if resets:
            store(d_states[2 * n + i] + position + offsets, d_reset[i], mask, tiling, exchange)
