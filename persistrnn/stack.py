"""A stack of layers, run one after the other or in one launch: input GEMMs, dropout between layers, projections.

What comes in is validated, and of one dtype. The recurrence itself is `autograd.recurrent` on the persistent kernels or
`stepwise.recurrent`, a loop over torch's operations; letters are those of `validate`.

Projections (Sak et al. 2014) need no kernel of their own. With h_t = W_hr s_t, s_t = o * tanh(c_t), the recurrent half
of the gates is W_hh h_{t-1} = (W_hh W_hr) s_{t-1}: an LSTM over s with one more product before it, and one GEMM over
all s after it. What a row begins from has no s: its W_hh h_0 is added to the gates of its first step. So a step waits
for the other slices once, where a projection inside it would wait twice, and pays with H instead of P columns of W.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import autograd, reference, segments, stepwise, time_chunks
from persistrnn.decide import Call, Decision
from persistrnn.phases import INPUT_GEMM, phase
from persistrnn.reference import Result
from persistrnn.validate import Cuts


class _OfLayer(NamedTuple):
    """Of one layer: the initial and the reset states [D, B, features], marks [T, B, D], active [T, B]; and whether the
    initial states are zeros."""

    states: Sequence[Tensor]
    reset: Sequence[Tensor]
    marks: Tensor | None
    active: Tensor | None
    fresh: bool


# (cell, x_gates, weight_hh, bias_hh, initial, *, marks, reset)
Recurrence = Callable[..., Result]


def run(decision: Decision, x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cuts: Cuts) -> Result:
    """Run a stack: on the persistent kernels, or on torch's operations, step by step.

    Args:
        decision: what was decided
        x: [T, B, I], contiguous
        weights: all of them, in torch.nn's order
        states: [h0] or [h0, c0], each [L*D, B, features]
    """
    call, marks = decision.call, None
    if cuts.active is not None or cuts.resets is not None:
        marks = segments.marks(cuts.active, cuts.resets, call.directions)
    active = None
    if cuts.active is not None:
        active = cuts.active.unsqueeze(-1)
        x = torch.where(active, x, 0.0)  # a NaN there would reach the weights' gradient, as 0 * NaN
    given = call, x, weights, states, cuts, marks
    if decision.pipeline:
        result = _in_one_launch(*given)
    elif decision.path == "persistent" and decision.chunk:
        result = _in_chunks(*given, decision.chunk)
    else:
        recurrence: Recurrence = stepwise.recurrent
        if decision.path == "persistent":
            recurrence = functools.partial(
                autograd.recurrent, precision=call.precision, return_c=call.return_c, cell_dtype=call.cell_dtype
            )
        elif decision.chunk:
            recurrence = time_chunks.again_in_chunks(recurrence, decision.chunk)
        result = _layers(*given, recurrence)
    y, c, finals = result
    if active is not None:
        y = torch.where(active, y, 0.0)
        c = None if c is None or not call.return_c else torch.where(active, c, 0.0)
    if c is not None:
        c = c.to(call.cell_dtype or c.dtype) if call.return_c else None
    return Result(y, c, finals)


def _in_one_launch(
    stack: Call,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cuts: Cuts,
    marks: Tensor | None,
) -> Result:
    step = 4 if stack.bias else 2
    weight_hh = torch.stack(list(weights[1::step]))
    weight_ih = torch.stack(list(weights[step::step]))
    bias_hh = torch.stack(list(weights[3::step])) if stack.bias else weight_hh.new_zeros(weight_hh.shape[:2])
    bias_ih = torch.stack(list(weights[step + 2 :: step])) if stack.bias else bias_hh.new_zeros(weight_ih.shape[:2])
    x_gates = F.linear(x, weights[0], weights[2] if stack.bias else None)
    return autograd.recurrent(
        stack.cell, x_gates.unsqueeze(2), weight_hh, bias_hh, states, stack.precision,
        marks, cuts.reset, stack.return_c, stack.cell_dtype, weight_ih, bias_ih,
    )  # fmt: skip


def _layers(
    stack: Call,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cuts: Cuts,
    marks: Tensor | None,
    recurrence: Recurrence,
) -> Result:
    directions = stack.directions
    y, c, finals = x, None, []
    for layer in range(stack.num_layers):
        if layer > 0 and cuts.active is not None:
            y = segments.without_skipped(y, marks)
        if layer > 0 and stack.dropout > 0:
            y = F.dropout(y, stack.dropout)
        rows = slice(layer * directions, (layer + 1) * directions)
        weight_ih, weight_hh, *others = _weights_of(stack, weights, layer)
        bias_ih = others[0].flatten() if stack.bias else None
        bias_hh = others[1] if stack.bias else weight_hh.new_zeros(weight_hh.shape[:2])
        # both directions read the same rows, so that one GEMM with [D*G*H, I] makes the gates of both
        with phase(INPUT_GEMM):
            x_gates = F.linear(y, weight_ih.flatten(0, 1), bias_ih).unflatten(-1, (directions, -1))
        given = _OfLayer([s[rows] for s in states], [r[rows] for r in cuts.reset], marks, cuts.active, cuts.fresh)
        if stack.proj_size:
            y, c, final = _projected(stack.cell, x_gates, weight_hh, bias_hh, others[-1], given, recurrence)
        else:
            y, c, final = _recurrent(stack.cell, x_gates, weight_hh, bias_hh, given, recurrence)
        finals.append(final)
    return Result(y, c, [torch.cat(s) for s in zip(*finals, strict=True)])


def _in_chunks(
    stack: Call,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cuts: Cuts,
    marks: Tensor | None,
    chunk: int,
) -> Result:
    """The layers one after the other, each in chunks of time; where nothing happens between them and none keeps more
    than its states now and then, the chunks one after the other, each through all layers."""
    between = stack.directions > 1 or stack.dropout > 0
    together = 1 if between or stack.save != "checkpoint" else stack.num_layers
    y, c, finals = x, None, []
    for layer in range(0, stack.num_layers, together):
        if layer > 0 and cuts.active is not None:
            y = segments.without_skipped(y, marks)
        if layer > 0 and stack.dropout > 0:
            y = F.dropout(y, stack.dropout)
        rows = slice(layer * stack.directions, (layer + together) * stack.directions)
        given: list[Tensor] = []
        for i in range(layer, layer + together):
            weight_ih, weight_hh, *biases = _weights_of(stack, weights, i)
            bias_ih, bias_hh = biases or [weight_hh.new_zeros(weight_hh.shape[:2]) for _ in range(2)]
            given += [weight_ih, bias_ih, weight_hh, bias_hh]
        initial, reset = ([s[rows] for s in given_states] for given_states in (states, cuts.reset))
        y, c, final = time_chunks.recurrent(
            stack.cell,
            y,
            given,
            initial,
            stack.save,
            stack.precision,
            chunk,
            marks,
            reset,
            stack.return_c,
            stack.cell_dtype,
        )
        finals.append(final)
    return Result(y, c, [torch.cat(s) for s in zip(*finals, strict=True)])


def _weights_of(stack: Call, weights: Sequence[Tensor], layer: int) -> list[Tensor]:
    """A layer's weights in torch.nn's order, each [D, ...]."""
    each = (4 if stack.bias else 2) + (stack.proj_size > 0)
    first, last = layer * stack.directions * each, (layer + 1) * stack.directions * each
    return [_side_by_side(weights[first + k : last : each]) for k in range(each)]


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """The directions' weights as one contiguous tensor [D, ...], without a copy where D is 1."""
    return weights[0].contiguous().unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))


def _projected(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    weight_hr: Tensor,
    given: _OfLayer,
    recurrence: Recurrence,
) -> Result:
    """One layer with projections. weight_hh: [D, 4*H, P]; weight_hr: [D, P, H]."""
    (h0, c0), H = given.states, weight_hr.size(-1)
    active = x_gates.new_ones(x_gates.shape[:2], dtype=torch.bool) if given.active is None else given.active
    first = segments.first_steps(active, x_gates.size(2))
    sources = [] if given.fresh else [(h0, first if given.marks is None else first & (given.marks == 0))]
    if given.marks is not None:
        sources += [(h, given.marks == segments.BEGINS) for h in given.reset[:1]]
    for h, where in sources:
        used = torch.where(where.any(0).mT.unsqueeze(-1), h, 0.0)  # what no step reads may be NaN
        x_gates = x_gates + torch.where(where.unsqueeze(-1), (used @ weight_hh.mT).transpose(0, 1), 0.0)
    nothing = h0.new_zeros(*h0.shape[:2], H)
    # Another tensor of zeros: dynamo refuses the same one twice.
    reset = (torch.zeros_like(nothing), *given.reset[1:]) if given.reset else ()
    inner = given._replace(states=(nothing, c0), reset=reset)
    s, c, (s_n, c_n) = _recurrent(cell, x_gates, weight_hh @ weight_hr, bias_hh, inner, recurrence)
    y = torch.cat([F.linear(part, w) for part, w in zip(s.split(H, dim=-1), weight_hr, strict=True)], dim=-1)
    h_n = s_n @ weight_hr.mT
    if given.active is not None:
        h_n = torch.where(given.active.any(0).unsqueeze(-1), h_n, h0)
    return Result(y, c, [h_n, c_n])


def _recurrent(
    cell: str, x_gates: Tensor, weight_hh: Tensor, bias_hh: Tensor, given: _OfLayer, recurrence: Recurrence
) -> Result:
    if x_gates.size(1) > 0:
        return recurrence(cell, x_gates, weight_hh, bias_hh, given.states, marks=given.marks, reset=given.reset)
    # Without a row there is nothing to launch: one step of the reference gives every shape and, as torch.nn does, a
    # gradient of zeros to every weight.
    y, c, finals = reference.recurrent(cell, x_gates[:1], weight_hh, bias_hh, given.states)
    steps = x_gates.size(0)
    return Result(y.expand(steps, -1, -1), None if c is None else c.expand(steps, -1, -1), finals)
