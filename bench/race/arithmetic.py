"""What a case takes, counted: floating-point operations and bytes, from its shape alone."""

from __future__ import annotations

from bench.report.results import Case
from persistrnn.kernels.cells import CELLS

BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}


def operations(case: Case) -> int:
    """Floating-point operations of all products: 2*G*H*H per row, step, layer and direction for the recurrence, as
    DeepBench counts them, 2*G*H*I for the input where there is one; a backward takes twice as many."""
    directions = 2 if case.bidirectional else 1
    gates = CELLS[case.cell].gates * case.hidden
    total = 0
    for layer in range(case.layers):
        width = case.input if layer == 0 else directions * case.hidden
        total += 2 * gates * (case.hidden + width) * case.batch * case.steps * directions
    return total * (3 if case.mode == "training" else 1)


def input_bytes(case: Case) -> int:
    """Bytes of the input: x, or with the input's product left out the gates' input halves."""
    width = case.input or CELLS[case.cell].gates * case.hidden * (2 if case.bidirectional else 1)
    return case.steps * case.batch * width * BYTES[case.dtype]
