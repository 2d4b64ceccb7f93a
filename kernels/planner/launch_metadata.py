"""What one launch of a scan kernel computes and moves, for Triton's profiler Proton: ``launch_metadata`` of them.

Triton calls it at a launch while a profiler is listening, and never otherwise. Keys are Proton's: "name", "flops16" or
"flops32" by the bits of an element of W_hh, and "bytes".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .tiling import Tiling


def launch_metadata(grid: tuple[int, ...], metadata: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of one launch of ``scan_forward`` or ``scan_backward``.

    Args:
        grid: (slices, groups)
        metadata: of the compiled kernel; its name is read
        arguments: the kernel's, by name

    Returns:
        name: the kernel, its cell and its sizes. flops{16, 32}: of the products, without padding: 2*G*H*H per row, step
        and matrix. bytes: what is given and what is left behind, once each, as it must cross the device's memory;
        neither what slices exchange through L2 nor weights that are streamed again.
    """
    t: Tiling = arguments["tiling"]
    T, B, first = arguments["T"], arguments["B"], arguments["first_job"]
    jobs = range(first, first + grid[1] // t.layers)
    rows = rows_of(jobs, B, t)
    matrices = 2 * t.layers - 1  # W_hh of each layer, W_ih of all but the lowest
    weight = arguments["weight"]
    size = weight.element_size()
    flops = 2 * t.gates * t.hidden * t.hidden * rows * T * matrices
    name = f"{metadata.name} [{arguments['cell'].__name__}, H={t.hidden}, B={B}, T={T}, D={t.directions}, L={t.layers}]"
    moved = matrices * t.gates * t.hidden * t.hidden * size * directions_of(jobs, B, t)
    values = arguments_moved(arguments, t)
    moved += sum(rows * T * count * of.element_size() for of, count in values)
    # Weights of 8 bits are multiplied in the dtype of h.
    return {"name": name, f"flops{8 * arguments['states'][0].element_size()}": float(flops), "bytes": int(moved)}


def arguments_moved(arguments: Mapping[str, Any], t: Tiling) -> Iterable[tuple[Any, int]]:
    """(tensor, elements of it that are read or written per row and step), of those that grow with T."""
    H, saved, states = t.hidden, arguments["saved"], arguments["states"]
    marks, _, extras = arguments["step_data"]
    if t.backward:
        yield from ((d, H) for d in arguments["d_outputs"])  # of the highest layer
        dx, dr = arguments["d_gates"]
        yield dr, t.layers * t.gates * H
        if t.recurrent_gradient:
            yield dx, t.layers * (t.inputs + t.more_gradients) * H
        yield from ((state, t.layers * H) for state in states)
    else:
        yield arguments["x_gates"], t.inputs * H  # of the lowest layer
        # The states after h are written at every step only where they are kept.
        written = states[: len(states) // 2 if arguments["KEEP"] else 1]
        yield from ((state, t.layers * H) for state in written)
    if saved is not None:
        yield saved, t.layers * t.saved * H
    if marks is not None:
        yield marks, t.layers
    if extras is not None:
        yield extras, t.layers * t.extras * H


def _per_direction(batch: int, t: Tiling) -> int:
    return t.jobs(batch) // t.directions


def rows_of(jobs: Iterable[int], batch: int, t: Tiling) -> int:
    """Rows of the batch that so many jobs take, each in its direction (``tiles.job_of``)."""
    wide = t.subtiles * t.batch_tile
    return sum(min(wide, batch - job % _per_direction(batch, t) * wide) for job in jobs)


def directions_of(jobs: Iterable[int], batch: int, t: Tiling) -> int:
    """Directions among the jobs: each has a W_hh of its own."""
    return len({job // _per_direction(batch, t) for job in jobs})
