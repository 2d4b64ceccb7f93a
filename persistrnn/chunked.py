"""The derivatives of the operators in ``chunks``: as in ``autograd``, with ``setup_context`` and a vmap rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from persistrnn import autograd, chunks, segments
from persistrnn.chunks import by_layer, cut, gates_of, layers_of
from persistrnn.decide import expects_backward, inside_torch_func
from persistrnn.kernels.cells import CELLS
from persistrnn.mapping import each_sample, mapped


def recurrent(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    save: str,
    precision: str,
    chunk: int,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, or a stack of one direction, on the persistent kernels, in chunks of time.

    Args:
        cell: "lstm" or "gru".
        x: [T, B, I]. T, B >= 1.
        weights: of each layer weight_ih [D, G*H, I or H], bias_ih [D, G*H], weight_hh [D, G*H, H], bias_hh [D, G*H].
        h0: [L*D, B, H]; c0: the same for the LSTM, else None.
        save: "gates", "state" or "checkpoint" (``kernels.memory``); of a stack "checkpoint".
        precision: of products in float32, "tf32" or "ieee".
        chunk: steps of a chunk.
        marks: uint8 [T, B, D], where a row begins anew or skips a step (``segments``); None: nowhere.
        reset: the states that rows begin anew from, (h,) or (h, c), each [L*D, B, H]; empty: zeros.
        return_c: give out every c_t of the highest layer.
        cell_dtype: of the c that is stored for the backward and given out; None: that of x.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, D*H], h_n [L*D, B, H], c_n [L*D, B, H] or None, and with ``return_c`` c [T, B, D*H], else None.
        Differentiable in every floating argument, also twice (step by step, with the memory of all steps).

    Raises:
        ValueError: the size does not fit the device.
        RuntimeError: an earlier launch gave up waiting (see ``ops.check``).
    """
    reset_h, reset_c = (*reset, None, None)[:2]
    tensors = x, h0, c0, marks, reset_h, reset_c
    keeps = expects_backward((*tensors, *weights))
    how = cell, save, precision, chunk, cell_dtype, keeps, return_c
    if keeps or not torch.compiler.is_compiling():
        y, h_n, c_n, c, *_ = _Chunked.apply(*how, *tensors, *weights)
    else:  # without gradients dynamo calls no forward with a variable number of arguments
        y, h_n, c_n, c, *_ = chunks.forward(*how, list(tensors), list(weights))
    return y, h_n, c_n if CELLS[cell].states > 1 else None, c if return_c else None


def again_in_chunks(recurrence: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """A recurrence on torch's operations (`stepwise.recurrent`) that keeps its arguments and the state every ``chunk``
    steps, and runs the forward again between them."""

    def recurrent(
        cell: str,
        x_gates: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        marks: Tensor | None,
        reset: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # Compiled, it does so as a whole; torch.func has no hooks for what is saved.
        at_once = torch.compiler.is_compiling() or inside_torch_func()
        if at_once or not torch.is_grad_enabled():
            found: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
            found = recurrence(cell, x_gates, weight_hh, bias_hh, h0, c0, marks, reset)
            return found
        directions = x_gates.size(2)
        parts: list[tuple[Tensor, ...]] = []
        h, c = h0, c0
        for part in cut(x_gates.size(0), chunk):
            marked = None if marks is None else part.of(marks)
            given = part.of(x_gates), weight_hh, bias_hh, h, c, marked, reset
            y, h, c, every_c = checkpoint(recurrence, cell, *given, use_reentrant=False, preserve_rng_state=False)
            parts.append((y,) if every_c is None else (y, every_c))
        whole = []
        for tensors in zip(*parts, strict=True):
            halves = [[t.unflatten(2, (directions, -1))[:, :, d] for t in tensors] for d in range(directions)]
            whole.append(torch.cat([torch.cat(half[::-1] if d else half) for d, half in enumerate(halves)], dim=-1))
        return whole[0], h, c, whole[1] if c is not None else None

    return recurrent


class _Chunked(Function):
    """[y, h_n, c_n, c] and what the backward needs, which has no gradient of its own: a second derivative runs the
    layers anew."""

    @staticmethod
    def forward(
        cell: str,
        save: str,
        precision: str,
        chunk: int,
        cell_dtype: torch.dtype | None,
        keeps: bool,
        return_c: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        how = cell, save, precision, chunk, cell_dtype, keeps, return_c
        return tuple(chunks.forward(*how, list(tensors[:6]), list(tensors[6:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.save, ctx.precision, ctx.chunk, ctx.cell_dtype, keeps, ctx.return_c, *tensors = inputs
        y, _, c_n, c, saved, h_before, c_before = output
        if keeps:
            # The caller may let y go: it is kept only where it is read.
            kept = [t.new_empty(0) if ctx.save == "checkpoint" else t for t in (y, c)]
            ctx.save_for_backward(*tensors[:6], *kept, saved, h_before, c_before, *tensors[6:])
        ctx.set_materialize_grads(False)
        others: list[Tensor] = []
        if torch.compiler.is_compiling():  # dynamo hands a gradient of every differentiable output to the backward
            others = ([] if CELLS[ctx.cell].states > 1 else [c_n]) + ([] if ctx.return_c else [c])
        ctx.mark_non_differentiable(saved, h_before, c_before, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, c0, *others = ctx.saved_tensors
        has_c = c0 is not None
        dy, dh_n, dc_n, dc = grads[:4]
        if dy is None:
            directions = others[-1].size(0)  # of the last weight, a bias [D, G*H]
            dy = x.new_zeros(*x.shape[:2], directions * h0.size(2))
        if dh_n is None:
            dh_n = torch.zeros_like(h0)
        if has_c and dc_n is None:
            dc_n = torch.zeros_like(c0)
        needs = ctx.needs_input_grad[7:]
        resets = needs[4] or needs[5]
        how = ctx.cell, ctx.save, ctx.precision, ctx.chunk, ctx.cell_dtype, needs[0], resets
        given = dy, dc if ctx.return_c else None, dh_n, dc_n if has_c else None, x, h0, c0, *others
        if torch.compiler.is_compiling():  # as in ``recurrent``; AOTAutograd refuses a second derivative
            found = chunks.backward(*how, *_in_four(given))
        else:
            found = _ChunkedBackward.apply(*how, *given)
        asked = [d if need and d.numel() else None for d, need in zip(found[:3], needs[:3], strict=True)]
        anew = [d if need and d.numel() else None for d, need in zip(found[3:5], needs[4:6], strict=True)]
        return (*(None,) * 7, *asked, None, *anew, *found[5:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        fixed, tensors = arguments[:7], arguments[7:]
        # where B is in x, h0, c0, marks, reset_h, reset_c, and in the results
        axes = (1, 1, 1, 1, 1, 1, *(None,) * (len(tensors) - 6))
        return mapped(_Chunked, info, in_dims, fixed, tensors, axes, (1, 1, 1, 1, 1, 2, 2))


def _in_four(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The tensors of ``_ChunkedBackward`` as ``chunks.backward`` takes them: grads, inputs, kept, weights."""
    return list(tensors[:4]), list(tensors[4:10]), list(tensors[10:15]), list(tensors[15:])


class _ChunkedBackward(Function):
    """Gradients of [x, h0, c0, reset_h, reset_c, *weights]."""

    @staticmethod
    def forward(
        cell: str,
        save: str,
        precision: str,
        chunk: int,
        cell_dtype: torch.dtype | None,
        needs_x: bool,
        resets: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        how = cell, save, precision, chunk, cell_dtype, needs_x, resets
        return tuple(chunks.backward(*how, *_in_four(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, _, ctx.precision, _, ctx.cell_dtype, _, _, *tensors = inputs
        kept = range(10, 15)
        ctx.save_for_backward(*(None if i in kept else t for i, t in enumerate(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """All at once, as one launch per layer over all steps would have it: what was kept is made anew."""
        tensors = list(ctx.saved_tensors)
        inputs = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]
        outputs = [i for i, g in enumerate(grads) if g.numel()]

        def function(*given: Tensor) -> tuple[Tensor, ...]:
            for i, tensor in zip(inputs, given, strict=True):
                tensors[i] = tensor
            found = _first_derivative(ctx.cell, ctx.precision, ctx.cell_dtype, tensors)
            return tuple(found[i] for i in outputs)

        vjp = torch.func.vjp(function, *(tensors[i] for i in inputs))[1]
        result: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(inputs, vjp(tuple(grads[i] for i in outputs)), strict=True):
            result[i] = gradient
        return (*(None,) * 7, *result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return each_sample(_ChunkedBackward, info, in_dims, arguments[:7], arguments[7:])


def _first_derivative(
    cell: str, precision: str, cell_dtype: torch.dtype | None, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    """What ``chunks.backward`` computes, from its tensors and differentiable."""
    dy, dc, dh_n, dc_n, x, h0, c0, marks, reset_h, reset_c, *_ = tensors
    assert dy is not None
    places = x, h0, c0, reset_h, reset_c, *tensors[15:]

    def unchunked(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        y, *states = (next(left) for t in (x, h0, c0) if t is not None)
        reset = [next(left) for t in (reset_h, reset_c) if t is not None]
        layers = layers_of(list(left))
        finals = []
        for layer, initial, anew in zip(
            layers, by_layer(states, len(layers)), by_layer(reset, len(layers)), strict=True
        ):
            below = segments.without_skipped(y, marks)
            x_gates = gates_of([below] * layer.weight_ih.size(0), layer)
            c_initial = initial[1] if len(initial) > 1 else None
            arguments = x_gates, layer.weight_hh, layer.bias_hh, initial[0], c_initial
            y, h_n, c_n, c = autograd.recurrent(
                cell, *arguments, precision, marks, anew, return_c=dc is not None, cell_dtype=cell_dtype
            )
            finals.append([h_n] if c_n is None else [h_n, c_n])
        return (y, *(torch.cat(f) for f in zip(*finals, strict=True)), *([] if c is None else [c]))

    vjp = torch.func.vjp(unchunked, *(t for t in places if t is not None))[1]
    found = iter(vjp(tuple(d for d in (dy, dh_n, dc_n, dc) if d is not None)))
    return [dy.new_empty(0) if t is None else next(found) for t in places]
