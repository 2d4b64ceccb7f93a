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


def verify(cell: Derived) -> None:
    """Check a cell.

    Raises:
        CellError: results or gradients differ from those of the step, or are not finite on zeros.
    """
    for seed in range(3):
        _check_one_step(cell, seed)
    _check_zeros(cell)
    ours, exact, witness = (along_a_sequence(cell, how) for how in ("derived", "exact", "step"))
    for what, true in exact.items():
        error, allowed = (((found[what] - true).norm() / true.norm()).item() for found in (ours, witness))
        if true.norm() > 0 and not error <= 4 * allowed + 16 * 2.0**-9:
            raise CellError(
                f"{cell.cell.name}: over {STEPS} steps in bfloat16 {what} has a relative error of {error:.1e}, where "
                f"autograd of the step has {allowed:.1e}; please report this step"
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
        if not torch.allclose(ours, true, rtol=1e-9, atol=1e-12):
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


def along_a_sequence(cell: Derived, how: str, steps: int = STEPS, seed: int = 0) -> dict[str, Tensor]:
    """The last states and all gradients of a sequence, from numbers that bfloat16 has: "exact" by autograd of the step
    in float64, "step" the same in bfloat16, "derived" as the kernels do it, in float32 with what is kept rounded to
    bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    raw = [_drawn(cell, generator, False) for _ in range(steps)]
    weight = torch.randn(len(cell.names.gates), UNITS, UNITS, generator=generator, dtype=torch.float64) / UNITS**0.5
    dys = torch.randn(steps, BATCH, UNITS, generator=generator, dtype=torch.float64)
    dtype = {"exact": torch.float64, "step": torch.bfloat16, "derived": torch.float32}[how]

    def of(t: Tensor) -> Tensor:
        return t.bfloat16().to(dtype)

    weight, dys = of(weight), of(dys)
    xs = [tuple(map(of, step[0])) for step in raw]
    es = [tuple(map(of, step[4])) for step in raw]
    initial, p = (tuple(map(of, raw[0][k])) for k in (2, 3))
    if how != "derived":
        return _by_autograd(cell, xs, es, initial, p, weight, dys)
    return _by_the_pair(cell, xs, es, initial, p, weight, dys)


def _recurrent(h: Tensor, weight: Tensor) -> Tiles:
    return tuple(h @ w.mT for w in weight)


def _by_autograd(
    cell: Derived, xs: list[Tiles], es: list[Tiles], initial: Tiles, p: Tiles, weight: Tensor, dys: Tensor
) -> dict[str, Tensor]:
    leaves = [*initial, *p, weight, *(t for x in xs for t in x)]
    for t in leaves:
        t.requires_grad_()
    state, every = initial, []
    for x, e in zip(xs, es, strict=True):
        state = cell.step(x, _recurrent(state[0], weight), state, p, e)
        every.append(state[0])
    found = torch.autograd.grad(every, leaves, list(dys), allow_unused=True, materialize_grads=True)
    return _named(cell, state, found[: len(initial)], found[len(initial) : len(initial) + len(p)],
                  found[len(initial) + len(p)], found[len(initial) + len(p) + 1 :])  # fmt: skip


def _by_the_pair(
    cell: Derived, xs: list[Tiles], es: list[Tiles], initial: Tiles, p: Tiles, weight: Tensor, dys: Tensor
) -> dict[str, Tensor]:
    def rounded(tiles: Sequence[Tensor]) -> Tiles:
        return tuple(t.bfloat16().float() for t in tiles)

    states, kept, state = [rounded(initial)], [], initial
    for x, e in zip(xs, es, strict=True):
        state, saved = cell.run_forward(x, _recurrent(states[-1][0], weight), state, p, e)
        kept.append(rounded(saved))
        states.append(rounded(state))
    d = tuple(torch.zeros_like(s) for s in initial)
    dxs, dw, dps = [], torch.zeros_like(weight), [torch.zeros_like(q) for q in p]
    for t in reversed(range(len(xs))):
        after = tuple(states[t + 1][i] for i in cell.cell.after)
        d = (d[0] + dys[t], *d[1:])
        dx, dr, d = cell.run_backward(d, kept[t], after, states[t], p, es[t])
        dx, dr = rounded(dx), rounded(dr)
        d = (d[0] + sum(g @ w for g, w in zip(dr, weight, strict=True)), *d[1:])
        dw += torch.stack([g.mT @ states[t][0] for g in dr])
        for total, part in zip(dps, cell.param_gradients(dx, dr, kept[t], after, states[t], p, es[t]), strict=True):
            total += part
        dxs.append(dx[: cell.cell.inputs])
    return _named(cell, state, d, dps, dw, [t for dx in reversed(dxs) for t in dx])


def _named(
    cell: Derived, state: Sequence[Tensor], d_initial: Sequence[Tensor], dp: Sequence[Tensor], dw: Tensor,
    dxs: Sequence[Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    found = {f"{name}_n": t for name, t in zip(cell.names.states, state, strict=True)}
    found |= {f"the gradient of {name}_0": t for name, t in zip(cell.names.states, d_initial, strict=True)}
    found |= {f"the gradient of {name}": t for name, t in zip(cell.names.params, dp, strict=True)}
    found |= {"the gradient of W_hh": dw, "the gradient of x": torch.stack(tuple(dxs))}
    return {name: t.detach().double() for name, t in found.items()}
