"""What torch.compile is told about functions of ours, without importing it: its import takes longer than torch's."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
