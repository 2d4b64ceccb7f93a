"""Layers in chunks of time: the derivatives of the operators in ``chunk_ops``, as in ``autograd``, with
``setup_context`` and a vmap rule; and the same for a loop over torch's operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from persistrnn import autograd, chunk_ops, double_backward, masks, step_marks
from persistrnn.chunk_ops import (
    backward_inputs_of,
    by_layer,
    cut,
    extras_of,
    gates_of,
    inputs_of,
    inputs_without_weights,
    layers_of,
    outputs_of,
    whole_states,
)
from persistrnn.decide import expects_backward, inside_torch_func
from persistrnn.kernels.cells import CELLS
from persistrnn.mapping import batched, each_sample, mapped
from persistrnn.reference import Result


def recurrent(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    initial: Sequence[Tensor],
    save: str,
    precision: str,
    chunk: int,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
) -> Result:
    """One layer, or a stack of one direction, on the persistent kernels, in chunks of time.

    Args:
        cell: its name in ``kernels.cells.CELLS``.
        x: [T, B, I]. T, B >= 1.
        weights: of each layer those of ``Layer``, with H for I in the upper ones.
        initial: the states, h first, each [L*D, B, H].
        save: "gates", "state" or "checkpoint" (``kernels.planner.memory``); of a stack "checkpoint".
        chunk: steps of a chunk.
        precision, marks, reset, return_c, cell_dtype, extras, heads: as of ``autograd.recurrent``; D counts all heads.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        As ``autograd.recurrent``, whose errors it raises, also twice differentiable (step by step, with the memory of
        all steps).
    """
    tensors = x, marks, extras, *initial, *(reset or (None,) * len(initial))
    keeps = expects_backward((*tensors, *weights))
    how = cell, save, precision, chunk, cell_dtype, keeps, return_c, heads
    if keeps or not torch.compiler.is_compiling():
        flat = _Chunked.apply(*how, *tensors, *weights)
    else:  # without gradients dynamo calls no Function with a variable number of arguments
        flat = chunk_ops.forward(*how, list(tensors), list(weights))
    found = outputs_of(cell, save, keeps, return_c, flat)
    return Result(found.every[0], found.every[1] if return_c else None, list(found.finals))


def again_in_chunks(recurrence: Callable[..., Result], chunk: int) -> Callable[..., Result]:
    """A recurrence on torch's operations (`stepwise.recurrent`) that keeps its arguments and the state every ``chunk``
    steps, and runs the forward again between them."""

    def recurrent(
        cell: str, x_gates: Tensor, weight_hh: Tensor, bias_hh: Tensor, initial: Sequence[Tensor],
        marks: Tensor | None, reset: Sequence[Tensor], params: Tensor | None = None, extras: Tensor | None = None,
    ) -> Result:  # fmt: skip
        # Compiled, it does so as a whole; torch.func has no hooks for what is saved.
        at_once = torch.compiler.is_compiling() or inside_torch_func()
        if at_once or not torch.is_grad_enabled():
            return recurrence(cell, x_gates, weight_hh, bias_hh, initial, marks, reset, params, extras)
        directions, states = x_gates.size(2), list(initial)
        parts: list[list[Tensor]] = []
        for part in cut(x_gates.size(0), chunk, directions):
            marked = None if marks is None else part.of(marks)
            given = part.of(x_gates), weight_hh, bias_hh, states, marked, reset, params, extras_of(extras, 0, part)
            y, c, states = checkpoint(recurrence, cell, *given, use_reentrant=False, preserve_rng_state=False)
            parts.append([y] if c is None else [y, c])
        whole = []
        for tensors in zip(*parts, strict=True):
            halves = [[t.unflatten(2, (directions, -1))[:, :, d] for t in tensors] for d in range(directions)]
            whole.append(torch.cat([torch.cat(half[::-1] if d else half) for d, half in enumerate(halves)], dim=-1))
        return Result(whole[0], whole[1] if len(whole) > 1 else None, states)

    return recurrent


class _Chunked(Function):
    """The tensors of ``Inputs`` to those of ``Outputs``. What is kept has no gradient of its own: a second derivative
    runs the layers anew."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        how, tensors = arguments[:8], arguments[8:]
        k = inputs_without_weights(arguments[0])
        return tuple(chunk_ops.forward(*how, list(tensors[:k]), list(tensors[k:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.save, ctx.precision, ctx.chunk, ctx.cell_dtype, keeps, ctx.return_c, ctx.heads, *tensors = inputs
        found, k = outputs_of(ctx.cell, ctx.save, keeps, ctx.return_c, output), inputs_without_weights(ctx.cell)
        if keeps:
            # The caller may let y go: it is kept only where it is read.
            kept = found.before if ctx.save == "checkpoint" else (*found.every, *found.saved)
            ctx.save_for_backward(*tensors[:k], *kept, *tensors[k:])
        ctx.set_materialize_grads(False)
        inside = found.every[CELLS[ctx.cell].given_out if ctx.return_c else 1 :]
        ctx.mark_non_differentiable(*inside, *found.saved, *found.before)

    @staticmethod
    @batched
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = CELLS[ctx.cell].states
        tensors = ctx.saved_tensors
        d = outputs_of(ctx.cell, ctx.save, True, ctx.return_c, grads)
        given = inputs_of(ctx.cell, tensors)
        x, initial = given.x, given.initial
        D = tensors[-1].size(0)  # of the last weight, a bias [D, G*H] or parameters [D, P, H]
        dy, *d_others = d.every[: CELLS[ctx.cell].given_out if ctx.return_c else 1]
        if dy is None:
            dy = x.new_zeros(*x.shape[:2], D * initial[0].size(2))
        d_every = [dy, *d_others, *(None,) * n][:n]
        d_finals = [torch.zeros_like(s) if g is None else g for g, s in zip(d.finals, initial, strict=True)]
        needs = ctx.needs_input_grad[8:]
        needs_x, resets = needs[0], any(needs[3 + n : 3 + 2 * n])
        how = ctx.cell, ctx.save, ctx.precision, ctx.chunk, ctx.cell_dtype, needs_x, resets, ctx.heads
        flat = *d_every, *d_finals, *tensors
        if torch.compiler.is_compiling():  # as in ``recurrent``; AOTAutograd refuses a second derivative
            found = list(chunk_ops.backward(*how, list(flat)))
        else:
            found = list(_ChunkedBackward.apply(*how, *flat))
        dx = found.pop(0) if needs_x else None
        d_initial, found = found[:n], found[n:]
        d_reset, d_weights = (found[:n], found[n:]) if resets else ([None] * n, found)
        return (*(None,) * 8, dx, None, None, *d_initial, *d_reset, *d_weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        (cell, save, _, _, _, keeps, return_c, _), tensors = arguments[:8], arguments[8:]
        k = inputs_without_weights(cell)
        if masks.are_keys(inputs_of(cell, tensors).extras):  # each sample has the rows of its own batch
            return each_sample(_Chunked.apply, info, in_dims, arguments[:8], tensors)
        # where B is in the tensors of Inputs and of Outputs
        axes = (1, 1, 2, *(1,) * (k - 3), *(None,) * (len(tensors) - k))
        n, m = CELLS[cell].states, whole_states(cell, save, keeps, return_c)
        out_axes = (*(1,) * (m + n), *((1,) if save == "gates" else (2,) * n if save == "checkpoint" else ()) * keeps)
        return mapped(_Chunked.apply, info, in_dims, arguments[:8], tensors, axes, out_axes)


class _ChunkedBackward(Function):
    """The tensors of ``BackwardInputs`` to gradients of [x, *initial, *reset, *weights]."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(chunk_ops.backward(*arguments[:8], list(arguments[8:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.save, ctx.precision, _, ctx.cell_dtype, ctx.needs_x, ctx.resets, ctx.heads, *tensors = inputs
        given = backward_inputs_of(ctx.cell, ctx.save, tensors)
        ctx.kept = len(given.kept)
        ctx.save_for_backward(*given.d_every, *given.d_finals, *given.inputs, *given.weights)

    @staticmethod
    @batched
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """All at once, as one launch per layer over all steps would have it: what was kept is made anew."""
        how = ctx.cell, ctx.precision, ctx.cell_dtype, ctx.needs_x, ctx.resets, ctx.heads
        found = double_backward.through(functools.partial(_first_derivative, *how), ctx.saved_tensors, grads)
        k = 2 * CELLS[ctx.cell].states + inputs_without_weights(ctx.cell)
        return (*(None,) * 8, *found[:k], *(None,) * ctx.kept, *found[k:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        autograd.refuse_tangents()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return each_sample(_ChunkedBackward.apply, info, in_dims, arguments[:8], arguments[8:])


def _first_derivative(
    cell: str,
    precision: str,
    cell_dtype: torch.dtype | None,
    needs_x: bool,
    resets: bool,
    heads: int,
    tensors: Sequence[Any],
) -> list[Tensor]:
    """What ``chunk_ops.backward`` computes, from its tensors but those that are kept, and differentiable."""
    n = CELLS[cell].states
    d_every, d_finals = [d for d in tensors[:n] if d is not None], tensors[n : 2 * n]
    x, marks, extras, initial, reset, weights = inputs_of(cell, tensors[2 * n :])

    def unchunked(y: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        layers = layers_of(cell, given[n + len(reset) :])
        states, anew = (by_layer(s, len(layers)) for s in (given[:n], given[n : n + len(reset)]))
        every, finals = [y], []
        for i, layer in enumerate(layers):
            below = step_marks.without_skipped(every[0], marks)
            x_gates = gates_of([below] * (layer.weight_ih.size(0) // heads), layer)
            found = autograd.recurrent(
                cell, x_gates, layer.weight_hh, layer.bias_hh, states[i], precision, marks, anew[i],
                return_c=len(d_every) > 1, cell_dtype=cell_dtype, params=layer.params,
                extras=None if extras is None else extras[i : i + 1], heads=heads,
            )  # fmt: skip
            every = [found.y] if found.c is None else [found.y, found.c]
            finals.append(found.finals)
        return (*every, *(torch.cat(f) for f in zip(*finals, strict=True)))

    vjp = torch.func.vjp(unchunked, x, *initial, *reset, *weights)[1]
    dx, *found = vjp((*d_every, *d_finals))
    states = found[: n + len(reset)]
    return [*([dx] if needs_x else []), *states[: 2 * n if resets else n], *found[len(states) :]]
