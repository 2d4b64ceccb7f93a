"""torch.nn under autocast on a CPU that has not what it asks oneDNN for, or not for all dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def anywhere(layer: nn.LSTM | nn.GRU) -> Callable[..., Any]:
    """``layer`` as a witness on every CPU: without oneDNN where it has no such LSTM, and with the dtype that an LSTM
    without projections has where it has one, autocast's."""

    def call(*arguments: Any) -> Any:
        try:
            outputs = layer(*arguments)
        except RuntimeError as error:
            if "could not create a primitive descriptor for the LSTM forward propagation primitive" not in str(error):
                raise
            with torch.backends.mkldnn.flags(enabled=False):
                outputs = layer(*arguments)
        if not torch.is_autocast_enabled("cpu") or layer.mode == "GRU" or layer.proj_size:
            return outputs
        half = torch.get_autocast_dtype("cpu")
        # A PackedSequence has integers and None beside its data.
        return tree_map(lambda t: t.to(half) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, outputs)

    return call
