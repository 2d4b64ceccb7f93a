"""Everything that follows from a step: numbers, the Triton pair, its twins in torch, second derivatives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import Cell, stages
from .graph import CellError, Graph
from .saving import Saving, Traced, choose
from .stages import Answer
from .tracing import SHAPE, called, checked, trace
from .triton_source import HEADER, backward_text, forward_text, load, staged_backward_text, staged_forward_text

Tiles = Sequence[Tensor]


@dataclass(frozen=True)
class Names:
    """Of the tiles of a step's arguments."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    more_inputs: tuple[str, ...] = ()
    # As of ``Cell``.
    wide: tuple[str, ...] = ()
    products: int = 0
    means: int = 0
    normalised: bool = False

    @property
    def gates_of_h(self) -> tuple[str, ...]:
        """Whose recurrent half the step is given."""
        return self.gates[: len(self.gates) - self.products]

    @property
    def stages(self) -> int:
        """That follow the first."""
        return self.products + self.means

    @property
    def of_step(self) -> dict[str, int]:
        """The parameters that the step is given, and the tiles of each: if what is normalised is the product alone, it
        adds the bias itself."""
        found = {name: len(self.gates) if name in self.wide else 1 for name in self.params}
        return found | ({"bias_hh": len(self.gates)} if self.normalised else {})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Of the input half of the gates."""
        return self.gates + self.more_inputs


@dataclass(frozen=True, eq=False)
class Derived:
    """A cell and all that follows from its step.

    Attributes:
        cell: its numbers
        names: of its tiles
        step: ``step(x, r, state, p=(), e=()) -> new_state``, tuples of tensors, in torch; of several stages a
            generator (``stages``)
        source: the text of its Triton pair
    """

    cell: Cell
    names: Names
    step: Callable[..., Any]
    source: str
    traced: Traced
    saving: Saving

    @cached_property
    def _pair(self) -> tuple[Any, Any]:
        return load(self.cell.name.partition(":")[0], self.source)

    @property
    def forward(self) -> Any:
        """Jitted: ``(x_gates, r_gates, state, p, e) -> new_state, saved``; of several stages with the number of a part
        before, and the results of the stages behind (``triton_source``)."""
        return self._pair[0]

    @property
    def backward(self) -> Any:
        """Jitted: ``(d_state, saved + states after, previous_state, p, e) -> dx_gates + more, dr_gates,
        d_previous_state`` (elementwise part); of several stages with the number of a part before, and the gradients
        of the stages' operands behind."""
        return self._pair[1]

    def run_step(
        self, given: Sequence[Tiles], product: Callable[[Tensor], Tensor], mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """The new states, of x, r, state, p and e. product, mean: of its later stages, by their operands."""
        found: tuple[Tensor, ...] = stages.run(self.step, given, product, mean)
        return found

    def run_forward(
        self, x: Tiles, r: Tiles, state: Tiles, p: Tiles = (), e: Tiles = (), q: Tiles = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``forward`` in torch. q: what its later stages give."""
        graph = self.traced.graph
        given = given_tiles(graph, x=x, r=r, s=state, p=p, e=e, q=q)
        found = graph.evaluate(self.traced.new + self.saving.saved, given, x[0])
        return found[: self.cell.states], found[self.cell.states :]

    def run_backward(
        self, d_state: Tiles, saved: Tiles, after: Tiles, previous: Tiles, p: Tiles = (), e: Tiles = (),
        transposed: Answer | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """``backward`` in torch, of a step of several stages with those: means are over the last dimension. after: the
        states ``cell.after`` after the step. transposed: the later product by the transposed matrix; the gradients of
        its results are behind those of r."""
        graph, traced = self.traced.graph, self.traced
        parts = traced.dx + self.saving.more, self._dr(traced.dr, traced.dq), traced.ds
        given = given_tiles(graph, d=d_state) | self.at_hand(saved, after, previous, p, e)
        self._through_stages(graph, given, traced.dq, transposed)
        return split(graph.evaluate([*chain(*parts)], given, d_state[0]), parts)  # type: ignore[return-value]

    def at_hand(self, saved: Tiles, after: Tiles, previous: Tiles, p: Tiles = (), e: Tiles = ()) -> dict[int, Tensor]:
        """What the backward has beside gradients, by node."""
        return given_tiles(self.traced.graph, s=previous, p=p, e=e) | self._kept(saved, after)

    def param_gradients(
        self, dx: Tiles, dr: Tiles, saved: Tiles, after: Tiles, previous: Tiles, p: Tiles, e: Tiles = ()
    ) -> tuple[Tensor, ...]:
        """The parameters' gradients from what is in memory after the scan, tile by tile: to be summed over time and
        batch. dx: with the tiles of ``more_gradients`` behind it; p: broadcast against the others."""
        graph = self.traced.graph
        given = self.at_hand(saved, after, previous, p, e)
        of_r = self._dr(self.traced.dr, self.traced.dq)
        for nodes, tiles in ((self.traced.dx + self.saving.more, dx), (of_r, dr)):
            given |= {i: t for i, t in zip(nodes, tiles, strict=True) if graph.value(i) is None}
        return graph.evaluate(self.traced.dp, given, dr[0])

    def _dr(self, dr: Sequence[int], dq: Sequence[int]) -> list[int]:
        """Of all gates, those of later products too."""
        return [*dr, *dq[: self.cell.products]]

    def _through_stages(
        self, graph: Graph, given: dict[int, Tensor], dq: Sequence[int], transposed: Answer | None
    ) -> None:
        """Add to ``given`` the gradients of the stages' operands, which are the last results: each from that of what
        the stage gives, into which those of later stages go."""
        d = {int(graph.name(i)[1:]): t for i, t in given.items() if graph.name(i)[:1] == "d"}
        for k in reversed(range(len(dq))):
            (of_result,) = graph.evaluate([dq[k]], given, d[0])
            if k < self.cell.products:
                assert transposed is not None
                of_operand = transposed(of_result)
            else:
                of_operand = of_result.mean(-1, keepdim=True).expand_as(of_result)
            given[graph.input(f"d{len(d) + k}")] = of_operand

    def run_second(
        self, d_state: Tiles, saved: Tiles, d_saved: Tiles, after: Tiles, previous: Tiles, p: Tiles = (), e: Tiles = (),
        transposed: Answer | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """(dx, dr, d_previous, d_params) given gradients of the saved tiles as well, which only a second derivative
        has. Differentiable.

        Raises:
            CellError: they need a tile that the forward does not keep.
        """
        graph, nodes, bits, grads = self._second
        dq = grads[-1] if self.names.stages else []
        parts = grads[0], self._dr(grads[1], dq), *grads[2:4]
        given = given_tiles(graph, d=(*d_state, *d_saved), s=previous, p=p, e=e) | self._kept(saved, after, nodes, bits)
        self._through_stages(graph, given, dq, transposed)
        return split(graph.evaluate([*chain(*parts)], given, d_state[0]), parts)  # type: ignore[return-value]

    @property
    def differentiates_twice(self) -> bool:
        """Whether ``run_second`` has all that it needs."""
        graph, nodes, bits, grads = self._second
        states = self.cell.states
        given = {*nodes[states:], *bits, *(nodes[i] for i in self.cell.after)}
        missing = (graph.name(i) for i in graph.needs(chain(*grads), given))
        return not any(name[:1] in ("x", "r", "q") for name in missing)

    @cached_property
    def _second(self) -> tuple[Graph, list[int], list[int], list[list[int]]]:
        """Traced from the step once more, the saved tiles among its results: a graph, in which are those results, the
        bits and the gradients."""
        graph, results = Graph(), [*self.traced.new, *self.saving.saved, *self.traced.operands]

        def step(*arguments: Tiles) -> tuple[Tensor, ...]:
            given = given_tiles(self.traced.graph, **dict(zip("xrspeq", arguments, strict=False)))
            return self.traced.graph.evaluate(results, given, arguments[0][0])

        nodes, grads = in_a_thread(lambda: trace(graph, step, self.cell.name, _groups(self.names), len(results)))
        nodes = nodes[: self.cell.states + self.cell.saved]
        return graph, nodes, self.traced.graph.copied(self.saving.bits, graph), grads

    def _kept(
        self, saved: Tiles, after: Tiles, nodes: Sequence[int] = (), bits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """What the backward reads of the forward, by node of the graph that ``nodes`` (new states and saved tiles) and
        ``bits`` are of; empty: of ``traced``'s."""
        nodes = nodes or self.traced.new + self.saving.saved
        given = dict(zip([nodes[i] for i in self.cell.after], after, strict=True))
        given |= zip(nodes[self.cell.states :], saved, strict=True)
        if self.saving.bits:
            code = saved[-1].detach().to(torch.int32)
            given |= {i: (code & 1 << k) != 0 for k, i in enumerate(bits or self.saving.bits)}
        return given


def split(tiles: Sequence[Tensor], parts: Sequence[Sequence[Any]]) -> tuple[tuple[Tensor, ...], ...]:
    """As many in each part as ``parts`` have."""
    left = iter(tiles)
    return tuple(tuple(next(left) for _ in part) for part in parts)


def given_tiles(graph: Graph, **tiles: Tiles) -> dict[int, Tensor]:
    return {graph.input(f"{letter}{i}"): t for letter, some in tiles.items() for i, t in enumerate(some)}


def _groups(names: Names) -> list[tuple[str, int]]:
    """The letter of each argument of the step and its tiles; of several stages q too, the results of later ones."""
    of_step = sum(names.of_step.values())
    counts = len(names.inputs), len(names.gates_of_h), len(names.states), of_step, len(names.extras)
    return [*zip("xrspe", counts, strict=True), *([("q", names.stages)] if names.stages else [])]


def in_a_thread(function: Callable[[], Any]) -> Any:
    """In a thread of its own: modes, transforms, autocast and grad mode of the caller are those of its thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def counted(step: Callable[..., Any], name: str, names: Names) -> tuple[int, int]:
    """The products and the means of a step.

    Raises:
        CellError: the step fails, yields something else, or gives no states then; says where.
    """

    def run() -> Any:
        given = [[torch.full(SHAPE, 0.5) for _ in range(n)] for _, n in _groups(names)]
        return called(lambda *tiles: stages.counted(step, tiles), given, name)

    new, products, means = in_a_thread(run)
    if products + means:
        checked(new, len(names.states), name)
    return products, means


def derive(step: Callable[..., Any], name: str, names: Names, built_in: bool = False) -> Derived:
    """The cell of ``step(x, r, state, p, e)``.

    Raises:
        CellError: it is not pointwise, or its backward needs the outcomes of more than 8 comparisons.
    """
    graph, states, several = Graph(), len(names.states), names.stages > 0
    whole, results = stages.as_one(step) if several else step, states + names.stages
    nodes, (dx, dr, ds, dp, _, *dq) = in_a_thread(lambda: trace(graph, whole, name, _groups(names), results))
    traced = Traced(graph, nodes[:states], dx, dr, ds, dp, dq[0] if dq else (), nodes[states:])
    if several:
        return _derived(step, name, names, built_in, traced, _with_operands(names, traced))
    try:
        found = _derived(step, name, names, built_in, traced, choose(traced, forward_only=False))
        if not found.differentiates_twice:
            found = _derived(step, name, names, built_in, traced, choose(traced, forward_only=True))
    except CellError as error:
        raise CellError(f"{name}: {error}") from None
    return replace(found, cell=replace(found.cell, finite_at_zero=in_a_thread(lambda: _finite_at_zero(found))))


def _with_operands(names: Names, traced: Traced) -> Saving:
    """What is saved, first the operands of products: through there they come to the other slices, and from there the
    weights' gradients."""
    found = choose(traced, forward_only=True)
    operands = list(traced.operands[: names.products])
    return replace(found, saved=[*operands, *(i for i in found.saved if i not in operands)])


def _derived(
    step: Callable[..., Any], name: str, names: Names, built_in: bool, traced: Traced, saving: Saving
) -> Derived:
    graph, new = traced.graph, traced.new
    after = [new[i] for i in saving.after]
    kept = saving.saved, after, saving.bits, [*traced.dx, *saving.more], traced.dr, traced.ds
    if names.stages:
        texts = (
            staged_forward_text(graph, name, traced.operands, new, saving.saved),
            staged_backward_text(graph, name, *kept, traced.dq),
        )
    else:
        texts = forward_text(graph, name, new, saving.saved), backward_text(graph, name, *kept)
    # Two halves of equal gradients may still be told apart: by a comparison, or what is detached.
    apart = not names.stages and not graph.only_added([*new, *saving.saved], "x", "r")
    of_r, kept_nodes = [*traced.dr, *traced.dq[: names.products]], [*saving.saved, *after, *saving.bits]
    source = HEADER.format(name=name) + "\n\n\n".join(texts) + "\n"
    # Two steps of one text may differ in the parameters' gradients, and in what their tiles are called.
    rest = f"{names} {traced.dp} {[graph.nodes[i] for i in graph.needs(traced.dp)]}"
    digest = hashlib.sha256((source + rest).encode()).hexdigest()
    cell = Cell(
        name if built_in else f"{name}:{digest[:12]}",
        gates=len(names.gates),
        states=len(names.states),
        saved=len(saving.saved),
        recurrent_gradient=traced.dx != of_r or bool(saving.more) or apart,
        after=saving.after,
        params=names.params,
        extras=names.extras,
        more_inputs=len(names.more_inputs),
        more_gradients=len(saving.more),
        products=names.products,
        means=names.means,
        wide=names.wide,
        normalised=names.normalised,
        chain=(graph.cycles(new[:1], ())[0], graph.cycles(of_r, kept_nodes)[0]),
        work=(graph.cycles([*new, *saving.saved], ())[1], graph.cycles([*kept[3], *of_r, *traced.ds], kept_nodes)[1]),
    )
    return Derived(cell, names, step, source, traced, saving)


def _finite_at_zero(cell: Derived) -> bool:
    """Each pass goes on from its own results; all else that it reads is 0."""
    x, r, state, p, e = ([torch.zeros(1)] * n for _, n in _groups(cell.names))
    saved, after = [torch.zeros(1)] * cell.cell.saved, [torch.zeros(1)] * len(cell.cell.after)
    forward, backward, every = tuple(state), tuple(state), []
    with torch.no_grad():
        for _ in range(8):
            forward, kept = cell.run_forward(x, r, forward, p, e)
            dx, dr, backward = cell.run_backward(backward, saved, after, state, p, e)
            every += [*forward, *kept, *dx, *dr, *backward]
    return bool(torch.cat(every).isfinite().all())
