"""The kernels of a model, compiled before its first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from persistrnn import ops
from persistrnn.explain import decision_of
from persistrnn.options import check_count
from persistrnn.recurrent import RecurrentBase


def warmup(module: nn.Module, batch: int, steps: int, *, threads: int | None = None, **given: Any) -> int:
    """Compile the kernels of all layers in a model at the same time, which its first call would compile one after the
    other.

        persistrnn.warmup(model, batch=64, steps=512)  # in training mode: of forward and backward
        persistrnn.warmup(model.eval(), batch=1, steps=1)

    Each layer is called by itself, in the mode and on the device where it is, but its kernels are compiled in place of
    launched: nothing of them is computed, and no gradient, seed or attribute changes. Triton's cache on disk
    (TRITON_CACHE_DIR) keeps them, so that another process, too, finds them. A kernel serves any steps, and any batch
    that has the same plan (`explain`); the memory of one call is needed meanwhile. Call it under the `torch.autocast`
    that the model runs under, if any.

    Args:
        module: a layer of persistrnn's, or a model that has such
        batch: B >= 1
        steps: T >= 1
        threads: how many kernels are compiled at a time; None: one per CPU
        given: what else every layer is called with by keyword: lengths=, resets= and others make kernels of their own

    Returns:
        The number of kernels that such calls launch; each is compiled then.

    Raises:
        TypeError, ValueError: a module, batch, steps or threads of another kind; a module without a layer of ours
        RuntimeError: no layer would run on the kernels (there is no GPU, say), or the interpreter stands for them
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a layer of persistrnn's, or a model that has such, got {type(module).__name__}")
    for name, value in (("batch", batch), ("steps", steps), *([] if threads is None else [("threads", threads)])):
        check_count(name, value)
    layers = [layer for layer in module.modules() if isinstance(layer, RecurrentBase)]
    if not layers:
        raise ValueError(
            f"the {type(module).__name__} has no layer of persistrnn's to compile kernels for; persistrnn.replace "
            "makes them of torch.nn's"
        )
    paths = [layer.last_path for layer in layers]
    ran: list[str | None] = []

    def run() -> None:
        for layer in layers:
            _call(layer, batch, steps, given)
            ran.append(layer.last_path)

    devices = {weight.device for layer in layers for weight in layer.parameters() if weight.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            found = ops.compiled_by(run, threads)
    finally:
        for layer, path in zip(layers, paths, strict=True):
            layer.last_path = path
    if "persistent" not in ran:
        reason = decision_of(layers[0], batch, steps).reason
        raise RuntimeError(f"there is nothing to compile, no layer would run on the kernels: {reason}")
    return found


def _call(layer: RecurrentBase, batch: int, steps: int, given: dict[str, Any]) -> None:
    weight = layer.all_weights[0][0]
    sizes = (batch, steps) if layer.batch_first else (steps, batch)
    trains = layer.training and layer.weight_dtype is None
    x = weight.new_zeros(*sizes, layer.input_size).requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        outputs = _tensors(layer.forward(x, **given))  # as it is: a hook is for calls that compute
        if trains:
            torch.autograd.grad(outputs, [x], [torch.zeros_like(y) for y in outputs])


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in _tensors(part)]
