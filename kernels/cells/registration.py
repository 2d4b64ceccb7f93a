"""A cell of one's own: from a step to the table of cells, checked."""

from __future__ import annotations

import keyword
from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from . import add
from .derive import Derived, Names, derive, in_a_thread
from .graph import CellError
from .verify import verify


def register(
    step: Callable[..., Any],
    *,
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    params: Sequence[str] = (),
    extras: Sequence[str] = (),
    more_inputs: Sequence[str] = (),
    name: str | None = None,
) -> Derived:
    """Derive a cell from one time step, check it and put it into the table.

    Args:
        step: ``step(x, r, state[, p][, e]) -> new_state``, with p if there are params and e if there are extras; each a
            named tuple of float tensors of one shape, the result a tuple of the new states (or, of one, the tensor).
        gates: names of the tiles of ``r`` and of ``x``, in the order of the rows of W_hh and W_ih
        states: names of the states, h first; that alone is multiplied by W_hh and is the layer's output
        params: names of the parameters per unit, which are learned
        extras: names of what each step takes beside the gates, without gradient: masks
        more_inputs: names of tiles of ``x`` beyond the gates
        name: of the cell, for messages and kernels; default: that of the function

    Returns:
        The cell; ``cell.name`` is its key in ``cells.CELLS``, in which a hash stands for what was derived.

    Raises:
        CellError: the step is not pointwise, a name is none, or what was derived differs from autograd of the step.
    """
    name = step.__name__ if name is None else name
    parts = {"gates": gates, "states": states, "params": params, "extras": extras, "more_inputs": more_inputs}
    for what, given in {"name": (name,), **parts, "gates and more_inputs": (*gates, *more_inputs)}.items():
        _check(name, what, given)
    found = of_step(step, name, Names(tuple(gates), tuple(states), tuple(params), tuple(extras), tuple(more_inputs)))
    in_a_thread(lambda: verify(found))
    add(found)
    return found


def _check(name: str, what: str, given: Sequence[str]) -> None:
    wrong = [n for n in given if not isinstance(n, str) or not n.isidentifier() or keyword.iskeyword(n) or n[0] == "_"]
    if isinstance(given, str) or wrong or len(set(given)) < len(given):
        raise CellError(
            f"{name}: {what}={given!r}; allowed: a sequence of different names, as ('f', 'g'), each a Python "
            "identifier that does not begin with '_'"
        )
    if what in ("gates", "states") and not given:
        raise CellError(f"{name}: no {what}; a cell has at least one of them")


def of_step(step: Callable[..., Any], name: str, names: Names, built_in: bool = False) -> Derived:
    """Derived, unchecked and in no table."""
    kinds = [
        namedtuple(kind, fields)
        for kind, fields in (("X", names.inputs), ("R", names.gates_of_h), ("State", names.states))
    ]
    P, E = (namedtuple(kind, fields) for kind, fields in (("P", names.of_step), ("E", names.extras)))

    def wide(
        x: Sequence[Tensor], r: Sequence[Tensor], state: Sequence[Tensor], p: Sequence[Tensor] = (),
        e: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_p = iter(p)
        own = [next(of_p) if n == 1 else tuple(islice(of_p, n)) for n in names.of_step.values()]
        more = ((P(*own),) if own else ()) + ((E(*e),) if names.extras else ())
        found = step(*(kind(*tiles) for kind, tiles in zip(kinds, (x, r, state), strict=True)), *more)
        if isinstance(found, Tensor) and len(names.states) == 1:
            return (found,)
        return tuple(found) if isinstance(found, tuple) else found

    return derive(wide, name, names, built_in)
