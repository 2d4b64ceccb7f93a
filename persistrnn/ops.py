"""The kernels as ``torch.library`` operators, without autograd (``autograd`` has that). Each imports the kernels, and
Triton with them, when it first runs.

``persistrnn::scan_forward`` and ``scan_backward`` run a layer, or a stack in one launch. Letters are those of
``kernels.tensors``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import masks, step_marks
from .kernels.cells import CELLS
from .kernels.tensors import Gradients, Kept, Weights
from .phases import SCAN_BACKWARD, SCAN_FORWARD, phase


def check() -> None:
    """Raise RuntimeError if a wait in a finished launch ran out, or if lengths on a device were found out of range
    there. Does not synchronise with any device.

    Called by every forward and backward; call it yourself after ``torch.cuda.synchronize()`` to be sure of the last
    launch, or set PERSISTRNN_DEBUG=1 to check after every launch.
    """
    step_marks.check()
    if launch := sys.modules.get(f"{__package__}.kernels.launch"):  # else nothing was launched
        launch.check()


def compiled_by(run: Callable[[], object], threads: int | None) -> int:
    """How many kernels ``run`` would launch: they are compiled, so many at a time, and not launched."""
    from .kernels.compilation import instead_of_launches

    found: list[Any] = []
    # Else a backward on a GPU runs on a thread of its own, where nothing would tell it.
    with instead_of_launches(threads, found), torch.autograd.set_multithreading_enabled(False):
        run()
    return len(found)


def run_forward(
    cell: str,
    precision: str,
    save: bool,
    keep: bool,
    cell_dtype: torch.dtype | None,
    heads: int,
    x_gates: Tensor,
    weights: Weights,
    marks: Tensor | None,
    extras: Tensor | None,
    initial: Sequence[Tensor],
    reset: Sequence[Tensor],
    saved: Tensor | None = None,
) -> Kept:
    """``kernels.launch.forward``, within an operator, of contiguous tensors: over a whole sequence, or over a chunk of
    time, to which states after h come in float32."""
    from .kernels import launch

    with phase(SCAN_FORWARD):
        extras = _tiles(extras, x_gates.shape[0], x_gates.shape[1], weights.weight_hh.shape[-1])
        given = initial, precision, save, keep, cell_dtype, marks, reset, saved, extras, heads
        return launch.forward(CELLS[cell], x_gates, weights, *given)


@torch.library.custom_op("persistrnn::scan_forward", mutates_args=())
def scan_forward(
    cell: str,
    precision: str,
    save: bool,
    keep: bool,
    cell_dtype: torch.dtype | None,
    heads: int,
    x_gates: Tensor,
    weights: list[Tensor | None],
    marks: Tensor | None,
    extras: Tensor | None,
    initial: list[Tensor],
    reset: list[Tensor],
) -> list[Tensor]:
    """[*states, saved, *finals] of ``Kept``, without saved unless asked for; arguments are those of
    ``kernels.launch.forward``, weights those of ``Weights``, of which the last may be left out. Without autograd."""
    step_marks.check()
    x_gates, marks, extras, *given = map(_contiguous, (x_gates, marks, extras, *weights))  # type: ignore[assignment]
    tensors = x_gates, Weights(*given), marks, extras, initial, reset  # type: ignore[arg-type]
    kept = run_forward(cell, precision, save, keep, cell_dtype, heads, *tensors)
    return [*kept.states, *([] if kept.saved is None else [kept.saved]), *kept.finals]


def _tiles(extras: Tensor | None, steps: int, batch: int, units: int) -> Tensor | None:
    """``masks.tiles``, drawn by a kernel."""
    if extras is None or not masks.are_keys(extras):
        return extras
    from .kernels import masks as kernel

    return kernel.drawn(extras, steps, batch, units)


def _tiles_beside(states: Sequence[Tensor], extras: Tensor | None) -> Tensor | None:
    """Of a scan that left these states."""
    _, slots, batch, _, units = states[0].shape
    return _tiles(extras, slots - 2, batch, units)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@scan_forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, save, keep, cell_dtype, _, x_gates, weights, *_ = arguments
    T, B, D, _ = x_gates.shape
    rows, _, H = weights[0].shape
    L, others = rows // D, [cell_dtype or x_gates.dtype] * (CELLS[cell].states - 1)
    found = [x_gates.new_empty(L, T + 2, B, D, H)]
    if save or keep:
        found += [x_gates.new_empty(L, T + 2, B, D, H, dtype=dtype) for dtype in others]
    if save:
        found.append(x_gates.new_empty(L, T, B, D, CELLS[cell].saved, H))
    return [*found, *(x_gates.new_empty(rows, B, H, dtype=dtype) for dtype in [x_gates.dtype, *others])]


def kept_of(cell: str, flat: Sequence[Tensor]) -> Kept:
    """What ``scan_forward`` with save gave, by name."""
    n = CELLS[cell].states
    return Kept(flat[:n], flat[n], flat[n + 1 :])


def run_backward(
    cell: str,
    precision: str,
    resets: bool,
    heads: int,
    weight_hh: Tensor,
    weight_ih: Tensor | None,
    params: Tensor | None,
    marks: Tensor | None,
    extras: Tensor | None,
    kept: Kept,
    d_final: Sequence[Tensor | None],
    d_outputs: Sequence[Tensor],
) -> Gradients:
    """``kernels.launch.backward`` of what ``run_forward`` left."""
    from .kernels import launch

    with phase(SCAN_BACKWARD):
        finals, outputs = [_contiguous(d) for d in d_final], [d.contiguous() for d in d_outputs]
        given = weight_hh, weight_ih, kept, precision, marks, resets, params, _tiles_beside(kept.states, extras), heads
        return launch.backward(CELLS[cell], outputs, finals, *given)


@torch.library.custom_op("persistrnn::scan_backward", mutates_args=())
def scan_backward(
    cell: str,
    precision: str,
    resets: bool,
    heads: int,
    weight_hh: Tensor,
    weight_ih: Tensor | None,
    params: Tensor | None,
    marks: Tensor | None,
    extras: Tensor | None,
    kept: list[Tensor],
    d_final: list[Tensor | None],
    d_outputs: list[Tensor],
) -> list[Tensor]:
    """[dx_gates, dr_gates, *d_initial, *d_reset] of ``Gradients``, without dr_gates if it is dx_gates; arguments are
    those of ``kernels.launch.backward``."""
    step_marks.check()
    weight_ih, params, marks, extras = map(_contiguous, (weight_ih, params, marks, extras))
    given = weight_hh.contiguous(), weight_ih, params, marks, extras, kept_of(cell, kept), d_final, d_outputs
    d = run_backward(cell, precision, resets, heads, *given)
    # Outputs of an operator may not alias each other.
    dr_gates = [] if d.dr_gates is d.dx_gates else [d.dr_gates]
    return [d.dx_gates, *dr_gates, *d.d_initial, *d.d_reset]


@scan_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, resets, _, weight_hh, *_, d_final, d_outputs = arguments
    T, B, D, H = d_outputs[0].shape
    L, of = weight_hh.shape[0] // D, CELLS[cell]
    tiles = (of.stored_gradients, of.gates)[: 1 + of.recurrent_gradient]
    gates = [d_outputs[0].new_empty(L, T, B, D, n * H) for n in tiles]
    dtypes = [d_outputs[0].dtype if d is None else d.dtype for d in d_final] * (1 + resets)
    return [*gates, *(d_outputs[0].new_empty(L * D, B, H, dtype=dtype) for dtype in dtypes)]


def gradients_of(cell: str, flat: Sequence[Tensor]) -> Gradients:
    """What ``scan_backward`` gave, by name."""
    n, two = CELLS[cell].states, CELLS[cell].recurrent_gradient
    states = flat[1 + two :]
    return Gradients(flat[0], flat[int(two)], states[:n], states[n:])


# ---- rows of different lengths, resets ------------------------------------------------------------------------------


@torch.library.custom_op("persistrnn::marks", mutates_args=())
def marks(
    lengths: Tensor | None, active: Tensor | None, resets: Tensor | None, steps: int, batch: int, directions: int
) -> list[Tensor]:
    """What ``step_marks.marks`` makes of lengths [B] or active, and of resets: uint8 [T, B, D]; and where rows run:
    bool [T, B]. In one launch. Lengths out of [0, T] are taken as 0 or T, and an error, as of ``step_marks.bounded``.
    """
    from .kernels import marks as kernel

    step_marks.check()
    lengths = _contiguous(lengths)
    given = [t.device for t in (lengths, active, resets) if t is not None]
    found = kernel.made(lengths, active, resets, steps, batch, directions, step_marks.word(given[0]))
    if lengths is not None and lengths.device.type == "cpu":
        step_marks.refuse(lengths, steps)
    return list(found)


@marks.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *given, steps, batch, directions = arguments
    like = next(t for t in given if t is not None)
    found = like.new_empty(steps, batch, directions, dtype=torch.uint8)
    return [found, like.new_empty(steps, batch, dtype=torch.bool)]


@torch.library.custom_op("persistrnn::states_before", mutates_args=())
def states_before(states: Tensor, marks: Tensor, heads: int) -> Tensor:
    """``autograd.h_before`` of all directions, [D, L, T, B, H], in one launch. Without autograd."""
    from .kernels import marks as kernel

    return kernel.before(states.contiguous(), marks.contiguous(), heads)


@states_before.register_fake
def _(states: Tensor, marks: Tensor, heads: int) -> Tensor:
    layers, slots, batch, directions, units = states.shape
    return states.new_empty(directions, layers, slots - 2, batch, units)


# ---- for use inside an operator -------------------------------------------------------------------------------------


def with_edges(inner: Tensor, initial: Tensor, reset: Tensor | None, heads: int = 1) -> Tensor:
    """[1, T + 2, B, D, H] as a scan leaves it, from the states of all steps [T, B, D, H] and those at the edges."""
    from .kernels.fills import Fills, edges

    states = inner.new_empty(1, inner.shape[0] + 2, *inner.shape[1:])
    states[0, 1:-1].copy_(inner)
    edges(fills := Fills(), states, initial, reset, marked=True, heads=heads)
    fills.run()
    return states


def gates_again(
    cell: str,
    x_gates: Tensor,
    r_gates: Tensor,
    weights: Weights,
    states: Sequence[Tensor],
    marks: Tensor | None,
    extras: Tensor | None,
    heads: int = 1,
) -> Tensor:
    """What ``scan_forward`` saves of one layer, from both halves of the gates and the states
    (``kernels.launch.recompute``)."""
    from .kernels import launch

    assert weights.bias_hh is not None
    given = x_gates, r_gates, weights.bias_hh, states, marks, weights.params, _tiles_beside(states, extras), heads
    return launch.recompute(CELLS[cell], *given).unsqueeze(0)
