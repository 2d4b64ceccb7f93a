"""The kernels as ``torch.library`` operators, and the autograd around them. The only importer of the kernels.

Two operators without autograd, ``persistrnn::scan_forward`` and ``persistrnn::scan_backward``, and two
``autograd.Function`` over them (with ``setup_context`` and a vmap rule, so that torch.func, torch.compile and
torch.export work; ``register_autograd`` would give silent zero tangents under forward-mode AD). Everything
elementwise or a GEMM (weight and bias gradients, final states) is plain torch around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

try:
    from .kernels import launch, plan
    from .kernels.cells import CELLS

    _MISSING = None
except ImportError as error:
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    _MISSING = "Triton cannot be imported here; install triton >= 3.6 (Linux)"

# The cells' numbers, known without Triton too (operators are defined either way).
_GATES = {"lstm": 4, "gru": 3}
_SAVED = {"lstm": 4, "gru": 4}
_HAS_C = {"lstm": True, "gru": False}


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
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_gates, weight_hh, bias_hh, h0, c0)
    )
    save = grad or _inside_transform()
    y, h_n, c_n, *_ = _Scan.apply(cell, precision, save, x_gates, weight_hh, bias_hh, h0, c0)
    return y, h_n, c_n if _HAS_C[cell] else None


def _inside_transform() -> bool:
    """Under torch.func the wrapped tensors do not tell whether a gradient will be asked for."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unsupported(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
) -> str | None:
    """Why the kernels cannot run this layer, with the remedy; None if they can, which no batch size changes."""
    return _unsupported(cell, hidden_size, directions, dtype, device, precision)


# torch.compile asks once, while it traces: the answer holds for all T and B.
@torch.compiler.assume_constant_result
def _unsupported(
    cell: str, hidden_size: int, directions: int, dtype: torch.dtype, device: torch.device, precision: str
) -> str | None:
    if _MISSING is not None:
        return f"{_MISSING}, or use backend='torch'."
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels run float16, bfloat16 and float32, got {dtype}; use one of them, or backend='torch'."
    if device.type == "cpu":
        if not launch.INTERPRETED:
            return (
                "the kernels need a GPU, got a tensor on cpu; move layer and input to 'cuda', use backend='torch', or "
                "set TRITON_INTERPRET=1 before the first import of triton to run the kernels in Triton's interpreter "
                "(slow, for tests)."
            )
    elif device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if device.type == "cuda" else repr(device.type)
        return f"the kernels run on NVIDIA GPUs, got {kind}; use a 'cuda' device of NVIDIA, or backend='torch'."
    elif torch.cuda.get_device_capability(device) < (8, 0):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f"the kernels need compute capability 8.0 or newer, got {name} with {capability}; use backend='torch'."
    try:
        launch.choose(CELLS[cell], hidden_size, 1, directions, dtype, precision, device)
    except plan.PlanError as error:
        return str(error)
    return None


def slower(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
) -> str | None:
    """Why the kernels, which can run this layer, had better not: torch's own path is expected to be faster."""
    # A compiled graph holds for all batch sizes: it is decided for one that most have.
    rows = 16 if torch.compiler.is_compiling() else batch
    return _slower(cell, hidden_size, rows, directions, dtype, device, precision, backward)


@torch.compiler.assume_constant_result
def _slower(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
) -> str | None:
    if device.type != "cuda":
        return None  # the interpreter is for tests, not for speed
    found = launch.compare(CELLS[cell], hidden_size, batch, directions, dtype, precision, device, backward)
    if found.persistent <= found.torch:
        return None
    how = "measured on this device" if found.measured else "predicted, not measured"
    return (
        f"torch's own path is expected to be faster here: {found.torch:.2f} us per time step against "
        f"{found.persistent:.2f} ({how}); use backend='persistent' to run the kernels all the same."
    )


def expected(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
) -> str:
    """Both paths' expected times in words, forward and forward with backward."""
    lines = []
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        found = launch.compare(CELLS[cell], hidden_size, batch, directions, dtype, precision, device, backward)
        how = "corrected by measurements" if found.measured else "predicted"
        lines.append(
            f"{what}: {found.persistent:.2f} us per time step on the kernels, {found.torch:.2f} on torch's own path "
            f"({how})"
        )
    return "\n".join(lines)


def describe(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
) -> str:
    """The plan in words. Raises what ``unsupported`` would have said."""
    return str(launch.choose(CELLS[cell], hidden_size, batch, directions, dtype, precision, device))


def check() -> None:
    """Raise RuntimeError if a wait in a finished launch ran out. Does not synchronise with any device.

    Called by every forward and backward; call it yourself after ``torch.cuda.synchronize()`` to be sure of the last
    launch, or set PERSISTRNN_DEBUG=1 to check after every launch.
    """
    if _MISSING is None:
        launch.check()


@torch.library.custom_op("persistrnn::scan_forward", mutates_args=())
def _scan_forward(
    cell: str,
    precision: str,
    save: bool,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x_gates, weight_hh, bias_hh = x_gates.contiguous(), weight_hh.contiguous(), bias_hh.contiguous()
    return launch.forward(CELLS[cell], x_gates, weight_hh, bias_hh, h0, c0, precision, save)


@_scan_forward.register_fake
def _(
    cell: str,
    precision: str,
    save: bool,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, B, D, _ = x_gates.shape
    H = h0.shape[-1]
    y = x_gates.new_empty(T + 2, B, D, H)
    c = x_gates.new_empty((T + 2 if save else 2, B, D, H) if c0 is not None else 0)
    return y, c, x_gates.new_empty((T, B, D, _SAVED[cell], H) if save else 0)


@torch.library.custom_op("persistrnn::scan_backward", mutates_args=())
def _scan_backward(
    cell: str,
    precision: str,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    weight_hh: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_final = tuple(d.transpose(0, 1).contiguous() for d in (dh_n, dc_n) if d is not None)
    dx_gates, dr_gates, d_initial = launch.backward(
        CELLS[cell], dy.contiguous(), d_final, weight_hh.contiguous(), y, c, saved, precision
    )
    if dr_gates is dx_gates:
        dr_gates = dx_gates.new_empty(0)  # outputs of an operator may not alias each other
    dh0, *rest = (d.transpose(0, 1).contiguous() for d in d_initial)
    return dx_gates, dr_gates, dh0, rest[0] if rest else dx_gates.new_empty(0)


@_scan_backward.register_fake
def _(
    cell: str,
    precision: str,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    weight_hh: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, B, D, H = dy.shape
    dx_gates = dy.new_empty(T, B, D, _GATES[cell] * H)
    dr_gates = dy.new_empty(0) if _HAS_C[cell] else torch.empty_like(dx_gates)
    return dx_gates, dr_gates, dy.new_empty(D, B, H), dy.new_empty((D, B, H) if dc_n is not None else 0)


_ONCE = "the persistent kernels are differentiable once; a second derivative was asked for. Use backend='torch' for it."


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
        y, c, saved = _scan_forward(cell, precision, save, x_gates, weight_hh, bias_hh, h0, c0)
        D = x_gates.shape[2]
        # Slot T is -2: an index that holds for every T keeps torch.compile from making a graph for each.
        h_n = torch.stack([y[1 if d else -2, :, d] for d in range(D)])
        c_n = torch.stack([c[-2 if save and d == 0 else 1, :, d] for d in range(D)]) if _HAS_C[cell] else c.clone()
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
            ctx.mark_non_differentiable(y, c, saved, *(() if _HAS_C[cell] else (c_n,)))

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
        if _HAS_C[ctx.cell]:
            dc_n = y.new_zeros(D, B, H) if grads[2] is None else grads[2]
        dx_gates, dr_gates, dh0, dc0 = _ScanBackward.apply(
            ctx.cell, ctx.precision, dy, dh_n, dc_n, weight_hh, y, c, saved
        )
        if _HAS_C[ctx.cell]:
            dr_gates = dx_gates
        _, needs_weight, needs_bias = ctx.needs_input_grad[3:6]
        d_weight = d_bias = None
        if needs_weight:
            h_previous = [y[2:, :, 1] if d else y[:-2, :, 0] for d in range(D)]
            d_weight = torch.stack([dr_gates[:, :, d].flatten(0, 1).mT @ h_previous[d].flatten(0, 1) for d in range(D)])
        if needs_bias:
            d_bias = dr_gates.sum((0, 1), dtype=torch.float32).to(dr_gates.dtype)
        return None, None, None, dx_gates, d_weight, d_bias, dh0, dc0 if _HAS_C[ctx.cell] else None

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
        return _scan_backward(cell, precision, dy, dh_n, dc_n, weight_hh, y, c, saved)

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
