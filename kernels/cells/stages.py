"""Steps of several stages: between their pointwise parts stands what needs all units, a product or a mean.

Such a step is a generator. What it yields it gets back, for its own unit and row::

    r_n = yield Product(reset * state.h)  # W_hn (reset * h) + b_hn
    mean = yield Mean(c)  # of c over all units of its row

With each result as one more given tile, and each operand as one more result, the step is pointwise, and is traced as
one graph. Both kinds of stages are linear: the gradient of an operand is the product with the transposed matrix, or the
same mean, of the gradient of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """The recurrent half of the next gate, of those whose product is not with h."""

    operand: Tensor


class Mean(NamedTuple):
    """Over all units."""

    tile: Tensor


Answer = Callable[[Tensor], Tensor]
MOST = 64  # products and means of a step


def run(step: Callable[..., Any], given: Sequence[Any], product: Answer, mean: Answer) -> Any:
    """What a step returns, of one stage or of several, with both kinds of stages answered."""
    found = step(*given)
    if not isinstance(found, Generator):
        return found
    answer = None
    while True:
        try:
            asked = found.send(answer)
        except StopIteration as end:
            return end.value
        answer = product(asked.operand) if isinstance(asked, Product) else mean(asked.tile)


def counted(step: Callable[..., Any], given: Sequence[Any]) -> tuple[Any, int, int]:
    """What a step returns, its products and its means; of one that is no generator none.

    Raises:
        TypeError: at the line that yields something else.
    """
    found, kinds, answer = step(*given), [], None
    while isinstance(found, Generator):
        try:
            asked = found.send(answer)
        except StopIteration as end:
            found = end.value
            break
        answer = asked[0] if isinstance(asked, (Product, Mean)) else asked
        kinds.append(type(asked))
        if answer is asked or not isinstance(answer, Tensor) or answer.shape != given[0][0].shape:
            got = f"a tensor {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            found.throw(TypeError(f"a step yields a Product or a Mean of a tensor as its arguments, got {got}"))
        if len(kinds) > MOST:
            found.throw(TypeError(f"a step has at most {MOST} products and means, got more"))
    return found, kinds.count(Product), kinds.count(Mean)


def as_one(step: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The step as a pointwise function ``(x, r, state, p, e, q)`` of the stages' results q, too, which returns the
    stages' operands behind the new states."""

    def pointwise(*given: Any) -> tuple[Tensor, ...]:
        *arguments, results = given
        left, operands = iter(results), []

        def answer(operand: Tensor) -> Tensor:
            operands.append(operand)
            found: Tensor = next(left)
            return found

        return (*run(step, arguments, answer, answer), *operands)

    return pointwise
