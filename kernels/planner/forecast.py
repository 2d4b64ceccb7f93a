"""Which path is faster for a layer on a device: the model's prediction, corrected by what was measured there.

A measured step corrects the predictions for shapes like it: those of the same cell, dtype, pass and path, with H and B
within a factor of two of the measured ones take the ratio of measured to predicted of the nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..cells import Cell
from .cost import torch_step
from .hardware import Hardware
from .measurements import Step, measurements
from .plan import plan_layer
from .problem import Problem


@dataclass(frozen=True)
class Forecast:
    """Microseconds per time step of one layer on both paths; ``measured`` if a measurement corrected either."""

    persistent: float
    torch: float
    measured: bool

    @property
    def path(self) -> str:
        """The one that ``backend="auto"`` takes."""
        return "the kernels" if self.persistent <= self.torch else "torch's own path"


@dataclass(frozen=True)
class Error:
    """One measured step beside what the model alone predicts for it."""

    step: Step
    predicted: float

    @property
    def ratio(self) -> float:
        return self.step.microseconds / self.predicted


def predict(problem: Problem, backward: bool, path: str) -> float:
    """Microseconds per step of one pass on one path, by the model alone."""
    if path == "torch":
        return torch_step(problem, backward)
    found = plan_layer(problem)
    return (found.backward if backward else found.forward).predicted


@lru_cache(maxsize=256)
def errors(cell: Cell, hardware: Hardware) -> tuple[Error, ...]:
    """The model against every measured step of a cell on a device; empty where nothing was measured."""
    found = measurements(hardware.name)
    return tuple(
        Error(s, predict(Problem(cell, s.hidden, s.batch, s.directions, s.dtype, hardware), s.backward, s.path))
        for s in (found.steps if found else ())
        if s.cell == cell.name
    )


def _distance(step: Step, problem: Problem) -> float:
    return max(abs(math.log2(step.hidden / problem.hidden)), abs(math.log2(step.batch / problem.batch)))


@lru_cache(maxsize=4096)
def forecast(problem: Problem, backward: bool) -> Forecast:
    """Both paths, the forward alone or with the backward.

    Raises:
        PlanError: as ``plan_layer``.
    """
    times = {"persistent": 0.0, "torch": 0.0}
    measured = False
    for path in times:
        for of_backward in (False, True) if backward else (False,):
            predicted = predict(problem, of_backward, path)
            alike = [
                e
                for e in errors(problem.cell, problem.hardware)
                if not (problem.weight_dtype and path == "persistent")  # nothing measured is of 8 bits
                and (e.step.dtype, e.step.backward, e.step.path, e.step.directions)
                == (problem.dtype, of_backward, path, problem.directions)
                and _distance(e.step, problem) <= 1
            ]
            if alike:
                predicted *= min(alike, key=lambda e: _distance(e.step, problem)).ratio
                measured = True
            times[path] += predicted
    return Forecast(times["persistent"], times["torch"], measured)
