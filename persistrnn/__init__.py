"""Persistent recurrent layers for PyTorch.

`LSTM`, `GRU` and `RNN` are torch.nn's modules on Triton kernels that keep the recurrent weights on chip for all time
steps; `PeepholeLSTM`, `CoupledLSTM`, `MGU`, `JANET` and `SLSTM` the same of cells that torch has not, and `Recurrent`
of a `cell` of one's own, one function of one time step, which `check_cell` explains. `functional` has them as
functions, `explain` says which path a call would take and why, `check` raises if a kernel's bounded wait ran out,
`replace` swaps torch.nn's layers in a finished model for these, `quantize` keeps W_hh in 8 bits for inference,
`Streaming` carries a layer's state from call to call,
`profile` measures where training's time and memory go.
"""

from typing import TYPE_CHECKING, Any

from persistrnn import functional
from persistrnn.explain import explain
from persistrnn.modules import GRU, JANET, LSTM, MGU, RNN, SLSTM, CoupledLSTM, PeepholeLSTM
from persistrnn.ops import check
from persistrnn.own_cell import Recurrent, cell, check_cell
from persistrnn.quantization import dequantize, quantize
from persistrnn.replacement import replace
from persistrnn.streaming import Streaming

if TYPE_CHECKING:
    from persistrnn.profiling.run import profile

__version__ = "0.1.0"

__all__ = [
    "GRU", "JANET", "LSTM", "MGU", "RNN", "SLSTM", "CoupledLSTM", "PeepholeLSTM", "Recurrent", "Streaming",
    "__version__", "cell", "check", "check_cell", "dequantize", "explain", "functional", "profile", "quantize",
    "replace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "profile":  # imported when it is asked for: training needs none of it
        from persistrnn.profiling.run import profile

        globals()[name] = profile
        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
