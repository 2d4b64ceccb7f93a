"""The derivatives of the operators: an ``autograd.Function`` for the forward and one for the backward, with
``setup_context`` and a vmap rule, so that torch.func, torch.compile and torch.export work (``register_autograd`` would
give silent zero tangents under forward-mode AD). Everything elementwise or a GEMM (weight and bias gradients, final
states) is plain torch around the operators.

Letters are those of ``kernels.tensors``. The Functions take and give flat tensors, in the order of the NamedTuples
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from persistrnn import double_backward, masks, ops, step_marks
from persistrnn.decide import expects_backward
from persistrnn.kernels.cells import CELLS, Cell, derived
from persistrnn.kernels.tensors import Gradients, Weights
from persistrnn.mapping import batched, each_sample, mapped, operator_by_samples
from persistrnn.phases import WEIGHT_GEMMS, phase
from persistrnn.reference import Result
from persistrnn.step_marks import BEGINS, SKIPPED, without_skipped


class Inputs(NamedTuple):
    """What a forward takes, as ``recurrent``."""

    x_gates: Tensor
    weights: Weights
    marks: Tensor | None
    extras: Tensor | None
    initial: Sequence[Tensor | None]
    reset: Sequence[Tensor]


class Outputs(NamedTuple):
    """What a forward gives, or gradients of that.

    every: y [T, B, D*H] of the highest layer, and with return_c its second state. finals: each [L*D, B, H]. kept: what
    the backward needs, if one may come.
    """

    every: Sequence[Any]
    finals: Sequence[Any]
    kept: Sequence[Any]


class BackwardInputs(NamedTuple):
    """What a backward takes. d_final: None where there is none. d_outputs: [T, B, D, H], of h, and of the second state
    where it was given out."""

    weight_hh: Tensor
    weight_ih: Tensor | None
    params: Tensor | None
    marks: Tensor | None
    extras: Tensor | None
    kept: Sequence[Tensor]
    d_final: Sequence[Tensor | None]
    d_outputs: Sequence[Tensor]


def recurrent(
    cell: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    initial: Sequence[Tensor],
    precision: str,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    return_c: bool = False,
    cell_dtype: torch.dtype | None = None,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
    params: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
    scale: Tensor | None = None,
) -> Result:
    """The recurrence of a layer, all directions in one launch, or of a stack of one direction in one launch, on the
    persistent kernels.

    Args:
        cell: its name in ``kernels.cells.CELLS``.
        x_gates: [T, B, D, X*H], ``x @ W_ih^T + b_ih`` of the lowest layer in torch's gate order. T, B >= 1.
        weight_hh: [L*D, G*H, H]; bias_hh: [L*D, G*H], or None: there is none, and no bias_ih.
        initial: the states, h first, as (h0, c0) of an LSTM, each [L*D, B, H]; empty: zeros.
        precision: of products in float32, "tf32" or "ieee".
        marks: uint8 [T, B, D], where a row begins anew or skips a step (``step_marks``); None: nowhere.
        reset: the states that rows begin anew from, in the form of ``initial``; empty: zeros.
        return_c: give out every second state (c_t of an LSTM) of the highest layer; of further ones the final alone.
        cell_dtype: of the states after h as they are stored for the backward and given out; None: that of x_gates.
        weight_ih: [L - 1, G*H, H], bias_ih: [L - 1, G*H]: of the upper layers of a stack.
        params: [L*D, P, H], the cell's parameters per unit; None: it has none.
        extras: [L, T, B, D, E, H], what the cell takes per step besides its gates, without gradient, also as uint8, or
            keys of masks [L, D, E, fields] (``masks``); None: nothing.
        heads: blocks of a block-diagonal W_hh, in each direction. Then D, here and below, counts all of them, those of
            one direction side by side, and H is of one: x_gates [T, B, D*heads, X*H/heads], weight_hh
            [D*heads, G*H/heads, H/heads]; y stays [T, B, D*H]. Marks are shared by the heads of a direction.
        scale: float32 [D, G*H], of the rows of a weight_hh of 8 bits: int8, or uint8, the bits of float8_e4m3fn. Of one
            layer, and nothing is differentiable then.
        All others in one dtype (float16, bfloat16 or float32), on one device.

    Returns:
        y [T, B, D*H] of the highest layer, with ``return_c`` c [T, B, D*H], and the final states, each [L*D, B, H].
        Where a row skips a step, y and c repeat. Differentiable in every floating argument, through every output
        (``double_backward``).

    Raises:
        ValueError: the size does not fit the device.
        RuntimeError: an earlier launch gave up waiting (see ``ops.check``).
    """
    of = CELLS[cell]
    if of.normalised:  # the bias comes behind the norm, which is in the step: of the parameters it is the last
        rows = weight_hh.shape[:2]
        biases = (weight_hh.new_zeros(rows) if bias_hh is None else bias_hh).unflatten(1, (of.gates, -1))
        params = biases if params is None else torch.cat([params, biases], dim=1)
        bias_hh = None
    begin = initial or (None,) * of.states
    tensors = x_gates, weight_hh, bias_hh, weight_ih, bias_ih, params, marks, extras, *begin, *reset
    save = scale is None and expects_backward(tensors)
    # Without gradients dynamo calls no Function with a variable number of arguments.
    direct = torch.compiler.is_compiling() and not save
    how = cell, precision, save, return_c, cell_dtype, heads
    flat = _forward(*how, *tensors, scale=scale) if direct or scale is not None else _Scan.apply(*how, *tensors)
    (y, *c), finals, _ = _outputs(cell, return_c, flat)
    return Result(y, c[0] if c else None, list(finals))


def _inputs(cell: str, flat: Sequence[Any]) -> Inputs:
    x_gates, *weights, marks, extras = flat[:8]
    n = 8 + CELLS[cell].states
    return Inputs(x_gates, Weights(*weights), marks, extras, flat[8:n], flat[n:])


def _outputs(cell: str, return_c: bool, flat: Sequence[Any]) -> Outputs:
    n = CELLS[cell].states
    m = CELLS[cell].given_out if return_c else 1
    return Outputs(flat[:m], flat[m : m + n], flat[m + n :])


def _backward_inputs(cell: str, flat: Sequence[Any]) -> BackwardInputs:
    weight_hh, weight_ih, params, marks, extras, *others = flat
    n = CELLS[cell].states
    rest = others[: n + 1], others[n + 1 : 2 * n + 1], others[2 * n + 1 :]
    return BackwardInputs(weight_hh, weight_ih, params, marks, extras, *rest)


def _forward(*arguments: Any, scale: Tensor | None = None) -> tuple[Tensor, ...]:
    """The tensors of ``Outputs``, of the first arguments of ``ops.scan_forward`` and the tensors of ``Inputs``."""
    how, (cell, _, save, return_c, *_) = arguments[:6], arguments[:6]
    x_gates, weights, marks, extras, initial, reset = _inputs(cell, arguments[6:])
    weights = weights._replace(scale=scale)
    states = [s for s in initial if s is not None], list(reset)
    found = ops.scan_forward(*how, x_gates, list(weights), marks, extras, *states)
    n = CELLS[cell].states
    kept, finals = found[:-n], [s.to(x_gates.dtype) for s in found[-n:]]
    every = [s[-1, 1:-1].flatten(2) for s in kept[: CELLS[cell].given_out if return_c else 1]]
    if weights.weight_ih is not None:  # a stack: else they would keep those of all layers alive
        every = [s.clone() for s in every]
    return (*every, *finals, *(kept if save else ()))


class _Scan(Function):
    """The tensors of ``Inputs`` to those of ``Outputs``. What is kept stays differentiable: through it a second
    derivative finds its way (``double_backward``)."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.precision, save, ctx.return_c, _, ctx.heads, *tensors = inputs
        given, kept = _inputs(ctx.cell, tensors), _outputs(ctx.cell, ctx.return_c, output).kept
        if save:
            of, beside = given.weights, (given.marks, given.extras)
            ctx.save_for_backward(of.weight_hh, of.weight_ih, of.params, *beside, *kept)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            # Dynamo hands a gradient of every differentiable output to the backward; AOTAutograd itself refuses a
            # second derivative.
            ctx.mark_non_differentiable(*kept)

    @staticmethod
    @batched
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell = CELLS[ctx.cell]
        weight_hh, weight_ih, params, marks, extras, *kept = ctx.saved_tensors
        y, saved = kept[0], kept[-1]
        _, T, B, D, _, H = saved.shape
        d = _outputs(ctx.cell, ctx.return_c, grads)
        d_outputs = [None if g is None else g.unflatten(2, (D, H)) for g in d.every]
        while d_outputs[-1] is None and len(d_outputs) > 1:
            d_outputs.pop()
        d_outputs = [y.new_zeros(T, B, D, H) if g is None else g for g in d_outputs]
        needs = _inputs(ctx.cell, ctx.needs_input_grad[6:])
        resets = any(needs.reset)
        given = weight_hh, weight_ih, params, marks, extras, *kept, *d.finals, *d_outputs
        if _is_second(d.kept):
            found = _formula(ctx.cell, ctx.heads, given, d.kept)
        else:
            # In a backward dynamo calls no Function with a variable number of arguments.
            scan = _backward if torch.compiler.is_compiling() else _ScanBackward.apply
            found = ops.gradients_of(ctx.cell, scan(ctx.cell, ctx.precision, resets, ctx.heads, *given))
        d_weights: list[Tensor | None] = [None] * 5
        dr_gates = found.dr_gates if cell.recurrent_gradient else found.dx_gates
        dx_gates = of_inputs(cell, found.dx_gates)
        with phase(WEIGHT_GEMMS):
            if needs.weights.weight_hh:
                d_weights[0] = _recurrent_weights(cell, dr_gates, kept, marks, ctx.heads)
            if needs.weights.bias_hh:
                d_weights[1] = _bias(dr_gates)
            if needs.weights.weight_ih:
                d_weights[2] = _products(dx_gates[1:], [without_skipped(y[:-1, 1:-1, :, 0], marks)])
            if needs.weights.bias_ih:
                d_weights[3] = _bias(dx_gates[1:])
            if needs.weights.params:
                d_params = found.d_params
                if d_params is None:
                    gates = [found.dx_gates, *([found.dr_gates] if cell.recurrent_gradient else [])]
                    of = _param_gradients if torch.compiler.is_compiling() else param_gradients
                    d_params = of(ctx.cell, ctx.heads, gates, kept, params, marks, extras)
                d_weights[4] = d_params.to(params.dtype)
        d_initial = found.d_initial if any(needs.initial) else [None] * len(needs.initial)
        d_reset = found.d_reset if resets else [None] * len(needs.reset)
        return (*(None,) * 6, dx_gates[0], *d_weights, None, None, *d_initial, *d_reset)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        cell, save, return_c, tensors = arguments[0], arguments[2], arguments[3], arguments[6:]
        if masks.are_keys(_inputs(cell, tensors).extras):  # each sample has the rows of its own batch
            return each_sample(_Scan.apply, info, in_dims, arguments[:6], tensors)
        n, m = CELLS[cell].states, CELLS[cell].given_out if return_c else 1
        # where B is in the tensors of Inputs, of which no scale of weights is one, and of Outputs
        axes = (1, *(None,) * (len(Weights._fields) - 1), 1, 2, *(1,) * (len(tensors) - 8))
        out_axes = (*(1,) * (m + n), *(2,) * (n + 1 if save else 0))
        return mapped(_Scan.apply, info, in_dims, arguments[:6], tensors, axes, out_axes)


def _backward(cell: str, precision: str, resets: bool, heads: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    *given, kept, d_final, d_outputs = _backward_inputs(cell, tensors)
    return tuple(ops.scan_backward(cell, precision, resets, heads, *given, *map(list, (kept, d_final, d_outputs))))


class _ScanBackward(Function):
    """The tensors of ``BackwardInputs`` to those of ``Gradients``, of the reset states only if ``resets``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, _, ctx.resets, ctx.heads, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @batched
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a backward's arguments, by the derivative of its formula."""
        cell = CELLS[ctx.cell]

        def formula(tensors: list[Any]) -> Sequence[Tensor]:
            found = _formula(ctx.cell, ctx.heads, tensors)
            gates = (found.dx_gates, found.dr_gates) if cell.recurrent_gradient else (found.dx_gates,)
            return (*gates, *found.d_initial, *(found.d_reset if ctx.resets else ()))

        return (None, None, None, None, *double_backward.through(formula, ctx.saved_tensors, grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_tangents()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _map_of_backward(_ScanBackward.apply, info, in_dims, arguments)


def _map_of_backward(
    apply: Callable[..., Any], info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """The vmap rule of ``apply``, with the arguments of `_backward`."""
    cell, tensors = CELLS[arguments[0]], arguments[4:]
    if masks.are_keys(_backward_inputs(cell.name, tensors).extras):
        return each_sample(apply, info, in_dims, tuple(arguments[:4]), tensors)
    n = cell.states
    # where B is in the tensors of BackwardInputs, and of Gradients
    axes = (None, None, None, 1, 2, *(2,) * (n + 1), *(1,) * (len(tensors) - n - 6))
    out_axes = (*(2,) * (1 + cell.recurrent_gradient), *(1,) * (2 * n if arguments[2] else n))
    return mapped(apply, info, in_dims, tuple(arguments[:4]), tensors, axes, out_axes)


operator_by_samples(ops.marks)


@ops.scan_backward.register_vmap
def _(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Of a compiled backward, which has the operator alone."""
    flat, dims = (
        [t for given in of for t in (given if isinstance(given, list) else [given])] for of in (arguments, in_dims)
    )
    found, axes = _map_of_backward(_backward, info, dims, flat)
    return list(found), list(axes)


def refuse_tangents() -> NoReturn:
    raise NotImplementedError(
        "the kernels' backward has no forward mode: differentiate the layer's forward inside torch.func.jvp or the "
        "dual level, as jvp(grad(f), ...) does, which runs step by step"
    )


def _formula(cell: str, heads: int, tensors: Sequence[Any], d_kept: Sequence[Tensor | None] = ()) -> Gradients:
    """What the backward computes, differentiable, from the tensors of ``BackwardInputs``."""
    weight_hh, weight_ih, params, marks, extras, kept, d_final, d_outputs = _backward_inputs(cell, tensors)
    of, (_, batch, _, units) = ops.kept_of(cell, kept), d_outputs[0].shape
    finals = [d_outputs[0].new_zeros(len(weight_hh), batch, units) if d is None else d for d in d_final]
    beside = d_kept, params, extras, heads
    return double_backward.backward(cell, weight_hh, weight_ih, marks, of, d_outputs, finals, *beside)


def _is_second(grads: Sequence[Tensor | None]) -> bool:
    """Whether a gradient came to what the forward kept: only a second derivative has one."""
    return not torch.compiler.is_compiling() and any(g is not None for g in grads)


def of_inputs(cell: Cell, dx_gates: Tensor) -> Tensor:
    """The gradient of the input half alone, without what is stored behind it for the parameters."""
    return (
        dx_gates[..., : dx_gates.shape[-1] // cell.stored_gradients * cell.inputs] if cell.more_gradients else dx_gates
    )


def param_gradients(
    cell: str,
    heads: int,
    gates: list[Tensor],
    kept: list[Tensor],
    params: Tensor,
    marks: Tensor | None,
    extras: Tensor | None,
) -> Tensor:
    """Gradients of the parameters per unit, float32 [L*D, P, H], from what is in memory after the scan. gates: dx_gates
    and dr_gates, or the one that is both; kept: the states, and what was saved."""
    of, (L, T, B, D, _), H = CELLS[cell], gates[0].shape, params.shape[-1]
    states, whole = kept[: of.states], kept[of.states]
    extras = masks.tiles(extras, T, B, H)
    found = []
    for k in range(D):
        dx, dr = (_tiles(d[:, :, :, k].unflatten(-1, (-1, H))) for d in (gates[0], gates[-1]))
        saved: Sequence[Tensor] = _tiles(whole[:, :, :, k])
        after: Sequence[Tensor] = [states[i][:, 1:-1, :, k].float() for i in of.after]
        before = [h_before(s, marks, k, heads).float() for s in states]
        p = [t[:, None, None].float() for t in params.unflatten(0, (L, D))[:, k].unbind(1)]
        e = [] if extras is None else _tiles(extras[:, :, :, k])
        skipped = None if marks is None else (marks[:, :, k // heads] == SKIPPED).unsqueeze(-1)
        if skipped is not None:
            saved, after = (double_backward.finite(skipped, tiles) for tiles in (saved, after))
        tiles: Sequence[Tensor] = derived(cell).param_gradients(dx, dr, saved, after, before, p, e)
        if skipped is not None:
            tiles = [torch.where(skipped, 0.0, t) for t in tiles]
        found.append(torch.stack([t.expand_as(dr[0]).sum((1, 2)) for t in tiles], 1))
    return torch.stack(found, 1).flatten(0, 1)


# Dynamo cannot trace a cell's graph.
_param_gradients = torch.library.custom_op("persistrnn::param_gradients", param_gradients, mutates_args=())


operator_by_samples(_param_gradients)


@_param_gradients.register_fake
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[4], dtype=torch.float32)  # the parameters


def _tiles(tensor: Tensor) -> list[Tensor]:
    """[L, T, B, n, H] as n tensors in float32."""
    return [t.float() for t in tensor.unbind(3)]


def h_before(y: Tensor, marks: Tensor | None, direction: int, heads: int = 1) -> Tensor:
    """The h (or another state) [L, T, B, H] that each step of a direction went on from, of y [L, T + 2, B, D, H]:
    nothing at a skipped step, where a NaN would be 0 * NaN in the gradient of what is multiplied by it."""
    reverse, y = direction // heads, y[:, :, :, direction]
    h = y[:, 2:] if reverse else y[:, :-2]
    if marks is None:
        return h
    mark, reset = marks[:, :, reverse, None], y[:, :1] if reverse else y[:, -1:]
    return torch.where(mark == SKIPPED, 0.0, torch.where(mark == BEGINS, reset, h))


def transformed() -> bool:
    """Whether torch's own operations are wanted, for a compiler or a transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._functorch.get_dynamic_layer_stack_depth() > 0


class _OnlyWhere(Function):
    """``step_marks.only_where`` by the bits: one launch each way, where torch.where of a number takes two."""

    @staticmethod
    def forward(active: Tensor, tensor: Tensor) -> Tensor:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        return (tensor.view(bits) * active).view(tensor.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @batched
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (active,) = ctx.saved_tensors
        return None, None if grads[0] is None else only_where(active, grads[0])


def only_where(active: Tensor, tensor: Tensor) -> Tensor:
    """Zeros where ``active`` does not hold, of what the kernels read or give."""
    if transformed():
        return step_marks.only_where(active, tensor)
    found: Tensor = _OnlyWhere.apply(active, tensor)
    return found


def _recurrent_weights(
    cell: Cell, dr_gates: Tensor, kept: Sequence[Tensor], marks: Tensor | None, heads: int
) -> Tensor:
    """Gradient of W_hh, whose last rows, of a later product, are multiplied by what the forward has saved first."""
    y, saved, D = kept[0], kept[-1], dr_gates.size(3)
    if marks is None or torch.is_grad_enabled() or transformed():
        h = [h_before(y, marks, d, heads) for d in range(D)]
    else:  # of one direction in one launch instead of five
        h = list(ops.states_before(y, marks, heads))
    if not cell.products:
        return _products(dr_gates, h)
    of_h, later = dr_gates.split([dr_gates.size(-1) // cell.gates * n for n in (cell.gates_of_h, cell.products)], -1)
    operands = [saved[:, :, :, d, 0] for d in range(D)]
    if marks is not None:  # a NaN of a skipped step would be 0 * NaN
        skipped = [(marks[:, :, d // heads] == SKIPPED).unsqueeze(-1) for d in range(D)]
        operands = [torch.where(s, 0.0, o) for s, o in zip(skipped, operands, strict=True)]
    return torch.cat([_products(of_h, h), _products(later, operands)], dim=1)


def _products(d_gates: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Gradients of weights [L*D, G*H, H]: of d_gates [L, T, B, D, G*H] and, for each direction, what the weights are
    multiplied by, [L, T, B, H]."""
    found = []
    for d, operand in enumerate(operands):
        pair = d_gates[:, :, :, d], operand
        # Of one layer a plain product, not a batch of one.
        gates, h = (t.flatten(0, 2) if len(t) == 1 else t.flatten(1, 2) for t in pair)
        found.append(_gemm(gates, h))
    if len(d_gates) > 1:
        return found[0]
    return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)


def _gemm(d_gates: Tensor, operand: Tensor) -> Tensor:
    """A weight's gradient [..., G*H, H] of d_gates [..., T*B, G*H] and what it is multiplied by, [..., T*B, H]."""
    return d_gates.mT @ operand


def _bias(d_gates: Tensor) -> Tensor:
    return d_gates.sum((1, 2)).flatten(0, 1)  # of 16-bit numbers in float32, rounded once
