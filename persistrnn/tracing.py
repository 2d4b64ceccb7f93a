"""What torch's compiler and tracers are told about functions and modules of ours. None of them is imported here: their
imports take longer than torch's; but for torch.fx, which comes with torch.

torch.fx records a layer as one node, as it does torch.nn's: it calls `forward` with `Proxy` arguments, since our
modules are not in torch.nn, and gets the node's `Proxy` back (`leaf`).
"""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

KEYWORDS = ("lengths", "mask", "resets", "reset_state", "return_cell_states")  # of a layer's call, in their order

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """A decorator: the compiler calls ``function`` once, while it traces, and takes the result as a constant.

    `torch.compiler.assume_constant_result` is the same mark, behind an import of torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; compiled, the graph breaks here. `torch.compiler.disable` as a decorator would import
    torch._dynamo."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def by_the_host(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of tensors on a CPU whose values it reads: no part of a trace of make_fx, as
    torch.func.linearize makes one, in which tensors have no values."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch.compiler.is_compiling() or proxies is None or proxies.get_proxy_mode() is None:
        return function(*arguments)
    with proxies.disable_proxy_modes_tracing():
        return function(*arguments)


def proxy_in(*values: Any) -> Proxy | None:
    """The first `Proxy` of torch.fx among arguments, and within tuples, lists and dicts of them; None: a real call."""
    return None if torch.compiler.is_compiling() else next(_proxies(values), None)


def _proxies(value: Any) -> Iterator[Proxy]:
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _proxies(inner)
    elif isinstance(value, Mapping):
        yield from _proxies(tuple(value.values()))


def leaf(proxy: Proxy, module: nn.Module, *arguments: Any, **options: Any) -> Proxy:
    """The node of a module's call in the graph that ``proxy``, one of its arguments, belongs to; options that are None
    or False are left out."""
    tracer: Any = proxy.tracer
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    node: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)
    return node


def leaf_function(function: Function) -> Function:
    """A decorator: torch.fx records a call of the function as one node."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        proxy = proxy_in(arguments, options)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", call, arguments, options)
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export, either of its exporters, is tracing."""
    return (torch.compiler.is_exporting() or by_torch_jit()) and _in_onnx_export()


def by_name(by_position: Sequence[Any]) -> dict[str, Any]:
    """Keyword arguments of a layer that came by position.

    Raises:
        TypeError: not all of them from torch.onnx's exporter on torch.jit.trace, which hands a model its arguments so
    """
    if not exporting_to_onnx() or len(by_position) != len(KEYWORDS):
        raise TypeError(
            f"forward() takes from 2 to 3 positional arguments but {3 + len(by_position)} were given; a state of "
            "several tensors is a tuple, and lengths and the like go by keyword"
        )
    found = dict(zip(KEYWORDS, by_position, strict=True))
    with warnings.catch_warnings():  # that it, traced as a tensor, is a constant
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return found | {"return_cell_states": bool(found["return_cell_states"])}


@constant
def _in_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def by_torch_jit() -> bool:
    """Whether torch.jit.trace is tracing, for itself, TensorBoard, or ONNX."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[attr-defined]
