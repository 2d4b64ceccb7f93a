"""Torch's recurrent layers in a finished model, swapped for ours in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from persistrnn.decide import TORCH
from persistrnn.modules import GRU, LSTM, RNN
from persistrnn.options import BACKENDS, Backend, Options, check_name
from persistrnn.recurrent import RecurrentBase, take_over

SWAPPED: dict[type[nn.RNNBase], type[RecurrentBase]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}


Layer = TypeVar("Layer", bound=nn.Module)


@dataclass
class Replacement(Generic[Layer]):
    """What `replace` or `restore` did.

    Attributes:
        model: the model; a new one only where the model itself was a layer that was swapped
        swapped: the new layers by their names in the model ("" is the model itself)
        left: why a recurrent layer was left as it is, by name
        lost: what a new layer has not of the old one, or what still holds the old one, by the new one's name
    """

    model: nn.Module
    swapped: dict[str, Layer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {layer}" for name, layer in self.swapped.items()]
        lines += [f"  {name or '(the model)'} left: {reason}" for name, reason in self.left.items()]
        lines += [f"  {name or '(the model)'} lost: {what}" for name, what in self.lost.items()]
        return "\n".join(lines)


def replace(model: nn.Module, *, backend: Backend = "auto") -> Replacement[RecurrentBase]:
    """Swap every torch.nn.LSTM, GRU and RNN in a model for ours, in place.

    A new layer has the old one's very Parameter objects (an optimizer made before stays right), its hooks (their
    handles still remove them), training mode, and whatever else was set on it. A layer that stands in several places of
    the model is swapped once and stands in all of them. What holds a layer outside of the model's modules (a plain
    list, another object) still holds the old one; `isinstance(layer, torch.nn.LSTM)` is false afterwards. Wrap the
    model (DDP, FSDP, torch.compile) after the swap.

    Tools that go by type, such as torch.jit.script, Opacus's DPLSTM and its validator, do not know the new layers:
    `restore` the model before them. torch.ao.quantization.quantize_dynamic does to them what it does to torch.nn's, or
    they warn. Pruning, parametrizations, `torch.export` and per-module counters take them as they are. `accelerated`
    runs torch.nn's layers without a swap.

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
    _check_module(model)
    check_name("backend", backend, BACKENDS)
    return _swap(model, nn.RNNBase, _obstacle, lambda old: _new(old, backend))


def restore(model: nn.Module) -> Replacement[nn.RNNBase]:
    """Swap every persistrnn.LSTM, GRU and RNN in a model for torch.nn's, in place: `replace` undone.

    Everything of a layer is kept as `replace` keeps it, the Parameter objects, hooks, tied weights, training mode.

    Args:
        model: any module; itself one of the layers, the new layer is the result's `model`

    Returns:
        A `Replacement`, printable. Left alone, with a reason each: cells and options that torch.nn has not, subclasses,
        parametrized layers, layers with a forward of their own, or in a `Stacked` or `Streaming`. Its `lost` has the
        options that torch.nn's layers do not take: save, save_budget, cell_dtype, and the backend "persistent".

    Raises:
        TypeError: model is no module
    """
    _check_module(model)
    return _swap(model, RecurrentBase, _obstacle_back, lambda old: old.to_torch())


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {type(model).__name__}")


def _swap(
    model: nn.Module, kind: type[Any], obstacle: Callable[[Any], str | None], new: Callable[[Any], Any]
) -> Replacement[Any]:
    """Every layer of a kind in the model, but for those with an obstacle."""
    result: Replacement[Any] = Replacement(model)
    made: dict[int, nn.Module] = {}
    names: dict[int, str] = {}
    holders = {
        id(layer): type(holder).__name__
        for holder in model.modules()
        if getattr(holder, "holds_ours", False)
        for layer in holder.modules()
    }
    for name, module in model.named_modules():
        if not isinstance(module, kind):
            continue
        held = f"a {holders[id(module)]} takes layers of persistrnn alone" if id(module) in holders else None
        reason = held or obstacle(module)
        if reason is not None:
            result.left[name] = reason
            continue
        made[id(module)] = result.swapped[name] = new(module)
        names[id(module)] = name
        if isinstance(module, RecurrentBase) and (lost := _options_lost(module)):
            result.lost[name] = lost
    for parent_name, parent in list(model.named_modules()):
        for attribute, value in vars(parent).items():
            for old in _held(value) if attribute != "_modules" else ():
                if id(old) in made and id(parent) not in made:
                    where = f"{parent_name or '(the model)'}.{attribute} still holds the old layer; set it anew"
                    name = names[id(old)]
                    result.lost[name] = "; ".join(filter(None, (result.lost.get(name), where)))
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    result.model = made.get(id(model), model)
    return result


def _held(value: object) -> Iterator[nn.Module]:
    """The modules that an attribute of a module holds by itself: it, or what is in a plain list, tuple or dict."""
    items = value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else [value]
    return (item for item in items if isinstance(item, nn.Module))


def _options_lost(layer: RecurrentBase) -> str:
    """Options of ours that torch.nn's layers have not, and that say something."""
    default = Options()
    names = ("save", "save_budget", "cell_dtype")
    lost = [f"{name}={getattr(layer, name)!r}" for name in names if getattr(layer, name) != getattr(default, name)]
    lost += ['backend="persistent"'] * (layer.backend == "persistent")
    return ", ".join(lost)


def _obstacle_back(layer: RecurrentBase) -> str | None:
    """Why a layer of ours cannot be swapped."""
    kind = type(layer)
    if kind not in SWAPPED.values() and layer.cell in TORCH and not parametrize.is_parametrized(layer):
        known = ", ".join(f"persistrnn.{cls.__name__}" for cls in SWAPPED.values())
        return f"it is a {kind.__module__}.{kind.__qualname__}; only {known} themselves are swapped"
    if "forward" in vars(layer):
        return "it has a forward of its own, set on the instance"
    return layer.without_equal()


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
