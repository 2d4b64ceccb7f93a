"""What ``persistrnn profile`` runs: a layer of given sizes, or a model of the user's, and the same on torch.nn.

A ``Build`` makes it for a number of time steps. ``calls`` watches the recurrent layers in it while it runs.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from .. import decide, replacement
from ..calls import compute_dtype, precision
from ..kernels.cells import CELLS
from ..options import Backend, Save, check_count
from ..own_cell import Recurrent
from ..recurrent import RecurrentBase

OURS, TORCH = "persistrnn", "torch.nn"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


class Built(NamedTuple):
    """One iteration's forward is ``module(*args, **kwargs)``."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Build: TypeAlias = "Callable[[int], Built]"


class SubjectError(ValueError):
    """What is to be profiled cannot be; the message has the given value, what is allowed and the remedy."""


@dataclass(frozen=True)
class Sizes:
    """A stack of layers, called as a callable of the user's is. cell: a built-in one's name; input: I; dtype: of
    DTYPES; the others as in ``persistrnn.Recurrent``, which refuses what cannot be."""

    cell: str
    input: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    batch: int = 16
    dtype: str = "fp32"
    backend: Backend = "auto"
    save: Save = "gates"
    save_budget: int | None = None
    heads: int = 1

    def __post_init__(self) -> None:
        for name, value in (("hidden_size", self.hidden), ("batch", self.batch)):
            check_count(name, value)
        self._layer("meta")

    def __str__(self) -> str:
        both, save = " D=2" * self.bidirectional, f" save={self.save}" * (self.save != "gates")
        hidden = f"H={self.hidden}" + f" in {self.heads} heads" * (self.heads > 1)
        return f"{self.cell} I={self.input} {hidden} L={self.layers}{both} B={self.batch} {self.dtype}{save}"

    def _layer(self, device: str) -> RecurrentBase:
        return Recurrent(
            self.cell, self.input, self.hidden, self.layers, bidirectional=self.bidirectional, backend=self.backend,
            save=self.save, save_budget=self.save_budget, heads=self.heads, device=device, dtype=DTYPES[self.dtype],
        )  # fmt: skip

    def __call__(self, steps: int) -> tuple[nn.Module, Tensor]:
        """The layer and a batch [T, B, I] of noise, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._layer("cpu"), torch.randn(steps, self.batch, self.input, dtype=DTYPES[self.dtype])


def load(given: str) -> Callable[..., Any]:
    """The callable that "module:callable" names.

    Raises:
        SubjectError: it cannot be imported, or is no callable.
    """
    form = "module:callable, such as mymodel:make for `def make(steps)` in mymodel.py"
    try:
        found: Any = pkgutil.resolve_name(given)
    except Exception as error:  # whatever the user's file raises
        raise SubjectError(f"{given!r} given, which cannot be imported ({shown(error)}); allowed: {form}") from error
    if not callable(found):
        raise SubjectError(f"{given!r} given, and that is of type {type(found).__name__}; allowed: {form}")
    result: Callable[..., Any] = found
    return result


def of_callable(make: Callable[..., Any], device: str) -> Build:
    """A Build of a user's callable, which takes the number of steps and returns ``(module, batch)``, for a forward of
    ``module(batch)``, or ``(module, args, kwargs)``; both are moved to ``device``."""

    def build(steps: int) -> Built:
        try:
            made = make(steps)
        except Exception as error:
            raise SubjectError(f"the callable failed when called with steps={steps}: {shown(error)}") from error
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        match made:
            case (nn.Module() as module, batch):
                args = (batch,)
            case (nn.Module() as module, tuple(args), dict(kwargs)):
                pass
            case _:
                parts = [type(part).__name__ for part in made] if isinstance(made, tuple) else type(made).__name__
                raise SubjectError(
                    f"the callable returned {parts}; allowed: (module, batch), or (module, args, kwargs) with a tuple "
                    "and a dict"
                )
        return Built(module.to(device), _moved(args, device), _moved(kwargs, device))

    return build


def _moved(value: Any, device: str) -> Any:
    packed = (PackedSequence,)  # a tuple, which pytree would take apart
    return tree_map_only((Tensor, *packed), lambda one: one.to(device), value, lambda one: isinstance(one, packed))


def on_torch(build: Build) -> Build:
    """The same with torch.nn's layers in place of ours.

    The Build raises SubjectError if there is none of ours to replace, or one that torch.nn has no equal of.
    """

    def other(steps: int) -> Built:
        module, args, kwargs = build(steps)
        made: dict[nn.Module, nn.Module] = {}
        for name, layer in list(module.named_modules(remove_duplicate=False)):
            if not isinstance(layer, RecurrentBase):
                continue
            if layer not in made:
                try:
                    new = made[layer] = layer.to_torch()
                except ValueError as error:
                    raise SubjectError(
                        f"torch is to be compared with, and {name or 'the layer'} cannot: {error}"
                    ) from error
                new.flatten_parameters()  # cuDNN wants its weights in one piece: once, not at each call
            if name:
                module.set_submodule(name, made[layer])
        if not made:
            raise SubjectError(
                "torch is to be compared with, and the model has no layer of persistrnn to replace; allowed: a model "
                "with persistrnn.LSTM, GRU or RNN. For one with torch.nn's, compare with persistrnn"
            )
        return Built(made.get(module, module), args, kwargs)

    return other


def on_ours(build: Build) -> Build:
    """The same with ``persistrnn.replace`` over it."""

    def other(steps: int) -> Built:
        module, args, kwargs = build(steps)
        found = replacement.replace(module)
        if not found.swapped:
            raise SubjectError(
                f"persistrnn is to be compared with, and the model has no torch.nn.LSTM, GRU or RNN to replace "
                f"({found}); allowed: a model that has one"
            )
        return Built(found.model, args, kwargs)

    return other


def shown(error: BaseException) -> str:
    """An error's kind and words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# What the recurrent layers of it do.


@dataclass(frozen=True)
class Call:
    """One call of a stack of layers; dtype: that of the computation, of DTYPES; path: which kernels ran it; save and
    heads: of the layer."""

    cell: str
    input: int
    hidden: int
    layers: int
    directions: int
    steps: int
    batch: int
    dtype: str
    path: str
    save: str = "gates"
    heads: int = 1

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward's products, those of the inputs included; a backward has about twice
        as many."""
        cell, below = CELLS[self.cell], self.input + (self.layers - 1) * self.directions * self.hidden
        widths = cell.inputs * below + cell.gates * self.layers * self.hidden // self.heads
        return 2.0 * self.steps * self.batch * self.directions * self.hidden * widths

    def scan_bytes(self, backward: bool) -> float:
        """Bytes that the scans of one pass must move, in training: their inputs and results, and W_hh, once each."""
        cell = CELLS[self.cell]
        kept = cell.states + len(cell.extras)  # c and y, the masks
        if backward:
            kept += cell.saved + 1 + cell.stored_gradients + cell.recurrent_gradient * cell.gates  # dy, dx, dr
        else:
            kept += cell.inputs + cell.saved * (self.save not in ("state", "checkpoint"))
        rows = self.steps * self.batch * kept + cell.gates * self.hidden // self.heads
        return float(self.layers * self.directions * self.hidden * rows * DTYPES[self.dtype].itemsize)

    def needed(self, save: str) -> float:
        """Predicted bytes of its training with another ``save``, on its path and without dropout."""
        dtype = DTYPES.get(self.dtype, torch.float64)
        sizes = self.layers, self.directions, True, self.input, self.hidden, 0, self.batch, self.steps
        asked = decide.Call(self.cell, *sizes, dtype, torch.device("cpu"), "ieee", True, heads=self.heads)
        return decide.needed_bytes(asked, save, self.path == "persistent")


@contextlib.contextmanager
def calls(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of recurrent layers that happen inside, in order."""
    found: list[Call] = []

    def watch(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(x, PackedSequence):
            steps, batch, data = len(x.batch_sizes), int(x.batch_sizes[0]), x.data
        else:
            time, data = int(layer.batch_first), x
            steps, batch = (x.size(0), 1) if x.dim() == 2 else (x.size(time), x.size(1 - time))
        weight = next(layer.parameters())
        dtype = compute_dtype(data, weight)
        single = "tf32" if precision() == "tf32" else "fp32"
        names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: single}
        path = getattr(layer, "last_path", None) or TORCH
        label = names.get(dtype, str(dtype).removeprefix("torch."))
        sizes = layer.input_size, layer.hidden_size, layer.num_layers, 2 if layer.bidirectional else 1
        cell = layer.cell if isinstance(layer, RecurrentBase) else layer.mode.lower()
        of_ours = getattr(layer, "save", "gates"), getattr(layer, "heads", 1)
        found.append(Call(cell, *sizes, steps, batch, label, path, *of_ours))

    layers = [layer for layer in module.modules() if isinstance(layer, (RecurrentBase, nn.RNNBase))]
    hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
