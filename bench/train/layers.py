"""The recurrent layers of the training programs: persistrnn's or torch.nn's, by the settings."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn
from bench import UsageError
from bench.train.options import Backend, Settings


def recurrent(settings: Settings, backend: Backend, input_size: int, bidirectional: bool = False) -> nn.Module:
    """Layers of the settings' cell and sizes. `backend` is persistrnn's, or "torch.nn" for torch's own layer.

    Raises:
        UsageError: torch.nn has no such cell, or no heads
    """
    sizes = input_size, settings.hidden, settings.layers
    layers = partial(
        persistrnn.Recurrent, settings.cell, *sizes,
        dropout=settings.dropout, bidirectional=bidirectional, heads=settings.heads,
    )  # fmt: skip
    if backend != "torch.nn":
        return layers(backend=backend, save=settings.save)
    try:
        return layers().to_torch()
    except ValueError as error:
        raise UsageError(
            f"--cell {settings.cell} --heads {settings.heads} given with torch.nn's layers: {error}; use --backend "
            "auto, without --compare"
        ) from error


def run_padded(layer: nn.Module, x: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """`layer` on padded rows: x (T, B, I), lengths (B,) int64 on its device, each at least 1.

    Returns y (T, B, D*H), zero past each row's length, and each row's state after its last step.
    """
    if not isinstance(layer, nn.RNNBase):
        return layer(x, state, lengths=lengths)
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    y, state = layer(packed, state)
    return pad_packed_sequence(y, total_length=len(x))[0], state


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every tensor of a carried state: None, a tensor, or nested tuples of them."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else change(state)
    return tuple(map_state(part, change) for part in state)


def path(model: nn.Module) -> str:
    """The paths that the model's layers took at their last call: "persistent", "torch", ..., or "torch.nn"."""
    found = {str(module.last_path) for module in model.modules() if hasattr(module, "last_path")}
    return ", ".join(sorted(found)) or "torch.nn"


def explanation(model: nn.Module, batch: int, steps: int) -> str:
    """Which path each recurrent layer will take at this batch and T, with which plan, and why."""
    found = []
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(module, nn.RNNBase) or hasattr(module, "last_path"):
            found.append(str(module) if isinstance(module, nn.RNNBase) else persistrnn.explain(module, batch, steps))
    return "\n".join(found)
