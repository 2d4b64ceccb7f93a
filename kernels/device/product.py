"""The recurrent product of one step: a program's share of W_hh, kept on chip or streamed, times the moving operand.

Weights have three homes. A tile that is loaded before the loop over time becomes a shared-memory allocation and a load
of the dot's operand from it; Triton moves the latter in front of the loop, and then, to save registers, back to its
only use if that sits in another ``scf.for`` than its definition. So, with a ``while`` as the loop over time:

* registers: a tile that is used directly in the loop stays in registers for all steps;
* shared memory: a tile that is used inside a ``for`` of one turn (``Weights.opaque_one``) is read from shared memory in
  each step;
* streamed: a tile that is loaded in each step, one ahead of its use, so that the first one of a step is on its way
  while the program waits for the other slices; or, through a ring (``tiling.ring``), copied to shared memory with its
  tile of the moving operand, several ahead, by asynchronous copies that Triton makes of loads in a loop.

Weights of 8 bits are widened at the product (``widen``): in registers, where they would have 16 for all steps, the
planner has none.

The audit proves from the compiled code that each tile is where ``tiling`` says it is.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .exchange import get
from .operands import (
    as_operand,
    as_weights,
    of_words,
    operand_index,
    operand_rows,
    weight_index,
    weight_outputs,
    word_index,
    word_rows,
    words_in_a_row,
)
from .tiles import accumulator, fence_copies, narrow, operand, operands, split_gates, split_three_gates, sum_chains
from .widen import eight_bits, in_turn, widened
from .words import elements_of, per_word, settle, words_at


class Matrix(NamedTuple):
    """What a program multiplies by, in global memory.

    Attributes:
        corner: pointer to the first element of the matrix.
        outputs, masks: per pack of gates, which outputs of the product are the program's, and which of them exist.
        k_start: first index of the program's part of K.
    """

    corner: tl.tensor
    outputs: tl.tuple
    masks: tl.tuple
    k_start: tl.tensor


class Weights(NamedTuple):
    """What a program multiplies by, on chip.

    Kept by itself, not in a tuple: inside a loop Triton 3.6.0 forgets the names of what stands in a tuple of records.

    Attributes:
        tiles: the resident ones, a tuple per pack of gates.
        matrix: where the streamed ones come from.
        opaque_one: a 1 that the compiler cannot know, as the number of turns of a loop that must not be unrolled.
    """

    tiles: tl.tuple
    matrix: Matrix
    opaque_one: tl.tensor


@triton.jit
def corner_of(weight, program, tiling: tl.constexpr):
    """Of the program's W_hh in [D, G*H, stride]; in a pipeline in [L, 2, G*H, stride], with the other matrix behind."""
    size: tl.constexpr = tiling.gates * tiling.hidden * tiling.stride
    if tiling.layers > 1:
        return weight + program.layer.to(tl.int64) * (2 * size)
    else:
        return weight + program.direction.to(tl.int64) * size


@triton.jit
def matrix_of(corner, unit_group, k_start, tiling: tl.constexpr):
    """The calling program's share of the matrix at ``corner``."""
    outputs = ()
    masks = ()
    for p in tl.static_range(len(tiling.packs)):
        m = tl.arange(0, tiling.packs[p] * tiling.units_formed)
        if tiling.backward:
            unit = unit_group * tiling.units_formed + m
            output = unit
        else:
            unit = unit_group * tiling.units_formed + m % tiling.units_formed
            output = (tiling.first_gates[p] + m // tiling.units_formed) * tiling.hidden + unit
        outputs = outputs + (output,)
        masks = masks + (unit < tiling.hidden,)
    return Matrix(corner, outputs, masks, k_start)


@triton.jit
def dot(weight, moving, acc, tiling: tl.constexpr):
    weight = widened(weight, tiling)
    if tiling.interpreted:
        # The interpreter's dot returns garbage on bfloat16 (seen on 3.6.0 and 3.9.0).
        return acc + tl.dot(weight.to(tl.float32), moving.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(weight, moving, acc, input_precision=tiling.precision)


@triton.jit
def position(segment, start, k_start, tiling: tl.constexpr):
    """Index in K, over all of W_hh, of index ``start`` of a program's ``segment``."""
    return segment * tiling.hidden + k_start + start


@triton.jit
def left_of(length, start, k_start, tiling: tl.constexpr):
    """Of ``length`` indices of a segment from ``start`` on, those that are inside the matrix."""
    if tiling.ragged:
        return tl.minimum(length, tiling.hidden - k_start - start)
    else:
        return length


@triton.jit
def load_tile(matrix, p: tl.constexpr, segment, start, size: tl.constexpr, length, whole: tl.constexpr,
              tiling: tl.constexpr):  # fmt: skip
    """The weights of pack p for ``size`` indices of K, of which ``length`` are valid, in the order of memory."""
    eight: tl.constexpr = eight_bits(tiling)
    k = weight_index(size, tiling.splits, tiling.backward, eight)
    outputs = weight_outputs(matrix.outputs[p], tiling.splits, tiling.backward, eight)
    # Offsets from zero, masks only where needed: what the tiles of a program share costs registers once.
    corner = matrix.corner + position(segment, start, matrix.k_start, tiling) * tiling.k_stride
    inside = left_of(length, start, matrix.k_start, tiling)
    offsets = outputs * tiling.m_stride + k * tiling.k_stride
    if whole:
        return tl.load(corner + offsets)
    else:
        mask = weight_outputs(matrix.masks[p], tiling.splits, tiling.backward, eight) & (k < inside)
        return tl.load(corner + offsets, mask=mask, other=0.0)


@triton.jit
def arranged(tile, tiling: tl.constexpr):
    """A tile of weights as it was loaded, its elements in the order of the product."""
    return as_weights(tile, tile.dtype, tiling.splits, tiling.backward, eight_bits(tiling))


@triton.jit
def resident(matrix, first: tl.constexpr, last: tl.constexpr, tiling: tl.constexpr, exchange: tl.constexpr):
    """The resident tiles ``first`` to ``last`` of K: a tuple of them per pack of gates."""
    weights = ()
    for p in tl.static_range(len(tiling.packs)):
        weights = weights + (resident_pack(matrix, p, first, last, tiling, exchange),)
    return weights


@triton.jit
def resident_pack(matrix, p: tl.constexpr, first: tl.constexpr, last: tl.constexpr, tiling: tl.constexpr,
                  exchange: tl.constexpr):  # fmt: skip
    tiles = ()
    for i in tl.static_range(first, last):
        tile = load_tile(
            matrix, p, tiling.k_blocks[i].segment, tiling.k_blocks[i].start, tiling.k_blocks[i].size,
            tiling.k_blocks[i].length, False, tiling,
        )  # fmt: skip
        tiles = tiles + (weight_operand(tile, i, tiling, exchange),)
        # Else all tiles are loaded into registers at once on their way to shared memory, and spill there.
        tl.debug_barrier()
    return tiles


@triton.jit
def load_rest(in_registers, matrix, opaque_one, tiling: tl.constexpr, exchange: tl.constexpr):
    """The weights of which those that stay in registers are there already."""
    in_shared = resident(matrix, tiling.in_registers, len(tiling.k_blocks), tiling, exchange)
    return Weights(join(in_registers, in_shared), matrix, opaque_one)


@triton.jit
def streamed(matrix, i, tiling: tl.constexpr):
    """Streamed tile ``i``, a tuple with one tile per pack of gates."""
    segment, start = streamed_start(i, tiling)
    whole: tl.constexpr = stream_is_whole(tiling) and not units_are_ragged(tiling)
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tile = load_tile(matrix, p, segment, start, tiling.streamed_k_block, tiling.depth - start, whole, tiling)
        tiles = tiles + (arranged(tile, tiling),)
    return tiles


@triton.jit
def first_streamed(matrix, tiling: tl.constexpr):
    """What is on its way before the first step: nothing where nothing is streamed."""
    if tiling.streamed > 0 and tiling.ring == 0:
        return streamed(matrix, 0, tiling)
    else:
        return ()


@triton.jit
def streamed_start(i, tiling: tl.constexpr):
    """Segment and first index of streamed tile ``i``."""
    turns: tl.constexpr = tiling.streamed // tiling.segments
    return i // turns, tiling.stream_start + (i % turns) * tiling.streamed_k_block


@triton.constexpr_function
def stream_is_whole(tiling):
    return (tiling.depth - tiling.stream_start) % tiling.streamed_k_block == 0 and not tiling.ragged


@triton.constexpr_function
def units_are_ragged(tiling):
    return tiling.slices * tiling.units > tiling.hidden


@triton.constexpr_function
def is_whole(k_block, tiling):
    return k_block.length == k_block.size and not tiling.ragged


@triton.constexpr_function
def burst_start(tiling, i):
    return (tiling.bursts + (len(tiling.k_blocks),))[i]


@triton.jit
def accumulators(tiling: tl.constexpr):
    accs = ()
    for p in tl.static_range(len(tiling.packs)):
        accs = accs + (accumulator(tiling.packs[p] * tiling.units_formed, tiling.batch_tile, tiling.splits),)
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
def nth_tile(weights, i: tl.constexpr, tiling: tl.constexpr):
    """Resident tile i, one per pack."""
    tiles = ()
    for p in tl.static_range(len(tiling.packs)):
        tiles = tiles + (weights[p][i],)
    return tiles


@triton.jit
def gather(accs, tiling: tl.constexpr):
    """The product as a tuple of tiles [BB, R*U], one per gate."""
    U: tl.constexpr = tiling.units_formed
    BB: tl.constexpr = tiling.batch_tile
    P: tl.constexpr = tiling.splits // tiling.chains
    sums = ()
    for p in tl.static_range(len(tiling.packs)):
        sums = sums + (sum_chains(accs[p], tiling.chains),)
    if tiling.joined:
        tiles = split_three_gates(sums[0], sums[1], U, BB, P)
    else:
        tiles = ()
        for p in tl.static_range(len(tiling.packs)):
            tiles = tiles + split_gates(sums[p], tiling.packs[p], U, BB, P)
    return tiles


@triton.jit
def add(weights, moving, first: tl.constexpr, last: tl.constexpr, accs, tiling: tl.constexpr):
    """Add the resident tiles ``first`` to ``last`` to the product, wherever they live."""
    if last <= tiling.in_registers:
        for i in tl.static_range(first, last):
            accs = advance(nth_tile(weights.tiles, i, tiling), moving[i - first], accs, tiling)
    else:
        for turn in range(weights.opaque_one):
            for i in tl.static_range(first, last):
                tiles = in_turn(nth_tile(weights.tiles, i, tiling), turn, tiling)
                accs = advance(tiles, moving[i - first], accs, tiling)
    return accs


@triton.jit
def product_local(weights, tiles, dtype: tl.constexpr, tiling: tl.constexpr, exchange: tl.constexpr):
    """One slice: the operand never leaves the chip."""
    narrowed = ()
    for i in tl.static_range(len(tiling.k_blocks)):
        narrowed = narrowed + (operand(tl.trans(narrow(tiles[i], dtype, tiling.interpreted)), tiling, exchange),)
    accs = accumulators(tiling)
    for b in tl.static_range(len(tiling.bursts)):
        accs = add_local(weights, narrowed, b, accs, tiling)
    return gather(accs, tiling)


@triton.jit
def add_local(weights, tiles, b: tl.constexpr, accs, tiling: tl.constexpr):
    first: tl.constexpr = burst_start(tiling, b)
    last: tl.constexpr = burst_start(tiling, b + 1)
    return add(weights, tiles[first:last], first, last, accs, tiling)


@triton.jit
def operand_tile(pointer, rows, segment, start, size: tl.constexpr, length, whole: tl.constexpr, k_start,
                 tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """The moving operand for ``size`` indices of K, of which ``length`` are valid, on its way: (tile, where it is, a
    tuple of its mask or of nothing). By flags the tile is one of words, before ``settled``."""
    inside = left_of(length, start, k_start, tiling)
    corner = pointer + position(segment, start, k_start, tiling)
    dtype: tl.constexpr = pointer.dtype.element_ty
    if exchange.protocol == "flags":
        per: tl.constexpr = per_word(dtype, exchange)
        run: tl.constexpr = words_in_a_row(size, tiling, dtype)
        k = word_index(size // per, run, tiling.splits)
        offsets = k + word_rows(rows, tiling.batch_tile, tiling.splits) * (tiling.row_stride // per)
        pointers = words_at(corner, exchange) + offsets
        masks = () if whole else (k < inside // per,)
        return get(pointers, masks, exchange), pointers, masks
    else:
        k = operand_index(size, dtype, tiling.splits)
        offsets = k + operand_rows(rows, tiling.batch_tile, tiling.splits) * tiling.row_stride
        pointers = corner + offsets
        masks = () if whole else (k < inside,)
        tile = get(pointers, masks, exchange)
        return as_operand(tile, dtype, tiling.splits, eight_bits(tiling)), pointers, masks


@triton.jit
def settled(asked, size: tl.constexpr, dtype: tl.constexpr, spin_limit, error, tiling: tl.constexpr,
            exchange: tl.constexpr):  # fmt: skip
    """The tiles of a tuple of what ``operand_tile`` returned, of ``size`` indices each, once they are there, and the
    spin limit left."""
    loaded = ()
    pointers = ()
    masks = ()
    for i in tl.static_range(len(asked)):
        loaded = loaded + asked[i][:1]
        pointers = pointers + asked[i][1:2]
        masks = masks + asked[i][2:]
    if exchange.protocol == "flags":
        run: tl.constexpr = words_in_a_row(size, tiling, dtype)
        words, spin_limit = settle(loaded, pointers, masks, spin_limit, error, run, exchange)
        loaded = ()
        for i in tl.static_range(len(words)):
            tile = of_words(elements_of(words[i], dtype, exchange), dtype, tiling.splits)
            loaded = loaded + (as_operand(tile, dtype, tiling.splits, eight_bits(tiling)),)
    return loaded, spin_limit


@triton.constexpr_function
def runs_of_one_size(tiling, first, last):
    """Where a run of k blocks of one size begins, and ``last``."""
    blocks = tiling.k_blocks
    return tuple(i for i in range(first, last) if i == first or blocks[i].size != blocks[i - 1].size) + (last,)


@triton.jit
def operand_tiles(pointer, rows, k_start, first: tl.constexpr, last: tl.constexpr, spin_limit, error,
                  tiling: tl.constexpr, exchange: tl.constexpr):  # fmt: skip
    """The moving operand of the resident tiles ``first`` to ``last``: all are on their way at once."""
    asked = ()
    for i in tl.static_range(first, last):
        tile = operand_tile(
            pointer, rows, tiling.k_blocks[i].segment, tiling.k_blocks[i].start, tiling.k_blocks[i].size,
            tiling.k_blocks[i].length, is_whole(tiling.k_blocks[i], tiling), k_start, tiling, exchange,
        )  # fmt: skip
        asked = asked + (tile,)
    dtype: tl.constexpr = pointer.dtype.element_ty
    runs: tl.constexpr = runs_of_one_size(tiling, first, last)
    tiles = ()
    for n in tl.static_range(len(runs) - 1):
        part = asked[runs[n] - first : runs[n + 1] - first]
        more, spin_limit = settled(
            part, tiling.k_blocks[runs[n]].size, dtype, spin_limit, error, tiling, exchange
        )  # fmt: skip
        tiles = tiles + more
    return tiles, spin_limit


@triton.jit
def add_burst(weights, b: tl.constexpr, accs, pointer, rows, spin_limit, error, tiling: tl.constexpr,
              exchange: tl.constexpr):  # fmt: skip
    first: tl.constexpr = burst_start(tiling, b)
    last: tl.constexpr = burst_start(tiling, b + 1)
    tiles, spin_limit = operand_tiles(
        pointer, rows, weights.matrix.k_start, first, last, spin_limit, error, tiling, exchange
    )
    # Only when all are on their way: each is waited for before it is rounded.
    return add(weights, operands(tiles, tiling, exchange), first, last, accs, tiling), spin_limit


@triton.jit
def streamed_operand(pointer, rows, i, k_start, spin_limit, error, tiling: tl.constexpr, exchange: tl.constexpr):
    """The moving operand of streamed tile ``i``, once it is there, and the spin limit left."""
    segment, start = streamed_start(i, tiling)
    asked = operand_tile(
        pointer, rows, segment, start, tiling.streamed_k_block, tiling.depth - start, stream_is_whole(tiling), k_start,
        tiling, exchange,
    )  # fmt: skip
    moving, spin_limit = settled(
        (asked,), tiling.streamed_k_block, pointer.dtype.element_ty, spin_limit, error, tiling, exchange
    )
    return operand(moving[0], tiling, exchange), spin_limit


@triton.jit
def product_shared(weights, ahead, accs, pointer, rows, spin_limit, error, tiling: tl.constexpr,
                   exchange: tl.constexpr):  # fmt: skip
    """Many slices: the operand is what all slices of the group have put at ``pointer``.

    accs: what the product is added to; (): to nothing. ahead: the streamed tile that is on its way. Returns the
    accumulators, what is on its way now, and the spin limit left.
    """
    if len(accs) == 0:
        accs = accumulators(tiling)
    for b in tl.static_range(len(tiling.bursts)):
        accs, spin_limit = add_burst(weights, b, accs, pointer, rows, spin_limit, error, tiling, exchange)
    if tiling.streamed > 0 and tiling.ring > 0:
        # Asynchronous copies know no flags. The compiler must not know how many turns there are, lest it unrolls them
        # (seen: GRU forward 2560, B=64, bf16, sm_90, Triton 3.6.0: 46 spills).
        stages: tl.constexpr = tiling.ring if exchange.protocol == "counter" else 1
        for i in tl.range(tiling.streamed * weights.opaque_one, num_stages=stages):
            current = streamed(weights.matrix, i, tiling)
            moving, spin_limit = streamed_operand(
                pointer, rows, i, weights.matrix.k_start, spin_limit, error, tiling, exchange
            )  # fmt: skip
            fence_copies(i, tiling, exchange)
            accs = advance(current, moving, accs, tiling)
    elif tiling.streamed > 0:
        n: tl.constexpr = tiling.streamed
        for i in range(n):
            current = ahead
            ahead = streamed(weights.matrix, (i + 1) % n, tiling)
            moving, spin_limit = streamed_operand(
                pointer, rows, i, weights.matrix.k_start, spin_limit, error, tiling, exchange
            )  # fmt: skip
            accs = advance(operands(current, tiling, exchange), moving, accs, tiling)
    return accs, ahead, spin_limit


@triton.jit
def weight_operand(tile, i: tl.constexpr, tiling: tl.constexpr, exchange: tl.constexpr):
    """Resident tile i, as it was loaded, as a product takes it.

    Of float32 it is rounded before its elements are put in order, which Triton takes no change of layout past, by an
    instruction without side effects: past one that has them, Triton 3.9.0 moves no tile into shared memory, and holds
    all in registers at once (seen: GRU forward 1536, B=32, tf32, sm_90: 114 spills).

    In the backward of a pipeline, whose first product stands before the loop over time, one that is to live in shared
    memory passes an instruction that Triton takes no change of layout past. Without, it moved the change to the tile's
    load, where it is no longer known to be an operand's, and kept the tile in registers (seen: LSTM 512, B=16, bf16,
    sm_90: 4 spills). Elsewhere it holds all tiles in registers at once (seen: GRU backward 1150, B=80: 84 spills).
    """
    in_shared: tl.constexpr = i >= tiling.in_registers and tiling.splits > 1
    first_before_loop: tl.constexpr = tiling.layers > 1 and tiling.backward
    if not first_before_loop:
        return arranged(operand(tile, tiling, exchange, tiling.splits > 1), tiling)
    elif in_shared and exchange.poll == "ptx" and tile.dtype.primitive_bitwidth == 16:
        tile = arranged(tile, tiling)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    else:
        return operand(arranged(tile, tiling), tiling, exchange)
