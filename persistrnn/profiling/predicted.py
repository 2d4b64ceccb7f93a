"""The plan beside a profile: what is predicted for its layers, and the least time of each phase on a live device."""

from __future__ import annotations

from typing import Any

from .. import decide
from .record import Profile
from .subject import Call
from .trace import INPUT_GEMM, SCAN_BACKWARD, SCAN_FORWARD, WEIGHT_GEMMS


def _of(call: Call, device: str | None) -> Any:
    """As ``decide.predict_stack``. Raises ValueError where there is no plan for it."""
    sizes = call.hidden, call.layers, call.batch, call.directions, call.steps
    return decide.predict_stack(call.cell, *sizes, call.dtype, device, call.heads)


def add(profile: Profile, device: str | None) -> None:
    """Add the prediction for a device that the plan knows, or for the one at hand (None), and floors where that is the
    one that was measured; where there is none, why."""
    points = profile.of(profile.arms[0])
    if not points:
        profile.no_outlook = "nothing was measured"
        return
    try:
        found = profile.outlook = _of(max(points[-1].calls, key=lambda call: call.flops), device)
        if not found.live or profile.machine.kind != "cuda":
            return
        for point in points:
            every = [(call.steps, _of(call, device).passes) for call in point.calls]
            for name, phase in point.phases.items():
                if name in (SCAN_FORWARD, SCAN_BACKWARD):
                    own = "forward" if name == SCAN_FORWARD else "backward"
                    phase.floor = sum(steps * passes[own].floor for steps, passes in every) / 1e6
                elif name in (INPUT_GEMM, WEIGHT_GEMMS):  # arithmetic or memory, whichever takes longer
                    phase.floor = max(phase.flops / (found.rate * 1e12), phase.bytes / (found.memory_rate * 1e9))
    except ValueError as error:
        profile.no_outlook = str(error)
