"""FLOPs of the operators, for torch's counter (`torch.utils.flop_counter`), and of whole layers, for other people's.

Each step multiplies each row of the batch with W_ih and W_hh: 2 * rows * steps * their elements forward (of
block-diagonal ones, heads, those that are there), and twice that backward. What is computed a second time counts a
second time, as torch counts what `torch.utils.checkpoint` runs again.

Torch's counter finds them by itself. To others, which do not see into an operator, they are given:

    fvcore     FlopCountAnalysis(model, inputs).set_op_handle(**persistrnn.flops.fvcore_handles())
    thop       thop.profile(model, inputs, custom_ops=persistrnn.flops.thop_ops())
    ptflops    get_model_complexity_info(model, ..., backend="pytorch",
                                         custom_modules_hooks=persistrnn.flops.ptflops_hooks())
    torchinfo  counts them by itself

These three count a multiplication and an addition as one, and so do the numbers here that are given to them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from persistrnn import chunk_ops, modules, own_cell
from persistrnn.jit_calls import CALL
from persistrnn.kernels.cells import CELLS
from persistrnn.recurrent import RecurrentBase

COUNTER = "torch.utils.flop_counter"


def _products(rows: int, weights: Sequence[Any]) -> int:
    """Of so many rows with each of the matrices, whose shapes these are; None and vectors have no product."""
    return 2 * rows * sum(math.prod(shape) for shape in weights if shape is not None and len(shape) > 1)


# ---- the operators, by the shapes of their arguments ----------------------------------------------------------------


def scan_forward(*arguments: Any, **_: Any) -> int:
    x_gates, weights = arguments[6], arguments[7]
    return _products(x_gates[0] * x_gates[1], (weights[0], weights[2]))


def scan_backward(*arguments: Any, **_: Any) -> int:
    weight_hh, weight_ih, d_outputs = arguments[4], arguments[5], arguments[11]
    return _products(d_outputs[0][0] * d_outputs[0][1], (weight_hh, weight_ih))


def chunked_forward(*arguments: Any, **_: Any) -> int:
    cell, inputs, weights = arguments[0], arguments[8], arguments[9]
    return _products(inputs[0][0] * inputs[0][1], _matrices(cell, weights))


def chunked_backward(*arguments: Any, **_: Any) -> int:
    """With the gradients of the weights and of x, and what was not kept: the gates, or all of the forward."""
    cell, save, needs_x, tensors = arguments[0], arguments[1], arguments[5], arguments[8]
    given = chunk_ops.backward_inputs_of(cell, save, tensors)
    matrices, rows = _matrices(cell, given.weights), given.inputs[0][0] * given.inputs[0][1]
    again = 0 if save == "gates" else 1
    return (2 + again) * _products(rows, matrices) - (0 if needs_x else _products(rows, matrices[:1]))


def _matrices(cell: str, weights: Sequence[Any]) -> list[Any]:
    """W_ih and W_hh of each layer, of the weights of ``chunk_ops.Layer``."""
    each = 5 if CELLS[cell].params else 4
    return [shape for k, shape in enumerate(weights) if k % each in (0, 2)]


def torch_layer(*arguments: Any, **_: Any) -> int:
    cell, tensors = arguments[0], arguments[4]
    return _products(tensors[0][0] * tensors[0][1], tensors[1 + CELLS[cell].states :])


def torch_layer_backward(*arguments: Any, **_: Any) -> int:
    return 3 * torch_layer(*arguments)  # it runs the forward again


def stepwise(*arguments: Any, **_: Any) -> int:
    x_gates, weight_hh = arguments[3][:2]
    return _products(x_gates[0] * x_gates[1], (weight_hh,))


def stepwise_backward(*arguments: Any, **_: Any) -> int:
    return 3 * stepwise(*arguments)


def _mkldnn_rnn_layer(*arguments: Any, **_: Any) -> int:
    x, weight_ih, weight_hh = arguments[:3]
    return _products(math.prod(x[:-1]), (weight_ih, weight_hh))


def _mkldnn_rnn_layer_backward(*arguments: Any, **_: Any) -> int:
    return 2 * _mkldnn_rnn_layer(*arguments)


# torch has no formula for its own LSTM on a CPU, which our path there runs: the counter would see nothing.
OF_TORCH: dict[str, Callable[..., int]] = {
    "mkldnn_rnn_layer": _mkldnn_rnn_layer,
    "mkldnn_rnn_layer_backward": _mkldnn_rnn_layer_backward,
}
OURS = (
    scan_forward, scan_backward, chunked_forward, chunked_backward, torch_layer, torch_layer_backward,
    stepwise, stepwise_backward,
)  # fmt: skip


def _register(counter: Any) -> None:
    for formula in OURS:
        counter.register_flop_formula(getattr(torch.ops.persistrnn, formula.__name__))(formula)
    for name, formula in OF_TORCH.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the formulas as soon as torch's counter is imported: it imports Triton, which `import persistrnn` does
    not, and a counter that is already made would not hear of them any more."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != COUNTER:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


def tell_torch() -> None:
    """Give torch's counter the formulas, now or when it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


# ---- whole layers, for counters that go by module or by trace -------------------------------------------------------


def multiply_adds(layer: RecurrentBase, input: Any) -> int:
    """Of one call, forward: a multiplication with an addition is one.

    Args:
        layer: one of persistrnn's
        input: as the call has it; of rows with lengths the padded tensor
    """
    data = input if isinstance(input, torch.Tensor) else input.data
    rows = math.prod(data.shape[:-1])
    return _products(rows, [weight.shape for weights in layer.all_weights for weight in weights]) // 2


def thop_ops() -> dict[type[torch.nn.Module], Callable[..., None]]:
    """For `thop.profile(custom_ops=)`."""

    def count(layer: Any, inputs: Any, _: Any) -> None:
        layer.total_ops += torch.tensor([float(multiply_adds(layer, inputs[0]))], dtype=torch.float64)

    return dict.fromkeys(_layers(), count)


def ptflops_hooks() -> dict[type[torch.nn.Module], Callable[..., None]]:
    """For `ptflops.get_model_complexity_info(custom_modules_hooks=)`."""

    def count(layer: Any, inputs: Any, _: Any) -> None:
        layer.__flops__ += multiply_adds(layer, inputs[0])

    return dict.fromkeys(_layers(), count)


def fvcore_handles() -> dict[str, Callable[..., int]]:
    """For `set_op_handle` of fvcore's FlopCountAnalysis: of our operator in a trace, and of torch's own LSTM, GRU and
    RNN, which our path on a CPU is and for which fvcore has no handle."""

    def count(inputs: Sequence[Any], _: Any) -> int:
        lists = [list(value.node().inputs()) for value in inputs if value.node().kind() == "prim::ListConstruct"]
        data = next(value for value in inputs if value.isCompleteTensor()).type().sizes()
        shapes = [[v.type().sizes() for v in found if v.isCompleteTensor()] for found in lists]
        # The states, if they are a list, are 3-D or unbatched, and never more than the weights.
        weights = max(shapes, key=len)
        return _products(math.prod(data[:-1]), weights) // 2

    return dict.fromkeys((CALL, "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), count)


def _layers() -> list[type[torch.nn.Module]]:
    built_in = [cls for cls in vars(modules).values() if isinstance(cls, type) and issubclass(cls, RecurrentBase)]
    return [*built_in, own_cell.Recurrent]
