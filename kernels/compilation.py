"""Where a kernel is started; and compiled instead, ahead of its first launch and on threads.

What compiles is Triton, from the very arguments of a launch, so that its first launch finds it: nothing is said here of
types, alignment or options. Triton's cache on disk keeps it for other processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any, NamedTuple

import torch
import triton


class _Start(NamedTuple):
    device: torch.device
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Of this thread alone: what others launch meanwhile, they launch.
_noted: ContextVar[list[_Start] | None] = ContextVar("noted", default=None)


def start(device: torch.device, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> bool:
    """Launch a kernel on the current device; within ``instead_of_launches`` note it, and return False."""
    noted = _noted.get()
    if noted is not None:
        noted.append(_Start(device, kernel, grid, arguments, named))
        return False
    kernel[grid](*arguments, **named)
    return True


@contextmanager
def instead_of_launches(threads: int | None, compiled: list[Any]) -> Iterator[None]:
    """Within, kernels are not launched, and what they would have written is left as it was; at the end they are
    compiled, so many at a time (None: one per CPU), and given out in ``compiled``, each once.

    Raises:
        RuntimeError: Triton's interpreter stands for its compiler
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 interprets the kernels, there is nothing to compile; unset it")
    token = _noted.set([])
    try:
        yield
        noted = _noted.get() or []
    finally:
        _noted.reset(token)
    # In a context of its own: Triton 3.6.0 stays in the mode where a compilation has failed.
    compiled += copy_context().run(_compile, noted, threads or os.cpu_count() or 1)


def _compile(noted: list[_Start], threads: int) -> list[Any]:
    kernels = {}
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool):
        for one in noted:
            with on_device(one.device):
                kernel = one.kernel.run(*one.arguments, grid=one.grid, warmup=True, **one.named)
            kernels[id(kernel)] = kernel
    return list(kernels.values())
