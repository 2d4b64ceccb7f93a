"""The derivatives of the operators: an ``autograd.Function`` for each, with ``setup_context`` and a vmap rule, so that
torch.func, torch.compile and torch.export work (``register_autograd`` would give silent zero tangents under
forward-mode AD). Everything elementwise or a GEMM (weight and bias gradients, final states) is plain torch around the
operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import double_backward, ops
from persistrnn.decide import expects_backward
from persistrnn.double_backward import NOTHING, Gradients, Kept
from persistrnn.kernels.cells import CELLS
from persistrnn.mapping import mapped
from persistrnn.phases import SCAN_BACKWARD, SCAN_FORWARD, WEIGHT_GEMMS, phase
from persistrnn.segments import BEGINS, SKIPPED, without_skipped


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    precision: str,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
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
        marks: uint8 [T, B, D], where a row begins anew or skips a step (``segments``); None: nowhere.
        reset: the states that rows begin anew from, (h,) or (h, c), each [D, B, H]; empty: zeros.
        return_c: give out every c_t.
        cell_dtype: of the c that is stored for the backward and given out; None: that of x_gates.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, D*H], h_n [D, B, H], c_n [D, B, H] or None, and with ``return_c`` c [T, B, D*H], else None.
        Where a row skips a step, y and c repeat. Differentiable in every floating argument, through every output
        (``second``).

    Raises:
        ValueError: the size does not fit the device.
        RuntimeError: an earlier launch gave up waiting (see ``check``).
    """
    reset_h, reset_c = (*reset, None, None)[:2]
    tensors = (x_gates, weight_hh, bias_hh, h0, c0, marks, reset_h, reset_c)
    y, h_n, c_n, c, *_ = _Scan.apply(cell, precision, expects_backward(tensors), return_c, cell_dtype, *tensors)
    return y, h_n, c_n if CELLS[cell].states > 1 else None, c if return_c else None


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
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The recurrence of a stack of L layers of one direction in one launch (``kernels.wave``).

    Args:
        cell, precision, return_c, cell_dtype: as in ``recurrent``.
        x_gates: [T, B, G*H], input half of the lowest layer's gates, in torch's gate order. T, B >= 1.
        weight_hh: [L, G*H, H]; bias_hh: [L, G*H].
        weight_ih: [L - 1, G*H, H]; bias_ih: [L - 1, G*H], of the upper layers.
        h0: [L, B, H]; c0: [L, B, H] for the LSTM, else None.
        marks: uint8 [T, B], the same for all layers; reset: (h,) or (h, c), each [L, B, H]; as in ``recurrent``.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, H] of the highest layer, h_n [L, B, H], c_n [L, B, H] or None, and c [T, B, H] of the highest layer
        with ``return_c``, else None. Differentiable in every floating argument, through every output (``second``).

    Raises:
        ValueError: the stack does not fit the device (``decide.pipeline_of`` says so beforehand).
        RuntimeError: an earlier launch gave up waiting (see ``ops.check``).
    """
    reset_h, reset_c = (*reset, None, None)[:2]
    tensors = (x_gates, weight_hh, bias_hh, weight_ih, bias_ih, h0, c0, marks, reset_h, reset_c)
    y, h_n, c_n, c, *_ = _Wave.apply(cell, precision, expects_backward(tensors), return_c, cell_dtype, *tensors)
    return y, h_n, c_n if CELLS[cell].states > 1 else None, c if return_c else None


class _Scan(Function):
    """y, h_n, c_n, every c where it is asked for, and what the backward needs: the operator's y, c and saved.

    Those three stay differentiable: through them a second derivative finds its way (``second``).
    """

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        save: bool,
        return_c: bool,
        cell_dtype: torch.dtype | None,
        x_gates: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        marks: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
    ) -> tuple[Tensor, ...]:
        given = x_gates, weight_hh, bias_hh, h0, c0, marks, reset_h, reset_c
        with phase(SCAN_FORWARD):
            y, c, saved = ops.scan_forward(cell, precision, save, *given, return_c, cell_dtype)
        D = x_gates.shape[2]
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        h_n = torch.stack([y[1 if d else -2, :, d] for d in range(D)])
        if CELLS[cell].states > 1:
            last = -2 if save or return_c else 1
            c_n = torch.stack([c[1 if d else last, :, d] for d in range(D)]).to(x_gates.dtype)
        else:
            c_n = c.clone()
        every = c[1:-1].flatten(2) if return_c else c.new_empty(0)
        return y[1:-1].flatten(2), h_n, c_n, every, y, c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, precision, save, return_c, _, _, weight_hh, *_, marks, _, _ = inputs
        _, _, c_n, every, y, c, saved = output
        ctx.cell, ctx.precision, ctx.return_c = cell, precision, return_c
        if save:
            ctx.save_for_backward(weight_hh, y, c, saved, marks)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            # Dynamo hands a gradient of every differentiable output to the backward; AOTAutograd itself refuses a
            # second derivative.
            others = (() if CELLS[cell].states > 1 else (c_n,)) + (() if return_c else (every,))
            ctx.mark_non_differentiable(y, c, saved, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, y, c, saved, marks = ctx.saved_tensors
        T = y.shape[0] - 2
        _, B, D, H = y.shape
        has_c = CELLS[ctx.cell].states > 1
        dy = y.new_zeros(T, B, D, H) if grads[0] is None else grads[0].unflatten(2, (D, H))
        # Dynamo hands a gradient to an output that has none, too.
        dc = grads[3].unflatten(2, (D, H)) if ctx.return_c and grads[3] is not None else None
        dh_n = y.new_zeros(D, B, H) if grads[1] is None else grads[1]
        dc_n = None
        if has_c:
            dc_n = y.new_zeros(D, B, H) if grads[2] is None else grads[2]
        needs_weight, needs_bias, *_, needs_h, needs_c = ctx.needs_input_grad[6:]
        resets = needs_h or needs_c
        given = dy, dc, dh_n, dc_n, weight_hh, y, c, saved, marks
        if _is_second(grads[4:]):
            found = _formula(ctx.cell, *given, d_kept=Kept(*grads[4:]))
            dx_gates, dr_gates, dh0, dc0, *d_reset = _six(found)
        else:
            dx_gates, dr_gates, dh0, dc0, *d_reset = _ScanBackward.apply(ctx.cell, ctx.precision, resets, *given)
        if has_c:
            dr_gates = dx_gates
        d_weight = d_bias = None
        with phase(WEIGHT_GEMMS):
            if needs_weight:
                h_previous = [h_before(y, marks, d).flatten(0, 1) for d in range(D)]
                d_weight = torch.stack([_gemm(dr_gates[:, :, d].flatten(0, 1), h_previous[d]) for d in range(D)])
            if needs_bias:
                d_bias = dr_gates.sum((0, 1), dtype=torch.float32).to(dr_gates.dtype)
        d_reset_h, d_reset_c = d_reset[0] if resets else None, d_reset[1] if resets and has_c else None
        d_weights = d_weight, d_bias
        return (*(None,) * 5, dx_gates, *d_weights, dh0, dc0 if has_c else None, None, d_reset_h, d_reset_c)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        cell: str,
        precision: str,
        save: bool,
        return_c: bool,
        cell_dtype: torch.dtype | None,
        *tensors: Tensor | None,
    ) -> tuple[Any, Any]:
        fixed = cell, precision, save, return_c, cell_dtype
        # where B is in x_gates, weight_hh, bias_hh, h0, c0, marks, reset_h, reset_c
        return mapped(_Scan, info, in_dims, fixed, tensors, (1, None, None, 1, 1, 1, 1, 1), (1,) * 7)


class _ScanBackward(Function):
    """Gradients with respect to the two halves of the gates, the initial states and, if ``resets``, the reset ones."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        resets: bool,
        dy: Tensor,
        dc: Tensor | None,
        dh_n: Tensor,
        dc_n: Tensor | None,
        weight_hh: Tensor,
        y: Tensor,
        c: Tensor,
        saved: Tensor,
        marks: Tensor | None,
    ) -> tuple[Tensor, ...]:
        given = dy, dh_n, dc_n, weight_hh, y, c, saved, dc
        with phase(SCAN_BACKWARD):
            return ops.scan_backward(cell, precision, *given, marks, resets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_again(ctx.cell, ctx.saved_tensors, grads)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, resets: bool, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        axes = (1, 1, 1, 1, None, 1, 1, 1, 1)  # where B is in dy, dc, dh_n, dc_n, weight_hh, y, c, saved, marks
        return mapped(_ScanBackward, info, in_dims, (cell, precision, resets), tensors, axes, (1,) * 6)


def h_before(y: Tensor, marks: Tensor | None, direction: int) -> Tensor:
    """The h [T, B, H] that each step of a direction went on from."""
    h, reset = (y[2:, :, 1], y[0, :, 1]) if direction else (y[:-2, :, 0], y[-1, :, 0])
    return h if marks is None else _chosen(marks[:, :, direction, None], reset, h)


class _Wave(Function):
    """y, h_n, c_n of a stack, every c of its highest layer where it is asked for, and what the backward needs: the
    operator's y, c and saved."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        save: bool,
        return_c: bool,
        cell_dtype: torch.dtype | None,
        x_gates: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        weight_ih: Tensor,
        bias_ih: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        marks: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = weight_hh, bias_hh, weight_ih, bias_ih
        given = x_gates, *weights, h0, c0, marks, reset_h, reset_c
        with phase(SCAN_FORWARD):
            y, c, saved = ops.wave_forward(cell, precision, save, *given, return_c, cell_dtype)
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        c_n = (c[:, -2 if save or return_c else 1] if CELLS[cell].states > 1 else c).clone().to(x_gates.dtype)
        every = c[-1, 1:-1].clone() if return_c else c.new_empty(0)
        return y[-1, 1:-1].clone(), y[:, -2].clone(), c_n, every, y, c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, precision, save, return_c, _, _, weight_hh, _, weight_ih, *_, marks, _, _ = inputs
        _, _, c_n, every, y, c, saved = output
        ctx.cell, ctx.precision, ctx.return_c = cell, precision, return_c
        if save:
            ctx.save_for_backward(weight_hh, weight_ih, y, c, saved, marks)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # as in _Scan
            others = (() if CELLS[cell].states > 1 else (c_n,)) + (() if return_c else (every,))
            ctx.mark_non_differentiable(y, c, saved, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, weight_ih, y, c, saved, marks = ctx.saved_tensors
        L, _, B, H = y.shape
        has_c = CELLS[ctx.cell].states > 1
        dy = y.new_zeros(y.shape[1] - 2, B, H) if grads[0] is None else grads[0]
        dh_n = y.new_zeros(L, B, H) if grads[1] is None else grads[1]
        dc_n = None
        if has_c:
            dc_n = y.new_zeros(L, B, H) if grads[2] is None else grads[2]
        *needs, _, _, _, needs_h, needs_c = ctx.needs_input_grad[6:]
        resets = needs_h or needs_c
        given = dy, grads[3] if ctx.return_c else None, dh_n, dc_n, weight_hh, weight_ih, y, c, saved, marks
        if _is_second(grads[4:]):
            found = _formula(ctx.cell, *given, d_kept=Kept(*grads[4:]))
            dx_gates, dr_gates, dh0, dc0, *d_reset = _six(found)
        else:
            dx_gates, dr_gates, dh0, dc0, *d_reset = _WaveBackward.apply(ctx.cell, ctx.precision, resets, *given)
        if has_c:
            dr_gates = dx_gates
        with phase(WEIGHT_GEMMS):
            d_weight_hh = _gemm(dr_gates.flatten(1, 2), _all_before(y, marks).flatten(1, 2)) if needs[0] else None
            d_bias_hh = _bias(dr_gates) if needs[1] else None
            below = without_skipped(y[:-1, 1:-1], None if marks is None else marks.unsqueeze(-1))
            d_weight_ih = _gemm(dx_gates[1:].flatten(1, 2), below.flatten(1, 2)) if needs[2] else None
            d_bias_ih = _bias(dx_gates[1:]) if needs[3] else None
        d_weights = d_weight_hh, d_bias_hh, d_weight_ih, d_bias_ih
        d_reset_h, d_reset_c = d_reset[0] if resets else None, d_reset[1] if resets and has_c else None
        return (*(None,) * 5, dx_gates[0], *d_weights, dh0, dc0 if has_c else None, None, d_reset_h, d_reset_c)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        cell: str,
        precision: str,
        save: bool,
        return_c: bool,
        cell_dtype: torch.dtype | None,
        *tensors: Tensor | None,
    ) -> tuple[Any, Any]:
        fixed = cell, precision, save, return_c, cell_dtype
        # where B is in x_gates, the weights and biases, h0, c0, marks, reset_h, reset_c
        axes = (1, None, None, None, None, 1, 1, 1, 1, 1)
        return mapped(_Wave, info, in_dims, fixed, tensors, axes, (1, 1, 1, 1, 2, 2, 2))


class _WaveBackward(Function):
    """Gradients with respect to the two halves of every layer's gates, the initial states and, if ``resets``, the reset
    states."""

    @staticmethod
    def forward(
        cell: str,
        precision: str,
        resets: bool,
        dy: Tensor,
        dc: Tensor | None,
        dh_n: Tensor,
        dc_n: Tensor | None,
        weight_hh: Tensor,
        weight_ih: Tensor,
        y: Tensor,
        c: Tensor,
        saved: Tensor,
        marks: Tensor | None,
    ) -> tuple[Tensor, ...]:
        given = dy, dh_n, dc_n, weight_hh, weight_ih, y, c, saved, dc
        with phase(SCAN_BACKWARD):
            return ops.wave_backward(cell, precision, *given, marks, resets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_again(ctx.cell, ctx.saved_tensors, grads)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], cell: str, precision: str, resets: bool, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        axes = (1, 1, 1, 1, None, None, 2, 2, 2, 1)  # where B is in dy, dc, dh_n, dc_n, the weights, y, c, saved, marks
        return mapped(_WaveBackward, info, in_dims, (cell, precision, resets), tensors, axes, (2, 2, 1, 1, 1, 1))


def _all_before(y: Tensor, marks: Tensor | None) -> Tensor:
    """The h [L, T, B, H] that each step of each layer went on from."""
    return y[:, :-2] if marks is None else _chosen(marks.unsqueeze(-1), y[:, -1:], y[:, :-2])


def _chosen(marks: Tensor, reset: Tensor, h: Tensor) -> Tensor:
    """What a product is formed with: nothing at a skipped step, where a NaN would be 0 * NaN in the gradient."""
    return torch.where(marks == SKIPPED, 0.0, torch.where(marks == BEGINS, reset, h))


def _formula(
    cell: str,
    dy: Tensor,
    dc: Tensor | None,
    dh_n: Tensor,
    dc_n: Tensor | None,
    *others: Tensor | None,
    d_kept: Kept = NOTHING,
) -> Gradients:
    """What the two backwards compute, differentiable: from their arguments, of which a stack's have two weights."""
    *weights, y, c, saved, marks = others
    formula: Callable[..., Gradients] = (
        double_backward.backward if len(weights) == 1 else double_backward.backward_of_stack
    )
    finals = [dh_n] if dc_n is None else [dh_n, dc_n]
    return formula(cell, *weights, marks, Kept(y, c, saved), (dy, dc), finals, d_kept)


def _six(found: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """dx_gates, dr_gates, and the gradients of h0, c0, reset_h and reset_c; None for what the cell has not."""
    c = [s[1] if len(s) > 1 else None for s in (found.d_initial, found.d_reset)]
    return found.dx_gates, found.dr_gates, found.d_initial[0], c[0], found.d_reset[0], c[1]


def _is_second(grads: Sequence[Tensor | None]) -> bool:
    """Whether a gradient came to what the forward kept: only a second derivative has one."""
    return not torch.compiler.is_compiling() and any(g is not None for g in grads)


def _again(cell: str, tensors: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a backward's arguments, given those of its six results."""
    # Cells with c do not read y, and torch.func.vjp cannot make the zeros of an argument that is not read where it is
    # nested.
    y = len(tensors) - 4
    read = (i for i in range(len(tensors)) if not (i == y and CELLS[cell].states > 1))
    inputs = [i for i in read if (t := tensors[i]) is not None and t.is_floating_point() and t.numel()]
    # dr_gates is dx_gates in cells with c, and empty.
    outputs = [i for i, g in enumerate(grads) if g.numel() and not (i == 1 and CELLS[cell].states > 1)]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        arguments: list[Any] = list(tensors)
        for i, tensor in zip(inputs, given, strict=True):
            arguments[i] = tensor
        found = _six(_formula(cell, *arguments))
        return tuple(t for i in outputs if (t := found[i]) is not None)

    vjp = torch.func.vjp(function, *(tensors[i] for i in inputs))[1]
    result: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(inputs, vjp(tuple(grads[i] for i in outputs)), strict=True):
        result[i] = gradient
    return result


def _gemm(d_gates: Tensor, operand: Tensor) -> Tensor:
    """A weight's gradient [..., G*H, H] of d_gates [..., T*B, G*H] and what it is multiplied by, [..., T*B, H]."""
    return d_gates.mT @ operand


def _bias(d_gates: Tensor) -> Tensor:
    return d_gates.sum((1, 2), dtype=torch.float32).to(d_gates.dtype)
