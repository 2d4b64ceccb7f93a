"""Choices that no planner makes at sizes that the interpreter and the emulator can run: every split and home."""

import dataclasses

import pytest
import torch

from persistrnn import calls, decide
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import POLLERS, SPIN_LIMIT, Exchange, fitting
from persistrnn.kernels.planner import pipeline, plan
from persistrnn.kernels.planner.hardware import DEVICES, INTERPRETER, Hardware
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice, Tiling, make_tiling, smallest_k_block

ALL = 1 << 20

# Name -> tiles of K, of the smallest size, in (registers, shared memory); what is left is streamed.
HOMES = {
    "registers": (ALL, 0),
    "shared": (0, ALL),
    "registers and shared": (1, ALL),
    "all three": (1, 1),
    "registers and stream": (1, 0),
    "shared and stream": (0, 1),
    "stream": (0, 0),
}


def choice(gates: int, backward: bool, homes: str = "registers", **changed: int) -> Choice:
    """A choice of small tiles. ``changed``: other attributes of ``Choice``."""
    numbers = {
        "units": 8, "k_parts": 1, "batch_tile": 16, "subtiles": 1, "warps": 4, "blocks": 1, "splits": 1,
        "largest_k_block": 32, "burst": 64,
    } | changed  # fmt: skip
    tile = smallest_k_block(numbers["splits"])
    # Each gate is a segment of K of its own in the backward of the two-dimensional split.
    registers, shared = (n * tile * (gates if backward and numbers["k_parts"] > 1 else 1) for n in HOMES[homes])
    return Choice(**({"in_registers": registers, "in_shared": shared, "streamed_k_block": tile} | numbers))


def tilings(
    cell: str,
    hidden: int,
    directions: int = 1,
    dtype: str = "fp32",
    heads: int = 1,
    weight_dtype: str = "",
    hardware: Hardware = INTERPRETER if launch.INTERPRETED else DEVICES["h200"],
    **chosen: str | int,
) -> tuple[tuple[Choice, Tiling], tuple[Choice, Tiling]]:
    """The choice and the tiling of the forward and of the backward."""
    problem = Problem(CELLS[cell], hidden, 1, directions, dtype, hardware, heads, weight_dtype)
    found = []
    for backward in (False, True):
        made = choice(problem.cell.gates, backward, **chosen)
        found.append((made, make_tiling(problem, made, backward=backward)))
    return found[0], found[1]


def multiplied(dtype: torch.dtype, precision: str) -> str:
    """The dtype of ``tilings``: the interpreter always multiplies in full float32."""
    return launch.label(dtype, "ieee" if launch.INTERPRETED else precision)


def poll() -> str:
    return "atomic" if launch.INTERPRETED else "ptx"


def force(
    monkeypatch: pytest.MonkeyPatch,
    protocol: str = "counter",
    spin_limit: int = SPIN_LIMIT,
    groups: int | None = None,
    pollers: str = POLLERS,
    **chosen: str | int,
) -> None:
    """Every layer runs as ``chosen`` (see ``choice``), ``groups`` jobs at a time (None: all)."""

    exchange = Exchange(protocol=protocol, poll=poll(), spin_limit=spin_limit, pollers=pollers)

    def choose(cell, hidden, batch, directions, dtype, precision, device, heads=1, weight_dtype=""):
        assert fitting(exchange, hidden * dtype.itemsize) == exchange, "flags need an even H in 16 bits"
        passes = []
        of = multiplied(dtype, precision), heads, weight_dtype
        for made, t in tilings(cell.name, hidden, directions, *of, launch.hardware(device), **chosen):
            jobs = t.jobs(batch)
            together = min(groups or jobs, jobs)
            passes.append(plan.Pass(t, made, together, -(-jobs // together), 0, 0, 0, 0, 0, None, None))
        return plan.Plan(cell.name, hidden, batch, directions, "fp32", INTERPRETER, *passes, 0.0, heads)

    monkeypatch.setattr(launch, "choose", choose)
    monkeypatch.setattr(launch, "exchange_for", lambda device: exchange)


def force_pipelines(
    monkeypatch: pytest.MonkeyPatch, protocol: str = "counter", groups: int | None = None, **chosen: str | int
) -> None:
    """Stacks run as layer pipelines of this choice (see ``choice``), ``groups`` jobs at a time (None: all)."""

    exchange = Exchange(protocol=protocol, poll=poll())

    def choose(cell, hidden, layers, batch, dtype, precision, device):
        assert fitting(exchange, hidden * dtype.itemsize) == exchange, "flags need an even H in 16 bits"
        parts = []
        forward, backward = (
            tilings(cell.name, hidden, 1, multiplied(dtype, precision), **chosen | only)[way]
            for way, only in enumerate(({"k_parts": 1}, {}))  # the forward of a pipeline has one part of K
        )
        for made, alone in (forward, backward):
            t = dataclasses.replace(alone, layers=layers)
            jobs = t.jobs(batch)
            together = min(groups or jobs, jobs)
            parts.append(plan.Pass(t, made, together, -(-jobs // together), 0, 0, 0, 0, 0, None, None))
        return pipeline.Pipeline(layers, parts[0], parts[1], (0.0, 0.0))

    def may(call):
        return call.num_layers > 1 and call.dropout == 0

    monkeypatch.setattr(launch, "choose_stack", choose)
    monkeypatch.setattr(decide, "runs_as_pipeline", may)
    monkeypatch.setattr(decide, "matmul_precision", calls.precision)
    monkeypatch.setattr(launch, "exchange_for", lambda device: exchange)
