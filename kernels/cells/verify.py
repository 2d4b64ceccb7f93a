"""Whether what was derived is the step: against autograd of it, exactly and over a long sequence of rounded tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .derive import Derived
from .graph import CellError

Tiles = tuple[Tensor, ...]
UNITS, BATCH, STEPS = 16, 4, 48
MOST_ERROR = 0.1


def verify(cell: Derived) -> None:
    """Check a cell.

    Raises:
        CellError: results or gradients differ from those of the step, or are not finite on zeros.
    """
    for seed in range(3):
        _check_one_step(cell, seed)
    _check_zeros(cell)
    exact, rounded = (
        gradients_of_a_sequence(cell, torch.finfo(dtype).eps) for dtype in (torch.float64, torch.bfloat16)
    )
    for what, true in exact.items():
        error = ((rounded[what] - true).norm() / true.norm()).item()
        if true.norm() > 0 and not error <= MOST_ERROR:
            raise CellError(
                f"{cell.cell.name}: over {STEPS} steps that keep bfloat16 {what} has a relative error of {error:.1e}; "
                f"allowed: {MOST_ERROR}. Please report this step"
            )


def _drawn(cell: Derived, generator: torch.Generator, differentiable: bool = True) -> list[Tiles]:
    """x, r, state, p, e. Extras are 0 or 1."""
    found = []
    names = cell.names
    for group in (names.inputs, names.gates, names.states, names.params, names.extras):
        drawn = (torch.rand(BATCH, UNITS, generator=generator, dtype=torch.float64) * 2 - 0.5 for _ in group)
        found.append(tuple((t > 0.5).double() if group is names.extras else t for t in drawn))
    for t in chain(*found[:4]) if differentiable else ():
        t.requires_grad_()
    return found


def _check_one_step(cell: Derived, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, r, state, p, e = _drawn(cell, generator)
    new = cell.step(x, r, state, p, e)
    d = tuple(torch.rand(BATCH, UNITS, generator=generator, dtype=torch.float64) for _ in new)
    pairs = [(t, g) for t, g in zip(new, d, strict=True) if t.requires_grad]
    leaves = [*x, *r, *state, *p]
    expected: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        expected = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    with torch.no_grad():
        found, saved = cell.run_forward(x, r, state, p, e)
        after = tuple(found[i] for i in cell.cell.after)
        dx, dr, d_previous = cell.run_backward(d, saved, after, state, p, e)
        dp = cell.param_gradients(dx, dr, saved, after, state, p, e)
    for ours, true in zip([*found, *dx[: cell.cell.inputs], *dr, *d_previous, *dp], [*new, *expected], strict=True):
        true = torch.zeros_like(ours) if true is None else true
        if not torch.allclose(ours, true, rtol=1e-7, atol=1e-9):  # torch's hardsigmoid has a float32 constant
            raise CellError(
                f"{cell.cell.name}: what was derived differs from the step by up to "
                f"{(ours - true).abs().max().item():.1e} in float64; please report this step"
            )


def _check_zeros(cell: Derived) -> None:
    x, r, state, p, e = (tuple(torch.zeros_like(t) for t in tiles) for tiles in _drawn(cell, torch.Generator()))
    try:
        new = cell.step(x, r, state, p, e)
    except Exception as error:
        raise CellError(f"{cell.cell.name}: the step fails on zeros: {error}") from error
    bad = [name for name, t in zip(cell.names.states, new, strict=True) if not t.isfinite().all()]
    if bad:
        raise CellError(
            f"{cell.cell.name}: on arguments that are all zeros {', '.join(bad)} is not finite, and layers begin from "
            "states of zeros; divide by something that is not 0 there"
        )


def gradients_of_a_sequence(cell: Derived, eps: float, seed: int = 0) -> dict[str, Tensor]:
    """As the kernels form them, in float64, from tiles that the forward has rounded to ``eps``. One forward for all: a
    step that is not continuous may go another way for a rounding of its input, which is no fault of the backward."""
    generator = torch.Generator().manual_seed(seed)
    raw = [_drawn(cell, generator, False) for _ in range(STEPS)]
    _, _, initial, p, _ = raw[0]
    initial = tuple(s.abs() + 0.5 for s in initial)  # one of them may be a normaliser
    weight = torch.randn(len(cell.names.gates), UNITS, UNITS, generator=generator, dtype=torch.float64) / UNITS**0.5
    dys = torch.randn(STEPS, BATCH, UNITS, generator=generator, dtype=torch.float64)

    def rounded(tiles: Sequence[Tensor]) -> Tiles:
        parts = (torch.frexp(t) for t in tiles)
        return tuple(torch.ldexp((mantissa / eps).round() * eps, exponent) for mantissa, exponent in parts)

    states, saved = [initial], []
    for x, _, _, _, e in raw:
        new, tiles = cell.run_forward(x, tuple(states[-1][0] @ w.mT for w in weight), states[-1], p, e)
        states.append(new)
        saved.append(rounded(tiles))
    states = [rounded(s) for s in states]
    d = tuple(torch.zeros_like(s) for s in initial)
    dxs: list[Tensor] = []
    dw, dps = torch.zeros_like(weight), [torch.zeros_like(q) for q in p]
    for t in reversed(range(STEPS)):
        after, e = tuple(states[t + 1][i] for i in cell.cell.after), raw[t][4]
        dx, dr, d = cell.run_backward((d[0] + dys[t], *d[1:]), saved[t], after, states[t], p, e)
        d = (d[0] + sum(g @ w for g, w in zip(dr, weight, strict=True)), *d[1:])
        dw += torch.stack([g.mT @ states[t][0] for g in dr])
        for total, part in zip(dps, cell.param_gradients(dx, dr, saved[t], after, states[t], p, e), strict=True):
            total += part
        dxs += dx[: cell.cell.inputs]
    found = {
        f"the gradient of {name}": g
        for name, g in zip((*cell.names.states, *cell.names.params), (*d, *dps), strict=True)
    }
    return found | {"the gradient of W_hh": dw, "the gradient of x": torch.stack(dxs)}
