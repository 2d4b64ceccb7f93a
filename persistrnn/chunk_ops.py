"""Layers run in chunks of time, each a launch of its own: input GEMM, scan, and in the backward what was not kept.

So x's half of the gates, its gradient and all that is computed again take the memory of one chunk, whatever T is. What
the forward keeps is one of ``kernels.planner.memory``'s modes. The results are those of one launch over all steps: c
goes from chunk to chunk in float32, as within a launch, and so do the gradients of the states. Only the GRU's h, which
is float32 within a launch too, is rounded to the output's dtype at each chunk.

The k-th chunk of the second direction is the k-th from the end, so that both directions stay in one launch: a chunk's
tensors [T', B, D, ...] hold different times in each direction, and are cut out of the whole ones.

An operator holds the loop, for torch.compile: one graph for every T. Its derivatives are in ``time_chunks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import autograd, masks, ops, step_marks
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.tensors import Gradients, Kept, Weights
from persistrnn.mapping import operator_by_samples
from persistrnn.phases import INPUT_GEMM, RECOMPUTE, SCAN_BACKWARD, WEIGHT_GEMMS, phase


class Layer(NamedTuple):
    """weight_ih [D, X*H, I], bias_ih [D, X*H], weight_hh [D, G*H, H], bias_hh [D, G*H], and params [D, P, H] if the
    cell has parameters per unit. D counts the heads of each direction, as in ``autograd.recurrent``."""

    weight_ih: Tensor
    bias_ih: Tensor
    weight_hh: Tensor
    bias_hh: Tensor
    params: Tensor | None = None

    @property
    def recurrent(self) -> Weights:
        return Weights(self.weight_hh, self.bias_hh, params=self.params)


class Inputs(NamedTuple):
    """What a forward takes, as ``recurrent``; flat, with as many reset as initial states: None if there are none."""

    x: Tensor
    marks: Tensor | None
    extras: Tensor | None
    initial: Sequence[Tensor]
    reset: Sequence[Tensor]
    weights: Sequence[Tensor]


class Outputs(NamedTuple):
    """What a forward gives.

    every: y [T, B, D*H] of the highest layer, and the other states if they are kept, or those given out. finals: each
    [L*D, B, H]. saved: one [T, B, D, n, H] if it is kept. before: the states before each chunk, [T // chunk + 2, L*D,
    B, H], those after h in float32, if they are kept.
    """

    every: Sequence[Any]
    finals: Sequence[Any]
    saved: Sequence[Any]
    before: Sequence[Any]


class BackwardInputs(NamedTuple):
    """What a backward takes. d_every: of y and the other states, None if they are not given out. kept: of ``Outputs``
    every and saved, or before, as the mode has it."""

    d_every: Sequence[Any]
    d_finals: Sequence[Tensor]
    inputs: Sequence[Any]
    kept: Sequence[Tensor]
    weights: Sequence[Tensor]


def inputs_of(cell: str, flat: Sequence[Any]) -> Inputs:
    x, marks, extras, *others = flat
    n = CELLS[cell].states
    return Inputs(x, marks, extras, others[:n], [r for r in others[n : 2 * n] if r is not None], others[2 * n :])


def inputs_without_weights(cell: str) -> int:
    """How many tensors of ``Inputs`` come before the weights."""
    return 3 + 2 * CELLS[cell].states


def outputs_of(cell: str, save: str, keeps: bool, return_c: bool, flat: Sequence[Any]) -> Outputs:
    n, m = CELLS[cell].states, whole_states(cell, save, keeps, return_c)
    k = m + n + (keeps and save == "gates")
    return Outputs(flat[:m], flat[m : m + n], flat[m + n : k], flat[k:])


def whole_states(cell: str, save: str, keeps: bool, return_c: bool) -> int:
    """Of how many states there is every step."""
    if keeps and save != "checkpoint":
        return CELLS[cell].states
    return CELLS[cell].given_out if return_c else 1


def backward_inputs_of(cell: str, save: str, flat: Sequence[Any]) -> BackwardInputs:
    n = CELLS[cell].states
    a = 2 * n
    b = a + inputs_without_weights(cell)
    c = b + n + (save == "gates")
    return BackwardInputs(flat[:n], flat[n:a], flat[a:b], flat[b:c], flat[c:])


class Chunk(NamedTuple):
    """Steps [first, last) of T, counted from the end in the second direction."""

    first: int
    last: int
    steps: int
    directions: int

    def slices(self, count: int) -> list[slice]:
        """Of the heads of all directions, of which there are ``count``."""
        both = slice(self.first, self.last), slice(self.steps - self.last, self.steps - self.first)
        return [both[d * self.directions // count] for d in range(count)]

    def of(self, whole: Tensor) -> Tensor:
        """The chunk [T', B, D, ...] of [T, B, D, ...]; of one direction a view."""
        if self.directions == 1:
            return whole[self.first : self.last]
        return torch.stack([whole[s, :, d] for d, s in enumerate(self.slices(whole.size(2)))], dim=2)

    def put(self, part: Tensor, whole: Tensor) -> None:
        for d, s in enumerate(self.slices(whole.size(2))):
            whole[s, :, d].copy_(part[:, :, d])


def cut(steps: int, chunk: int, directions: int) -> Iterator[Chunk]:
    return (Chunk(first, min(first + chunk, steps), steps, directions) for first in range(0, steps, chunk))


# ---- the forward ----------------------------------------------------------------------------------------------------


def layers_of(cell: str, weights: Sequence[Tensor]) -> list[Layer]:
    each = 5 if CELLS[cell].params else 4
    return [Layer(*(w.contiguous() for w in weights[i : i + each])) for i in range(0, len(weights), each)]


def extras_of(extras: Tensor | None, layer: int, part: Chunk) -> Tensor | None:
    """A layer's, in a chunk: [1, T', B, D, E, H], or keys [1, D, E, fields] of that."""
    if extras is None:
        return None
    if masks.are_keys(extras):
        return masks.later(extras[layer : layer + 1], [s.start for s in part.slices(extras.size(1))])
    return part.of(extras[layer]).contiguous().unsqueeze(0)


def gates_of(inputs: Sequence[Tensor], layer: Layer) -> Tensor:
    """Input half of the gates [T', B, D, X*H], of [T', B, I] for each direction, whose heads share it."""
    with phase(INPUT_GEMM):
        given = (w.unflatten(0, (len(inputs), -1)).flatten(1, 2) for w in (layer.weight_ih, layer.bias_ih))
        parts = [F.linear(x, w, b) for x, w, b in zip(inputs, *given, strict=True)]
        gates = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return gates.unflatten(-1, (layer.weight_ih.size(0), -1))


def _to_next(kept: Kept, marks: Tensor | None) -> Tensor:
    """What the next layer of a stack, which has one direction, reads: [T', B, H]."""
    return step_marks.without_skipped(kept.states[0][0, 1:-1].flatten(2), marks)


def by_layer(states: Sequence[Tensor], layers: int) -> list[list[Tensor]]:
    """Of each layer its states, each [D, B, H], of states [L*D, B, H]."""
    return [[s.unflatten(0, (layers, -1))[i] for s in states] for i in range(layers)]


@torch.library.custom_op("persistrnn::chunked_forward", mutates_args=())
def forward(
    cell: str,
    save: str,
    precision: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    keeps: bool,
    return_c: bool,
    heads: int,
    inputs: list[Tensor | None],
    weights: list[Tensor],
) -> list[Tensor]:
    """The tensors of ``Outputs`` from those of ``Inputs``, without autograd. keeps: a backward follows."""
    step_marks.check()
    flat = _new(cell, save, chunk, cell_dtype, keeps, return_c, heads, inputs, weights)
    found = outputs_of(cell, save, keeps, return_c, flat)
    x, marks, extras, initial, resets, _ = inputs_of(cell, inputs)
    x, layers, D = x.contiguous(), layers_of(cell, weights), weights[0].size(0)
    directions = D // heads
    states = by_layer([initial[0], *(s.float() for s in initial[1:])], len(layers))
    reset = by_layer(resets, len(layers))
    for whole in found.before:
        whole[-(-x.size(0) // chunk) :].zero_()  # what no chunk has is the same in every run
    for k, part in enumerate(cut(x.size(0), chunk, directions)):
        marked = None if marks is None else part.of(marks).contiguous()
        into = part.of(found.saved[0]).unsqueeze(0) if found.saved and directions == 1 else None
        xs = [x[s] for s in part.slices(directions)]
        for i, layer in enumerate(layers):
            for whole, state in zip(found.before, states[i], strict=False):
                whole[k].unflatten(0, (len(layers), -1))[i].copy_(state)
            highest = i == len(layers) - 1
            every, saves = highest and len(found.every) > 1, len(found.saved) > 0
            beside = layer.recurrent, marked, extras_of(extras, i, part), states[i], reset[i], into
            how = cell, precision, saves, every, torch.float32, heads
            kept = ops.run_forward(*how, gates_of(xs, layer), *beside)
            states[i] = list(kept.finals)
            if not highest:
                xs = [_to_next(kept, marked)]
        for whole, s in zip(found.every, kept.states, strict=False):
            part.put(s[0, 1:-1], whole.unflatten(2, (D, -1)))
        if into is None and kept.saved is not None:
            part.put(kept.saved[0], found.saved[0])
        del kept, xs, s  # else they live on while the next chunk's are made
    for final, of_layers in zip(found.finals, zip(*states, strict=True), strict=True):
        for own, state in zip(final.unflatten(0, (len(layers), -1)), of_layers, strict=True):
            own.copy_(state)
    return flat


@forward.register_fake
def _(cell: str, save: str, precision: str, chunk: int, *others: Any) -> list[Tensor]:
    return _new(cell, save, chunk, *others)


def _new(cell: str, save: str, chunk: int, *given: Any) -> list[Tensor]:
    """The memory of the forward's results, by its arguments but the precision."""
    cell_dtype, keeps, return_c, _, inputs, weights = given
    x, _, _, initial, *_ = inputs_of(cell, inputs)
    D, H = weights[0].size(0), initial[0].size(-1)
    steps, batch, _ = x.shape
    rest, others = len(initial) - 1, whole_states(cell, save, keeps, return_c) - 1
    found = [x.new_empty(steps, batch, D * H)]
    found += [x.new_empty(steps, batch, D * H, dtype=cell_dtype or x.dtype) for _ in range(others)]
    found += [x.new_empty(h.shape) for h in initial]
    if keeps and save == "gates":
        found.append(x.new_empty(steps, batch, D, CELLS[cell].saved, H))
    if keeps and save == "checkpoint":  # never one chunk: a graph would hold a condition on T
        dtypes = [x.dtype, *(torch.float32,) * rest]
        found += [x.new_empty(steps // chunk + 2, *h.shape, dtype=t) for h, t in zip(initial, dtypes, strict=True)]
    return found


# ---- the backward ---------------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, as products of 16-bit matrices are before they are rounded; of float32 as torch's products are,
    whatever the recurrence's precision."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        result: Tensor = (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
        return result
    return a.float() @ b.float()


def _sum(gates: Tensor) -> Tensor:
    return gates.sum(0, dtype=torch.float32)


def _with_edges(whole: Tensor, initial: Tensor, reset: Tensor | None, part: Chunk, heads: int) -> Tensor:
    """A chunk of the states of all steps [T, B, D, H], as a scan leaves it: [1, T' + 2, B, D, H]."""
    if part.first > 0:
        initial = torch.stack([whole[(part.first - 1, -part.first)[d // heads], :, d] for d in range(whole.size(2))])
    return ops.with_edges(part.of(whole), initial, reset, heads)


class _Totals:
    """Gradients of a layer's weights, biases and parameters, in float32, summed chunk by chunk."""

    def __init__(self, layer: Layer) -> None:
        self.params = layer.params
        self.sums = Layer(*(torch.zeros_like(w, dtype=torch.float32) for w in layer if w is not None))

    def add(
        self, cell: str, found: Gradients, inputs: Sequence[Tensor], kept: Kept, marks: Tensor | None,
        extras: Tensor | None, heads: int = 1,
    ) -> None:  # fmt: skip
        y, dr_gates = kept.states[0], found.dr_gates
        dx_gates = autograd.of_inputs(CELLS[cell], found.dx_gates)
        with phase(WEIGHT_GEMMS):
            if self.params is not None:
                assert self.sums.params is not None
                assert kept.saved is not None
                given = [found.dx_gates, dr_gates], [*kept.states, kept.saved], self.params, marks, extras
                self.sums.params.add_(autograd.param_gradients(cell, heads, *given))
            for d in range(y.size(3)):
                x = inputs[d // heads]
                dx, dr = (gates[0, :, :, d].flatten(0, 1) for gates in (dx_gates, dr_gates))
                self.sums.weight_ih[d] += _product(dx.mT, x.flatten(0, 1))
                self.sums.weight_hh[d] += _product(dr.mT, autograd.h_before(y, marks, d, heads).flatten(0, 2))
                self.sums.bias_ih[d] += _sum(dx)
                self.sums.bias_hh[d] += _sum(dr)

    def rounded(self, dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype) for t in self.sums if t is not None]


@torch.library.custom_op("persistrnn::chunked_backward", mutates_args=())
def backward(
    cell: str,
    save: str,
    precision: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    needs_x: bool,
    resets: bool,
    heads: int,
    tensors: list[Tensor | None],
) -> list[Tensor]:
    """Gradients of [x, *initial, *reset, *weights] from the tensors of ``BackwardInputs``, without those of x and of
    the reset states if nobody asked."""
    step_marks.check()
    d_every, d_finals, inputs, kept_before, weights = backward_inputs_of(cell, save, tensors)
    x, marks, extras, initial, reset_states, _ = inputs_of(cell, inputs)
    n, x, layers, D = len(initial), x.contiguous(), layers_of(cell, weights), weights[0].size(0)
    directions = D // heads
    reset = by_layer(reset_states, len(layers))
    d_states = by_layer([d.float() for d in d_finals], len(layers))
    d_reset = [[torch.zeros_like(d) for d in of_layer] for of_layer in d_states]
    totals = [_Totals(layer) for layer in layers]
    dx = x.new_empty(x.shape if needs_x else 0)
    if D > 1:
        dx.zero_()  # it is added to
    whole = [] if save == "checkpoint" else [t.unflatten(2, (D, -1)) for t in kept_before[:n]]
    all_saved = kept_before[n].contiguous() if save == "gates" else None
    d_whole = [d.unflatten(2, (D, -1)) for d in d_every if d is not None]
    for k, part in reversed(list(enumerate(cut(x.size(0), chunk, directions)))):
        marked = None if marks is None else part.of(marks).contiguous()
        xs = [[x[s] for s in part.slices(directions)]]
        scans = []
        with phase(SCAN_BACKWARD if save == "gates" else RECOMPUTE):
            for i, layer in enumerate(layers):
                beside = marked, extras_of(extras, i, part)
                if save == "checkpoint":
                    states = [s[k].unflatten(0, (len(layers), -1))[i] for s in kept_before]
                    how = cell, precision, True, True, torch.float32, heads
                    kept = ops.run_forward(*how, gates_of(xs[i], layer), layer.recurrent, *beside, states, reset[i])
                    y, *others = kept.states
                    kept = kept._replace(states=[y, *(s.to(cell_dtype or x.dtype) for s in others)])
                    del y, others
                    if i + 1 < len(layers):
                        xs.append([_to_next(kept, marked)])
                else:
                    anew: Sequence[Tensor | None] = reset[i] or [None] * n
                    states = [_with_edges(*edge, part, heads) for edge in zip(whole, initial, anew, strict=True)]
                    if all_saved is not None:
                        saved = part.of(all_saved).unsqueeze(0)
                    else:
                        x_gates = gates_of(xs[i], layer)
                        h = torch.stack(
                            [autograd.h_before(states[0], marked, d, heads).flatten(0, 2) for d in range(D)]
                        )
                        r_gates = _product(h, layer.weight_hh.mT)
                        saved = ops.gates_again(cell, x_gates, r_gates, layer.recurrent, states, *beside, heads)
                        del x_gates, h, r_gates
                    kept = Kept(states, saved)
                    del saved
                del states
                scans.append(kept)
        outside = [part.of(d) for d in d_whole]
        del kept
        for i, layer in reversed(list(enumerate(layers))):
            kept = scans.pop()
            beside = marked, extras_of(extras, i, part)
            given = layer.weight_hh, None, layer.params, *beside, kept, d_states[i], outside
            d = ops.run_backward(cell, precision, resets, heads, *given)
            d_states[i] = list(d.d_initial)
            for total, new in zip(d_reset[i], d.d_reset, strict=False):
                total += new
            totals[i].add(cell, d, xs[i], kept, *beside, heads)
            dx_gates = autograd.of_inputs(CELLS[cell], d.dx_gates)
            with phase(INPUT_GEMM):
                if i > 0:
                    below = dx_gates[0].flatten(2) @ layer.weight_ih.flatten(0, 1)
                    outside = [below.unflatten(2, (D, -1))]
                    del below
                elif needs_x:
                    for way, s in enumerate(part.slices(D)):
                        product = dx_gates[0, :, :, way].flatten(0, 1), layer.weight_ih[way]
                        dx[s].view(-1, x.size(2)).addmm_(*product, beta=min(D - 1, 1))
                        del product
            del kept, d, given, dx_gates  # else they live on while the next ones are made
        del outside
    found = [torch.cat(of_layers).to(x.dtype) for of_layers in zip(*d_states, strict=True)]
    if resets:
        found += [torch.cat(of_layers).to(x.dtype) for of_layers in zip(*d_reset, strict=True)]
    return [*([dx] if needs_x else []), *found, *(d for total in totals for d in total.rounded(x.dtype))]


operator_by_samples(backward)


@backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, save, _, _, _, needs_x, resets, _, tensors = arguments
    _, _, inputs, _, weights = backward_inputs_of(cell, save, tensors)
    given = inputs_of(cell, inputs)
    x, initial = given.x, list(given.initial)
    of = [*([x] if needs_x else []), *(initial * (2 if resets else 1)), *weights]
    return [x.new_empty(t.shape) for t in of]
