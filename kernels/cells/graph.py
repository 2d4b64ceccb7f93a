"""A cell's mathematics as a graph: each operation on the same arguments is one node, constants are folded.

A node is (operation, arguments), the arguments are numbers of earlier nodes. Leaves are ("in", (name,)), a tile that is
given, as x0, r3, s1, p0, e0 or d1, and ("const", (value,)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CellError(ValueError):
    """A function is no cell, and why."""


class Operation(NamedTuple):
    """Its text in Triton, and what it costs to do it again in the backward, where a tile saved and loaded is 1: of
    exp more than its work, as it makes more of the rounding of a saved tile. cycles: until its result is there, by the
    latencies that others measured on an A100 (arXiv 2208.11174, tables II and V: 4 of an addition, 18 of a power of 2,
    31 of a division); of the last ones by the number of instructions that Triton makes of them."""

    triton: str
    again: float
    cycles: int


# By the names of torch and torch.nn.functional, which ``evaluate`` calls.
OPERATIONS = {
    "add": Operation("{} + {}", 0.01, 4), "sub": Operation("{} - {}", 0.01, 4), "mul": Operation("{} * {}", 0.01, 4),
    "div": Operation("{} / {}", 0.08, 31), "neg": Operation("-{}", 0.01, 4), "abs": Operation("tl.abs({})", 0.01, 4),
    "maximum": Operation("tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)", 0.01, 4),
    "minimum": Operation("tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)", 0.01, 4),
    "relu": Operation("relu({})", 0.01, 8), "where": Operation("tl.where({}, {}, {})", 0.01, 4),
    "sqrt": Operation("tl.sqrt({})", 0.1, 31), "rsqrt": Operation("tl.rsqrt({})", 0.1, 31),
    "exp": Operation("tl.exp({})", 0.35, 22), "log": Operation("tl.log({})", 0.2, 60),
    "erf": Operation("tl.erf({})", 0.3, 90),
    "log1p": Operation("log1p({})", 0.3, 100), "expm1": Operation("expm1({})", 0.3, 120),
    "sin": Operation("tl.sin({})", 0.3, 90), "cos": Operation("tl.cos({})", 0.3, 90),
    "sigmoid": Operation("sigmoid({})", 0.3, 57), "tanh": Operation("tanh({})", 0.3, 77),
    "detach": Operation("{}", 0.0, 0), "logsigmoid": Operation("log_sigmoid({})", 0.6, 130),
}  # fmt: skip
COMPARISONS = {
    "eq": Operation("{} == {}", 0.01, 4), "ne": Operation("{} != {}", 0.01, 4), "lt": Operation("{} < {}", 0.01, 4),
    "le": Operation("{} <= {}", 0.01, 4), "gt": Operation("{} > {}", 0.01, 4), "ge": Operation("{} >= {}", 0.01, 4),
}  # fmt: skip
LOGIC = {
    "logical_and": Operation("{} & {}", 0.01, 4), "logical_or": Operation("{} | {}", 0.01, 4),
    "logical_not": Operation("~{}", 0.01, 4),
}  # fmt: skip
TRUTHS = COMPARISONS | LOGIC  # operations whose results are truth values
ALL = OPERATIONS | TRUTHS
MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
COMMUTE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"}


class Graph:
    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[Any, ...]]] = []
        self._number: dict[tuple[str, tuple[Any, ...]], int] = {}

    def _node(self, op: str, args: tuple[Any, ...]) -> int:
        # 0.0 and -0.0 are equal, and two constants.
        key = (op, tuple(map(repr, args))) if op == "const" else (op, args)
        if key not in self._number:
            self._number[key] = len(self.nodes)
            self.nodes.append((op, args))
        return self._number[key]

    def constant(self, value: float) -> int:
        return self._node("const", (float(value),))

    def input(self, name: str) -> int:
        return self._node("in", (name,))

    def value(self, i: int) -> float | None:
        """Of a constant."""
        op, args = self.nodes[i]
        return args[0] if op == "const" else None

    def name(self, i: int) -> str:
        """Of a given tile; empty for others."""
        op, args = self.nodes[i]
        return args[0] if op == "in" else ""

    def arguments(self, i: int) -> tuple[int, ...]:
        op, args = self.nodes[i]
        return () if op in ("in", "const") else args

    def is_truth(self, i: int) -> bool:
        return self.nodes[i][0] in TRUTHS

    def add(self, op: str, *args: int) -> int:
        """The node of an operation, in its simplest form."""
        if op not in TRUTHS and op != "where":  # a truth value in arithmetic
            args = tuple(self._number_of(a) for a in args)
        values = [self.value(a) for a in args]
        if op != "where" and None not in values:
            return self.constant(_fold(op, values))
        if op in COMMUTE and (args[0] > args[1] or (op in LOGIC and values[1] is not None)):
            args, values = args[::-1], values[::-1]
        if op in MIRRORED and args[0] > args[1]:
            op, args, values = MIRRORED[op], args[::-1], values[::-1]
        match op, values:
            case ("add", (0.0, _)) | ("mul", (1.0, _)):
                return args[1]
            case ("add" | "sub", (_, 0.0)) | ("mul" | "div", (_, 1.0)):
                return args[0]
            case ("mul", (0.0, _) | (_, 0.0)) | ("div", (0.0, _)):
                return self.constant(0.0)
            case ("sub", (0.0, _)):
                return self.add("neg", args[1])
            case ("where", (float(c), *_)):
                return args[1] if c else args[2]
            case ("where", _) if args[1] == args[2]:
                return args[1]
            case ("logical_and", (float(c), _)):
                return args[1] if c else args[0]
            case ("logical_or", (float(c), _)):
                return args[0] if c else args[1]
        inner = [self.nodes[a] for a in args]
        match op, inner:
            case "neg", [("neg", (a,))]:
                return a
            case "add", [_, ("neg", (b,))]:
                return self.add("sub", args[0], b)
            case "sub", [_, ("neg", (b,))]:
                return self.add("add", args[0], b)
            case "sub", [_, ("mul", (a, b))] if args[0] in (a, b):
                # a - a*b = a*(1 - b), in which 1 - b may be exact
                other = b if a == args[0] else a
                return self.add("mul", args[0], self.add("sub", self.constant(1.0), other))
        return self._node(op, args)

    def _number_of(self, i: int) -> int:
        return self._node("where", (i, self.constant(1.0), self.constant(0.0))) if self.is_truth(i) else i

    def needs(self, roots: Iterable[int], given: Iterable[int] = ()) -> list[int]:
        """All nodes that the roots are computed from, but for what is given and what that alone needs."""
        seen = set(given)
        stack = [r for r in roots if r not in seen]
        found = set()
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                found.add(i)
                stack.extend(self.arguments(i))
        return sorted(found)

    def only_added(self, roots: Iterable[int], first: str, second: str) -> bool:
        """Whether the roots need of two given groups of tiles, as x0, x1 and r0, r1, nothing but the sum of each two of
        a number."""

        def is_sum(i: int) -> bool:
            names = sorted(map(self.name, self.arguments(i)))
            return self.nodes[i][0] == "add" and any(names == sorted((first + n[1:], second + n[1:])) for n in names)

        sums = [i for i in range(len(self.nodes)) if is_sum(i)]
        return not any(self.name(i)[:1] in (first, second) for i in self.needs(roots, sums))

    def descendants(self, of: Callable[[int], bool]) -> set[int]:
        """Nodes that hold ``of``, and all that is computed from one."""
        found: set[int] = set()
        for i in range(len(self.nodes)):
            if of(i) or not found.isdisjoint(self.arguments(i)):
                found.add(i)
        return found

    def cycles(self, roots: Iterable[int], given: Iterable[int]) -> tuple[int, int]:
        """Of the longest chain of operations that ends in one of the roots, and of all operations together."""
        chain: dict[int, int] = {}
        total = 0
        for i in self.needs(roots, given):
            own = ALL[self.nodes[i][0]].cycles if self.arguments(i) else 0
            chain[i] = own + max((chain.get(a, 0) for a in self.arguments(i)), default=0)
            total += own
        return max((chain.get(r, 0) for r in roots), default=0), total

    def copied(self, roots: Iterable[int], to: Graph) -> list[int]:
        """The roots in another graph, whose given tiles have the same names."""
        made: dict[int, int] = {}
        for i in self.needs(roots):
            op, args = self.nodes[i]
            made[i] = to._node(op, args) if op in ("in", "const") else to.add(op, *(made[a] for a in args))
        return [made[r] for r in roots]

    def evaluate(self, roots: Sequence[int], given: dict[int, Tensor], like: Tensor) -> tuple[Tensor, ...]:
        """The roots in torch, differentiable, in the shape and dtype of ``like``.

        Raises:
            CellError: a root needs a tile that is not given.
        """
        found: dict[int, Any] = dict(given)
        for i in self.needs(roots, given):
            op, args = self.nodes[i]
            if op == "in":
                raise CellError(f"{args[0]} is not given")
            found[i] = like.new_full((), args[0]) if op == "const" else _function(op)(*(found[a] for a in args))
        return tuple(found[r].expand_as(like) for r in roots)


def _function(op: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch, op, None) or getattr(torch.nn.functional, op)
    return found


def _fold(op: str, values: Sequence[Any]) -> float:
    return float(_function(op)(*(torch.tensor(v, dtype=torch.float64) for v in values)))
