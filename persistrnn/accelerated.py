"""torch's own recurrent functions on the kernels, for code that nobody wants to change: `accelerated`, `accelerate`.

torch.nn's layers, subclasses of them, TorchScript and calls of torch.lstm, gru, rnn_tanh and rnn_relu all end in eight
operators of ATen. Once asked for, these get an implementation of ours on CPU and CUDA tensors, which asks `decide` what
`backend="auto"` would, and hands every call that the kernels do not take to ATen's own implementation, untouched.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from persistrnn import calls, torch_path
from persistrnn.decide import TORCH, Decision, inside_torch_func
from persistrnn.options import BACKENDS, OF_TORCH, Backend, Options, check_flag, check_name
from persistrnn.request import Request

MOST = 64  # different calls that are told apart in a record
MORE = "others"

_lock = threading.Lock()
_active: list[Acceleration] = []  # the last one holds
_library: torch.library.Library | None = None


class Acceleration(ContextDecorator):
    """What `accelerated` and `accelerate` give: which calls of torch's functions were run on the kernels, and why the
    others were not. Printable.

    Attributes:
        backend: as it was asked for
        taken: how often each kind of call ran on the kernels, by its description: the function, sizes, dtype, device
        left: of all others, by (description, reason)
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.taken: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Acceleration:
        _register()
        with _lock:
            _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            # From the end, by identity: entered twice, it is left twice.
            last = max(k for k, found in enumerate(_active) if found is self)
            del _active[last]

    def _note(self, call: str, reason: str | None) -> None:
        with _lock:
            if reason is None:
                known = call in self.taken or len(self.taken) < MOST
                self.taken[call if known else MORE] += 1
            else:
                known = (call, reason) in self.left or len(self.left) < MOST
                self.left[(call, reason) if known else (MORE, MORE)] += 1

    def __str__(self) -> str:
        with _lock:
            taken, left = list(self.taken.items()), list(self.left.items())
        lines = [f"{sum(n for _, n in taken)} calls on the kernels, {sum(n for _, n in left)} left to torch"]
        lines += [f"  {n} x {call}" for call, n in taken]
        lines += [f"  {n} x {call} left: {reason}" for (call, reason), n in left]
        return "\n".join(lines)

    __repr__ = __str__


def accelerated(*, backend: Backend = "auto") -> Acceleration:
    """Run torch's recurrent functions on the kernels, where they can, inside a ``with`` block or a decorated function.

        with persistrnn.accelerated() as calls:
            train(model)  # its torch.nn.LSTM, GRU and RNN, subclasses of them, torch.lstm and the like
        print(calls)  # which calls ran on the kernels, and why the others did not

    Nothing of the model changes: neither types nor parameters nor state_dict. What ran inside the block has the
    kernels' backward, wherever backward is called. A call of what the kernels do not take (on a CPU every one) is
    torch's own, to the bit; so is every call of wrapped tensors (torch.func, forward mode, fake tensors of a compiler
    or exporter). From the first block on, and after it, `ExportedProgram.run_decompositions` keeps torch.nn's layers
    whole, as aten.lstm.input and the like, in the whole process: torch takes an operator with an implementation of its
    own for one that is not to be taken apart. Decompose in a process that was never accelerated, or export a model
    whose layers `replace` has swapped. torch.compile breaks its graph at torch.nn's layers as ever and runs them as
    they run outside of it. torch draws other dropout masks than the kernels. Layers of ours, such as `replace` puts
    there, run in compiled graphs, take lengths and save less: prefer them where the model is yours.

    As torch's backend flags, it holds for the whole process while the block runs: for the threads of DataParallel and
    of autograd, too. Blocks nest, and the one that was entered last holds. A block may be left by an exception.
    Activation checkpoints run their forward again in the backward: call backward inside the block as well.

    Args:
        backend: "auto": where the kernels can run the call and are expected to be faster; "persistent": the kernels or
            RuntimeError, but for wrapped tensors and what is no call of persistrnn's, which stay torch's and are in
            `left`; "torch": none, as within a block around

    Returns:
        An `Acceleration`, which is the context manager and its record.

    Raises:
        ValueError: an unknown backend
    """
    check_name("backend", backend, BACKENDS)
    return Acceleration(backend)


_everywhere: Acceleration | None = None


def accelerate(on: bool = True, *, backend: Backend = "auto") -> Acceleration:
    """`accelerated` for the whole process from now on, until ``accelerate(False)``.

    Returns:
        The record of what it takes; when switched off, of what it took.

    Raises:
        TypeError: on is no bool
        ValueError: an unknown backend
    """
    global _everywhere
    check_flag("on", on)
    found = accelerated(backend=backend)
    _register()
    with _lock:
        old, _everywhere = _everywhere, found if on else None
        _active[:] = [*([found] if on else []), *(other for other in _active if other is not old)]
    return found if on else old or found


# ---- the operators --------------------------------------------------------------------------------------------------


def _register() -> None:
    """Give the operators ours, once for the process: taking it away again would race with other threads' calls."""
    global _library
    with _lock:
        if _library is not None:
            return
        _library = torch.library.Library("aten", "IMPL")
        for cell in TORCH:
            packet = getattr(torch.ops.aten, cell)
            for operator in (packet.input, packet.data):
                run = _implementation(cell, operator)
                # Both: of a composite operator with a kernel for a device, autograd's key falls to no other.
                for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
                    _library.impl(f"{cell}.{operator._overloadname}", run, key)


def _implementation(cell: str, operator: torch._ops.OpOverload) -> Callable[..., Any]:
    read = _read_packed if operator._overloadname == "data" else _read_padded

    def torchs(*arguments: Any) -> Any:
        # As without an implementation of ours: compilers have one in Python, of which eager calls know nothing.
        if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher):
            return operator.decompose(*arguments)
        return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *arguments)

    def run(*arguments: Any) -> Any:
        try:
            how = _active[-1]
        except IndexError:
            return torchs(*arguments)
        if how.backend == "torch" or torch_path.in_own_call():
            return torchs(*arguments)
        input, hx, weights, options = read(*arguments)
        data = input if isinstance(input, Tensor) else input.data
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        if not states:  # torch's own function says what is wrong
            return torchs(*arguments)
        call = _described(cell, data, states, options)
        reason = _obstacle(data, states, weights)
        if reason is None:
            decision: list[Decision] = []
            options = options._replace(backend=how.backend)
            try:
                found = calls.run(Request(cell, input, weights, hx, options), lambda made: _accepts(made, decision))
            except (RuntimeError, TypeError, ValueError) as error:
                if decision:
                    raise
                # torch's own function says what is wrong with a call, or takes what ours do not.
                reason = f"it is no call of persistrnn's: {error}"
            else:
                reason = decision[0].reason
        how._note(call, reason)
        if reason is not None:
            return torchs(*arguments)
        y = found.output if isinstance(found.output, Tensor) else found.output.data
        return y, *found.states

    # Else a compiler would look into what a compiled function calls between its graphs.
    return torch.compiler.disable(run)


def _accepts(made: Decision, decision: list[Decision]) -> bool:
    decision.append(made)
    return made.path == "persistent" or made.call.backend == "persistent"  # which raises


def _read_padded(
    input: Tensor, hx: Any, weights: Sequence[Tensor], *how: Any
) -> tuple[Tensor, Any, Sequence[Tensor], Options]:
    """(input, hx, weights, options) of an operator that takes a padded tensor. how: as ``Options.of_torch``; one that
    takes a PackedSequence leaves the last out."""
    options = Options(**dict(zip(OF_TORCH, how, strict=False)))
    return input, hx if isinstance(hx, Tensor) else tuple(hx), weights, options


def _read_packed(
    data: Tensor, batch_sizes: Tensor, hx: Any, *others: Any
) -> tuple[PackedSequence, Any, Sequence[Tensor], Options]:
    """The same of one that takes a PackedSequence's parts; its states stand in the order of the rows."""
    _, *read = _read_padded(data, hx, *others)
    return PackedSequence(data, batch_sizes), *read


def _described(cell: str, data: Tensor, states: Sequence[Tensor], options: Options) -> str:
    """A call but for its steps and rows, of which there are too many."""
    sizes = f"input {data.shape[-1] if data.dim() else 0}, state {states[0].shape[-1] if states[0].dim() else 0}"
    layers = f"{options.num_layers} layers" + " both ways" * options.bidirectional
    return f"{cell}: {sizes}, {layers}, {str(data.dtype).removeprefix('torch.')} on {data.device}"


def _obstacle(data: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    """What only torch's own function may see."""
    if inside_torch_func() or forward_ad._current_level >= 0:
        return "it is inside a transform of torch.func or forward-mode AD"
    for tensor in (data, *states, *weights):
        if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return f"a tensor of it is a {type(tensor).__name__}, which has rules of its own for operators"
    if states[0].dim() != 3:  # an unbatched one, which torch.nn gives a batch of one
        return "its states have no batch"
    return None
