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


def parameter_bytes(case: Case) -> int:
    """Bytes of all weights and biases; with the input's product left out there is no b_ih either."""
    directions = 2 if case.bidirectional else 1
    gates = CELLS[case.cell].gates * case.hidden
    total = 0
    for layer in range(case.layers):
        width = case.input if layer == 0 else directions * case.hidden
        total += directions * gates * (case.hidden + width + (2 if width else 1))
    return total * BYTES[case.dtype]


def bytes_moved(case: Case) -> int:
    """The fewest bytes that must cross device memory: weights, input and each layer's output once; a backward reads all
    of them once more and moves as many bytes of their gradients."""
    directions = 2 if case.bidirectional else 1
    outputs = case.layers * case.steps * case.batch * directions * case.hidden * BYTES[case.dtype]
    forward = parameter_bytes(case) + input_bytes(case) + outputs
    return forward * (3 if case.mode == "training" else 1)
