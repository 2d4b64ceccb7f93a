"""Which path a call would take, with which plan, and why; in words and without running it."""

from persistrnn import calls, decide, validate
from persistrnn.decide import Call, Decision, expects_backward
from persistrnn.eight_bits import NAMES
from persistrnn.options import check_count, check_options, check_save, check_sizes
from persistrnn.recurrent import RecurrentBase, check_layer
from persistrnn.stacked import Stacked

STEPWISE = "stepwise, a loop over torch's operations"


def explain(layer: RecurrentBase | Stacked, batch: int, steps: int) -> str:
    """Say what `layer` would do with a padded input of `steps` time steps and `batch` rows.

    Args:
        layer: one of persistrnn's layers, or a `Stacked` of them, on any device, the meta device included
        batch: B >= 1
        steps: T >= 1

    Returns:
        A few lines: the call, the path ("persistent" or "torch", or that the call would raise), the plan of the
        kernels or the reason why they do not run, and then the path ("persistent" or "stepwise") of calls that
        torch's own kernels cannot run. Settings that a call would read (autocast, grad mode,
        `torch.backends.cudnn.rnn.fp32_precision`) are read now.

    Raises:
        TypeError: a layer, batch or steps of another type
        ValueError: a batch or steps below 1
        RuntimeError: a save_budget that does not hold what such a call keeps
    """
    if isinstance(layer, Stacked):
        return "\n\n".join(explain(each, batch, steps) for each in layer.each())
    check_layer(layer)
    check_count("batch", batch)
    check_count("steps", steps)
    found = decision_of(layer, batch, steps)
    call, reason = found.call, found.reason
    lines = [f"{layer}, batch {batch}, steps {steps}, {str(call.dtype).removeprefix('torch.')} on {call.device}"]
    if reason is None:
        lines += ["path: persistent", str(found.plan)]
    elif found.refused:
        lines += ['path: none, the call would raise, because backend="persistent"', f"why: {reason}"]
    else:
        torchs = "torch (cuDNN, oneDNN or ATen, as torch.nn would run it)"
        lines += [f"path: {torchs if found.path == 'torch' else STEPWISE}", f"why: {reason}"]
    if not call.weight_dtype:  # which is not for training
        lines.append(_kept(found, layer.dropout))
    if found.path == "torch" and call.backend != "persistent":
        path = STEPWISE if decide.decide(call._replace(marks=True)).path == "stepwise" else "persistent"
        packs = call._replace(lengths=True).packs
        lines.append(f"with {'' if packs else 'lengths, '}mask, resets or cell states: {path}")
    if call.device.type == "cuda" and not call.loops and decide.unsupported(call) is None:
        lines += [_expected(call, backward) for backward in (False, True) if not (backward and call.weight_dtype)]
    return "\n".join(lines)


def decision_of(layer: RecurrentBase, batch: int, steps: int) -> Decision:
    """What is decided of such a call."""
    options, own = layer.options, (layer.input_size, layer.hidden_size, layer.proj_size)
    check_options(options)
    check_sizes(*own, layer.heads)
    weights, eight_bits = layer._weights_of_call(options._replace(training=False))  # draws no masks
    stack = validate.read_weights(layer.cell, weights, options)
    validate.check_attributes(stack, *own)
    check_save(options.save, options.save_budget, layer.proj_size)

    dtype = calls.compute_dtype(weights[0], weights[0])
    where = dtype, weights[0].device, expects_backward(weights)
    transforms = decide.active_transforms(weights, dropout=options.active_dropout > 0)
    kind = transforms, NAMES[eight_bits.dtype] if eight_bits else ""
    return decide.decide(calls.asked(stack, options, batch, steps, *where, calls.NOTHING, False, *kind))


def _expected(call: Call, backward: bool) -> str:
    found, what = decide.compare(call, backward), "forward and backward" if backward else "forward"
    how = "corrected by measurements" if found.measured else "predicted"
    return (
        f"{what}: {found.persistent:.2f} us per time step on the kernels, {found.torch:.2f} on torch's own path ({how})"
    )


def _kept(found: Decision, dropout: float) -> str:
    """What a training call keeps for its backward."""
    call = found.call._replace(dropout=dropout)
    need = decide.needed_bytes(call, call.save)
    most = f"{need:,.0f} bytes at most in training, without the input and the gradients of input and output (predicted)"
    if found.path == "persistent":
        chunk = found.chunk or decide.chunk_steps(call, call.save, True)
        kept = f"{decide.kept_bytes(call, chunk):,.0f} bytes per step and row are kept"
        cut = f", in chunks of {min(chunk, call.steps):,} steps" if found.chunk else ""
        return f'save="{call.save}": {kept}{cut}; {most}'
    told = f'save="{call.save}": torch\'s path keeps '
    if call.save == "gates" or not found.chunk:
        told += "what it needs"
    else:
        told += f"its state every {found.chunk:,} steps, and runs the forward again between them"
    # Of cuDNN nobody knows, and a loop over torch's operations keeps what each of them does.
    return f"{told}; {most}" if call.device.type == "cpu" and found.path == "torch" else told
