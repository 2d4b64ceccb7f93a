"""What a scan kernel must know at compile time besides its cell: who owns which part of W_hh, and where it
lives. Pure Python. ``plan`` chooses the numbers, ``tiling`` turns a choice into the record, ``scan`` obeys it.

A pass multiplies a share of W_hh (forward) or of its transpose (backward) by a moving operand, h or the gate
gradients. M are the outputs, gates x units or units; K is what is summed over, H units or G*H gates.

* One-dimensional split (R = 1): a program owns the M of its U units and all of K.
* Two-dimensional split (R > 1): R slices share the M of their R*U units, and each takes one of R parts of K. The R
  partial products are added in a fixed order after a second exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .hardware import INTERPRETER
from .problem import Problem


@dataclass(frozen=True)
class KBlock:
    """``length`` indices of K from ``start`` on in ``segment``, held in a tile of ``size`` (a power of two)."""

    segment: int
    start: int
    size: int
    length: int


@dataclass(frozen=True)
class Choice:
    """What the planner is free to choose.

    Attributes:
        units: U per slice, a power of two, at least 8.
        k_parts: R, the parts of K that different slices take; 1 for the one-dimensional split.
        batch_tile: BB, rows of the batch in one product.
        subtiles: batch tiles that a program works on in turn within each step: one's exchange hides another's work.
        warps: warps per program.
        blocks: programs that share a multiprocessor, its registers and its shared memory.
        splits: parts that K is cut into within a program: one or several per warp, or one for several warps, which
            share M and N.
        largest_k_block: the largest tile of K.
        burst: K of the operand that is on its way at once; it costs shared memory, a burst each costs its latency.
        in_registers, in_shared: elements of K whose weights a program keeps there; what is left is streamed.
        streamed_k_block: K of one streamed tile.
        ring: streamed tiles, with those of the operand, that shared memory has room for at once, copied there while
            others are multiplied; 0: one ahead, in registers.
    """

    units: int
    k_parts: int
    batch_tile: int
    subtiles: int
    warps: int
    blocks: int
    splits: int
    largest_k_block: int
    burst: int
    in_registers: int
    in_shared: int
    streamed_k_block: int
    ring: int = 0


@dataclass(frozen=True)
class Tiling:
    """The compile-time record. M of the product is ``sum(packs) * k_parts * units``.

    Attributes:
        stride: elements from one row of W_hh to the next; rows are padded to 16 bytes where some are streamed, or
            where they are no whole number of 4 bytes.
        slices: S = k_parts * unit_groups, with S * units >= hidden.
        units_per_part: units in one of the R parts of K (0 if R = 1).
        segments, depth: K is cut into ``segments`` runs of ``depth`` indices: one run, or one per gate.
        k_blocks: the resident tiles of K, of which the first ``in_registers`` stay in registers.
        bursts: index of each first k block of those whose operand is loaded at once.
        stream_start, streamed_k_block, streamed: each segment's K from ``stream_start`` on is streamed in tiles of
            ``streamed_k_block``, ``streamed`` tiles in all segments together.
        packs, first_gates: gates per dot, and the index of each pack's first gate.
        precision: of a float32 dot, "tf32" or "ieee".
        layers: L of a stack that runs as a pipeline, each with a second matrix as large as W_hh and in the same homes.
        more_inputs, params, extras, after, more_gradients: of the cell, the first and the last in tiles.
        heads: in each direction; ``directions`` counts all of them.
        widened: the dtype, "fp16" or "bf16", in which weights of 8 bits are multiplied; "": they are not of 8 bits.
        guarded: whether units past H are masked before the product of one slice.
        means: of the cell, over all units within a step.
        row_tiles: tiles of each row where the moving operand is in memory; 0: as many as the first product takes.
        chains: parts of K per warp: products that do not wait for each other.
        ring: as in ``Choice``.
        fenced: whether the product reads what asynchronous copies wrote by another proxy (``fence_copies``).
        later: of the second product of a step that has one, whose outputs are the last gate; in the same slices.
    """

    # Not in a plan's JSON where the cell has nothing of the kind.
    OF_SOME_CELLS: ClassVar = (
        "more_inputs", "params", "extras", "after", "more_gradients", "guarded", "heads", "means", "row_tiles", "later",
        "widened", "chains", "ring", "fenced",
    )  # fmt: skip

    hidden: int
    stride: int
    backward: bool
    directions: int
    gates: int
    saved: int
    recurrent_gradient: bool
    units: int
    slices: int
    k_parts: int
    units_per_part: int
    batch_tile: int
    subtiles: int
    splits: int
    segments: int
    depth: int
    k_blocks: tuple[KBlock, ...]
    in_registers: int
    bursts: tuple[int, ...]
    stream_start: int
    streamed_k_block: int
    streamed: int
    packs: tuple[int, ...]
    first_gates: tuple[int, ...]
    precision: str
    interpreted: bool
    layers: int = 1
    more_inputs: int = 0
    params: int = 0
    extras: int = 0
    after: tuple[int, ...] = ()
    more_gradients: int = 0
    guarded: bool = False
    heads: int = 1
    widened: str = ""
    means: int = 0
    row_tiles: int = 0
    later: Tiling | None = None
    chains: int = 1
    ring: int = 0
    fenced: bool = False

    def __post_init__(self) -> None:
        if self.layers > 1 and self.slices == 1:
            raise ValueError(
                f"a pipeline of {self.layers} layers has one slice of {self.units} units for H={self.hidden}, and one "
                "slice announces nothing that the next layer could wait for; at least 2 slices are allowed: take "
                "fewer units, or run layer after layer"
            )
        if self.layers > 1 and self.k_parts > 1 and not self.backward:
            raise ValueError(
                f"the forward of a pipeline of {self.layers} layers has {self.k_parts} parts of K, and no kernel; 1 is "
                "allowed"
            )

    @property
    def inputs(self) -> int:
        """Tiles of the input half of the gates."""
        return self.gates + self.more_inputs

    @property
    def unit_groups(self) -> int:
        return self.slices // self.k_parts

    @property
    def m_stride(self) -> int:
        """Elements of W_hh from one output to the next: the backward multiplies by its transpose."""
        return 1 if self.backward else self.stride

    @property
    def k_stride(self) -> int:
        return self.stride if self.backward else 1

    @property
    def row_stride(self) -> int:
        """Elements of the moving operand from one row of the batch to the next."""
        return self.directions * self.hidden * (self.row_tiles or (self.gates if self.backward else 1))

    @property
    def units_formed(self) -> int:
        """Units whose outputs a program forms, or a part of."""
        return self.k_parts * self.units

    @property
    def ragged(self) -> bool:
        """Whether the last part of K ends before the others do."""
        return self.k_parts * self.units_per_part > self.hidden if self.k_parts > 1 else False

    @property
    def counters_per_tile(self) -> int:
        """Counters of one batch tile: one, or one per part of K and one per unit group; and one for stages."""
        return self.k_parts + self.unit_groups if self.k_parts > 1 else 1 + (self.means + self.products > 0)

    @property
    def joined(self) -> bool:
        """Whether two packs of gates are summed over the parts of K at once, as four gates."""
        return self.splits > 1 and gates_summed(self.packs, self.k_parts) > max(self.packs)

    @property
    def products(self) -> int:
        """After the first."""
        return 0 if self.later is None else 1

    @property
    def each(self) -> tuple[Tiling, ...]:
        """Of all products of a step."""
        return (self,) if self.later is None else (self, self.later)

    @property
    def outputs(self) -> int:
        """Gates of the product: those of the cell in the forward, one in the backward."""
        return sum(self.packs)

    @property
    def sums(self) -> int:
        """Tiles of partial sums that a program hands on at once: a pipeline with marks has those of both products."""
        return self.outputs * (2 if self.layers > 1 else 1)

    @property
    def m(self) -> int:
        return self.outputs * self.units_formed

    def jobs(self, batch: int) -> int:
        """Pieces of the work that different groups take: so many batch tiles in one direction each."""
        return -(-batch // (self.subtiles * self.batch_tile)) * self.directions


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cut_k(segment: int, first: int, last: int, smallest: int, largest: int) -> tuple[KBlock, ...]:
    """Cut ``range(first, last)`` into power-of-two tiles between the two sizes: 320 = 256 + 64, 768 = 512 + 256."""
    result = []
    start = first
    while start < last:
        left = last - start
        size = min(largest, max(smallest, 1 << (left.bit_length() - 1)))
        # Padding the rest to one tile costs less than one more tile where at most a quarter of it is waste.
        padded = max(smallest, next_power_of_2(left))
        if padded <= largest and padded - left <= padded // 4:
            size = padded
        result.append(KBlock(segment, start, size, min(size, left)))
        start += size
    return tuple(result)


def cut_bursts(parts: tuple[KBlock, ...], kept: int, largest: int) -> tuple[int, ...]:
    """Where a new burst begins: when the one before is full, or when another home does."""
    result: list[int] = []
    filled = 0
    for i, part in enumerate(parts):
        if not result or i == kept or filled + part.size > largest:
            result.append(i)
            filled = 0
        filled += part.size
    return tuple(result)


def gate_packs(gates: int, dtype: str) -> tuple[int, ...]:
    """Gates of each dot: a power of two, at most 4. 4 gates are one dot, 3 gates are two.

    In full float32 the smaller is first, and they are summed one after the other (``gates_summed``): at once they
    spilled (GRU forward, 768, B=16, sm_90: 10).
    """
    rest = {0: (), 1: (1,), 2: (2,), 3: (2, 1)}[gates % 4]
    packs = (4,) * (gates // 4) + rest
    return packs[::-1] if dtype == "fp32" else packs


def gates_summed(packs: tuple[int, ...], k_parts: int) -> int:
    """Gates whose parts of K are summed at once."""
    return 4 if packs == (2, 1) and k_parts == 1 else max(packs)


def reduction(packs: tuple[int, ...], parts: int, k_parts: int, units: int, batch_tile: int) -> int:
    """Bytes of shared memory in which they are: so many parts, one per warp."""
    return parts * gates_summed(packs, k_parts) * k_parts * units * batch_tile * 4


def smallest_k_block(splits: int) -> int:
    """A part of K is at least one instruction deep."""
    return 16 * splits


def warp_groups(problem: Problem, units: int) -> bool:
    """Whether the products of one slice are of warp groups, which Triton takes from 64 rows on and which read
    the weights from shared memory."""
    return units >= 64 and problem.hardware.arch in ("sm_90", "sm_100") and problem.dtype != "fp32"


def make_tiling(problem: Problem, choice: Choice, *, backward: bool) -> Tiling:
    """The compile-time record for one choice; one slice if the units cover H."""
    cell = problem.cell
    if not cell.products:
        return _tiling(problem, choice, backward, cell.gates)
    later = choice
    if backward:  # the homes are filled in the order of K, in which the second product's is behind
        first = cell.gates_of_h * (choice.units if choice.units >= problem.hidden else problem.hidden)
        smallest = smallest_k_block(choice.splits)
        registers = max(0, choice.in_registers - first) // smallest * smallest
        shared = max(0, choice.in_registers + choice.in_shared - first - registers)
        later = replace(choice, in_registers=registers, in_shared=shared)
    tiles = cell.gates if backward else cell.saved
    second = replace(_tiling(problem, later, backward, 1), row_tiles=tiles)
    return replace(_tiling(problem, choice, backward, cell.gates_of_h), later=second)


def _tiling(problem: Problem, choice: Choice, backward: bool, gates: int) -> Tiling:
    """gates: of the product."""
    cell, hidden = problem.cell, problem.hidden
    units, k_parts = choice.units, choice.k_parts
    slices = -(-hidden // units)
    if slices == 1:
        # The operand comes from registers as one tile of units per gate, and each gate keeps its own dot so that
        # all gates have the same layout as the cell's state.
        segments, depth, units_per_part = (gates, hidden, 0) if backward else (1, hidden, 0)
        packs = (1,) if backward else (1,) * gates
        parts = tuple(KBlock(s, 0, units, hidden) for s in range(segments))
        kept = min(choice.in_registers // units, segments)
        start, streamed = hidden, 0
    else:
        slices = -(-slices // k_parts) * k_parts
        units_per_part = slices // k_parts * units if k_parts > 1 else 0
        if k_parts == 1:
            segments, depth = 1, gates * hidden if backward else hidden
        else:
            segments, depth = gates if backward else 1, min(units_per_part, hidden)
        packs = (1,) if backward else gate_packs(gates, problem.dtype)
        smallest = smallest_k_block(choice.splits)
        largest = max(choice.largest_k_block, smallest)
        first = min(choice.in_registers // segments, depth)
        start = min(first + choice.in_shared // segments, depth)
        registers = tuple(c for s in range(segments) for c in cut_k(s, 0, first, smallest, largest))
        shared = tuple(c for s in range(segments) for c in cut_k(s, first, start, smallest, largest))
        parts, kept = registers + shared, len(registers)
        streamed = segments * -(-(depth - start) // choice.streamed_k_block)
    aligned = 16 // problem.stored
    return Tiling(
        hidden=hidden,
        backward=backward,
        stride=-(-hidden // aligned) * aligned if slices > 1 and (streamed or hidden % (aligned // 4)) else hidden,
        directions=problem.recurrences,
        heads=problem.heads,
        widened=problem.dtype if problem.weight_dtype else "",
        gates=cell.gates,
        saved=cell.saved,
        recurrent_gradient=cell.recurrent_gradient,
        units=units,
        slices=slices,
        k_parts=k_parts if slices > 1 else 1,
        units_per_part=units_per_part,
        batch_tile=choice.batch_tile,
        subtiles=choice.subtiles,
        splits=choice.splits if slices > 1 else 1,
        segments=segments,
        depth=depth,
        k_blocks=parts,
        in_registers=kept,
        bursts=cut_bursts(parts, kept, choice.burst),
        stream_start=start,
        streamed_k_block=choice.streamed_k_block,
        streamed=streamed,
        packs=packs,
        first_gates=tuple(sum(packs[:i]) for i in range(len(packs))),
        precision=problem.precision,
        interpreted=problem.hardware is INTERPRETER,
        more_inputs=cell.more_inputs,
        params=cell.step_params,
        extras=len(cell.extras),
        after=cell.after,
        more_gradients=cell.more_gradients,
        chains=max(1, choice.splits // choice.warps) if slices > 1 else 1,
        guarded=slices == 1 and units > hidden and not cell.finite_at_zero,
        means=cell.means,
        ring=choice.ring,
        fenced=choice.ring > 0 and problem.hardware.arch == "sm_90",
    )
