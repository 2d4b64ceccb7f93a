"""What a layer keeps from its forward to its backward, by ``save`` mode, and how many bytes that is. Pure Python.

    gates        y, c and the activated gates of every step: nothing is computed twice
    state        y and c of every step; the backward forms the gates again, with two GEMMs per chunk of time
    checkpoint   h and c before each chunk of time; the backward runs the chunk's forward again

Time is cut into chunks, so that the input half of the gates, its gradient and what is recomputed need the memory of one
chunk. Torch's own path on a CPU keeps what its kernels keep, and with both other modes the state before each chunk.
Letters as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..cells import Cell

MODES = ("gates", "state", "checkpoint")

# Bytes of the input half of one chunk's gates, at most. A chunk costs a launch, which loads W_hh anew; "gates" has the
# most memory, and the fewest chunks.
CHUNK_BYTES = {"gates": 1 << 30, "state": 1 << 27, "checkpoint": 1 << 27}
# Where less is kept, what a chunk needs shall not be as much again: there are so many of them, if each is long enough
# for its launches. Torch's operations on a CPU, and a loop over them, cost the same in every chunk.
CHUNKS = 16
SHORTEST_CHUNK, SHORTEST_OF_TORCH = 128, 32


@dataclass(frozen=True)
class Layers:
    """A stack, of which the memory is asked. itemsize: bytes of an element of x; c_itemsize: of a stored c. between:
    whether something happens between the layers (dropout, a second direction), so that each layer's y is kept. copied:
    whether what is given out is no y but a copy of another state."""

    cell: Cell
    input: int
    hidden: int
    layers: int
    directions: int
    itemsize: int
    c_itemsize: int
    between: bool
    copied: bool = False

    @property
    def y(self) -> int:
        """Bytes of one layer's y for one step of one row, here and below."""
        return self.directions * self.hidden * self.itemsize

    @property
    def gates(self) -> int:
        return self.cell.inputs * self.y

    @property
    def c(self) -> int:
        """Of all states after h."""
        return self.directions * self.hidden * self.c_itemsize * (self.cell.states - 1)

    @property
    def masks(self) -> int:
        """Of extras that are drawn chunk by chunk: all of a cell that has no others."""
        return self.directions * self.hidden * self.cell.masks * (self.cell.masks == len(self.cell.extras))

    @property
    def extras(self) -> int:
        """Of those that are there for all steps."""
        return 0 if self.masks else len(self.cell.extras) * self.y

    @property
    def exact_c(self) -> int:
        """The same in float32."""
        return self.directions * self.hidden * 4 * (self.cell.states - 1)


def chunk_steps(
    mode: str,
    gates: int,
    hidden: int,
    batch: int,
    directions: int,
    itemsize: int,
    steps: int,
    launches: bool = True,
    larger: Callable[[int, int], int] = max,
    smaller: Callable[[int, int], int] = min,
) -> int:
    """Steps of one chunk of time.

    gates: tiles of their input half. launches: whether a chunk costs launches on a GPU. larger, smaller: of two numbers
    that may be symbolic, so that a graph for every T and B comes to hold no condition on them.
    """
    most = CHUNK_BYTES[mode] // (batch * directions * gates * hidden * itemsize)
    if mode != "gates":
        most = smaller(most, (steps + CHUNKS - 1) // CHUNKS)
    return larger(SHORTEST_CHUNK if launches else SHORTEST_OF_TORCH, most)


def kept(mode: str, of: Layers, chunk: int) -> float:
    """Bytes that the layers keep for the backward per step and row, in chunks of so many steps: of every layer, and the
    output of the last one, which the caller keeps too. The input is the caller's."""
    given = of.layers * of.extras + of.y * of.copied
    if mode == "gates":
        return given + of.layers * (of.y + of.c + of.cell.saved * of.y)
    if mode == "state":
        return given + of.layers * (of.y + of.c)
    # c before a chunk is exact, in float32
    before = of.layers * (of.y + of.exact_c) / chunk
    return given + before + of.y * (of.layers if of.between else 1)


def workspace(mode: str, of: Layers, whole: bool = False) -> float:
    """Bytes per step and row of a chunk that the backward needs beside what is kept, at the higher of its two peaks.
    whole: all steps are one launch, as with "gates" if one chunk holds them."""
    saved, both = of.cell.saved * of.y, of.directions > 1
    layers = 1 if of.between or mode != "checkpoint" else of.layers
    exact = of.directions * of.hidden * 4  # of float32: a c, or the y that a product is added to
    states = of.y + of.c
    # While it is used: the gradients of both halves, of a layer between, and with two directions of y, cut out.
    d_gates = of.cell.inputs + of.cell.more_gradients + of.cell.gates if of.cell.recurrent_gradient else of.cell.gates
    used: float = d_gates * of.y + (of.y if layers > 1 else 0)
    if mode == "gates" and whole:
        return used + of.masks
    if both:
        used += of.y
    held = {
        "gates": states + (saved if both else 0),
        "state": states + saved,
        "checkpoint": layers * (states + saved),
    }[mode]
    # While it is formed: the gates' input half, and with "state" their recurrent half, and h.
    again = {
        "gates": 0.0,
        "state": of.gates + of.y + of.cell.gates * exact,
        "checkpoint": of.gates + of.exact_c - of.c,
    }[mode]
    return held + max(again, used) + of.masks + (of.extras if both else 0)


def needed(mode: str, of: Layers, batch: int, steps: int, chunk: int) -> float:
    """Predicted bytes at the highest point of a training step: what is kept, and the work on one chunk beside it.
    Without the input, the weights, and the gradients of the input and the output."""
    work = min(steps, chunk) * workspace(mode, of, steps <= chunk)
    return batch * (steps * kept(mode, of, chunk) + work)


def peak(mode: str, of: Layers, batch: int, steps: int, chunk: int, input_gradient: bool) -> float:
    """``needed``, with the gradients of the output and, where it is asked for, of the input."""
    # The gradient of a layer's y is there while that of its input is made; a stack in one go has nothing between.
    separate = of.layers > 1 and (of.between or mode != "checkpoint")
    lowest = of.input * of.itemsize if input_gradient else 0
    gradients = of.y + (max(of.y, lowest) if separate else lowest)
    return needed(mode, of, batch, steps, chunk) + steps * batch * gradients


# ---- torch's own path on a CPU --------------------------------------------------------------------------------------

# Bytes of oneDNN's LSTM per step and row, as torch 2.13 allocates them, by bytes of an element: its workspace and y,
# per unit of H and per feature of the wider of input and H; and what its backward takes beside, per unit and feature.
ONEDNN = {4: ((40.0, 25.0), (16.0, 6.0)), 2: ((24.3, 20.9), (5.4, 5.3))}
LOOP = 8  # elements per step, row and unit that ATen's loop over steps keeps, of either cell


def torch_peak(mode: str, of: Layers, batch: int, steps: int, chunk: int, onednn: bool, input_gradient: bool) -> float:
    """``peak`` of torch's own path on a CPU, without dropout. onednn: an LSTM that oneDNN runs, else ATen's loop."""
    both, own = of.directions > 1, of.hidden * of.itemsize
    features = [of.input, *[of.y // of.itemsize] * (of.layers - 1)]
    if onednn:
        (unit, feature), (unit_more, feature_more) = ONEDNN[of.itemsize]
        layers = [of.hidden * unit + max(of.hidden, f) * feature for f in features]
        more = of.hidden * unit_more + features[-1] * feature_more
    else:
        layers = [LOOP * own] * of.layers
        more = of.cell.gates * own  # the input half of the gates, in the forward
    if mode == "gates":
        beside = of.y * (1 + (of.layers if both else 0)) if onednn else of.y * both
        return batch * steps * (of.directions * sum(layers) + more + beside)
    # A second direction runs layer by layer, over each layer's input in reverse.
    work = (layers[-1] if both else sum(layers)) + more - (0 if onednn else own)
    held = (of.layers if both else 1) * of.y + (sum(features) * of.itemsize + own if both else 0)
    before = of.layers * of.cell.states * of.y / chunk
    lowest = of.input * of.itemsize if input_gradient else 0
    gradients = of.y + (of.y if both and of.layers > 1 else lowest)
    return batch * (steps * (held + before + gradients) + min(steps, chunk) * work)
