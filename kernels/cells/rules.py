"""Torch's operations in those of the graph: what a step may call, and what autograd calls for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .graph import ALL, CellError, Graph


@dataclass(frozen=True)
class Tile:
    """A node of a graph, with arithmetic."""

    graph: Graph
    node: int

    def do(self, op: str, *others: Any) -> Tile:
        return Tile(self.graph, self.graph.add(op, self.node, *(self.of(o).node for o in others)))

    def of(self, value: Any) -> Tile:
        return value if isinstance(value, Tile) else Tile(self.graph, self.graph.constant(value))

    def __add__(self, o: Any) -> Tile:
        return self.do("add", o)

    def __sub__(self, o: Any) -> Tile:
        return self.do("sub", o)

    def __mul__(self, o: Any) -> Tile:
        return self.do("mul", o)

    def __truediv__(self, o: Any) -> Tile:
        return self.do("div", o)

    def __rsub__(self, o: Any) -> Tile:
        return self.of(o).do("sub", self)

    def __rtruediv__(self, o: Any) -> Tile:
        return self.of(o).do("div", self)

    def __neg__(self) -> Tile:
        return self.do("neg")

    def where(self, a: Any, b: Any) -> Tile:
        if all(isinstance(t, Tile) and self.graph.is_truth(t.node) for t in (a, b)):
            return self.do("logical_and", a).do("logical_or", self.do("logical_not").do("logical_and", b))
        return self.do("where", a, b)

    def truth(self) -> Tile:
        return self if self.graph.is_truth(self.node) else self.do("ne", 0.0)

    __radd__, __rmul__ = __add__, __mul__


def _logical(op: str) -> Callable[..., Tile]:
    return lambda a, *b: a.truth().do(op, *(t.truth() for t in b))


def _clamp(x: Tile, min: Any = None, max: Any = None) -> Tile:
    x = x if min is None else x.do("maximum", min)
    return x if max is None else x.do("minimum", max)


def _power(x: Any, n: Any) -> Tile:
    if n in (0.5, -0.5):
        return x.do("sqrt" if n > 0 else "rsqrt")
    if isinstance(x, Tile) and not isinstance(n, Tile) and n == int(n) and 0 < abs(n) <= 8:
        result = math.prod([x] * (abs(int(n)) - 1), start=x)
        return result if n > 0 else 1 / result
    raise CellError("a power other than by a number among 0.5, -0.5 and the whole ones from -8 to 8; use torch.exp")


def _sign(x: Tile) -> Tile:
    """By comparisons, whose outcomes are stored: the sign of a rounded difference may be another."""
    return x.do("gt", 0.0).where(1.0, x.do("lt", 0.0).where(-1.0, 0.0))


def _log_sigmoid(x: Tile) -> tuple[Tile, Tile]:
    return x.do("logsigmoid"), x  # the second is a buffer of torch's


def _softplus(x: Tile, beta: float = 1, threshold: float = 20) -> Tile:
    return -(x * -beta).do("logsigmoid") / beta


def _elu(x: Tile, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tile:
    return x.do("gt", 0.0).where(x * scale, (x * input_scale).do("expm1") * (alpha * scale))


def _elu_backward(g: Tile, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tile) -> Tile:
    slope = x + alpha * scale if is_result else (x * input_scale).do("exp") * (alpha * scale)
    return x.do("gt", 0.0).where(g * scale, g * input_scale * slope)


def _silu_backward(g: Tile, x: Tile) -> Tile:
    y = x.do("sigmoid")
    return g * (y * (1 + x * (1 - y)))


def _inside(x: Tile, low: Any, high: Any) -> Tile:
    return x.do("gt", low).do("logical_and", x.do("lt", high))


# By torch's names; the arguments are torch's, keywords those of KEYWORDS.
RULES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha=1: a + b * alpha if alpha != 1 else a + b,
    "sub": lambda a, b, alpha=1: a - b * alpha if alpha != 1 else a - b,
    "rsub": lambda a, b, alpha=1: b - a * alpha, "reciprocal": lambda x: 1 / x,
    "addcmul": lambda a, b, c, value=1: a + b * c * value, "addcdiv": lambda a, b, c, value=1: a + b * value / c,
    "lerp": lambda a, b, w: a + w * (b - a), "pow": _power, "sign": _sign, "sgn": _sign,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": lambda x, high: _clamp(x, None, high),
    "where": lambda c, a, b: c.where(a, b), "masked_fill": lambda x, mask, value: mask.where(value, x),
    "bitwise_and": _logical("logical_and"), "bitwise_or": _logical("logical_or"),
    "bitwise_not": _logical("logical_not"), "logical_and": _logical("logical_and"),
    "logical_or": _logical("logical_or"), "logical_not": _logical("logical_not"),
    "sigmoid_backward": lambda g, y: g * (y * (1 - y)), "tanh_backward": lambda g, y: g * (1 - y * y),
    "threshold_backward": lambda g, x, t: x.do("le", t).where(0.0, g),
    "log_sigmoid_forward": _log_sigmoid, "log_sigmoid_backward": lambda g, x, z: g * (-x).do("sigmoid"),
    "softplus": _softplus, "softplus_backward": lambda g, x, beta, t: g * (-(x * -beta)).do("sigmoid"),
    "silu": lambda x: x * x.do("sigmoid"), "silu_backward": _silu_backward,
    "leaky_relu": lambda x, k=0.01: x.do("gt", 0.0).where(x, x * k),
    "leaky_relu_backward": lambda g, x, k, is_result: x.do("gt", 0.0).where(g, g * k),
    "hardtanh": lambda x, low=-1, high=1: _clamp(x, low, high),
    "hardtanh_backward": lambda g, x, low, high: _inside(x, low, high).where(g, 0.0),
    "hardsigmoid": lambda x: _clamp(x + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid_backward": lambda g, x: _inside(x, -3.0, 3.0).where(g / 6.0, 0.0),
    "elu": _elu, "elu_backward": _elu_backward,
}  # fmt: skip
KEYWORDS = {"alpha", "value", "min", "max", "beta", "threshold"}
# That give what they are given: aliases, and views of the same shape.
SAME = {"alias", "detach", "clone", "_to_copy", "expand", "lift_fresh", "view", "_unsafe_view", "contiguous"}
# Whose results have other shapes, which is refused where they are used, or at once.
TURNED, PARTS = {"t", "permute", "transpose"}, {"select", "slice", "unsqueeze", "squeeze"}
# That give one number everywhere: the number, or which argument it is.
FILLED: dict[str, float | tuple[int]] = {
    "zeros_like": 0.0, "ones_like": 1.0, "zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0, "full": (1,),
    "full_like": (1,), "new_full": (2,), "scalar_tensor": (0,), "fill": (1,), "zero": 0.0,
}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "addmm", "mv", "dot", "baddbmm", "addmv"}
_REDUCTIONS = {
    "sum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "cumsum", "argmax",
    "softmax", "_softmax", "_log_softmax", "logsumexp", "native_layer_norm", "native_group_norm", "any", "all",
    "var_mean",
}  # fmt: skip
_RESHAPED = {"split", "split_with_sizes", "unbind", "cat", "stack", "roll", "flip", "gather", "repeat", "index_select"}
_CHOSEN = {"index", "index_put", "masked_scatter", "masked_select", "nonzero"}


def rule_of(op: str) -> Callable[..., Any] | None:
    """How torch's operation becomes nodes; None if it may not be in a step."""
    if op in RULES or op not in ALL:
        return RULES.get(op)
    return lambda a, *others: (a if isinstance(a, Tile) else others[0].of(a)).do(op, *others)


def refusal(op: str) -> str:
    """Why an operation is not allowed, and what to do."""
    if op in _PRODUCTS:
        return f"{op} is a matrix product; W_ih x and W_hh h are already in the step's first two arguments"
    if op in _REDUCTIONS:
        return f"{op} reduces over units or rows; a step is pointwise, each unit and row by itself"
    if op in _RESHAPED:
        return f"{op} moves units or rows; a step is pointwise, each unit and row by itself"
    if op in _CHOSEN:
        return f"{op} chooses elements; use torch.where, which has a value for each of them"
    allowed = sorted(name for name in {*ALL, *RULES} if "backward" not in name and not name.startswith("_"))
    return f"{op} is not one of the pointwise operations that a step may have: {', '.join(allowed)}"
