"""Which path a call would take, with which plan, and why; in words and without running it."""

import torch

from persistrnn import functional, ops, stack, validate
from persistrnn.modules import GRU, LSTM
from persistrnn.options import Options, check_options, check_save, check_sizes
from persistrnn.validate import Stack


def explain(layer: LSTM | GRU, batch: int, steps: int) -> str:
    """Say what `layer` would do with a padded input of `steps` time steps and `batch` rows.

    Args:
        layer: a persistrnn.LSTM or persistrnn.GRU, on any device, the meta device included
        batch: B >= 1
        steps: T >= 1

    Returns:
        A few lines: the call, the path ("persistent" or "torch", or that the call would raise), the plan of the
        kernels or the reason why they do not run, and then the path ("persistent" or "stepwise") of calls that
        torch's own kernels cannot run. Settings that a call would read (autocast,
        `torch.backends.cudnn.rnn.fp32_precision`) are read now.

    Raises:
        TypeError: a layer, batch or steps of another type
        ValueError: a batch or steps below 1
        RuntimeError: a save_budget that does not hold what such a call keeps
    """
    if not isinstance(layer, (LSTM, GRU)):
        raise TypeError(f"layer is a persistrnn.LSTM or persistrnn.GRU, got {type(layer).__name__}")
    for name, value in (("batch", batch), ("steps", steps)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")

    options, own = layer.options, (layer.input_size, layer.hidden_size, layer.proj_size)
    check_options(options)
    check_sizes(*own)
    weights = [weight for weights in layer.all_weights for weight in weights]
    validate.check_attributes(validate.read_weights(layer.mode.lower(), weights, options), *own)
    check_save(options.save, options.save_budget, layer.proj_size)

    weight = weights[0]
    dtype, device = functional.compute_dtype(weight, weight), weight.device
    directions = 2 if layer.bidirectional else 1
    cell, precision = layer.mode.lower(), functional.precision()
    sizes = (layer.hidden_size, batch, directions)
    options = _resolved(layer, batch, steps, dtype)
    together = layer.num_layers if stack.may_wave(options, dtype, layer.proj_size, precision) else 1
    reason = functional.obstacle(layer.backend, cell, *sizes, dtype, device, False, together, steps)
    shape_of_stack, where = (cell, layer.hidden_size, layer.num_layers, batch), (dtype, device, precision)
    grad = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    lines = [f"{layer}, batch {batch}, steps {steps}, {str(dtype).removeprefix('torch.')} on {device}"]
    shape = (cell, layer.hidden_size, batch, directions, dtype, device, precision)
    if reason is None:
        lines += ["path: persistent", ops.describe(*shape)]
        if together > 1 and ops.waves(*shape_of_stack, steps, *where, grad):
            lines[-1] = ops.describe_wave(*shape_of_stack, *where)
    elif layer.backend == "persistent":
        lines += ['path: none, the call would raise, because backend="persistent"', f"why: {reason}"]
    else:
        lines += ["path: torch (cuDNN, oneDNN or ATen, as torch.nn would run it)", f"why: {reason}"]
    lines.append(_kept(layer, options, batch, steps, dtype, on_kernels=reason is None))
    if reason is not None and layer.backend != "persistent":
        with_cuts = functional.obstacle(layer.backend, cell, *sizes, dtype, device, True)
        path = "stepwise, a loop over torch's operations" if with_cuts is not None else "persistent"
        packs = device.type == "cpu" and with_cuts is not None  # lengths run as a PackedSequence
        lines.append(f"with {'' if packs else 'lengths, '}mask, resets or cell states: {path}")
    if device.type == "cuda" and functional.obstacle("persistent", cell, *sizes, dtype, device) is None:
        lines.append(ops.expected(*shape))
    return "\n".join(lines)


def _stack(layer: LSTM | GRU) -> Stack:
    sizes = layer.input_size, layer.hidden_size, layer.proj_size
    return Stack(layer.mode.lower(), layer.num_layers, layer.options.directions, layer.bias, *sizes)


def _resolved(layer: LSTM | GRU, batch: int, steps: int, dtype: torch.dtype) -> Options:
    """How a training call runs, save="auto" decided."""
    options, device = layer.options._replace(training=True), layer.all_weights[0][0].device
    save = functional.save_mode(_stack(layer), options, dtype, device, batch, steps)
    return layer.options._replace(save=save)


def _kept(layer: LSTM | GRU, options: Options, batch: int, steps: int, dtype: torch.dtype, on_kernels: bool) -> str:
    """What a training call keeps for its backward."""
    cell, save, device = layer.mode.lower(), options.save, layer.all_weights[0][0].device
    training = options._replace(training=True)
    need = functional.needed_bytes(_stack(layer), save, training, dtype, device, batch, steps)
    most = f"{need:,.0f} bytes at most in training, without the input and the gradients of input and output (predicted)"
    sizes = layer.hidden_size, batch, options.directions, dtype.itemsize, steps
    chunk = ops.chunk_steps(save, cell, *sizes, on_kernels or device.type != "cpu")
    if on_kernels:
        of = ops.layers(
            cell, layer.input_size, layer.hidden_size, layer.num_layers, options.directions, dtype, layer.cell_dtype,
            layer.dropout > 0,
        )  # fmt: skip
        kept = f"{ops.kept_bytes(save, of, chunk):,.0f} bytes per step and row are kept"
        cut = "" if save == "gates" and steps <= chunk else f", in chunks of {min(chunk, steps):,} steps"
        return f'save="{save}": {kept}{cut}; {most}'
    if save == "gates":
        told = 'save="gates": torch\'s path keeps what it needs'
    else:
        told = f'save="{save}": torch\'s path keeps its state every {chunk:,} steps'
        told += ", and runs the forward again between them"
    return f"{told}; {most}" if device.type == "cpu" else told
