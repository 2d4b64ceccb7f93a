"""A mean over all units within a step: each slice's sum over its own units, and, with several slices, an exchange of
those. Sums are added in one order, so that equal inputs give equal bits."""

import triton
import triton.language as tl

from .exchange import announce, await_count, read


@triton.constexpr_function
def _power_of_2_from(n):
    return 1 << (n - 1).bit_length()


@triton.jit
def mean_over_units(tile, number, program, sync, spin_limit, tiling: tl.constexpr, exchange: tl.constexpr):
    """Of a tile [BB, U], for each row over all units of all slices: [BB, U], and the spin limit left.

    number: of the mean, counted over all steps. Sums of even and odd ones are in different places: whoever forms the
    next mean but one has awaited the next, which all slices announce when they have read this one.
    """
    BB: tl.constexpr = tiling.batch_tile
    S: tl.constexpr = tiling.slices
    total = tl.sum(tl.where(program.unit_mask, tile, 0.0), 1)
    if S > 1:
        rows = tl.arange(0, BB)
        sums = sync.partial_sums + number % 2 * (S * BB)
        tl.store(sums + program.unit_group * BB + rows, total)
        counter = sync.counters + exchange.stride  # behind that of the state
        announce(counter, exchange)
        spin_limit = await_count(counter, (number + 1) * S, spin_limit, sync.error, exchange)
        slices = tl.arange(0, _power_of_2_from(S))[:, None]
        of_slices = read(sums + tl.minimum(slices, S - 1) * BB + rows[None, :])
        total = tl.sum(tl.where(slices < S, of_slices, 0.0), 0)
    return tl.broadcast_to((total / tiling.hidden)[:, None], tile.shape), spin_limit
