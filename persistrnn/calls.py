"""One call: validated, decided, run on the path that was decided on, and formed as its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from persistrnn import jit_calls, onnx_graph, rows, torch_path, validate
from persistrnn import stack as stacks
from persistrnn.decide import Call, Decision, active_transforms, decide, expects_backward
from persistrnn.eight_bits import NAMES
from persistrnn.mapping import below_the_map
from persistrnn.options import Options, check_flag, check_save
from persistrnn.recipe import cell_of, hides, new_keys
from persistrnn.request import Found, Request
from persistrnn.tracing import by_the_host, by_torch_jit, exporting_to_onnx, outside_of_graphs
from persistrnn.validate import Batch, Cuts, Given, Stack

NOTHING = Given()


def run(request: Request, accept: Callable[[Decision], bool] | None = None) -> Found:
    """Validate, decide and run; under torch.jit.trace as one operator.

    accept: asked before it runs; what it declines gives no output.
    """
    if by_torch_jit() and not exporting_to_onnx() and accept is None:
        return jit_calls.record(_run, request.dequantized)
    return _run(request, accept)


def _run(request: Request, accept: Callable[[Decision], bool] | None = None) -> Found:
    cell, input, weights, hx, options, given, return_c, sizes, learned, eight_bits = request
    check_flag("return_cell_states", return_c)
    validate.check_states(cell, options.cell_dtype, return_c)
    stack = validate.read_weights(cell, weights, options)
    if sizes is not None:
        validate.check_attributes(stack, *sizes)
    batch = validate.read_input(input, stack, weights, options.batch_first)
    data, packed = batch.data, batch.packed
    check_save(options.save, options.save_budget, stack.proj_size)
    states = [] if hx is None else validate.read_states(stack, hx, batch)
    cuts = validate.read_cuts(stack, batch, hx is None and not learned, given)
    if learned:
        begin = [s.to(data.dtype).unsqueeze(1).expand(-1, batch.rows, -1).contiguous() for s in learned]
        states = begin if hx is None else states
        cuts = cuts if cuts.resets is None or cuts.reset else cuts._replace(reset=begin)
    keys = new_keys(cell, options.recipe, options.training, stack.num_layers * stack.directions, data.device)
    cuts = cuts if keys is None else cuts._replace(keys=keys)
    if return_c and hides(options.recipe, options.training):
        raise ValueError(
            "return_cell_states is not for a call with recurrent_dropout, where the kernels give out every h in its "
            f"place, got {options.recipe}; leave one of them out"
        )
    if packed is not None and hx is not None:
        states = _rows(states, packed.sorted_indices)

    backward = expects_backward([data, *weights, *states, *cuts.reset])
    if eight_bits is not None and backward:
        raise RuntimeError(
            f"a layer quantised to {eight_bits.dtype} is for inference, got a call that a gradient may be asked of; "
            "call it under torch.no_grad() or with tensors that require none, or persistrnn.dequantize it"
        )
    dtype = compute_dtype(data, weights[0])
    if dtype.itemsize == 2 and torch_path.autocast_dtype(data):
        data, *states = (_of_one_half(t, dtype) for t in (data, *states))
        batch, weights = batch._replace(data=data), [_of_one_half(w, dtype) for w in weights]
    sizes_of_call = batch.rows, batch.steps, dtype, data.device
    transforms = active_transforms(weights, packed is not None, options.active_dropout > 0)
    weight_dtype = "" if eight_bits is None else NAMES[eight_bits.dtype]
    call = asked(stack, options, *sizes_of_call, backward, given, return_c, transforms, weight_dtype)
    if exporting_to_onnx():
        path = "stepwise" if onnx_graph.unrolls(call, packed is not None) else "onnx"
        decision = Decision(call, path, None, False, 0)
    else:
        decision = decide(call)
    if accept is not None and not accept(decision):
        return Found(None, [], None, decision.path)
    if decision.refused:
        raise RuntimeError(f'backend="persistent" cannot run this call: {decision.reason}')
    scales: Sequence[Tensor] = ()
    if eight_bits is not None and decision.path == "persistent" and batch.rows > 0:
        weights, scales = eight_bits.among(weights), eight_bits.scales
    elif eight_bits is not None:
        weights = eight_bits.dequantized(weights)
    if decision.path != "persistent":  # whose marks are made of the lengths themselves
        cuts = cuts.without_lengths(batch.steps)
    if not states and not stacks.reads_no_zeros(decision):
        states = validate.read_states(stack, None, batch)
    c: Any = None
    lengths: Any = given.lengths
    if decision.path == "onnx":
        x = batch.time_major(data)
        output, states = onnx_graph.run(call.cell, x, weights, states, lengths, options)
        output = batch.time_major(output)
    elif decision.path == "torch" and given.lengths is not None:
        assert cuts.active is not None
        output, *states = _with_lengths(decision, options, batch, weights, states, lengths, cuts.active)
    elif decision.path == "torch":
        batch_sizes = None if packed is None else packed.batch_sizes
        how = options._replace(batch_first=batch.batch_first)
        output, *states = _on_torch(decision, how, data, batch_sizes, states, weights)
    else:
        output, c, states = _on_kernels_or_steps(decision, batch, weights, states, cuts, scales)

    formed: list[Any] = [output] if c is None else [output, c]
    if packed is not None:
        states = _rows(states, packed.unsorted_indices)
        formed = [PackedSequence(t, packed.batch_sizes, *packed[2:]) for t in formed]
    elif batch.unbatched:
        formed, states = [t.squeeze(1) for t in formed], [s.squeeze(1) for s in states]
    output, c = (*formed, None)[:2]
    return Found(output, states, c, decision.path)


def _of_one_half(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast joins float32 with its own dtype, and neither with the other 16-bit one."""
    return tensor if tensor.dtype.itemsize > 2 else tensor.to(dtype)


jit_calls.implement(_run)


def asked(
    stack: Stack,
    options: Options,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    given: Given = NOTHING,
    return_c: bool = False,
    transforms: str = "",
    weight_dtype: str = "",
) -> Call:
    """The call, as `decide` takes it."""
    stack = stack._replace(cell=cell_of(stack.cell, options.recipe, options.training))
    return Call(
        *stack[:-1], batch, steps, dtype, device, precision(), backward,
        options.backend, options.save, options.save_budget, options.cell_dtype, options.active_dropout,
        lengths=given.lengths is not None,
        marks=given.mask is not None or given.resets is not None,
        return_c=bool(return_c),  # read, so that dynamo makes a constant of it
        heads=stack.heads,
        hides=hides(options.recipe, options.training),
        transforms=transforms,
        weight_dtype=weight_dtype,
    )  # fmt: skip


def _on_kernels_or_steps(
    decision: Decision,
    batch: Batch,
    weights: Sequence[Tensor],
    states: list[Tensor],
    cuts: Cuts,
    scales: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(output, every c or None, final states)."""
    call, data, packed = decision.call, batch.data, batch.packed
    x = batch.time_major(data)
    if packed is not None:
        x, places = outside_of_graphs(_pad, data, packed.batch_sizes)
        active = by_the_host(_active_rows, packed.batch_sizes)
        cuts = cuts._replace(active=active.to(data.device, non_blocking=True))
    dtypes = [call.dtype] * max(len(states), len(cuts.reset))
    if decision.path == "stepwise":  # which has torch.nn's; the kernels have autocast's, as torch.nn on a GPU
        dtypes = torch_path.output_dtypes(call.cell, data, states, torch_path.autocast_dtype(data))[1:]
    initial, anew = (
        [s.to(d).contiguous() for s, d in zip(given_states, dtypes, strict=True)] if given_states else []
        for given_states in (states, cuts.reset)
    )
    tensors = (
        x.to(call.dtype).contiguous(),
        [w.to(call.dtype) if w.is_floating_point() else w for w in weights],
        initial,
    )
    extras = [e.to(call.dtype) for e in cuts.extras]
    given = decision, *tensors, cuts._replace(reset=anew, extras=extras), scales
    # Compiled, a Function has no rule for a map.
    found = outside_of_graphs(stacks.run, *given) if call.transforms == "mapped" else stacks.run(*given)
    outputs = [found.y] if found.c is None else [found.y, found.c]
    if packed is not None:
        outputs = [t.flatten(0, 1).index_select(0, places) for t in outputs]
    y, c = (*(batch.time_major(t) for t in outputs), None)[:2]
    assert y is not None
    return y, c, found.finals


def _on_torch(
    decision: Decision,
    options: Options,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """[output, *states], on torch's own kernels."""
    call = decision.call

    def padded(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        if decision.chunk:
            return torch_path.stack_in_chunks(call.cell, input, states, weights, options, decision.chunk)
        return torch_path.stack(call.cell, input, None, states, weights, options)

    if call.transforms == "folded":
        return below_the_map(padded, input, 0 if options.batch_first else 1, states, weights)
    if batch_sizes is None:
        return padded(input, states, weights)
    # Without a backward ATen's loop over packed rows is linear, and torch.nn's to the bit.
    in_parts = call.steps > rows.FEW_STEPS and call.device.type == "cpu" and (call.lengths or call.backward)
    chunk = decision.chunk if call.backward else 0
    if not (in_parts or chunk) or call.transforms:
        return torch_path.stack(call.cell, input, batch_sizes, states, weights, options)
    found: list[Tensor] = outside_of_graphs(rows.stack, call.cell, input, batch_sizes, states, weights, options, chunk)
    return found


def _with_lengths(
    decision: Decision,
    options: Options,
    batch: Batch,
    weights: Sequence[Tensor],
    states: list[Tensor],
    lengths: Any,
    active: Tensor,
) -> list[Tensor]:
    """The same for rows with lengths."""
    x, some = batch.time_major(batch.data), lengths > 0
    initial = states
    if not some.all():  # a packed row has a step at least: of one without, no NaN may reach the weights' gradient
        x, *initial = (torch.where(some.unsqueeze(-1), t, 0.0) for t in (x, *states))
    data, batch_sizes, order, where = rows.pack(x, lengths.clamp(min=1))
    how = options._replace(batch_first=False)
    data, *finals = _on_torch(decision, how, data, batch_sizes, _rows(initial, order), weights)
    y = rows.unpack(data, where, batch.steps, batch.rows)
    if not some.all():
        y = torch.where(active.unsqueeze(-1), y, 0.0)
    finals = _rows(finals, order.argsort())
    finals = [torch.where(some.unsqueeze(-1), new, old.to(new.dtype)) for new, old in zip(finals, states, strict=True)]
    return [batch.time_major(y), *finals]


def _rows(states: list[Tensor], indices: Tensor | None) -> list[Tensor]:
    return states if indices is None else [s.index_select(1, indices) for s in states]


# Compiled, the graph breaks here, as it does in torch.nn; on fake tensors it would fail. By index: torch's own function
# has no rule for vmap, for tangents, or for torch.func.
def _pad(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """[T, B, I] of the data of a PackedSequence, and the places of its rows in [T * B]."""
    active = by_the_host(_active_rows, batch_sizes)
    places = by_the_host(lambda: active.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True))
    padded = data.new_zeros(active.numel(), data.size(-1)).index_copy(0, places, data)
    return padded.unflatten(0, active.shape), places


def _active_rows(batch_sizes: Tensor) -> Tensor:
    """Bool [T, B], on the CPU: a PackedSequence has its first rows longest."""
    return torch.arange(int(batch_sizes[0]), device=batch_sizes.device) < batch_sizes.unsqueeze(1)


def precision() -> str:
    """How float32 is multiplied in the recurrence, "tf32" or "ieee": torch's own setting for RNNs.

    `torch.backends.cudnn.rnn.fp32_precision` inherits from `torch.backends.cudnn` and `torch.backends`; its
    default is "tf32". As in cuDNN, anything else, "none" included, means "ieee".
    """
    setting: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


def compute_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the recurrence: the input's, or autocast's, which leaves float64 and integers alone."""
    autocast = torch_path.autocast_dtype(input)
    if autocast is None or torch.float64 in (input.dtype, weight.dtype) or not input.is_floating_point():
        return input.dtype
    return autocast
