"""PyTorch's own LSTM, GRU and RNN kernels (cuDNN, MIOpen, oneDNN, ATen), without torch.nn.RNNBase around them.

Eager, a call is one call of torch's function for the whole stack: torch.nn's results to the bit. With dropout on a
GPU every layer is a call of its own: cuDNN would draw masks that no other path of ours could draw from the same seed.
Under `torch.compile` that function would break the graph, so there every layer is one operator, and the dropout
between the layers is traced.

Under autocast on a CPU, torch.nn.LSTM asks oneDNN for an LSTM in autocast's dtype, which not every CPU has (bfloat16
wants avx512, float16 more), and fails where there is none. Given its input in that dtype, ATen looks for itself whether
oneDNN can, and else runs a loop of its own. So an LSTM runs on every CPU, and has one dtype on all of them.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from persistrnn.decide import TORCH, expects_backward, inside_torch_func
from persistrnn.kernels.cells import CELLS
from persistrnn.mapping import operator_by_gradients
from persistrnn.options import Options


def stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
) -> list[Tensor]:
    """Run a whole stack on torch's kernels: [output, h_n], of an LSTM [output, h_n, c_n].

    Args:
        cell: one of ``decide.TORCH``
        input: [T, B, I], [B, T, I] with batch_first, or the data of a PackedSequence
        batch_sizes: of the PackedSequence, else None
        states: [h0] or [h0, c0], each [num_layers*D, B, H] (h0's H is proj_size where weights project)
        weights: all of them, in torch.nn's order
    """
    # A packed sequence has no operator of ours: compiled, the graph breaks here, as it does in torch.nn.
    if torch.compiler.is_compiling() and batch_sizes is None:
        run = functools.partial(_operator, cell, options.bias, options.bidirectional, autocast_dtype(input))
        return by_layers(run, input, states, weights, options)
    if input.is_cuda and not options.training and expects_backward([input, *states, *weights]):
        # The same numbers, from which cuDNN agrees to go back.
        options = options._replace(dropout=0.0, training=True)
    if input.is_cuda and options.active_dropout > 0 and options.num_layers > 1:
        run = functools.partial(layer, cell, options.bias, options.bidirectional, batch_sizes)
        return by_layers(run, input, states, weights, options)
    return _eager(cell, input, batch_sizes, states, weights, options.of_torch)


def stack_in_chunks(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
    chunk: int,
) -> list[Tensor]:
    """``stack``, keeping for its backward no more than its input and the state every ``chunk`` steps: the forward runs
    again between them. Compiled it keeps each layer's input in any case, and runs again as a whole."""
    # Nor inside torch.func, which has no hooks for what is saved.
    whole = torch.compiler.is_compiling() or inside_torch_func()
    if whole or not expects_backward([input, *states, *weights]):
        return stack(cell, input, None, states, weights, options)
    if not options.bidirectional:
        y = input.transpose(0, 1) if options.batch_first else input
        y, *finals = _in_chunks(cell, y, states, weights, options._replace(batch_first=False), chunk)
        return [y.transpose(0, 1) if options.batch_first else y, *finals]
    each = 4 if options.bias else 2
    one = options._replace(num_layers=1, dropout=0.0, bidirectional=False, batch_first=False)

    def run(y: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
        ahead, *finals = _in_chunks(cell, y, [s[:1] for s in states], weights[:each], one, chunk)
        back, *others = _in_chunks(cell, y.flip(0), [s[1:] for s in states], weights[each:], one, chunk)
        return [torch.cat([ahead, back.flip(0)], -1), *(torch.cat(s) for s in zip(finals, others, strict=True))]

    return by_layers(run, input, states, weights, options)


def _in_chunks(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
    chunk: int,
) -> list[Tensor]:
    """A stack of one direction, of [T, B, I]."""

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors[: len(states)], tensors[len(states) :]
        return tuple(stack(cell, x, None, *given, options))

    draws = options.active_dropout > 0
    outputs = []
    for x in input.split(chunk):
        going_on = [s.contiguous() for s in states]
        y, *states = checkpoint(call, x, *going_on, *weights, use_reentrant=False, preserve_rng_state=draws)
        outputs.append(y)
    return [torch.cat(outputs), *states]


def _eager(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    how: tuple[bool, int, float, bool, bool, bool],
) -> list[Tensor]:
    """how: ``Options.of_torch``."""
    # Only on a GPU can the warning come, and catching it costs time and changes a setting of the whole process.
    with _no_flat_weight_warning() if input.is_cuda else _NOTHING:
        given = [input] if batch_sizes is None else [input, batch_sizes]
        own = how if batch_sizes is None else how[:-1]
        autocast = autocast_dtype(input)
        if autocast is None or input.device.type != "cpu":
            return call(cell, given, states, weights, own)
        dtypes = output_dtypes(cell, input, states, autocast)
        if TORCH[cell].onednn and input.dtype != torch.float64:
            given[0] = input.to(autocast)
        outputs = call(cell, given, states, weights, own)
        return [t.to(dtype) for t, dtype in zip(outputs, dtypes, strict=True)]


def call(
    cell: str, given: list[Any], states: Sequence[Tensor], weights: Sequence[Tensor], how: tuple[Any, ...]
) -> list[Tensor]:
    """[output, *states] of torch's function. given: the input, and batch_sizes of a PackedSequence."""
    hx = tuple(states) if len(states) > 1 else states[0]
    return list(_own_call(getattr(torch._VF, cell), *given, hx, list(weights), *how))


_own = threading.local()


def in_own_call() -> bool:
    """Whether torch's function is called from here: a call that `accelerated` leaves alone."""
    return getattr(_own, "calls", False)


def _own_call(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    _own.calls = True
    try:
        return function(*arguments)
    finally:
        _own.calls = False


def layer(
    cell: str,
    bias: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Sequence[Tensor]:
    """One layer in training."""
    states = [s.contiguous() for s in states]
    return _eager(cell, input, batch_sizes, states, weights, (bias, 1, 0.0, True, bidirectional, False))


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _no_flat_weight_warning() -> Iterator[None]:
    """Silence cuDNN's hint to call flatten_parameters(): the weights here belong to the caller."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield


def by_layers(
    run: Callable[[Tensor, list[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
) -> list[Tensor]:
    """A stack as calls of ``run(y, states, weights) -> (y, *finals)``, with torch's own dropout between them."""
    num_layers, dropout, batch_first = options.num_layers, options.active_dropout, options.batch_first
    directions, per_layer = states[0].size(0) // num_layers, len(weights) // num_layers
    # Contiguous: at its first call a graph's operator takes another route in ATen for what is not, with other bits.
    y = (input.transpose(0, 1) if batch_first else input).contiguous()
    finals = []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            y = F.dropout(y, dropout)
        initial = [s[layer * directions : (layer + 1) * directions] for s in states]
        y, *final = run(y, initial, weights[layer * per_layer : (layer + 1) * per_layer])
        finals.append(final)
    return [y.transpose(0, 1) if batch_first else y, *(torch.cat(s) for s in zip(*finals, strict=True))]


def _operator(
    cell: str,
    bias: bool,
    bidirectional: bool,
    autocast: torch.dtype | None,  # inside an operator it is not visible
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Sequence[Tensor]:
    """One layer as an operator."""
    fixed = cell, bias, bidirectional, autocast
    tensors = _distinct([input, *states, *weights])
    if (
        inside_torch_func()
    ):  # dynamo does not know that what torch.func wraps requires a gradient, but of what is made of it
        tensors = [t.view_as(t) for t in tensors]
    found: Sequence[Tensor] = (
        # Dynamo cannot trace a Function with ``*tensors`` where no gradient is asked for (seen: 2.13).
        _Layer.apply(*fixed, *tensors) if expects_backward(tensors) else layer_forward(*fixed, tensors)
    )
    return found


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tied weights as views: dynamo refuses the same argument twice."""
    return [t.view_as(t) if any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors)]


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the input's device, None where autocast is off."""
    device_type = input.device.type
    # device types without autocast, such as meta, raise when asked
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def output_dtypes(
    cell: str, input: Tensor, states: Sequence[Tensor], autocast: torch.dtype | None
) -> list[torch.dtype]:
    """Dtypes of the output and of the final states: torch.nn's for a batch of equally long rows, on a CPU that has
    what it asks oneDNN for; of cells that torch.nn has not, autocast's.

    Args:
        input: as it came, of which the dtype and the device are read
        states: as in ``stack``
        autocast: its dtype, None where it is off
    """
    n = 1 + len(states)
    if autocast is None or input.dtype == torch.float64:  # autocast leaves float64 alone
        return [input.dtype] * n
    projects, of = states[0].size(-1) != states[-1].size(-1), TORCH.get(cell)
    if input.device.type != "cpu" or of is None or not of.keeps_dtype or (of.onednn and not projects):
        return [autocast] * n
    # All but the h that comes out of a product, the projection.
    kept = torch.promote_types(autocast, states[-1].dtype)
    return [autocast, autocast, kept] if projects else [kept] * n


def _run_layer(
    cell: str,
    bias: bool,
    bidirectional: bool,
    autocast: torch.dtype | None,
    training: bool,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    input, states, weights = _split(cell, tensors)
    if autocast is None:
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        context = torch.autocast(input.device.type, dtype=autocast, cache_enabled=False)
    with context:
        return _eager(cell, input, None, states, weights, (bias, 1, 0.0, training, bidirectional, False))


def _split(cell: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """(input, *states, *weights) in its three parts."""
    first_weight = 1 + CELLS[cell].states
    return tensors[0], tensors[1:first_weight], tensors[first_weight:]


def unaliased(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies where a storage is shared: an operator's outputs alias nothing."""
    taken = {t.untyped_storage().data_ptr() for t in inputs}
    result = []
    for output in outputs:
        output = output.contiguous()
        if output.untyped_storage().data_ptr() in taken:
            output = output.clone()
        taken.add(output.untyped_storage().data_ptr())
        result.append(output)
    return result


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those of the leaves, given those of the outputs, or those of N samples, with a dimension N in front of each."""
    how = {"allow_unused": True, "materialize_grads": True}
    if grads[0].dim() == outputs[0].dim():
        return torch.autograd.grad(outputs, leaves, grads, **how)
    each = zip(*grads, strict=True)
    samples = [torch.autograd.grad(outputs, leaves, of_one, retain_graph=True, **how) for of_one in each]
    return [torch.stack(of_leaf) for of_leaf in zip(*samples, strict=True)]


@contextlib.contextmanager
def autograd_inside_an_operator() -> Iterator[None]:
    """Let autograd record again. An operator runs below autograd: its dispatch keys are excluded there, which
    torch.enable_grad() does not undo."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def through_again(
    run: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """What a backward operator does that runs the forward again: the gradients of ``tensors``, given those of the
    outputs of ``run(tensors)``, or of each of N with a dimension N in front."""
    with autograd_inside_an_operator():
        leaves = [t.detach().requires_grad_() for t in tensors]
        found = _gradients(run(leaves), leaves, grads)
    return unaliased(found, [*tensors, *grads])


@torch.library.custom_op("persistrnn::torch_layer", mutates_args=())
def layer_forward(
    cell: str,
    bias: bool,
    bidirectional: bool,
    autocast: torch.dtype | None,
    tensors: list[Tensor],
) -> list[Tensor]:
    """One layer on torch's kernels. tensors: input [T, B, I], the states [D, B, H], the layer's weights."""
    return unaliased(_run_layer(cell, bias, bidirectional, autocast, False, tensors), tensors)


@layer_forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, _, _, autocast, tensors = arguments
    input, states, _ = _split(cell, tensors)
    steps, batch, _ = input.shape
    directions, _, features = states[0].shape
    first, *others = output_dtypes(cell, input, states, autocast)
    y = input.new_empty(steps, batch, directions * features, dtype=first)
    return [y, *(s.new_empty(s.shape, dtype=dtype) for s, dtype in zip(states, others, strict=True))]


@torch.library.custom_op("persistrnn::torch_layer_backward", mutates_args=())
def layer_backward(
    cell: str,
    bias: bool,
    bidirectional: bool,
    autocast: torch.dtype | None,
    tensors: list[Tensor],
    grads: list[Tensor],
) -> list[Tensor]:
    """Of `layer_forward`, as `through_again`: what cuDNN and oneDNN save has no shape that a compiler could know."""
    # training=True: without it cuDNN saves nothing and refuses the backward.
    run = functools.partial(_run_layer, cell, bias, bidirectional, autocast, True)
    return through_again(run, tensors, grads)


operator_by_gradients(layer_backward)


class _Layer(torch.autograd.Function):
    """The two operators as one differentiable function (an operator's own register_autograd breaks
    torch.func and gives silent zero tangents under jvp)."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(layer_forward(*arguments[:4], list(arguments[4:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed = inputs[:4]
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *layer_backward(*ctx.fixed, list(ctx.saved_tensors), list(grads))
