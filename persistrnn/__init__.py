"""Persistent recurrent layers for PyTorch.

`LSTM`, `GRU` and `RNN` are torch.nn's modules on Triton kernels that keep the recurrent weights on chip for all time
steps; `PeepholeLSTM`, `CoupledLSTM`, `MGU`, `JANET`, `SLSTM`, `LayerNormLSTM` and `LayerNormGRU` the same of cells that
torch has not, and `Recurrent` of a `cell` of one's own, one function of one time step, which `check_cell` explains. A
`Recipe` regularises a layer (zoneout, dropout of h, dropped weights, learned states), `Stacked` puts layers above each
other (residuals, alternating directions, sizes of their own). `functional` has all cells as functions, `explain` says
which path a call would take and why, `check` raises if a kernel's bounded wait ran out, `replace` swaps torch.nn's
layers in a finished model for these and `restore` swaps them back, `accelerated` runs torch.nn's own layers on the
kernels as they are, `quantize` keeps W_hh in 8 bits for inference and `dequantize` is the way back, `Streaming` carries
a layer's state from call to call, `warmup` compiles a model's kernels at the same time, `profile` measures where
training's time and memory go.
"""

from typing import TYPE_CHECKING, Any

from persistrnn import flops, functional
from persistrnn.accelerated import accelerate, accelerated
from persistrnn.explain import explain
from persistrnn.modules import (
    GRU,
    JANET,
    LSTM,
    MGU,
    RNN,
    SLSTM,
    CoupledLSTM,
    LayerNormGRU,
    LayerNormLSTM,
    PeepholeLSTM,
)
from persistrnn.ops import check
from persistrnn.own_cell import Recurrent, cell, check_cell
from persistrnn.quantization import dequantize, quantize
from persistrnn.recipe import Recipe
from persistrnn.replacement import replace, restore
from persistrnn.stacked import Stacked
from persistrnn.streaming import Streaming
from persistrnn.warmup import warmup

if TYPE_CHECKING:
    from persistrnn.profiling.run import profile

flops.tell_torch()

__version__ = "0.1.0"

__all__ = [
    "GRU", "JANET", "LSTM", "MGU", "RNN", "SLSTM", "CoupledLSTM", "LayerNormGRU", "LayerNormLSTM", "PeepholeLSTM",
    "Recipe", "Recurrent", "Stacked", "Streaming",
    "__version__", "accelerate", "accelerated", "cell", "check", "check_cell", "dequantize", "explain", "flops",
    "functional", "profile", "quantize", "replace", "restore", "warmup",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "profile":  # imported when it is asked for: training needs none of it
        from persistrnn.profiling.run import profile

        globals()[name] = profile
        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
