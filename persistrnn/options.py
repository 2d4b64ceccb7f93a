"""How a stack of layers runs: what constructors, functions and changed modules take, and refuse alike."""

import numbers
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

from persistrnn.recipe import PLAIN, Recipe

Backend = Literal["auto", "persistent", "torch"]
BACKENDS = get_args(Backend)

Save = Literal["gates", "state", "checkpoint", "auto"]
SAVES = get_args(Save)

# What torch's own functions take, in their order.
OF_TORCH = ("bias", "num_layers", "dropout", "training", "bidirectional", "batch_first")


class Options(NamedTuple):
    """How a stack runs; the attributes of a module but for its sizes."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    backend: str = "auto"
    cell_dtype: torch.dtype | None = None
    save: str = "gates"
    save_budget: int | None = None
    training: bool = False
    heads: int = 1
    recipe: Recipe = PLAIN

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def of_torch(self) -> tuple[bool, int, float, bool, bool, bool]:
        """``OF_TORCH``."""
        return self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first


def check_options(options: Options) -> None:
    """What a constructor, a function and a changed module refuse alike, on every path; ``check_save`` has the rest."""
    for name in ("bias", "batch_first", "bidirectional", "training"):
        check_flag(name, getattr(options, name))
    for name in ("num_layers", "heads"):
        check_count(name, getattr(options, name))
    dropout = options.dropout
    is_number = type(dropout) is float or (isinstance(dropout, numbers.Real) and not isinstance(dropout, bool))
    if not is_number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being "
            f"zeroed, got {dropout!r}"
        )
    check_name("backend", options.backend, BACKENDS)
    if options.cell_dtype is not None and options.cell_dtype is not torch.float32:
        raise ValueError(
            f"cell_dtype is None (the dtype of the computation) or torch.float32, got {options.cell_dtype!r}"
        )


def check_sizes(input_size: object, hidden_size: object, proj_size: object, heads: int = 1) -> None:
    check_count("input_size", input_size)
    hidden = check_count("hidden_size", hidden_size)
    if not 0 <= _check_int("proj_size", proj_size) < hidden:
        raise ValueError(
            "proj_size should be zero (no projection) or a positive integer smaller than "
            f"hidden_size={hidden}, got {proj_size}"
        )
    check_heads(heads, hidden, bool(proj_size))


def check_heads(heads: int, hidden: int, projection: bool) -> None:
    if heads > 1 and projection:
        raise ValueError(f"a layer with projections has one W_hh, got heads={heads}; leave heads or proj_size out")
    if hidden % heads:
        divisors = ", ".join(str(n) for n in range(1, hidden + 1) if hidden % n == 0)
        raise ValueError(
            f"heads divides hidden_size={hidden}: it is one of {divisors}, got {heads}; give one of them, or another "
            "hidden_size"
        )


def check_save(save: object, budget: object, proj_size: int = 0) -> None:
    check_name("save", save, SAVES)
    if budget is not None:
        check_count("save_budget", budget)
    if (save == "auto") != (budget is not None):
        raise ValueError(
            "save='auto' goes with save_budget, the bytes that a training step may need at most; got "
            f"save={save!r} and save_budget={budget}"
        )
    if proj_size and save != "gates":
        raise ValueError(
            f"a layer with projections keeps its gates, got save={save!r} and proj_size={proj_size}; use save='gates', "
            "or torch.utils.checkpoint around the layer"
        )


def check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name} should be of type bool, got: {described(value)}; give True or False")


def check_name(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_count(name: str, value: object) -> int:
    if (count := _check_int(name, value)) <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return count


def _check_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {described(value)}")
    return value


def described(value: object) -> str:
    """Its type, and the value where that is short."""
    shown = f" ({value!r})" if isinstance(value, (int, float, str)) else ""
    return type(value).__name__ + (shown if len(shown) < 60 else "")
