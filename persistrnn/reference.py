"""The recurrence in plain PyTorch: the truth that every other path is compared with.

It takes what `persistrnn.autograd.recurrent` takes of one layer and returns what it returns, in any floating dtype and
on any device, without an in-place operation, so that it can be differentiated any number of times and mapped by
`torch.func`. It is slow: a Python loop over the time steps.

Letters: T steps, B batch, H hidden, G gates (LSTM 4, GRU 3), D directions.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import masks
from persistrnn.kernels.cells import Cell, derived
from persistrnn.step_marks import BEGINS, SKIPPED

State = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of a GRU; each [B, H]


class Result(NamedTuple):
    """What a recurrence gives, and a stack: y [T, B, D*H] of the highest layer, its every c [T, B, D*H] (None: the cell
    has none, or nobody asked), and the final states of all layers, h first, each [L*D, B, H]."""

    y: Tensor
    c: Tensor | None
    finals: list[Tensor]


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    initial: Sequence[Tensor],
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    params: Tensor | None = None,
    extras: Tensor | None = None,
) -> Result:
    """Run one layer, one or two directions, over all time steps.

    Args:
        cell: its name in ``kernels.cells.CELLS``
        x_gates: x @ W_ih^T + b_ih, [T, B, D, X*H], T >= 1
        weight_hh: [D, G*H, H]; in heads [D, n, G*H/n, H/n], the blocks of a block-diagonal one. A step of several
            stages multiplies the rows of its last gates by operands of its own (``kernels.cells.stages``)
        bias_hh: [D, G*H]
        initial: the states, h first, as (h0, c0) of an LSTM, each [D, B, H]
        marks: uint8 [T, B, D], where a row begins anew or skips a step (`step_marks`); None: nowhere
        reset: the states that rows begin anew from, in the form of `initial`; empty: zeros
        params: [D, P, H], the cell's parameters per unit; extras: [1, T, B, D, E, H], what it takes per step, or keys
            of masks [1, D, E, fields]
        A state may have a wider dtype than the gates, as under autocast on a CPU: it keeps its own from step to step.

    Returns:
        y, c and the final states. Direction 1 reads the sequence from its end; its output for step t stands at y[t],
        its final state is that of step 0. Where a row skips a step, its state repeats.
    """
    of = derived(cell).cell
    steps, batch, directions, _ = x_gates.shape
    extras = masks.tiles(extras, steps, batch, initial[0].shape[-1])
    every: list[list[Tensor]] = []  # of each direction: its states, each [T, B, H]
    final_states = []
    for d in range(directions):
        state: State = tuple(s[d] for s in initial)
        anew: State = tuple(s[d] for s in reset) or tuple(torch.zeros_like(s) for s in state)
        states = []
        p = () if params is None else params[d].unbind()
        if of.normalised:  # the bias comes behind the norm, which is in the step
            p = (*p, *bias_hh[d].chunk(of.gates))
        products = _Products(of, weight_hh[d], bias_hh[d])
        beside = None if extras is None else extras[0, :, :, d].to(x_gates.dtype).unbind()
        inputs = x_gates[:, :, d].unbind()  # each x_gates[t] would have a gradient as large as all of it
        for t in range(steps) if d == 0 else reversed(range(steps)):
            if marks is not None:
                state = _where(marks[t, :, d] == BEGINS, anew, state)
            before = state
            if marks is not None:  # a NaN in a row that skips the step would be 0 * NaN in the weights' gradient
                before = _where(marks[t, :, d] == SKIPPED, tuple(torch.zeros_like(s) for s in state), state)
            x, r = inputs[t].chunk(of.inputs, dim=-1), products.of(0, before[0]).chunk(of.gates_of_h, dim=-1)
            e = () if beside is None else beside[t].unbind(1)
            found = _new_states(cell, products, (x, r, before, p, e))
            new = tuple(n.to(s.dtype) for n, s in zip(found, initial, strict=True))
            state = new if marks is None else _where(marks[t, :, d] == SKIPPED, state, new)
            states.append(state)
        every.append([torch.stack(s if d == 0 else s[::-1]) for s in zip(*states, strict=True)])
        final_states.append(state)
    y, *c = (torch.cat(tensors, dim=-1) for tensors in zip(*every, strict=True))
    return Result(y, c[0] if c else None, [torch.stack(tensors) for tensors in zip(*final_states, strict=True)])


class _Products:
    """Of one direction the recurrent halves of the gates: those of h, and each of a later product of the step."""

    def __init__(self, of: Cell, weight: Tensor, bias: Tensor) -> None:
        self._multiply: Callable[..., Tensor] = F.linear if weight.dim() == 2 else _in_heads
        self._parts: list[tuple[Tensor, Tensor | None]] = [(weight, None if of.normalised else bias)]
        if of.products:
            gates = [of.gates_of_h, *(1,) * of.products]
            rows = [weight.size(-2) // of.gates * n for n in gates], [bias.size(0) // of.gates * n for n in gates]
            self._parts = list(zip(weight.split(rows[0], dim=-2), bias.split(rows[1]), strict=True))

    def of(self, number: int, operand: Tensor) -> Tensor:
        weight, bias = self._parts[number]
        return self._multiply(operand.to(weight.dtype), weight, bias)


def _new_states(cell: str, products: _Products, given: Sequence[Sequence[Tensor]]) -> State:
    """What a step makes of x, r, the state, p and e."""
    of = derived(cell)
    if of.cell.means:  # of many units: their sums want more than 16 bits, as torch's layer norm has them
        given = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in tiles] for tiles in given]
    later = itertools.count(1)
    return of.run_step(
        given,
        product=lambda operand: products.of(next(later), operand),
        mean=lambda tile: tile.mean(-1, keepdim=True).expand_as(tile),
    )


def _in_heads(h: Tensor, blocks: Tensor, bias: Tensor) -> Tensor:
    """The recurrent half of the gates [B, G*H] of h [B, H] and blocks [n, G*H/n, H/n]: head k reads the k-th of n parts
    of the units, and its rows are those of each gate for them."""
    heads, _, width = blocks.shape
    gates = torch.einsum("bnk,ngk->bng", h.unflatten(-1, (heads, width)), blocks)
    return gates.unflatten(-1, (-1, width)).transpose(1, 2).flatten(1) + bias


def _where(rows: Tensor, chosen: State, others: State) -> State:
    return tuple(torch.where(rows.unsqueeze(-1), a, b) for a, b in zip(chosen, others, strict=True))
