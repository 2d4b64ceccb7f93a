"""All address arithmetic of the scan kernels, and the shapes of their tiles.

Tensors are contiguous: x_gates and saved [T, B, D, n, H], states [T + 2, B, D, H] with the initial state in the
slot before the first step of each direction, weight_hh [D, G*H, H]. Offsets of a time step are 64-bit, because
T*B*D*G*H may pass 2**31; offsets inside a tile stay below BB*D*G*H and are 32-bit.

``tiling`` is the compile-time record ``plan.Tiling``. P = tiling.splits is the number of parts that K is cut into,
``tiling.chains`` per warp: a 2-D dot never splits K over warps, a 3-D dot with P leading does.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class BatchTile(NamedTuple):
    """Rows of the batch that one product takes. Those past the end repeat the last row.

    Attributes:
        first: a row that exists.
        rows: [BB], the tile's, counted from there.
        own: [BB, 1], whether a row is the tile's own.
    """

    first: tl.tensor
    rows: tl.tensor
    own: tl.tensor


@triton.jit
def batch_tile(program, j: tl.constexpr, B, tiling: tl.constexpr):
    """Tile j of the program's job."""
    start = program.first_row + j * tiling.batch_tile
    first = tl.minimum(start, B - 1)
    index = tl.arange(0, tiling.batch_tile)
    return BatchTile(first, tl.minimum(index, B - 1 - first), (start + index < B)[:, None])


@triton.jit
def time_of(step, reverse, T):
    """The time index that ``step`` stands for: the direction is the sign of the time step."""
    return tl.where(reverse == 0, step, T - 1 - step)


@triton.jit
def previous_slot(t, reverse):
    """Slot of the state before time t (slot t + 1 holds the state after it)."""
    return tl.where(reverse == 0, t, t + 2)


@triton.jit
def row_offset(t, b, direction, B, D: tl.constexpr, width: tl.constexpr):
    """64-bit offset of element [t, b, direction, 0] in a tensor [*, B, D, width]."""
    return ((t.to(tl.int64) * B + b) * D + direction) * width


@triton.jit
def tile_offset(t, tile, program, B, width: tl.constexpr, tiling: tl.constexpr):
    """The same of a batch tile's first row, in the program's direction."""
    return row_offset(t, tile.first, program.direction, B, tiling.directions, width)


@triton.jit
def edge_offset(number, tile, program, B, tiling: tl.constexpr):
    """64-bit offset of a batch tile's first row in the ``number``-th of tensors [L*D, B, H], of which L or D is 1."""
    row = number * (tiling.layers * tiling.directions) + program.layer + program.direction
    return row_offset(row, tile.first, 0, B, 1, tiling.hidden)


@triton.jit
def edge_offsets(program, rows, tiling: tl.constexpr):
    """Offsets [BB, U] from there of the program's units, in the given rows."""
    return program.units[None, :] + rows[:, None] * tiling.hidden


@triton.jit
def unit_offsets(program, rows, width: tl.constexpr, tiling: tl.constexpr):
    """Offsets [BB, U] from there of the program's units, in the given rows of a tensor [*, B, D, width]."""
    return program.units[None, :] + rows[:, None] * (tiling.directions * width)


@triton.jit
def narrow(tile, dtype: tl.constexpr, interpreted: tl.constexpr):
    """``tile`` in ``dtype``, rounded to nearest even."""
    if interpreted and dtype == tl.bfloat16:
        # The interpreter's cast truncates (seen on 3.6.0 and 3.9.0), which doubles the error: round first.
        bits = tile.to(tl.int32, bitcast=True)
        # Without the lower half, which would make a subnormal of a zero.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, rounded, tile)
    return tile.to(dtype)


@triton.jit
def operand(tile, tiling: tl.constexpr, exchange: tl.constexpr, pure: tl.constexpr = False):
    """``tile`` as a product takes it: tensor cores drop the lower 13 bits of float32, so for tf32 it is rounded before.

    By an instruction that Triton takes no change of layout past, unless it is ``pure``, without side effects. With
    plain arithmetic it rounded in the product's layout, whose threads hold copies (seen: 7 PTX instructions per element
    of h; all weights in registers in the GRU's backward in a pipeline, sm_80).
    """
    if tiling.precision == "tf32" and exchange.poll == "ptx":
        assembly: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        return tl.inline_asm_elementwise(assembly, "=r,r", [tile], dtype=tl.float32, is_pure=pure, pack=1)
    else:
        return tile


@triton.jit
def operands(tiles, tiling: tl.constexpr, exchange: tl.constexpr):
    rounded = ()
    for i in tl.static_range(len(tiles)):
        rounded = rounded + (operand(tiles[i], tiling, exchange),)
    return rounded


@triton.jit
def fence_copies(i, tiling: tl.constexpr, exchange: tl.constexpr):
    """Between the wait for the asynchronous copies of tile ``i`` and the wgmma that reads what they wrote.

    It reads by the asynchronous proxy, and of copies only those in bulk write by that: the PTX ISA asks for a proxy
    fence, which Triton 3.9.0 has there itself and 3.6.0 has not.
    """
    if tiling.fenced and exchange.poll == "ptx":
        assembly: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, $1;"
        tl.inline_asm_elementwise(assembly, "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def accumulator(m: tl.constexpr, n: tl.constexpr, splits: tl.constexpr):
    """Zeros [M, N] or [P, M, N]."""
    if splits == 1:
        return tl.zeros((m, n), tl.float32)
    else:
        return tl.zeros((splits, m, n), tl.float32)


@triton.jit
def halve(x):
    """Sum pairs over the last axis in a fixed order; a 2-element last axis disappears."""
    n: tl.constexpr = x.shape[len(x.shape) - 1]
    if n == 2:
        a, b = tl.split(x)
        return a + b
    else:
        a, b = tl.split(tl.reshape(x, x.shape[:-1] + (n // 2, 2)))
        return a + b


@triton.jit
def sum_splits(x, splits: tl.constexpr):
    """Sum over a trailing axis of length P by halving; tl.sum would make every warp repeat what follows."""
    if splits == 1:
        return x
    else:
        return sum_splits(halve(x), splits // 2)


@triton.jit
def sum_chains(acc, chains: tl.constexpr):
    """[P, M, N] -> [P // chains, M, N]: the parts of K that are one warp's differ in the highest bits of P, and are
    summed in its registers."""
    if chains == 1:
        return acc
    else:
        s: tl.constexpr = acc.shape
        a, b = tl.split(tl.permute(tl.reshape(acc, (2, s[0] // 2, s[1], s[2])), (1, 2, 3, 0)))
        return sum_chains(a + b, chains // 2)


@triton.jit
def split_gates(acc, gates: tl.constexpr, units: tl.constexpr, batch: tl.constexpr, splits: tl.constexpr):
    """[gates*U, BB] or [P, gates*U, BB] -> a tuple of ``gates`` tiles [BB, U], summed over P."""
    if splits == 1:
        if gates == 1:
            return (tl.trans(acc),)
        else:
            x = tl.permute(tl.reshape(acc, (gates, units, batch)), (2, 1, 0))
            return _unstack(x, gates)
    else:
        if gates == 1:
            return (sum_splits(tl.permute(acc, (2, 1, 0)), splits),)
        else:
            x = tl.permute(tl.reshape(acc, (splits, gates, units, batch)), (3, 2, 1, 0))
            return _unstack(sum_splits(x, splits), gates)


@triton.jit
def _unstack(x, n: tl.constexpr):
    if n == 2:
        return tl.split(x)
    else:
        # Axis n = 4 as (2, 2): the low bit splits last, so even and odd gates come apart first.
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + (2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def split_three_gates(two, one, units: tl.constexpr, batch: tl.constexpr, splits: tl.constexpr):
    """The same of [P, 2*units, BB] and [P, units, BB] at once, as four gates of which the last two are one.

    Each by itself costs an exchange between the warps of its own (clock, GRU 256, B=16, bf16, sm_90, forward: 4
    barriers instead of 2, and 2,152 cycles instead of 2,076).
    """
    pair = tl.permute(tl.reshape(two, (splits, 2, units, batch)), (0, 2, 3, 1))
    four = tl.permute(tl.join(pair, tl.join(one, one)), (2, 1, 3, 4, 0))
    pair, one = tl.split(sum_splits(four, splits))
    first, second = tl.split(pair)
    third, _copy = tl.split(one)
    return first, second, third
