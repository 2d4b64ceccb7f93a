"""Why the kernels cannot run a layer, and why they had better not, each in a sentence with the remedy."""

from __future__ import annotations

import torch

from .. import launch
from ..cells import Cell
from ..planner.plan import PlanError


def unsupported(
    cell: Cell, hidden: int, directions: int, dtype: torch.dtype, device: torch.device, precision: str
) -> str | None:
    """What keeps the kernels from a layer, whatever the batch; None: they run it."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels run float16, bfloat16 and float32, got {dtype}; use one of them, or backend='torch'."
    if device.type == "cpu":
        if not launch.INTERPRETED:
            return (
                "the kernels need a GPU, got a tensor on cpu; move layer and input to 'cuda', use backend='torch', or "
                "set TRITON_INTERPRET=1 before the first import of triton to run the kernels in Triton's interpreter "
                "(slow, for tests)."
            )
    elif device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if device.type == "cuda" else repr(device.type)
        return f"the kernels run on NVIDIA GPUs, got {kind}; use a 'cuda' device of NVIDIA, or backend='torch'."
    elif torch.cuda.get_device_capability(device) < (8, 0):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f"the kernels need compute capability 8.0 or newer, got {name} with {capability}; use backend='torch'."
    try:
        launch.choose(cell, hidden, 1, directions, dtype, precision, device)
    except PlanError as error:
        return str(error)
    return None


def slower(
    cell: Cell, hidden: int, batch: int, directions: int, dtype: torch.dtype, device: torch.device, precision: str,
    backward: bool, layers: int, steps: int,
) -> str | None:  # fmt: skip
    """Why torch's own path is expected to be faster; None if it is not. layers, steps: of a stack that may wave."""
    if device.type != "cuda":
        return None  # the interpreter is for tests, not for speed
    found = launch.compare(cell, hidden, batch, directions, dtype, precision, device, backward)
    if found.persistent <= found.torch:
        return None
    if layers > 1:
        together = launch.choose_stack(cell, hidden, layers, batch, dtype, precision, device)
        if together is not None and together.microseconds(steps, backward) <= layers * steps * found.torch:
            return None
    how = "measured on this device" if found.measured else "predicted, not measured"
    return (
        f"torch's own path is expected to be faster here: {found.torch:.2f} us per time step against "
        f"{found.persistent:.2f} ({how}); use backend='persistent' to run the kernels all the same."
    )


def expected(
    cell: Cell, hidden: int, batch: int, directions: int, dtype: torch.dtype, device: torch.device, precision: str
) -> str:
    """Both paths' expected times, forward and forward with backward."""
    lines = []
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        found = launch.compare(cell, hidden, batch, directions, dtype, precision, device, backward)
        how = "corrected by measurements" if found.measured else "predicted"
        lines.append(
            f"{what}: {found.persistent:.2f} us per time step on the kernels, {found.torch:.2f} on torch's own path "
            f"({how})"
        )
    return "\n".join(lines)
