"""Torch's recurrent layers in a finished model, swapped for ours in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from persistrnn.modules import GRU, LSTM, RNN
from persistrnn.options import BACKENDS, Backend, check_name
from persistrnn.recurrent import RecurrentBase, take_over

SWAPPED: dict[type[nn.RNNBase], type[RecurrentBase]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}


@dataclass
class Replacement:
    """What `replace` did.

    Attributes:
        model: the model; a new one only where the model itself was a layer that was swapped
        swapped: the new layers by their names in the model ("" is the model itself)
        left: why a recurrent layer of torch's was left as it is, by name
    """

    model: nn.Module
    swapped: dict[str, RecurrentBase] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {layer}" for name, layer in self.swapped.items()]
        lines += [f"  {name or '(the model)'} left: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace(model: nn.Module, *, backend: Backend = "auto") -> Replacement:
    """Swap every torch.nn.LSTM, GRU and RNN in a model for ours, in place.

    A new layer has the old one's very Parameter objects (an optimizer made before stays right), its hooks (their
    handles still remove them), training mode, and whatever else was set on it. A layer that stands in several places of
    the model is swapped once and stands in all of them. What holds a layer outside of the model's modules (a plain
    list, another object) still holds the old one; `isinstance(layer, torch.nn.LSTM)` is false afterwards. Wrap the
    model (DDP, FSDP, torch.compile) after the swap.

    Args:
        model: any module; itself a torch.nn.LSTM, GRU or RNN, the new layer is the result's `model`
        backend: of the new layers, see `persistrnn.functional.lstm`

    Returns:
        A `Replacement`, printable. Left alone, with a reason each: subclasses, parametrized or weight-normalised layers
        (swap first, parametrize then), layers with a forward of their own.

    Raises:
        TypeError: model is no module
        ValueError: an unknown backend
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {type(model).__name__}")
    check_name("backend", backend, BACKENDS)
    result = Replacement(model)
    made: dict[int, RecurrentBase] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        reason = _obstacle(module)
        if reason is not None:
            result.left[name] = reason
            continue
        made[id(module)] = result.swapped[name] = _new(module, backend)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    result.model = made.get(id(model), model)
    return result


def _obstacle(module: nn.RNNBase) -> str | None:
    """Why a layer cannot be swapped."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "it is parametrized; swap before you parametrize"
    if kind not in SWAPPED:
        known = ", ".join(f"torch.nn.{cls.__name__}" for cls in SWAPPED)
        return f"it is a {kind.__module__}.{kind.__qualname__}; only {known} themselves are swapped"
    if "forward" in vars(module):
        return "it has a forward of its own, set on the instance"
    own = {name for names in module._all_weights for name in names}
    here = {*module._parameters, *module._buffers, *module._modules}
    if here != own:
        what = ", ".join(sorted(here ^ own))
        return (
            f"its parameters are not those of {kind.__name__} (by {what}): weight_norm and the like; swap before them"
        )
    return None


def _new(old: nn.RNNBase, backend: Backend) -> RecurrentBase:
    options: dict[str, Any] = {"proj_size": old.proj_size} if old.proj_size else {}
    if isinstance(old, nn.RNN):
        options["nonlinearity"] = old.nonlinearity
    new = SWAPPED[type(old)](
        old.input_size, old.hidden_size, old.num_layers, bias=old.bias, batch_first=old.batch_first,
        bidirectional=old.bidirectional, device=torch.device("meta"), backend=backend, **options,
    )  # fmt: skip
    # Not through the constructor, which would warn again of a dropout without effect.
    new.dropout = float(old.dropout)
    take_over(new, old, ignored={"_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights", "mode"})
    return new
