"""Allocate, ask for the plan, launch: the one way in to the scan kernels.

A layer is a stack of one. A stack of several has one direction and one launch: all of its matrices are on the chip and
all of its layers at work at the same time, each one step behind the layer below (two behind the one above, in the
backward), so that it takes about T + L steps instead of T times L.

Letters are those of ``tensors``. States go h first, then what else the cell has.

On several streams at once: a launch is on the current stream, its memory belongs to it, and being cooperative it begins
when there is room for all of its programs. So launches of several streams, as of several layers, wait for each other's
end or run beside each other, and cannot each hold a part of the device that the other one needs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .cells import Cell, derived
from .compilation import on_device, start
from .device.exchange import Exchange, exchange_on, fitting
from .device.recompute import BLOCK, activate
from .device.scan import scan_backward, scan_forward
from .device.staged_scan import staged_backward, staged_forward
from .fills import Fills, edges
from .planner import hardware as devices
from .planner import occupancy, pipeline
from .planner import plan as planning
from .planner.problem import Problem
from .tensors import Gradients, Kept, Weights, host_word, taken

# Number of launches per kernel name in this process: tests use it to prove which path made their numbers.
LAUNCHES: Counter[str] = Counter()

# Weights of 8 bits by the dtype that holds them: the kernels take fp8 as its bits.
OF_8_BITS = {torch.int8: "int8", torch.uint8: "fp8"}

# TRITON_INTERPRET=1 at import time turns the kernels into plain Python over NumPy.
INTERPRETED = not isinstance(scan_forward, triton.JITFunction)


def options(part: planning.Pass, arch: str) -> dict[str, object]:
    """Compile options of a pass."""
    chosen: dict[str, object] = {
        "num_warps": part.choice.warps,
        "num_stages": 1,  # else loads are pipelined into extra shared memory
        # Slices wait for each other: a grid that cannot be resident is an error, never a hang.
        "launch_cooperative_grid": part.tiling.slices > 1,
        "enable_fp_fusion": True,
    }
    if arch.startswith("sm_"):
        # Left alone, ptxas stops at 128 and spills (seen: GRU forward, H=1024, Triton 3.9.0).
        chosen["maxnreg"] = occupancy.register_limit(part.choice)
    return chosen


def label(dtype: torch.dtype, precision: str) -> str:
    """The plan's name of a tensor dtype and, for float32, of the precision of products ("tf32" or "ieee")."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32" if precision == "tf32" else "fp32"}
    if dtype not in names:
        raise ValueError(f"the persistent kernels run float16, bfloat16 and float32, got {dtype}; use backend='torch'")
    return names[dtype]


@cache
def hardware(device: torch.device) -> devices.Hardware:
    """Read from the live device, so that a partition of a GPU is planned for as what it is."""
    if device.type == "cpu":
        return devices.INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return devices.live(
        properties.name,
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stub lacks it
        properties.regs_per_multiprocessor,  # type: ignore[attr-defined]
        properties.L2_cache_size,
    )


def problem_of(
    cell: Cell,
    hidden: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    heads: int = 1,
    weight_dtype: str = "",
) -> Problem:
    """What the planner is asked about one layer. hidden: H of one head. weight_dtype: as in ``Problem``."""
    return Problem(cell, hidden, batch, directions, label(dtype, precision), hardware(device), heads, weight_dtype)


def choose(*sizes: Any) -> planning.Plan:
    """The plan of a layer, by the arguments of ``problem_of``."""
    return planning.plan_layer(problem_of(*sizes))


def choose_stack(
    cell: Cell, hidden: int, layers: int, batch: int, dtype: torch.dtype, precision: str, device: torch.device
) -> pipeline.Pipeline | None:
    """The plan of a stack in one launch; None where its layers do not fit the device together."""
    if hardware(device) is devices.INTERPRETER:
        return None  # programs that run one after the other cannot wait for each other
    return pipeline.plan_pipeline(problem_of(cell, hidden, batch, 1, dtype, precision, device), layers)


def plan_of(
    cell: Cell, hidden: int, layers: int, batch: int, directions: int, like: Tensor, precision: str, heads: int = 1,
    weight_dtype: str = "",
) -> planning.Plan | pipeline.Pipeline:  # fmt: skip
    """The plan of a call.

    Raises:
        ValueError: a layer does not fit the device, or several do not together.
    """
    if layers == 1:
        of = like.dtype, precision, like.device, heads, weight_dtype
        return choose(cell, hidden, batch, directions // heads, *of)
    if heads > 1:
        raise ValueError(f"{layers} layers of {heads} heads cannot run in one launch; run them one after the other")
    found = choose_stack(cell, hidden, layers, batch, like.dtype, precision, like.device)
    if found is None:
        what = f"{layers} layers of hidden_size={hidden} do not fit {hardware(like.device).name} together"
        raise ValueError(f"{pipeline.obstacle(cell) or what}; run them one after the other")
    return found


def exchange_for(device: torch.device) -> Exchange:
    return exchange_on(hardware(device).arch if device.type == "cuda" else "")


_errors: dict[torch.device, Tensor] = {}


def _error_word(device: torch.device) -> Tensor:
    """The word that a wait sets when it runs out."""
    if device not in _errors:
        _errors[device] = host_word(device)
    return _errors[device]


def check() -> None:
    """Raise if a wait inside a finished launch ran out, on any device. Does not synchronise.

    Raises:
        RuntimeError: the results of that launch, and all that was computed from them, are wrong.
    """
    for device, word in _errors.items():
        if taken(word):
            raise RuntimeError(
                f"a persistent kernel on {device} gave up waiting for another program of its group; its results are "
                "invalid. The programs of one launch must be resident at the same time: is the device shared with "
                "another process (MPS, MIG, a debugger)? Run with PERSISTRNN_DEBUG=1 to find the call, or use "
                "backend='torch'."
            )


def launch_scan(
    kernel: Any,
    part: planning.Pass,
    jobs: int,
    exchange: Exchange,
    device: torch.device,
    weight_hh: Tensor,
    fills: Fills,
    **arguments: Any,
) -> None:
    """Launch all jobs, as many at a time as are resident together. fills: what must be in memory before."""
    t = part.tiling
    counted = t.slices * max(1, t.means)
    if arguments["T"] * counted >= 2**31:
        raise ValueError(
            f"a sequence of {arguments['T']} steps is too long for the group's counter: with {t.slices} "
            f"slices at most {(2**31 - 1) // counted} steps are possible; cut it, carrying the state"
        )
    tiles = jobs * t.layers * t.subtiles
    # Counters, owned by this call: a set per batch tile, so that launches in turn do not meet.
    size = tiles * t.counters_per_tile * exchange.stride if t.slices > 1 else 1
    counters = torch.empty(size, dtype=torch.int32, device=device)
    if t.slices > 1:
        fills.put(counters, None)
    fills.run()
    if t.stride != t.hidden:
        weight_hh = _with_stride(weight_hh, t.stride)
    # Of the groups of one launch: the next launch follows on the same stream.
    tiles_at_once = min(jobs, part.groups) * t.layers * t.subtiles
    sums = t.slices > 1 and (t.k_parts > 1 or t.means > 0)
    size = tiles_at_once * 2 * t.slices * t.sums * t.units_formed * t.batch_tile if sums else 1
    parts = torch.empty(size, dtype=torch.float32, device=device)
    sync = counters, _error_word(device), parts
    arch = hardware(device).arch
    with on_device(device):
        for first in range(0, jobs, part.groups):
            grid = (t.slices, min(part.groups, jobs - first) * t.layers)
            launched = start(
                device,
                kernel,
                grid,
                **arguments,
                weight=weight_hh,
                sync=sync,
                first_job=first,
                tiling=t,
                exchange=exchange,
                **options(part, arch),
            )
            LAUNCHES[kernel.__name__] += launched
    debug = os.environ.get("PERSISTRNN_DEBUG") == "1"
    if debug and device.type == "cuda":
        torch.cuda.synchronize(device)
    if debug or device.type == "cpu":
        check()


def _with_stride(weight: Tensor, stride: int) -> Tensor:
    """With rows of 16-byte multiples: else every load of a weight is in narrow pieces, in each step where weights are
    streamed. What stays on chip is loaded once and needs no copy: in pieces of 4 bytes at most 304 instructions more of
    a thread before its loop over time, and in the backward fewer than with padded rows (seen: bf16, H=250 and 1150,
    sm_90, Triton 3.9.0). In pieces of 2 bytes some kernels spilled (forward, 777: 26 to 80). What is behind each row is
    never read.

    Made anew at every launch: nothing on the host tells whether a weight has changed. Its version stays as it is in
    ``weight.data.mul_(2)``, when a captured graph that holds an optimizer's step is replayed, and when memory that it
    shares is written elsewhere (DLPack, NumPy, another library's kernel); and its address may come back with others.
    """
    rows = weight.new_empty(*weight.shape[:-1], stride)
    rows[..., : weight.shape[-1]].copy_(weight)
    return rows


def flag(buffer: Tensor, part: planning.Pass, exchange: Exchange) -> None:
    """Fill the exchange buffer with the reserved NaN (all bits one)."""
    if exchange.protocol == "flags" and part.tiling.slices > 1:
        buffer.view(torch.int16 if buffer.element_size() == 2 else torch.int32).fill_(-1)


def unreserved(h: Tensor, exchange: Exchange) -> Tensor:
    """h with other NaN: one of the caller's may be the reserved one."""
    return torch.where(h.isnan(), torch.nan, h) if exchange.protocol == "flags" else h


def _both(fills: Fills, first: Tensor, second: Tensor | None, above: bool) -> Tensor:
    """``first`` of one layer; of a stack, once ``fills`` run, [L, 2, ...] of ``first`` [L, ...] and ``second``
    [L - 1, ...], which belongs to layers 1 to L - 1, or to 0 to L - 2 if it is that of the layer above; zeros for the
    layer that has none."""
    if second is None:
        return first
    both = first.new_empty(first.shape[0], 2, *first.shape[1:])
    neighbours = [*second, None] if above else [None, *second]
    for pair, own, neighbour in zip(both, first, neighbours, strict=True):
        fills.put(pair[0], own)
        fills.put(pair[1], neighbour)
    return both


def _step_data(cell: Cell, marks: Tensor | None, params: Tensor | None, extras: Tensor | None) -> tuple[Any, ...]:
    """What a step takes besides gates and states, as the kernels have it."""
    given = (cell.params, cell.step_params, params, "params"), (cell.extras, len(cell.extras), extras, "extras")
    for names, rows, tensor, what in given:
        found = 0 if tensor is None else tensor.shape[-2]
        if found != rows:
            raise ValueError(f"{cell.name} takes {what} {names or 'none'}, {rows} rows of H: got {found} of them")
    return marks, params, extras


def forward(
    cell: Cell,
    x_gates: Tensor,
    weights: Weights,
    initial: Sequence[Tensor],
    precision: str,
    save: bool,
    keep: bool = False,
    cell_dtype: torch.dtype | None = None,
    marks: Tensor | None = None,
    reset: Sequence[Tensor] = (),
    saved: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
) -> Kept:
    """Run the forward scan.

    Args:
        cell: the cell.
        x_gates: [T, B, D, X*H], input half of the lowest layer's gates. T, B >= 1.
        weights: of all layers; of 8 bits in one layer, without save.
        initial: the states before the first step, each [L*D, B, H]; none: zeros.
        precision: of products in float32, "tf32" or "ieee".
        save: keep what the backward needs, all states of every step among it; keep: keep those all the same.
        cell_dtype: of the stored states after h (None: of x_gates); between the steps they are float32 in any case.
        marks: uint8 [T, B, D], where rows begin anew or skip a step (``marks``), the same for all layers, or None.
        reset: the states that rows begin anew from, each [L*D, B, H]; none: zeros.
        saved: with save, where to put what the backward needs; None: in new memory.
        extras: [L, T, B, D, E, H], what the cell takes per step besides its gates, uint8 or the dtype of x_gates.
        heads: in each direction. Then D, here and in the results, counts all of them, those of one direction side by
            side, and H is of one; but for marks, which they share.
        All tensors contiguous, on one device, float16, bfloat16 or float32, but for what is said of them.

    Raises:
        ValueError: the size does not fit the device; params or extras that the cell has not, or the other way round.
    """
    check()
    T, B, D, _ = x_gates.shape
    rows, _, H = weights.weight_hh.shape
    L = rows // D
    part = plan_of(cell, H, L, B, D, x_gates, precision, heads, OF_8_BITS.get(weights.weight_hh.dtype, "")).forward
    exchange = fitting(exchange_for(x_gates.device), H * x_gates.element_size())
    every, marked = save or keep, marks is not None
    fills = Fills()
    y = x_gates.new_empty(L, T + 2, B, D, H)
    flag(y, part, exchange)
    nothing: list[Tensor | None] = [None] * cell.states
    before, anew = (list(given) or nothing for given in (initial, reset))
    of_y = [None if h is None else unreserved(h, exchange) for h in (before[0], anew[0])]
    edges(fills, y, of_y[0], of_y[1], marked, heads)
    states = [y]
    for i in range(1, cell.states):
        given = before[i]
        if every:
            states.append(x_gates.new_empty(L, T + 2, B, D, H, dtype=cell_dtype or x_gates.dtype))
            edges(fills, states[i], given, anew[i], marked, heads)
            continue
        if given is None or marked or given.dtype != (cell_dtype or x_gates.dtype) or not given.is_contiguous():
            given = x_gates.new_empty(1 + marked, L * D, B, H, dtype=cell_dtype or x_gates.dtype)
            fills.put(given[0], before[i])
            if marked:
                fills.put(given[1], anew[i])
        states.append(given)
    finals = [s.new_empty(L * D, B, H) for s in states]
    bias = None if weights.bias_hh is None else _both(fills, weights.bias_hh, weights.bias_ih, above=False)
    if (save or cell.products) and saved is None:
        saved = x_gates.new_empty(L, T, B, D, cell.saved, H)
    if cell.products:  # whose operands slices exchange there
        assert saved is not None
        flag(saved, part, exchange)
    launch_scan(
        staged_forward if cell.staged else scan_forward,
        part,
        part.tiling.jobs(B),
        exchange,
        x_gates.device,
        _both(fills, weights.weight_hh, weights.weight_ih, above=False),
        fills,
        x_gates=x_gates,
        gate_data=(bias, weights.scale),
        states=(*states, *finals),
        saved=saved if cell.saved else None,
        KEEP=every,
        step_data=_step_data(cell, marks, weights.params, extras),
        T=T,
        B=B,
        cell=derived(cell.name).forward,
    )
    return Kept(states if every else [y], saved if save else None, finals)


def backward(
    cell: Cell,
    d_outputs: Sequence[Tensor],
    d_final: Sequence[Tensor | None],
    weight_hh: Tensor,
    weight_ih: Tensor | None,
    kept: Kept,
    precision: str,
    marks: Tensor | None = None,
    resets: bool = False,
    params: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
) -> Gradients:
    """Run the backward scan.

    Args:
        d_outputs: gradient of the highest layer's every h_t and, where they were given out, of every further state,
            [T, B, D, H] each.
        d_final: that of the final states, each [L*D, B, H]; None: zeros, in the dtype of d_outputs.
        weight_hh, weight_ih, precision, marks, params, extras, heads: of the forward; kept: what it left, with save.
        resets: whether gradients of the reset states are asked for.

    Raises:
        ValueError: the size does not fit the device.
    """
    check()
    like = d_outputs[0]
    T, B, D, H = like.shape
    L = len(weight_hh) // D
    part = plan_of(cell, H, L, B, D, like, precision, heads).backward
    exchange = fitting(exchange_for(like.device), H * like.element_size())

    def gates(tiles: int, exchanged: bool) -> Tensor:
        """[L, T, B, D, tiles*H]; of several layers [L*T + 1, B, D, tiles*H], with a row of zeros after those of the
        steps: what the highest one hears from above."""
        buffer = like.new_empty(*((L, T) if L == 1 else (L * T + 1,)), B, D, tiles * H)
        if exchanged:
            flag(buffer, part, exchange)
        if L > 1:
            fills.put(buffer[-1], None)
        return buffer

    fills = Fills()
    dr_gates = gates(cell.gates, exchanged=True)
    dx_gates = gates(cell.stored_gradients, exchanged=L > 1) if cell.recurrent_gradient else dr_gates
    finals = [like.new_empty(L * D, B, H) if d is None else d for d in d_final]
    for made, d in zip(finals, d_final, strict=True):
        if d is None:
            fills.put(made, None)
    d_edges = [torch.empty_like(d) for _ in range(2 if resets else 1) for d in finals]
    launch_scan(
        staged_backward if cell.staged else scan_backward,
        part,
        part.tiling.jobs(B),
        exchange,
        like.device,
        _both(fills, weight_hh, weight_ih, above=True),
        fills,
        d_outputs=tuple(d_outputs),
        states=tuple(kept.states),
        saved=kept.saved if cell.saved else None,
        step_data=_step_data(cell, marks, params, extras),
        d_states=(*finals, *d_edges),
        d_gates=(dx_gates, dr_gates),
        T=T,
        B=B,
        cell=derived(cell.name).backward,
    )
    same = dr_gates is dx_gates
    if L > 1:
        dx_gates, dr_gates = (g[:-1].unflatten(0, (L, T)) for g in (dx_gates, dr_gates))
    n = cell.states
    return Gradients(dx_gates, dx_gates if same else dr_gates, tuple(d_edges[:n]), tuple(d_edges[n:]))


def recompute(
    cell: Cell,
    x_gates: Tensor,
    r_gates: Tensor,
    bias_hh: Tensor,
    states: Sequence[Tensor],
    marks: Tensor | None = None,
    params: Tensor | None = None,
    extras: Tensor | None = None,
    heads: int = 1,
) -> Tensor:
    """What the forward would have saved, from both halves of the gates and the states of all steps.

    Args:
        cell: the cell.
        x_gates: [T, B, D, X*H], input half of the gates.
        r_gates: float32 [D, T*B, G*H], ``h_{t-1} @ W_hh^T`` of every step.
        bias_hh: [D, G*H].
        states: each [1, T + 2, B, D, H], as a forward with ``keep`` leaves them.
        marks, params, extras, heads: of that forward.
        All contiguous, on one device.

    Returns:
        saved: [T, B, D, n, H] in the dtype of x_gates.
    """
    T, B, D, _ = x_gates.shape
    H = states[0].shape[-1]
    saved = x_gates.new_empty(T, B, D, cell.saved, H)
    if not cell.saved:
        return saved
    grid = (triton.cdiv(T * B * H, BLOCK), D)
    given = x_gates, r_gates, bias_hh, tuple(states), _step_data(cell, marks, params, extras), saved, T, B
    with on_device(x_gates.device):
        fixed = derived(cell.name).forward, cell, D, H, heads, INTERPRETED, BLOCK
        LAUNCHES["activate"] += start(x_gates.device, activate, grid, *given, *fixed, enable_fp_fusion=True)
    return saved
