"""torch.func.vmap over a recurrence: the mapped dimension becomes part of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import _broadcast_to_and_flatten, tree_flatten, tree_unflatten


def mapped(
    apply: Callable[..., Any],
    info: Any,
    in_dims: Sequence[int | None],
    fixed: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    axes: Sequence[int | None],
    out_axes: Sequence[int],
) -> tuple[Any, Any]:
    """The vmap rule of what takes ``fixed`` and then ``tensors``, a Function's apply, say: outputs, and where they are
    mapped.

    axes: where the batch is in each tensor; None: it has none, as weights. out_axes: where it is in each output. If
    a tensor without a batch is mapped, every sample is a call of its own.
    """
    dims = in_dims[len(fixed) :]
    if all(d is None for d, a in zip(dims, axes, strict=True) if a is None):
        folded = [_fold(t, d, a, info.batch_size) for t, d, a in zip(tensors, dims, axes, strict=True)]
        outputs = apply(*fixed, *folded)
        return tuple(o.unflatten(a, (info.batch_size, -1)) for o, a in zip(outputs, out_axes, strict=True)), out_axes
    return each_sample(apply, info, in_dims, fixed, tensors)


def each_sample(
    apply: Callable[..., Any],
    info: Any,
    in_dims: Sequence[int | None],
    fixed: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Any, Any]:
    """The vmap rule of a Function whose outputs mix the rows of a batch, as gradients of weights do."""
    dims = in_dims[len(fixed) :]
    outputs = [apply(*fixed, *_sample(tensors, dims, i)) for i in range(info.batch_size)]
    stacked = tuple(torch.stack(o) for o in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def operator_by_samples(operator: Any) -> None:
    """Give an operator a vmap rule, for graphs, which have operators in place of Functions: every sample is a call."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        given, spec = tree_flatten(arguments)
        dims = _broadcast_to_and_flatten(in_dims, spec)
        assert dims is not None
        outputs = [operator(*tree_unflatten(_sample(given, dims, i), spec)) for i in range(info.batch_size)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return [torch.stack(o) for o in zip(*outputs, strict=True)], [0] * len(outputs[0])

    operator.register_vmap(rule)


def operator_by_gradients(operator: Any) -> None:
    """The same of a backward ``operator(*fixed, tensors, grads)``, which takes the gradients of N samples at once, in
    front, where ``tensors`` are those of all; and a fake. The first of the gradients is that of y, [T, B, H]."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        *fixed, tensors, grads = arguments
        of_tensors, of_grads = in_dims[-2:]
        if any(d is not None for dims in in_dims[:-1] for d in (dims if isinstance(dims, list) else [dims])):
            samples = [
                operator(*fixed, _sample(tensors, of_tensors, i), _sample(grads, of_grads, i))
                for i in range(info.batch_size)
            ]
            return [torch.stack(o) for o in zip(*samples, strict=True)], [0] * len(tensors)
        together = [
            g.unsqueeze(0).expand(info.batch_size, *g.shape) if d is None else g.movedim(d, 0)
            for g, d in zip(grads, of_grads, strict=True)
        ]
        return operator(*fixed, tensors, together), [0] * len(tensors)

    def fake(*arguments: Any) -> list[Tensor]:
        *_, tensors, grads = arguments
        return [t.new_empty(*grads[0].shape[:-3], *t.shape) for t in tensors]

    operator.register_vmap(rule)
    operator.register_fake(fake)


def below_the_map(
    call: Callable[[Any, list[Any], list[Tensor]], Sequence[Tensor]],
    input: Tensor,
    axis: int,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """``call(input, states, weights) -> [output, *states]`` of torch's own kernels, which have no vmap rule, below the
    innermost vmap, which maps no weight. axis: where the batch is in input and output; in the states it is 1."""
    from torch._functorch import pyfunctorch  # at hand wherever a transform is active

    interpreter: Any = pyfunctorch.retrieve_current_functorch_interpreter()
    level, size = interpreter.level(), interpreter.batch_size()
    axes = axis, *(1,) * len(states)
    unwrapped = [torch._C._functorch._unwrap_batched(t, level) for t in (input, *states)]
    with interpreter.lower():
        x, *initial = (_fold(t, d, a, size) for (t, d), a in zip(unwrapped, axes, strict=True))
        outputs = [o.unflatten(a, (size, -1)) for o, a in zip(call(x, initial, list(weights)), axes, strict=True)]
    return [torch._C._functorch._add_batch_dim(o, a, level) for o, a in zip(outputs, axes, strict=True)]


def _fold(tensor: Tensor | None, dim: int | None, axis: int | None, size: int) -> Tensor | None:
    """Make the mapped dimension part of the batch at ``axis``; a tensor that is not mapped repeats."""
    if tensor is None or axis is None:
        return tensor
    mapped = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.movedim(0, axis).flatten(axis, axis + 1)


def _sample(tensors: Sequence[Tensor | None], dims: Sequence[int | None], i: int) -> list[Tensor | None]:
    return [t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]


def batched(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A decorator of a Function's backward: ``torch.autograd.grad(is_grads_batched=True)`` hands it tensors of a vmap
    older than torch.func's, which has few rules and none for a Function; inside, they are torch.func's."""

    @functools.wraps(backward)
    def of_either(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        is_old = torch._C._functorch.is_legacy_batchedtensor
        if torch.compiler.is_compiling() or not any(g is not None and is_old(g) for g in grads):
            return backward(ctx, *grads)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        given = {i: g for i, g in enumerate(grads) if g is not None}
        old = {i: torch._remove_batch_dim(g, level, 0, 0) for i, g in given.items() if is_old(g)}
        places: list[int] = []

        def on_one(mine: dict[int, Tensor]) -> tuple[Tensor, ...]:
            found = backward(ctx, *((given | mine).get(i) for i in range(len(grads))))
            places[:] = [len(found), *(i for i, t in enumerate(found) if t is not None)]
            return tuple(t for t in found if t is not None)

        outputs = torch.func.vmap(on_one)(old)
        count, *positions = places
        results: list[Tensor | None] = [None] * count
        for i, t in zip(positions, outputs, strict=True):
            results[i] = torch._add_batch_dim(t, 0, level)
        return tuple(results)

    return of_either
