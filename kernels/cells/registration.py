"""A cell of one's own: from a step to the table of cells, checked."""

from __future__ import annotations

import inspect
import keyword
from collections import namedtuple
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor

from . import add
from .derive import Derived, Names, counted, derive, in_a_thread
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
        step: as of ``library``, of which one new state may come as the tensor
        gates, states, params, extras, more_inputs: as of `persistrnn.cell`
        name: of the cell, for messages and kernels; default: that of the function, or "cell" of what has none

    Returns:
        The cell; ``cell.name`` is its key in ``cells.CELLS``, in which a hash stands for what was derived.

    Raises:
        CellError: the step is not pointwise, a name is none, or what was derived differs from autograd of the step.
    """
    if name is None:
        name = getattr(step, "__name__", "cell")
        name = "cell" if name == "<lambda>" else name
    parts = {"gates": gates, "states": states, "params": params, "extras": extras, "more_inputs": more_inputs}
    for what, given in {"name": (name,), **parts, "gates and more_inputs": (*gates, *more_inputs)}.items():
        _check(name, what, given)
    _check_arguments(step, name, ["x", "r", "state", *["p"] * bool(params), *["e"] * bool(extras)])
    names = Names(tuple(gates), tuple(states), tuple(params), tuple(extras), tuple(more_inputs))
    products, means = counted(_wide(step, names), name, names)
    if products >= len(names.gates):
        raise CellError(
            f"{name}: {products} products beside that with h, and {len(names.gates)} gates; allowed: one for each gate "
            "but the first, whose product is with h"
        )
    found = of_step(step, name, replace(names, products=products, means=means))
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


def _check_arguments(step: Callable[..., Any], name: str, expected: Sequence[str]) -> None:
    try:
        inspect.signature(step).bind(*expected)
    except TypeError as error:
        raise CellError(f"{name}: is called as step({', '.join(expected)}), got {error}") from None


def of_step(step: Callable[..., Any], name: str, names: Names, built_in: bool = False) -> Derived:
    """Derived, unchecked and in no table."""
    return derive(_wide(step, names), name, names, built_in)


def _wide(step: Callable[..., Any], names: Names) -> Callable[..., Any]:
    """The step of tuples instead of named ones, which gives a tuple."""
    kinds = [
        namedtuple(kind, fields)
        for kind, fields in (("X", names.inputs), ("R", names.gates_of_h), ("State", names.states))
    ]
    P, E = (namedtuple(kind, fields) for kind, fields in (("P", names.of_step), ("E", names.extras)))

    def tupled(found: Any) -> Any:
        if isinstance(found, Tensor) and len(names.states) == 1:
            return (found,)
        return tuple(found) if isinstance(found, tuple) else found

    def to_the_end(found: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        return tupled((yield from found))

    def wide(
        x: Sequence[Tensor], r: Sequence[Tensor], state: Sequence[Tensor], p: Sequence[Tensor] = (),
        e: Sequence[Tensor] = (),
    ) -> Any:  # fmt: skip
        of_p = iter(p)
        own = [next(of_p) if n == 1 else tuple(islice(of_p, n)) for n in names.of_step.values()]
        more = ((P(*own),) if own else ()) + ((E(*e),) if names.extras else ())
        found = step(*(kind(*tiles) for kind, tiles in zip(kinds, (x, r, state), strict=True)), *more)
        return to_the_end(found) if isinstance(found, Generator) else tupled(found)

    return wide
