"""What must hold for every tiling and every plan, whatever constants the planner works with. No GPU, no Triton."""

import csv
from functools import cache
from itertools import pairwise
from pathlib import Path

from persistrnn.kernels.cells import CELLS, Cell
from persistrnn.kernels.planner import plan as planning
from persistrnn.kernels.planner.choices import choices
from persistrnn.kernels.planner.hardware import INTERPRETER, Hardware
from persistrnn.kernels.planner.plan import Pass, Plan
from persistrnn.kernels.planner.problem import BYTES, Problem
from persistrnn.kernels.planner.tiling import Tiling

SHAPES = {name: CELLS[name] for name in ("lstm", "gru")}
DTYPES = ("fp16", "bf16", "tf32", "fp32")
PASSES = ("forward", "backward")
WORKLOADS = Path(__file__).resolve().parents[2] / "bench" / "workloads"

GRID_LIMIT = 65_535  # of CUDA, in the second dimension of a grid
RESERVED = 1024  # bytes of shared memory that CUDA takes per program
REGISTER_FILE = 65_536  # the smallest of any device with a record


@cache
def workloads() -> tuple[tuple[str, int, int], ...]:
    """The (cell, hidden, batch) of every LSTM and GRU row of the workload tables, each once."""
    found = set()
    for path in sorted(WORKLOADS.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["cell"] in SHAPES:
                    found.add((row["cell"], int(row["hidden"]), int(row["batch"])))
    return tuple(sorted(found))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def read_indices(t: Tiling) -> list[tuple[int, int]]:
    """The ranges of K, as (start, stop) over all of W_hh, that the programs of one unit group multiply: those of all R
    blocks, in the tiles of ``chunks`` and in the streamed ones, as the kernels place and mask them."""
    turns = t.streamed // t.segments
    tiles = [(c.segment, c.start, c.size, c.length) for c in t.k_blocks]
    for i in range(t.streamed):
        start = t.stream_start + i % turns * t.streamed_k_block
        tiles.append((i // turns, start, t.streamed_k_block, t.depth - start))
    ranges = []
    for row in range(t.k_parts):
        base = row * t.units_per_part
        for segment, start, size, length in tiles:
            left = min(length, t.hidden - base - start) if t.ragged else length
            first = segment * t.hidden + base + start
            ranges.append((first, first + min(size, max(0, left))))
    return [(first, last) for first, last in ranges if first < last]


def check_tiling(t: Tiling, shape: Cell, backward: bool, size: int) -> None:
    """``size``: bytes per element of W_hh."""
    hidden = t.hidden
    assert (t.gates, t.saved, t.recurrent_gradient) == (shape.gates, shape.saved, shape.recurrent_gradient)
    assert all(is_power_of_two(n) for n in (t.units, t.k_parts, t.batch_tile, t.splits, t.streamed_k_block, *t.packs))
    assert is_power_of_two(t.chains)
    assert t.batch_tile >= 8, "a dot needs 8 columns"

    # Units, and the rows of the product.
    assert t.slices * t.units >= hidden, "every unit has an owner"
    assert (t.slices - t.k_parts) * t.units < hidden, "no unit group is idle"
    assert t.unit_groups * t.k_parts == t.slices
    assert t.units_formed == t.k_parts * t.units
    assert t.outputs == (1 if backward else shape.gates)
    assert t.m == t.outputs * t.units_formed
    assert t.first_gates == tuple(sum(t.packs[:i]) for i in range(len(t.packs)))

    # K: every index exactly once.
    expected = 0
    for first, last in sorted(read_indices(t)):
        assert first == expected, f"index {min(first, expected)} of K is {'read twice' if first < expected else 'left'}"
        expected = last
    assert expected == (shape.gates * hidden if backward else hidden)
    for k_block in t.k_blocks:
        assert is_power_of_two(k_block.size)
        assert k_block.size >= k_block.length >= 1
        assert k_block.size >= 16 * t.splits, "each part of a k block is at least one instruction deep"
        assert 0 <= k_block.segment < t.segments
    if t.streamed:
        assert t.streamed_k_block >= 16 * t.splits
        assert t.streamed % t.segments == 0, "every segment streams as many tiles"
    assert 0 <= t.in_registers <= len(t.k_blocks)

    # Bursts.
    assert all(a < b for a, b in pairwise(t.bursts))
    assert t.bursts[:1] == ((0,) if t.k_blocks else ())
    assert all(i < len(t.k_blocks) for i in t.bursts)
    if 0 < t.in_registers < len(t.k_blocks):
        assert t.in_registers in t.bursts, "a burst has one home"

    if t.slices > 1 and (t.streamed or hidden * size % 4):
        assert t.stride * size % 16 == 0, "rows of 16-byte multiples"
        assert 0 <= t.stride - hidden < 16 // size, "and no more padding than that"
    else:
        assert t.stride == hidden, "no copy"
    if t.slices == 1:
        assert (t.k_parts, t.splits, t.units_per_part, t.streamed, t.counters_per_tile) == (1, 1, 0, 0, 1)
        assert t.packs == (1,) * t.outputs, "every gate has the layout of the state"
        assert t.units >= 16, "K is the tile of units, and one instruction is 16 deep"
        assert all(k_block.size == t.units for k_block in t.k_blocks), "the operand is the tile of the state itself"
        return
    if t.k_parts == 1:
        assert (t.units_per_part, t.counters_per_tile, t.ragged) == (0, 1, False)
    else:
        # Whoever reads a part of K waits for the slices whose units are in it, and knows how many they are.
        assert t.units_per_part == t.unit_groups * t.units
        assert all(s * t.units // t.units_per_part == s // t.unit_groups for s in range(t.slices))
        assert t.counters_per_tile == t.k_parts + t.unit_groups
        assert t.ragged == (t.slices * t.units > hidden)


def check_pass(part: Pass, found: Plan, shape: Cell, backward: bool) -> None:
    t, choice, hardware, size = part.tiling, part.choice, found.hardware, BYTES[found.dtype]
    check_tiling(t, shape, backward, size)
    assert (t.hidden, t.directions) == (found.hidden, found.directions)
    assert t.interpreted == (hardware is INTERPRETER)
    assert t.precision == ("tf32" if found.dtype == "tf32" else "ieee")
    assert (t.units, t.batch_tile, t.subtiles) == (choice.units, choice.batch_tile, choice.subtiles)
    assert is_power_of_two(choice.warps)
    assert choice.warps * 32 <= 1024, "threads of one program"
    assert t.splits <= t.chains * choice.warps, "no more parts of K than warps have chains"

    # Every byte of W_hh has one home.
    shares = part.shares
    assert min(shares.registers, shares.shared, shares.streamed) >= 0
    assert shares.registers + shares.shared + shares.streamed == shape.gates * found.hidden**2 * size
    assert 0 <= shares.resident <= 1
    assert (shares.streamed == 0) == (shares.resident == 1) == (part.streamed == 0) == (t.streamed == 0)

    # And every home has room.
    kept, placed = t.k_blocks[: t.in_registers], t.k_blocks[t.in_registers :]
    assert part.in_registers == t.m * sum(c.size for c in kept) * size
    assert part.in_shared == t.m * sum(c.size for c in placed) * size
    assert part.streamed == t.m * t.streamed * t.streamed_k_block * size
    assert t.slices * part.in_registers >= shares.registers
    assert t.slices * part.in_shared >= shares.shared
    if hardware is not INTERPRETER:
        check_room(part, hardware, size)

    # Every job is done, by groups that are all there at the same time.
    jobs = -(-found.batch // (t.batch_tile * t.subtiles)) * found.directions
    assert t.jobs(found.batch) == jobs
    assert 1 <= part.groups <= min(jobs, GRID_LIMIT), "no group is idle"
    assert part.rounds * part.groups >= jobs, "every job is done"
    assert (part.rounds - 1) * part.groups < jobs, "no round is empty"
    if t.slices > 1:
        assert part.groups * t.slices <= hardware.multiprocessors * choice.blocks, "resident at the same time"
    assert part.predicted == part.cost.total * part.rounds > 0


def check_room(part: Pass, hardware: Hardware, size: int) -> None:
    t, choice = part.tiling, part.choice
    assert part.shared <= hardware.shared
    assert choice.blocks * (part.shared + RESERVED) <= hardware.shared + RESERVED, "all programs of a multiprocessor"
    widest = (
        max(sum(c.size for c in t.k_blocks[a:b]) for a, b in pairwise((*t.bursts, len(t.k_blocks))))
        if t.k_blocks
        else 0
    )
    assert part.shared >= part.in_shared + widest * t.batch_tile * size, "weights and the operand in flight"
    assert part.shared >= part.in_registers, "weights on their way to registers"

    limit = planning.register_limit(choice)
    threads = 32 * choice.warps
    assert limit <= 255
    assert limit * threads * choice.blocks <= REGISTER_FILE
    accumulators = t.splits * t.m * t.batch_tile * 4
    assert part.registers * threads * 4 >= part.in_registers + accumulators, "weights and accumulators"


def keeps_its_registers(part: Pass) -> bool:
    return part.registers <= planning.register_limit(part.choice)


def check_registers(part: Pass, found: Plan, shape: Cell, backward: bool) -> None:
    """A plan that is expected to spill is better than none, and worse than any other."""
    if found.hardware is INTERPRETER or keeps_its_registers(part):
        return
    problem = planning.of_class(
        Problem(shape, found.hidden, found.batch, found.directions, found.dtype, found.hardware)
    )
    for choice in choices(problem, backward):
        other = planning.finish(problem, backward, choice)
        assert other is None or not keeps_its_registers(other), f"{choice} keeps its registers"


def check_plan(found: Plan) -> None:
    shape = SHAPES[found.cell]
    for name in PASSES:
        check_pass(getattr(found, name), found, shape, name == "backward")
        check_registers(getattr(found, name), found, shape, name == "backward")
