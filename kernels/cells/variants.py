"""Cells that follow from another cell's step: with zoneout, and with dropout of what the product reads of h."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from . import add, derived
from .derive import Derived, Names, Tiles, derive
from .graph import CellError

HALF = 0.5  # of a mask, which is 0 or 1


def variant(name: str, zoneout: tuple[float, ...], masks: bool, drops: bool) -> str:
    """The name in ``CELLS`` of a cell that differs from ``name``'s in these.

    Args:
        zoneout: of each state, whether and how much of it stays as it is: with ``masks`` where an extra, of those that
            are not 0, is 1; else everywhere this part of it, its expectation
        drops: whether the other units see h without those units where an extra is 1. A state, the first, is that part
            of h; h itself is the second, and the extra the first of the new ones

    Masks are extras behind the cell's own.
    """
    return add(_derived(name, zoneout, masks, drops))


# For torch.compile: called while it traces, the result is a constant.
variant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _derived(name: str, zoneout: tuple[float, ...], masks: bool, drops: bool) -> Derived:
    of = derived(name)
    if of.cell.products or of.cell.means:
        raise CellError(
            f"zoneout and recurrent_dropout are for cells of one stage, and {name}'s step has products or means between"
            " its parts; give the layer a recipe without them"
        )
    states, own = of.names.states, len(of.names.extras)

    def step(x: Tiles, r: Tiles, state: Tiles, p: Tiles = (), e: Tiles = ()) -> tuple[torch.Tensor, ...]:
        beside = iter(e[own:])
        dropped = next(beside) > HALF if drops else None
        before = state[1:] if drops else state
        new = []
        for part, s, n in zip(zoneout, before, of.step(x, r, before, p, e[:own]), strict=True):
            if part == 0:
                new.append(n)
            else:
                new.append(torch.where(next(beside) > HALF, s, n) if masks else n + part * (s - n))
        return tuple(new) if dropped is None else (new[0].masked_fill(dropped, 0.0), *new)

    extras = [
        *(["dropped"] if drops else []),
        *(f"kept_{s}" for s, p in zip(states, zoneout, strict=True) if p and masks),
    ]
    names = Names(
        of.names.gates,
        (*(["seen"] if drops else []), *states),
        of.names.params,
        (*of.names.extras, *extras),
        of.names.more_inputs,
    )
    kind = "_".join([name.partition(":")[0], *(["zoneout"] if any(zoneout) else []), *(["dropout"] if drops else [])])
    found = derive(step, kind, names)
    return replace(found, cell=replace(found.cell, masks=len(extras)))
