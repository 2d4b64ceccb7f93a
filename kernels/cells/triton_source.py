"""The pair of Triton functions of a cell: their text, and their import from a file in Triton's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from .graph import ALL, Graph

HEADER = '''"""Written by persistrnn.kernels.cells from the step of {name}; do not edit."""

import triton
import triton.language as tl

from persistrnn.kernels.device.pointwise import expm1, log1p, log_sigmoid, relu, sigmoid, tanh


'''


class Function:
    """One jitted function: ``given`` nodes have names, others become assignments."""

    def __init__(self, graph: Graph, given: dict[int, str], roots: Sequence[int], zero: str) -> None:
        self._graph, self._zero = graph, zero
        self._text = dict(given)
        self.lines = []
        # [U, 1] of a unit's parameters alone, where all else is [U, BB]
        self._wide = graph.descendants(lambda i: i in given and not graph.name(i).startswith("p"))
        for i in graph.needs(roots, given):
            if graph.value(i) is None:
                op, args = graph.nodes[i]
                self._text[i] = f"v{i}"
                self.lines.append(f"    v{i} = {ALL[op].triton.format(*map(self._of, args))}")

    def _of(self, i: int) -> str:
        value = self._graph.value(i)
        return self._text[i] if value is None else f"({value!r})" if value < 0 else repr(value)

    def _tile(self, i: int) -> str:
        if i in self._wide:
            return self._text[i]
        return self._zero if self._graph.value(i) == 0 else f"{self._zero} + {self._of(i)}"

    def tuple(self, nodes: Sequence[int]) -> str:
        tiles = [self._tile(i) for i in nodes]
        return f"({', '.join(tiles)}{',' if len(tiles) == 1 else ''})"


def inputs(graph: Graph, **names: str) -> dict[int, str]:
    """The text of given tiles, by the letter of their group: x0 is ``names["x"][0]``."""
    leaves = ((i, graph.name(i)) for i in range(len(graph.nodes)))
    return {i: f"{names[name[0]]}[{name[1:]}]" for i, name in leaves if name and name[0] in names}


def _body(graph: Graph, given: dict[int, str], zero: str, *results: Sequence[int]) -> list[str]:
    """The lines of a function, or of a part of one, that returns tuples of these nodes."""
    function = Function(graph, given, [*chain(*results)], zero)
    return [*function.lines, f"    return {', '.join(map(function.tuple, results))}"]


def forward_text(graph: Graph, name: str, new: Sequence[int], saved: Sequence[int]) -> str:
    given = inputs(graph, x="x_gates", r="r_gates", s="state", p="p", e="e")
    lines = ["@triton.jit", f"def {name}_forward(x_gates, r_gates, state, p, e):"]
    return "\n".join([*lines, *_body(graph, given, "tl.zeros_like(state[0])", new, saved)])


def backward_text(
    graph: Graph, name: str, saved: Sequence[int], after: Sequence[int], bits: Sequence[int], dx: Sequence[int],
    dr: Sequence[int], ds: Sequence[int],
) -> str:  # fmt: skip
    """saved: the last of them holds the bits; after: new states, which come behind them."""
    given = inputs(graph, d="d_state", s="previous_state", p="p", e="e")
    given |= {i: f"saved[{k}]" for k, i in enumerate((*saved, *after))} | {
        i: f"((code & {1 << k}) != 0)" for k, i in enumerate(bits)
    }
    body = Function(graph, given, [*dx, *dr, *ds], "tl.zeros_like(d_state[0])")
    lines = ["@triton.jit", f"def {name}_backward(d_state, saved, previous_state, p, e):"]
    lines += [f"    code = saved[{len(saved) - 1}].to(tl.int32)"] * bool(bits) + body.lines
    if list(dx) == list(dr):
        lines += [f"    gates = {body.tuple(dx)}", f"    return gates, gates, {body.tuple(ds)}"]
    else:
        lines += [f"    return {body.tuple(dx)}, {body.tuple(dr)}, {body.tuple(ds)}"]
    return "\n".join(lines)


def staged_forward_text(
    graph: Graph, name: str, operands: Sequence[int], new: Sequence[int], saved: Sequence[int]
) -> str:
    """By the number of a part: what that of each later stage works on, then what ``forward_text`` returns. Each part
    forms what it needs anew, and the compiler once what several do."""
    given = inputs(graph, x="x_gates", r="r_gates", s="state", p="p", e="e", q="q")
    returned = [*([[operand]] for operand in operands), (new, saved)]
    parts = [_body(graph, given, "tl.zeros_like(state[0])", *results) for results in returned]
    return _in_parts(f"{name}_forward", "x_gates, r_gates, state, p, e, q", parts)


def staged_backward_text(
    graph: Graph, name: str, saved: Sequence[int], after: Sequence[int], bits: Sequence[int], dx: Sequence[int],
    dr: Sequence[int], ds: Sequence[int], dq: Sequence[int],
) -> str:  # fmt: skip
    """By the number of a part: the gradients of what the stages give, the last stage's first, then what
    ``backward_text`` returns. d_operands: gradients of what the stages work on, in the same order."""
    given = inputs(graph, s="previous_state", p="p", e="e")
    states = len(ds)
    for i in range(len(graph.nodes)):
        if graph.name(i)[:1] == "d":
            number = int(graph.name(i)[1:])
            of_state = number < states
            given[i] = f"d_state[{number}]" if of_state else f"d_operands[{states + len(dq) - 1 - number}]"
    given |= {i: f"saved[{k}]" for k, i in enumerate((*saved, *after))}
    given |= {i: f"((saved[{len(saved) - 1}].to(tl.int32) & {1 << k}) != 0)" for k, i in enumerate(bits)}
    returned = [*([[result]] for result in reversed(dq)), (dx, dr, ds)]
    parts = [_body(graph, given, "tl.zeros_like(d_state[0])", *results) for results in returned]
    return _in_parts(f"{name}_backward", "d_state, saved, previous_state, p, e, d_operands", parts)


def _in_parts(name: str, arguments: str, parts: Sequence[Sequence[str]]) -> str:
    lines = ["@triton.jit", f"def {name}(part: tl.constexpr, {arguments}):"]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        lines.append("    else:" if last else f"    {'el' if number else ''}if part == {number}:")
        lines += [f"    {line}" for line in part]
    return "\n".join(lines)


def load(name: str, source: str) -> tuple[Any, Any]:
    """(forward, backward), jitted.

    The file's name holds the text's hash: two cells of one name are two modules, and processes that share the cache
    write the same file.

    Raises:
        RuntimeError: Triton's cache cannot be written.
    """
    key = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    module_name = f"persistrnn_cell_{key}"
    if module_name not in sys.modules:
        path = _cached(key, f"{name}.py", source)
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    module = sys.modules[module_name]
    return getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")


def _cached(key: str, file: str, source: str) -> str:
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    try:
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        path = manager.get_file(file)
        return path if path is not None else str(manager.put(source, file, binary=False))
    except OSError as error:
        raise RuntimeError(
            f"the kernels of a cell are written into Triton's cache, {knobs.cache.dir}, which cannot be written "
            f"({error.strerror}); set TRITON_CACHE_DIR to a folder that can"
        ) from error
