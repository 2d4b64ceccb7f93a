"""The reference as operators, for torch.compile: one node whatever T is, where a traced loop would be a graph per T."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import reference
from persistrnn.decide import expects_backward
from persistrnn.torch_path import autograd_inside_an_operator, unaliased


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
    """`reference.recurrent`, as an operator where it is compiled."""
    if not torch.compiler.is_compiling():
        return reference.recurrent(cell, x_gates, weight_hh, bias_hh, h0, c0, marks, reset)
    tensors = [x_gates, weight_hh, bias_hh, h0, *([] if c0 is None else [c0]), *reset]
    fixed = cell, len(reset), marks
    y, h_n, *rest = _Stepwise.apply(*fixed, *tensors) if expects_backward(tensors) else forward(*fixed, tensors)
    return y, h_n, rest[0] if rest else None, rest[1] if rest else None


def _run(cell: str, resets: int, marks: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    x_gates, weight_hh, bias_hh, *states = tensors
    states, reset = states[: len(states) - resets], states[len(states) - resets :]
    c0 = states[1] if len(states) > 1 else None
    found = reference.recurrent(cell, x_gates, weight_hh, bias_hh, states[0], c0, marks, reset)
    return [t for t in found if t is not None]


@torch.library.custom_op("persistrnn::stepwise", mutates_args=())
def forward(cell: str, resets: int, marks: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """[y, h_n], of an LSTM also c_n and every c. tensors: x_gates, weight_hh, bias_hh, the states, the reset states."""
    return unaliased(_run(cell, resets, marks, tensors), tensors)


@forward.register_fake
def _(cell: str, resets: int, marks: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    steps, batch, directions, _ = tensors[0].shape
    h0 = tensors[3]
    y = h0.new_empty(steps, batch, directions * h0.shape[-1])
    found = [y, h0.new_empty(h0.shape)]
    if cell == "gru":
        return found
    c0 = tensors[4]
    return [*found, c0.new_empty(c0.shape), c0.new_empty(y.shape)]


@torch.library.custom_op("persistrnn::stepwise_backward", mutates_args=())
def backward(cell: str, resets: int, marks: Tensor | None, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of ``tensors``, given those of the forward's outputs. Runs the forward again."""
    with autograd_inside_an_operator():
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = _run(cell, resets, marks, leaves)
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    return unaliased(found, [*tensors, *grads])


@backward.register_fake
def _(cell: str, resets: int, marks: Tensor | None, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


class _Stepwise(Function):
    @staticmethod
    def forward(cell: str, resets: int, marks: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward(cell, resets, marks, list(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.resets, marks, *tensors = inputs
        ctx.save_for_backward(marks, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        marks, *tensors = ctx.saved_tensors
        return None, None, None, *backward(ctx.cell, ctx.resets, marks, tensors, list(grads))
