"""Names of what a layer does, for torch.profiler: ``persistrnn profile`` sums time by them."""

import contextlib
from contextlib import AbstractContextManager

import torch

INPUT_GEMM = "persistrnn: input GEMM"
SCAN_FORWARD = "persistrnn: scan forward"
RECOMPUTE = "persistrnn: recompute"
SCAN_BACKWARD = "persistrnn: scan backward"
WEIGHT_GEMMS = "persistrnn: weight GEMMs"

PHASES = (INPUT_GEMM, SCAN_FORWARD, RECOMPUTE, SCAN_BACKWARD, WEIGHT_GEMMS)

_NOTHING = contextlib.nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """A range of that name in a running profile; nothing without one, nor in a compiled graph. Ranges may be nested:
    the outermost one counts."""
    if torch.compiler.is_compiling() or not torch.autograd.profiler._is_profiler_enabled:
        return _NOTHING
    return torch.autograd.profiler.record_function(name)
