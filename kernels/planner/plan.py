"""The plan: who owns what, decided before anything runs. Pure Python, no GPU, no torch, no Triton.

``plan_layer`` searches, for the forward and for the backward scan, the slices, the split, the batch
tiles, the warps and the homes of W_hh (``choices``) that the cost model (``cost``) predicts to be fastest, among those
that fit the registers and the shared memory. What fits (``occupancy``) is known by audit: the constants are such that
none of the kernels in ``bench/results`` spills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ..cells import Cell
from . import cost as model
from .choices import choices, room
from .cost import Cost
from .hardware import INTERPRETER, Hardware
from .occupancy import register_estimate, register_limit, shared_bound, widening_registers
from .problem import BYTES, Problem
from .tiling import Choice, Tiling, make_tiling, smallest_k_block

DTYPES = BYTES

# A batch is planned for as the next of these, so that a new batch size seldom is a new kernel: at most one per class.
# One row alone is an eighth of the operand of 8, and another plan (LSTM 1024 backward: one part of K instead of 8).
BATCH_CLASSES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

# (cell, dtype, H, batch class, D, architecture, whether backward) of a pass whose fastest choices spill as no constant
# of ``occupancy`` accounts for (2 to 67 instructions on Triton 3.9.0; 2 to 162 on 3.6.0) -> how many of them:
# the next one, which does not on either, is taken.
PASSED_OVER = {
    ("lstm", "fp32", 768, 128, 1, "sm_100", False): 1,
    ("lstm", "fp32", 1024, 64, 1, "sm_90", True): 1,
    ("lstm", "fp32", 2048, 32, 1, "sm_90", False): 1,
    ("lstm", "bf16", 512, 128, 1, "sm_80", False): 1,
    ("lstm", "bf16", 1024, 128, 2, "sm_80", True): 2,
    ("lstm", "bf16", 1150, 128, 1, "sm_90", True): 1,
    ("gru", "fp32", 1024, 64, 1, "sm_90", True): 1,
    **{("rnn_relu", "bf16", 2560, batch, 1, "sm_90", True): 1 for batch in (32, 64, 128)},
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
    heads: int = 1
    weight_dtype: str = ""

    @property
    def passes(self) -> tuple[str, ...]:
        """Those that the layer has: weights of 8 bits have no backward, and ``backward`` is the forward again."""
        return ("forward",) if self.weight_dtype else ("forward", "backward")

    @property
    def dtype_in_words(self) -> str:
        return self.dtype + (f" with W_hh in {self.weight_dtype}" if self.weight_dtype else "")

    @property
    def size_in_words(self) -> str:
        return f"H={self.hidden * self.heads}" + (f" in {self.heads} heads" if self.heads > 1 else "")

    def __str__(self) -> str:
        lines = [
            f"{self.cell} {self.size_in_words} B={self.batch} D={self.directions} {self.dtype_in_words} on "
            f"{self.hardware.name} ({self.hardware.arch}, {self.hardware.multiprocessors} multiprocessors)"
        ]
        for name in self.passes:
            part: Pass = getattr(self, name)
            t, shares = part.tiling, part.shares
            where = "no exchange" if t.slices == 1 else "exchange each step"
            split = f" in {t.unit_groups} unit groups x {t.k_parts} parts of K" if t.k_parts > 1 else ""
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


def _shares(t: Tiling, size: int) -> Shares:
    """Count the elements of W_hh in each home, over all slices of one direction."""
    if t.later is not None:
        one, other = _shares(replace(t, later=None), size), _shares(t.later, size)
        return Shares(*(getattr(one, f) + getattr(other, f) for f in Shares.__dataclass_fields__))
    across = t.outputs * t.hidden  # what each index of K holds

    def valid(start: int, length: int) -> int:
        if t.k_parts == 1:
            return length
        return sum(max(0, min(length, t.hidden - r * t.units_per_part - start)) for r in range(t.k_parts))

    counted = [valid(c.start, c.length) * across * size for c in t.k_blocks]
    streamed = t.segments * valid(t.stream_start, t.depth - t.stream_start) * across * size if t.streamed else 0
    return Shares(sum(counted[: t.in_registers]), sum(counted[t.in_registers :]), streamed)


def finish(problem: Problem, backward: bool, choice: Choice, strict: bool = True) -> Pass | None:
    """The pass that a choice makes, or None if it does not fit after all. Strict: nor by the registers' estimate."""
    hardware, size = problem.hardware, problem.size
    t = make_tiling(problem, choice, backward=backward)
    registers, shared, total = shared_bound(t, size, problem.stored)
    estimate = register_estimate(problem.cell, t, choice, size)
    estimate += widening_registers(problem, choice)
    too_large = total > room(problem, choice.blocks) or (strict and estimate > register_limit(choice))
    places = hardware.multiprocessors * choice.blocks // t.slices
    if places == 0 or (too_large and hardware is not INTERPRETER):
        return None
    jobs = t.jobs(problem.batch)
    # Slices wait for each other and must be resident together; a single slice waits for nobody.
    groups = min(jobs, LARGEST_GRID) if t.slices == 1 else min(jobs, places)
    cost = model.step(problem, choice, model.work_of(t, min(groups, places)), backward)
    if t.slices == 1 and groups > places:
        factor = -(-groups // places)
        cost = Cost(*(getattr(cost, f) * factor for f in cost.__dataclass_fields__))
    streamed = sum(p.m * p.streamed * p.streamed_k_block * problem.stored for p in t.each)
    shares = _shares(t, problem.stored)
    return Pass(t, choice, groups, -(-jobs // groups), registers, shared, streamed, total, estimate, shares, cost)


def _quick(problem: Problem, backward: bool, choice: Choice) -> float:
    """A lower bound of the predicted time per step of a choice, without its tiling and so without all its padding."""
    needed = -(-problem.hidden // choice.units)
    slices = -(-needed // choice.k_parts) * choice.k_parts
    jobs = -(-problem.batch // (choice.batch_tile * choice.subtiles)) * problem.recurrences
    places = max(1, problem.hardware.multiprocessors * choice.blocks // slices)
    segments, outputs = (problem.cell.gates, 1) if backward else (1, problem.cell.gates)
    if slices == 1:
        k = choice.units * segments
    else:
        depth = segments * problem.hidden
        if choice.k_parts > 1:
            depth = min(problem.hidden, slices // choice.k_parts * choice.units)
        smallest = smallest_k_block(choice.splits)
        k = -(-depth // smallest) * smallest * (segments if choice.k_parts > 1 else 1)
    streamed = max(0, k - choice.in_registers - choice.in_shared)
    m = outputs * choice.k_parts * choice.units
    work = model.Work(m, k, choice.in_shared, streamed, slices, slices * min(jobs, places))
    return model.step(problem, choice, work, backward).total * -(-jobs // places)


def of_class(problem: Problem) -> Problem:
    """The same for the batch size that is planned for."""
    return replace(problem, batch=next((c for c in BATCH_CLASSES if problem.batch <= c), BATCH_CLASSES[-1]))


@lru_cache(maxsize=4096)
def best(problem: Problem, backward: bool) -> Choice | None:
    """The fastest choice for a class of batch sizes; where the registers' estimate, which is on the safe side, lets
    nothing pass, the choice that exceeds its limit least."""
    bounded = ((_quick(problem, backward, c), i, c) for i, c in enumerate(choices(problem, backward)))
    dtype = problem.weight_dtype or problem.dtype
    kernel = (
        problem.cell.name,
        dtype,
        problem.hidden,
        problem.batch,
        problem.directions,
        problem.hardware.arch,
        backward,
    )
    passed_over = PASSED_OVER.get(kernel, 0)
    found: list[Pass] = []  # the fastest first, as many as are asked for
    for bound, _, choice in sorted(bounded):
        if len(found) > passed_over and bound >= found[-1].predicted:
            break
        if (finished := finish(problem, backward, choice)) is not None and finished not in found:
            found = sorted([*found, finished], key=lambda p: p.predicted)[: 1 + passed_over]
    if found:
        return found[-1].choice
    tight = (finish(problem, backward, choice, strict=False) for choice in choices(problem, backward, strict=False))
    fitting = (part for part in tight if part is not None)
    least = min(fitting, key=lambda p: (p.registers - register_limit(p.choice), p.predicted), default=None)
    return least.choice if least else None


def _pass(problem: Problem, backward: bool) -> Pass:
    choice = best(of_class(problem), backward)
    found = choice and finish(problem, backward, choice, strict=False)
    if not found:
        hardware = problem.hardware
        raise PlanError(
            f"hidden_size={problem.hidden} in {problem.weight_dtype or problem.dtype} does not fit on {hardware.name}: "
            f"W_hh of one direction has {problem.weight_bytes:,} bytes; with {hardware.multiprocessors} "
            f"multiprocessors of {hardware.shared:,} bytes of shared memory each no slice holds its operands. "
            f"Use a smaller hidden_size{', float16 or bfloat16' if problem.size == 4 else ''}, or backend='torch'."
        )
    return found


def without_kernels(cell: Cell) -> str | None:
    """Why the kernels cannot run a cell; None if they can."""
    if cell.products > 1 or (cell.products and cell.means):
        return (
            "the kernels run steps with one second product or with means over all units, and each step of "
            f"{cell.name} has {cell.products} further products and {cell.means} means; use backend='torch', which runs "
            "it step by step."
        )
    return None


@lru_cache(maxsize=4096)
def plan_layer(problem: Problem) -> Plan:
    """The plan for one layer.

    Raises:
        PlanError: no slice of the layer fits the device, or there are no kernels for the cell.
    """
    if (reason := without_kernels(problem.cell)) is not None:
        raise PlanError(reason)
    gates, hidden = problem.cell.gates, problem.hidden
    if gates * hidden * (hidden + 8) >= LARGEST:
        raise PlanError(
            f"hidden_size={hidden}: offsets into W_hh have 31 bits, and {gates} gates allow hidden_size up to "
            f"{math.isqrt((LARGEST - 1) // gates + 16) - 4}; use a smaller one, or backend='torch'."
        )
    forward = _pass(problem, False)
    backward = forward if problem.weight_dtype else _pass(problem, True)
    return Plan(
        problem.cell.name, hidden, problem.batch, problem.directions, problem.dtype, problem.hardware, forward,
        backward, model.floor(problem), problem.heads, problem.weight_dtype,
    )  # fmt: skip
