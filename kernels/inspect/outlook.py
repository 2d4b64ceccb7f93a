"""What the plan predicts for a stack of layers in training, as numbers for ``persistrnn profile``: nothing is run.

Microseconds are per time step and of the whole stack.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch

from .. import launch
from ..cells import CELLS, Cell
from ..planner import cost
from ..planner import hardware as devices
from ..planner.hardware import Hardware
from ..planner.pipeline import plan_pipeline
from ..planner.plan import PlanError, plan_layer
from ..planner.problem import Problem

FALLBACK = "h200"
FACTORS = (1, 2, 4, 8, 16)  # other batches, as multiples


@dataclass(frozen=True)
class Predicted:
    """One pass: its time, the parts that add up to it (``cost.Cost``), what no plan can beat, and torch's own path."""

    total: float
    parts: dict[str, float]
    floor: float
    torch: float


@dataclass(frozen=True)
class Outlook:
    """The plan for a stack on a device.

    live: whether that is the device at hand. passes: "forward" and "backward". together: whether the stack runs as a
    wave, all layers at once. resident: part of W_hh that stays on chip, the least of both passes. batches: the parts of
    both passes at FACTORS times the batch; dtypes: both passes in dtype and in bf16. rate: dense TFLOP/s in dtype;
    memory_rate: GB/s. text: the plan in words.
    """

    device: str
    live: bool
    dtype: str
    batch: int
    passes: dict[str, Predicted]
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


def device_of(name: str | None) -> Hardware:
    """A device by its name; without one the GPU at hand, or where there is none FALLBACK."""
    if name is None and torch.cuda.is_available():
        return launch.hardware(torch.device("cuda", torch.cuda.current_device()))
    return devices.named(FALLBACK if name is None else name)


def outlook(
    cell: str, hidden: int, layers: int, batch: int, directions: int, steps: int, dtype: str, device: str | None
) -> Outlook:
    """What the plan says.

    Args:
        cell: "lstm" or "gru"
        hidden, layers, batch, directions, steps: H, L, B, D, T
        dtype: of ``plan.DTYPES``
        device: as in ``device_of``

    Raises:
        PlanError: the layer does not fit the device.
        ValueError: an unknown device, an argument out of range.
    """
    hardware = device_of(device)
    sizes = CELLS[cell], hidden, layers, batch, directions, steps
    passes, together, resident, text = _planned(*sizes, dtype, hardware)
    batches = {}
    for factor in FACTORS:
        rows = batch * factor
        other, *_ = _planned(*sizes[:3], rows, *sizes[4:], dtype, hardware)
        names = other["forward"].parts
        batches[rows] = {name: sum(one.parts[name] for one in other.values()) for name in names}
    dtypes = {}
    for name in dict.fromkeys(("bf16", dtype)):
        with contextlib.suppress(PlanError):
            other, *_ = _planned(*sizes, name, hardware)
            dtypes[name] = sum(one.total for one in other.values())
    return Outlook(
        device=hardware.name,
        live=device is None and torch.cuda.is_available(),
        dtype=dtype,
        batch=batch,
        passes=passes,
        together=together,
        resident=resident,
        batches=batches,
        dtypes=dtypes,
        rate=hardware.rate(dtype),
        memory_rate=hardware.memory_rate,
        text=text,
    )


def _planned(
    shape: Cell, hidden: int, layers: int, batch: int, directions: int, steps: int, dtype: str, hardware: Hardware
) -> tuple[dict[str, Predicted], bool, float, str]:
    """(passes, together, resident, text) as in ``Outlook``."""
    problem = Problem(shape, hidden, batch, directions, dtype, hardware)
    found = plan_layer(problem)
    parts, text = {"forward": found.forward, "backward": found.backward}, str(found)
    times, later = layers, 0
    stacked = plan_pipeline(problem, layers) if layers > 1 and directions == 1 else None
    if stacked is not None and stacked.faster(steps, True):
        parts, text = {"forward": stacked.forward, "backward": stacked.backward}, f"{text}\n{stacked}"
        times, later = 1, layers - 1
    passes = {}
    for name, part in parts.items():
        backward = name == "backward"
        # A pipeline is some steps longer than T (``Pipeline.microseconds``).
        count = times * part.rounds * (1 + later * (2 if backward else 1) / steps)
        own = {f.name: getattr(part.cost, f.name) * count for f in dataclasses.fields(part.cost)}
        theirs = layers * cost.torch_step(problem, backward)
        passes[name] = Predicted(sum(own.values()), own, times * found.floor, theirs)
    return passes, later > 0, min(part.shares.resident for part in parts.values()), text
