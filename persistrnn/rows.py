"""Rows of different lengths on torch's own kernels on a CPU, in about the time of equally long ones.

ATen's loop over a PackedSequence takes each step's rows out of the whole, and the backward of each is a tensor as large
as the whole: quadratic in T. Here the sequence is cut into parts of time, and each part runs as a dense batch, padded
where rows end inside it. Cutting at every length would be a call, and for oneDNN a new shape, for each of them; padding
alone would pay for the longest row as often as there are rows. So a part ends where enough rows have ended that the
padding they would be is worth a call (``WORTH_A_CALL``).

Rows are left-aligned, the longest first, and between layers packed, as a PackedSequence has them: then a part is a
slice of the data, nothing padded reaches another layer, and dropout draws what it draws for a PackedSequence. The
second direction turns each row around within its own length, and is a first direction from there on.

A padded step must leave the states of its row alone. An h is that of the row's last step, read from the output. A c is
not given out: in padding the gates are held open and shut (``OfTorch.padding``), so that it stays, to the bit.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from persistrnn import torch_path
from persistrnn.decide import TORCH
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options

# Multiply-adds of a layer's forward that take about as long as one call more. Measured on one thread of an EPYC with
# avx512, LSTM, GRU and RNN of H=16 to 256, T=5 to 1,000, B=16 to 256: from 2**20 to 2**25 most times change by less
# than a fifth; at 0 (a call for every length) and at infinity (one call) some double.
WORTH_A_CALL = 2**22
# Up to here ATen's own loop over packed rows is as fast, there up to a third faster than this, and torch.nn's to the
# bit. At T=50 its LSTM takes 1.3 to 2 times as long, at T=1,000 13 to 25 times.
FEW_STEPS = 16


class _Part(NamedTuple):
    """Steps of the sequence, and the rows that run in the first of them. of_rows: how many steps each row has, or None:
    all of them."""

    steps: int
    rows: int
    of_rows: Tensor | None


def pack(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [T, B, I] of these lengths, each in [1, T], as (data [N, I], batch_sizes, order, where): the order of the
    rows, and where the data are in x.flatten(0, 1)."""
    ordered, order = lengths.sort(descending=True, stable=True)
    active = torch.arange(int(ordered[0]), device=lengths.device).unsqueeze(1) < ordered
    where = (torch.arange(len(active), device=lengths.device).unsqueeze(1) * x.size(1) + order)[active]
    return x.flatten(0, 1).index_select(0, where), active.sum(1), order, where


def unpack(data: Tensor, where: Tensor, steps: int, batch: int) -> Tensor:
    """Packed rows as [T, B, I] again, with zeros where a row has ended."""
    padded = data.new_zeros(steps * batch, data.size(1)).index_copy(0, where, data)
    return padded.unflatten(0, (steps, batch))


def stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
    chunk: int = 0,
) -> list[Tensor]:
    """``torch_path.stack`` of packed rows.

    Args:
        input: [N, I], the data of a PackedSequence; batch_sizes: its own
        chunk: steps of the chunks of time between which the backward runs the forward again; 0: none. Of one direction
            a chunk runs through all layers, and their inputs are not kept either
    """
    directions, num_layers, dropout = options.directions, options.num_layers, options.active_dropout
    each = len(weights) // (num_layers * directions)
    multiplied = sum(w.numel() for w in weights if w.dim() > 1) // (num_layers * directions)
    parts = _parts(batch_sizes, chunk, multiplied)
    # Dropout draws for all steps of a layer at once, but where a chunk is all that is there.
    together = num_layers if directions == 1 and (chunk or dropout == 0) else 1
    order = turned(batch_sizes) if directions > 1 else None
    y, finals = input, []
    for first in range(0, num_layers, together):
        if first > 0 and dropout > 0:
            y = F.dropout(y, dropout)
        outputs = []
        for direction in range(directions):
            row = first * directions + direction
            own = weights[row * each : (row + together) * each]
            run = functools.partial(_layers, cell, options._replace(num_layers=together, batch_first=False))
            if chunk:
                run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=dropout > 0)
            x = y if order is None or direction == 0 else y.index_select(0, order)
            carried = [s[row : row + together] for s in states]
            pieces = []
            for data, part in zip(x.split([_count(p) for p in parts]), parts, strict=True):
                # The rows that go on stand first; those after them have ended.
                piece, *after = run(data, part, *(s[:, : part.rows] for s in carried), *own)
                carried = [
                    torch.cat([n, s[:, part.rows :].to(n.dtype)], 1) for n, s in zip(after, carried, strict=True)
                ]
                pieces.append(piece)
            out = torch.cat(pieces)
            outputs.append(out if direction == 0 or order is None else out.index_select(0, order))
            finals.append(carried)
        y = torch.cat(outputs, -1)
    return [y, *(torch.cat(s) for s in zip(*finals, strict=True))]


def _parts(batch_sizes: Tensor, chunk: int, multiplied: int) -> list[_Part]:
    """multiplied: multiply-adds of a step of one row."""
    sizes, counts = batch_sizes.unique_consecutive(return_counts=True)
    ends, steps = counts.cumsum(0), batch_sizes.numel()
    borders, rows = set(range(0, steps, chunk or steps)), int(sizes[0])
    for end, left in zip(ends.tolist(), sizes.tolist()[1:], strict=False):
        if left * 4 <= rows * 3 and (rows - left) * (steps - end) * multiplied >= WORTH_A_CALL:
            borders.add(end)
            rows = left
    parts = []
    first = 0
    for last in [*sorted(borders)[1:], steps]:
        part = batch_sizes[first:last]
        rows = int(part[0])
        equal = int(part[-1]) == rows
        parts.append(_Part(last - first, rows, None if equal else _lengths(part)))
        first = last
    return parts


def _count(part: _Part) -> int:
    return part.steps * part.rows if part.of_rows is None else int(part.of_rows.sum())


def _lengths(batch_sizes: Tensor) -> Tensor:
    """The lengths of the rows, the longest first."""
    return torch.bincount(batch_sizes - 1).flip(0).cumsum(0).flip(0)


def turned(batch_sizes: Tensor) -> Tensor:
    """Where each packed step finds the one that it changes places with as its row turns around."""
    begins = batch_sizes.cumsum(0) - batch_sizes
    time = torch.arange(batch_sizes.numel(), device=batch_sizes.device).repeat_interleave(batch_sizes)
    row = torch.arange(time.numel(), device=batch_sizes.device) - begins[time]
    return begins[_lengths(batch_sizes)[row] - 1 - time] + row


def _layers(cell: str, options: Options, input: Tensor, part: _Part, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Layers of one direction in one part: packed rows to packed rows, and the states after them. tensors: the states
    [layers, rows, features] and the weights."""
    n, run = CELLS[cell].states, functools.partial(_layer, cell, options.bias, part)
    return tuple(torch_path.by_layers(run, input, tensors[:n], tensors[n:], options))


def _layer(
    cell: str, bias: bool, part: _Part, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    if part.of_rows is None:
        y, *final = torch_path.layer(cell, bias, False, None, input.unflatten(0, (part.steps, -1)), states, weights)
        return y.flatten(0, 1), *final
    # Where the packed rows, and each row's last step, are in padded ones.
    running = (
        (torch.arange(part.steps, device=part.of_rows.device).unsqueeze(1) < part.of_rows)
        .flatten()
        .nonzero()
        .squeeze(1)
        .to(input.device)
    )
    last = ((part.of_rows - 1) * part.rows + torch.arange(part.rows, device=part.of_rows.device)).to(input.device)
    signs = TORCH[cell].padding
    if signs:  # one more input, 1 in padding, on which the gates hang
        weight_ih, *others = weights
        dtype = torch_path.autocast_dtype(input) or weight_ih.dtype
        column = torch.tensor(signs, dtype=dtype, device=input.device) * (torch.finfo(dtype).max / 4)
        column = column.to(weight_ih.dtype).repeat_interleave(weight_ih.size(0) // len(signs))
        weights = [torch.cat([weight_ih, column.unsqueeze(1)], 1), *others]
        input = F.pad(input, (0, 1))
    padding = input.new_zeros(part.steps * part.rows, input.size(1))
    if signs:
        padding[:, -1] = 1.0
    x = padding.index_copy(0, running, input)
    y, _, *final = torch_path.layer(cell, bias, False, None, x.unflatten(0, (part.steps, -1)), states, weights)
    y = y.flatten(0, 1)
    return y.index_select(0, running), y.index_select(0, last).unsqueeze(0), *final
