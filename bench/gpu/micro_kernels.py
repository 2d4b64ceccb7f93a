"""The kernels of the microbenchmarks, and what they must come to: each repeats one thing that the scan kernels do.

All run in Triton's interpreter too. PTX=False stands in for the clock there, ``exchange.poll`` for the spin.
"""

# Triton compiles no `*` inside a tuple.
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import arrive, get, put, read, wait
from persistrnn.kernels.device.operands import as_operand, operand_index, operand_rows
from persistrnn.kernels.device.product import accumulators, add, gather, load_rest, matrix_of, resident
from persistrnn.kernels.device.words import elements_of, settle, words_at
from persistrnn.kernels.planner.hardware import DEVICES, INTERPRETER
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice, Tiling, make_tiling

LINE = 16  # bytes
WARPS = 8  # as most of the planned kernels


@triton.jit
def clock(before, PTX: tl.constexpr):
    """Cycles of this multiprocessor, int64; without PTX, 64 more than ``before``."""
    if PTX:
        return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    else:
        return before + 64


@triton.jit
def value_of(step, line):
    """What the line holds that is put in a step: 0 to 63, exact in float16."""
    return (step * 5 + line * 3) & 63


@triton.jit
def lines_at(slot, index):
    """Pointers to the 8 elements of each line."""
    return slot + (index * 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def put_lines(slot, i, first, share, step, LINES: tl.constexpr, exchange: tl.constexpr):
    """Put tile ``i`` of the ``share`` lines that begin at ``first``."""
    own = i * LINES + tl.arange(0, LINES)
    value = value_of(step, first + own).to(tl.float16)[:, None] + tl.zeros((LINES, 8), tl.float16)
    put(lines_at(slot, first + own), value, (own < share)[:, None], exchange)


@triton.jit
def get_lines(slot, i, lines, spin_limit, error, LINES: tl.constexpr, exchange: tl.constexpr):
    index = i * LINES + tl.arange(0, LINES)
    masks = ((index < lines)[:, None],)
    if exchange.protocol == "flags":
        pointers = words_at(slot, exchange) + (index * 4)[:, None] + tl.arange(0, 4)[None, :]
        words = (get(pointers, masks, exchange),)
        words, spin_limit = settle(words, (pointers,), (masks,), spin_limit, error, 4, exchange)
        return tl.reshape(elements_of(words[0], tl.float16, exchange), (LINES, 8)), spin_limit
    else:
        return get(lines_at(slot, index), masks, exchange), spin_limit


@triton.jit(do_not_specialize=["steps", "share"])
def exchange_rounds(
    buffer, counter, error, stale, sums, steps, share,
    PUTS: tl.constexpr, GETS: tl.constexpr, LINES: tl.constexpr, exchange: tl.constexpr,
):  # fmt: skip
    """``steps`` exchanges among all programs. A line is 8 float16, 16 bytes; each program puts ``share`` lines per step
    and gets those of all, in tiles of LINES.

    buffer: float16 [steps, programs * share, 8], all bits one; as in the scan, each step has a slot of its own.
    counter, error, stale: int32 [1]; stale becomes 1 if a program got what nobody has put.
    sums: float32 [programs, LINES], of all that a program got.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    line = tl.arange(0, LINES)
    lines = programs * share
    spin_limit = tl.full((), exchange.spin_limit, tl.int32)
    collected = tl.zeros((LINES,), tl.float32)
    step = program * 0
    while step < steps:
        slot = buffer + step.to(tl.int64) * (lines * 8)
        arrived = tl.zeros((LINES,), tl.float32)
        if exchange.protocol == "flags":  # each tile is waited for: unrolled, the offsets of all of them would spill
            for i in range(PUTS):
                put_lines(slot, i, program * share, share, step, LINES, exchange)
            for i in range(GETS):
                tile, spin_limit = get_lines(slot, i, lines, spin_limit, error, LINES, exchange)
                arrived += tl.sum(tile.to(tl.float32), axis=1)
        else:
            for i in tl.static_range(PUTS):
                put_lines(slot, i, program * share, share, step, LINES, exchange)
            arrive(counter, exchange)
            spin_limit = wait(counter, (step + 1) * programs, spin_limit, error, exchange)
            tiles = ()
            for i in tl.static_range(GETS):  # all are on their way before the first is needed
                tile, spin_limit = get_lines(slot, i, lines, spin_limit, error, LINES, exchange)
                tiles = tiles + (tile,)
            for i in tl.static_range(GETS):
                arrived += tl.sum(tiles[i].to(tl.float32), axis=1)
        # A store that depends on the data: the next step cannot begin before all of it has arrived.
        tl.store(stale + line * 0, 1, mask=arrived != arrived)
        collected += arrived
        step += 1
    tl.store(sums + program * LINES + line, collected)


def lines_of(protocol: str, programs: int, payload: int) -> int:
    """Lines of 16 bytes that each program puts per step. Flags have no announcement of their own: at least one."""
    return max(-(-payload // (programs * LINE)), 1 if protocol == "flags" else 0)


def received(steps: int, lines: int, tile: int) -> Tensor:
    """float32 [tile]: what a program has summed up after ``steps`` of ``lines``, by place in its tile."""
    line = torch.arange(-(-lines // tile) * tile)
    values = (torch.arange(steps)[:, None] * 5 + line * 3) & 63
    return (8 * values * (line < lines)).sum(0).view(-1, tile).sum(0).float()


@triton.jit(do_not_specialize=["turns", "blocks"])
def read_again(buffer, sums, cycles, turns, blocks, LINES: tl.constexpr, PTX: tl.constexpr):
    """Each program reads all of ``buffer`` past L1, ``turns`` times.

    buffer: int32 [blocks, LINES, 4]. sums: int32 [programs], of all that was read.
    cycles: int64 [programs].
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, LINES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = tl.zeros((LINES, 4), tl.int32)
    start = clock(tl.zeros((), tl.int64), PTX)
    turn = program * 0
    while turn < turns:
        block = program * 0
        while block < blocks:
            total += read(buffer + block * (LINES * 4) + offsets)
            block += 1
        turn += 1
    tl.store(sums + program, tl.sum(tl.ravel(total), axis=0))
    tl.debug_barrier()
    tl.store(cycles + program, clock(start, PTX) - start)


def swept(depth: int, interpreted: bool) -> Tiling:
    """float16 weights of 64 rows and K = ``depth``, all in shared memory, as warps have them for 8 rows of a batch."""
    choice = Choice(
        units=16, k_parts=1, batch_tile=8, subtiles=1, warps=WARPS, blocks=1, splits=WARPS, largest_k_block=256,
        burst=depth, in_registers=0, in_shared=depth, streamed_k_block=256,
    )  # fmt: skip
    problem = Problem(CELLS["lstm"], depth, 1, 1, "fp16", INTERPRETER if interpreted else DEVICES["h200"])
    return make_tiling(problem, choice, backward=False)


def bytes_swept(t: Tiling) -> int:
    """Bytes of weights read from shared memory per step; the operand is in registers."""
    return t.m * t.hidden * 2


@triton.jit(do_not_specialize=["steps"])
def sweep_shared(weight, operand, sums, cycles, steps, tiling: tl.constexpr,
                 exchange: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Each program multiplies the weights of slice 0, all resident in shared memory, by one operand in each step.

    weight: [G*H, stride]. operand: [BB, H]. sums: float32 [programs, G, U, BB], ``steps`` times the product.
    cycles: int64 [programs]. tiling: of a forward in one dimension, with nothing in registers and nothing streamed.
    """
    U: tl.constexpr = tiling.units
    BB: tl.constexpr = tiling.batch_tile
    G: tl.constexpr = tiling.gates
    n: tl.constexpr = len(tiling.k_blocks)
    program = tl.program_id(0)
    rows = tl.arange(0, BB)
    matrix = matrix_of(weight, program * 0, program * 0, tiling)
    accs = accumulators(tiling)
    # As in the scan: a number of turns that the compiler cannot know keeps the weights in shared memory.
    opaque_one = tl.minimum(steps, 1)
    turn = program * 0
    while turn < opaque_one:
        weights = load_rest(resident(matrix, 0, 0, tiling, exchange), matrix, opaque_one, tiling, exchange)
        operands = ()
        for i in tl.static_range(n):
            k = operand_index(tiling.k_blocks[i].size, operand.dtype.element_ty, tiling.splits)
            offsets = k + operand_rows(rows, BB, tiling.splits) * tiling.row_stride
            tile = tl.load(operand + tiling.k_blocks[i].start + offsets)
            operands = operands + (as_operand(tile, operand.dtype.element_ty, tiling.splits),)
        start = clock(tl.zeros((), tl.int64), PTX)
        step = program * 0
        while step < steps:
            accs = add(weights, operands, 0, n, accs, tiling)
            tl.debug_barrier()  # or the compiler reads the weights once for several steps (seen: 4, sm_90)
            step += 1
        tl.debug_barrier()
        tl.store(cycles + program, clock(start, PTX) - start)
        turn += 1
    tiles = gather(accs, tiling)
    unit = tl.arange(0, U)[None, :] * BB + rows[:, None]
    for g in tl.static_range(G):
        tl.store(sums + (program * G + g) * (U * BB) + unit, tiles[g])


@triton.jit(do_not_specialize=["steps"])
def barriers(count, steps):
    """``steps`` barriers within each program. count: int32 [programs], what was added per barrier."""
    program = tl.program_id(0)
    step = program * 0
    while step < steps:
        tl.debug_barrier()
        step += 1
    tl.store(count + program, step)


@triton.jit(do_not_specialize=["wanted"])
def spin(cycles, wanted, PTX: tl.constexpr):
    """Each program does nothing for at least ``wanted`` cycles. cycles: int64 [programs], how many they were."""
    start = clock(tl.zeros((), tl.int64), PTX)
    now = start
    while now - start < wanted:
        now = clock(now, PTX)
    tl.store(cycles + tl.program_id(0), now - start)


@triton.jit
def touch(count):
    """Next to nothing. count: int32 [programs], one more per launch."""
    program = tl.program_id(0)
    tl.store(count + program, tl.load(count + program) + 1)
