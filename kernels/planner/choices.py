"""Which choices there are for a pass: slices, splits, batch tiles and, for each of them, the homes of the weights.

``choices`` are those of a layer alone, ``pipeline_choices`` those of each layer of a pipeline: it has a second matrix
of the same size in the same homes, streams nothing, and only its backward is split in two dimensions. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from .hardware import INTERPRETER
from .occupancy import (
    SIGNALS,
    cell_registers,
    held_rows,
    masked,
    pipeline_registers,
    register_limit,
    registers_needed,
    widening_registers,
)
from .problem import Problem
from .tiling import Choice, cut_k, gate_packs, next_power_of_2, reduction, smallest_k_block, warp_groups

WARPS = 8
WORDS = 4 * 32 * WARPS  # bytes of one register of every thread
# Warps where a tile has no more elements than they have threads. With 8, two threads hold each element, both compute
# and store it, and twice as much is summed over the parts of K (clock, LSTM 256, B=16, bf16, sm_90: 2,349 cycles
# forward and 2,854 backward became 2,124 and 2,747).
FEW_WARPS = 4
# Bytes of weights in shared memory that they read while h is on its way (clock, LSTM 1024, B=16, bf16, sm_90: 3,074
# cycles forward and 4,276 backward with 8 warps, all in registers, became 2,849 and 4,003). None where M is half of a
# tensor core's (LSTM 512, B=1, backward, a quarter of them there: 2,820 cycles, with 8 warps 2,252).
READ_BY_FEW = 1 << 15

# Full float32 has no tensor cores: a thread holds both operands of its outputs for all of a tile's part of K. So many
# numbers, the outputs among them, are the most that never spilled (272; 320 did).
MULTIPLY_ADD_REGISTERS = 280
# Tiles of K in registers (9 and more: GRU backward, bf16, 1536, B=1, sm_90 spills 4).
MOST_TILES = 8
# Where weights are streamed through a ring: (rows of a batch tile, K in shared memory), at most. With 64 and 768 on
# sm_80 the GRU backward 2816, bf16, spills 14, with 16 and 1536 on sm_90 the LSTM backward 2048 spills 104.
RINGS = {"sm_80": (32, 256), "sm_90": (128, 640)}
RING = 3  # tiles that are there at once
# Bytes of K in a pipeline's backward where a thread owns several elements of the state (3072 spills 20, 3360 33).
DEEPEST_OF_SEVERAL = 2560
# Of those, and bytes of K, in two dimensions (4 spill 105: GRU 512, B=64; 2560 spill 10: LSTM 640, B=16; bf16, sm_90).
MOST_IN_TWO_DIMENSIONS, DEEPEST_IN_TWO_DIMENSIONS = 2, 2048
# Bytes of K in a program of a pipeline's backward, above which it spills (LSTM 528, B=16, bf16, sm_90: 34), and both
# products take longer than the exchange that hides one.
DEEPEST = 4096
# With tcgen05, of 16 bits and with 16 rows, from so many on none of K that shared memory holds stays in registers: the
# operands of all bursts are on their way at once (seen: LSTM 512, B=16, sm_100, Triton 3.9.0: 6 spills).
DEEP = 4032


def power_of_2_at_most(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


def room(problem: Problem, blocks: int) -> int:
    """Bytes of shared memory for each of so many programs of a multiprocessor."""
    return problem.hardware.shared if blocks == 1 else problem.hardware.shared // blocks - 1024


def elements(choice: Choice) -> int:
    """Of the state that a thread owns, in all batch tiles."""
    return max(1, choice.units * choice.batch_tile * choice.subtiles // (32 * choice.warps))


def choices(problem: Problem, backward: bool, strict: bool = True) -> Iterator[Choice]:
    """All that may fit; not strict: also where the estimate of the registers says that it does not."""
    if problem.hardware is INTERPRETER:
        # Its programs run one after the other, and its time goes by the number of operations, not by their size.
        units = max(16, next_power_of_2(problem.hidden))
        k = units * (problem.cell.gates if backward else 1)
        yield Choice(units, 1, 64 if problem.batch >= 32 else 16, 1, 4, 1, 1, units, k, k, 0, units)
        return
    if problem.weight_bytes <= problem.hardware.shared * 2:
        yield from _local(problem, backward)
    yield from _sliced(problem, backward, strict)
    yield from _through_ring(problem, backward)


def _local(problem: Problem, backward: bool) -> Iterator[Choice]:
    """One slice: K is the tile of units."""
    units = max(16, next_power_of_2(problem.hidden))
    groups = warp_groups(problem, units)
    if groups and (problem.weight_dtype or problem.dtype == "tf32"):
        return  # warp groups would have weights that they widen or round in registers, for all steps
    k = units * (problem.cell.gates if backward else 1)
    in_memory = problem.dtype == "fp32" or problem.weight_dtype != "" or groups
    homes = (0, k) if in_memory else (k, 0)
    # Groups do without each other, so a narrow tile costs nothing (clock, LSTM 64, bf16, sm_80, forward and backward: 8
    # rows 1,321 and 1,558 cycles, 16 rows 2,468 and 2,393). With 32 the LSTM's backward spilled (103 to 378
    # instructions), with 16 in float32 its forward (tf32, H=64, sm_80: 75).
    tiles: tuple[int, ...] = (16, 32)
    if problem.hardware.arch.startswith("sm_"):
        tiles = (8, 16) if problem.size == 2 else (8,)
    # From 128 units on, a backward of one warp group spills (LSTM 22, with marks 118; GRU 60 with marks; Triton 3.9.0).
    warps_of = (8,) if groups and backward and units >= 128 else (4, 8)
    for warps, blocks, batch_tile in product(warps_of, (1, 2, 4), tiles):
        yield Choice(units, 1, batch_tile, 1, warps, blocks, 1, units, k, *homes, units)


def _batch_tiles(problem: Problem, narrow: bool) -> list[tuple[int, int]]:
    """(rows of the batch in a tile, tiles of a program)."""
    tiles = [(8, 1)] if narrow else []
    # The kernels of steps of several stages take one batch tile.
    several = [] if problem.cell.staged else [(16, n) for n in (2, 4) if 16 * n <= next_power_of_2(problem.batch)]
    tiles += [(16, 1), *several]
    # Full float32 spills on wider tiles (2 to 600 instructions).
    return tiles + ([(32, 1)] if problem.batch > 16 and problem.dtype != "fp32" else [])


def _through_ring(problem: Problem, backward: bool) -> Iterator[Choice]:
    """One wide batch tile, and what is streamed is read once per step, by asynchronous copies several tiles ahead."""
    hardware, hidden, size = problem.hardware, problem.hidden, problem.size
    # Copies of less than 16 bytes go through L1, which may hold what was there before. Not tried: other devices.
    able = size == 2 and problem.weight_dtype == "" and not problem.cell.staged and hidden % 8 == 0
    if not able or hardware.arch not in RINGS or problem.weight_bytes * 2 < hardware.multiprocessors * hardware.shared:
        return
    packs = (1,) if backward else gate_packs(problem.cell.gates, problem.dtype)
    widest, deepest = RINGS[hardware.arch]
    widest = min(widest, max(32, next_power_of_2(problem.batch)))
    for units, k_parts in product((8, 16, 32, 64), (1, 2, 4, 8)):
        slices = -(-hidden // (units * k_parts)) * k_parts
        m = sum(packs) * units * k_parts
        # A product of warp groups takes 64 rows of M. Where one pack has fewer, and is multiplied without, Triton 3.9.0
        # has one buffer too few (seen in the emulator: GRU 136, fp16: copies to what wgmma still reads).
        if slices > hardware.multiprocessors or slices < 2 * k_parts or min(packs) * units * k_parts % 64:
            continue
        for batch_tile in (16, 32, 64, 128):
            if batch_tile > widest or m * batch_tile > 128 * 256:
                continue
            # A thread copies 16 bytes of h; less would go through L1.
            least = max(64, 8 * 32 * WARPS // batch_tile)
            # On sm_80 each tile has barriers of its own (clock, LSTM 2048, B=64, backward: 81,343 cycles, with twice as
            # much of K in each 61,900).
            for k_block in (least, 2 * least) if hardware.arch == "sm_80" else (least,):
                # More at once spills with two packs of gates (GRU forward 2560, B=64, bf16, sm_90: 28), and in a
                # backward with 128 rows (LSTM 4096, sm_90: 6). Less waits (clock, LSTM backward 2048, B=64, sm_90:
                # 9.74 us, with four times as much 8.69).
                words = 8 if backward and batch_tile == 128 else 32
                burst = k_block if len(packs) > 1 else max(k_block, words * WORDS // (size * batch_tile))
                start = Choice(units, k_parts, batch_tile, 1, WARPS, 1, 1, k_block, burst, 0, 0, k_block, RING)
                p = _product(problem, backward, start, slices)
                working = max(burst * batch_tile * size, RING * (m + batch_tile) * k_block * size, p.reduction)
                fits = min((hardware.shared - working - SIGNALS) // (m * size), deepest)
                quantum = k_block * p.segments
                # Or nothing stays: what is on its way at once is then more (clock, LSTM 2048, B=64, backward, sm_90: a
                # burst of 64 for weights that stay takes 986 cycles, a tile of the ring 725).
                for in_shared in {max(0, fits // quantum * quantum), 0} if fits >= 0 else ():
                    if in_shared < p.depth * p.segments:
                        yield replace(start, in_shared=in_shared)


def _sliced(problem: Problem, backward: bool, strict: bool) -> Iterator[Choice]:
    """Many slices: the homes are filled in turn, registers, shared memory, and the rest is streamed."""
    count = problem.hardware.multiprocessors
    # Where most of W_hh is streamed, a narrow tile may be all that the registers hold.
    streams = problem.weight_bytes > 2 * count * problem.hardware.shared
    tiles = _batch_tiles(problem, problem.batch <= 8 or streams or not strict)
    # Of 8 bits: one part is a product of warp groups, and with 2 Triton 3.6.0 spills (16 to 481).
    least = 4 if problem.weight_dtype else 1 if streams or problem.size == 4 else 2
    # Not tried: AMD, where a warp has 64 threads, and other dtypes.
    may_be_few = problem.hardware.arch.startswith("sm_") and problem.dtype != "fp32" and problem.weight_dtype == ""
    all_splits = [splits for splits in (8, 4, 2, 1) if splits >= least]
    for units in (8, 16, 32, 64, 128):
        needed = -(-problem.hidden // units)
        if needed < 2 or needed > count * 2:
            continue
        for k_parts in (1,) if problem.cell.staged else (1, 2, 4, 8):
            slices = -(-needed // k_parts) * k_parts
            # Two programs share a multiprocessor only where there are more slices than multiprocessors.
            blocks = 1 if slices <= count else 2
            if (slices < 2 * k_parts and k_parts > 1) or slices > count * blocks:
                continue
            m = (1 if backward else problem.cell.gates) * units * k_parts
            for batch_tile, subtiles in tiles:
                # In tf32, 8 rows of weights with 16 of the batch win nothing (clock, MGU 256, B=16, backward, sm_90:
                # 2,886 cycles for 2,810).
                narrow = problem.size == 4 and m < 16 <= batch_tile
                if may_be_few and not narrow and blocks == 1 and units * batch_tile <= 32 * FEW_WARPS:
                    splits = FEW_WARPS * _chains(m, batch_tile, _depth(problem, backward, units, k_parts, slices))
                    start = Choice(units, k_parts, batch_tile, subtiles, FEW_WARPS, 1, splits, 0, 0, 0, 0, 0)
                    found = _filled(problem, backward, start, slices, strict)
                    if found is not None and m * found.in_shared * problem.size <= READ_BY_FEW * (m >= 16):
                        yield found
                        continue
                # Fewer parts of K where M is large: the accumulators of all parts are in registers.
                for splits in all_splits if m >= 128 else [8]:
                    if splits * m * batch_tile > 128 * 256:
                        continue
                    start = Choice(units, k_parts, batch_tile, subtiles, WARPS, blocks, splits, 0, 0, 0, 0, 0)
                    found = _filled(problem, backward, start, slices, strict)
                    if found is not None:
                        yield found


def _chains(m: int, batch_tile: int, depth: int) -> int:
    """Parts of K for each of few warps: a tensor core begins about 4 products of 16 by 8 until the first is done. Fewer
    where they would pad K by more than an eighth; but as much as with more warps, or a shallow part of K looks cheaper
    than it is (clock, LSTM 512, B=1, bf16, sm_80, backward: 1,864 cycles in one dimension, 2,651 in two)."""
    if depth < smallest_k_block(WARPS):
        return WARPS // FEW_WARPS
    chains = max(1, 4 * 16 * 8 // (max(m, 16) * batch_tile))
    while chains > 1 and -depth % smallest_k_block(FEW_WARPS * chains) > depth // 8:
        chains //= 2
    return chains


def _multiply_add_depth(outputs: int) -> int:
    """The deepest part of K, a power of two, for which a thread holds both operands of so many outputs in full float32;
    0 if there is none."""
    high = 1 << (max(outputs, 1).bit_length()) // 2
    edges = high + -(-outputs // high)
    left = MULTIPLY_ADD_REGISTERS - outputs
    return power_of_2_at_most(left // edges) if left >= edges else 0


def _depth(problem: Problem, backward: bool, units: int, k_parts: int, slices: int) -> int:
    """K of each segment of a product."""
    if k_parts > 1:
        return slices // k_parts * units
    return (problem.cell.gates if backward else 1) * problem.hidden


@dataclass(frozen=True)
class _Product:
    """What one program multiplies, before its weights have homes.

    Attributes:
        m, packs: outputs, and the dots that they are formed in.
        depth, segments, k: K in each segment, segments, and all of K padded to the smallest tiles.
        quantum: K of the smallest tiles of all segments.
        largest: K of the largest tile to be multiplied at once; less than the smallest if none should.
        reduction: bytes of shared memory in which the parts of K are summed.
        masked: whether the operand is loaded under a mask.
    """

    m: int
    packs: int
    depth: int
    segments: int
    k: int
    quantum: int
    largest: int
    reduction: int
    masked: bool


def _product(problem: Problem, backward: bool, c: Choice, slices: int) -> _Product:
    gates, size = problem.cell.gates, problem.size
    m = (1 if backward else gates) * c.k_parts * c.units
    packs = (1,) if backward else gate_packs(gates, problem.dtype)
    segments = gates if backward and c.k_parts > 1 else 1
    depth = _depth(problem, backward, c.units, c.k_parts, slices)
    smallest = smallest_k_block(c.splits)
    # At most 32 registers per thread are on their way, of weights and of the operand.
    words = 4 * 32 * c.warps
    largest = min(512, max(smallest, power_of_2_at_most(32 * words // (size * max(m, c.batch_tile)))))
    if problem.dtype == "fp32":
        outputs = c.splits * m * c.batch_tile // (32 * WARPS)
        largest = min(largest, c.splits * _multiply_add_depth(outputs) // len(packs))
    padded = c.k_parts > 1 and slices * c.units > problem.hidden
    return _Product(
        m=m,
        packs=len(packs),
        depth=depth,
        segments=segments,
        k=-(-depth // smallest) * smallest * segments,
        quantum=smallest * segments,
        largest=largest,
        reduction=reduction(packs, min(c.splits, c.warps), c.k_parts, c.units, c.batch_tile),
        masked=masked(problem.hidden, depth, padded, c.splits, size),
    )


def _filled(problem: Problem, backward: bool, start: Choice, slices: int, strict: bool) -> Choice | None:
    """The choice with its homes filled, or None if it does not fit; not strict: the registers' estimate may fail."""
    p, size, smallest = _product(problem, backward, start, slices), problem.size, smallest_k_block(start.splits)
    if p.largest < smallest and strict:
        return None
    k_block = max(p.largest, smallest)
    # What is on its way during a mean is alive through its exchange, too.
    halved = 1 + (problem.cell.means > 0 and not strict)
    stream = min(k_block if problem.dtype == "fp32" else 512, power_of_2_at_most(24 * WORDS // (size * p.m * halved)))
    if halved > 1:
        k_block = max(smallest, k_block // 2)
    choice = replace(
        start, largest_k_block=k_block, burst=max(k_block, 32 * WORDS // (size * start.batch_tile * halved)),
        streamed_k_block=max(smallest, stream),
    )  # fmt: skip
    limit, total = register_limit(choice), room(problem, choice.blocks)

    def padded(k: int) -> int:
        return sum(block.size for block in cut_k(0, 0, k // p.segments, smallest, k_block)) * p.segments

    if choice.warps < WARPS:
        choice = replace(choice, burst=min(choice.burst, padded(p.k)))

    def homes(choice: Choice, streamed: bool) -> tuple[int, int]:
        spare = limit - registers_needed(p.m, p.packs, choice, size, 0, streamed, True, p.masked)
        spare -= cell_registers(problem.cell, backward, choice, size)
        spare -= widening_registers(problem, choice)
        if spare < 0 and strict:
            return 0, -1
        # Where several warps share a part of K, Triton 3.6.0 gives each of them all of its weights: 8 / splits times
        # the registers (seen: hundreds of spills). And one part of K is a product of warp groups on sm_90, which reads
        # its weights from shared memory.
        # Nor weights of 8 bits, which would be there in 16.
        unfit = problem.dtype == "fp32" or problem.weight_dtype != "" or choice.splits < choice.warps
        kept = 0 if unfit else max(spare, 0) * 4 * 32 * choice.warps // (held_rows(p.m) * size)
        kept = min(kept, MOST_TILES * choice.largest_k_block) // p.quantum * p.quantum
        while choice.warps < WARPS and 0 < kept < p.k and padded(kept) > kept:
            kept -= p.quantum
        stored = problem.stored
        stream = (p.m + choice.batch_tile) * choice.streamed_k_block * size if streamed else 0
        working = max(choice.burst * choice.batch_tile * size, stream, p.reduction) + SIGNALS
        shared = (total - working) // (p.m * stored) // p.quantum * p.quantum
        most = (total - choice.units * choice.batch_tile * 4) // (p.m * stored) // p.quantum * p.quantum
        return min(kept, most), shared

    registers, shared = homes(choice, False)
    if shared >= 0 and registers + shared >= p.k:
        in_shared = max(0, p.k - registers)
        if strict and choice.batch_tile > 16 and in_shared * p.packs > 2 * choice.burst:
            # Or it spills (seen, bf16, B=64: GRU forward 1536 and 2048 8 to 12, LSTM 1536 forward 2, backward 4 to 6).
            return None
        return replace(choice, in_registers=min(registers, p.k), in_shared=in_shared)
    if choice.subtiles > 1 or choice.warps < WARPS:
        return None  # each batch tile would stream the weights again; and more warps have more registers
    # A step that streams is long: more trips through L2 do not count as much as the registers do.
    burst = max(k_block, choice.burst // 2)
    if p.packs > 1 and choice.splits == 1 and size == 4 and not p.masked:
        burst = max(k_block, burst // 4)  # or Triton 3.6.0 spills (124 instructions, GRU forward, tf32, H=2048, sm_90)
    choice = replace(choice, burst=burst)
    registers, shared = homes(choice, True)
    if shared < 0:
        return None
    return replace(choice, in_registers=min(registers, p.k), in_shared=min(shared, max(0, p.k - registers)))


def pipeline_choices(problem: Problem, layers: int, backward: bool) -> Iterator[Choice]:
    """All that may fit for each of so many layers at the same time."""
    for units, k_parts in product((8, 16, 32, 64), (1, 2, 4, 8) if backward else (1,)):
        slices = -(-problem.hidden // (units * k_parts)) * k_parts
        if slices < 2 * k_parts or slices * layers > problem.hardware.multiprocessors:
            continue
        m = (1 if backward else problem.cell.gates) * units * k_parts
        for batch_tile, subtiles in _batch_tiles(problem, problem.batch <= 8):
            # In two dimensions each warp has its own part of K: where two share one, a step has 7 barriers, not 3, and
            # took 6,408 cycles instead of 5,086 (clock, 4 x LSTM 512, B=16, bf16, sm_90).
            for splits in (8, 4, 2) if m >= 128 and k_parts == 1 else (8,):
                if splits * m * batch_tile > 128 * 256:
                    continue
                of_stream = smallest_k_block(splits)
                start = Choice(units, k_parts, batch_tile, subtiles, WARPS, 1, splits, 0, 0, 0, 0, of_stream)
                found = _filled_twice(problem, backward, start, slices)
                if found is not None:
                    yield found


def _filled_twice(problem: Problem, backward: bool, start: Choice, slices: int) -> Choice | None:
    """The choice with its homes filled, or None if both matrices do not fit."""
    p, size, smallest = _product(problem, backward, start, slices), problem.size, smallest_k_block(start.splits)
    if p.largest < smallest:
        return None
    # Twice as many bursts as in a layer alone: with two products the operand on its way is what spills.
    burst = max(p.largest, (16 if backward else 32) * WORDS // (size * start.batch_tile))
    choice = replace(start, largest_k_block=p.largest, burst=burst)
    deep = p.depth * p.segments * size
    if backward and deep > (DEEPEST if elements(choice) == 1 else DEEPEST_OF_SEVERAL):
        return None
    if start.k_parts > 1 and (elements(choice) > MOST_IN_TWO_DIMENSIONS or deep > DEEPEST_IN_TWO_DIMENSIONS):
        return None
    need = registers_needed(p.m, p.packs, choice, size, 0, False, True, p.masked)
    need += pipeline_registers(backward, p.depth * p.segments, size, elements(choice))
    need += cell_registers(problem.cell, backward, choice, size)
    spare = register_limit(choice) - need
    if spare < 0:
        return None
    unfit = problem.dtype == "fp32" or choice.splits < WARPS
    kept = 0 if unfit else spare * WORDS // (2 * p.m * size) // p.quantum * p.quantum
    working = max(burst * choice.batch_tile * size, p.reduction) + SIGNALS
    shared = (problem.hardware.shared - working) // (2 * p.m * size) // p.quantum * p.quantum
    # Weights pass through shared memory on their way to registers.
    most = problem.hardware.shared - choice.units * choice.batch_tile * 4
    most = most // (2 * p.m * size) // p.quantum * p.quantum
    kept = min(kept, most, p.k)
    tcgen05 = problem.hardware.arch.startswith("sm_10")
    if backward and tcgen05 and size == 2 and deep >= DEEP and start.batch_tile >= 16:
        kept = min(kept, max(0, p.k - shared))
    if shared < 0 or kept + shared < p.k:
        return None
    return replace(choice, in_registers=kept, in_shared=p.k - kept)
