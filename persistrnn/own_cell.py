"""A cell of one's own, from one function of one time step: `cell`, its layers `Recurrent`, and `check_cell`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from persistrnn import decide
from persistrnn.kernels.cells import CELLS, derived
from persistrnn.options import Backend, Options, Save
from persistrnn.recipe import PLAIN, Recipe
from persistrnn.recurrent import RecurrentBase
from persistrnn.validate import parameter_names

Step = TypeVar("Step", bound=Callable[..., Any])


def cell(
    *,
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    params: Sequence[str] = (),
    extras: Sequence[str] = (),
    more_inputs: Sequence[str] = (),
) -> Callable[[Step], Step]:
    """A decorator that makes a cell of one time step, for `Recurrent`:

        @persistrnn.cell(gates=("f", "n"), states=("h",))
        def mgu(x, r, state):
            f = torch.sigmoid(x.f + r.f)
            return state.h + f * (torch.tanh(x.n + f * r.n) - state.h)

    The step is ``step(x, r, state[, p][, e]) -> new state``: named tuples of tensors of one shape, p where there are
    params and e where there are extras. x is the input's half of the gates, W_ih x_t + b_ih, r the recurrent one, W_hh
    h_{t-1} + b_hh. It is pointwise: torch's operations on each unit by itself, `torch.where` for a branch. What the
    kernels run, forward and backward, follows from it (`check_cell` prints that), and is checked against autograd.

    What needs other units stands between parts of a step that is a generator: ``n = yield Product(reset * state.h)``
    gives the recurrent half of the next gate of those whose product is not with h, the last ones (r has no tile of
    them), ``mean = yield Mean(c)`` a mean over all units; both are in `persistrnn.kernels.cells.stages`. The kernels
    run a step with one Product or with any number of Means, with save="gates"; others run step by step ("stepwise").

    Args:
        gates: names of the tiles of x and r, in the order of the rows of weight_ih and weight_hh
        states: names of the states, h first, which alone is multiplied by W_hh and is the layer's output
        params: names of parameters per unit [H], learned; in a layer's state_dict as name_l0, name_l0_reverse, ...
        extras: names of what each step takes, without gradient (masks); a layer's call takes them by these names
        more_inputs: names of tiles of x beyond the gates: further rows of weight_ih and bias_ih

    Returns:
        The function itself, of which a layer can be made.

    Raises:
        persistrnn.kernels.cells.graph.CellError, a ValueError: the step is not pointwise, or a name cannot be one; says
            which line, why, and what to do
    """
    taken = {name.partition("_l0")[0] for name in parameter_names("lstm", 0, 0, True, True)}
    options = set(inspect.signature(RecurrentBase.forward).parameters) - {"extras"}
    for what, names, others in (("params", params, taken), ("extras", extras, options)):
        if used := [name for name in names if name in others]:
            raise ValueError(f"{what} has {used[0]!r}, a name that layers use themselves; choose another")

    def register(step: Step) -> Step:
        from persistrnn.kernels.cells import registration  # which derives: not at the import of persistrnn

        found = registration.register(
            step, gates=gates, states=states, params=params, extras=extras, more_inputs=more_inputs
        )
        step.cell = found.cell.name  # type: ignore[attr-defined]
        return step

    return register


def _name_of(cell: object) -> str:
    """The name in ``CELLS`` of a decorated function, or of a built-in cell by its name."""
    name = getattr(cell, "cell", cell)
    if isinstance(name, str) and name in CELLS:
        return name
    known = ", ".join(repr(name) for name in CELLS if ":" not in name)
    if isinstance(name, str):
        raise ValueError(f"cell is a function made a cell by @persistrnn.cell, or one of {known}, got {name!r}")
    raise TypeError(
        f"cell is a function made a cell by @persistrnn.cell, or one of {known}, got {type(cell).__name__}"
        f"{'; decorate it' if callable(cell) else ''}"
    )


class Recurrent(RecurrentBase):
    """A stack of layers of any cell, with all that `LSTM` and `GRU` have but projections.

    Args:
        cell: a function decorated with `cell`, or the name of a built-in cell
        All others are those of `GRU`; cell_dtype is for cells of two states or more.

    Inputs: input, and optionally hx: h0 of a cell of one state, else the tuple of its states, h first, each [L*D, B,
    H]; by keyword lengths, mask, resets, reset_state (as hx) and, of a cell of two states or more, return_cell_states,
    which are every second state, as for `LSTM`; and the cell's extras, each [L*D, T, B, H], also with batch_first.

    Outputs: output [T, B, D*H] of the last layer, in the input's form, and the final states, in the form of hx.

    Attributes:
        weight_ih_l[k] [G*H, I or D*H], weight_hh_l[k] [G*H, H], bias_ih_l[k], bias_hh_l[k] [G*H], and of each of the
            cell's parameters name_l[k] [H] (a norm's [G*H]); with heads weight_hh_l[k] is [n, G*H/n, H/n], as of
            `LSTM`. The second direction's names end in _reverse. All are drawn from U(-1/sqrt(H), 1/sqrt(H))
        function: the cell, as it was given
        last_path: as for `LSTM`; where `LSTM` takes torch's own kernels, a cell that torch has not is a loop over
            torch's operations, "stepwise"
    """

    def __init__(
        self,
        cell: Callable[..., Any] | str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        cell_dtype: torch.dtype | None = None,
        save: Save = "gates",
        save_budget: int | None = None,
        heads: int = 1,
        recipe: Recipe = PLAIN,
        proj_size: int | None = None,
    ) -> None:
        self.cell = _name_of(cell)
        self.function = cell  # by its name in its module, so that whoever unpickles a layer has its cell
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, True, heads,
            recipe,
        )  # fmt: skip
        self._build(input_size, hidden_size, self._unprojected(proj_size), options, device, dtype)

    def extra_repr(self) -> str:
        return f"{self.cell.partition(':')[0]}, {super().extra_repr()}"


def check_cell(
    cell: Callable[..., Any] | str,
    hidden_size: int = 1024,
    batch: int = 64,
    dtype: str = "bf16",
    device: str | None = None,
    arch: str | None = None,
) -> str:
    """What was derived of a cell, in words: its tiles, what is saved, the Triton source, and the plan for a size.

    Args:
        cell: a function decorated with `cell`, or the name of a built-in cell
        hidden_size, batch: H, B
        dtype: "bf16", "fp16", "tf32" or "fp32"
        device: a name that `persistrnn plan` knows; None: that of arch, else the GPU at hand, else an H200
        arch: "sm_80", "sm_90" or another that `persistrnn audit` knows: compile both kernels for it, which needs no GPU
            and takes seconds, and add the audit's rows; None: no audit

    Raises:
        TypeError, ValueError: another cell, dtype, device or arch
    """
    of, audited = derived(_name_of(cell)), ""
    if arch is not None and decide.without_kernels(of.cell) is None:
        audited, of_arch = decide.audited(of.cell.name, hidden_size, batch, dtype, arch)
        device = device or of_arch
    names, numbers = of.names, of.cell
    lines = [f"cell {numbers.name}"]
    for what in ("gates", "more_inputs", "states", "params", "extras"):
        if given := getattr(names, what):
            lines.append(f"{what}: {', '.join(given)}")
    if unread := _unread(numbers.name):
        lines.append(f"never read by the step: {', '.join(unread)}")
    if (reason := decide.without_kernels(numbers)) is not None:
        return "\n".join([*lines, reason])
    after = "".join(f", and {names.states[i]} after the step" for i in numbers.after)
    stored = numbers.inputs + numbers.more_gradients + numbers.gates * numbers.recurrent_gradient
    lines.append(f"tiles saved per unit and step: {numbers.saved}{after}; tiles of gates' gradients: {stored}")
    for way in ("forward", "backward"):
        lines.append(f"{way}: {_operations(of.source, way)} operations per unit and step beside the product")
    lines.append(decide.predict_stack(numbers.name, hidden_size, 1, batch, 1, 1024, dtype, device).text)
    return "\n".join([*lines, *([audited] if audited else []), "", of.source.rstrip()])


def _unread(cell: str) -> list[str]:
    """The tiles of its arguments that a step has no use for. (h is read by the product.)"""
    of = derived(cell)
    names, graph = of.names, of.traced.graph
    params = [] if names.wide else names.params
    groups = {"x": names.inputs, "r": names.gates_of_h, "state": names.states, "p": params, "e": names.extras}
    read = {"s0"} | {graph.name(i) for i in graph.needs([*of.traced.new, *of.traced.operands])}
    return [f"{g}.{name}" for g, tiles in groups.items() for i, name in enumerate(tiles) if f"{g[0]}{i}" not in read]


def _operations(source: str, way: str) -> int:
    """The lines of a function that compute something."""
    body = source.partition(f"_{way}(")[2].partition("\n\n\n")[0]
    return len({line.strip() for line in body.splitlines() if " = " in line})
