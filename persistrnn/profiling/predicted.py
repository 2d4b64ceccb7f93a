"""The plan beside a profile: what is predicted for its layers, and the least time of each phase on a live device."""

from __future__ import annotations

from typing import Any

from .. import decide
from .record import Profile
from .subject import Call
from .trace import INPUT_GEMM, SCAN_BACKWARD, SCAN_FORWARD, WEIGHT_GEMMS, Phase


def check_device(name: str | None) -> None:
    """Raises ValueError for a name that the plan does not know."""
    if name is not None:
        decide.check_device(name)


def outlook(call: Call, device: str | None) -> Any:
    """``decide.predict_stack`` for one call; device: a name that the plan knows, None: the one at hand.

    Raises:
        ValueError: no plan for it; the message says why.
    """
    sizes = call.hidden, call.layers, call.batch, call.directions, call.steps
    return decide.predict_stack(call.cell, *sizes, call.dtype, device)


def add(profile: Profile, device: str | None) -> None:
    """Add what is predicted for a device: the outlook and, where it is the one that was measured, floors."""
    points = profile.of(profile.arms[0])
    if not points:
        profile.no_outlook = "nothing was measured"
        return
    largest = max(points[-1].calls, key=lambda call: call.flops)
    try:
        profile.outlook = outlook(largest, device)
        if not profile.outlook.live or profile.machine.kind != "cuda":
            return
        for point in points:
            every = [(call, outlook(call, device)) for call in point.calls]
            for name, of in ((SCAN_FORWARD, "forward"), (SCAN_BACKWARD, "backward")):
                if name in point.phases:
                    floors = (call.steps * found.passes[of].floor for call, found in every)
                    point.phases[name].floor = sum(floors) / 1e6
            for name in (INPUT_GEMM, WEIGHT_GEMMS):
                if name in point.phases:
                    point.phases[name].floor = roofline(point.phases[name], profile.outlook)
    except ValueError as error:
        profile.no_outlook = str(error)


def roofline(phase: Phase, found: Any) -> float:
    """Seconds that its arithmetic or its bytes take at the device's rates, whichever is more."""
    return max(phase.flops / (found.rate * 1e12), phase.bytes / (found.memory_rate * 1e9))
