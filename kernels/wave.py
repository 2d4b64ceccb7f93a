"""A stack of L layers in one launch: all of its matrices on the chip, all layers at work at the same time, each one
step behind the layer below (two behind the one above, in the backward): T + L steps, about, instead of T times L.

Letters as everywhere; D is 1, because a second direction needs the layer below to be whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .cells import Cell
from .device.pointwise import BACKWARD, FORWARD
from .device.scan import scan_backward, scan_forward
from .planner import hardware as devices
from .planner import pipeline
from .planner.memory import c_slots
from .planner.problem import Problem


def choose(
    cell: Cell, hidden: int, layers: int, batch: int, dtype: torch.dtype, precision: str, device: torch.device
) -> pipeline.Pipeline | None:
    """The plan of a stack as a wave; None where it does not fit the device together."""
    hardware = launch.hardware(device)
    if hardware is devices.INTERPRETER:
        return None  # programs that run one after the other cannot wait for each other
    return pipeline.plan_pipeline(Problem(cell, hidden, batch, 1, launch.label(dtype, precision), hardware), layers)


def _packed(first: Tensor, second: Tensor, above: bool) -> Tensor:
    """[L, 2, ...] of ``first`` [L, ...] and ``second`` [L - 1, ...], which belongs to layers 1 to L - 1, or to 0 to
    L - 2 if it is that of the layer above; zeros for the layer that has none."""
    both = first.new_zeros(first.shape[0], 2, *first.shape[1:])
    both[:, 0] = first
    both[slice(None, -1) if above else slice(1, None), 1] = second
    return both


def forward(
    cell: Cell,
    x_gates: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    precision: str,
    save: bool,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward of a stack.

    Args:
        cell: the cell.
        x_gates: [T, B, G*H], input half of the lowest layer's gates. T, B >= 1.
        weight_hh: [L, G*H, H]; bias_hh: [L, G*H].
        weight_ih: [L - 1, G*H, H]; bias_ih: [L - 1, G*H], of the upper layers.
        h0: [L, B, H]; c0: [L, B, H], None if the cell has no c.
        precision, save, keep, cell_dtype: as in ``launch.forward``; marks: [T, B], the same for all layers.
        reset: the states that rows begin anew from, each [L, B, H]; none: zeros.
        All tensors contiguous, on one device, float16, bfloat16 or float32.

    Returns:
        y: [L, T + 2, B, H] with h0 in slot 0; c: the same with save or keep, else [L, 2, B, H] with the final c in slot
        1 ([L, 3, B, H] with marks); empty if the cell has no c. saved: [L, T, B, n, H] with save, else empty.

    Raises:
        ValueError: the stack does not fit the device.
    """
    launch.check()
    T, B, _ = x_gates.shape
    L, _, H = h0.shape
    part = _plan(cell, H, L, B, x_gates, precision).forward
    exchange = launch.exchange_for(x_gates.device)
    y = x_gates.new_empty(L, T + 2, B, H)
    launch.flag(y, part, exchange)
    h0, *reset = (launch.unreserved(h, exchange) for h in (h0, *reset))
    c = x_gates.new_empty(0)
    if c0 is not None:
        slots = c_slots(T, save or keep, marks is not None)
        c = x_gates.new_empty(L, slots, B, H, dtype=cell_dtype or x_gates.dtype)
    for i, (states, initial) in enumerate(((y, h0), (c, c0))):
        if initial is not None:
            states[:, -1].copy_(reset[i]) if reset else states[:, -1].zero_()
            states[:, 0].copy_(initial)
    saved = x_gates.new_empty((L, T, B, cell.saved, H) if save else 0)
    launch.launch_scan(
        scan_forward,
        part,
        part.tiling.jobs(B),
        exchange,
        x_gates.device,
        _packed(weight_hh, weight_ih, above=False),
        x_gates=x_gates,
        bias=_packed(bias_hh, bias_ih, above=False),
        states=(y, c)[: cell.states],
        saved=saved if save else None,
        marks=marks,
        T=T,
        B=B,
        cell=FORWARD[cell.name],
        KEEP=save or keep,
    )
    return y, c, saved


def backward(
    cell: Cell,
    d_outputs: Sequence[Tensor],
    d_final: Sequence[Tensor],
    weight_hh: Tensor,
    weight_ih: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    precision: str,
    marks: Tensor | None = None,
    resets: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run the backward of a stack.

    Args:
        d_outputs: gradient of the highest layer's every h_t and, where it was given out, c_t, each [T, B, H].
        d_final: that of the final states, each [L, B, H].
        weight_hh, weight_ih, y, c, saved, precision, marks: of the forward, with save.
        resets: whether gradients of the reset states are asked for.

    Returns:
        dx_gates, dr_gates: [L, T, B, G*H], the same tensor where the cell's two gradients are the same.
        d_edges: gradient of the initial states, and with ``resets`` of the reset states, each [L, B, H].
    """
    launch.check()
    like = d_outputs[0]
    T, B, H = like.shape
    L = y.shape[0]
    part = _plan(cell, H, L, B, like, precision).backward
    exchange = launch.exchange_for(like.device)
    gates = []
    for _ in range(2 if cell.recurrent_gradient else 1):
        buffer = like.new_empty(L * T + 1, B, cell.gates * H)
        launch.flag(buffer, part, exchange)
        buffer[-1].zero_()  # what the highest layer hears from above
        gates.append(buffer)
    d_edges = tuple(torch.empty_like(d) for _ in range(2 if resets else 1) for d in d_final)
    launch.launch_scan(
        scan_backward,
        part,
        part.tiling.jobs(B),
        exchange,
        like.device,
        _packed(weight_hh, weight_ih, above=True),
        d_outputs=tuple(d_outputs),
        states=(y, c)[: cell.states],
        saved=saved,
        marks=marks,
        d_states=(*d_final, *d_edges),
        d_gates=(gates[-1], gates[0]),
        T=T,
        B=B,
        cell=BACKWARD[cell.name],
    )
    dx_gates, dr_gates = (buffer[:-1].unflatten(0, (L, T)) for buffer in (gates[-1], gates[0]))
    return dx_gates, dx_gates if len(gates) == 1 else dr_gates, d_edges


def _plan(cell: Cell, hidden: int, layers: int, batch: int, like: Tensor, precision: str) -> pipeline.Pipeline:
    found = choose(cell, hidden, layers, batch, like.dtype, precision, like.device)
    if found is None:
        raise ValueError(
            f"{layers} layers of hidden_size={hidden} do not fit {launch.hardware(like.device).name} together; "
            "run them one after the other"
        )
    return found
