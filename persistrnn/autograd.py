"""The derivatives of the operators: an ``autograd.Function`` for each, with ``setup_context`` and a vmap rule, so that
torch.func, torch.compile and torch.export work (``register_autograd`` would give silent zero tangents under
forward-mode AD). Everything elementwise or a GEMM (weight and bias gradients, final states) is plain torch around the
operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import ops
from persistrnn.ops import HAS_C

_ONCE = "the persistent kernels are differentiable once; a second derivative was asked for. Use backend='torch' for it."


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recurrence of one layer, all directions in one launch, on the persistent kernels.

    Args:
        cell: "lstm" (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000) or "gru" (Cho et al. 2014,
            reset after the matrix product).
        x_gates: [T, B, D, G*H], ``x @ W_ih^T + b_ih`` in torch's gate order. T, B >= 1.
        weight_hh: [D, G*H, H].
        bias_hh: [D, G*H].
        h0: [D, B, H].
        c0: [D, B, H] for the LSTM, else None.
        precision: of products in float32, "tf32" or "ieee".
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, D*H], h_n [D, B, H], and c_n [D, B, H] or None. Differentiable once, in every tensor argument,
        through every output.

    Raises:
        ValueError: the size does not fit the device.
        RuntimeError: an earlier launch gave up waiting (see ``check``).
    """
    tensors = (x_gates, weight_hh, bias_hh, h0, c0)
    y, h_n, c_n, *_ = _Scan.apply(cell, precision, _saves(tensors), *tensors)
    return y, h_n, c_n if HAS_C[cell] else None


def wave(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recurrence of a stack of L layers of one direction in one launch (``kernels.wave``).

    Args:
        cell, precision: as in ``recurrent``.
        x_gates: [T, B, G*H], input half of the lowest layer's gates, in torch's gate order. T, B >= 1.
        weight_hh: [L, G*H, H]; bias_hh: [L, G*H].
        weight_ih: [L - 1, G*H, H]; bias_ih: [L - 1, G*H], of the upper layers.
        h0: [L, B, H]; c0: [L, B, H] for the LSTM, else None.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, H] of the highest layer, h_n [L, B, H], and c_n [L, B, H] or None. Differentiable once, in every tensor
        argument, through every output.

    Raises:
        ValueError: the stack does not fit the device (``ops.waves`` says so beforehand).
        RuntimeError: an earlier launch gave up waiting (see ``ops.check``).
    """
    tensors = (x_gates, weight_hh, bias_hh, weight_ih, bias_ih, h0, c0)
    y, h_n, c_n, *_ = _Wave.apply(cell, precision, _saves(tensors), *tensors)
    return y, h_n, c_n if HAS_C[cell] else None


def _saves(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward may come. Under torch.func the wrapped tensors do not tell whether a gradient is asked for."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Scan(Function):
    """y, h_n, c_n, and what the backward needs: the operator's y, c and saved.

    Those three stay differentiable, so that a second derivative finds its way to an error instead of to zero.
    """

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        save: bool,
        x_gates: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        h0: Tensor,
        c0: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y, c, saved = ops.scan_forward(cell, precision, save, x_gates, weight_hh, bias_hh, h0, c0)
        D = x_gates.shape[2]
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        h_n = torch.stack([y[1 if d else -2, :, d] for d in range(D)])
        c_n = torch.stack([c[-2 if save and d == 0 else 1, :, d] for d in range(D)]) if HAS_C[cell] else c.clone()
        return y[1:-1].flatten(2), h_n, c_n, y, c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, precision, save, _, weight_hh, *_ = inputs
        _, _, c_n, y, c, saved = output
        ctx.cell, ctx.precision = cell, precision
        if save:
            ctx.save_for_backward(weight_hh, y, c, saved)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            # Dynamo hands a gradient of every differentiable output to the backward; AOTAutograd itself refuses a
            # second derivative.
            ctx.mark_non_differentiable(y, c, saved, *(() if HAS_C[cell] else (c_n,)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and any(g is not None for g in grads[3:]):
            raise NotImplementedError(_ONCE)  # only a second derivative reaches what the backward keeps
        weight_hh, y, c, saved = ctx.saved_tensors
        T = y.shape[0] - 2
        _, B, D, H = y.shape
        dy = y.new_zeros(T, B, D, H) if grads[0] is None else grads[0].unflatten(2, (D, H))
        dh_n = y.new_zeros(D, B, H) if grads[1] is None else grads[1]
        dc_n = None
        if HAS_C[ctx.cell]:
            dc_n = y.new_zeros(D, B, H) if grads[2] is None else grads[2]
        dx_gates, dr_gates, dh0, dc0 = _ScanBackward.apply(
            ctx.cell, ctx.precision, dy, dh_n, dc_n, weight_hh, y, c, saved
        )
        if HAS_C[ctx.cell]:
            dr_gates = dx_gates
        _, needs_weight, needs_bias = ctx.needs_input_grad[3:6]
        d_weight = d_bias = None
        if needs_weight:
            h_previous = [y[2:, :, 1] if d else y[:-2, :, 0] for d in range(D)]
            d_weight = torch.stack([dr_gates[:, :, d].flatten(0, 1).mT @ h_previous[d].flatten(0, 1) for d in range(D)])
        if needs_bias:
            d_bias = dr_gates.sum((0, 1), dtype=torch.float32).to(dr_gates.dtype)
        return None, None, None, dx_gates, d_weight, d_bias, dh0, dc0 if HAS_C[ctx.cell] else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, save: bool, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        dims = in_dims[3:]
        batch_axes = (1, None, None, 1, 1)  # where B is in x_gates, weight_hh, bias_hh, h0, c0
        if dims[1] is None and dims[2] is None:
            folded = [_fold(t, d, a, info.batch_size) for t, d, a in zip(tensors, dims, batch_axes, strict=True)]
            outputs = _Scan.apply(cell, precision, save, *folded)
            return _unfold(outputs, (1, 1, 1, 1, 1, 1), info.batch_size)
        # Every sample has weights of its own: one launch each.
        outputs = [_Scan.apply(cell, precision, save, *_sample(tensors, dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * 6


class _ScanBackward(Function):
    """Gradients with respect to the two halves of the gates and to the initial states."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        dy: Tensor,
        dh_n: Tensor,
        dc_n: Tensor | None,
        weight_hh: Tensor,
        y: Tensor,
        c: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, ...]:
        return ops.scan_backward(cell, precision, dy, dh_n, dc_n, weight_hh, y, c, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        dims = in_dims[2:]
        batch_axes = (1, 1, 1, None, 1, 1, 1)  # where B is in dy, dh_n, dc_n, weight_hh, y, c, saved
        if dims[3] is None:
            folded = [_fold(t, d, a, info.batch_size) for t, d, a in zip(tensors, dims, batch_axes, strict=True)]
            outputs = _ScanBackward.apply(cell, precision, *folded)
            return _unfold(outputs, (1, 1, 1, 1), info.batch_size)
        outputs = [_ScanBackward.apply(cell, precision, *_sample(tensors, dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * 4


class _Wave(Function):
    """y, h_n, c_n of a stack, and what the backward needs: the operator's y, c and saved."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        save: bool,
        x_gates: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        weight_ih: Tensor,
        bias_ih: Tensor,
        h0: Tensor,
        c0: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = weight_hh, bias_hh, weight_ih, bias_ih
        y, c, saved = ops.wave_forward(cell, precision, save, x_gates, *weights, h0, c0)
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        c_n = c[:, -2 if save else 1].clone() if HAS_C[cell] else c.clone()
        return y[-1, 1:-1].clone(), y[:, -2].clone(), c_n, y, c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, precision, save, _, weight_hh, _, weight_ih, *_ = inputs
        _, _, c_n, y, c, saved = output
        ctx.cell, ctx.precision = cell, precision
        if save:
            ctx.save_for_backward(weight_hh, weight_ih, y, c, saved)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(y, c, saved, *(() if HAS_C[cell] else (c_n,)))  # as in _Scan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and any(g is not None for g in grads[3:]):
            raise NotImplementedError(_ONCE)  # only a second derivative reaches what the backward keeps
        weight_hh, weight_ih, y, c, saved = ctx.saved_tensors
        L, _, B, H = y.shape
        dy = y.new_zeros(y.shape[1] - 2, B, H) if grads[0] is None else grads[0]
        dh_n = y.new_zeros(L, B, H) if grads[1] is None else grads[1]
        dc_n = None
        if HAS_C[ctx.cell]:
            dc_n = y.new_zeros(L, B, H) if grads[2] is None else grads[2]
        dx_gates, dr_gates, dh0, dc0 = _WaveBackward.apply(
            ctx.cell, ctx.precision, dy, dh_n, dc_n, weight_hh, weight_ih, y, c, saved
        )
        if HAS_C[ctx.cell]:
            dr_gates = dx_gates
        needs = ctx.needs_input_grad[4:8]
        d_weight_hh = _gemm(dr_gates, y[:, :-2]) if needs[0] else None
        d_bias_hh = _bias(dr_gates) if needs[1] else None
        d_weight_ih = _gemm(dx_gates[1:], y[:-1, 1:-1]) if needs[2] else None
        d_bias_ih = _bias(dx_gates[1:]) if needs[3] else None
        d_weights = d_weight_hh, d_bias_hh, d_weight_ih, d_bias_ih
        return None, None, None, dx_gates[0], *d_weights, dh0, dc0 if HAS_C[ctx.cell] else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, save: bool, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        dims = in_dims[3:]
        batch_axes = (1, None, None, None, None, 1, 1)  # where B is in x_gates, the weights and biases, h0, c0
        if all(d is None for d in dims[1:5]):
            folded = [_fold(t, d, a, info.batch_size) for t, d, a in zip(tensors, dims, batch_axes, strict=True)]
            return _unfold(_Wave.apply(cell, precision, save, *folded), (1, 1, 1, 2, 2, 2), info.batch_size)
        outputs = [_Wave.apply(cell, precision, save, *_sample(tensors, dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * 6


class _WaveBackward(Function):
    """Gradients with respect to the two halves of every layer's gates and to the initial states."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        dy: Tensor,
        dh_n: Tensor,
        dc_n: Tensor | None,
        weight_hh: Tensor,
        weight_ih: Tensor,
        y: Tensor,
        c: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, ...]:
        return ops.wave_backward(cell, precision, dy, dh_n, dc_n, weight_hh, weight_ih, y, c, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        dims = in_dims[2:]
        batch_axes = (1, 1, 1, None, None, 2, 2, 2)  # where B is in dy, dh_n, dc_n, the weights, y, c, saved
        if dims[3] is None and dims[4] is None:
            folded = [_fold(t, d, a, info.batch_size) for t, d, a in zip(tensors, dims, batch_axes, strict=True)]
            return _unfold(_WaveBackward.apply(cell, precision, *folded), (2, 2, 1, 1), info.batch_size)
        outputs = [_WaveBackward.apply(cell, precision, *_sample(tensors, dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * 4


def _gemm(d_gates: Tensor, operand: Tensor) -> Tensor:
    """Weight gradients [L, G*H, H] of d_gates [L, T, B, G*H] and operand [L, T, B, H]."""
    return d_gates.flatten(1, 2).mT @ operand.flatten(1, 2)


def _bias(d_gates: Tensor) -> Tensor:
    return d_gates.sum((1, 2), dtype=torch.float32).to(d_gates.dtype)


def _fold(tensor: Tensor | None, dim: int | None, axis: int | None, size: int) -> Tensor | None:
    """Make the mapped dimension part of the batch at ``axis``; a tensor that is not mapped repeats."""
    if tensor is None or axis is None:
        return tensor
    if tensor.dim() <= axis:
        return tensor if dim is None else tensor.select(dim, 0)  # the empty stand-in of a state that the cell has not
    mapped = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if mapped.dim() <= axis + 1:
        return mapped[0]
    return mapped.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(outputs: tuple[Tensor, ...], axes: tuple[int, ...], size: int) -> tuple[Any, Any]:
    """The inverse: split the batch at each output's axis; empty stand-ins are not mapped."""
    split = tuple(o.unflatten(a, (size, -1)) if o.dim() > a else o for o, a in zip(outputs, axes, strict=True))
    return split, tuple(a if o.dim() > a else None for o, a in zip(outputs, axes, strict=True))


def _sample(tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], i: int) -> list[Tensor | None]:
    return [t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
