"""The kernels as ``torch.library`` operators, without autograd (``autograd`` has that), and what there is to ask about
them before a call. The only importer of the kernels.

``persistrnn::scan_forward`` and ``scan_backward`` run a layer, or a stack in one launch. Letters are those of
``kernels.tensors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import segments, tracing
from .kernels.cells import CELLS
from .kernels.planner import memory
from .kernels.tensors import Gradients, Kept, Weights

try:
    from .kernels import launch
    from .kernels.inspect import outlook, reasons

    MISSING = None
except ImportError as error:
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    MISSING = "Triton cannot be imported here; install triton >= 3.6 (Linux)"

MODES = memory.MODES


def layers(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    directions: int,
    dtype: torch.dtype,
    cell_dtype: torch.dtype | None,
    dropout: bool,
) -> memory.Layers:
    """A stack as ``memory`` asks for it."""
    itemsizes = dtype.itemsize, (cell_dtype or dtype).itemsize
    between = num_layers > 1 and (directions > 1 or dropout)
    return memory.Layers(CELLS[cell], input_size, hidden_size, num_layers, directions, *itemsizes, between)


def kept_bytes(save: str, of: memory.Layers, chunk: int) -> float:
    """Bytes per step and row that the kernels keep for the backward: predicted."""
    return memory.kept(save, of, chunk)


def needed_bytes(save: str, of: memory.Layers, batch: int, steps: int, dtype: torch.dtype, on_kernels: bool) -> float:
    """Predicted bytes of a training step at its highest point, without the input, the weights, and the gradients of the
    input and the output: on the kernels, or on torch's own path on a CPU."""
    sizes = of.hidden, batch, of.directions, of.itemsize, steps
    chunk = chunk_steps(save, of.cell.name, *sizes, on_kernels)
    if on_kernels:
        return memory.needed(save, of, batch, steps, chunk)
    mkldnn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    onednn = of.cell.name == "lstm" and mkldnn and dtype in (torch.float32, torch.bfloat16)
    return memory.torch_peak(save, of, batch, steps, chunk, onednn, False) - steps * batch * of.y


def chunk_steps(
    save: str,
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    itemsize: int,
    steps: int,
    launches: bool,
) -> int:
    """Steps of the chunks of time that a call of so many steps runs in; a rule that holds for every T and B of a graph.
    launches: whether a chunk costs launches on a GPU."""
    sizes = hidden_size, batch, directions, itemsize, steps
    return memory.chunk_steps(save, CELLS[cell].gates, *sizes, launches, torch.sym_max, torch.sym_min)


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
@tracing.constant
def _unsupported(
    cell: str, hidden_size: int, directions: int, dtype: torch.dtype, device: torch.device, precision: str
) -> str | None:
    if MISSING is not None:
        return f"{MISSING}, or use backend='torch'."
    return reasons.unsupported(CELLS[cell], hidden_size, directions, dtype, device, precision)


def slower(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
    layers: int = 1,
    steps: int = 1,
) -> str | None:
    """Why the kernels, which can run this layer, had better not: torch's own path is expected to be faster.

    layers: of a stack that may run as a wave, with its time steps; 1 for layers that run one after the other.
    """
    # A compiled graph holds for all sizes: it is decided for some that most have.
    rows, steps = (16, 64) if torch.compiler.is_compiling() else (batch, steps)
    return _slower(cell, hidden_size, rows, directions, dtype, device, precision, backward, layers, steps)


@tracing.constant
def _slower(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
    layers: int,
    steps: int,
) -> str | None:
    return reasons.slower(
        CELLS[cell], hidden_size, batch, directions, dtype, device, precision, backward, layers, steps
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
    return reasons.expected(CELLS[cell], hidden_size, batch, directions, dtype, device, precision)


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


def planned(cell: str, sizes: tuple[int, int, int, int, int], dtype: str, device: str | None) -> outlook.Outlook:
    """The plan in numbers, for (H, L, B, D, T): see ``kernels.outlook``."""
    return outlook.outlook(cell, *sizes, dtype, device)


def check_planned_device(name: str) -> None:
    """Raise ValueError for a device that the plan does not know."""
    outlook.device_of(name)


def check() -> None:
    """Raise RuntimeError if a wait in a finished launch ran out, or if lengths on a device were found out of range
    there. Does not synchronise with any device.

    Called by every forward and backward; call it yourself after ``torch.cuda.synchronize()`` to be sure of the last
    launch, or set PERSISTRNN_DEBUG=1 to check after every launch.
    """
    segments.check()
    if MISSING is None:
        launch.check()


def waves(
    cell: str,
    hidden_size: int,
    layers: int,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
) -> bool:
    """Whether a stack of several layers of one direction had better run as one launch: its layers fit the device
    together, and are predicted to be faster so than one after the other."""
    # A compiled graph holds for all sizes: it must win at few rows and at many. What fits with 16 fits with any number.
    sizes = ((16, 64), (128, 64)) if torch.compiler.is_compiling() else ((batch, steps),)
    return all(_waves(cell, hidden_size, layers, b, t, dtype, device, precision, backward) for b, t in sizes)


@tracing.constant
def _waves(
    cell: str,
    hidden_size: int,
    layers: int,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
) -> bool:
    found = launch.choose_stack(CELLS[cell], hidden_size, layers, batch, dtype, precision, device)
    return found is not None and found.faster(steps, backward)


def describe_wave(
    cell: str,
    hidden_size: int,
    layers: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
) -> str:
    """The plan of a stack that ``waves`` is true of, in words."""
    return str(launch.choose_stack(CELLS[cell], hidden_size, layers, batch, dtype, precision, device))


@torch.library.custom_op("persistrnn::scan_forward", mutates_args=())
def scan_forward(
    cell: str,
    precision: str,
    save: bool,
    keep: bool,
    cell_dtype: torch.dtype | None,
    x_gates: Tensor,
    weights: list[Tensor],
    marks: Tensor | None,
    initial: list[Tensor],
    reset: list[Tensor],
) -> list[Tensor]:
    """[*states, saved] of ``Kept``, without saved unless asked for; arguments are those of ``kernels.launch.forward``,
    weights the two or four of ``Weights``. Without autograd."""
    segments.check()
    x_gates, *given = (t.contiguous() for t in (x_gates, *weights))
    marks = None if marks is None else marks.contiguous()
    kept = launch.forward(
        CELLS[cell], x_gates, Weights(*given), initial, precision, save, keep, cell_dtype, marks, reset
    )
    return [*kept.states, *([] if kept.saved is None else [kept.saved])]


@scan_forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, save, keep, cell_dtype, x_gates, _, marks, initial, _ = arguments
    T, B, D, _ = x_gates.shape
    rows, _, H = initial[0].shape
    L, slots = rows // D, memory.c_slots(T, save or keep, marks is not None)
    found = [x_gates.new_empty(L, T + 2, B, D, H)]
    found += [x_gates.new_empty(L, slots, B, D, H, dtype=cell_dtype or x_gates.dtype) for _ in initial[1:]]
    return [*found, x_gates.new_empty(L, T, B, D, CELLS[cell].saved, H)] if save else found


def kept_of(cell: str, flat: Sequence[Tensor]) -> Kept:
    """What ``scan_forward`` with save gave, by name."""
    n = CELLS[cell].states
    return Kept(flat[:n], flat[n])


@torch.library.custom_op("persistrnn::scan_backward", mutates_args=())
def scan_backward(
    cell: str,
    precision: str,
    resets: bool,
    weight_hh: Tensor,
    weight_ih: Tensor | None,
    marks: Tensor | None,
    kept: list[Tensor],
    d_final: list[Tensor],
    d_outputs: list[Tensor],
) -> list[Tensor]:
    """[dx_gates, dr_gates, *d_initial, *d_reset] of ``Gradients``, without dr_gates if it is dx_gates; arguments are
    those of ``kernels.launch.backward``."""
    segments.check()
    finals, outputs = ([d.contiguous() for d in given] for given in (d_final, d_outputs))
    weight_ih = None if weight_ih is None else weight_ih.contiguous()
    marks = None if marks is None else marks.contiguous()
    d = launch.backward(
        CELLS[cell], outputs, finals, weight_hh.contiguous(), weight_ih, kept_of(cell, kept), precision, marks, resets
    )
    # Outputs of an operator may not alias each other.
    dr_gates = [] if d.dr_gates is d.dx_gates else [d.dr_gates]
    return [d.dx_gates, *dr_gates, *(t.contiguous() for t in (*d.d_initial, *d.d_reset))]


@scan_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, resets, weight_hh, _, _, _, d_final, d_outputs = arguments
    T, B, D, H = d_outputs[0].shape
    L, of = weight_hh.shape[0] // D, CELLS[cell]
    gates = [d_outputs[0].new_empty(L, T, B, D, of.gates * H) for _ in range(1 + of.recurrent_gradient)]
    return [*gates, *(d.new_empty(L * D, B, H) for _ in range(1 + resets) for d in d_final)]


def gradients_of(cell: str, flat: Sequence[Tensor]) -> Gradients:
    """What ``scan_backward`` gave, by name."""
    n, two = CELLS[cell].states, CELLS[cell].recurrent_gradient
    states = flat[1 + two :]
    return Gradients(flat[0], flat[int(two)], states[:n], states[n:])


# ---- for use inside an operator -------------------------------------------------------------------------------------


def scan_chunk(
    cell: str,
    precision: str,
    x_gates: Tensor,
    weights: Weights,
    initial: Sequence[Tensor],
    marks: Tensor | None,
    reset: Sequence[Tensor],
    keep: bool,
    save: bool,
    saved: Tensor | None = None,
) -> Kept:
    """The forward over one chunk of time: that of ``kernels.launch``, with the states after h, which may come in
    float32, in float32."""
    return launch.forward(
        CELLS[cell], x_gates, weights, initial, precision, save, keep, torch.float32, marks, reset, saved
    )


def scan_chunk_backward(
    cell: str,
    precision: str,
    d_outputs: Sequence[Tensor],
    d_final: Sequence[Tensor],
    weight_hh: Tensor,
    kept: Kept,
    marks: Tensor | None,
    resets: bool,
) -> Gradients:
    """Its backward, with the gradients of the states in the dtype of ``d_final``."""
    outputs, finals = ([d.contiguous() for d in given] for given in (d_outputs, d_final))
    return launch.backward(CELLS[cell], outputs, finals, weight_hh, None, kept, precision, marks, resets)


def with_edges(inner: Tensor, initial: Tensor, reset: Tensor | None) -> Tensor:
    """[1, T + 2, B, D, H] as a scan leaves it, from the states of all steps [T, B, D, H] and those at the edges."""
    states = inner.new_empty(1, inner.shape[0] + 2, *inner.shape[1:])
    states[0, 1:-1].copy_(inner)
    launch.edges(states, initial, reset)
    return states


def gates_again(cell: str, x_gates: Tensor, r_gates: Tensor, bias_hh: Tensor) -> Tensor:
    """What ``scan_forward`` saves of one layer, from both halves of the gates (``kernels.launch.recompute``)."""
    return launch.recompute(CELLS[cell], x_gates, r_gates, bias_hh).unsqueeze(0)
