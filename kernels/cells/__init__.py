"""What a cell is: every number about it, once. Planner, kernels, operators, modules and audit read this table.

All of it follows from the cell's step, one PyTorch function (``cells.library``), at the first question about the cell.
Neither torch nor Triton is imported before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .derive import Derived


@dataclass(frozen=True)
class Cell:
    """The numbers of a cell.

    Attributes:
        name: as in ``torch.nn``, lower case; of a cell of one's own with a hash of what was derived.
        gates: rows of W_hh per unit (G).
        states: tiles of state per unit, h first. Other units see h alone.
        saved: tiles per unit and step that the backward needs besides the states.
        recurrent_gradient: whether the step does more with the two halves of the gates than add them: the gradient of
            the recurrent half may differ from that of the input half, and is stored beside it.
        after: which of the states after the step the backward reads as well, from where the forward has put them.
        params: names of its parameters per unit, each [H] of a layer and direction, beside weights and biases.
        extras: names of what it takes per step and unit beside its gates, without gradient: masks.
        masks: how many of ``extras``, the last ones, are drawn from a seed (``variants``).
        more_inputs: tiles of the input half beyond the gates.
        more_gradients: tiles that the backward stores behind dx, for the gradients of ``params`` alone.
        finite_at_zero: whether both passes make finite numbers of zeros, step after step: then units past H, which
            have nothing else, need no mask.
        products: of a step beside that with h (``stages``), each of one gate, the last ones in the order of the gates.
        means: tiles that a step averages over all units (``stages``).
        wide: which of ``params`` have a tile per gate, [G*H].
        normalised: whether each half of the gates is layer-normalised over its G*H numbers before its bias is added:
            that of the input, times the parameter weight_ln_ih, outside of the step, the recurrent one in it.
        chain: cycles of the longest chain of operations to the new h in the forward, and to the gates' gradients in the
            backward; work: of all operations of each pass, as if one waited for the other.
        inputs: tiles of the input half (X).
        stored_gradients: tiles that the backward stores of the input half (V).
        given_out: states of which a caller can have every step: h and, where there is one, the second (c).
        gates_of_h: gates whose product is with h.
        param_tiles: of each of ``params``, per unit.
        step_params: tiles of all parameters that the step is given.
        staged: whether its step has several stages.
    """

    name: str
    gates: int
    states: int
    saved: int
    recurrent_gradient: bool
    after: tuple[int, ...] = ()
    params: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    more_inputs: int = 0
    more_gradients: int = 0
    finite_at_zero: bool = False
    products: int = 0
    means: int = 0
    wide: tuple[str, ...] = ()
    normalised: bool = False
    masks: int = 0
    chain: tuple[int, int] = (0, 0)
    work: tuple[int, int] = (0, 0)

    # Fields and no properties: torch.compile reads the fields of a frozen dataclass alone.
    inputs: int = field(init=False)
    stored_gradients: int = field(init=False)
    given_out: int = field(init=False)
    gates_of_h: int = field(init=False)
    param_tiles: tuple[int, ...] = field(init=False)
    step_params: int = field(init=False)
    staged: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", self.gates + self.more_inputs)
        object.__setattr__(self, "stored_gradients", self.inputs + self.more_gradients)
        object.__setattr__(self, "given_out", min(self.states, 2))
        object.__setattr__(self, "gates_of_h", self.gates - self.products)
        tiles = tuple(self.gates if name in self.wide else 1 for name in self.params)
        object.__setattr__(self, "param_tiles", tiles)
        object.__setattr__(self, "step_params", sum(tiles) + self.gates * self.normalised)
        object.__setattr__(self, "staged", self.products + self.means > 0)


# The names of ``library.CELLS``, known without deriving one.
BUILT_IN = ("lstm", "gru", "rnn_tanh", "rnn_relu", "peephole", "coupled", "mgu", "janet", "slstm")
# Those of ``library.STAGED``, whose steps have several stages, and kernels of their own.
STAGED = ("gru_reset_before", "layer_norm_lstm", "layer_norm_gru")
LAYER_NORM_EPS = 1e-5  # what a layer norm adds to the variance: torch.nn.LayerNorm's
_registered: dict[str, Derived] = {}


def derived(name: str) -> Derived:
    """A cell with all that follows from its step. A built-in one is derived when it is first asked for.

    Raises:
        KeyError: there is no such cell.
    """
    if name not in _registered:
        if name not in (*BUILT_IN, *STAGED):
            raise KeyError(f"no cell {name!r}; there are {', '.join(CELLS)}")
        from . import library

        _registered[name] = library.built_in(name)
    return _registered[name]


# For torch.compile: called while it traces, the result is a constant.
derived._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Cells(Mapping[str, Cell]):
    def __getitem__(self, name: str) -> Cell:
        return derived(name).cell

    def __contains__(self, name: object) -> bool:
        return name in _registered or name in BUILT_IN or name in STAGED

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*BUILT_IN, *STAGED, *_registered)))

    def __len__(self) -> int:
        return len({*BUILT_IN, *STAGED, *_registered})


CELLS = _Cells()


def add(cell: Derived) -> str:
    """Put a derived cell into the table, once; returns its name there."""
    return _registered.setdefault(cell.cell.name, cell).cell.name
