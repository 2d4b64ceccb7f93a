"""What the plan predicts for a stack of layers in training, as numbers for ``persistrnn profile``: nothing is run.

Microseconds are per time step and of the whole stack.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch

from ..cells import CELLS
from ..planner import cost
from ..planner import hardware as devices
from ..planner.hardware import Hardware
from ..planner.pipeline import plan_pipeline
from ..planner.plan import PlanError, plan_layer
from ..planner.problem import Problem

FALLBACK = "h200"
FACTORS = (1, 2, 4, 8, 16)  # other batches, as multiples


@dataclass(frozen=True)
class PassPrediction:
    """One pass: its time, the parts that add up to it (``cost.Cost``), what no plan can beat, and torch's own path."""

    total: float
    parts: dict[str, float]
    floor: float
    torch: float


@dataclass(frozen=True)
class Prediction:
    """The plan for a stack on a device.

    live: whether that is the device at hand. passes: "forward" and "backward". together: whether the stack runs as a
    pipeline, all layers at once. resident: part of W_hh that stays on chip, the least of both passes. batches: the
    parts of both passes at FACTORS times the batch; dtypes: both passes in dtype and in bf16. rate: dense TFLOP/s in
    dtype; memory_rate: GB/s. text: the plan in words.
    """

    device: str
    live: bool
    dtype: str
    batch: int
    passes: dict[str, PassPrediction]
    together: bool
    resident: float
    batches: dict[int, dict[str, float]]
    dtypes: dict[str, float]
    rate: float
    memory_rate: float
    text: str

    @property
    def total(self) -> float:
        return sum(one.total for one in self.passes.values())


def device_of(name: str | None) -> tuple[Hardware, str]:
    """A device by its name; without one the GPU at hand, or where there is none FALLBACK. And in words where it is
    from."""
    if name is not None:
        return devices.named(name), "named by --device"
    if torch.cuda.is_available():
        from .. import launch  # only here: it imports Triton

        return launch.hardware(torch.device("cuda", torch.cuda.current_device())), "the GPU at hand"
    return devices.named(FALLBACK), f"no GPU here: planned for {FALLBACK}; --device names another"


def predict_stack(
    cell: str, hidden: int, layers: int, batch: int, directions: int, steps: int, dtype: str, device: str | None,
    heads: int = 1,
) -> Prediction:  # fmt: skip
    """What the plan says.

    Args:
        cell: of ``CELLS``
        hidden, layers, batch, directions, steps: H, L, B, D, T
        dtype: of ``plan.DTYPES``
        device: as in ``device_of``
        heads: blocks of a block-diagonal W_hh, a divisor of H

    Raises:
        PlanError: the layer does not fit the device.
        ValueError: an unknown device, an argument out of range.
    """
    hardware, _ = device_of(device)

    def planned(batch: int, dtype: str) -> tuple[dict[str, PassPrediction], bool, float, str]:
        """(passes, together, resident, text) as in ``Prediction``."""
        problem = Problem(CELLS[cell], hidden // heads, batch, directions, dtype, hardware, heads)
        found = plan_layer(problem)
        parts, text = {"forward": found.forward, "backward": found.backward}, str(found)
        times, later = layers, 0
        stacked = plan_pipeline(problem, layers) if layers > 1 and problem.recurrences == 1 else None
        if stacked is not None and stacked.faster(steps, True):
            parts, text = {"forward": stacked.forward, "backward": stacked.backward}, f"{text}\n{stacked}"
            times, later = 1, layers - 1
        passes = {}
        for name, part in parts.items():
            backward = name == "backward"
            # A pipeline is some steps longer than T (``Pipeline.microseconds``).
            count = times * part.rounds * (1 + later * (2 if backward else 1) / steps)
            own = {key: us * count for key, us in dataclasses.asdict(part.cost).items()}
            theirs = layers * cost.torch_step(problem, backward)
            passes[name] = PassPrediction(sum(own.values()), own, times * found.floor, theirs)
        return passes, later > 0, min(part.shares.resident for part in parts.values()), text

    passes, together, resident, text = planned(batch, dtype)
    batches = {}
    for rows in (batch * factor for factor in FACTORS):
        parts = [one.parts for one in planned(rows, dtype)[0].values()]
        batches[rows] = {name: sum(part[name] for part in parts) for name in parts[0]}
    dtypes = {}
    for name in dict.fromkeys(("bf16", dtype)):
        with contextlib.suppress(PlanError):
            dtypes[name] = sum(one.total for one in planned(batch, name)[0].values())
    live = device is None and torch.cuda.is_available()
    rates = hardware.rate(dtype), hardware.memory_rate
    return Prediction(hardware.name, live, dtype, batch, passes, together, resident, batches, dtypes, *rates, text)
