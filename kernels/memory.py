"""What a layer keeps from its forward to its backward, by ``save`` mode, and how many bytes that is. Pure Python.

    gates        y, c and the activated gates of every step: nothing is computed twice
    state        y and c of every step; the backward forms the gates again, with two GEMMs per chunk of time
    checkpoint   h and c before each chunk of time; the backward runs the chunk's forward again

Time is cut into chunks, so that the input half of the gates, its gradient and what is recomputed need the memory of one
chunk. Letters as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiling import Shape

MODES = ("gates", "state", "checkpoint")

# Bytes of the input half of one chunk's gates. A chunk costs a launch, which loads W_hh anew; "gates" has the most
# memory and the least patience.
CHUNK_BYTES = {"gates": 1 << 30, "state": 1 << 27, "checkpoint": 1 << 27}
SHORTEST_CHUNK = 128


@dataclass(frozen=True)
class Layers:
    """A stack, of which the memory is asked. itemsize: bytes of an element of x; c_itemsize: of a stored c. between:
    whether something happens between the layers (dropout, a second direction), so that each layer's y is kept."""

    cell: Shape
    input: int
    hidden: int
    layers: int
    directions: int
    itemsize: int
    c_itemsize: int
    between: bool

    @property
    def has_c(self) -> bool:
        return self.cell.states > 1

    @property
    def y(self) -> int:
        """Bytes of one layer's y for one step of one row, here and below."""
        return self.directions * self.hidden * self.itemsize

    @property
    def gates(self) -> int:
        return self.cell.gates * self.y

    @property
    def c(self) -> int:
        return self.directions * self.hidden * self.c_itemsize if self.has_c else 0


def c_slots(steps: int, every: bool, marked: bool) -> int:
    """Slots of the buffer of c: all steps and both edges, or initial and final, and with marks the reset state."""
    return steps + 2 if every else 3 if marked else 2


def chunk_steps(mode: str, gates: int, hidden: int, batch: int, directions: int, itemsize: int) -> int:
    """Steps of one chunk of time."""
    return max(SHORTEST_CHUNK, CHUNK_BYTES[mode] // (batch * directions * gates * hidden * itemsize))


def kept(mode: str, of: Layers, chunk: int) -> float:
    """Bytes that the layers keep for the backward per step and row, in chunks of so many steps: of every layer, and the
    output of the last one, which the caller keeps too. The input is the caller's."""
    if mode == "gates":
        return of.layers * (of.y + of.c + of.cell.saved * of.y)
    if mode == "state":
        return of.layers * (of.y + of.c)
    # c before a chunk is exact, in float32
    before = of.layers * (of.y + (of.directions * of.hidden * 4 if of.has_c else 0)) / chunk
    return before + of.y * (of.layers if of.between else 1)


def workspace(mode: str, of: Layers) -> float:
    """Bytes per step and row of a chunk that the backward needs beside what is kept, at the higher of its two peaks."""
    saved, both = of.cell.saved * of.y, of.directions > 1
    layers = 1 if of.between or mode != "checkpoint" else of.layers
    exact = of.directions * of.hidden * 4  # of float32: a c, or the y that a product is added to
    states = of.y + of.c
    held = {
        "gates": states + (saved if both else 0),
        "state": states + saved,
        "checkpoint": layers * (states + saved),
    }[mode]
    # While it is formed: the gates' input half, and with "state" their recurrent half, and h.
    again = {
        "gates": 0.0,
        "state": of.gates + of.y + of.cell.gates * exact,
        "checkpoint": of.gates + (exact - of.c if of.has_c else 0),
    }[mode]
    # While it is used: the gradients of both halves, of a layer between, and with two directions of y, cut out.
    used: float = of.gates * (2 if of.cell.recurrent_gradient else 1) + (of.y if layers > 1 else 0)
    if both:
        used += of.y
    return held + max(again, used)


def peak(mode: str, of: Layers, batch: int, steps: int, chunk: int, input_gradient: bool) -> float:
    """Predicted bytes at the highest point of a training step, without the input, the weights and their gradients."""
    # The gradient of a layer's y is there while that of its input is made; a stack in one go has nothing between.
    separate = of.layers > 1 and (of.between or mode != "checkpoint")
    lowest = of.input * of.itemsize if input_gradient else 0
    gradients = of.y + (max(of.y, lowest) if separate else lowest)
    return steps * batch * (kept(mode, of, chunk) + gradients) + min(steps, chunk) * batch * workspace(mode, of)
