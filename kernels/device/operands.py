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


@triton.constexpr_function
def halves_of(dtype):
    """Elements in a register of 32 bits."""
    return 32 // dtype.primitive_bitwidth


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
    """Indices into a chunk of K, from its start: [K, 1], or [1, blocks, P, 1, lanes, elements in a row]."""
    if splits == 1:
        return tl.arange(0, size)[:, None]
    else:
        part: tl.constexpr = size // splits
        run: tl.constexpr = run_of(part, dtype)
        block: tl.constexpr = LANES * run
        blocks = tl.arange(0, part // block)[:, None, None, None] * block
        parts = tl.arange(0, splits)[None, :, None, None] * part
        lanes = tl.arange(0, LANES)[None, None, :, None] * run
        return (blocks + parts + lanes + tl.arange(0, run)[None, None, None, :])[None, :, :, None, :, :]


@triton.jit
def operand_rows(rows, batch: tl.constexpr, splits: tl.constexpr):
    """Rows of the batch, against ``operand_index``: [1, BB], or [tiles, 1, 1, rows of a tile, 1, 1]."""
    if splits == 1:
        return rows[None, :]
    else:
        n: tl.constexpr = rows_of(batch)
        return tl.reshape(rows, (batch // n, n))[:, None, None, :, None, None]


@triton.jit
def as_operand(tile, dtype: tl.constexpr, splits: tl.constexpr):
    """What was loaded from there, as [K, BB] or [P, K // P, BB]."""
    if splits == 1:
        return tile
    else:
        shape: tl.constexpr = tile.shape
        n: tl.constexpr = min(halves_of(dtype), shape[5])
        part: tl.constexpr = shape[1] * shape[4] * shape[5]
        bits = tl.reshape(tile, (shape[0], shape[1], shape[2], shape[3], shape[4], shape[5] // n, n))
        return tl.reshape(tl.permute(bits, (2, 1, 5, 4, 6, 0, 3)), (shape[2], part, shape[0] * shape[3]))


@triton.jit
def weight_index(size: tl.constexpr, splits: tl.constexpr, transposed: tl.constexpr):
    """Indices into a chunk of K, from its start, for the weights: [1, K] or [1, P, K // P]; transposed [K // P, P, 1].

    P in the middle: the axes of K and M get the two smallest strides in shared memory, and ldmatrix, for which Triton
    swizzles over the second, no bank conflict (clock, LSTM 1024, B=64, bf16, sm_90: 11,758 cycles forward became NNN).
    """
    if splits == 1:
        return tl.arange(0, size)[None, :]
    elif transposed:
        part: tl.constexpr = size // splits
        return (tl.arange(0, part)[:, None] + tl.arange(0, splits)[None, :] * part)[:, :, None]
    else:
        part: tl.constexpr = size // splits
        return (tl.arange(0, splits)[:, None] * part + tl.arange(0, part)[None, :])[None, :, :]


@triton.jit
def weight_outputs(m, splits: tl.constexpr, transposed: tl.constexpr):
    """Indices (or a mask) of the outputs, against ``weight_index``."""
    if splits == 1:
        return m[:, None]
    elif transposed:
        return m[None, None, :]
    else:
        return m[:, None, None]


@triton.jit
def as_weights(tile, dtype: tl.constexpr, splits: tl.constexpr, transposed: tl.constexpr):
    """What was loaded from there, as [M, K] or [P, M, K // P]. dtype: of the moving operand."""
    if splits == 1:
        return tile
    else:
        part: tl.constexpr = tile.shape[0] if transposed else tile.shape[2]
        M: tl.constexpr = tile.shape[2] if transposed else tile.shape[0]
        run: tl.constexpr = run_of(part, dtype)
        n: tl.constexpr = min(halves_of(dtype), run)
        blocks: tl.constexpr = part // (LANES * run)
        if transposed:
            bits = tl.permute(tl.reshape(tile, (blocks, LANES, run // n, n, splits, M)), (4, 5, 0, 2, 1, 3))
        else:
            bits = tl.permute(tl.reshape(tile, (M, splits, blocks, LANES, run // n, n)), (1, 0, 2, 4, 3, 5))
        return tl.reshape(bits, (splits, M, part))
