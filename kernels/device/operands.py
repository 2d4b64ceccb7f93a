"""Where the two operands of a product are in memory, and the order of K in which they stand.

With K in parts, one per warp (``tiling.splits``), the moving operand needs no shared memory. A tensor core wants from
each thread pairs of 16-bit elements that are 8 apart in K (mma.sync m16n8k16: PTX ISA, "Matrix Fragments"); out of
memory a thread would rather load 16 bytes in a row. A sum over K may take any order, as long as both operands have the
same: index j of the product stands for that element of memory which makes a thread's load whole. In bits, for the 32
of a block, the highest first:

    memory   lane (2), register (2), half (1)          j   register (2), lane (2), half (1)

Triton loads, reorders without moving a byte, and finds that the layout is what the product takes. Where it should find
another one, it moves the data, and the result is the same. Before, h went through shared memory, with an 8-fold bank
conflict and two barriers (clock, LSTM 256, B=16, bf16, sm_90: steps of 3,088 cycles forward and 5,087 backward became
2,349 and 2,854).
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(4)  # that share a row of the moving operand

# Which of the axes that are not contiguous Triton spreads over neighbouring threads first when it coalesces a load: the
# last ones, on 3.6.0 the first ones (seen in TTGIR). Were it wrong, the results would be the same, and slower.
LAST_AXES_FIRST: tl.constexpr = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6))


@triton.constexpr_function
def halves_of(dtype, eight_bits):
    """Neighbours in K that a thread of the product holds: the elements of a register, with weights of 8 bits as many
    as those have there."""
    return 4 if eight_bits else 32 // dtype.primitive_bitwidth


@triton.constexpr_function
def run_of(part, dtype):
    """Elements that a thread loads in a row from a part of K of that length: 16 bytes, or as much as there is."""
    return min(128 // dtype.primitive_bitwidth, max(part // LANES.value, 1))


@triton.constexpr_function
def rows_of(batch):
    """Rows of the batch in one instruction of the tensor core."""
    return min(8, batch)


@triton.jit
def operand_index(size: tl.constexpr, dtype: tl.constexpr, splits: tl.constexpr):
    """Indices into a k block, from its start: [K, 1], or [1, blocks, P, 1, lanes, run] for a run of elements of each
    lane in each block of each part. On 3.6.0 [lanes, 1, P, blocks, 1, run]."""
    if splits == 1:
        return tl.arange(0, size)[:, None]
    else:
        part: tl.constexpr = size // splits
        run: tl.constexpr = run_of(part, dtype)
        block: tl.constexpr = LANES * run
        blocks = tl.arange(0, part // block) * block
        lanes = tl.arange(0, LANES) * run
        parts = (tl.arange(0, splits) * part)[None, None, :, None, None, None]
        inside = parts + tl.arange(0, run)[None, None, None, None, None, :]
        if LAST_AXES_FIRST:
            return inside + blocks[None, :, None, None, None, None] + lanes[None, None, None, None, :, None]
        else:
            return inside + blocks[None, None, None, :, None, None] + lanes[:, None, None, None, None, None]


@triton.jit
def operand_rows(rows, batch: tl.constexpr, splits: tl.constexpr):
    """Rows of the batch, against ``operand_index``: [1, BB], or [tiles, 1, 1, rows of a tile, 1, 1]; on 3.6.0
    [1, rows of a tile, 1, 1, tiles, 1]."""
    if splits == 1:
        return rows[None, :]
    else:
        n: tl.constexpr = rows_of(batch)
        if LAST_AXES_FIRST:
            return tl.reshape(rows, (batch // n, n))[:, None, None, :, None, None]
        else:
            return tl.trans(tl.reshape(rows, (batch // n, n)))[None, :, None, None, :, None]


@triton.constexpr_function
def words_in_a_row(size, tiling, dtype):
    """Words of 32 bits of the moving operand that are next to each other in memory wherever a thread loads some of a k
    block of that size, from a multiple of as many on: 1, 2 or 4."""
    starts = [tiling.hidden, tiling.units_per_part] + [block.start for block in tiling.k_blocks]
    if tiling.streamed:
        starts += [tiling.stream_start, tiling.streamed_k_block]
    run = min(128 // dtype.primitive_bitwidth, size // tiling.splits // LANES.value)
    while any(start % run for start in starts):
        run //= 2
    return run * dtype.primitive_bitwidth // 32


@triton.jit
def word_index(size: tl.constexpr, run: tl.constexpr, splits: tl.constexpr):
    """Indices of words into a k block of ``size`` words: as of elements of 32 bits, but [blocks, 1, run] for [K, 1]."""
    if splits == 1:
        return tl.arange(0, size // run)[:, None, None] * run + tl.arange(0, run)[None, None, :]
    else:
        return operand_index(size, tl.int32, splits)


@triton.jit
def word_rows(rows, batch: tl.constexpr, splits: tl.constexpr):
    """Rows of the batch, against ``word_index``."""
    if splits == 1:
        return rows[None, :, None]
    else:
        return operand_rows(rows, batch, splits)


@triton.jit
def of_words(tile, dtype: tl.constexpr, splits: tl.constexpr):
    """What ``elements_of`` words is, in the form that is loaded from memory in elements."""
    if splits == 1:
        tile = tl.permute(tile, (0, 2, 1) if len(tile.shape) == 3 else (0, 2, 3, 1))
        batch: tl.constexpr = tile.shape[len(tile.shape) - 1]
        return tl.reshape(tile, (tile.numel // batch, batch))
    elif dtype.primitive_bitwidth == 32:
        return tile
    else:
        return tl.reshape(tile, tile.shape[:-2] + (2 * tile.shape[5],))


@triton.jit
def as_operand(tile, dtype: tl.constexpr, splits: tl.constexpr, eight_bits: tl.constexpr = False):
    """What was loaded from there, as [K, BB] or [P, K // P, BB]."""
    if splits == 1:
        return tile
    else:
        s: tl.constexpr = tile.shape
        n: tl.constexpr = min(halves_of(dtype, eight_bits), s[5])
        bits = tl.reshape(tile, (s[0], s[1], s[2], s[3], s[4], s[5] // n, n))
        if LAST_AXES_FIRST:
            return tl.reshape(tl.permute(bits, (2, 1, 5, 4, 6, 0, 3)), (s[2], s[1] * s[4] * s[5], s[0] * s[3]))
        else:
            return tl.reshape(tl.permute(bits, (2, 3, 5, 0, 6, 4, 1)), (s[2], s[3] * s[0] * s[5], s[4] * s[1]))


@triton.jit
def weight_index(size: tl.constexpr, splits: tl.constexpr, transposed: tl.constexpr, eight_bits: tl.constexpr):
    """Indices into a k block, from its start, for the weights: [1, K] or [1, P, K // P]; transposed [K // P, P, 1].
    On 3.6.0 [P, 1, K // P] and [P, K // P, 1].

    P so that the axes of K and M get the two smallest strides in shared memory, and ldmatrix, for which Triton swizzles
    over the second, no bank conflict (clock, LSTM 1024, B=64, bf16, sm_90, Triton 3.9.0: 11,758 cycles forward and
    14,247 backward became 5,728 and 8,159).

    Of 8 bits [P, 1, K // P], in the order of the product: what is loaded there is an operand as it is. Triton takes a
    change of layout past all that is between an operand and its load but for a reordering, and behind one it would put
    into shared memory what 8 bits are widened to.
    """
    if splits == 1:
        return tl.arange(0, size)[None, :]
    else:
        part: tl.constexpr = size // splits
        first = tl.arange(0, splits) * part
        k = tl.arange(0, part)
        if eight_bits:
            # In bits, as above, but with a quarter of a register for each weight: memory lane (2), register (1),
            # quarter (2); k register (1), lane (2), quarter (2).
            run: tl.constexpr = run_of(part, tl.float16)
            n: tl.constexpr = min(halves_of(tl.float16, True), run)
            inside = k // n % LANES * run + k // (LANES * n) % (run // n) * n + k % n
            return (first[:, None] + (k // (LANES * run) * (LANES * run) + inside)[None, :])[:, None, :]
        elif transposed:
            return (k[:, None] + first[None, :] if LAST_AXES_FIRST else first[:, None] + k[None, :])[:, :, None]
        elif LAST_AXES_FIRST:
            return (first[:, None] + k[None, :])[None, :, :]
        else:
            return (first[:, None] + k[None, :])[:, None, :]


@triton.jit
def weight_outputs(m, splits: tl.constexpr, transposed: tl.constexpr, eight_bits: tl.constexpr):
    """Indices (or a mask) of the outputs, against ``weight_index``."""
    if splits == 1:
        return m[:, None]
    elif transposed:
        return m[None, None, :]
    elif LAST_AXES_FIRST and not eight_bits:
        return m[:, None, None]
    else:
        return m[None, :, None]


@triton.jit
def as_weights(tile, dtype: tl.constexpr, splits: tl.constexpr, transposed: tl.constexpr, eight_bits: tl.constexpr):
    """What was loaded from there, as [M, K] or [P, M, K // P]. dtype: of the moving operand."""
    if splits == 1 or eight_bits:
        return tile
    else:
        parts_first = tl.permute(tile, (1, 0, 2)) if LAST_AXES_FIRST else tile
        tile = tl.permute(parts_first, (0, 2, 1)) if transposed else parts_first
        M: tl.constexpr = tile.shape[1]
        part: tl.constexpr = tile.shape[2]
        run: tl.constexpr = run_of(part, dtype)
        n: tl.constexpr = min(halves_of(dtype, False), run)
        bits = tl.reshape(tile, (splits, M, part // (LANES * run), LANES, run // n, n))
        return tl.reshape(tl.permute(bits, (0, 1, 2, 4, 3, 5)), (splits, M, part))
