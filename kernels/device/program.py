"""Which part of the work a program does, and where it meets the other programs of its group.

The grid is (slices, groups). A group takes one job, ``tiling.subtiles`` batch tiles in one direction (and in a pipeline
in one layer), and each of its programs a slice of the units.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Program(NamedTuple):
    """Which part of the work a program does.

    Attributes:
        layer: in a pipeline, else 0.
        direction: of the recurrences, which share nothing, and its place in every tensor: one per direction and head.
        reverse: 0 forward in time, 1 in reverse.
        first_row: of the batch, of its job.
        k_part, k_start: which of the R parts of K it multiplies, and the first unit of that.
        unit_group: whose outputs it forms; R programs share one, and with R = 1 that is its own units.
        owner_part: the part of K that its own units are in: who waits for them counts there.
        units, unit_mask: [U] and [1, U], its own units, and which of them exist.
    """

    layer: tl.tensor
    direction: tl.tensor
    reverse: tl.tensor
    first_row: tl.tensor
    k_part: tl.tensor
    k_start: tl.tensor
    unit_group: tl.tensor
    owner_part: tl.tensor
    units: tl.tensor
    unit_mask: tl.tensor


class Sync(NamedTuple):
    """Where the programs of a group meet.

    Attributes:
        counters: int32, per batch tile ``tiling.counters_per_tile`` of them: one per part of K, of the steps that its
            owners have put, and with R > 1 one per unit group, of the partial sums.
        own_counters: the same of the program's own group.
        partial_sums: fp32, per batch tile [2, S, tiling.sums * BB * R*U]: of even and odd exchanges.
        error: int32 in host memory, 1 once a wait has run out.
    """

    counters: tl.tensor
    own_counters: tl.tensor
    partial_sums: tl.tensor
    error: tl.tensor


class Neighbour(NamedTuple):
    """The layer of the pipeline whose result this one multiplies.

    Attributes:
        exists: 1, or 0 where there is none: then the operand is finite, and not awaited.
        pointer: to what it puts.
        sync: its counters.
    """

    exists: tl.tensor
    pointer: tl.tensor
    sync: Sync


@triton.jit
def locate(sync, first_job, B, tiling: tl.constexpr, exchange: tl.constexpr):
    """(Program, Sync) of the calling program. sync: of the launch. Jobs are numbered over all launches, and so are
    counters; a group, and its partial sums, are of this one."""
    counters, error, partial_sums = sync
    group = tl.program_id(1)
    job_of_launch, layer = group, 0
    if tiling.layers > 1:
        # The layers of a job are neighbours.
        job_of_launch = group // tiling.layers
        layer = group % tiling.layers
    job = first_job + job_of_launch
    rows_of_job: tl.constexpr = tiling.subtiles * tiling.batch_tile
    jobs_of_direction = tl.cdiv(B, rows_of_job)
    direction = job // jobs_of_direction
    reverse = direction
    if tiling.heads > 1:
        reverse = direction // tiling.heads
    first_row = job % jobs_of_direction * rows_of_job
    counters += (job * tiling.layers + layer) * (tiling.subtiles * tiling.counters_per_tile * exchange.stride)
    sums_of_tile: tl.constexpr = 2 * tiling.slices * tiling.sums * tiling.units_formed * tiling.batch_tile
    partial_sums += group.to(tl.int64) * (tiling.subtiles * sums_of_tile)
    slice_id = tl.program_id(0)
    unit_group = slice_id // tiling.k_parts
    k_part = slice_id % tiling.k_parts
    owner_part = slice_id // tiling.unit_groups
    k_start = k_part * tiling.units_per_part
    units = slice_id * tiling.units + tl.arange(0, tiling.units)
    mask = (units < tiling.hidden)[None, :]
    program = Program(layer, direction, reverse, first_row, k_part, k_start, unit_group, owner_part, units, mask)
    return program, Sync(counters, counters, partial_sums, error)


@triton.jit
def sync_of_layer(own, distance, tiling: tl.constexpr, exchange: tl.constexpr):
    """The Sync of the layer ``distance`` above."""
    per_layer: tl.constexpr = tiling.subtiles * tiling.counters_per_tile * exchange.stride
    return Sync(own.counters + distance * per_layer, own.counters, own.partial_sums, own.error)


@triton.jit
def own_counter(program, j: tl.constexpr, sync, tiling: tl.constexpr, exchange: tl.constexpr):
    """Where this program counts the steps of batch tile j that it has put."""
    return sync.counters + j * (tiling.counters_per_tile * exchange.stride) + program.owner_part * exchange.stride
