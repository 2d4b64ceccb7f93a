"""What ``persistrnn profile`` runs: a layer of given sizes, or a model of the user's, and the same on torch.nn.

A ``Build`` makes it for a number of time steps. ``calls`` watches the recurrent layers in it while it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from .. import decide, functional, replacement
from ..kernels.cells import CELLS
from ..modules import GRU, LSTM
from ..options import Backend, Save

OURS, TORCH = "persistrnn", "torch.nn"
LAYERS: dict[str, type[LSTM] | type[GRU]] = {"lstm": LSTM, "gru": GRU}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}


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
    """A stack of layers. input: I; dtype: of DTYPES; the others as in ``persistrnn.LSTM``."""

    cell: str
    input: int
    hidden: int
    layers: int
    bidirectional: bool
    batch: int
    dtype: str
    device: str
    backend: Backend = "auto"
    save: Save = "gates"
    save_budget: int | None = None

    def __str__(self) -> str:
        both, save = " D=2" * self.bidirectional, f" save={self.save}" * (self.save != "gates")
        return f"{self.cell} I={self.input} H={self.hidden} L={self.layers}{both} B={self.batch} {self.dtype}{save}"

    def check(self) -> None:
        """Raises SubjectError for sizes that no call could run as asked."""
        for name, allowed in (("cell", LAYERS), ("dtype", DTYPES)):
            if not isinstance(given := getattr(self, name), str) or given not in allowed:
                raise SubjectError(f"{name} is {given!r}, allowed: {', '.join(allowed)}")
        if not isinstance(self.device, str):
            raise SubjectError(f"device is {self.device!r}, allowed: 'cpu', 'cuda' or 'cuda:N'")
        if self.dtype == "tf32" and not self.device.startswith("cuda"):
            raise SubjectError("dtype is 'tf32', allowed on a CPU: fp16, bf16, fp32; a CPU has no tf32 products")
        if type(self.batch) is not int or self.batch < 1:
            raise SubjectError(f"batch is {self.batch!r}, allowed: an int of at least 1, the sequences side by side")
        try:
            self._layer("meta")
        except (TypeError, ValueError) as error:
            raise SubjectError(str(error)) from error

    def _layer(self, device: str) -> LSTM | GRU:
        return LAYERS[self.cell](
            self.input, self.hidden, self.layers, bidirectional=self.bidirectional, backend=self.backend,
            save=self.save, save_budget=self.save_budget, device=device,
        )  # fmt: skip

    def __call__(self, steps: int) -> Built:
        """The layer and a batch [T, B, I] of noise, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = self._layer("cpu")
        where: dict[str, Any] = {"device": self.device, "dtype": DTYPES[self.dtype]}
        noise = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(steps, self.batch, self.input, generator=noise, **where)
        return Built(layer.to(**where), (x,), {})


@contextlib.contextmanager
def working_folder() -> Iterator[None]:
    """With the working folder first among those where modules are looked for."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may change the list too
            sys.path.remove(here)


def load(given: str) -> Callable[..., Any]:
    """The callable that "module:callable" names; modules are looked for in the working folder first. To call it, and
    what it returns, stay within ``working_folder``: it may import more.

    Raises:
        SubjectError: it is not of that form, cannot be imported, or is no callable.
    """
    name, colon, attribute = given.partition(":")
    form = "module:callable, such as mymodel:make for `def make(steps)` in mymodel.py"
    if not (name and colon and attribute):
        raise SubjectError(f"{given!r} given, allowed: {form}")
    try:
        with working_folder():
            found: Any = importlib.import_module(name)
    except Exception as error:  # whatever the user's file raises
        raise SubjectError(
            f"{given!r} given, and {name!r} cannot be imported ({_words(error)}); allowed: {form}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SubjectError(f"{given!r} given, and {name!r} has no {attribute!r}; allowed: {form}")
        found = getattr(found, part)
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
            raise SubjectError(f"the callable failed when called with steps={steps}: {_words(error)}") from error
        allowed = "allowed: (module, batch), or (module, args, kwargs) with a tuple and a dict"
        if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
            parts = [type(part).__name__ for part in made] if isinstance(made, tuple) else type(made).__name__
            raise SubjectError(f"the callable returned {parts}; {allowed}")
        if len(made) == 3 and not (isinstance(made[1], tuple) and isinstance(made[2], dict)):
            raise SubjectError(f"the callable returned {[type(part).__name__ for part in made]}; {allowed}")
        args, kwargs = (made[1], made[2]) if len(made) == 3 else ((made[1],), {})
        return Built(made[0].to(device), _moved(args, device), _moved(kwargs, device))

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
        made: dict[int, nn.Module] = {}
        for name, layer in module.named_modules():
            if isinstance(layer, (LSTM, GRU)):
                try:
                    new = layer.to_torch()
                except ValueError as error:
                    raise SubjectError(
                        f"torch is to be compared with, and {name or 'the layer'} cannot: {error}"
                    ) from error
                new.flatten_parameters()  # cuDNN wants its weights in one piece: once, not at each call
                made[id(layer)] = new
        if not made:
            raise SubjectError(
                "torch is to be compared with, and the model has no layer of persistrnn to replace; allowed: a model "
                "with persistrnn.LSTM or GRU. For one with torch.nn's, compare with persistrnn"
            )
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if id(child) in made:
                    parent._modules[name] = made[id(child)]
        return Built(made.get(id(module), module), args, kwargs)

    return other


def on_ours(build: Build) -> Build:
    """The same with ``persistrnn.replace`` over it."""

    def other(steps: int) -> Built:
        module, args, kwargs = build(steps)
        if not any(isinstance(layer, (nn.LSTM, nn.GRU)) for layer in module.modules()):
            raise SubjectError(
                "persistrnn is to be compared with, and the model has no torch.nn.LSTM or GRU to replace; allowed: a "
                "model that has one"
            )
        return Built(replacement.replace(module).model, args, kwargs)

    return other


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# What the recurrent layers of it do.


@dataclass(frozen=True)
class Call:
    """One call of a stack of layers; dtype: that of the computation, of DTYPES; path: which kernels ran it; save: of
    the layer."""

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

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward's products, those of the inputs included; a backward has about twice
        as many."""
        widths = self.input + (self.layers - 1) * self.directions * self.hidden + self.layers * self.hidden
        return 2.0 * self.steps * self.batch * self.directions * CELLS[self.cell].gates * self.hidden * widths

    def scan_bytes(self, backward: bool) -> float:
        """Bytes that the scans of one pass must move, in training: their inputs and results, and W_hh, once each."""
        cell = CELLS[self.cell]
        gates, kept = cell.gates, cell.saved + cell.states  # with c and y
        if backward:
            kept += 1 + gates * (2 if cell.recurrent_gradient else 1)  # dy, and dx; dr too where it differs
        else:
            kept += gates
            kept -= {"state": cell.saved, "checkpoint": cell.saved}.get(self.save, 0)
        rows = self.steps * self.batch * kept + gates * self.hidden
        return float(self.layers * self.directions * self.hidden * rows * BYTES[self.dtype])

    def needed(self, save: str) -> float:
        """Predicted bytes of its training with another ``save``, on its path and without dropout."""
        dtype = DTYPES.get(self.dtype, torch.float64)
        sizes = self.layers, self.directions, True, self.input, self.hidden, 0, self.batch, self.steps
        asked = decide.Call(self.cell, *sizes, dtype, torch.device("cpu"), "ieee", True)
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
        dtype = functional.compute_dtype(data, weight)
        exact = dtype == torch.float32 and functional.precision() != "tf32"
        names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32" if exact else "tf32"}
        path = getattr(layer, "last_path", None) or TORCH
        label = names.get(dtype, str(dtype).removeprefix("torch."))
        sizes = layer.input_size, layer.hidden_size, layer.num_layers, 2 if layer.bidirectional else 1
        found.append(Call(layer.mode.lower(), *sizes, steps, batch, label, path, getattr(layer, "save", "gates")))

    kinds = LSTM, GRU, nn.LSTM, nn.GRU
    # W_hh of heads is smaller than what is counted here.
    layers = [layer for layer in module.modules() if isinstance(layer, kinds) and getattr(layer, "heads", 1) == 1]
    hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
