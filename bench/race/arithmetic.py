"""What a case takes, counted: floating-point operations and bytes, from its shape alone."""

from __future__ import annotations

from bench.report.results import Case
from persistrnn.kernels.cells import CELLS

BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}


def operations(case: Case) -> int:
    """Floating-point operations of all products: 2*G*H*H per row, step, layer and direction for the recurrence, as
    DeepBench counts them, 2*G*H*I for the input where there is one; a backward takes twice as many."""
    rows = case.batch * case.steps * _directions(case) * CELLS[case.cell].gates * case.hidden
    total = sum(2 * rows * (case.hidden + width) for width in _widths(case))
    return total * (3 if case.mode == "training" else 1)


def _directions(case: Case) -> int:
    return 2 if case.bidirectional else 1


def _widths(case: Case) -> list[int]:
    """What each layer reads: the input's features, those of the layer below."""
    return [case.input] + [_directions(case) * case.hidden] * (case.layers - 1)


def input_bytes(case: Case) -> int:
    """Bytes of the input: x, or with the input's product left out the gates' input halves."""
    width = case.input or CELLS[case.cell].gates * case.hidden * _directions(case)
    return case.steps * case.batch * width * BYTES[case.dtype]


def parameter_bytes(case: Case) -> int:
    """Bytes of all weights and biases; with the input's product left out there is no b_ih either."""
    rows = _directions(case) * CELLS[case.cell].gates * case.hidden
    return sum(rows * (case.hidden + width + (2 if width else 1)) for width in _widths(case)) * BYTES[case.dtype]


def bytes_moved(case: Case) -> int:
    """The fewest bytes that must cross device memory: weights, input and each layer's output once; a backward reads all
    of them once more and moves as many bytes of their gradients."""
    outputs = case.layers * case.steps * case.batch * _directions(case) * case.hidden * BYTES[case.dtype]
    forward = parameter_bytes(case) + input_bytes(case) + outputs
    return forward * (3 if case.mode == "training" else 1)
