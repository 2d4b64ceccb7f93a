"""The cost model: what one time step of a pass takes, in microseconds. Predicted, from a device's record alone.

A step is one exchange, then a product, then the cell, and the sum of five parts:

* compute: the tensor cores' instructions of one program, padding included, as far as they do not hide behind the
  operand's way; weights of 8 bits are widened before;
* weights: reading W_hh, per step and product, from shared memory (weights in registers cost nothing) and from L2 or
  memory (streamed weights; what exceeds L2 comes at the memory's rate); of what is streamed through a ring also the
  product and the operand's way, of all of which the longest counts;
* state: reading the moving operand from L2, the sum over the parts of K in shared memory, and with a two-dimensional
  split writing and reading the partial sums;
* synchronisation: the exchanges between slices, what of them the other batch tiles of a program do not hide, a trip
  through L2 for each further burst of the operand, and the barriers within a program;
* pointwise: the cell, and what it loads and stores, as far as that does not hide behind the exchange.

Rates and latencies are the record's. What a compiled kernel makes of them is ``FITTED`` to a clock that executes such
kernels without a GPU (tests/emulator/clock.py).

``floor`` is what no plan can beat under the same record, ``torch_step`` what torch's own path is taken to need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .hardware import Hardware
from .problem import Problem
from .tiling import Choice, Tiling, gate_packs, gates_summed, warp_groups

# Assumed, not measured: of the dense rate, what products of torch's own path reach.
MATRIX_EFFICIENCY = 0.5

# Instructions for each weight of 8 bits in each step (``device/widen``, with bf16), and the lanes of a multiprocessor
# that do such.
WIDENING = {"int8": 2.0, "fp8": 2.5}
WIDENING_LANES = 64.0

# From a load to its first bytes from L2 (Luo et al., arXiv 2402.13499, table IV: 261.5 on an A100, 263 on an H800); an
# exchange is two such trips and more.
L2_CYCLES = 262.0

# From a load to its first bytes from memory (the same table: 466.3 and 478.8).
MEMORY_CYCLES = 479.0

# Of a kernel that streams through a ring, by the clock (LSTM 2048, B=64, backward): of each burst that comes to weights
# in shared memory, besides its way (sm_90: 986 in all), and of each tile of the ring that single warps multiply (sm_80:
# 635, of which L2 takes 260).
RING_BURST_CYCLES, RING_TILE_CYCLES = 480.0, 300.0

# Of an mma until the next one can add to its result (Sun et al., arXiv 2206.02874, table 3, and Luo et al., table VII:
# 24.1 to 25 cycles).
MMA_CYCLES = 24.5


@dataclass(frozen=True)
class Fitted:
    """What the record does not say.

    Attributes:
        product, full: time of a product over that at the dense rate, by tensor cores and in full float32.
        sweep: time of reading weights from shared memory over that at its rate.
        parts: the same of writing and reading the parts of K that are summed.
        stage, row: cycles of the code of a mean or a further product, and of 256 numbers that are read for one.
        staged, staged_backward: time of streamed bytes on their way through shared memory, for each part of K, over
            that at its rate.
        local: cycles per gate of a step without an exchange: what hides behind one elsewhere.
        local_backward: the same of a backward, but for one warp group, with 8 rows and 4 warps: gates on their way
            through shared memory.
        fixed: cycles of addresses, of storing h and of announcing it.
        issue: more of it, of 8 warps that take turns.
        work: cycles of theirs per cycle of ``Cell.work``, for each element that a thread owns.
        kept: cycles per tile and element of a thread that are loaded or stored after the announcement.
        turn: cycles of each further batch tile: its loads from memory, which no exchange hides.
    """

    product: float
    full: float
    sweep: float
    parts: float
    stage: float
    row: float
    staged: float
    staged_backward: float
    local: float
    local_backward: float
    fixed: float
    issue: float
    work: float
    kept: float
    turn: float


# <fitted: made by tests/helpers/fit_cost.py --write>
# Fitted to the clock over 563 kernels; median error 3.6%.
FITTED = Fitted(
    product=1, full=10.2, sweep=0.569, parts=0.567, stage=446, row=188, staged=1.05, staged_backward=0.315, local=50,
    local_backward=145, fixed=68.3, issue=129, work=0.398, kept=5.35, turn=460,
)  # fmt: skip
# </fitted>


@dataclass(frozen=True)
class Cost:
    """Microseconds per time step."""

    compute: float
    weights: float
    state: float
    synchronisation: float
    pointwise: float

    @property
    def total(self) -> float:
        return self.compute + self.weights + self.state + self.synchronisation + self.pointwise


@dataclass(frozen=True)
class Work:
    """What one program does per step, in numbers that need no tiling.

    ``m`` outputs by ``k`` summed indices per product; of k, so much per home; ``programs`` on the device at a time.
    """

    m: int
    k: int
    in_shared: int
    streamed: int
    slices: int
    programs: int


def trip(hardware: Hardware) -> float:
    """Microseconds of a burst until its first bytes are there."""
    return min(L2_CYCLES * 1e-3 / hardware.clock, hardware.exchange / 2)


def sum_of_parts(
    problem: Problem, choice: Choice, m: int, backward: bool, fitted: Fitted = FITTED
) -> tuple[float, int]:
    """Microseconds that the parts of K of one batch tile take through shared memory and back, and the barriers of a
    step: around each sum, of which one shares that of the announcement."""
    packs = (1,) if backward else gate_packs(problem.cell.gates, problem.dtype)
    together = gates_summed(packs, choice.k_parts)
    joined = together > max(packs)
    barriers = 2 if joined else 2 * len(packs)
    if choice.splits == 1:
        return 0.0, barriers
    numbers = m * choice.batch_tile * (together / sum(packs) if joined else 1)
    moved = min(choice.splits, choice.warps) * numbers * 8
    return fitted.parts * moved / (problem.hardware.shared_rate * problem.hardware.clock * 1e3), barriers


def step(problem: Problem, choice: Choice, work: Work, backward: bool, fitted: Fitted = FITTED) -> Cost:
    """Predicted microseconds per time step of one round."""
    cell, hardware, size = problem.cell, problem.hardware, problem.size
    cycle = 1e-3 / hardware.clock  # microseconds
    # Programs on one multiprocessor share its rates.
    share = min(choice.blocks, -(-work.programs // hardware.multiprocessors))
    tiles, columns, m = choice.subtiles, choice.batch_tile, work.m
    elements = -(-choice.units * columns // (32 * choice.warps))
    if work.slices == 1 and problem.dtype != "fp32":
        # As the product's result lies in the warps: of each at least a tile of 16 by 8, which others hold, too.
        elements = 4 * -(-choice.units * columns // (16 * 8 * choice.warps))
    groups = work.slices == 1 and warp_groups(problem, choice.units)
    l2 = hardware.l2_rate / cycle / share  # bytes per microsecond and program
    on_chip = hardware.shared_rate / cycle / share

    # Of one batch tile, at first.
    slowdown = fitted.full if problem.dtype == "fp32" else fitted.product
    rate = hardware.rate(problem.dtype) * 1e6 / hardware.multiprocessors / slowdown  # flop per microsecond
    compute = share * 2 * max(m, 16) * work.k * max(columns, 8) / rate
    if problem.dtype != "fp32":  # each instruction, of 32 bytes of K, adds to what the one before gave
        chain = work.k * size / 32 / choice.splits
        if groups:  # one after the other, 64 rows each
            chain *= max(1, m / 64)
        compute = max(compute, chain * MMA_CYCLES * cycle)
    # Products of warp groups read their weights as they go.
    weights = 0.0 if groups else fitted.sweep * m * work.in_shared * problem.stored / on_chip
    if problem.weight_dtype:
        lanes = WIDENING_LANES / cycle / share
        compute += m * (work.in_shared + work.streamed) * WIDENING[problem.weight_dtype] / lanes
    pointwise = fitted.fixed + cell.chain[backward]
    pointwise += share * choice.warps / 8 * (fitted.issue + fitted.work * cell.work[backward] * elements)
    pointwise *= cycle
    # Loaded and stored while the exchange is on its way.
    after = cycle * share * fitted.kept * (cell.gates + cell.saved + 2 * cell.states) * elements
    state = idle = 0.0
    if work.slices == 1:
        pointwise += after * choice.warps / 4
        if backward and not (groups and choice.warps == 4):
            # Each gate passes through shared memory, from which every warp reads all of it; not for one warp group.
            waits = cell.gates * columns / 8 * choice.warps / 4 * fitted.local_backward
        else:
            waits = (cell.gates if backward else cell.inputs) * fitted.local
        waits = waits * cycle + hardware.barrier
    else:
        k = work.k - work.streamed if choice.ring else work.k  # of what goes through the ring it is below
        state = min(problem.batch, columns) * k * size / l2  # rows past the batch repeat one, and are read once
        if not choice.ring:
            state *= max(1, choice.warps // choice.splits)  # warps that share a part of K read the same
        state = max(0.0, state - compute * k / work.k - weights)  # the product is formed as it comes
        taken, barriers = sum_of_parts(problem, choice, m, backward, fitted)
        state += share * taken
        stages = cell.means + cell.products
        # One burst is on its way at a time where weights are in shared memory. Loads of the others stand before all
        # products with weights in registers (seen in SASS: GRU 1024, B=1 and LSTM 512, B=16 backward, sm_90).
        bursts = max(1, -(-work.in_shared // choice.burst))
        waits = barriers * hardware.barrier
        if choice.k_parts > 1:
            state += 2 * m * columns * 4 / l2
            waits += hardware.exchange + hardware.barrier
        if stages:
            # Not twice as many with 4 warps, by the clock: 6,127 cycles, with 8 6,480 (LayerNormGRU 128, B=16, sm_90).
            of_means = cell.means * fitted.row * -(-work.slices * columns // 256)
            waits += stages * hardware.exchange + (stages * fitted.stage + of_means) * cycle
        if work.streamed:
            bursts_streamed = -(-work.streamed // choice.streamed_k_block)
            per_program = m * work.streamed * problem.stored
            all_programs = per_program * work.programs
            # What L2 cannot keep from step to step is read from memory, and L2 evicts in a cycle: all or nothing.
            memory = all_programs / (hardware.memory_rate * 1e3) if all_programs > hardware.l2 / 2 else 0.0
            if choice.ring:
                # Rows past the batch repeat one, and each warp copies one of them.
                operand = min(max(problem.batch, choice.warps), columns) * work.streamed * size
                part = compute * work.streamed / work.k
                # As torch's products, of which both operands are on their way, too.
                formed = part / slowdown / MATRIX_EFFICIENCY
                through = _through_shared(hardware, choice, m) * work.streamed * size / on_chip
                ahead = -(-bursts_streamed // (choice.ring - 1)) * MEMORY_CYCLES * cycle
                # All of it at the same time, but for the first tiles of a step, which come while nothing else happens.
                weights += max(formed, (per_program + operand) / l2, memory, through, ahead) + MEMORY_CYCLES * cycle
                if hardware.arch == "sm_80":
                    weights += bursts_streamed * RING_TILE_CYCLES * cycle
                waits += -(-work.in_shared // choice.burst) * RING_BURST_CYCLES * cycle
                compute = max(0.0, compute - part)
            else:
                staged = fitted.staged_backward if backward else fitted.staged
                weights += max(per_program / l2, memory) + staged * choice.splits * per_program / on_chip
                bursts += bursts_streamed
        one = trip(hardware)
        waits += bursts * one
        # Other batch tiles hide the exchange: by all that they need, in the backward by their pointwise part alone.
        other = pointwise + after + (0.0 if backward else compute + weights + state + waits)
        idle = max(0.0, hardware.exchange - one - (tiles - 1) * other)
        pointwise += (tiles - 1) / tiles * after + max(0.0, after - idle) / tiles
        waits += (tiles - 1) / tiles * fitted.turn * cycle
    pointwise *= tiles
    moved = cell.gates + cell.inputs + cell.saved + 2 * cell.states + len(cell.extras)
    moved += len(cell.after) + cell.more_gradients if backward else 0
    moved *= choice.units * columns * tiles * size * work.programs
    pointwise = max(pointwise, moved / (hardware.memory_rate * 1e3))
    return Cost(tiles * compute, tiles * weights, tiles * state, tiles * waits + idle, pointwise)


def _through_shared(hardware: Hardware, choice: Choice, m: int) -> int:
    """Elements that go to and from shared memory for each index of K that is streamed through a ring: written once, and
    read by each warp group (64 rows of M, in 4 warps) or each warp that multiplies them."""
    columns = choice.batch_tile
    if hardware.arch == "sm_90":
        return 2 * m + (1 + m // 64) * columns
    over_m = over_n = 1
    while over_m * over_n < choice.warps:
        if m // 16 // over_m >= columns // 16 // over_n:
            over_m *= 2
        else:
            over_n *= 2
    return (1 + over_n) * m + (1 + over_m) * columns


def work_of(t: Tiling, groups: int) -> Work:
    """The same numbers, of a finished tiling."""
    # Two products share the M of the backward, and the K of the forward.
    each = t.each if t.backward else t.each[:1]
    resident = sum(c.size for p in each for c in p.k_blocks)
    in_shared = sum(c.size for p in each for c in p.k_blocks[p.in_registers :])
    streamed = sum(p.streamed * p.streamed_k_block for p in each)
    m = t.m if t.backward else sum(p.m for p in t.each)
    return Work(m, resident + streamed, in_shared, streamed, t.slices, t.slices * groups)


def floor(problem: Problem) -> float:
    """Microseconds per step that no plan can beat under this record: all multiprocessors share the arithmetic; what
    of W_hh exceeds registers and shared memory is streamed; unless W_hh fits one multiprocessor, there is one exchange
    and each multiprocessor reads its share of the batch's state once."""
    if problem.recurrences > 1:
        # One direction, or head, after the other has the whole device to itself.
        one = _floor(replace(problem, directions=1, heads=1))
        return min(problem.recurrences * one, _floor(problem))
    return _floor(problem)


def _floor(problem: Problem) -> float:
    hardware, batch, directions = problem.hardware, problem.batch, problem.recurrences
    count = hardware.multiprocessors
    cycle = 1e-3 / hardware.clock
    weights = problem.weight_bytes
    total = directions * weights
    compute = 2 * total // problem.stored * batch / (hardware.rate(problem.dtype) * 1e6)
    capacity = hardware.shared + hardware.registers * 2  # half of the registers work
    pointwise = problem.cell.chain[0] * cycle
    if weights <= capacity:
        return compute + pointwise
    streamed = max(0, total - count * capacity)
    rate = hardware.memory_rate * 1e3 if streamed > hardware.l2 / 2 else hardware.l2_rate * count / cycle
    # Each group of slices needs its batch tile only: as many groups as copies of W_hh fit share the batch.
    copies = max(1, min(batch * directions, count * capacity // weights))
    state = directions * batch * problem.hidden * problem.size / copies / (hardware.l2_rate / cycle)
    # These may overlap; the exchange and the cell follow one another.
    return max(compute, streamed / rate, state) + hardware.exchange + pointwise


def torch_step(problem: Problem, backward: bool) -> float:
    """Microseconds per step that torch's own path is taken to need: a product and a pointwise kernel per step and
    direction, or, where cuDNN has a persistent kernel (float16, LSTM, H a multiple of 128 up to 1024, B a
    multiple of 8 up to 128, one direction), 1.96 forward as published for an H100 at H=768, B=16 (3.1 backward)."""
    hardware, batch, directions, hidden = problem.hardware, problem.batch, problem.directions, problem.hidden
    persistent = (
        hardware.arch.startswith("sm_") and problem.cell.name == "lstm" and problem.dtype == "fp16" and directions == 1
        and hidden % 128 == 0 and hidden <= 1024 and batch % 8 == 0 and batch <= 128
    )  # fmt: skip
    if persistent:
        return 3.11 if backward else 1.96
    # Dequantised, where they are of 8 bits.
    weights = problem.weight_bytes // problem.stored * problem.size * problem.heads
    rate = (
        hardware.memory_rate * 1e3
        if directions * weights > hardware.l2 / 2
        else hardware.l2_rate * (hardware.multiprocessors * hardware.clock * 1e3)
    )
    flops = 2 * weights / problem.size * batch
    product = max(weights / rate, flops / (hardware.rate(problem.dtype) * 1e6 * MATRIX_EFFICIENCY))
    return directions * (2 * hardware.launch + product)
