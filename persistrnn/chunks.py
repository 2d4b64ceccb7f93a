"""Layers run in chunks of time, each a launch of its own: input GEMM, scan, and in the backward what was not kept.

So x's half of the gates, its gradient and all that is computed again take the memory of one chunk, whatever T is. What
the forward keeps is one of ``kernels.memory``'s modes. The results are those of one launch over all steps: c goes from
chunk to chunk in float32, as within a launch, and so do the gradients of h and c. Only the GRU's h, which is float32
within a launch too, is rounded to the output's dtype at each chunk.

The k-th chunk of the second direction is the k-th from the end, so that both directions stay in one launch: a chunk's
tensors [T', B, D, ...] hold different times in each direction, and are cut out of the whole ones.

An operator holds the loop, for torch.compile: one graph for every T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import autograd, ops, segments
from persistrnn.kernels.cells import CELLS
from persistrnn.phases import INPUT_GEMM, RECOMPUTE, SCAN_BACKWARD, SCAN_FORWARD, WEIGHT_GEMMS, phase


class Layer(NamedTuple):
    """weight_ih [D, G*H, I], bias_ih [D, G*H], weight_hh [D, G*H, H], bias_hh [D, G*H]."""

    weight_ih: Tensor
    bias_ih: Tensor
    weight_hh: Tensor
    bias_hh: Tensor


class _Chunk(NamedTuple):
    """Steps [first, last) of T, counted from the end in the second direction."""

    first: int
    last: int
    steps: int

    def slices(self, directions: int) -> list[slice]:
        return [slice(self.first, self.last), slice(self.steps - self.last, self.steps - self.first)][:directions]

    def of(self, whole: Tensor) -> Tensor:
        """The chunk [T', B, D, ...] of [T, B, D, ...]; of one direction a view."""
        if whole.size(2) == 1:
            return whole[self.first : self.last]
        return torch.stack([whole[s, :, d] for d, s in enumerate(self.slices(2))], dim=2)

    def put(self, part: Tensor, whole: Tensor) -> None:
        for d, s in enumerate(self.slices(whole.size(2))):
            whole[s, :, d].copy_(part[:, :, d])


def cut(steps: int, chunk: int) -> Iterator[_Chunk]:
    return (_Chunk(first, min(first + chunk, steps), steps) for first in range(0, steps, chunk))


# ---- the forward ----------------------------------------------------------------------------------------------------


def layers_of(weights: Sequence[Tensor]) -> list[Layer]:
    return [Layer(*(w.contiguous() for w in weights[i : i + 4])) for i in range(0, len(weights), 4)]


def gates_of(inputs: Sequence[Tensor], layer: Layer) -> Tensor:
    """Input half of the gates [T', B, D, G*H], of [T', B, I] for each direction."""
    with phase(INPUT_GEMM):
        parts = [F.linear(x, w, b) for x, w, b in zip(inputs, layer.weight_ih, layer.bias_ih, strict=True)]
        return parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, dim=2)


class _Scan(NamedTuple):
    """A layer over a chunk: y [T' + 2, B, D, H], c the same (or few slots), and saved."""

    y: Tensor
    c: Tensor
    saved: Tensor


def _scan(
    cell: str,
    precision: str,
    x_gates: Tensor,
    layer: Layer,
    states: Sequence[Tensor],
    marks: Tensor | None,
    reset: Sequence[Tensor],
    every_c: bool,
    save: bool,
    into: Tensor | None = None,
) -> _Scan:
    with phase(SCAN_FORWARD):
        given = x_gates, layer.weight_hh, layer.bias_hh, states, marks, reset
        return _Scan(*ops.scan_chunk(cell, precision, *given, every_c, save, into))


def _after(states: Tensor, every: bool = True) -> Tensor:
    """The state after a chunk's last step in each direction, [D, B, H]: of those of all steps, or of a few slots."""
    return torch.stack([states[-2 if every and d == 0 else 1, :, d] for d in range(states.size(2))])


def _to_next(scan: _Scan, marks: Tensor | None) -> Tensor:
    """What the next layer of a stack, which has one direction, reads: [T', B, H]."""
    return segments.without_skipped(scan.y[1:-1].flatten(2), marks)


def by_layer(states: Sequence[Tensor], layers: int) -> list[list[Tensor]]:
    """Of each layer its states, each [D, B, H], of states [L*D, B, H]."""
    return [[s.unflatten(0, (layers, -1))[i] for s in states] for i in range(layers)]


def _named(
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """x, contiguous, h0, c0, marks, reset_h, reset_c."""
    x, h0, c0, marks, reset_h, reset_c = inputs
    assert x is not None
    assert h0 is not None
    return x.contiguous(), h0, c0, marks, reset_h, reset_c


@torch.library.custom_op("persistrnn::chunked_forward", mutates_args=())
def forward(
    cell: str,
    save: str,
    precision: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    keeps: bool,
    return_c: bool,
    inputs: list[Tensor | None],
    weights: list[Tensor],
) -> list[Tensor]:
    """[y, h_n, c_n, c, saved, h and c before each chunk], empty where there is none; without autograd.

    keeps: a backward follows. inputs: x, h0, c0, marks, reset_h, reset_c, shaped as for ``chunked.recurrent``.
    y, c: [T, B, D*H]; saved: [T, B, D, n, H]; h before: [T // chunk + 2, L*D, B, H], c in float32.
    """
    segments.check()
    x, h0, c0, marks, *resets = _named(inputs)
    layers, directions = layers_of(weights), weights[0].size(0)
    found = _new(cell, save, chunk, cell_dtype, keeps, return_c, inputs, weights)
    y, h_n, c_n, c, saved, *before = found
    saves = saved.numel() > 0
    states = by_layer([h0] if c0 is None else [h0, c0.float()], len(layers))
    reset = by_layer([r for r in resets if r is not None], len(layers))
    for whole in before:
        whole[-(-x.size(0) // chunk) :].zero_()  # what no chunk has is the same in every run
    for k, part in enumerate(cut(x.size(0), chunk)):
        marked = None if marks is None else part.of(marks).contiguous()
        into = part.of(saved) if saves and directions == 1 else None
        xs = [x[s] for s in part.slices(directions)]
        for i, layer in enumerate(layers):
            for whole, state in zip(before, states[i], strict=False):
                if whole.numel():
                    whole[k].unflatten(0, (len(layers), -1))[i].copy_(state)
            every_c = c.numel() > 0 and i == len(layers) - 1
            given = states[i], marked, reset[i], every_c, saves, into
            scan = _scan(cell, precision, gates_of(xs, layer), layer, *given)
            states[i] = [_after(scan.y), *([] if c0 is None else [_after(scan.c, every_c or saves)])]
            if i + 1 < len(layers):
                xs = [_to_next(scan, marked)]
        part.put(scan.y[1:-1], y.unflatten(2, (directions, -1)))
        if c.numel():
            part.put(scan.c[1:-1], c.unflatten(2, (directions, -1)))
        if saves and into is None:
            part.put(scan.saved, saved)
        del scan, xs  # else they live on while the next chunk's are made
    for final, of_layers in zip((h_n, c_n), zip(*states, strict=True), strict=False):
        final.copy_(torch.cat(of_layers))
    return found


@forward.register_fake
def _(cell: str, save: str, precision: str, chunk: int, *others: Any) -> list[Tensor]:
    return _new(cell, save, chunk, *others)


def _new(
    cell: str,
    save: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    keeps: bool,
    return_c: bool,
    inputs: list[Tensor | None],
    weights: list[Tensor],
) -> list[Tensor]:
    """The memory of the forward's results."""
    x, h0, c0, *_ = _named(inputs)
    directions = weights[0].size(0)
    (steps, batch, _), (rows, _, H) = x.shape, h0.shape
    has_c = c0 is not None
    every_c = has_c and (return_c or (keeps and save != "checkpoint"))
    before = steps // chunk + 2, rows, batch, H  # never one: a graph would hold a condition on T
    sizes: list[tuple[tuple[int, ...], bool, torch.dtype]] = [
        ((steps, batch, directions * H), True, x.dtype),
        ((rows, batch, H), True, x.dtype),
        ((rows, batch, H), has_c, x.dtype),
        ((steps, batch, directions * H), every_c, cell_dtype or x.dtype),
        ((steps, batch, directions, CELLS[cell].saved, H), keeps and save == "gates", x.dtype),
        (before, keeps and save == "checkpoint", x.dtype),
        (before, keeps and save == "checkpoint" and has_c, torch.float32),
    ]
    return [x.new_empty(size if there else (0,), dtype=dtype) for size, there, dtype in sizes]


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


def _saved(cell: str, x_gates: Tensor, layer: Layer, y: Tensor, marks: Tensor | None) -> Tensor:
    """What the scan saves, from y [T' + 2, B, D, H]."""
    before = torch.stack([autograd.h_before(y, marks, d).flatten(0, 1) for d in range(y.size(2))])
    return ops.gates_again(cell, x_gates, _product(before, layer.weight_hh.mT), layer.bias_hh)


def _with_edges(whole: Tensor, initial: Tensor, reset: Tensor | None, part: _Chunk) -> Tensor:
    """A chunk of the states of all steps [T, B, D, H], as a scan leaves it: [T' + 2, B, D, H]."""
    if part.first > 0:
        initial = torch.stack([whole[(part.first - 1, -part.first)[d], :, d] for d in range(whole.size(2))])
    return ops.with_edges(part.of(whole), initial, reset)


class _Totals:
    """Gradients of a layer's weights and biases, in float32, summed chunk by chunk."""

    def __init__(self, layer: Layer) -> None:
        self.weight_ih, self.bias_ih, self.weight_hh, self.bias_hh = (
            torch.zeros_like(w, dtype=torch.float32) for w in layer
        )

    def add(
        self, dx_gates: Tensor, dr_gates: Tensor, inputs: Sequence[Tensor], y: Tensor, marks: Tensor | None
    ) -> None:
        with phase(WEIGHT_GEMMS):
            for d, x in enumerate(inputs):
                dx, dr = (gates[:, :, d].flatten(0, 1) for gates in (dx_gates, dr_gates))
                self.weight_ih[d] += _product(dx.mT, x.flatten(0, 1))
                self.weight_hh[d] += _product(dr.mT, autograd.h_before(y, marks, d).flatten(0, 1))
                self.bias_ih[d] += _sum(dx)
                self.bias_hh[d] += _sum(dr)

    def rounded(self, dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype) for t in (self.weight_ih, self.bias_ih, self.weight_hh, self.bias_hh)]


@torch.library.custom_op("persistrnn::chunked_backward", mutates_args=())
def backward(
    cell: str,
    save: str,
    precision: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    needs_x: bool,
    resets: bool,
    grads: list[Tensor | None],
    inputs: list[Tensor | None],
    kept: list[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    """Gradients of [x, h0, c0, reset_h, reset_c, *weights], empty where there is none or nobody asked.

    grads: of y, c, h_n and c_n. kept: of the forward's results y, c, saved, and h and c before each chunk.
    """
    segments.check()
    x, h0, c0, marks, *reset_states = _named(inputs)
    (y, c, saved, *before), (dy, dc, *d_finals) = kept, grads
    saved, layers, directions = saved.contiguous(), layers_of(weights), weights[0].size(0)
    initial = [h0] if c0 is None else [h0, c0]
    n = len(initial)
    reset = by_layer([r for r in reset_states if r is not None], len(layers))
    d_states = by_layer([d.float() for d in d_finals if d is not None], len(layers))
    d_reset = [[torch.zeros_like(d) for d in of_layer] for of_layer in d_states]
    totals = [_Totals(layer) for layer in layers]
    dx = x.new_empty(x.shape if needs_x else 0)
    if directions > 1:
        dx.zero_()  # it is added to
    whole = [t.unflatten(2, (directions, -1)) if t.numel() else t for t in (y, c)[:n]]
    d_whole = [d.unflatten(2, (directions, -1)) for d in (dy, dc) if d is not None]
    for k, part in reversed(list(enumerate(cut(x.size(0), chunk)))):
        marked = None if marks is None else part.of(marks).contiguous()
        xs = [[x[s] for s in part.slices(directions)]]
        scans = []
        with phase(SCAN_BACKWARD if save == "gates" else RECOMPUTE):
            for i, layer in enumerate(layers):
                if save == "checkpoint":
                    states = [s[k].unflatten(0, (len(layers), -1))[i] for s in before[:n]]
                    x_gates = gates_of(xs[i], layer)
                    scan = _scan(cell, precision, x_gates, layer, states, marked, reset[i], True, True)
                    del x_gates  # it need not outlive the scan
                    scan = scan._replace(c=scan.c.to(cell_dtype or x.dtype))
                    if i + 1 < len(layers):
                        xs.append([_to_next(scan, marked)])
                else:
                    anew: Sequence[Tensor | None] = reset[i] or [None] * n
                    edges = zip(whole, initial, anew, strict=True)
                    states = [_with_edges(*edge, part) for edge in edges]
                    saved_part = (
                        part.of(saved)
                        if save == "gates"
                        else _saved(cell, gates_of(xs[i], layer), layer, states[0], marked)
                    )
                    scan = _Scan(states[0], states[1] if n > 1 else c, saved_part)
                    del states, saved_part
                scans.append(scan)
        outside = [part.of(d) for d in d_whole]
        del scan
        for i, layer in reversed(list(enumerate(layers))):
            scan = scans.pop()
            with phase(SCAN_BACKWARD):
                dx_gates, dr_gates, d_edges = ops.scan_chunk_backward(
                    cell, precision, outside, d_states[i], layer.weight_hh, *scan, marked, resets
                )
            d_states[i] = d_edges[:n]
            for total, new in zip(d_reset[i], d_edges[n:], strict=False):
                total += new
            totals[i].add(dx_gates, dr_gates, xs[i], scan.y, marked)
            with phase(INPUT_GEMM):
                if i > 0:
                    outside = [(dx_gates.squeeze(2) @ layer.weight_ih[0]).unsqueeze(2)]
                elif needs_x:
                    for d, s in enumerate(part.slices(directions)):
                        product = dx_gates[:, :, d].flatten(0, 1), layer.weight_ih[d]
                        dx[s].view(-1, x.size(2)).addmm_(*product, beta=directions - 1)
                        del product
            del scan, dx_gates, dr_gates, d_edges  # else they live on while the next ones are made
        del outside
    found = [x.new_empty(0) for _ in range(4)]
    for first, by_layers in ((0, d_states), (2, d_reset if resets else [])):
        for i, of_layers in enumerate(zip(*by_layers, strict=True)):
            found[first + i] = torch.cat(of_layers).to(x.dtype)
    return [dx, *found, *(d for total in totals for d in total.rounded(x.dtype))]


@backward.register_fake
def _(
    cell: str,
    save: str,
    precision: str,
    chunk: int,
    cell_dtype: torch.dtype | None,
    needs_x: bool,
    resets: bool,
    grads: list[Tensor | None],
    inputs: list[Tensor | None],
    kept: list[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    x, h0, c0, *_ = _named(inputs)
    has_c = c0 is not None
    four = [x.new_empty(h0.shape if there else (0,)) for there in (True, has_c, resets, resets and has_c)]
    return [x.new_empty(x.shape if needs_x else (0,)), *four, *(torch.empty_like(w) for w in weights)]
