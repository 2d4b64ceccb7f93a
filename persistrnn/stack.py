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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import autograd, masks, ops, reference, step_marks, stepwise, time_chunks
from persistrnn.decide import Call, Decision
from persistrnn.kernels.cells import CELLS, LAYER_NORM_EPS
from persistrnn.phases import INPUT_GEMM, phase
from persistrnn.reference import Result
from persistrnn.validate import Cuts


class _Given(NamedTuple):
    """What a stack runs on; as of ``run``, with marks [T, B, D] of the cuts; kernels: whether they are launched."""

    call: Call
    x: Tensor
    weights: Sequence[Tensor]
    states: Sequence[Tensor]
    cuts: Cuts
    marks: Tensor | None
    kernels: bool

    def only_where_rows_run(self, tensor: Tensor) -> Tensor:
        """[T, B, features] with zeros elsewhere."""
        if self.cuts.active is None:
            return tensor
        where = autograd.only_where if self.kernels else step_marks.only_where
        return where(self.cuts.active.unsqueeze(-1), tensor)

    def as_read(self, x: Tensor) -> Tensor:
        """A layer's input: a NaN where a row does not run would reach the weights' gradient, as 0 * NaN; without
        gradients the kernels do nothing with it."""
        return self.only_where_rows_run(x) if self.call.backward or not self.kernels else x


class _OfLayer(NamedTuple):
    """Of one layer: the initial and the reset states [D, B, features], marks [T, B, D], active [T, B]; whether the
    initial states are zeros; and by name what only some cells take, params [D, P, H] and extras [1, T, B, D, E, H]."""

    states: Sequence[Tensor]
    reset: Sequence[Tensor]
    marks: Tensor | None
    active: Tensor | None
    fresh: bool
    beside: dict[str, Any]


class _Weights(NamedTuple):
    """Of one layer, each [D, ...]: weight_ih [D, X*H, I], weight_hh [D, G*H, H] or in heads [D, n, G*H/n, H/n], biases
    alike (None without), params [D, P, H] of a cell that has such, weight_hr [D, P, H] of an
    LSTM with projections, scale float32 [D, G*H] ([D, n, G*H/n]) of a weight_hh of 8 bits."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    params: Tensor | None
    weight_hr: Tensor | None
    scale: Tensor | None = None

    def by_head(self, heads: int) -> "_Weights":
        """With each head as one more direction, as the kernels take them: [D * heads, ...] of H / heads units."""
        if heads == 1:
            return self

        def rows(tensor: Tensor) -> Tensor:  # [D, tiles * H, ...]
            tiles = tensor.unflatten(1, (-1, heads, self.weight_hh.size(-1)))
            return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)

        return self._replace(
            weight_ih=rows(self.weight_ih),
            weight_hh=self.weight_hh.flatten(0, 1),
            bias_ih=None if self.bias_ih is None else rows(self.bias_ih),
            bias_hh=None if self.bias_hh is None else rows(self.bias_hh),
            params=None if self.params is None else _by_head(self.params, heads),
            scale=None if self.scale is None else self.scale.flatten(0, 1),
        )


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """[D, .., H] as [D * heads, .., H / heads]."""
    return tensor if heads == 1 else tensor.unflatten(-1, (heads, -1)).movedim(-2, 1).flatten(0, 1)


def _heads_together(states: Tensor, heads: int) -> Tensor:
    """[D * heads, B, H / heads] as [D, B, H]."""
    return states if heads == 1 else states.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


# (cell, x_gates, weight_hh, bias_hh, initial, *, marks, reset), and params and extras of a cell that has such
Recurrence = Callable[..., Result]


def run(
    decision: Decision,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cuts: Cuts,
    scales: Sequence[Tensor] = (),
) -> Result:
    """Run a stack: on the persistent kernels, or on torch's operations, step by step.

    Args:
        decision: what was decided
        x: [T, B, I], contiguous
        weights: all of them, in torch.nn's order
        states: h0 and what other states the cell has, each [L*D, B, features]; none where ``reads_no_zeros``
        scales: of W_hh of 8 bits, of each layer and direction (``eight_bits``); on the kernels alone
    """
    if decision.call.hides:
        return _hiding(decision, x, weights, states, cuts)
    if cuts.keys is not None and cuts.extras:  # the cell's own stand before them, in one tensor
        steps, batch, units = cuts.extras[0].shape[1:]
        of_cell = masks.drawn(cuts.keys.unsqueeze(0), steps, batch, units)[0].permute(3, 2, 0, 1, 4).to(x.dtype)
        cuts = cuts._replace(extras=[*cuts.extras, *of_cell], keys=None)
    call, marks = decision.call, None
    steps, rows, _ = x.shape
    kernels = decision.path == "persistent" and call.batch > 0
    if not kernels:
        cuts = cuts.without_lengths(steps)
    if kernels and not (cuts.lengths is None and cuts.active is None and cuts.resets is None):
        marks, runs = ops.marks(cuts.lengths, cuts.active, cuts.resets, steps, rows, call.directions)
        if cuts.lengths is not None or cuts.active is not None:
            cuts = cuts._replace(active=runs, lengths=None)
    elif cuts.active is not None or cuts.resets is not None:
        marks = step_marks.marks(cuts.active, cuts.resets, call.directions)
    if cuts.active is not None:
        active = cuts.active.unsqueeze(-1)
        cuts = cuts._replace(extras=[torch.where(active, e, 0.0) for e in cuts.extras])
    given = _Given(call, x, weights, states, cuts, marks, kernels)
    given = given._replace(x=given.as_read(x))
    if decision.pipeline:
        result = _in_one_launch(given)
    elif decision.path == "persistent" and decision.chunk:
        result = _in_chunks(given, decision.chunk)
    else:
        recurrence: Recurrence = stepwise.recurrent
        if decision.path == "persistent":
            recurrence = functools.partial(
                autograd.recurrent, precision=call.precision, return_c=call.return_c, cell_dtype=call.cell_dtype,
                heads=call.heads,
            )  # fmt: skip
        elif decision.chunk:
            recurrence = time_chunks.again_in_chunks(recurrence, decision.chunk)
        split = call.heads if decision.path == "persistent" and x.size(1) > 0 else 1
        result = _layers(given, recurrence, split, scales)
    y, c, finals = result
    y = given.only_where_rows_run(y)
    if c is not None:
        c = given.only_where_rows_run(c).to(call.cell_dtype or c.dtype) if call.return_c else None
    return Result(y, c, finals)


def reads_no_zeros(decision: Decision) -> bool:
    """Whether states of zeros need not be there: the kernels' own operators make them with what else they fill."""
    call = decision.call
    whole = decision.path == "persistent" and (decision.pipeline or not decision.chunk)
    return whole and call.batch != 0 and call.proj_size == 0 and not call.hides


def _hiding(decision: Decision, x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cuts: Cuts) -> Result:
    """Layers of a cell whose h is its second state, behind what other units see of it: one after the other, as each
    reads every h of the one below. states, and those of the result: h first, without what is seen."""
    call = decision.call
    one = decision._replace(call=call._replace(num_layers=1, dropout=0.0, hides=False, return_c=True))
    assert cuts.keys is not None
    dropped = masks.drawn(cuts.keys.unsqueeze(0), 1, *states[0].shape[1:])[0, 0, :, :, 0].transpose(0, 1).bool()
    each, finals = len(weights) // call.num_layers, []
    for layer in range(call.num_layers):
        if layer > 0 and call.dropout > 0:
            x = F.dropout(x, call.dropout)
        rows = slice(layer * call.directions, (layer + 1) * call.directions)
        initial, reset, extras = ([t[rows] for t in of] for of in (states, cuts.reset, cuts.extras))
        initial, reset = ([h.masked_fill(dropped[rows], 0.0) for h in of[:1]] + of for of in (initial, reset))
        own = cuts._replace(reset=reset, extras=extras, keys=cuts.keys[rows])
        found = run(one, x, weights[layer * each : (layer + 1) * each], initial, own)
        assert found.c is not None
        x = found.c.to(x.dtype)
        finals.append(found.finals[1:])
    return Result(x, None, _all_layers(finals))


def _in_one_launch(given: _Given) -> Result:
    stack, x, weights, states, cuts, marks, _ = given
    layers = [_weights_of(given, layer) for layer in range(stack.num_layers)]
    upper = layers[1:]
    weight_hh, bias_hh = torch.cat([w.weight_hh for w in layers]), _together([w.bias_hh for w in layers])
    weight_ih, bias_ih = _together([w.weight_ih for w in upper]), _together([w.bias_ih for w in upper])
    params = _together([w.params for w in layers])
    x_gates = F.linear(x, weights[0], weights[2] if stack.bias else None)
    return autograd.recurrent(
        stack.cell, x_gates.unsqueeze(2), weight_hh, bias_hh, states, stack.precision,
        marks, cuts.reset, stack.return_c, stack.cell_dtype, weight_ih, bias_ih,
        **_beside(1, params, cuts.extras, cuts.keys),
    )  # fmt: skip


def _together(layers: Sequence[Tensor | None]) -> Tensor | None:
    """Of all layers [L, ...], each [1, ...] or None."""
    there = [t for t in layers if t is not None]
    return torch.cat(there) if len(there) > 1 else there[0] if there else None


def _layers(given: _Given, recurrence: Recurrence, split: int, scales: Sequence[Tensor]) -> Result:
    """split: the heads, where each is a direction of its own to the recurrence; else 1."""
    stack, y, _, states, cuts, marks, _ = given
    directions, c, finals = stack.directions, None, []
    for layer in range(stack.num_layers):
        y = y if layer == 0 else given.as_read(y)
        if layer > 0 and stack.dropout > 0:
            y = F.dropout(y, stack.dropout)
        rows = slice(layer * directions, (layer + 1) * directions)
        own = _weights_of(given, layer)
        if scales:
            own = own._replace(scale=torch.stack(list(scales[rows])))
        if own.bias_hh is None and not given.kernels:
            own = own._replace(bias_hh=own.weight_hh.new_zeros(directions, CELLS[stack.cell].gates * stack.hidden_size))
        own = own.by_head(split)
        initial, reset, extras = ([_by_head(t[rows], split) for t in of] for of in (states, cuts.reset, cuts.extras))
        with phase(INPUT_GEMM):
            x_gates = _input_half(stack.cell, y, own)
        keys = _keys_of(stack, cuts, rows, split)
        beside = _beside(directions * split, own.params, extras, keys)
        if own.scale is not None:
            beside["scale"] = own.scale
        of_layer = _OfLayer(initial, reset, marks, cuts.active, cuts.fresh, beside)
        run_layer = _recurrent if own.weight_hr is None else _projected
        y, c, final = run_layer(stack.cell, x_gates, own, of_layer, recurrence)
        finals.append([_heads_together(s, split) for s in final])
    return Result(y, c, _all_layers(finals))


def _all_layers(finals: Sequence[list[Tensor]]) -> list[Tensor]:
    """The states of each layer as those of the stack."""
    return finals[0] if len(finals) == 1 else [torch.cat(s) for s in zip(*finals, strict=True)]


def _input_half(cell: str, y: Tensor, own: _Weights) -> Tensor:
    """Of the gates, [T, B, D, X*H]: both directions read the same rows, so that one GEMM makes the gates of both."""
    of, weight, bias = CELLS[cell], own.weight_ih, own.bias_ih
    direct = None if bias is None or of.normalised else bias.flatten()
    gates = F.linear(y, weight.flatten(0, 1), direct).unflatten(-1, (weight.size(0), -1))
    if not of.normalised:
        return gates
    assert own.params is not None
    gain = own.params[:, : of.gates].flatten(1)  # weight_ln_ih
    normal = F.layer_norm(gates, gates.shape[-1:], eps=LAYER_NORM_EPS) * gain
    return (normal if bias is None else normal + bias).to(gates.dtype)


def _in_chunks(given: _Given, chunk: int) -> Result:
    """The layers one after the other, each in chunks of time; where nothing happens between them and none keeps more
    than its states now and then, the chunks one after the other, each through all layers."""
    stack, y, _, states, cuts, marks, _ = given
    between = stack.directions > 1 or stack.dropout > 0
    together = 1 if between or stack.save != "checkpoint" else stack.num_layers
    c, finals = None, []
    for layer in range(0, stack.num_layers, together):
        y = y if layer == 0 else given.as_read(y)
        if layer > 0 and stack.dropout > 0:
            y = F.dropout(y, stack.dropout)
        rows = slice(layer * stack.directions, (layer + together) * stack.directions)
        tensors: list[Tensor] = []
        for i in range(layer, layer + together):
            own = _weights_of(given, i).by_head(stack.heads)
            for weight, bias in ((own.weight_ih, own.bias_ih), (own.weight_hh, own.bias_hh)):
                tensors += [weight, weight.new_zeros(weight.shape[:2]) if bias is None else bias]
            tensors += [] if own.params is None else [own.params]
        initial, reset, extras = (
            [_by_head(t[rows], stack.heads) for t in of] for of in (states, cuts.reset, cuts.extras)
        )
        beside = _beside(stack.directions * stack.heads, None, extras, _keys_of(stack, cuts, rows, stack.heads))
        how = stack.save, stack.precision, chunk, marks, reset, stack.return_c, stack.cell_dtype
        y, c, final = time_chunks.recurrent(stack.cell, y, tensors, initial, *how, heads=stack.heads, **beside)
        finals.append([_heads_together(s, stack.heads) for s in final])
    return Result(y, c, _all_layers(finals))


def _weights_of(given: _Given, layer: int) -> _Weights:
    stack, weights = given.call, given.weights
    each = len(weights) // (stack.num_layers * stack.directions)
    first, last = layer * stack.directions * each, (layer + 1) * stack.directions * each
    kinds = [weights[first + k : last : each] for k in range(each)]
    if stack.directions > 1 and given.kernels and not (stack.backward or autograd.transformed()):
        # All at once: one launch. It has no tangents, which the loop over the steps may be asked for.
        made = [kind[0].new_empty(len(kind), *kind[0].shape) for kind in kinds]
        torch._foreach_copy_([own for both in made for own in both], [own for kind in kinds for own in kind])
    else:
        made = [_side_by_side(kind) for kind in kinds]
    weight_ih, weight_hh, *others = made
    bias_ih, bias_hh = others[:2] if stack.bias else (None, None)
    weight_hr = others.pop() if stack.proj_size else None
    own = [w.unflatten(1, (-1, stack.hidden_size)) for w in others[2 * stack.bias :]]
    return _Weights(weight_ih, weight_hh, bias_ih, bias_hh, torch.cat(own, dim=1) if own else None, weight_hr)


def _keys_of(stack: Call, cuts: Cuts, rows: slice, split: int) -> Tensor | None:
    return None if cuts.keys is None else masks.by_head(cuts.keys[rows], split, stack.hidden_size // split)


def _beside(directions: int, params: Tensor | None, extras: Sequence[Tensor], keys: Tensor | None) -> dict[str, Any]:
    """What only some cells take, by name. extras: each [L*D, T, B, H], or keys [L*D, E, fields]; of a stack of more
    layers D is 1."""
    given: dict[str, Any] = {} if params is None else {"params": params}
    if keys is not None:
        given["extras"] = keys.unflatten(0, (-1, directions))
    if extras:
        sides = torch.stack(list(extras), dim=-2).unflatten(0, (-1, directions))
        given["extras"] = sides.movedim(1, 3).contiguous()
    return given


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """The directions' weights as one contiguous tensor [D, ...], without a copy where D is 1."""
    return weights[0].contiguous().unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))


def _projected(cell: str, x_gates: Tensor, own: _Weights, given: _OfLayer, recurrence: Recurrence) -> Result:
    """One layer with projections. weight_hh: [D, 4*H, P]; weight_hr: [D, P, H]."""
    weight_hh, weight_hr = own.weight_hh, own.weight_hr
    assert weight_hr is not None
    (h0, c0), H = given.states, weight_hr.size(-1)
    active = x_gates.new_ones(x_gates.shape[:2], dtype=torch.bool) if given.active is None else given.active
    first = step_marks.first_steps(active, x_gates.size(2))
    sources = [] if given.fresh else [(h0, first if given.marks is None else first & (given.marks == 0))]
    if given.marks is not None:
        sources += [(h, given.marks == step_marks.BEGINS) for h in given.reset[:1]]
    for h, where in sources:
        used = torch.where(where.any(0).mT.unsqueeze(-1), h, 0.0)  # what no step reads may be NaN
        x_gates = x_gates + torch.where(where.unsqueeze(-1), (used @ weight_hh.mT).transpose(0, 1), 0.0)
    nothing = h0.new_zeros(*h0.shape[:2], H)
    # Another tensor of zeros: dynamo refuses the same one twice.
    reset = (torch.zeros_like(nothing), *given.reset[1:]) if given.reset else ()
    inner = given._replace(states=(nothing, c0), reset=reset)
    s, c, (s_n, c_n) = _recurrent(cell, x_gates, own._replace(weight_hh=weight_hh @ weight_hr), inner, recurrence)
    y = torch.cat([F.linear(part, w) for part, w in zip(s.split(H, dim=-1), weight_hr, strict=True)], dim=-1)
    h_n = torch.stack([F.linear(s, w) for s, w in zip(s_n, weight_hr, strict=True)])  # its gradient is contiguous
    if given.active is not None:
        h_n = torch.where(given.active.any(0).unsqueeze(-1), h_n, h0)
    return Result(y, c, [h_n, c_n])


def _recurrent(cell: str, x_gates: Tensor, own: _Weights, given: _OfLayer, recurrence: Recurrence) -> Result:
    if x_gates.size(1) > 0:
        how = {"marks": given.marks, "reset": given.reset, **given.beside}
        return recurrence(cell, x_gates, own.weight_hh, own.bias_hh, given.states, **how)
    # Without a row there is nothing to launch: one step of the reference gives every shape and, as torch.nn does, a
    # gradient of zeros to every weight.
    assert own.bias_hh is not None
    y, c, finals = reference.recurrent(cell, x_gates[:1], own.weight_hh, own.bias_hh, given.states, **given.beside)
    steps = x_gates.size(0)
    return Result(y.expand(steps, -1, -1), None if c is None else c.expand(steps, -1, -1), finals)
