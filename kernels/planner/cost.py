"""The cost model: what one time step of a pass takes, in microseconds. Predicted, from a device's record alone.

A step is one exchange, then a product, then the cell, and the sum of five parts:

* compute: multiply-adds of one program, padding included, at its share of the device's matrix rate times what such
  small products reach of it; weights of 8 bits are widened before;
* weights: reading W_hh, per step and product, from shared memory (weights in registers cost nothing) and from L2 or
  memory (streamed weights; what exceeds L2 comes at the memory's rate);
* state: reading the moving operand from L2 and staging it in shared memory, and with a two-dimensional split writing
  and reading the partial sums;
* synchronisation: the exchanges between slices, what of them the other batch tiles of a program do not hide, and the
  barriers within a program;
* pointwise: the cell, and what it loads and stores.

``floor`` is what no plan can beat under the same record, ``torch_step`` what torch's own path is taken to need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .problem import Problem
from .tiling import Choice, Tiling

# Assumed, not measured; a device's data file replaces those that are in its record.
MATRIX_EFFICIENCY = 0.5  # of the dense rate, by mma on tiles of 16 columns
LATENCY_SHARE = 0.5  # of an exchange: one trip through L2, for the first byte of each burst of the operand
UNHIDDEN = 0.1  # of an exchange, however much work other batch tiles have
CELL_CYCLES = 250.0  # the chain of exp and divide from the product to the new state
ELEMENT_CYCLES = 40.0  # per element of the state and thread: loads, stores, conversions

# Instructions for each weight of 8 bits in each step (``device/widen``, with bf16), and the lanes of a multiprocessor
# that do such.
WIDENING = {"int8": 2.0, "fp8": 2.5}
WIDENING_LANES = 64.0


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


def step(problem: Problem, choice: Choice, work: Work, backward: bool) -> Cost:
    """Predicted microseconds per time step of one round."""
    cell, hardware, size = problem.cell, problem.hardware, problem.size
    cycle = 1e-3 / hardware.clock  # microseconds
    # Programs on one multiprocessor share its rates.
    share = min(choice.blocks, -(-work.programs // hardware.multiprocessors))
    tiles, columns = choice.subtiles, choice.batch_tile
    exchanged = work.slices > 1

    rate = hardware.rate(problem.dtype) * 1e6 / hardware.multiprocessors * MATRIX_EFFICIENCY  # flop per microsecond
    compute = share * tiles * 2 * max(work.m, 16) * work.k * max(columns, 8) / rate

    l2 = hardware.l2_rate / cycle / share  # bytes per microsecond and program
    on_chip = hardware.shared_rate / cycle / share
    weights = tiles * work.m * work.in_shared * problem.stored / on_chip
    if problem.weight_dtype:
        lanes = WIDENING_LANES / cycle / share
        compute += tiles * work.m * (work.in_shared + work.streamed) * WIDENING[problem.weight_dtype] / lanes
    if work.streamed:
        per_program = work.m * work.streamed * problem.stored
        all_programs = per_program * work.programs
        # What L2 cannot keep from step to step is read from memory, and L2 evicts in a cycle: all or nothing.
        memory = all_programs / (hardware.memory_rate * 1e3) if all_programs > hardware.l2 / 2 else 0.0
        weights += tiles * (max(per_program / l2, memory) + 2 * per_program / on_chip)

    state = synchronisation = 0.0
    barriers = 3 + 2 * cell.means
    if exchanged:
        operand = columns * work.k * size * (1 if backward else 1 + cell.products)
        # Warps that share a part of K read the same operand.
        readers = max(1, choice.warps // choice.splits)
        state = tiles * (operand / l2 + (1 + readers) * operand / on_chip)
        outputs = 1 if backward else cell.gates
        if choice.k_parts > 1:
            state += tiles * 2 * choice.k_parts * choice.units * outputs * columns * 4 / l2
        bursts = -(-work.k // choice.burst)
        exchanges = ((2 if choice.k_parts > 1 else 1) + cell.means + cell.products) * hardware.exchange
        # With several batch tiles, the others' work hides a tile's exchange.
        busy = (compute + weights + state) / tiles * (tiles - 1)
        later_bursts = (bursts - 1) * LATENCY_SHARE * hardware.exchange
        synchronisation = max(exchanges - busy, UNHIDDEN * exchanges) + tiles * later_bursts
        barriers = 5 + 2 * bursts + (4 if choice.k_parts > 1 else 0) + 4 * (cell.means + cell.products)
    synchronisation += tiles * barriers * hardware.barrier

    threads = 32 * choice.warps
    elements = -(-choice.units * columns // threads)
    pointwise = tiles * (CELL_CYCLES + share * elements * ELEMENT_CYCLES) * cycle
    tiles_moved = cell.gates + cell.inputs + cell.saved + 2 * cell.states + len(cell.extras)
    tiles_moved += len(cell.after) + cell.more_gradients if backward else 0
    moved = tiles_moved * choice.units * columns * tiles * size * work.programs
    pointwise = max(pointwise, moved / (hardware.memory_rate * 1e3))
    return Cost(compute, weights, state, synchronisation, pointwise)


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
    pointwise = CELL_CYCLES * cycle
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
