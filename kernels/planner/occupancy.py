"""What a choice needs of a multiprocessor: registers per thread and shared memory per program. Pure Python."""

from __future__ import annotations

from dataclasses import replace

from ..cells import Cell
from .problem import Problem
from .tiling import Choice, Tiling, reduction, smallest_k_block

# Registers per thread that a kernel needs besides weights, accumulators, the operand in flight and the streamed tile.
# Fitted to audits on Triton 3.9.0 and 3.6.0, on the safe side: up to 30 more than kernels turn out to need.
BASE_REGISTERS = 79
STREAM_REGISTERS = 50  # more where a tile is streamed, besides two of those tiles
TILE_REGISTERS = 28  # more for each further batch tile of a program
# Of a kernel that streams through a ring, besides accumulators: in all, and for each element of the state of a thread.
# Of those that do not spill some take up to 54 more, where they are there to be taken.
RING_REGISTERS, RING_ELEMENT_REGISTERS = 104, 5
SHARED_PART_REGISTERS = {2: 44, 4: 26}  # more where warps share a part of a streamed tile, by bytes per element
WORD_REGISTERS = 28  # more where a streamed tile is of 4-byte elements
PACK_REGISTERS = 20  # more for a second pack of gates in what is streamed
ELEMENT_REGISTERS = 17  # more for each further element of the state that a thread owns
STREAM_ELEMENT_REGISTERS = 8  # and as many where a tile is streamed (seen: GRU backward, bf16, 2048, sm_80, 2 spills)
ADDRESS_REGISTERS = 10  # more for each kind of tensor that neither the LSTM nor the GRU has
# More for a step with a second product, and with means, by bytes per element.
PRODUCT_REGISTERS, MEAN_REGISTERS = {2: 36, 4: 64}, {2: 72, 4: 144}
FEW_WARPS_REGISTERS = {False: -4, True: 12}  # more with 4 warps, by whether M is half of a tensor core's
# And in tf32 where each has several parts of K of 16 rows (without: MGU forward, 1024, B=16, sm_90, 2 spills).
CHAIN_REGISTERS = 12
MASK_REGISTERS = 20  # more where the operand is loaded under a mask or in pieces of less than 16 bytes

WIDENING_REGISTERS = 16  # more where weights of 8 bits are widened

# Registers per thread that a layer of a pipeline needs more than a layer alone: the product of what comes from its
# neighbour, and the addresses of that. By bytes per element.
FORWARD_REGISTERS = {2: 24, 4: 24}
BACKWARD_REGISTERS = {2: 36, 4: 92}
DEPTH = 256  # bytes of K per further register in the backward
STATE_REGISTERS = 6  # more for each further element of the state that a thread owns, in the backward

# Bytes of shared memory with which a fifth-generation product says that it is done (8 seen on sm_100).
SIGNALS = 64


def register_limit(choice: Choice) -> int:
    """Registers per thread, all of the multiprocessor's shared by its programs."""
    return min(255, 65536 // (32 * choice.warps * choice.blocks) // 8 * 8)


def register_estimate(cell: Cell, t: Tiling, choice: Choice, size: int) -> int:
    """Registers per thread that the compiled kernel is expected to need. See ``BASE_REGISTERS``."""
    resident = sum(c.size for c in t.k_blocks[: t.in_registers])
    exchanged = t.slices > 1
    needs_mask = exchanged and masked(t.hidden, t.depth, t.ragged, t.splits, size)
    need = registers_needed(t.m, len(t.packs), choice, size, resident, t.streamed > 0, exchanged, needs_mask)
    if t.later is not None:
        kept = sum(c.size for c in t.later.k_blocks[: t.later.in_registers])
        need += t.later.m * kept * size // (4 * 32 * choice.warps)
    return need + cell_registers(cell, t.backward, choice, size)


def widening_registers(problem: Problem, choice: Choice) -> int:
    """More where weights are of 8 bits; and where warps share a part of K, or Triton 3.6.0 spills (24)."""
    return WIDENING_REGISTERS * (1 if choice.splits >= 8 else 3) if problem.weight_dtype else 0


def cell_registers(cell: Cell, backward: bool, choice: Choice, size: int) -> int:
    """More than the LSTM and the GRU need, to which the constants here are fitted: a register per element of the state
    for each tile that the cell has more of, and for each parameter; and addresses."""
    if backward:
        tiles, width = cell.saved + len(cell.after) + cell.more_gradients, cell.stored_gradients
    else:
        tiles, width = cell.inputs, cell.inputs
    more = max(0, tiles + cell.states + len(cell.extras) - 6)
    elements = max(1, choice.units * choice.batch_tile // (32 * choice.warps))
    addresses = bool(cell.extras) + (width != cell.gates) + max(0, cell.states - 2)
    params = cell.step_params - cell.gates * cell.normalised  # weight_ln_ih is of no use within the step
    need = elements * (params + more * choice.subtiles) + ADDRESS_REGISTERS * addresses
    # A quarter more for each further element (seen without: 22 spills, LayerNormGRU backward, bf16, 2048, B=64, sm_90).
    means = MEAN_REGISTERS[size] * (3 + elements) // 4 * (cell.means > 0)
    return need + PRODUCT_REGISTERS[size] * (cell.products > 0) + means


def masked(hidden: int, depth: int, ragged: bool, splits: int, size: int) -> bool:
    """Whether some load of the operand needs a mask or narrow pieces."""
    return ragged or depth % smallest_k_block(splits) != 0 or hidden * size % 16 != 0


def held_rows(m: int) -> int:
    """Rows of weights in registers: a tensor core takes 16, and where there are 8, each is there twice."""
    return max(m, 16)


def registers_needed(
    m: int, packs: int, choice: Choice, size: int, resident: int, streamed: bool, exchanged: bool, masked: bool
) -> int:
    threads = 32 * choice.warps
    words = 4 * threads
    elements = max(1, choice.units * choice.batch_tile // threads)
    if choice.ring:
        return RING_REGISTERS + m * choice.batch_tile // threads + RING_ELEMENT_REGISTERS * elements
    need = BASE_REGISTERS + (TILE_REGISTERS + size) * (choice.subtiles - 1) * (1 + elements) // 2
    need += held_rows(m) * resident * size // words
    if exchanged and choice.warps < 8:
        need += FEW_WARPS_REGISTERS[m < 16]
        need += CHAIN_REGISTERS * (size == 4 and choice.splits > choice.warps and choice.batch_tile > 8)
    need += choice.splits * m * choice.batch_tile // threads
    # The sum over the parts, before it becomes gates.
    need += m * choice.batch_tile // threads
    if exchanged:
        need += choice.burst * choice.batch_tile * size // words
    if streamed:
        need += STREAM_REGISTERS + 2 * m * choice.streamed_k_block * size // words
        if choice.splits > 1:
            need += SHARED_PART_REGISTERS[size] if choice.splits < choice.warps else 0
            # Operands of 4 bytes are read from shared memory one by one, each from an address of its own.
            need += WORD_REGISTERS if size == 4 else 0
        need += PACK_REGISTERS * size // 2 * (packs - 1) + STREAM_ELEMENT_REGISTERS * (elements - 1)
    if masked:
        need += MASK_REGISTERS * (1 + choice.subtiles) // 2
    return need + ELEMENT_REGISTERS * (elements - 1)


def pipeline_registers(backward: bool, depth: int, size: int, elements: int) -> int:
    """More than a layer alone. elements: of the state that a thread owns."""
    if not backward:
        return FORWARD_REGISTERS[size]
    return BACKWARD_REGISTERS[size] + depth * size // DEPTH + STATE_REGISTERS * (elements - 1)


def shared_bound(t: Tiling, size: int, stored: int) -> tuple[int, int, int]:
    """(in registers, in shared memory, total of shared memory) per program, in bytes, the last an upper bound."""
    if t.later is not None:
        each = [shared_bound(replace(p, later=None), size, stored) for p in t.each]
        registers, shared = (sum(bound[i] for bound in each) for i in range(2))
        working = max(total - shared for _, shared, total in each)
        return registers, shared, max(registers + t.units * t.batch_tile * 4, shared + working)
    registers = t.m * sum(c.size for c in t.k_blocks[: t.in_registers]) * size
    shared = t.m * sum(c.size for c in t.k_blocks[t.in_registers :]) * stored
    ends = (*t.bursts, len(t.k_blocks))[1:]
    burst = max((sum(c.size for c in t.k_blocks[a:b]) for a, b in zip(t.bursts, ends, strict=True)), default=0)
    if t.slices == 1:
        # Every operand tile and the result of one.
        burst = sum(c.size for c in t.k_blocks) + t.units
    operand = burst * t.batch_tile * size
    stream = (t.m + t.batch_tile) * t.streamed_k_block * size if t.streamed else 0  # also of 8 bits: widened before
    stream *= max(1, t.ring)
    parts = reduction(t.packs, t.splits // t.chains, t.k_parts, t.units, t.batch_tile)
    # On their way to registers the weights pass through shared memory, before those that stay there arrive.
    # Beside them, the first state changes its layout.
    state = t.units * t.batch_tile * 4
    working = max(operand, stream, parts) + (state if t.slices == 1 else 0) + SIGNALS
    return registers, shared, max(registers + state, shared + working)
