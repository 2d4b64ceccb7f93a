"""torch.ao.quantization.quantize_dynamic on our layers: what it makes of a torch.nn layer in the same place.

It asks for a module's configuration by the very type of the module, and sets what it found as the module's `qconfig`:
None on ours, where its caller names torch.nn.LSTM. So a layer of ours, as its `qconfig` is set, reads from the running
call what a torch.nn layer would be given, and enters itself into the tool's table of what becomes of a type. Nothing of
the tool is imported here.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

TOOL = "torch.ao.quantization.quantize"


class _Call(NamedTuple):
    """A running quantize_dynamic: its tables, by type, of configurations and of quantized modules, and whether what
    it is at is held by a module that takes layers of ours alone."""

    configurations: dict[Any, Any]
    quantized: dict[Any, Any]
    held: bool


def configured(layer: Any, of_torch: type[nn.Module] | None, given: Any) -> Any:
    """The qconfig of a layer of ours to which the tool gives one. Where the layer will not be quantized, as a torch.nn
    layer would be, it warns.

    Args:
        layer: one of ours; of_torch: its equal in torch.nn, None without
        given: what the tool has found; None: nothing
    """
    call = _running(sys._getframe(1))
    if call is None:
        _warn(layer, "torch.ao.quantization goes by type")
        return given
    if given is None and (given := call.configurations.get(of_torch)) is None:
        return None  # nothing is asked of torch.nn's either
    if (reason := _obstacle(layer, of_torch, call)) is not None:
        _warn(layer, reason)
        return None
    call.quantized.setdefault(type(layer), _Quantized)
    return given


def _obstacle(layer: Any, of_torch: type[nn.Module] | None, call: _Call) -> str | None:
    """Why the tool cannot quantize a layer."""
    if of_torch is None or (reason := layer.without_equal()) is not None:
        return reason if of_torch is not None else f"torch.nn has no equal of a {type(layer).__name__}"
    if type(layer).__module__ != "persistrnn.modules":
        return "of its types quantize_dynamic takes no subclasses"
    if layer.proj_size:
        return "quantize_dynamic has no projections"
    if call.held:
        return "its layers are held by a module of persistrnn"
    if type(layer) not in call.quantized and call.quantized is not _default():
        return f"the mapping given to quantize_dynamic has no {type(layer).__name__}"
    return None if of_torch in call.quantized else f"quantize_dynamic has nothing for a torch.nn.{of_torch.__name__}"


def _warn(layer: Any, reason: str) -> None:
    warnings.warn(
        f"{reason}; this persistrnn.{type(layer).__name__} stays as it is, in its own dtype; if it is to be quantized, "
        "call persistrnn.restore(model) before",
        stacklevel=4,
    )


def _running(frame: FrameType | None) -> _Call | None:
    held = False
    while frame is not None:
        if frame.f_globals.get("__name__") == TOOL:
            variables = frame.f_locals
            held = held or getattr(variables.get("module"), "holds_ours", False)
            if frame.f_code.co_name == "quantize_dynamic":
                asked, becomes = variables.get("qconfig_spec"), variables.get("mapping")
                return _Call(asked, becomes, held) if isinstance(asked, dict) and isinstance(becomes, dict) else None
        frame = frame.f_back
    return None


def _default() -> dict[Any, Any]:
    found: dict[Any, Any] = sys.modules[TOOL].get_default_dynamic_quant_module_mappings()
    return found


class _Quantized:
    """What becomes of a layer of ours: what becomes of its equal."""

    @staticmethod
    def from_float(layer: Any) -> nn.Module:
        equal = layer.to_torch()
        equal.qconfig = layer.qconfig
        found: nn.Module = _default()[type(equal)].from_float(equal)
        return found
