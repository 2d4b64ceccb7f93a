"""The plan: who owns what, decided before anything runs. Pure Python, no GPU, no torch, no Triton.

``plan_layer`` searches, for the forward and for the backward scan, the slices, the split, the batch
tiles, the warps and the homes of W_hh that the cost model (``cost``) predicts to be fastest, among those that fit the
registers and the shared memory. What fits (``occupancy``) is known by audit: the constants are such that none of the
kernels in ``bench/results`` spills.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from ..cells import Cell
from . import cost as model
from .cost import BYTES, Cost
from .hardware import INTERPRETER, Hardware
from .occupancy import SIGNALS, masked, register_estimate, register_limit, registers_needed, shared_bound
from .tiling import Choice, Tiling, make_tiling, next_power_of_2, smallest_chunk

DTYPES = BYTES

# A batch is planned for as the next of these, so that a new batch size seldom is a new kernel: at most one per class.
BATCH_CLASSES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)

# Full float32 has no tensor cores: a thread holds both operands of its outputs for all of a tile's part of K. So many
# numbers, the outputs among them, are the most that never spilled (272; 320 did).
MULTIPLY_ADD_REGISTERS = 280

# (cell, dtype, H, batch class, D, architecture) of a forward whose fastest choice spills by a hair that no constant
# above accounts for (on Triton 3.6.0 4 and 2 instructions, on 3.9.0 12): the next one is taken.
PASSED_OVER = {
    ("gru", "tf32", 2048, 32, 1, "sm_80"),
    ("lstm", "fp32", 768, 128, 1, "sm_100"),
    ("lstm", "tf32", 1024, 64, 1, "sm_90"),
}

# Offsets into W_hh are 32-bit.
LARGEST = 1 << 31
# Of a grid's second dimension.
LARGEST_GRID = 65_535


@dataclass(frozen=True)
class Shares:
    """Bytes of W_hh of one direction, padding not included: those three add up to all of it."""

    registers: int
    shared: int
    streamed: int

    @property
    def resident(self) -> float:
        """Part of W_hh that stays on chip for all steps, 0 to 1."""
        return (self.registers + self.shared) / (self.registers + self.shared + self.streamed)


@dataclass(frozen=True)
class Pass:
    """One direction of the scan over time (forward or backward): its tiling, its launch, its bytes, its cost.

    Attributes:
        groups: groups of ``tiling.slices`` programs that run at the same time, each with its batch tiles in one
            direction.
        rounds: launches; 1 where all batch tiles and directions fit at once.
        in_registers, in_shared, streamed: bytes of weights per program in each home, padding included; what is
            streamed is read in each step.
        shared: an upper bound of the shared memory that the compiled program asks for, in bytes.
        registers: estimated 32-bit registers per thread.
        shares: where W_hh is, over all slices together.
        cost: predicted microseconds per time step of one round.
    """

    tiling: Tiling
    choice: Choice
    groups: int
    rounds: int
    in_registers: int
    in_shared: int
    streamed: int
    shared: int
    registers: int
    shares: Shares
    cost: Cost

    @property
    def predicted(self) -> float:
        """Microseconds per time step of the whole layer: all rounds."""
        return self.cost.total * self.rounds


@dataclass(frozen=True)
class Plan:
    """How one recurrent layer runs on one device. Printable."""

    cell: str
    hidden: int
    batch: int
    directions: int
    dtype: str
    hardware: Hardware
    forward: Pass
    backward: Pass
    floor: float

    def __str__(self) -> str:
        lines = [
            f"{self.cell} H={self.hidden} B={self.batch} D={self.directions} {self.dtype} on {self.hardware.name} "
            f"({self.hardware.arch}, {self.hardware.multiprocessors} multiprocessors)"
        ]
        for name, part in (("forward", self.forward), ("backward", self.backward)):
            t, shares = part.tiling, part.shares
            where = "no exchange" if t.slices == 1 else "exchange each step"
            split = f" in {t.columns} columns x {t.rows} blocks of K" if t.rows > 1 else ""
            lines.append(
                f"  {name:8} {_count(t.slices, 'slice')} x {t.units} units{split} ({where}), batch tile "
                f"{t.batch_tile}{f' x {t.subtiles}' if t.subtiles > 1 else ''}, {part.choice.warps} warps; "
                f"{_count(part.groups, 'group')} at a time, {_count(part.rounds, 'round')}"
            )
            lines.append(
                f"           W_hh: {shares.registers:,} bytes in registers, {shares.shared:,} in shared memory, "
                f"{shares.streamed:,} streamed each step ({shares.resident:.0%} resident)"
            )
            lines.append(
                f"           shared memory at most {part.shared:,} of {self.hardware.shared:,} bytes per program; "
                f"predicted {part.predicted:.2f} us per step"
            )
        return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


class PlanError(ValueError):
    """The shape does not fit the device; the message has the given value, the limits and the remedy."""


def _power_of_2_at_most(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


def _local(cell: Cell, hidden: int, hardware: Hardware, backward: bool, dtype: str) -> Iterator[Choice]:
    """One slice: K is the tile of units."""
    units = max(16, next_power_of_2(hidden))
    segments = cell.gates if backward else 1
    # Warp-group products, which Triton takes from 64 rows on, read the weights from shared memory.
    in_memory = dtype == "fp32" or (units >= 64 and hardware.arch in ("sm_90", "sm_100"))
    for warps, blocks, columns in product((4, 8), (1, 2, 4), (16, 32)):
        k = units * segments
        homes = (0, k) if in_memory else (k, 0)
        yield Choice(units, 1, columns, 1, warps, blocks, 1, units, k, *homes, units)


def _sliced(
    cell: Cell, hidden: int, batch: int, hardware: Hardware, size: int, backward: bool, dtype: str, strict: bool
) -> Iterator[Choice]:
    """Many slices: the homes are filled in turn, registers, shared memory, and the rest is streamed."""
    # Where most of W_hh is streamed, a narrow tile may be all that the registers hold.
    streams = cell.gates * hidden * hidden * size > 2 * hardware.multiprocessors * hardware.shared
    tiles = [(8, 1)] if batch <= 8 or streams or not strict else []
    tiles += [(16, 1)] + [(16, n) for n in (2, 4) if 16 * n <= next_power_of_2(batch)]
    # Full float32 spills on wider tiles (2 to 600 instructions).
    tiles += [(32, 1)] if batch > 16 and dtype != "fp32" else []
    parts = (8, 4, 2, 1) if streams or size == 4 else (8, 4, 2)
    for units in (8, 16, 32, 64, 128):
        needed = -(-hidden // units)
        if needed < 2 or needed > hardware.multiprocessors * 2:
            continue
        for rows in (1, 2, 4, 8):
            slices = -(-needed // rows) * rows
            if slices < 2 * rows and rows > 1:
                continue
            # Two programs share a multiprocessor only where there are more slices than multiprocessors.
            blocks = 1 if slices <= hardware.multiprocessors else 2
            if slices > hardware.multiprocessors * blocks:
                continue
            m = (1 if backward else cell.gates) * units * rows
            for columns, subtiles in tiles:
                # Fewer parts of K where M is large: the accumulators of all parts are in registers.
                for splits in parts if m >= 128 else (8,):
                    if splits * m * columns > 128 * 256:
                        continue
                    found = _filled(
                        cell, hidden, hardware, size, backward, dtype, units, rows, slices, columns, subtiles, blocks,
                        splits, strict,
                    )  # fmt: skip
                    if found is not None:
                        yield found


def _multiply_add_depth(outputs: int) -> int:
    """The deepest part of K, a power of two, for which a thread holds both operands of so many outputs in full float32;
    0 if there is none."""
    high = 1 << (max(outputs, 1).bit_length()) // 2
    edges = high + -(-outputs // high)
    room = MULTIPLY_ADD_REGISTERS - outputs
    return _power_of_2_at_most(room // edges) if room >= edges else 0


def largest_tile(m: int, columns: int, splits: int, warps: int, packs: int, size: int, dtype: str) -> int:
    """K of the largest tile that a program should multiply at once; less than the smallest there is if none should."""
    words = 4 * 32 * warps
    # At most 32 registers per thread are on their way, of weights and of the operand.
    fits = min(512, max(smallest_chunk(splits), _power_of_2_at_most(32 * words // (size * max(m, columns)))))
    if dtype != "fp32":
        return fits
    return min(fits, splits * _multiply_add_depth(splits * m * columns // (32 * warps)) // packs)


def _filled(
    cell: Cell, hidden: int, hardware: Hardware, size: int, backward: bool, dtype: str, units: int, rows: int,
    slices: int, columns: int, subtiles: int, blocks: int, splits: int, strict: bool,
) -> Choice | None:  # fmt: skip
    """One choice with its homes filled, or None if it does not fit; not strict: the registers' estimate may fail."""
    warps = 8
    m = (1 if backward else cell.gates) * rows * units
    packs = 1 if backward or cell.gates & (cell.gates - 1) == 0 else 2
    words = 4 * 32 * warps
    segments = cell.gates if backward and rows > 1 else 1
    depth = (cell.gates if backward else 1) * hidden if rows == 1 else slices // rows * units
    smallest = smallest_chunk(splits)
    chunk = largest_tile(m, columns, splits, warps, packs, size, dtype)
    if chunk < smallest and strict:
        return None
    chunk = max(chunk, smallest)
    burst = max(chunk, 32 * words // (size * columns))
    stream = max(smallest, min(chunk if dtype == "fp32" else 512, _power_of_2_at_most(24 * words // (size * m))))
    choice = Choice(units, rows, columns, subtiles, warps, blocks, splits, chunk, burst, 0, 0, stream)

    quantum = smallest * segments
    k = -(-depth // smallest) * quantum
    limit = register_limit(choice)
    total = hardware.shared if blocks == 1 else hardware.shared // blocks - 1024
    reduction = splits * (1 if backward else _power_of_2_at_most(cell.gates)) * rows * units * columns * 4

    needs_mask = masked(hidden, depth, rows > 1 and slices * units > hidden, splits, size)

    def homes(streamed: bool) -> tuple[int, int]:
        spare = limit - registers_needed(m, packs, choice, size, 0, streamed, True, needs_mask)
        if spare < 0 and strict:
            return 0, -1
        spare = max(spare, 0)
        # Where several warps share a part of K, Triton 3.6.0 gives each of them all of its weights: 8 / splits times
        # the registers (seen: hundreds of spills). And one part of K is a product of warp groups on sm_90, which reads
        # its weights from shared memory.
        kept = 0 if dtype == "fp32" or splits < warps else spare * words // (m * size) // quantum * quantum
        working = max(burst * columns * size, (m + columns) * stream * size if streamed else 0, reduction) + SIGNALS
        shared = (total - working) // (m * size) // quantum * quantum
        most = (total - units * columns * 4) // (m * size) // quantum * quantum
        return min(kept, most), shared

    registers, shared = homes(False)
    if shared >= 0 and registers + shared >= k:
        return replace(choice, in_registers=min(registers, k), in_shared=max(0, k - registers))
    if subtiles > 1:
        return None  # each batch tile would stream the weights again
    # A step that streams is long: more trips through L2 do not count as much as the registers do.
    burst = max(chunk, burst // 2)
    if packs > 1 and splits == 1 and size == 4 and not needs_mask:
        burst = max(chunk, burst // 4)  # or Triton 3.6.0 spills (124 instructions, GRU forward, tf32, H=2048, sm_90)
    choice = replace(choice, burst=burst)
    registers, shared = homes(True)
    if shared < 0:
        return None
    return replace(choice, in_registers=min(registers, k), in_shared=min(shared, max(0, k - registers)))


def _shares(cell: Cell, t: Tiling, backward: bool, size: int) -> Shares:
    """Count the elements of W_hh in each home, over all slices of one direction."""
    across = t.hidden if backward else t.gates * t.hidden  # what each index of K holds
    blocks = range(t.rows)

    def valid(start: int, length: int) -> int:
        if t.rows == 1:
            return length
        return sum(max(0, min(length, t.hidden - r * t.block - start)) for r in blocks)

    counted = [valid(c.start, c.length) * across * size for c in t.chunks]
    streamed = t.segments * valid(t.stream_start, t.depth - t.stream_start) * across * size if t.streamed else 0
    return Shares(sum(counted[: t.in_registers]), sum(counted[t.in_registers :]), streamed)


def _finish(
    cell: Cell, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware, backward: bool,
    choice: Choice, strict: bool = True,
) -> Pass | None:  # fmt: skip
    """The pass that a choice makes, or None if it does not fit after all. Strict: nor by the registers' estimate."""
    size = BYTES[dtype]
    t = make_tiling(
        cell,
        hidden,
        directions,
        choice,
        backward=backward,
        size=size,
        precision="tf32" if dtype == "tf32" else "ieee",
        interpreted=hardware is INTERPRETER,
    )
    registers, shared, total = shared_bound(t, size)
    estimate = register_estimate(t, choice, size)
    room = hardware.shared if choice.blocks == 1 else hardware.shared // choice.blocks - 1024
    if hardware is not INTERPRETER and (total > room or (strict and estimate > register_limit(choice))):
        return None
    jobs = t.jobs(batch)
    places = hardware.multiprocessors * choice.blocks // t.slices
    if places == 0:
        return None
    # Slices wait for each other and must be resident together; a single slice waits for nobody.
    groups = min(jobs, LARGEST_GRID) if t.slices == 1 else min(jobs, places)
    rounds = -(-jobs // groups)
    cost = model.step(cell, hidden, dtype, hardware, choice, model.work_of(t, min(groups, places)), backward)
    if t.slices == 1 and groups > places:
        factor = -(-groups // places)
        cost = Cost(*(getattr(cost, f) * factor for f in cost.__dataclass_fields__))
    streamed = t.m * t.streamed * t.stream_chunk * size
    shares = _shares(cell, t, backward, size)
    return Pass(t, choice, groups, rounds, registers, shared, streamed, total, estimate, shares, cost)


def _choices(
    cell: Cell, hidden: int, batch: int, hardware: Hardware, dtype: str, backward: bool, strict: bool = True
) -> Iterator[Choice]:
    size = BYTES[dtype]
    if hardware is INTERPRETER:
        # Its programs run one after the other, and its time goes by the number of operations, not by their size.
        units = max(16, next_power_of_2(hidden))
        k = units * (cell.gates if backward else 1)
        yield Choice(units, 1, 64 if batch >= 32 else 16, 1, 4, 1, 1, units, k, k, 0, units)
        return
    if cell.gates * hidden * hidden * size <= hardware.shared * 2:
        yield from _local(cell, hidden, hardware, backward, dtype)
    yield from _sliced(cell, hidden, batch, hardware, size, backward, dtype, strict)


def _quick(
    cell: Cell, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware, backward: bool,
    choice: Choice,
) -> float:  # fmt: skip
    """A lower bound of the predicted time per step of a choice, without its tiling and so without all its padding."""
    needed = -(-hidden // choice.units)
    slices = -(-needed // choice.rows) * choice.rows
    jobs = -(-batch // (choice.batch_tile * choice.subtiles)) * directions
    places = max(1, hardware.multiprocessors * choice.blocks // slices)
    gates = cell.gates if backward else 1
    if slices == 1:
        k = choice.units * gates
    else:
        segments = gates if choice.rows > 1 else 1
        depth = gates * hidden if choice.rows == 1 else min(hidden, slices // choice.rows * choice.units)
        smallest = smallest_chunk(choice.splits)
        k = -(-depth // smallest) * smallest * segments
    streamed = max(0, k - choice.in_registers - choice.in_shared)
    m = cell.gates // gates * choice.rows * choice.units
    work = model.Work(m, k, choice.in_shared, streamed, slices, slices * min(jobs, places))
    return model.step(cell, hidden, dtype, hardware, choice, work, backward).total * -(-jobs // places)


@lru_cache(maxsize=4096)
def _best(
    cell: Cell, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware, backward: bool
) -> Choice | None:
    """The fastest choice for a class of batch sizes; where the registers' estimate, which is on the safe side, lets
    nothing pass, the choice that exceeds its limit least."""
    shape = cell, hidden, batch, directions, dtype, hardware, backward
    bounded = (
        (_quick(*shape, c), i, c) for i, c in enumerate(_choices(cell, hidden, batch, hardware, dtype, backward))
    )
    passed_over = not backward and (cell.name, dtype, hidden, batch, directions, hardware.arch) in PASSED_OVER
    found: list[Pass] = []  # the fastest first, as many as are asked for
    for bound, _, choice in sorted(bounded):
        if len(found) > passed_over and bound >= found[-1].predicted:
            break
        if (finished := _finish(*shape, choice)) is not None and finished not in found:
            found = sorted([*found, finished], key=lambda p: p.predicted)[: 1 + passed_over]
    best = found[-1] if found else None
    if best is None:
        choices = _choices(cell, hidden, batch, hardware, dtype, backward, strict=False)
        parts = [part for part in (_finish(*shape, choice, strict=False) for choice in choices) if part is not None]
        best = min(parts, key=lambda p: (p.registers - register_limit(p.choice), p.predicted), default=None)
    return best.choice if best is not None else None


def _pass(cell: Cell, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware, backward: bool) -> Pass:
    planned_for = next((c for c in BATCH_CLASSES if batch <= c), BATCH_CLASSES[-1])
    choice = _best(cell, hidden, planned_for, directions, dtype, hardware, backward)
    found = choice and _finish(cell, hidden, batch, directions, dtype, hardware, backward, choice, strict=False)
    if not found:
        size = BYTES[dtype]
        raise PlanError(
            f"hidden_size={hidden} in {dtype} does not fit on {hardware.name}: W_hh of one direction has "
            f"{cell.gates * hidden * hidden * size:,} bytes; with {hardware.multiprocessors} multiprocessors of "
            f"{hardware.shared:,} bytes of shared memory each no slice holds its operands. "
            f"Use a smaller hidden_size{', float16 or bfloat16' if size == 4 else ''}, or backend='torch'."
        )
    return found


@lru_cache(maxsize=4096)
def plan_layer(cell: Cell, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware) -> Plan:
    """The plan for one layer.

    Args:
        cell: the cell's numbers.
        hidden: H >= 1.
        batch: B >= 1.
        directions: 1 or 2.
        dtype: "fp16", "bf16", "tf32" (float32 tensors, tf32 products) or "fp32" (full float32).
        hardware: the device.

    Raises:
        PlanError: no slice of the layer fits the device.
        ValueError: an argument is out of range.
    """
    for name, value in (("hidden_size", hidden), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if cell.gates * hidden * (hidden + 8) >= LARGEST:
        raise PlanError(
            f"hidden_size={hidden}: offsets into W_hh have 31 bits, and {cell.gates} gates allow hidden_size up to "
            f"{math.isqrt((LARGEST - 1) // cell.gates + 16) - 4}; use a smaller one, or backend='torch'."
        )
    forward, backward = (
        _pass(cell, hidden, batch, directions, dtype, hardware, backward) for backward in (False, True)
    )
    floor = model.floor(cell, hidden, batch, directions, dtype, hardware)
    return Plan(cell.name, hidden, batch, directions, dtype, hardware, forward, backward, floor)
