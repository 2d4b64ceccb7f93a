"""The plan: who owns what, decided before anything runs. Pure Python, no GPU, no torch, no Triton.

``plan(cell, batch, hidden, ...)`` chooses for the forward and for the backward scan: slices, units per slice, batch
tile, splits and chunks of K, warps, and says where the bytes of W_hh live. The rules are thresholds that the audit
of compiled kernels has confirmed (no spills, shared memory within the limit); there is no cost model yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

DTYPES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}  # bytes per element of W_hh on chip


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of a device. Shared memory is per block, in bytes, opt-in maximum."""

    name: str
    arch: int
    multiprocessors: int
    shared: int


# Stands for Triton's interpreter: one slice whatever the size, for its programs run one after the other.
INTERPRETER = Hardware("interpreter", 0, 1 << 30, 1 << 40)

# Shared memory limits: CUDA C++ Programming Guide, technical specifications per compute capability.
DEVICES = {
    h.name: h
    for h in (
        Hardware("a100", 80, 108, 166_912),
        Hardware("h100", 90, 132, 232_448),
        Hardware("h200", 90, 132, 232_448),
    )
}


@dataclass(frozen=True)
class Shape:
    """What of a cell the plan needs: its name and its numbers (see ``cells.Cell``)."""

    name: str
    gates: int
    saved: int
    recurrent_gradient: bool


@dataclass(frozen=True)
class Chunk:
    """``length`` indices of K from ``start`` on, held in a tile of ``size`` (a power of two, at least length)."""

    start: int
    size: int
    length: int


@dataclass(frozen=True)
class Tiling:
    """Everything a scan kernel must know at compile time besides the cell. See ``scan``.

    Attributes:
        units, slices, batch_tile: U, S and BB; S * U >= H.
        splits: parts of K, one per warp, summed after the product.
        chunks: the tiles of K.
        packs: gates per dot; first_gates: index of each pack's first gate.
        precision: of a float32 dot, "tf32" or "ieee".
    """

    hidden: int
    directions: int
    gates: int
    saved: int
    recurrent_gradient: bool
    units: int
    slices: int
    batch_tile: int
    splits: int
    chunks: tuple[Chunk, ...]
    packs: tuple[int, ...]
    first_gates: tuple[int, ...]
    precision: str
    interpreted: bool = False


@dataclass(frozen=True)
class Pass:
    """One direction of the scan over time (forward or backward): its tiling, its launch, its bytes.

    Attributes:
        warps: warps per program.
        groups: groups of ``tiling.slices`` programs that run at the same time, each with one batch tile in one
            direction.
        rounds: launches; 1 where all batch tiles and directions fit at once.
        resident: bytes of W_hh that a program keeps in shared memory for all steps, padding included.
        shared: an upper bound of the shared memory that the compiled program asks for, in bytes.
    """

    tiling: Tiling
    warps: int
    groups: int
    rounds: int
    resident: int
    shared: int


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

    def __str__(self) -> str:
        lines = [
            f"{self.cell} H={self.hidden} B={self.batch} D={self.directions} {self.dtype} on {self.hardware.name} "
            f"(sm_{self.hardware.arch}, {self.hardware.multiprocessors} multiprocessors)"
        ]
        for name, part in (("forward", self.forward), ("backward", self.backward)):
            t = part.tiling
            where = "no exchange" if t.slices == 1 else "exchange each step"
            sizes = "+".join(str(c.size) for c in t.chunks)
            lines.append(
                f"  {name:8} {t.slices} slice{'s' if t.slices > 1 else ''} x {t.units} units ({where}), batch tile "
                f"{t.batch_tile}, {part.warps} warps, K = {sizes} in {t.splits} part{'s' if t.splits > 1 else ''}; "
                f"{part.groups} group{'s' if part.groups > 1 else ''} at a time, {part.rounds} "
                f"round{'s' if part.rounds > 1 else ''}"
            )
            lines.append(
                f"           W_hh: all of it resident, {part.resident:,} bytes per program in shared memory "
                f"(at most {part.shared:,} of {self.hardware.shared:,} used), 0 streamed"
            )
        return "\n".join(lines)


class PlanError(ValueError):
    """The shape does not fit the device yet; the message has the given value, the limits and the remedy."""


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def chunks(total: int, smallest: int, largest: int) -> tuple[Chunk, ...]:
    """Cut ``range(total)`` into power-of-two tiles between the two sizes: 320 = 256 + 64, 768 = 512 + 256."""
    result = []
    start = 0
    while start < total:
        left = total - start
        size = min(largest, max(smallest, 1 << (left.bit_length() - 1)))
        # Padding the rest to one tile costs less than one more tile where at most a quarter of it is waste.
        padded = max(smallest, next_power_of_2(left))
        if padded <= largest and padded - left <= padded // 4:
            size = padded
        result.append(Chunk(start, size, min(size, left)))
        start += size
    return tuple(result)


def tiling(
    cell: Shape,
    hidden: int,
    directions: int,
    *,
    backward: bool,
    units: int,
    batch_tile: int,
    splits: int,
    largest_chunk: int,
    precision: str,
    interpreted: bool = False,
) -> Tiling:
    """The compile-time record for one choice of units per slice; one slice if the units cover H."""
    slices = -(-hidden // units)
    gates = cell.gates
    if slices == 1:
        # The operand comes from registers as one tile of units per gate, and each gate keeps its own dot so that
        # all gates have the same layout as the cell's state.
        splits = 1
        starts = range(0, gates * hidden, hidden) if backward else (0,)
        parts = tuple(Chunk(s, units, hidden) for s in starts)
        packs = (1,) if backward else (1,) * gates
    else:
        parts = chunks(gates * hidden if backward else hidden, min(largest_chunk, 16 * splits), largest_chunk)
        # A pack must be a power of two: 4 gates are one dot, 3 gates are two.
        packs = (1,) if backward else {3: (2, 1)}.get(gates, (gates,))
    first_gates = tuple(sum(packs[:i]) for i in range(len(packs)))
    return Tiling(
        hidden, directions, gates, cell.saved, cell.recurrent_gradient, units, slices, batch_tile, splits, parts,
        packs, first_gates, precision, interpreted,
    )  # fmt: skip


def shared_bound(t: Tiling, size: int) -> tuple[int, int]:
    """(resident, total) bytes of shared memory per program, the second an upper bound."""
    rows = sum(t.packs) * t.units
    resident = rows * sum(c.size for c in t.chunks) * size
    largest = max(c.size for c in t.chunks)
    # The operand's staging (two chunks may be in flight, every tile and the result of one for a single slice) shares
    # its space with the sum over the splits.
    in_flight = len(t.chunks) + 1 if t.slices == 1 else 2
    staging = in_flight * largest * t.batch_tile * size
    reduction = t.splits * max(t.packs) * t.units * t.batch_tile * 4
    return resident, resident + max(staging, reduction)


@dataclass(frozen=True)
class Rule:
    """One row of the planner's table: how a slice of ``units`` is worked on."""

    units: int
    warps: int
    splits: int
    largest_chunk: int


# By bytes per element of W_hh. One slice: K is the unit tile itself. Seen by audit: fewer warps spill at 128 units
# (and at 64 in float32).
LOCAL_RULES = {
    2: (Rule(16, 4, 1, 16), Rule(32, 4, 1, 32), Rule(64, 4, 1, 64), Rule(128, 8, 1, 128)),
    4: (Rule(16, 4, 1, 16), Rule(32, 4, 1, 32), Rule(64, 8, 1, 64)),
}

# Many slices. Seen by audit: 16 units on 8 warps fit and do not spill; with 8 units the backward does in float32.
SHARED_RULES = {2: Rule(16, 8, 8, 512), 4: Rule(16, 8, 8, 256)}


def _rule(hidden: int, dtype: str, hardware: Hardware, backward: bool) -> Rule:
    if hardware is INTERPRETER:
        return Rule(max(16, next_power_of_2(hidden)), 4, 1, 1)
    size = DTYPES[dtype]
    for rule in LOCAL_RULES[size]:
        if hidden <= rule.units:
            return rule
    rule = SHARED_RULES[size]
    aligned = hidden * size % 16 == 0
    if dtype == "fp32":
        # No tensor core: each thread holds whole operands. Seen by audit: 128 in the forward and for large H, but
        # 256 in the backward at H = 128, 130, 200, 511, 640 and 768.
        return replace(rule, largest_chunk=256 if backward and hidden <= 768 else 128)
    if dtype == "tf32" and backward and aligned and hidden > 768:
        return replace(rule, largest_chunk=128)  # seen by audit: GRU, H = 1024
    if not aligned and (size == 2 or not backward):
        # Rows of W_hh not aligned to 16 bytes are loaded in narrow pieces: large chunks spill on their way in.
        return replace(rule, largest_chunk=rule.largest_chunk // 2)
    return rule


def _pass(
    cell: Shape, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware, backward: bool
) -> Pass:
    size = DTYPES[dtype]
    rule = _rule(hidden, dtype, hardware, backward)
    # The interpreter's time goes by the number of operations, not by their size.
    batch_tile = 64 if hardware is INTERPRETER and batch >= 32 else 16
    t = tiling(
        cell,
        hidden,
        directions,
        backward=backward,
        units=rule.units,
        batch_tile=batch_tile,
        splits=rule.splits,
        largest_chunk=rule.largest_chunk,
        precision="tf32" if dtype == "tf32" else "ieee",
        interpreted=hardware is INTERPRETER,
    )
    resident, shared = shared_bound(t, size)
    if shared <= hardware.shared and t.slices <= hardware.multiprocessors:
        jobs = -(-batch // batch_tile) * directions
        groups = min(jobs, hardware.multiprocessors // t.slices)
        return Pass(t, rule.warps, groups, -(-jobs // groups), resident, shared)
    raise PlanError(
        f"hidden_size={hidden} in {dtype} does not fit on {hardware.name} yet: W_hh of one direction has "
        f"{cell.gates * hidden * hidden * size:,} bytes, and {hardware.multiprocessors} multiprocessors hold "
        f"{hardware.shared:,} bytes of shared memory each, operands included. "
        f"Use a smaller hidden_size{', float16 or bfloat16' if size == 4 else ''}, or backend='torch'."
    )


@lru_cache(maxsize=1024)
def plan(cell: Shape, hidden: int, batch: int, directions: int, dtype: str, hardware: Hardware) -> Plan:
    """The plan for one layer.

    Args:
        cell: the cell's numbers.
        hidden: H >= 1.
        batch: B >= 1.
        directions: 1 or 2.
        dtype: "fp16", "bf16", "tf32" (float32 tensors, tf32 products) or "fp32" (full float32).
        hardware: the device.

    Raises:
        PlanError: what W_hh needs does not fit the device.
        ValueError: an argument is out of range.
    """
    for name, value in (("hidden_size", hidden), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    forward, backward = (
        _pass(cell, hidden, batch, directions, dtype, hardware, backward) for backward in (False, True)
    )
    return Plan(cell.name, hidden, batch, directions, dtype, hardware, forward, backward)
