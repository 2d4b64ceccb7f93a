"""Whether what was derived is the step: against autograd of it, exactly and over a long sequence of rounded tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .derive import Derived, given_tiles, split
from .graph import CellError
from .tracing import Casts, called

Tiles = tuple[Tensor, ...]
UNITS, BATCH, STEPS = 16, 16, 48
EPS = torch.finfo(torch.bfloat16).eps
MOST_ERROR, AND = 1.5, 2 * EPS  # of that of what keeps every tile, and beside it


def verify(cell: Derived) -> None:
    """Check a cell.

    Raises:
        CellError: results or gradients differ from those of the step, or are not finite on zeros; rounded tiles make
            more of an error in a gradient than they must.
    """
    for seed in range(3):
        _check_one_step(cell, seed)
    _check_zeros(cell)
    if cell.names.stages:
        return
    for what, (error, least) in errors_of_rounding(cell).items():
        if not error <= MOST_ERROR * least + AND:
            raise CellError(
                f"{cell.cell.name}: over {STEPS} steps that keep bfloat16 {what} has a relative error of {error:.1e}, "
                f"and of {least:.1e} where every tile is kept; allowed: {MOST_ERROR} times that and {AND:.1e}. Please "
                "report this step"
            )


def _drawn(cell: Derived, generator: torch.Generator, differentiable: bool = True) -> list[Tiles]:
    """x, r, state, p, e. Extras are 0 or 1."""
    found = []
    names = cell.names
    of_params = [name for name, tiles in names.of_step.items() for _ in range(tiles)]
    for group in (names.inputs, names.gates_of_h, names.states, of_params, names.extras):
        drawn = (torch.rand(BATCH, UNITS, generator=generator, dtype=torch.float64) * 2 - 0.5 for _ in group)
        found.append(tuple((t > 0.5).double() if group is names.extras else t for t in drawn))
    for t in chain(*found[:4]) if differentiable else ():
        t.requires_grad_()
    return found


def _run(cell: Derived, step: Callable[..., Any], given: Sequence[Tiles]) -> Tiles:
    name = cell.cell.name.partition(":")[0]
    with Casts(name):
        found: Tiles = called(step, given, name)
    return found


def _check_one_step(cell: Derived, seed: int) -> None:
    """From what is saved, against autograd of the step with its later stages in it: products with one matrix, and means
    over the last dimension."""
    generator = torch.Generator().manual_seed(seed)
    x, r, state, p, e = _drawn(cell, generator)
    weight = torch.randn(UNITS, UNITS, generator=generator, dtype=torch.float64) / UNITS**0.5
    operands: list[Tensor] = []
    results: list[Tensor] = []

    def stage(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def answer(operand: Tensor) -> Tensor:
            operands.append(operand)
            results.append(function(operand))
            return results[-1]

        return answer

    answers = stage(lambda o: o @ weight.mT), stage(lambda t: t.mean(-1, keepdim=True).expand_as(t))
    new = _run(cell, lambda *given: cell.run_step(given, *answers), (x, r, state, p, e))
    d = tuple(torch.rand(BATCH, UNITS, generator=generator, dtype=torch.float64) for _ in new)
    expected = _gradients(new, [*x, *r, *state, *p], d)
    graph, traced = cell.traced.graph, cell.traced
    with torch.no_grad():
        found, saved = cell.run_forward(x, r, state, p, e, results)
        worked_on = graph.evaluate(traced.operands, given_tiles(graph, x=x, r=r, s=state, p=p, e=e, q=results), x[0])
        after = tuple(found[i] for i in cell.cell.after)
        dx, dr, d_previous = cell.run_backward(d, saved, after, state, p, e, lambda of_result: of_result @ weight)
        dp = cell.param_gradients(dx, dr, saved, after, state, p, e)
    gradients = [*dx[: cell.cell.inputs], *dr[: len(r)], *d_previous, *dp]
    _check_equal(cell, [*found, *worked_on, *gradients], [*new, *operands, *expected])


def _gradients(new: Sequence[Tensor], leaves: Sequence[Tensor], d: Sequence[Tensor]) -> Sequence[Tensor | None]:
    pairs = [(t, g) for t, g in zip(new, d, strict=True) if t.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    return torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)


def _check_equal(cell: Derived, found: Sequence[Tensor], expected: Sequence[Tensor | None]) -> None:
    if not all(true.isfinite().all() for true in expected if true is not None):
        raise CellError(
            f"{cell.cell.name}: on arguments between -0.5 and 0.5 a result or a gradient, by autograd of the step, is "
            "not finite; torch.where does not keep out a gradient that is no number, so choose the argument, as in "
            "sqrt(where(x > 0, x, 1.0))"
        )
    for ours, true in zip(found, expected, strict=True):
        true = torch.zeros_like(ours) if true is None else true
        if not torch.allclose(ours, true, rtol=1e-7, atol=1e-9):  # torch's hardsigmoid has a float32 constant
            raise CellError(
                f"{cell.cell.name}: what was derived differs from the step by up to "
                f"{(ours - true).abs().max().item():.1e} in float64; please report this step"
            )


def _check_zeros(cell: Derived) -> None:
    x, r, state, p, e = (tuple(torch.zeros_like(t) for t in tiles) for tiles in _drawn(cell, torch.Generator()))
    try:
        new = cell.run_step((x, r, state, p, e), lambda operand: operand, lambda tile: tile)
    except Exception as error:
        raise CellError(f"{cell.cell.name}: the step fails on zeros: {error}") from error
    bad = [name for name, t in zip(cell.names.states, new, strict=True) if not t.isfinite().all()]
    if bad:
        raise CellError(
            f"{cell.cell.name}: on arguments that are all zeros {', '.join(bad)} is not finite, and layers begin from "
            "states of zeros; divide by something that is not 0 there"
        )


def errors_of_rounding(cell: Derived, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of each gradient of a long sequence that is not 0: its relative error if tiles are kept in bfloat16, and the same
    if all that the forward forms is kept so, and no more."""
    exact, ours, witness = (
        gradients_of_a_sequence(cell, *how, seed)
        for how in ((torch.finfo(torch.float64).eps, False), (EPS, False), (EPS, True))
    )
    return {
        what: (((ours[what] - true).norm() / size).item(), ((witness[what] - true).norm() / size).item())
        for what, true in exact.items()
        if 0 < (size := true.norm()) < math.inf
    }


def gradients_of_a_sequence(cell: Derived, eps: float, every_tile: bool, seed: int = 0) -> dict[str, Tensor]:
    """As the kernels form them, in float64, from tiles that the forward has rounded to ``eps``. One forward for all: a
    step that is not continuous may go another way for a rounding of its input, which is no fault of the backward.

    Args:
        every_tile: whether the backward has all that the forward forms, with the outcomes of all comparisons, and not
            what was chosen to be saved

    Raises:
        CellError: a comparison has another outcome in the backward.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = [_drawn(cell, generator, False) for _ in range(STEPS)]
    _, _, initial, p, _ = raw[0]
    initial = tuple(s.abs() + 0.5 for s in initial)  # one of them may be a normaliser
    weight = torch.randn(len(cell.names.gates), UNITS, UNITS, generator=generator, dtype=torch.float64) / UNITS**0.5
    dys = torch.randn(STEPS, BATCH, UNITS, generator=generator, dtype=torch.float64)

    graph, traced = cell.traced.graph, cell.traced
    parts = traced.dx, traced.dr, traced.ds, traced.dp
    of_forward = graph.needs([*traced.new, *traced.border])
    outcomes = [i for i in of_forward if graph.is_truth(i)]
    formed = [i for i in of_forward if i in graph.needs(traced.new) and i not in outcomes and graph.value(i) is None]

    def rounded(tiles: Sequence[Tensor]) -> Tiles:
        split_up = (torch.frexp(t) for t in tiles)  # a mantissa is in [0.5, 1)
        return tuple(torch.ldexp((m / eps * 2).round() * eps / 2, exponent) for m, exponent in split_up)

    states, saved, every = [initial], [], []
    for x, _, _, _, e in raw:
        r = tuple(states[-1][0] @ w.mT for w in weight)
        new, tiles = cell.run_forward(x, r, states[-1], p, e)
        given = given_tiles(graph, x=x, r=r, s=states[-1], p=p, e=e)
        every.append(dict(zip(formed, rounded(graph.evaluate(formed, given, x[0])), strict=True)))
        every[-1] |= zip(outcomes, graph.evaluate(outcomes, given, x[0]), strict=True)
        saved.append(rounded(tiles))
        states.append(new)
    states = [rounded(s) for s in states]

    def backward(d: Tiles, t: int) -> Sequence[Tiles]:
        """Of one step: the gradients of x, r, the states before it and the parameters."""
        e = raw[t][4]
        if every_tile:
            kept = every[t] | given_tiles(graph, s=states[t], p=p, e=e, d=d)
            return split(graph.evaluate([*chain(*parts)], kept, d[0]), parts)
        chosen = saved[t], tuple(states[t + 1][i] for i in cell.cell.after), states[t], p, e
        _check_outcomes(cell, cell.at_hand(*chosen), every[t], d[0])
        dx, dr, d_previous = cell.run_backward(d, *chosen)
        return dx[: cell.cell.inputs], dr, d_previous, cell.param_gradients(dx, dr, *chosen)

    d = tuple(torch.zeros_like(s) for s in initial)
    dxs: list[Tensor] = []
    dw, dps = torch.zeros_like(weight), [torch.zeros_like(q) for q in p]
    for t in reversed(range(STEPS)):
        dx, dr, d, dp = backward((d[0] + dys[t], *d[1:]), t)
        d = (d[0] + sum(g @ w for g, w in zip(dr, weight, strict=True)), *d[1:])
        dw += torch.stack([g.mT @ states[t][0] for g in dr])
        for total, part in zip(dps, dp, strict=True):
            total += part
        dxs += dx
    found = {
        f"the gradient of {name}": g
        for name, g in zip((*cell.names.states, *cell.names.params), (*d, *dps), strict=True)
    }
    return found | {"the gradient of W_hh": dw, "the gradient of x": torch.stack(dxs)}


def _check_outcomes(cell: Derived, kept: dict[int, Tensor], true: dict[int, Tensor], like: Tensor) -> None:
    """Of comparisons that the backward makes again from what it has."""
    graph = cell.traced.graph
    for i in graph.needs(cell.traced.border, kept):
        if graph.is_truth(i) and not any(graph.name(j) for j in graph.needs([i], kept)):
            (again,) = graph.evaluate([i], kept, like)
            if not torch.equal(again, true[i]):
                raise CellError(
                    f"{cell.cell.name}: a comparison comes out another way in the backward than in the forward. Please "
                    "report this step"
                )
