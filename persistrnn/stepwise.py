"""The reference as operators, for torch.compile: one node whatever T is, where a traced loop would be a graph per T."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import reference
from persistrnn.decide import active_transforms, expects_backward
from persistrnn.kernels.cells import CELLS
from persistrnn.mapping import operator_by_gradients
from persistrnn.reference import Result
from persistrnn.torch_path import through_again, unaliased
from persistrnn.tracing import exporting_to_onnx, outside_of_graphs


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
    """`reference.recurrent`, as an operator where it is compiled; under a map or with tangents, for which an operator
    has no rule, the graph breaks."""
    if exporting_to_onnx():  # which has no such operator
        return reference.recurrent(cell, x_gates, weight_hh, bias_hh, initial, marks, reset, params, extras)
    if not torch.compiler.is_compiling() or active_transforms() in ("mapped", "forward"):
        return outside_of_graphs(
            reference.recurrent, cell, x_gates, weight_hh, bias_hh, initial, marks, reset, params, extras
        )
    own = [] if params is None else [params]
    tensors = [x_gates, weight_hh, bias_hh, *own, *initial, *reset]
    apply = _Stepwise.apply if expects_backward(tensors) else _forward
    y, *others = apply(cell, marks, extras, *tensors)
    n = CELLS[cell].states
    return Result(y, others[n] if n > 1 else None, list(others[:n]))


def _states(cell: str) -> slice:
    """Where the initial states are in ``tensors``."""
    first = 4 if CELLS[cell].params else 3
    return slice(first, first + CELLS[cell].states)


def _run(cell: str, marks: Tensor | None, extras: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    where = _states(cell)
    params = tensors[3] if CELLS[cell].params else None
    x_gates, weight_hh, bias_hh = tensors[:3]
    states = tensors[where], marks, tensors[where.stop :]
    y, c, finals = reference.recurrent(cell, x_gates, weight_hh, bias_hh, *states, params, extras)
    return [y, *finals, *([] if c is None else [c])]


@torch.library.custom_op("persistrnn::stepwise", mutates_args=())
def forward(cell: str, marks: Tensor | None, extras: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """[y, the final states, every second state where there is one]. tensors: x_gates, weight_hh, bias_hh, the cell's
    parameters if it has such, the initial states, the reset states."""
    return unaliased(_run(cell, marks, extras, tensors), tensors)


@forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, _, tensors = arguments
    steps, batch, directions, _ = tensors[0].shape
    initial = tensors[_states(cell)]
    y, *c = (s.new_empty(steps, batch, directions * s.shape[-1]) for s in initial[:2])
    return [y, *(s.new_empty(s.shape) for s in initial), *c]


def _forward(cell: str, marks: Tensor | None, extras: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    found: list[Tensor] = forward(cell, marks, extras, list(tensors))
    return found


@torch.library.custom_op("persistrnn::stepwise_backward", mutates_args=())
def backward(
    cell: str, marks: Tensor | None, extras: Tensor | None, tensors: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """Of ``forward``, as ``through_again``."""
    return through_again(functools.partial(_run, cell, marks, extras), tensors, grads)


operator_by_gradients(backward)


class _Stepwise(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        marks, extras, *tensors = ctx.saved_tensors
        return None, None, None, *backward(ctx.cell, marks, extras, tensors, list(grads))
