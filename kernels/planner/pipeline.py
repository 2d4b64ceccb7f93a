"""The plan of a stack as a wave: which layers of which size fit the chip together, and what a step of all costs.

Every layer has its own slices on its own multiprocessors, with two matrices of the same size in the same homes: W_hh,
and W_ih of the layer itself (forward) or of the one above (backward). Nothing is streamed and nothing split in two
dimensions. Pure Python, no GPU, no torch, no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..cells import Cell
from . import cost as model
from . import occupancy
from . import plan as planning
from .cost import BYTES, Cost
from .hardware import Hardware
from .plan import Pass, Shares
from .tiling import Choice, Tiling, make_tiling, next_power_of_2, smallest_chunk

# Registers per thread that a layer of a wave needs more than a layer alone: the product of what comes from its
# neighbour, and the addresses of that. Fitted to audits as the constants of ``plan``, by bytes per element.
FORWARD_REGISTERS = {2: 24, 4: 24}
BACKWARD_REGISTERS = {2: 36, 4: 92}
DEPTH = 256  # bytes of K per further register in the backward
ELEMENT_REGISTERS = 6  # more for each further element of the state that a thread owns, in the backward
# Bytes of K in the backward, above which it spills, and both products take longer than the exchange that hides one.
DEEPEST = 4352
DEEPEST_OF_SEVERAL = 2560  # where a thread owns several elements of the state (3072 spills 20, 3360 spills 33)
MOST_LAYERS = 32
ROUNDING = 2  # registers by which tiles of whole powers of two may pass the estimate


@dataclass(frozen=True)
class Pipeline:
    """How a stack of ``layers`` layers runs in one launch; ``layered`` is what the same takes one after the other,
    forward and backward, in microseconds per step. The forward needs L - 1 steps more than T, the backward 2L - 2."""

    layers: int
    forward: Pass
    backward: Pass
    layered: tuple[float, float]

    def __str__(self) -> str:
        lines = [f"all {self.layers} layers in one launch, each one step behind its neighbour"]
        for name, part, layered in zip(
            ("forward", "backward"), (self.forward, self.backward), self.layered, strict=True
        ):
            t = part.tiling
            lines.append(
                f"  {name:8} {self.layers} x {t.slices} slices x {t.units} units, batch tile {t.batch_tile} x "
                f"{t.subtiles}; per program {part.in_registers:,} bytes of W_hh and W_ih in registers, "
                f"{part.in_shared:,} in shared memory; predicted {part.predicted:.2f} us per step, layer after layer "
                f"{layered:.2f}"
            )
        return "\n".join(lines)

    def faster(self, steps: int, backward: bool) -> bool:
        """Whether the wave is predicted to win for so many time steps, forward alone or with the backward."""
        return self.microseconds(steps, backward) < steps * sum(self.layered if backward else self.layered[:1])

    def microseconds(self, steps: int, backward: bool) -> float:
        """Predicted for so many time steps of the whole stack."""
        later = self.layers - 1
        forward = (steps + later) * self.forward.predicted
        return forward + (steps + 2 * later) * self.backward.predicted if backward else forward


def more_registers(backward: bool, depth: int, size: int, elements: int) -> int:
    """elements: of the state that a thread owns."""
    if not backward:
        return FORWARD_REGISTERS[size]
    return BACKWARD_REGISTERS[size] + depth * size // DEPTH + ELEMENT_REGISTERS * (elements - 1)


def _choices(cell: Cell, hidden: int, layers: int, batch: int, dtype: str, hardware: Hardware,
             backward: bool) -> Iterator[Choice]:  # fmt: skip
    size = BYTES[dtype]
    tiles = [(8, 1)] if batch <= 8 else []
    tiles += [(16, 1)] + [(16, n) for n in (2, 4) if 16 * n <= next_power_of_2(batch)]
    tiles += [(32, 1)] if batch > 16 and dtype != "fp32" else []
    for units in (8, 16, 32, 64):
        slices = -(-hidden // units)
        if slices < 2 or slices * layers > hardware.multiprocessors:
            continue
        m = (1 if backward else cell.gates) * units
        for columns, subtiles in tiles:
            for splits in (8, 4, 2) if m >= 128 else (8,):
                found = _filled(cell, hidden, hardware, size, dtype, backward, units, m, columns, subtiles, splits)
                if found is not None:
                    yield found


def _filled(cell: Cell, hidden: int, hardware: Hardware, size: int, dtype: str, backward: bool, units: int, m: int,
            columns: int, subtiles: int, splits: int) -> Choice | None:  # fmt: skip
    """One choice with its homes filled, or None if both matrices do not fit."""
    warps = 8
    words = 4 * 32 * warps
    smallest = smallest_chunk(splits)
    depth = (cell.gates if backward else 1) * hidden
    packs = 1 if backward or cell.gates & (cell.gates - 1) == 0 else 2
    chunk = planning.largest_tile(m, columns, splits, warps, packs, size, dtype)
    if chunk < smallest:
        return None
    # Twice as many bursts as in a layer alone: with two products the operand on its way is what spills.
    burst = max(chunk, (16 if backward else 32) * words // (size * columns))
    choice = Choice(units, 1, columns, subtiles, warps, 1, splits, chunk, burst, 0, 0, smallest)
    k = -(-depth // smallest) * smallest
    masked = occupancy.masked(hidden, depth, False, splits, size)
    elements = max(1, units * columns * subtiles // (32 * warps))
    if backward and elements > 1 and depth * size > DEEPEST_OF_SEVERAL:
        return None
    need = occupancy.registers_needed(m, packs, choice, size, 0, False, True, masked)
    need += more_registers(backward, depth, size, elements)
    spare = occupancy.register_limit(choice) - need
    if spare < 0:
        return None
    kept = 0 if dtype == "fp32" or splits < warps else spare * words // (2 * m * size) // smallest * smallest
    reduction = splits * (1 if backward else 2 if packs == 2 else cell.gates) * units * columns * 4
    working = max(burst * columns * size, reduction) + occupancy.SIGNALS
    room = (hardware.shared - working) // (2 * m * size) // smallest * smallest
    # Weights pass through shared memory on their way to registers.
    most = (hardware.shared - units * columns * 4) // (2 * m * size) // smallest * smallest
    kept = min(kept, most, k)
    if room < 0 or kept + room < k:
        return None
    return replace(choice, in_registers=kept, in_shared=k - kept)


def _finish(cell: Cell, hidden: int, layers: int, batch: int, dtype: str, hardware: Hardware, backward: bool,
            choice: Choice) -> Pass | None:  # fmt: skip
    size = BYTES[dtype]
    one = make_tiling(
        cell, hidden, 1, choice, backward=backward, size=size, precision="tf32" if dtype == "tf32" else "ieee"
    )
    t = replace(one, layers=layers)
    registers, shared, total = occupancy.shared_bound(t, size)
    # The second matrix: once more what the first has, in both homes.
    total = max(total + shared, total + registers)
    if total > hardware.shared or t.streamed:
        return None
    elements = max(1, choice.units * choice.batch_tile * choice.subtiles // (32 * choice.warps))
    second = registers // (32 * choice.warps * 4) + more_registers(backward, t.depth, size, elements)
    estimate = occupancy.register_estimate(t, choice, size) + second
    if estimate > occupancy.register_limit(choice) + ROUNDING:
        return None
    jobs = t.jobs(batch)
    groups = min(jobs, hardware.multiprocessors // (t.slices * layers))
    work = replace(model.work_of(t, groups), programs=t.slices * layers * groups)
    cost = model.step(cell, hidden, dtype, hardware, choice, work, backward)
    cost = _with_neighbour(cost, t, choice, hardware)
    weights = (2 * layers - 1) * cell.gates * hidden * hidden * size
    share = sum(c.size for c in t.chunks[: t.in_registers]) / max(1, sum(c.size for c in t.chunks))
    shares = Shares(round(weights * share), weights - round(weights * share), 0)
    rounds = -(-jobs // groups)
    return Pass(t, choice, groups, rounds, 2 * registers, 2 * shared, 0, total, estimate, shares, cost)


def _with_neighbour(cost: Cost, t: Tiling, choice: Choice, hardware: Hardware) -> Cost:
    """The cost of a layer alone, and that of the neighbour's product. The latter is formed while the group's own
    exchange is on its way: with one batch tile per program that hides what of it is no longer than the exchange; with
    several, the other tiles hide the exchange already."""
    bursts = len(t.bursts)
    trips = choice.subtiles * (bursts - 1) * model.LATENCY_SHARE * hardware.exchange
    barriers = choice.subtiles * (2 + 2 * bursts) * hardware.barrier
    beside = cost.compute + cost.weights + cost.state + trips + barriers
    saved = min(beside, hardware.exchange) if choice.subtiles == 1 else 0.0
    return replace(
        cost, compute=2 * cost.compute, weights=2 * cost.weights, state=2 * cost.state,
        synchronisation=cost.synchronisation + trips + barriers - saved,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def plan_pipeline(cell: Cell, hidden: int, layers: int, batch: int, dtype: str, hardware: Hardware) -> Pipeline | None:
    """The plan of a stack; None if its layers do not fit the device together.

    Args:
        cell, hidden, batch, dtype, hardware: as in ``plan_layer``.
        layers: L >= 2.

    Raises:
        ValueError: an argument is out of range.
    """
    if layers < 2:
        raise ValueError(f"a wave has at least 2 layers, got {layers}")
    if layers > MOST_LAYERS or cell.gates * hidden * BYTES[dtype] > DEEPEST:
        return None
    alone = planning.plan_layer(cell, hidden, batch, 1, dtype, hardware)
    planned_for = next((c for c in planning.BATCH_CLASSES if batch <= c), planning.BATCH_CLASSES[-1])
    passes = []
    for backward in (False, True):
        shape = cell, hidden, layers, planned_for, dtype, hardware, backward
        found = [part for part in (_finish(*shape, choice) for choice in _choices(*shape)) if part is not None]
        if not found:
            return None
        best = min(found, key=lambda part: part.predicted)
        passes.append(_finish(cell, hidden, layers, batch, dtype, hardware, backward, best.choice))
    forward, backward_pass = passes
    if forward is None or backward_pass is None:
        return None
    layered = layers * alone.forward.predicted, layers * alone.backward.predicted
    return Pipeline(layers, forward, backward_pass, layered)
