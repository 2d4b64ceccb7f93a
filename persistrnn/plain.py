"""The call that most calls on a CPU are: an input, states or none, on torch's own kernels, by a layer of which nothing
has changed since a call that was validated and decided in full (``calls``). What that found is remembered; to look at
everything that it depended on takes a third of finding it again, which takes as long as torch.nn's whole call of one
step. Whatever is not exactly as it was goes the whole way, and so gets its error there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from persistrnn import torch_path
from persistrnn.decide import TORCH
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options
from persistrnn.recipe import PLAIN

# What of a layer says how its calls run; of some layers the class has it.
ATTRIBUTES = (
    *(name for name in Options._fields if name != "recipe"),
    *("_recipe", "input_size", "hidden_size", "proj_size", "cell", "nonlinearity", "reset_after"),
)
# Where else a call looks. Of a subclass that has something of its own there, or in the place of a weight, nothing is
# remembered: it may say something else at every call.
METHODS = ("recipe", "options", "all_weights", "initial_states", "__getattr__", "__getattribute__")


class _Known(NamedTuple):
    """Of one layer. attributes: the values of ``ATTRIBUTES``, the very objects; absent: names that it has no attribute
    of, beside its parameters. names, shapes, dtype: of the weights, which are all of its parameters, in torch.nn's
    order. rows, features: of its states. how: further arguments of torch's function for the cell."""

    layer: weakref.ref[Any]
    kind: type
    attributes: tuple[Any, ...]
    absent: frozenset[str]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    input_size: int
    rows: int
    features: tuple[int, ...]
    cell: str
    how: tuple[Any, ...]


_known: dict[int, _Known] = {}  # by id


def run(layer: Any, input: Any, hx: Any) -> list[Tensor] | None:
    """[output, *states] of ``layer(input, hx)``; None: it must go the whole way."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or (known := _known.get(id(layer))) is None:
        return None
    own, parameters, dtype = layer.__dict__, layer._parameters, known.dtype
    if known.layer() is not layer or type(layer) is not known.kind or _observed():
        return None
    if not own.keys().isdisjoint(known.absent):
        return None
    if len(parameters) != len(known.names) or not all(map(is_, map(own.get, ATTRIBUTES), known.attributes)):
        return None
    weights = [parameters.get(name) for name in known.names]
    for weight, shape in zip(weights, known.shapes, strict=True):
        if not _is_plain(weight, dtype) or weight.shape != shape:
            return None
    if not _is_plain(input, dtype) or input.dim() != 3:
        return None
    first, second, features = input.shape
    if first == 0 or second == 0 or features != known.input_size:
        return None
    batch = first if known.how[-1] else second  # batch_first
    if hx is None:
        states = [input.new_zeros(known.rows, batch, size) for size in known.features]
    else:
        states = list(hx) if len(known.features) > 1 and type(hx) is tuple else [hx]
        if len(states) != len(known.features):
            return None
        for state, size in zip(states, known.features, strict=True):
            if not _is_plain(state, dtype) or state.shape != (known.rows, batch, size):
                return None
    return torch_path.call(known.cell, [input], states, weights, known.how)


def _observed() -> bool:
    """Whether something is active that may want another path, or another dtype."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    kind = type(tensor)
    exact = kind is Tensor or kind is nn.Parameter
    return exact and tensor.layout is torch.strided and tensor.is_cpu and tensor.dtype is dtype and not tensor.is_nested


def _says_more(kind: type, names: frozenset[str]) -> bool:
    """Whether a class that is not of the library has something of its own where a call looks."""
    places = names.union(ATTRIBUTES, METHODS)
    return any(
        cls.__module__.partition(".")[0] not in ("persistrnn", "torch", "builtins") and not places.isdisjoint(vars(cls))
        for cls in kind.__mro__
    )


def remember(layer: Any, weights: Sequence[Tensor], path: str) -> None:
    """After a call of ``layer``, without lengths and the like, that went the whole way.

    What torch's own kernels run on a CPU with save="gates" they run with any input, in one piece.
    """
    if path != "torch" or _observed():
        return
    parameters, cell = layer._parameters, layer.cell
    names = tuple(name for _, of in layer._names() for name in of)
    its_own = len(parameters) == len(names) and all(map(is_, map(parameters.get, names), weights))
    noiseless = layer.recipe._replace(forget_bias=None) == PLAIN
    on_cpu = all(_is_plain(weight, weights[0].dtype) for weight in weights)
    absent = frozenset((*names, *layer._names_beyond(), "initial_states"))
    if cell not in TORCH or layer.save != "gates" or not (its_own and noiseless and on_cpu):
        return
    if _says_more(type(layer), absent) or not layer.__dict__.keys().isdisjoint(absent):
        return
    number, attributes = id(layer), tuple(map(layer.__dict__.get, ATTRIBUTES))
    states = (layer.proj_size or layer.hidden_size, *(layer.hidden_size,) * (CELLS[cell].states - 1))
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    _known[number] = _Known(
        weakref.ref(layer, lambda _: _known.pop(number, None)), type(layer), attributes, absent, names,
        tuple(weight.shape for weight in weights), weights[0].dtype, layer.input_size, rows, states,
        cell, layer.options.of_torch,
    )  # fmt: skip
