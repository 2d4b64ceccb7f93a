"""The product of many slices with what they exchange: waited for, multiplied, and summed over the parts of K.

``product`` multiplies what is there. Here is when it is there, and who else has a part of the sum.
"""

import triton
import triton.language as tl

from .exchange import wait
from .product import add_parts, gather, product_shared


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
