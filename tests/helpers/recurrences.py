"""Any cell's recurrence on drawn numbers: on the kernels, in float64 and in torch, within the bound of ``accuracy``."""

from collections.abc import Callable
from typing import Any

import torch
from accuracy import Bound, exact_gemms
from torch import Tensor

from persistrnn import autograd, reference, step_marks
from persistrnn.kernels.cells import Cell

T, B, H = 3, 3, 12
Arguments = dict[str, Any]  # of a recurrence, by name


def given(
    cell: Cell,
    directions: int = 1,
    dtype: torch.dtype = torch.float32,
    hidden: int = H,
    batch: int = B,
    steps: int = T,
    marked: bool = False,
    seed: int = 0,
) -> Arguments:
    """Arguments of numbers that the dtype has, leaves but for marks and extras."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, size: float = 0.4, around: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size + around).to(dtype).requires_grad_()

    D, H = directions, hidden

    def states() -> list[Tensor]:  # the normaliser of an sLSTM is positive, and no smaller than what it normalises
        return [leaf(D, batch, H, size=0.3, around=2.0 * (i == 2)) for i in range(cell.states)]

    found: Arguments = {
        "x_gates": leaf(steps, batch, D, cell.inputs * H, size=1.0),
        "weight_hh": leaf(D, cell.gates * H, H, size=H**-0.5),
        "bias_hh": leaf(D, cell.gates * H),
        "initial": states(),
    }
    if cell.params:
        found["params"] = leaf(D, sum(cell.param_tiles), H, size=0.3, around=1.0)
    if cell.extras:
        masks = torch.rand(1, steps, batch, D, len(cell.extras), H, generator=generator) < 0.3
        found["extras"] = masks.to(torch.uint8)
    if marked:
        active = torch.rand(steps, batch, generator=generator) < 0.8
        begins = torch.rand(steps, batch, generator=generator) < 0.3
        found["marks"] = step_marks.marks(active, begins, D)
        found["reset"] = states()
    return found


def leaves_of(arguments: Arguments) -> dict[str, Tensor]:
    flat = {
        f"{name} {i}" if isinstance(value, list) else name: t
        for name, value in arguments.items()
        for i, t in enumerate(value if isinstance(value, list) else [value])
    }
    return {name: t for name, t in flat.items() if t.requires_grad}


def in_dtype(arguments: Arguments, dtype: torch.dtype, leaves: bool = True) -> Arguments:
    def of(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_(leaves) if t.is_floating_point() else t

    return {name: list(map(of, v)) if isinstance(v, list) else of(v) for name, v in arguments.items()}


def results(
    recurrence: Callable[..., Any],
    cell: Cell,
    arguments: Arguments,
    orders: int = 1,
    weighed: torch.dtype = torch.float32,
    **how: Any,
) -> dict[str, Tensor]:
    """Outputs by name, and gradients of the first and, asked for, of the second order, in float64. The outputs'
    gradients are numbers that ``weighed`` has."""
    y, c, finals = recurrence(cell.name, **arguments, **how)
    outputs = {"y": y, **{f"final {i}": s for i, s in enumerate(finals)}}
    if c is not None:
        outputs["c"] = c
    generator, leaves = torch.Generator().manual_seed(7), leaves_of(arguments)

    def weights(tensors: Any) -> list[Tensor]:
        return [torch.randn(t.shape, generator=generator).to(weighed).to(t.dtype) for t in tensors]

    unread = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(
        list(outputs.values()), [*leaves.values()], weights(outputs.values()), create_graph=orders > 1, **unread
    )
    found = outputs | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}
    if orders > 1:
        loss = sum((g * w).sum() for g, w in zip(grads, weights(grads), strict=True))
        second = torch.autograd.grad(loss, [*leaves.values()], **unread)
        found |= {f"dd {name}": g for name, g in zip(leaves, second, strict=True)}
    return {name: t.detach().double() for name, t in found.items()}


def compare(bound: Bound, cell: Cell, arguments: Arguments) -> None:
    """Add a case to a bound, in whose dtype the arguments are; the witness is the step in torch."""
    with exact_gemms("cpu"):
        ours = results(autograd.recurrent, cell, arguments, weighed=bound.dtype, precision="ieee", return_c=True)
    truth, witness = (
        results(reference.recurrent, cell, in_dtype(arguments, of), weighed=bound.dtype)
        for of in (torch.float64, bound.dtype)
    )
    bound.add(cell.name, ours, truth, witness)


def broken(cell: Cell, dtype: torch.dtype, arguments: Arguments) -> list[str]:
    """What of one case breaks the bound of single cases."""
    bound = Bound(dtype)
    compare(bound, cell, arguments)
    return bound.failures
