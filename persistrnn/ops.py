"""The kernels as ``torch.library`` operators, without autograd (``autograd`` has that). Each imports the kernels, and
Triton with them, when it first runs.

``persistrnn::scan_forward`` and ``scan_backward`` run one layer, ``persistrnn::wave_forward`` and ``wave_backward`` a
stack in one launch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import segments
from .kernels.cells import CELLS
from .kernels.planner import memory


def scan_chunk(
    cell: str,
    precision: str,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    states: Sequence[Tensor],
    marks: Tensor | None,
    reset: Sequence[Tensor],
    keep: bool,
    save: bool,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of one layer over one chunk of time, with c in float32: what ``scan_forward`` gives, for use inside
    an operator. states: (h,) or (h, c), of which c may be float32; saved: where to put what the backward needs."""
    from .kernels import launch

    c = states[1] if len(states) > 1 else None
    given = x_gates, weight_hh, bias_hh, states[0], c
    return launch.forward(CELLS[cell], *given, precision, save, keep, torch.float32, marks, reset, saved)


def scan_chunk_backward(
    cell: str,
    precision: str,
    d_outputs: Sequence[Tensor],
    d_final: Sequence[Tensor],
    weight_hh: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    marks: Tensor | None,
    resets: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Its backward: dx_gates, dr_gates (the same tensor where they do not differ), and the gradients of the states
    before it and, with ``resets``, of the reset states, in the dtype of ``d_final`` [D, B, H]."""
    from .kernels import launch

    finals = [d.transpose(0, 1).contiguous() for d in d_final]
    given = [d.contiguous() for d in d_outputs], finals, weight_hh, y, c, saved, precision, marks, resets
    dx_gates, dr_gates, d_edges = launch.backward(CELLS[cell], *given)
    return dx_gates, dr_gates, [d.transpose(0, 1) for d in d_edges]


def with_edges(inner: Tensor, initial: Tensor, reset: Tensor | None) -> Tensor:
    """[T + 2, B, D, H] as a scan leaves it, from the states of all steps [T, B, D, H] and those at the edges."""
    from .kernels import launch

    states = inner.new_empty(inner.shape[0] + 2, *inner.shape[1:])
    states[1:-1].copy_(inner)
    launch.edges(states, initial, reset)
    return states


def gates_again(cell: str, x_gates: Tensor, r_gates: Tensor, bias_hh: Tensor) -> Tensor:
    """What ``scan_forward`` saves, from both halves of the gates: shapes are those of ``kernels.launch.recompute``."""
    from .kernels import launch

    return launch.recompute(CELLS[cell], x_gates, r_gates, bias_hh)


def check() -> None:
    """Raise RuntimeError if a wait in a finished launch ran out, or if lengths on a device were found out of range
    there. Does not synchronise with any device.

    Called by every forward and backward; call it yourself after ``torch.cuda.synchronize()`` to be sure of the last
    launch, or set PERSISTRNN_DEBUG=1 to check after every launch.
    """
    segments.check()
    if launch := sys.modules.get(f"{__package__}.kernels.launch"):  # else nothing was launched
        launch.check()


@torch.library.custom_op("persistrnn::scan_forward", mutates_args=())
def scan_forward(
    cell: str,
    precision: str,
    save: bool,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    marks: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of one layer, without autograd. Shapes are those of ``kernels.launch.forward``."""
    from .kernels import launch

    segments.check()
    x_gates, weight_hh, bias_hh = x_gates.contiguous(), weight_hh.contiguous(), bias_hh.contiguous()
    reset = tuple(r for r in (reset_h, reset_c) if r is not None)
    given = x_gates, weight_hh, bias_hh, h0, c0
    marks = None if marks is None else marks.contiguous()
    return launch.forward(CELLS[cell], *given, precision, save, keep, cell_dtype, marks, reset)


@scan_forward.register_fake
def _(
    cell: str,
    precision: str,
    save: bool,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    marks: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, B, D, _ = x_gates.shape
    H = h0.shape[-1]
    y = x_gates.new_empty(T + 2, B, D, H)
    c = x_gates.new_empty(0)
    if c0 is not None:
        slots = memory.c_slots(T, save or keep, marks is not None)
        c = x_gates.new_empty(slots, B, D, H, dtype=cell_dtype or x_gates.dtype)
    return y, c, x_gates.new_empty((T, B, D, CELLS[cell].saved, H) if save else 0)


@torch.library.custom_op("persistrnn::scan_backward", mutates_args=())
def scan_backward(
    cell: str,
    precision: str,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    weight_hh: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    dc: Tensor | None = None,
    marks: Tensor | None = None,
    resets: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Its backward: (dx_gates, dr_gates, dh0, dc0, and with ``resets`` those of the reset states), dr_gates empty if it
    is dx_gates, what the cell has not or nobody asked for empty too."""
    from .kernels import launch

    segments.check()
    d_final = tuple(d.transpose(0, 1).contiguous() for d in (dh_n, dc_n) if d is not None)
    d_outputs = tuple(d.contiguous() for d in (dy, dc) if d is not None)
    marks = None if marks is None else marks.contiguous()
    dx_gates, dr_gates, d_edges = launch.backward(
        CELLS[cell], d_outputs, d_final, weight_hh.contiguous(), y, c, saved, precision, marks, resets
    )
    if dr_gates is dx_gates:
        dr_gates = dx_gates.new_empty(0)  # outputs of an operator may not alias each other
    return dx_gates, dr_gates, *_four([d.transpose(0, 1).contiguous() for d in d_edges], dc_n is not None)


def _four(d_edges: Sequence[Tensor], has_c: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (h0, c0, reset_h, reset_c), empty for what the cell has not or nobody asked for."""
    found = iter(d_edges)
    there = True, has_c, len(d_edges) > 1 + has_c, len(d_edges) > 1 + has_c and has_c
    h0, c0, reset_h, reset_c = (next(found) if t else d_edges[0].new_empty(0) for t in there)
    return h0, c0, reset_h, reset_c


@scan_backward.register_fake
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
    dc: Tensor | None = None,
    marks: Tensor | None = None,
    resets: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, D, H = dy.shape
    dx_gates = dy.new_empty(T, B, D, CELLS[cell].gates * H)
    dr_gates = torch.empty_like(dx_gates) if CELLS[cell].recurrent_gradient else dy.new_empty(0)
    has_c = dc_n is not None
    edges = [dy.new_empty((D, B, H) if there else 0) for there in (True, has_c, resets, resets and has_c)]
    return dx_gates, dr_gates, edges[0], edges[1], edges[2], edges[3]


@torch.library.custom_op("persistrnn::wave_forward", mutates_args=())
def wave_forward(
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
    marks: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of a stack in one launch, without autograd. Shapes are those of ``kernels.wave.forward``."""
    from .kernels import wave

    segments.check()
    x_gates, weight_hh, bias_hh = x_gates.contiguous(), weight_hh.contiguous(), bias_hh.contiguous()
    weight_ih, bias_ih = weight_ih.contiguous(), bias_ih.contiguous()
    reset = tuple(r for r in (reset_h, reset_c) if r is not None)
    given = x_gates, weight_hh, bias_hh, weight_ih, bias_ih, h0, c0
    marks = None if marks is None else marks.contiguous()
    return wave.forward(CELLS[cell], *given, precision, save, keep, cell_dtype, marks, reset)


@wave_forward.register_fake
def _(
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
    marks: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, B, _ = x_gates.shape
    L, _, H = h0.shape
    y = x_gates.new_empty(L, T + 2, B, H)
    c = x_gates.new_empty(0)
    if c0 is not None:
        slots = memory.c_slots(T, save or keep, marks is not None)
        c = x_gates.new_empty(L, slots, B, H, dtype=cell_dtype or x_gates.dtype)
    return y, c, x_gates.new_empty((L, T, B, CELLS[cell].saved, H) if save else 0)


@torch.library.custom_op("persistrnn::wave_backward", mutates_args=())
def wave_backward(
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
    dc: Tensor | None = None,
    marks: Tensor | None = None,
    resets: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Its backward, with the outputs of ``scan_backward``."""
    from .kernels import wave

    segments.check()
    d_final = tuple(d.contiguous() for d in (dh_n, dc_n) if d is not None)
    d_outputs = tuple(d.contiguous() for d in (dy, dc) if d is not None)
    weights = weight_hh.contiguous(), weight_ih.contiguous()
    marks = None if marks is None else marks.contiguous()
    dx_gates, dr_gates, d_edges = wave.backward(
        CELLS[cell], d_outputs, d_final, *weights, y, c, saved, precision, marks, resets
    )
    if dr_gates is dx_gates:
        dr_gates = dx_gates.new_empty(0)  # outputs of an operator may not alias each other
    return dx_gates, dr_gates, *_four(d_edges, dc_n is not None)


@wave_backward.register_fake
def _(
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
    dc: Tensor | None = None,
    marks: Tensor | None = None,
    resets: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, H = dy.shape
    L = y.shape[0]
    dx_gates = dy.new_empty(L, T, B, CELLS[cell].gates * H)
    dr_gates = torch.empty_like(dx_gates) if CELLS[cell].recurrent_gradient else dy.new_empty(0)
    has_c = dc_n is not None
    edges = [dy.new_empty((L, B, H) if there else 0) for there in (True, has_c, resets, resets and has_c)]
    return dx_gates, dr_gates, edges[0], edges[1], edges[2], edges[3]
