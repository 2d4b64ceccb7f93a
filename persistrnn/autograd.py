"""The derivatives of the operators: an ``autograd.Function`` for the forward and one for the backward, with
``setup_context`` and a vmap rule, so that torch.func, torch.compile and torch.export work (``register_autograd`` would
give silent zero tangents under forward-mode AD). Everything elementwise or a GEMM (weight and bias gradients, final
states) is plain torch around the operators.

Letters are those of ``kernels.tensors``. The Functions take and give flat tensors, in the order of the NamedTuples
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import double_backward, ops
from persistrnn.decide import expects_backward
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.tensors import Gradients, Weights
from persistrnn.mapping import mapped
from persistrnn.phases import SCAN_BACKWARD, SCAN_FORWARD, WEIGHT_GEMMS, phase
from persistrnn.reference import Result
from persistrnn.segments import BEGINS, SKIPPED, without_skipped


class Inputs(NamedTuple):
    """What a forward takes, as ``recurrent``."""

    x_gates: Tensor
    weights: Weights
    marks: Tensor | None
    initial: Sequence[Tensor]
    reset: Sequence[Tensor]


class Outputs(NamedTuple):
    """What a forward gives, or gradients of that.

    every: y [T, B, D*H] of the highest layer, and with return_c its other states. finals: each [L*D, B, H]. kept: what
    the backward needs, if one may come.
    """

    every: Sequence[Any]
    finals: Sequence[Any]
    kept: Sequence[Any]


class BackwardInputs(NamedTuple):
    """What a backward takes. d_outputs: [T, B, D, H], one or all of the states."""

    weight_hh: Tensor
    weight_ih: Tensor | None
    marks: Tensor | None
    kept: Sequence[Tensor]
    d_final: Sequence[Tensor]
    d_outputs: Sequence[Tensor]


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    initial: Sequence[Tensor],
    precision: str,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
) -> Result:
    """The recurrence of a layer, all directions in one launch, or of a stack of one direction in one launch, on the
    persistent kernels.

    Args:
        cell: "lstm" (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000) or "gru" (Cho et al. 2014,
            reset after the matrix product).
        x_gates: [T, B, D, G*H], ``x @ W_ih^T + b_ih`` of the lowest layer in torch's gate order. T, B >= 1.
        weight_hh: [L*D, G*H, H]; bias_hh: [L*D, G*H].
        initial: (h0, c0) of an LSTM, (h0,) of a GRU, each [L*D, B, H].
        precision: of products in float32, "tf32" or "ieee".
        marks: uint8 [T, B, D], where a row begins anew or skips a step (``segments``); None: nowhere.
        reset: the states that rows begin anew from, in the form of ``initial``; empty: zeros.
        return_c: give out every c_t of the highest layer.
        cell_dtype: of the c that is stored for the backward and given out; None: that of x_gates.
        weight_ih: [L - 1, G*H, H], bias_ih: [L - 1, G*H]: of the upper layers of a stack.
        All in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, D*H] of the highest layer, with ``return_c`` c [T, B, D*H], and the final states, each [L*D, B, H].
        Where a row skips a step, y and c repeat. Differentiable in every floating argument, through every output
        (``double_backward``).

    Raises:
        ValueError: the size does not fit the device.
        RuntimeError: an earlier launch gave up waiting (see ``ops.check``).
    """
    tensors = x_gates, weight_hh, bias_hh, weight_ih, bias_ih, marks, *initial, *reset
    save = expects_backward(tensors)
    # Without gradients dynamo calls no Function with a variable number of arguments.
    direct = torch.compiler.is_compiling() and not save
    flat = (_forward if direct else _Scan.apply)(cell, precision, save, return_c, cell_dtype, *tensors)
    (y, *c), finals, _ = _outputs(cell, return_c, flat)
    return Result(y, c[0] if c else None, list(finals))


def _inputs(cell: str, flat: Sequence[Any]) -> Inputs:
    x_gates, weight_hh, bias_hh, weight_ih, bias_ih, marks, *states = flat
    n = CELLS[cell].states
    return Inputs(x_gates, Weights(weight_hh, bias_hh, weight_ih, bias_ih), marks, states[:n], states[n:])


def _outputs(cell: str, return_c: bool, flat: Sequence[Any]) -> Outputs:
    n = CELLS[cell].states
    m = n if return_c else 1
    return Outputs(flat[:m], flat[m : m + n], flat[m + n :])


def _backward_inputs(cell: str, flat: Sequence[Any]) -> BackwardInputs:
    weight_hh, weight_ih, marks, *others = flat
    n = CELLS[cell].states
    return BackwardInputs(weight_hh, weight_ih, marks, others[: n + 1], others[n + 1 : 2 * n + 1], others[2 * n + 1 :])


def _forward(
    cell: str, precision: str, save: bool, return_c: bool, cell_dtype: torch.dtype | None, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    x_gates, weights, marks, initial, reset = _inputs(cell, tensors)
    given = [w for w in weights if w is not None]
    with phase(SCAN_FORWARD):
        kept = ops.scan_forward(
            cell, precision, save, return_c, cell_dtype, x_gates, given, marks, list(initial), list(reset)
        )
    n, stacked = CELLS[cell].states, weights.weight_ih is not None
    every = [s[-1, 1:-1].flatten(2) for s in kept[: n if return_c else 1]]
    if stacked:
        every = [s.clone() for s in every]  # else they would keep those of all layers alive
    finals = []
    for i, states in enumerate(kept[:n]):
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        last = -2 if i == 0 or save or return_c else 1
        rows = [states[:, 1 if d else last, :, d] for d in range(x_gates.shape[2])]
        finals.append(torch.cat(rows).to(x_gates.dtype))
    return (*every, *finals, *(kept if save else ()))


class _Scan(Function):
    """The tensors of ``Inputs`` to those of ``Outputs``. What is kept stays differentiable: through it a second
    derivative finds its way (``double_backward``)."""

    @staticmethod
    def forward(
        cell: str, precision: str, save: bool, return_c: bool, cell_dtype: torch.dtype | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return _forward(cell, precision, save, return_c, cell_dtype, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.precision, save, ctx.return_c, _, *tensors = inputs
        given, kept = _inputs(ctx.cell, tensors), _outputs(ctx.cell, ctx.return_c, output).kept
        if save:
            ctx.save_for_backward(given.weights.weight_hh, given.weights.weight_ih, given.marks, *kept)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            # Dynamo hands a gradient of every differentiable output to the backward; AOTAutograd itself refuses a
            # second derivative.
            ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell = CELLS[ctx.cell]
        weight_hh, weight_ih, marks, *kept = ctx.saved_tensors
        y, saved = kept[0], kept[-1]
        _, T, B, D, _, H = saved.shape
        d = _outputs(ctx.cell, ctx.return_c, grads)
        d_outputs = [None if g is None else g.unflatten(2, (D, H)) for g in d.every]
        while d_outputs[-1] is None and len(d_outputs) > 1:
            d_outputs.pop()
        d_outputs = [y.new_zeros(T, B, D, H) if g is None else g for g in d_outputs]
        d_final = [y.new_zeros(weight_hh.shape[0], B, H) if g is None else g for g in d.finals]
        needs = _inputs(ctx.cell, ctx.needs_input_grad[5:])
        resets = any(needs.reset)
        given = weight_hh, weight_ih, marks, *kept, *d_final, *d_outputs
        if _is_second(d.kept):
            found = _formula(ctx.cell, given, d.kept)
        else:
            # In a backward dynamo calls no Function with a variable number of arguments.
            scan = _backward if torch.compiler.is_compiling() else _ScanBackward.apply
            found = ops.gradients_of(ctx.cell, scan(ctx.cell, ctx.precision, resets, *given))
        d_weights: list[Tensor | None] = [None] * 4
        dr_gates = found.dr_gates if cell.recurrent_gradient else found.dx_gates
        with phase(WEIGHT_GEMMS):
            if needs.weights.weight_hh:
                d_weights[0] = _products(dr_gates, [h_before(y, marks, d) for d in range(D)])
            if needs.weights.bias_hh:
                d_weights[1] = _bias(dr_gates)
            if needs.weights.weight_ih:
                d_weights[2] = _products(found.dx_gates[1:], [without_skipped(y[:-1, 1:-1, :, 0], marks)])
            if needs.weights.bias_ih:
                d_weights[3] = _bias(found.dx_gates[1:])
        d_reset = found.d_reset if resets else [None] * len(needs.reset)
        return (*(None,) * 5, found.dx_gates[0], *d_weights, None, *found.d_initial, *d_reset)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        cell, save, return_c, tensors = arguments[0], arguments[2], arguments[3], arguments[5:]
        n = CELLS[cell].states
        # where B is in the tensors of Inputs, and of Outputs
        axes = (1, None, None, None, None, 1, *(1,) * (len(tensors) - 6))
        out_axes = (*(1,) * ((n if return_c else 1) + n), *(2,) * (n + 1 if save else 0))
        return mapped(_Scan, info, in_dims, arguments[:5], tensors, axes, out_axes)


def _backward(cell: str, precision: str, resets: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    weight_hh, weight_ih, marks, *others = _backward_inputs(cell, tensors)
    with phase(SCAN_BACKWARD):
        return tuple(ops.scan_backward(cell, precision, resets, weight_hh, weight_ih, marks, *map(list, others)))


class _ScanBackward(Function):
    """The tensors of ``BackwardInputs`` to those of ``Gradients``, of the reset states only if ``resets``."""

    @staticmethod
    def forward(cell: str, precision: str, resets: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _backward(cell, precision, resets, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, _, ctx.resets, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a backward's arguments, by the derivative of its formula."""
        cell = CELLS[ctx.cell]

        def formula(tensors: list[Any]) -> Sequence[Tensor]:
            found = _formula(ctx.cell, tensors)
            gates = (found.dx_gates, found.dr_gates) if cell.recurrent_gradient else (found.dx_gates,)
            return (*gates, *found.d_initial, *(found.d_reset if ctx.resets else ()))

        # Cells with c do not read y, and torch.func.vjp cannot make the zeros of what is not read where it is nested.
        unread = (3,) if cell.states > 1 else ()
        return (None, None, None, *double_backward.through(formula, ctx.saved_tensors, grads, unread))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        cell, tensors = CELLS[arguments[0]], arguments[3:]
        n = cell.states
        # where B is in the tensors of BackwardInputs, and of Gradients
        axes = (None, None, 1, *(2,) * (n + 1), *(1,) * (len(tensors) - n - 4))
        out_axes = (*(2,) * (1 + cell.recurrent_gradient), *(1,) * (2 * n if arguments[2] else n))
        return mapped(_ScanBackward, info, in_dims, arguments[:3], tensors, axes, out_axes)


def _formula(cell: str, tensors: Sequence[Any], d_kept: Sequence[Tensor | None] = ()) -> Gradients:
    """What the backward computes, differentiable, from the tensors of ``BackwardInputs``."""
    weight_hh, weight_ih, marks, kept, d_final, d_outputs = _backward_inputs(cell, tensors)
    of = ops.kept_of(cell, kept)
    return double_backward.backward(cell, weight_hh, weight_ih, marks, of, d_outputs, d_final, d_kept)


def _is_second(grads: Sequence[Tensor | None]) -> bool:
    """Whether a gradient came to what the forward kept: only a second derivative has one."""
    return not torch.compiler.is_compiling() and any(g is not None for g in grads)


def h_before(y: Tensor, marks: Tensor | None, direction: int) -> Tensor:
    """The h [L, T, B, H] that each step of a direction went on from, of y [L, T + 2, B, D, H]: nothing at a skipped
    step, where a NaN would be 0 * NaN in the gradient of what is multiplied by it."""
    h = y[:, 2:, :, 1] if direction else y[:, :-2, :, 0]
    if marks is None:
        return h
    mark, reset = marks[:, :, direction, None], y[:, :1, :, 1] if direction else y[:, -1:, :, 0]
    return torch.where(mark == SKIPPED, 0.0, torch.where(mark == BEGINS, reset, h))


def _products(d_gates: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Gradients of weights [L*D, G*H, H]: of d_gates [L, T, B, D, G*H] and, for each direction, what the weights are
    multiplied by, [L, T, B, H]."""
    found = []
    for d, operand in enumerate(operands):
        pair = d_gates[:, :, :, d], operand
        # Of one layer a plain product, not a batch of one.
        gates, h = (t.flatten(0, 2) if len(t) == 1 else t.flatten(1, 2) for t in pair)
        found.append(_gemm(gates, h))
    return torch.stack(found) if len(d_gates) == 1 else found[0]


def _gemm(d_gates: Tensor, operand: Tensor) -> Tensor:
    """A weight's gradient [..., G*H, H] of d_gates [..., T*B, G*H] and what it is multiplied by, [..., T*B, H]."""
    return d_gates.mT @ operand


def _bias(d_gates: Tensor) -> Tensor:
    return d_gates.sum((1, 2), dtype=torch.float32).to(d_gates.dtype).flatten(0, 1)
