"""The plan of a stack as a pipeline: which layers of which size fit the chip together, and what a step of all costs.

Every layer has its own slices on its own multiprocessors, with two matrices of the same size in the same homes: W_hh,
and W_ih of the layer itself (forward) or of the one above (backward). Nothing is streamed, and only the backward is
split in two dimensions. Pure Python, no GPU, no torch, no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..cells import Cell
from . import cost as model
from . import occupancy
from . import plan as planning
from .choices import WORDS, elements, pipeline_choices
from .cost import Cost
from .hardware import Hardware
from .plan import Pass, Shares
from .problem import Problem
from .tiling import Choice, make_tiling

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
        """Whether the pipeline is predicted to win for so many time steps, forward alone or with the backward."""
        return self.microseconds(steps, backward) < steps * sum(self.layered if backward else self.layered[:1])

    def microseconds(self, steps: int, backward: bool) -> float:
        """Predicted for so many time steps of the whole stack."""
        later = self.layers - 1
        forward = (steps + later) * self.forward.predicted
        return forward + (steps + 2 * later) * self.backward.predicted if backward else forward


def obstacle(cell: Cell) -> str | None:
    """Why no stack of a cell runs in one launch; None if one may."""
    if cell.staged:
        return f"a stack of {cell.name} cannot run in one launch: its step has several stages"
    if cell.stored_gradients == cell.gates:
        return None
    return (
        f"a stack of {cell.name} cannot run in one launch, whose two matrices have the same rows: beside {cell.gates} "
        f"gates it has {cell.inputs} tiles of input, and {cell.stored_gradients} gradients of them"
    )


def finish(problem: Problem, layers: int, backward: bool, choice: Choice) -> Pass | None:
    """The pass that a choice makes, or None if it does not fit after all."""
    hardware, size = problem.hardware, problem.size
    t = replace(make_tiling(problem, choice, backward=backward), layers=layers)
    registers, shared, total = occupancy.shared_bound(t, size, size)
    # The second matrix: once more what the first has, in both homes.
    total = max(total + shared, total + registers)
    more = registers // WORDS + occupancy.pipeline_registers(backward, t.depth * t.segments, size, elements(choice))
    estimate = occupancy.register_estimate(problem.cell, t, choice, size) + more
    if total > hardware.shared or t.streamed or estimate > occupancy.register_limit(choice) + ROUNDING:
        return None
    jobs = t.jobs(problem.batch)
    groups = min(jobs, hardware.multiprocessors // (t.slices * layers))
    work = replace(model.work_of(t, groups), programs=t.slices * layers * groups)
    cost = model.step(problem, choice, work, backward)
    # Without an exchange of partial sums: there is one for both products.
    neighbour = model.step(problem, replace(choice, k_parts=1), work, backward)
    taken, barriers = model.sum_of_parts(problem, choice, work.m, backward)
    if backward or not problem.cell.recurrent_gradient:  # one sum over the parts of K for both
        neighbour, barriers = replace(neighbour, state=neighbour.state - choice.subtiles * taken), 0
    cost = _with_neighbour(cost, neighbour, barriers, choice, hardware)
    weights = (2 * layers - 1) * problem.weight_bytes
    share = sum(c.size for c in t.k_blocks[: t.in_registers]) / max(1, sum(c.size for c in t.k_blocks))
    shares = Shares(round(weights * share), weights - round(weights * share), 0)
    return Pass(t, choice, groups, -(-jobs // groups), 2 * registers, 2 * shared, 0, total, estimate, shares, cost)


def _with_neighbour(cost: Cost, neighbour: Cost, barriers: int, choice: Choice, hardware: Hardware) -> Cost:
    """The cost of a layer alone, and that of the neighbour's product with so many barriers of its own. It is formed
    while the group's own exchange is on its way: with one batch tile per program that hides what of it is no longer
    than the exchange before its last trip; with several, the other tiles hide the exchange already."""
    waits = choice.subtiles * (model.trip(hardware) + barriers * hardware.barrier)
    beside = neighbour.compute + neighbour.weights + neighbour.state + waits
    saved = min(beside, hardware.exchange - model.trip(hardware)) if choice.subtiles == 1 else 0.0
    return replace(
        cost, compute=cost.compute + neighbour.compute, weights=cost.weights + neighbour.weights,
        state=cost.state + neighbour.state, synchronisation=cost.synchronisation + waits - saved,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def plan_pipeline(problem: Problem, layers: int) -> Pipeline | None:
    """The plan of a stack of so many layers, of one direction; None if they do not fit the device together, or if the
    cell runs layer by layer (``obstacle``).

    Raises:
        ValueError: fewer than 2 layers, or two directions.
    """
    if layers < 2 or problem.recurrences != 1:
        raise ValueError(
            f"a pipeline has at least 2 layers, one direction and one head, got {layers}, {problem.directions} and "
            f"{problem.heads}"
        )
    if obstacle(problem.cell) or problem.weight_dtype or layers > MOST_LAYERS:
        return None
    alone, planned_for = planning.plan_layer(problem), planning.of_class(problem)
    passes = []
    for backward in (False, True):
        candidates = pipeline_choices(planned_for, layers, backward)
        found = [p for p in (finish(planned_for, layers, backward, choice) for choice in candidates) if p is not None]
        if not found:
            return None
        best = min(found, key=lambda part: part.predicted)
        passes.append(finish(problem, layers, backward, best.choice))
    forward, backward_pass = passes
    if forward is None or backward_pass is None:
        return None
    layered = layers * alone.forward.predicted, layers * alone.backward.predicted
    return Pipeline(layers, forward, backward_pass, layered)
