"""A step and its derivative become a graph: every operation that torch runs below autograd is recorded."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import CellError, Graph
from .rules import FILLED, KEYWORDS, PARTS, SAME, TURNED, Tile, refusal, rule_of

SHAPE = (3, 5)  # of tiles while tracing: no two dimensions alike, neither 1
_NOT_THE_USER_S = tuple(
    os.path.dirname(os.path.abspath(str(m.__file__))) + os.sep for m in (torch, sys.modules[__name__])
)


class Recorder(TorchDispatchMode):
    """Inside, each result becomes a node. A tensor is known by its storage: all have one shape, so that an alias is the
    whole of it, and an operation in place gives its storage another node."""

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__()
        self.graph, self.name = graph, name
        self._node: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no storage is used twice
        self._arguments: set[int] = set()
        self._detached: set[int] = set()
        self.derivative = False
        self.detaching = False  # asked for by the step; autograd itself detaches what it saves

    def argument(self, tensor: Tensor, name: str) -> None:
        self._set(tensor, self.graph.input(name))
        self._arguments.add(_storage(tensor))

    def _set(self, tensor: Tensor, node: int) -> None:
        self._alive.append(tensor)
        self._node[_storage(tensor)] = node

    def tile(self, value: Any, op: str = "") -> Any:
        """A tensor's node; what is no tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        found = self._node.get(_storage(value))
        if found is None:
            # A number of Python, which torch has wrapped.
            if value.dim() > 0 or not (self.derivative or op == "lift_fresh"):
                raise self.error(
                    f"a tensor {tuple(value.shape)} from outside the step; pass it as a parameter or an extra of the "
                    "cell, or as a number"
                )
            found = self.graph.constant(value.item())
        return Tile(self.graph, found)

    def error(self, what: str) -> CellError:
        where = _user_s_line(sys._getframe()) or ("in its derivative: " if self.derivative else "")
        return CellError(f"{self.name}: {where}{what}")

    def _record(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket.__name__
        if func._schema.is_mutable:
            if "out" in kwargs or op in ("set_", "resize_"):
                raise self.error(f"{op} writes into a tensor that is given; use the operation that returns a new one")
            if _storage(args[0]) in self._arguments:
                raise self.error(f"{op} changes an argument of the step in place; use the operation without '_'")
            if _storage(args[0]) in self._detached:
                raise self.error(f"{op} changes a detached tile, and what it is of, in place; use it without '_'")
            op = op if op == "copy_" else op.removesuffix("_")
        if op in ("_local_scalar_dense", "is_nonzero", "equal"):
            raise self.error("a tensor's value is needed as a number, as in a branch; use torch.where")
        out = func(*args, **kwargs)
        results = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, Tensor)]
        nodes = self._nodes(op, args, kwargs)
        for result, node in zip(results, nodes, strict=True):
            if not (self.derivative or torch.is_grad_enabled()):
                node = self.graph.add("detach", node)
            if result is out and not func._schema.is_mutable and self._node.get(_storage(result), node) != node:
                # Else what it is detached from would be this node too, and be without a second derivative.
                out = result = result.clone()
                self._detached.add(_storage(result))
            truth = self.graph.is_truth(node) or (self.graph.value(node) is not None and result.dtype == torch.bool)
            if tuple(result.shape) not in ((), SHAPE) and op not in TURNED:
                raise self.error(
                    f"{op} gives the shape {tuple(result.shape)} from tiles {SHAPE}; a step is pointwise, each unit "
                    "and row by itself"
                )
            if result.dtype != (torch.bool if truth else torch.float32):
                raise self.error(_cast(result.dtype, op))
            self._set(result, node)
        return out

    def _nodes(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        if op in FILLED:
            filled = FILLED[op]
            value = filled if isinstance(filled, float) else args[filled[0]]
            return [self.tile(value).node if isinstance(value, Tensor) else self.graph.constant(value)]
        if op == "copy_":
            return [self.tile(args[1]).node]
        if op in SAME or op in TURNED or op in PARTS:
            kept = self.tile(args[0], op)
            to = kwargs.get("dtype")
            if self.graph.is_truth(kept.node) and to is not None and to.is_floating_point:
                kept = kept.where(1.0, 0.0)
            return [kept.do("detach").node if self.detaching else kept.node]
        rule = rule_of(op)
        if rule is None:
            raise self.error(refusal(op))
        for option in kwargs.keys() - KEYWORDS:
            if kwargs[option] is not None:
                raise self.error(f"{op} with {option}={kwargs[option]!r} is not supported in a step")
        tiles, named = [self.tile(a) for a in args], {k: self.tile(v) for k, v in kwargs.items()}
        try:
            made = rule(*tiles, **{k: v for k, v in named.items() if k in KEYWORDS})
        except CellError as error:
            raise self.error(str(error)) from None
        return [m.node for m in (made if isinstance(made, tuple) else (made,))]


class Casts(TorchDispatchMode):
    """Refuses those to float32 of a step that runs in float64: tracing runs in float32, which sees all others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _run(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ == "_to_copy" and (args[0].dtype, out.dtype) == (torch.float64, torch.float32):
            raise CellError(f"{self._name}: {_user_s_line(sys._getframe())}{_cast(out.dtype)}")
        return out


def _cast(dtype: torch.dtype, op: str = "_to_copy") -> str:
    what = "a cast" if op == "_to_copy" else op
    return f"{what} gives {dtype}; a step runs in one dtype, that of its arguments"


class _Detaching(TorchFunctionMode):
    """Tells the recorder what the step detaches."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._recorder.detaching = func in (Tensor.detach, torch.detach)
        try:
            return func(*args, **kwargs or {})
        finally:
            self._recorder.detaching = False


# Not in the class, where torch would wrap it, and import torch._dynamo for that, which takes seconds.
Recorder.__torch_dispatch__ = Recorder._record  # type: ignore[method-assign, assignment]
Casts.__torch_dispatch__ = Casts._run  # type: ignore[method-assign, assignment]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _user_s_line(frame: FrameType | None) -> str:
    """ "file:line: its text: ", of the innermost frame that is neither torch's nor ours; empty if that is outside of
    the step."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_THE_USER_S) and not file.startswith("<"):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno}: {text}: "
        if frame.f_code in (trace.__code__, called.__code__):
            return ""
        frame = frame.f_back
    return ""


def trace(
    graph: Graph,
    step: Callable[..., tuple[Tensor, ...]],
    name: str,
    groups: Sequence[tuple[str, int]],
    outputs: int,
) -> tuple[list[int], list[list[int]]]:
    """The nodes of the step's results, and per group those of its arguments' gradients, given d0, d1... of the results.

    Args:
        groups: (letter, how many tensors) of each argument of the step, which is a tuple; e is not differentiated
        outputs: how many results it has

    Raises:
        CellError: the step is not pointwise.
    """
    generator = torch.Generator().manual_seed(0)

    def some(n: int, differentiable: bool = True) -> tuple[Tensor, ...]:
        drawn = (torch.rand(SHAPE, generator=generator, dtype=torch.float32) for _ in range(n))
        # No leaves: autograd lets those alone be changed in place, and we say why not.
        return tuple(t.requires_grad_(differentiable) * 1.0 for t in drawn)

    given = [some(n, letter != "e") for letter, n in groups]
    d = tuple(t.detach() for t in some(outputs))
    recorder = Recorder(graph, name)
    for (letter, _), tensors in zip([*groups, ("d", outputs)], [*given, d], strict=True):
        for i, t in enumerate(tensors):
            recorder.argument(t, f"{letter}{i}")
    with recorder, _Detaching(recorder):
        results = checked(called(step, given, name), outputs, name)
        nodes = [recorder.tile(t).node for t in results]
    # As one number, whose gradient is 1: given gradients, torch.autograd.grad imports sympy, which takes seconds.
    total = sum(((t * g).sum() for t, g in zip(results, d, strict=True)), start=torch.zeros((), dtype=torch.float32))
    wanted = [t for tensors in given for t in tensors if t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    with recorder:
        recorder.derivative = True
        if total.requires_grad:
            try:
                grads = torch.autograd.grad(total, wanted, allow_unused=True)
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                raise CellError(
                    f"{name}: a tile that its derivative needs is changed in place; use the operation without '_', and "
                    "h = h + x in place of h += x"
                ) from error
        zero = graph.constant(0.0)
        found = iter([zero if g is None else recorder.tile(g).node for g in grads])
    return nodes, [[next(found) if t.requires_grad else zero for t in tensors] for tensors in given]


def called(step: Callable[..., Any], given: Sequence[Any], name: str) -> Any:
    """What a step gives; an error of its own names the line, and the cell of this name."""
    try:
        return step(*given)
    except CellError:
        raise
    except Exception as error:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        where = _user_s_line(innermost)
        what = str(error)
        if (
            "Boolean value of Tensor" in what
            or "cannot be converted to Scalar" in what
            or "only integer tensors" in what
        ):
            what = "a tensor's value is needed as a number, as in a branch; use torch.where"
        elif isinstance(error, AttributeError) and hasattr(error.obj, "_fields"):
            what = f"{type(error.obj).__name__.lower()} has no {error.name!r}; it has {', '.join(error.obj._fields)}"
        raise CellError(f"{name}: {where}{what}") from error


def checked(results: Any, outputs: int, name: str) -> tuple[Tensor, ...]:
    given = f"{type(results).__name__}" + (f" of {len(results)}" if isinstance(results, tuple) else "")
    if not isinstance(results, tuple) or len(results) != outputs:
        raise CellError(f"{name}: a step returns the tuple of its {outputs} new states, h first; got a {given}")
    for t in results:
        if not isinstance(t, Tensor) or tuple(t.shape) != SHAPE:
            got = f"one of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise CellError(f"{name}: a step returns tensors of its arguments' shape, {SHAPE} here; got {got}")
    return results
