"""The backward of the kernels in plain PyTorch, which is what a second derivative differentiates.

A first derivative runs on the kernels. Whoever differentiates it again (a gradient penalty, a Hessian-vector product)
gets the derivative of the functions here: a Python loop over the time steps, slow, in float32 or better. They are
differentiable any number of times and have the kernels' arguments and results; beside the gradients of what a layer
gives out they take those of what its forward kept, which only a second derivative has.

Letters are those of ``kernels.tensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persistrnn import masks
from persistrnn.kernels.cells import derived
from persistrnn.kernels.tensors import Gradients, Kept
from persistrnn.step_marks import BEGINS, SKIPPED

Tiles = tuple[Tensor, ...]


Steps = Sequence["Sequence[Tensor] | None"]


def _steps(tensors: Sequence[Tensor | None], direction: int) -> Steps:
    """Each [*, B, D, ...] as a list of [B, ...]: an index per step would have a gradient as large as all of it."""
    return [None if t is None else t[:, :, direction].unbind() for t in tensors]


def _plus(d: Tiles, others: Steps, position: int) -> Tiles:
    """d, with what stands at one position of the others."""
    return tuple(x if o is None else x + o[position] for x, o in zip(d, others, strict=True))


def backward(
    cell: str,
    weight_hh: Tensor,
    weight_ih: Tensor | None,
    marks: Tensor | None,
    kept: Kept,
    d_outputs: Sequence[Tensor | None],
    d_final: Sequence[Tensor],
    d_kept: Sequence[Tensor | None] = (),
    params: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
) -> Gradients:
    """The backward of a layer, or of a stack of one direction from its highest layer down.

    Args:
        cell: its name in ``kernels.cells.CELLS``
        weight_hh: [L*D, G*H, H]; weight_ih: [L - 1, G*H, H], of the upper layers, or None
        marks: uint8 [T, B, D] or None, as for the forward
        kept: what the forward kept; d_kept: gradients of its states and then of saved, each None where there is none;
            empty: of none, and no gradients of the parameters are formed
        d_outputs: of the highest layer's every h and, where they were given out, every other state, each [T, B, D, H]
            or None
        d_final: of the final states, each [L*D, B, H]
        params: [L*D, P, H]; extras: [L, T, B, D, E, H]: as for the forward, or None; heads: of each direction
    """
    assert kept.saved is not None
    dtype, n = kept.saved.dtype, len(d_final)
    exact = torch.promote_types(dtype, torch.float32)
    layers, steps, batch, directions, _, units = kept.saved.shape
    extras = masks.tiles(extras, steps, batch, units)
    outside = [*d_outputs, *(None,) * n][:n]
    found = []
    for layer in reversed(range(layers)):
        states, saved = [s[layer].to(exact) for s in kept.states], kept.saved[layer].to(exact)
        *d_states, d_saved = (None if d is None else d[layer].to(exact) for d in d_kept or (None,) * (n + 1))
        if d_kept and d_saved is None:
            d_saved = torch.zeros_like(saved)
        given = [None if d is None else d.to(exact) for d in outside]
        beside = None if extras is None else extras[layer].to(exact)
        ways = []
        for k in range(directions):
            row = layer * directions + k
            final = tuple(d[row].to(exact) for d in d_final)
            of_saved, *of_states = (t[:, :, k].unbind() for t in (saved, *states))
            d_of_saved, of_extras = _steps((d_saved, beside), k)
            outputs, others = _steps(given, k), _steps(d_states, k)
            of_params = () if params is None else tuple(params[row].to(exact).unbind())
            tiles = of_saved, d_of_saved, of_states, of_params, of_extras
            ways.append(_one_way(cell, weight_hh[row].to(exact), marks, k // heads, final, tiles, outputs, others))
        dx_gates, dr_gates, *edges, d_params = zip(*ways, strict=True)
        dx, dr = (torch.stack(gates, dim=2).to(dtype) for gates in (dx_gates, dr_gates))
        states_of = ([torch.stack(s).to(dtype) for s in zip(*of, strict=True)] for of in edges)
        found.append((dx, dr, *states_of, None if d_params[0] is None else torch.stack(d_params)))
        if layer > 0:
            assert weight_ih is not None
            outside = [dx @ weight_ih[layer - 1], *(None,) * (n - 1)]
    dx_gates, dr_gates, d_initial, d_reset, d_params = zip(*reversed(found), strict=True)
    return Gradients(
        torch.stack(dx_gates),
        torch.stack(dr_gates),
        [torch.cat(s) for s in zip(*d_initial, strict=True)],
        [torch.cat(s) for s in zip(*d_reset, strict=True)],
        None if d_params[0] is None else torch.cat(d_params),
    )


def _one_way(
    cell: str,
    weight: Tensor,
    marks: Tensor | None,
    direction: int,
    d: Tiles,
    tiles: tuple[Any, ...],
    d_outputs: Steps,
    d_states: Steps,
) -> tuple[Tensor, Tensor, Tiles, Tiles, Tensor | None]:
    """Of one layer and direction: dx_gates [T, B, V*H] and dr_gates [T, B, G*H], the gradients of the initial and of
    the reset state, and, given those of what was saved, of the parameters [P, H]. weight: [G*H, H]; d: of the final
    state; tiles: what was saved, its gradients, the states, parameters and extras, all but the parameters as ``_steps``
    has them."""
    saved, d_saved, states, p, extras = tiles
    formulas = derived(cell)
    of = formulas.cell
    steps = len(saved)
    of_h, later = weight.split([len(weight) // of.gates * n for n in (of.gates_of_h, of.products)])

    def transposed(d: Tensor) -> Tensor:
        return d @ later

    first, last, back = (steps + 1, 0, 1) if direction else (0, steps + 1, -1)
    anew: Tiles = tuple(torch.zeros_like(x) for x in d)
    dx_of: dict[int, Tensor] = {}
    dr_of: dict[int, Tensor] = {}
    d_params: list[Tensor] = [torch.zeros_like(tile) for tile in p]
    for t in range(steps) if direction else reversed(range(steps)):
        before: Tiles = tuple(s[t + 1 + back] for s in states)
        mark = None if marks is None else marks[t, :, direction].unsqueeze(-1)
        saved_t: Tiles = saved[t].unbind(1)
        after: Tiles = tuple(states[i][t + 1] for i in of.after)
        e: Tiles = () if extras is None else extras[t].unbind(1)
        if mark is not None:
            before = _where(mark == BEGINS, tuple(s[last] for s in states), before)
            before, saved_t, after = (finite(mark == SKIPPED, tiles) for tiles in (before, saved_t, after))
        d = _plus(_plus(d, d_outputs, t), d_states, t + 1)
        if d_saved is None:
            dx, dr, d_before = formulas.run_backward(d, saved_t, after, before, p, e, transposed)
        else:
            d_of_saved = d_saved[t].unbind(1)
            dx, dr, d_before, dp = formulas.run_second(d, saved_t, d_of_saved, after, before, p, e, transposed)
            dx = (*dx, *(torch.zeros_like(dx[0]) for _ in range(of.more_gradients)))
            if mark is not None:
                dp = _zero(mark == SKIPPED, dp)
            d_params = [total + tile.expand_as(d[0]).sum(0) for total, tile in zip(d_params, dp, strict=True)]
        if mark is not None:
            dx, dr = _zero(mark == SKIPPED, dx), _zero(mark == SKIPPED, dr)
            d_before = _where(mark == SKIPPED, d, d_before)
        dx_of[t], dr_of[t] = torch.cat(dx, dim=-1), torch.cat(dr, dim=-1)
        d = (d_before[0] + dr_of[t][:, : len(of_h)] @ of_h, *d_before[1:])
        if mark is not None:
            anew = tuple(a + x for a, x in zip(anew, _zero(mark != BEGINS, d), strict=True))
            d = _zero(mark == BEGINS, d)
    dx_gates, dr_gates = (torch.stack([of[t] for t in range(steps)]) for of in (dx_of, dr_of))
    edges = _plus(d, d_states, first), _plus(anew, d_states, last)
    return dx_gates, dr_gates, *edges, torch.stack(d_params) if p and d_saved is not None else None


def through(
    function: Callable[[list[Any]], Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``tensors`` through ``function(tensors)``, given those of its results: of the floating ones."""
    asked = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, tensor in zip(asked, given, strict=True):
            arguments[i] = tensor
        # Each is a result too, with a gradient of zeros: torch.func.vjp cannot make the zeros of what the function does
        # not read where it is nested.
        return (*function(arguments), *(t.view_as(t) for t in given))

    found: list[Tensor | None] = [None] * len(tensors)
    results, vjp = torch.func.vjp(of, *(tensors[i] for i in asked))[:2]
    zeros = (torch.zeros_like(t) for t in results[len(grads) :])
    for i, gradient in zip(asked, vjp((*grads, *zeros)), strict=True):
        found[i] = gradient
    return found


def _where(rows: Tensor, chosen: Tiles, others: Tiles) -> Tiles:
    return tuple(torch.where(rows, a, b) for a, b in zip(chosen, others, strict=True))


def finite(rows: Tensor, tiles: Sequence[Tensor]) -> Tiles:
    """Without the NaN and infinities of rows that nobody reads, which would be 0 * NaN in a derivative: 1 for them, for
    at 0 a root, a logarithm and a quotient have none."""
    return tuple(torch.where(rows & ~x.isfinite(), 1.0, x) for x in tiles)


def _zero(rows: Tensor, tiles: Tiles) -> Tiles:
    return tuple(torch.where(rows, 0.0, x) for x in tiles)
