"""8-bit W_hh for inference: layers quantised in place, and back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from persistrnn.eight_bits import NAMES, dequantized, quantized
from persistrnn.recurrent import RecurrentBase

Module = TypeVar("Module", bound=nn.Module)


def quantize(module: Module, dtype: torch.dtype = torch.int8) -> Module:
    """Keep W_hh of every layer of ours in 8 bits, with one float32 scale per row, for inference; in place.

    A row's largest magnitude becomes the largest number of the dtype, 127 or 448, and each weight the nearest one: off
    by at most 1/254 of the row's largest in int8, by 1/16 of itself in float8_e4m3fn, but for the smallest. The kernels
    keep the 8 bits on chip, half the bytes of 16, widen them to the dtype of the activations, float16 or bfloat16, at
    the product, sum in float32 and multiply each sum by its row's scale. Torch's own path multiplies the dequantised
    weights, which it forms in each call; so do projections, torch.func and torch.jit.trace. The input half of the
    gates, biases and all else stay as they are.

    Args:
        module: a layer of persistrnn, or any module that holds some
        dtype: torch.int8 or torch.float8_e4m3fn

    Returns:
        ``module`` itself. Of its layers, weight_hh_l[k] are buffers now: int8, or uint8, the bits of float8_e4m3fn, so
        that .to(dtype) leaves them; beside them weight_hh_l[k]_scale, float32 [G*H] ([n, G*H/n] with heads), which stay
        float32. Both are in the state_dict, which a layer quantised to the same dtype loads. No parameter of these
        layers requires a gradient any more.

    Raises:
        TypeError: module is no module
        ValueError: another dtype; a module without a layer of ours, one that is quantised already or parametrized;
            a weight that is not finite
    """
    layers = _layers(module)
    if dtype not in NAMES:
        raise ValueError(f"dtype is torch.int8 or torch.float8_e4m3fn, got {dtype!r}")
    for name, layer in layers:
        if layer.weight_dtype is not None:
            raise ValueError(f"{name} is quantised already, to {layer.weight_dtype}; persistrnn.dequantize it first")
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"{name} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on its tensors first"
            )
        for weight in _matrices(layer):
            if not (given := getattr(layer, weight)).is_meta and not bool(given.isfinite().all()):
                raise ValueError(
                    f"{weight} of {name} has a NaN or an infinity, which 8 bits do not hold; mend it first"
                )
    for _, layer in layers:
        for weight in _matrices(layer):
            bits, scale = quantized(getattr(layer, weight).detach(), dtype)
            delattr(layer, weight)
            layer.register_buffer(weight, bits)
            layer.register_buffer(f"{weight}_scale", scale)
        layer.weight_dtype = dtype
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    return module


def dequantize(module: Module) -> Module:
    """The way back, in place: W_hh of every quantised layer a Parameter again, the dequantised weight, in the dtype of
    the layer's other weights. No gradient is asked for: ``requires_grad_()`` does that.

    Raises:
        TypeError, ValueError: as `quantize`; a module without a layer of ours
    """
    for _, layer in _layers(module):
        if layer.weight_dtype is None:
            continue
        for name in _matrices(layer):
            like = getattr(layer, name.replace("weight_hh", "weight_ih"))
            weight = dequantized(getattr(layer, name), getattr(layer, f"{name}_scale"), like.dtype)
            delattr(layer, name)
            delattr(layer, f"{name}_scale")
            layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        layer.weight_dtype = None
    return module


def _layers(module: object) -> list[tuple[str, RecurrentBase]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a torch.nn.Module, got {type(module).__name__}")
    found = [(name or "the layer", m) for name, m in module.named_modules() if isinstance(m, RecurrentBase)]
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no layer of persistrnn; persistrnn.replace swaps torch.nn's for ours"
        )
    return found


def _matrices(layer: RecurrentBase) -> list[str]:
    return [names[1] for _, names in layer._names()]
