"""The backward of the kernels in plain PyTorch, which is what a second derivative differentiates.

A first derivative runs on the kernels. Whoever differentiates it again (a gradient penalty, a Hessian-vector product)
gets the derivative of the functions here: a Python loop over the time steps, slow, in float32 or better. They are
differentiable any number of times and have the kernels' arguments and results; beside the gradients of what a layer
gives out they take those of what its forward kept, which only a second derivative has.

Letters are those of ``kernels.tensors``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persistrnn.kernels.cells import derived
from persistrnn.kernels.tensors import Gradients, Kept
from persistrnn.segments import BEGINS, SKIPPED

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
) -> Gradients:
    """The backward of a layer, or of a stack of one direction from its highest layer down.

    Args:
        cell: its name in ``kernels.cells.CELLS``
        weight_hh: [L*D, G*H, H]; weight_ih: [L - 1, G*H, H], of the upper layers, or None
        marks: uint8 [T, B, D] or None, as for the forward
        kept: what the forward kept; d_kept: gradients of its states and then of saved, each None where there is none
        d_outputs: of the highest layer's every h and, where they were given out, every other state, each [T, B, D, H]
            or None
        d_final: of the final states, each [L*D, B, H]
    """
    assert kept.saved is not None
    dtype, n = kept.saved.dtype, len(d_final)
    exact = torch.promote_types(dtype, torch.float32)
    layers, directions = kept.saved.shape[0], kept.saved.shape[3]
    outside = [*d_outputs, *(None,) * n][:n]
    found = []
    for layer in reversed(range(layers)):
        states, saved = [s[layer].to(exact) for s in kept.states], kept.saved[layer].to(exact)
        *d_states, d_saved = (None if d is None else d[layer].to(exact) for d in d_kept or (None,) * (n + 1))
        d_saved = torch.zeros_like(saved) if d_saved is None else d_saved
        given = [None if d is None else d.to(exact) for d in outside]
        ways = []
        for k in range(directions):
            row = layer * directions + k
            final = tuple(d[row].to(exact) for d in d_final)
            of_saved, d_of_saved, *of_states = (t[:, :, k].unbind() for t in (saved, d_saved, *states))
            outputs, others = _steps(given, k), _steps(d_states, k)
            weight = weight_hh[row].to(exact)
            ways.append(_one_way(cell, weight, marks, k, final, of_saved, d_of_saved, of_states, outputs, others))
        dx_gates, dr_gates, *edges = zip(*ways, strict=True)
        dx, dr = (torch.stack(gates, dim=2).to(dtype) for gates in (dx_gates, dr_gates))
        found.append((dx, dr, *([torch.stack(s).to(dtype) for s in zip(*of, strict=True)] for of in edges)))
        if layer > 0:
            assert weight_ih is not None
            outside = [dx @ weight_ih[layer - 1], *(None,) * (n - 1)]
    dx_gates, dr_gates, d_initial, d_reset = zip(*reversed(found), strict=True)
    return Gradients(
        torch.stack(dx_gates),
        torch.stack(dr_gates),
        [torch.cat(s) for s in zip(*d_initial, strict=True)],
        [torch.cat(s) for s in zip(*d_reset, strict=True)],
    )


def _one_way(
    cell: str,
    weight: Tensor,
    marks: Tensor | None,
    direction: int,
    d: Tiles,
    saved: Tiles,
    d_saved: Tiles,
    states: Sequence[Tiles],
    d_outputs: Steps,
    d_states: Steps,
) -> tuple[Tensor, Tensor, Tiles, Tiles]:
    """Of one layer and direction: dx_gates and dr_gates [T, B, G*H], the gradients of the initial and of the reset
    state. weight: [G*H, H]; d: of the final state; the others as ``_steps`` has them."""
    steps, of = len(saved), derived(cell)
    first, last, back = (steps + 1, 0, 1) if direction else (0, steps + 1, -1)
    anew: Tiles = tuple(torch.zeros_like(x) for x in d)
    dx_of: dict[int, Tensor] = {}
    dr_of: dict[int, Tensor] = {}
    for t in range(steps) if direction else reversed(range(steps)):
        before: Tiles = tuple(s[t + 1 + back] for s in states)
        mark = None if marks is None else marks[t, :, direction].unsqueeze(-1)
        saved_t: Tiles = saved[t].unbind(1)
        if mark is not None:
            before = _where(mark == BEGINS, tuple(s[last] for s in states), before)
            # A NaN in a row that skips the step would be 0 * NaN in the derivative of this.
            before, saved_t = _zero(mark == SKIPPED, before), _zero(mark == SKIPPED, saved_t)
        d, later = _plus(_plus(d, d_outputs, t), d_states, t + 1), [s[t + 1] for s in states]
        dx, dr, d_before, _ = of.run_second(d, saved_t, d_saved[t].unbind(1), [later[i] for i in of.cell.after], before)
        if mark is not None:
            dx, dr = _zero(mark == SKIPPED, dx), _zero(mark == SKIPPED, dr)
            d_before = _where(mark == SKIPPED, d, d_before)
        dx_of[t], dr_of[t] = torch.cat(dx, dim=-1), torch.cat(dr, dim=-1)
        d = (d_before[0] + dr_of[t] @ weight, *d_before[1:])
        if mark is not None:
            anew = tuple(a + x for a, x in zip(anew, _zero(mark != BEGINS, d), strict=True))
            d = _zero(mark == BEGINS, d)
    dx_gates, dr_gates = (torch.stack([of[t] for t in range(steps)]) for of in (dx_of, dr_of))
    return dx_gates, dr_gates, _plus(d, d_states, first), _plus(anew, d_states, last)


def through(
    function: Callable[[list[Any]], Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    unread: Sequence[int] = (),
) -> list[Tensor | None]:
    """Gradients of ``tensors`` through ``function(tensors)``, given those of its results: of the floating ones that it
    reads, which are all but ``unread``."""
    asked = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point() and i not in unread]

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, tensor in zip(asked, given, strict=True):
            arguments[i] = tensor
        return tuple(function(arguments))

    found: list[Tensor | None] = [None] * len(tensors)
    vjp = torch.func.vjp(of, *(tensors[i] for i in asked))[1]
    for i, gradient in zip(asked, vjp(tuple(grads)), strict=True):
        found[i] = gradient
    return found


def _where(rows: Tensor, chosen: Tiles, others: Tiles) -> Tiles:
    return tuple(torch.where(rows, a, b) for a, b in zip(chosen, others, strict=True))


def _zero(rows: Tensor, tiles: Tiles) -> Tiles:
    return tuple(torch.where(rows, 0.0, x) for x in tiles)
