"""The product of many slices with what they exchange: waited for, multiplied, and summed over the parts of K.

``product`` multiplies what is there. Here is when it is there, and who else has a part of the sum.
"""

import triton
import triton.language as tl

from .exchange import announce, await_count, read, wait
from .product import gather, product_shared


@triton.jit
def accumulate(weights, ahead, accs, pointer, rows, j: tl.constexpr, program, steps_needed, sync, spin_limit,
               tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """Wait for the other slices and add to ``accs``, () for nothing, batch tile j's product with what they have put at
    ``pointer``.

    steps_needed: how many steps of the group that puts it must be there; sync: of that group. ahead: the streamed tile
    on its way. Returns the accumulators, what is on its way now, and the spin limit left.
    """
    R: tl.constexpr = tiling.k_parts
    stride: tl.constexpr = exchange.stride
    counters = sync.counters + j * (tiling.counters_per_tile * stride)
    arrivals = steps_needed * (tiling.slices // R)
    spin_limit = wait(counters + program.k_part * stride, arrivals, spin_limit, sync.error, exchange)
    return product_shared(weights, ahead, accs, pointer, rows, spin_limit, sync.error, tiling, exchange)


@triton.jit
def add_parts(tiles, sums_of_group, k_part, counter, target, spin_limit, error, tiling: tl.constexpr,
              exchange: tl.constexpr):  # fmt: skip
    """Two-dimensional split: hand the other slices of the unit group their units of this partial product, and return
    the sum over all R of this slice's own, in the order of the parts of K.

    sums_of_group: the unit group's fp32 buffer [R, tiles, BB, R*U] of this exchange's parity.
    """
    n: tl.constexpr = len(tiles)
    BB: tl.constexpr = tiling.batch_tile
    U: tl.constexpr = tiling.units
    R: tl.constexpr = tiling.k_parts
    size: tl.constexpr = tiling.units_formed * BB
    all_units = tl.arange(0, BB)[:, None] * tiling.units_formed + tl.arange(0, tiling.units_formed)[None, :]
    for g in tl.static_range(n):
        tl.store(sums_of_group + (k_part * n + g) * size + all_units, tiles[g])
    announce(counter, exchange)
    spin_limit = await_count(counter, target, spin_limit, error, exchange)
    own_units = tl.arange(0, BB)[:, None] * tiling.units_formed + (k_part * U + tl.arange(0, U))[None, :]
    sums = ()
    for g in tl.static_range(n):
        total = read(sums_of_group + g * size + own_units)
        for r in tl.static_range(1, R):
            total = total + read(sums_of_group + (r * n + g) * size + own_units)
        sums = sums + (total,)
    return sums, spin_limit


@triton.jit
def sum_parts(tiles, j: tl.constexpr, program, turn, sync, spin_limit, tiling: tl.constexpr, exchange: tl.constexpr):
    """Batch tile j's partial products become products, in the turn-th such exchange of the program's group."""
    R: tl.constexpr = tiling.k_parts
    if R > 1:
        stride: tl.constexpr = exchange.stride
        counters = sync.own_counters + j * (tiling.counters_per_tile * stride)
        size: tl.constexpr = tiling.sums * tiling.units_formed * tiling.batch_tile
        sums = sync.partial_sums + ((j * 2 + turn % 2) * tiling.slices + program.unit_group * R) * size
        tiles, spin_limit = add_parts(
            tiles, sums, program.k_part, counters + (R + program.unit_group) * stride, (turn + 1) * R, spin_limit,
            sync.error, tiling, exchange,
        )  # fmt: skip
    return tiles, spin_limit


@triton.jit
def multiply(weights, ahead, accs, pointer, rows, j: tl.constexpr, program, step, steps_needed, sync, spin_limit,
             tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """What ``accumulate`` forms, as tiles; ``step`` is the turn of the exchange of partial sums."""
    accs, ahead, spin_limit = accumulate(
        weights, ahead, accs, pointer, rows, j, program, steps_needed, sync, spin_limit, tiling, exchange
    )  # fmt: skip
    product, spin_limit = sum_parts(gather(accs, tiling), j, program, step, sync, spin_limit, tiling, exchange)
    return product, ahead, spin_limit
