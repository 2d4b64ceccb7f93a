"""What is asked of the planner, as one record. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells import Cell
from .hardware import Hardware

WEIGHTS = ("int8", "fp8")  # of 8 bits, for inference
BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}  # per element of W_hh on chip


@dataclass(frozen=True)
class Problem:
    """One recurrent layer, or each layer of a stack, on one device.

    Attributes:
        cell: the cell's numbers.
        hidden: H >= 1, of one head.
        batch: B >= 1.
        directions: 1 or 2.
        dtype: "fp16", "bf16", "tf32" (float32 tensors, tf32 products) or "fp32" (full float32).
        hardware: the device.
        heads: blocks of a block-diagonal W_hh, each with a recurrence of its own; 1: it is whole.
        weight_dtype: of W_hh on chip, "int8" or "fp8" (e4m3) beside "fp16" or "bf16", for inference; "": dtype.

    Raises:
        ValueError: a number or the dtype is out of range.
    """

    cell: Cell
    hidden: int
    batch: int
    directions: int
    dtype: str
    hardware: Hardware
    heads: int = 1
    weight_dtype: str = ""

    def __post_init__(self) -> None:
        for name, value in (("hidden_size", self.hidden), ("batch", self.batch), ("heads", self.heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")
        if self.weight_dtype and self.cell.staged:
            raise ValueError(
                f"{self.cell.name} has a second product or a mean within its step, and the kernels for such have no "
                f"weights of 8 bits, got weight_dtype {self.weight_dtype!r}; leave it out"
            )
        if self.weight_dtype and (self.weight_dtype not in WEIGHTS or self.size != 2):
            raise ValueError(
                f"weight_dtype is {' or '.join(WEIGHTS)}, with dtype fp16 or bf16, got {self.weight_dtype!r} with "
                f"dtype {self.dtype}; give one of these, or leave weight_dtype out"
            )

    @property
    def recurrences(self) -> int:
        """That share nothing: one per direction and head."""
        return self.directions * self.heads

    @property
    def size(self) -> int:
        """Bytes per element of h, and of W_hh where it is multiplied."""
        return BYTES[self.dtype]

    @property
    def stored(self) -> int:
        """Bytes per element of W_hh in shared memory and on its way there."""
        return 1 if self.weight_dtype else self.size

    @property
    def precision(self) -> str:
        """Of products in float32."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def weight_bytes(self) -> int:
        """Of W_hh of one direction, or of one head in it."""
        return self.cell.gates * self.hidden**2 * self.stored
