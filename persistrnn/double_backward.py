"""The backward of the kernels in plain PyTorch, which is what a second derivative differentiates.

A first derivative runs on the kernels. Whoever differentiates it again (a gradient penalty, a Hessian-vector product)
gets the derivative of the functions here: a Python loop over the time steps, slow, in float32 or better. They are
differentiable any number of times and have the kernels' arguments and results; beside the gradients of what a layer
gives out they take those of what its forward kept, which only a second derivative has.

Letters: T steps, B batch, H hidden, G gates, D directions, n tensors kept per step, L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from persistrnn.segments import BEGINS, SKIPPED

Tiles = tuple[Tensor, ...]


class Kept(NamedTuple):
    """What the forward kept: y and c [T + 2, B, D, H] (c empty if the cell has none), saved [T, B, D, n, H]; or the
    gradients of these, each None where there is none."""

    y: Tensor | None
    c: Tensor | None
    saved: Tensor | None


NOTHING = Kept(None, None, None)


class Gradients(NamedTuple):
    """dx_gates and dr_gates [T, B, D, G*H]; of the initial and of the reset states, h before c, each [D, B, H]."""

    dx_gates: Tensor
    dr_gates: Tensor
    d_initial: list[Tensor]
    d_reset: list[Tensor]


def _lstm(d_state: Tiles, saved: Tiles, d_saved: Tiles, before: Tiles) -> tuple[Tiles, Tiles, Tiles]:
    (dh, dc), (i, f, g, o), c = d_state, saved, before[1]
    tanh_c = (f * c + i * g).tanh()
    dc = dc + dh * o * (1 - tanh_c.square())
    di, df, dg, do = (a + b for a, b in zip((dc * g, dc * c, dc * i, dh * tanh_c), d_saved, strict=True))
    gates = di * i * (1 - i), df * f * (1 - f), dg * (1 - g.square()), do * o * (1 - o)
    return gates, gates, (torch.zeros_like(dh), dc * f)


def _gru(d_state: Tiles, saved: Tiles, d_saved: Tiles, before: Tiles) -> tuple[Tiles, Tiles, Tiles]:
    (dh,), (r, z, n, r_n), (h,) = d_state, saved, before
    dn = (dh * (1 - z) + d_saved[2]) * (1 - n.square())
    dz = (dh * (h - n) + d_saved[1]) * z * (1 - z)
    dr = (dn * r_n + d_saved[0]) * r * (1 - r)
    return (dr, dz, dn), (dr, dz, dn * r + d_saved[3]), (dh * z,)


CELLS: dict[str, Callable[[Tiles, Tiles, Tiles, Tiles], tuple[Tiles, Tiles, Tiles]]] = {"lstm": _lstm, "gru": _gru}


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
    marks: Tensor | None,
    kept: Kept,
    d_outputs: Sequence[Tensor | None],
    d_final: Sequence[Tensor],
    d_kept: Kept = NOTHING,
) -> Gradients:
    """The backward of one layer (Hochreiter and Schmidhuber 1997; Cho et al. 2014; by hand).

    Args:
        cell: "lstm" or "gru"
        weight_hh: [D, G*H, H]
        marks: uint8 [T, B, D] or None, as for the forward
        kept, d_kept: what the forward kept, and gradients of it
        d_outputs: of every h and, if it was given out, every c, each [T, B, D, H] or None
        d_final: of the final states, each [D, B, H]
    """
    assert kept.y is not None
    assert kept.c is not None
    assert kept.saved is not None
    dtype, n = kept.y.dtype, len(d_final)
    exact = torch.promote_types(dtype, torch.float32)
    weight = weight_hh.to(exact)
    states = [s.to(exact) for s in (kept.y, kept.c)[:n]]
    saved = kept.saved.to(exact)
    d_states = [None if s is None else s.to(exact) for s in (d_kept.y, d_kept.c)[:n]]
    d_saved = torch.zeros_like(saved) if d_kept.saved is None else d_kept.saved.to(exact)
    given = [None if d is None else d.to(exact) for d in (*d_outputs, None)[:n]]
    steps, _, directions, _, _ = saved.shape
    dx_gates, dr_gates, d_initial, d_reset = [], [], [], []
    for k in range(directions):
        first, last, back = (steps + 1, 0, 1) if k else (0, steps + 1, -1)
        d: Tiles = tuple(f[k].to(exact) for f in d_final)
        anew: Tiles = tuple(torch.zeros_like(x) for x in d)
        d_states_k, given_k = _steps(d_states, k), _steps(given, k)
        states_k = [s[:, :, k].unbind() for s in states]
        saved_k, d_saved_k = (s[:, :, k].unbind() for s in (saved, d_saved))
        dx_of: dict[int, Tensor] = {}
        dr_of: dict[int, Tensor] = {}
        for t in range(steps) if k else reversed(range(steps)):
            before: Tiles = tuple(s[t + 1 + back] for s in states_k)
            mark = None if marks is None else marks[t, :, k].unsqueeze(-1)
            saved_t = saved_k[t].unbind(1)
            if mark is not None:
                before = tuple(torch.where(mark == BEGINS, s[last], b) for s, b in zip(states_k, before, strict=True))
                before, saved_t = (  # a NaN in a row that skips the step would be 0 * NaN in the derivative of this
                    tuple(torch.where(mark == SKIPPED, 0.0, x) for x in tiles) for tiles in (before, saved_t)
                )
            d = _plus(_plus(d, given_k, t), d_states_k, t + 1)
            dx, dr, d_before = CELLS[cell](d, saved_t, d_saved_k[t].unbind(1), before)
            if mark is not None:
                dx, dr = (tuple(torch.where(mark == SKIPPED, 0.0, x) for x in tiles) for tiles in (dx, dr))
                d_before = tuple(torch.where(mark == SKIPPED, x, b) for x, b in zip(d, d_before, strict=True))
            dx_of[t], dr_of[t] = torch.cat(dx, dim=-1), torch.cat(dr, dim=-1)
            d = (d_before[0] + dr_of[t] @ weight[k], *d_before[1:])
            if mark is not None:
                anew = tuple(a + torch.where(mark == BEGINS, x, 0.0) for a, x in zip(anew, d, strict=True))
                d = tuple(torch.where(mark == BEGINS, 0.0, x) for x in d)
        d_initial.append(_plus(d, d_states_k, first))
        d_reset.append(_plus(anew, d_states_k, last))
        dx_gates.append(torch.stack([dx_of[t] for t in range(steps)]))
        dr_gates.append(torch.stack([dr_of[t] for t in range(steps)]))
    return Gradients(
        torch.stack(dx_gates, dim=2).to(dtype),
        torch.stack(dr_gates, dim=2).to(dtype),
        [torch.stack(s).to(dtype) for s in zip(*d_initial, strict=True)],
        [torch.stack(s).to(dtype) for s in zip(*d_reset, strict=True)],
    )


def backward_of_stack(
    cell: str,
    weight_hh: Tensor,
    weight_ih: Tensor,
    marks: Tensor | None,
    kept: Kept,
    d_outputs: Sequence[Tensor | None],
    d_final: Sequence[Tensor],
    d_kept: Kept = NOTHING,
) -> Gradients:
    """The backward of a stack of one direction, layer after layer.

    Args:
        weight_hh: [L, G*H, H]; weight_ih: [L - 1, G*H, H], of the upper layers
        marks: uint8 [T, B] or None
        kept, d_kept: y and c [L, T + 2, B, H], saved [L, T, B, n, H]
        d_outputs: of the highest layer, each [T, B, H] or None
        d_final: each [L, B, H]

    Returns:
        dx_gates, dr_gates [L, T, B, G*H], and the gradients of the states, each [L, B, H].
    """
    assert kept.y is not None
    layers, has_c = weight_hh.shape[0], len(d_final) > 1
    marks = None if marks is None else marks.unsqueeze(2)
    outside = [d if d is None else d.unsqueeze(2) for d in d_outputs]
    found = []
    for layer in reversed(range(layers)):

        def of_layer(tensors: Kept, layer: int = layer) -> Kept:
            y, c, saved = (None if t is None or not t.numel() else t[layer].unsqueeze(2) for t in tensors)
            return Kept(y, c if has_c else tensors.c, saved)

        finals = [d[layer].unsqueeze(0) for d in d_final]
        weight = weight_hh[layer].unsqueeze(0)
        g = backward(cell, weight, marks, of_layer(kept), outside, finals, of_layer(d_kept))
        found.append(g)
        if layer > 0:
            outside = [g.dx_gates @ weight_ih[layer - 1], None]
    found.reverse()
    return Gradients(
        torch.stack([g.dx_gates.squeeze(2) for g in found]),
        torch.stack([g.dr_gates.squeeze(2) for g in found]),
        [torch.cat(s) for s in zip(*(g.d_initial for g in found), strict=True)],
        [torch.cat(s) for s in zip(*(g.d_reset for g in found), strict=True)],
    )
