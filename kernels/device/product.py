"""The recurrent product of one step: a program's share of W_hh, kept on chip or streamed, times the moving operand.

Weights have three homes. A tile that is loaded before the loop over time becomes a shared-memory allocation and a load
of the dot's operand from it; Triton moves the latter in front of the loop, and then, to save registers, back to its
only use if that sits in another ``scf.for`` than its definition. So, with a ``while`` as the loop over time:

* registers: a tile that is used directly in the loop stays in registers for all steps;
* shared memory: a tile that is used inside a ``for`` of one turn (``once``) is read from shared memory in each step;
* streamed: a tile that is loaded in each step, one ahead of its use, so that the first one of a step is on its way
  while the program waits for the other slices.

The audit proves from the compiled code that each tile is where ``tiling`` says it is.
"""

import triton
import triton.language as tl

from .exchange import announce, await_count, get, read
from .tiles import (
    accumulator,
    k_index,
    narrow,
    operand,
    operand_mask,
    operand_offsets,
    operands,
    split_gates,
    weight_mask,
    weight_offsets,
)


@triton.jit
def dot(weight, moving, acc, tiling: tl.constexpr):
    if tiling.interpreted:
        # The interpreter's dot returns garbage on bfloat16 (seen on 3.6.0 and 3.9.0).
        return acc + tl.dot(weight.to(tl.float32), moving.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(weight, moving, acc, input_precision=tiling.precision)


@triton.jit
def position(segment, start, base, tiling: tl.constexpr):
    """Index in K, over all of W_hh, of index ``start`` of a program's ``segment``."""
    return segment * tiling.hidden + base + start


@triton.jit
def left_of(length, start, base, tiling: tl.constexpr):
    """Of ``length`` indices of a segment from ``start`` on, those that are inside the matrix."""
    if tiling.ragged:
        return tl.minimum(length, tiling.hidden - base - start)
    else:
        return length


@triton.jit
def load_tile(corner, m, m_mask, k, length, whole: tl.constexpr, tiling: tl.constexpr):
    offsets = weight_offsets(m, tiling.m_stride, k, tiling.k_stride, tiling.splits)
    # Masks only where needed, offsets from zero: what the tiles of a program share costs registers once.
    if whole:
        return tl.load(corner + offsets)
    else:
        return tl.load(corner + offsets, mask=weight_mask(m_mask, k, length, tiling.splits), other=0.0)


@triton.jit
def resident(weight, m, m_mask, base, first: tl.constexpr, last: tl.constexpr, tiling: tl.constexpr,
             exchange: tl.constexpr):  # fmt: skip
    """This program's rows, resident chunks ``first`` to ``last`` of K: a tuple per pack, of one tile per chunk."""
    weights = ()
    for p in tl.static_range(len(tiling.packs)):
        weights = weights + (resident_pack(weight, m[p], m_mask[p], base, first, last, tiling, exchange),)
    return weights


@triton.jit
def resident_pack(weight, m, m_mask, base, first: tl.constexpr, last: tl.constexpr, tiling: tl.constexpr,
                  exchange: tl.constexpr):  # fmt: skip
    tiles = ()
    for i in tl.static_range(first, last):
        k = k_index(tiling.chunks[i].size, tiling.splits)
        corner = weight + position(tiling.chunks[i].segment, tiling.chunks[i].start, base, tiling) * tiling.k_stride
        length = left_of(tiling.chunks[i].length, tiling.chunks[i].start, base, tiling)
        tile = load_tile(corner, m, m_mask, k, length, False, tiling)
        tiles = tiles + (operand(tile, tiling, exchange),)
        # Else all tiles are loaded into registers at once on their way to shared memory, and spill there.
        tl.debug_barrier()
    return tiles


@triton.jit
def streamed(weight, m, m_mask, i, base, tiling: tl.constexpr):
    """This program's rows of streamed tile ``i``, a tuple with one tile per pack."""
    segment, start = streamed_start(i, tiling)
    k = k_index(tiling.stream_chunk, tiling.splits)
    corner = weight + position(segment, start, base, tiling) * tiling.k_stride
    length = left_of(tiling.depth - start, start, base, tiling)
    whole: tl.constexpr = stream_is_whole(tiling) and not units_are_ragged(tiling)
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tiles = tiles + (load_tile(corner, m[p], m_mask[p], k, length, whole, tiling),)
    return tiles


@triton.jit
def streamed_start(i, tiling: tl.constexpr):
    """Segment and first index of streamed tile ``i``."""
    turns: tl.constexpr = tiling.streamed // tiling.segments
    return i // turns, tiling.stream_start + (i % turns) * tiling.stream_chunk


@triton.constexpr_function
def stream_is_whole(tiling):
    return (tiling.depth - tiling.stream_start) % tiling.stream_chunk == 0 and not tiling.ragged


@triton.constexpr_function
def units_are_ragged(tiling):
    return tiling.slices * tiling.units > tiling.hidden


@triton.constexpr_function
def is_whole(chunk, tiling):
    return chunk.length == chunk.size and not tiling.ragged


@triton.jit
def accumulators(tiling: tl.constexpr):
    accs = ()
    for p in tl.static_range(len(tiling.packs)):
        accs = accs + (accumulator(tiling.packs[p] * tiling.wide, tiling.batch_tile, tiling.splits),)
    return accs


@triton.jit
def advance(weights, moving, accs, tiling: tl.constexpr):
    """Add one tile of K to the accumulator of each pack of gates."""
    result = ()
    for p in tl.static_range(len(tiling.packs)):
        result = result + (dot(weights[p], moving, accs[p], tiling),)
    return result


@triton.jit
def join(weights, more):
    """Two tuples per pack as one."""
    joined = ()
    for p in tl.static_range(len(weights)):
        joined = joined + (weights[p] + more[p],)
    return joined


@triton.jit
def of_chunk(weights, i: tl.constexpr, tiling: tl.constexpr):
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tiles = tiles + (weights[p][i],)
    return tiles


@triton.jit
def gather(accs, tiling: tl.constexpr):
    """The product as a tuple of tiles [R*U, BB], one per gate."""
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tiles = tiles + split_gates(accs[p], tiling.packs[p], tiling.wide, tiling.batch_tile, tiling.splits)
    return tiles


@triton.jit
def add(weights, moving, first: tl.constexpr, last: tl.constexpr, once, accs, tiling: tl.constexpr):
    """Add the resident tiles ``first`` to ``last`` to the product, wherever they live."""
    if last <= tiling.in_registers:
        for i in tl.static_range(first, last):
            accs = advance(of_chunk(weights, i, tiling), moving[i - first], accs, tiling)
    else:
        for _ in range(once):
            for i in tl.static_range(first, last):
                accs = advance(of_chunk(weights, i, tiling), moving[i - first], accs, tiling)
    return accs


@triton.jit
def product_local(weights, tiles, once, dtype: tl.constexpr, tiling: tl.constexpr, exchange: tl.constexpr):
    """One slice: the operand never leaves the chip."""
    narrowed = ()
    for i in tl.static_range(len(tiling.chunks)):
        narrowed = narrowed + (operand(narrow(tiles[i], dtype, tiling.interpreted), tiling, exchange),)
    accs = accumulators(tiling)
    for b in tl.static_range(len(tiling.bursts)):
        accs = add_local(weights, narrowed, b, once, accs, tiling)
    return gather(accs, tiling)


@triton.jit
def add_local(weights, tiles, b: tl.constexpr, once, accs, tiling: tl.constexpr):
    first: tl.constexpr = burst_start(tiling, b)
    last: tl.constexpr = burst_start(tiling, b + 1)
    return add(weights, tiles[first:last], first, last, once, accs, tiling)


@triton.jit
def operand_tile(pointer, rows, size: tl.constexpr, length, whole: tl.constexpr, patience, error,
                 tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    k = k_index(size, tiling.splits)
    offsets = operand_offsets(k, rows, tiling.row_stride, tiling.splits)
    if whole:
        return get(pointer + offsets, None, patience, error, exchange)
    else:
        return get(pointer + offsets, operand_mask(k, length, tiling.splits), patience, error, exchange)


@triton.jit
def operand_tiles(pointer, rows, base, first: tl.constexpr, last: tl.constexpr, patience, error,
                  tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """The moving operand of the resident tiles ``first`` to ``last``: all are on their way at once."""
    tiles = ()
    for i in tl.static_range(first, last):
        length = left_of(tiling.chunks[i].length, tiling.chunks[i].start, base, tiling)
        tile, patience = operand_tile(
            pointer + position(tiling.chunks[i].segment, tiling.chunks[i].start, base, tiling), rows,
            tiling.chunks[i].size, length, is_whole(tiling.chunks[i], tiling), patience, error, tiling, exchange,
        )  # fmt: skip
        tiles = tiles + (tile,)
    return tiles, patience


@triton.constexpr_function
def burst_start(tiling, i):
    return (tiling.bursts + (len(tiling.chunks),))[i]


@triton.jit
def add_burst(weights, b: tl.constexpr, accs, pointer, rows, base, once, patience, error, tiling: tl.constexpr,
              exchange: tl.constexpr):  # fmt: skip
    first: tl.constexpr = burst_start(tiling, b)
    last: tl.constexpr = burst_start(tiling, b + 1)
    tiles, patience = operand_tiles(pointer, rows, base, first, last, patience, error, tiling, exchange)
    # Only when all are on their way: each is waited for before it is rounded.
    return add(weights, operands(tiles, tiling, exchange), first, last, once, accs, tiling), patience


@triton.jit
def product_shared(weights, ahead, stream, pointer, rows, base, once, patience, error, tiling: tl.constexpr,
                   exchange: tl.constexpr):  # fmt: skip
    """Many slices: the operand is what all slices of the group have put at ``pointer``.

    ahead: the streamed tile that is on its way; stream: (weight, m per pack, mask per pack).
    Returns the tiles, what is on its way now, and the patience left.
    """
    accs = accumulators(tiling)
    for b in tl.static_range(len(tiling.bursts)):
        accs, patience = add_burst(weights, b, accs, pointer, rows, base, once, patience, error, tiling, exchange)
    if tiling.streamed > 0:
        weight, m, m_mask = stream
        n: tl.constexpr = tiling.streamed
        for i in range(n):
            current = ahead
            ahead = streamed(weight, m, m_mask, (i + 1) % n, base, tiling)
            segment, start = streamed_start(i, tiling)
            moving, patience = operand_tile(
                pointer + position(segment, start, base, tiling), rows, tiling.stream_chunk,
                left_of(tiling.depth - start, start, base, tiling), stream_is_whole(tiling), patience, error,
                tiling, exchange,
            )  # fmt: skip
            accs = advance(operands(current, tiling, exchange), operand(moving, tiling, exchange), accs, tiling)
    return gather(accs, tiling), ahead, patience


@triton.jit
def add_parts(tiles, part, row, counter, target, patience, error, tiling: tl.constexpr, exchange: tl.constexpr):
    """Two-dimensional split: hand the other slices of the column their rows of this partial product, and return the
    sum over all R of this slice's own, in the order of the blocks.

    part: this column's fp32 buffer [R, gates, R*U, BB] of this step's parity.
    """
    n: tl.constexpr = len(tiles)
    BB: tl.constexpr = tiling.batch_tile
    U: tl.constexpr = tiling.units
    R: tl.constexpr = tiling.rows
    size: tl.constexpr = tiling.wide * BB
    wide = tl.arange(0, tiling.wide)[:, None] * BB + tl.arange(0, BB)[None, :]
    for g in tl.static_range(n):
        tl.store(part + (row * n + g) * size + wide, tiles[g])
    announce(counter, exchange)
    patience = await_count(counter, target, patience, error, exchange)
    own = (row * U + tl.arange(0, U))[:, None] * BB + tl.arange(0, BB)[None, :]
    sums = ()
    for g in tl.static_range(n):
        total = read(part + g * size + own)
        for r in tl.static_range(1, R):
            total = total + read(part + (r * n + g) * size + own)
        sums = sums + (total,)
    return sums, patience
