"""What the forward of a cell saves, and what its backward stores for the parameters' gradients.

The backward needs some nodes of the forward's graph: those on the border between what depends on gradients and what
does not. The cut (``cut``) says which tiles are saved so that the border can be had: states before and after the step
stand in memory in any case, and others are computed again where that is cheaper than a store and a load.

The outcome of a comparison is never computed again from tiles that were rounded when they were saved, where a maximum
may fall to the other side: up to 8 outcomes are stored as the bits of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .cut import cut
from .graph import ALL, COMPARISONS, CellError, Graph

MOST_BITS = 8  # every dtype holds the whole numbers up to 256
# In tiles saved: a state after the step is read and not written; a tile within [-1, 1] is rounded to least harm.
STATE_AFTER, BOUNDED, UNBOUNDED, EXTRA, BIT = 0.45, 1.0, 1.05, 0.4, 0.9
BOUNDED_BY = {"sigmoid", "tanh", "erf", "sin", "cos"}
KEEP_BOUNDS = {"detach", "mul", "neg", "sub", "maximum", "minimum"}


@dataclass(frozen=True, eq=False)
class Traced:
    """Nodes: the new states, and the gradients of the step's arguments; of a step of several stages those of what the
    later ones give, and their operands."""

    graph: Graph
    new: list[int]
    dx: list[int]
    dr: list[int]
    ds: list[int]
    dp: list[int]
    dq: Sequence[int] = ()
    operands: Sequence[int] = ()

    @cached_property
    def late(self) -> set[int]:
        """What depends on the gradients that are given."""
        return self.graph.descendants(lambda i: self.graph.name(i).startswith("d"))

    @cached_property
    def border(self) -> set[int]:
        """All that the gradients are formed of but what depends on gradients itself."""
        gradients = [*self.dx, *self.dr, *self.ds, *self.dp, *self.dq]
        taken = {a for i in self.graph.needs(gradients) if i in self.late for a in self.graph.arguments(i)}
        return taken.union(gradients) - self.late


@dataclass(frozen=True, eq=False)
class Saving:
    """Nodes: saved tiles, of which the last holds ``bits``, truth values, if there are any; and what the backward
    stores behind dx. after: numbers of states."""

    saved: list[int]
    bits: list[int]
    after: tuple[int, ...]
    more: list[int]


def choose(traced: Traced, forward_only: bool) -> Saving:
    """The cheapest way. forward_only: no tile that the forward has no use for.

    Raises:
        CellError: the backward needs the outcomes of more than 8 comparisons.
    """
    prices = _Prices(traced, forward_only)
    graph = traced.graph
    kept = [i for i in cut(graph, sorted(prices.border), prices.keep, prices.again) if not prices.is_at_hand(i)]
    bits = [i for i in kept if graph.is_truth(i)]
    if len(bits) > MOST_BITS:
        raise CellError(
            f"its backward needs the outcomes of {len(bits)} comparisons; allowed: {MOST_BITS}. Each of maximum, "
            "minimum, clamp, abs and where has one to three"
        )
    saved = [i for i in kept if i not in prices.of_state and i not in bits]
    if bits:
        code = zero = graph.constant(0.0)
        for k, i in enumerate(bits):
            code = graph.add("add", code, graph.add("where", i, graph.constant(2.0**k), zero))
        saved.append(code)
    after = tuple(sorted(prices.of_state[i] for i in kept if i in prices.of_state))

    # The parameters' gradients are formed after the scan, from what is in memory then.
    stored = {*traced.dx, *traced.dr, *saved, *bits, *(traced.new[i] for i in after)}

    def store(i: int) -> float:
        return 0.0 if i in stored or prices.is_at_hand(i) else 1.0 if i in prices.late else math.inf

    more = [i for i in cut(graph, traced.dp, store, lambda i: prices.again(i) / 4) if store(i) > 0]
    return Saving(saved, bits, after, more)


class _Prices:
    """Of keeping a node from the forward for the backward, and of computing it again."""

    def __init__(self, traced: Traced, forward_only: bool) -> None:
        self._graph = graph = traced.graph
        self.of_state: dict[int, int] = {}
        for number, i in enumerate(traced.new):
            self.of_state.setdefault(i, number)
        self.late, self.border = traced.late, traced.border
        # The sign is that of the state in memory, and no longer that of rounded tiles it would be formed of again.
        compared = (graph.arguments(i) for i in graph.needs(self.border) if self._is_of_signs(i))
        self._signs = self.of_state.keys() & {a for arguments in compared for a in arguments}
        self._bounded: set[int] = set()
        for i, (op, args) in enumerate(graph.nodes):
            if op in BOUNDED_BY or op == "const" or (op in KEEP_BOUNDS and self._bounded.issuperset(args)):
                self._bounded.add(i)
        used = graph.needs([*traced.new, *traced.operands])
        self._forbidden = set(range(len(graph.nodes))).difference(used) if forward_only else set()

    def is_at_hand(self, i: int) -> bool:
        """Constants, states before the step, parameters and extras are in memory in any case."""
        return self._graph.value(i) is not None or self._graph.name(i)[:1] in ("s", "p", "e")

    def keep(self, i: int) -> float:
        if self.is_at_hand(i):
            return EXTRA if self._graph.name(i).startswith("e") else 0.0
        if self._graph.is_truth(i):
            return BIT
        if i in self._forbidden:
            return math.inf
        if i in self.of_state:
            return STATE_AFTER
        return BOUNDED if i in self._bounded else UNBOUNDED

    def again(self, i: int) -> float:
        if i in self._signs or (self._graph.is_truth(i) and not self._comes_out(i)):
            return math.inf
        return ALL[self._graph.nodes[i][0]].again if self._graph.arguments(i) else 0.0

    def _comes_out(self, i: int) -> bool:
        """Whether a truth value, computed again from what is kept, is that of the forward: rounding keeps signs."""
        others = [a for a in self._graph.arguments(i) if not self._exact(a)]
        return not others or (self._is_of_signs(i) and all(a in self.of_state for a in others))

    def _is_of_signs(self, i: int) -> bool:
        op, args = self._graph.nodes[i]
        return op in COMPARISONS and any(self._graph.value(a) == 0 for a in args)

    def _exact(self, i: int) -> bool:
        """Whether the backward has just what the forward had."""
        if self._graph.is_truth(i):
            return self._comes_out(i)
        if self._graph.nodes[i][0] == "detach":
            return self._exact(*self._graph.arguments(i))
        return self._graph.value(i) is not None or self._graph.name(i)[:1] in ("p", "e")
