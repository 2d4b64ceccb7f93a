"""The concurrent grid: interpreted programs that run at the same time, one thread per program.

Triton's interpreter runs the programs of a grid one after the other, so a program that waits for another never
ends. Inside ``concurrent_grid()`` a launch collects its programs, then runs each in a thread of its own; the program
id is thread-local. ``delay`` is called with the operation's name and the program's id before every exchange operation,
and may sleep: real concurrency hides races that forced delays show.
"""

import contextlib
import inspect
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import triton.runtime.interpreter as interpreter

from persistrnn.kernels.device import exchanged_product, means, product, scan

# Operation -> the modules that call it. The last three are the second exchange, of the two-dimensional split and of
# means.
EXCHANGE = {
    "put": (scan,),
    "arrive": (scan,),
    "wait": (exchanged_product,),
    "get": (product,),
    "announce": (exchanged_product, means),
    "await_count": (exchanged_product, means),
    "read": (exchanged_product, means),
}


class _ThreadLocalGrid(type(interpreter.interpreter_builder)):
    """The interpreter's builder with one program id per thread."""

    local = threading.local()

    @property
    def grid_idx(self):
        return self.local.__dict__.get("index")

    @grid_idx.setter
    def grid_idx(self, index):
        self.local.index = index

    # What a wait repeats. A program that waits for one that has failed would do so until its spin limit is reached.
    def create_atomic_rmw(self, *arguments):
        self.end_if_another_failed()
        return super().create_atomic_rmw(*arguments)

    def create_masked_load(self, *arguments):
        self.end_if_another_failed()
        return super().create_masked_load(*arguments)

    def end_if_another_failed(self):
        if getattr(self.local, "errors", None):
            raise RuntimeError("another program of this launch has failed")


class _Programs:
    """Stands in for a kernel's body: remembers each program's id, and runs all of them at the last one."""

    def __init__(self, body: Callable, count: int):
        self.body = body
        self.count = count
        self.indices: list[tuple[int, int, int]] = []
        self.__globals__ = body.__globals__
        self.__name__ = body.__name__
        self.__signature__ = inspect.signature(body)

    def __call__(self, **arguments):
        builder = interpreter.interpreter_builder
        self.indices.append(builder.grid_idx)
        if len(self.indices) < self.count:
            return
        errors: list[BaseException] = []

        def run(index):
            builder.grid_idx = index
            builder.local.errors = errors
            try:
                with np.errstate(all="ignore"):  # the interpreter computes in NumPy; a mutant's garbage may overflow
                    self.body(**arguments)
            except BaseException as error:  # handed to the launching thread, which raises it
                errors.append(error)

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in self.indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class Delays:
    """Adversarial schedule: program ``slow`` sleeps before ``operation``, each ``every``-th time, the others yield at
    random. To let the others run a whole step ahead it must sleep for longer than their step takes."""

    def __init__(self, operation: str, slow: int, seconds: float = 0.004, every: int = 1):
        assert operation in EXCHANGE
        self.random = random.Random(f"{operation} {slow}")
        self.operation = operation
        self.slow = slow
        self.seconds = seconds
        self.every = every
        self.turn = 0

    def __call__(self, operation: str, index: tuple[int, int, int]) -> None:
        if index[0] == self.slow and operation == self.operation:
            if self.turn % self.every == 0:
                time.sleep(self.seconds)
            self.turn += 1
        elif self.random.random() < 0.2:
            time.sleep(0.0005)


def _locked(function: Callable, lock: threading.Lock) -> Callable:
    def call(*arguments):
        with lock:
            return function(*arguments)

    return call


@contextlib.contextmanager
def concurrent_grid(delay: Callable[[str, tuple[int, int, int]], None] | None = None) -> Iterator[None]:
    """Launches inside run their programs concurrently; ``delay(operation, program_id)`` precedes each exchange."""
    builder = interpreter.interpreter_builder
    executor = interpreter.GridExecutor
    original_class, original_call = type(builder), executor.__call__
    # The first call of a jitted function adds to its module's globals, and every call walks over them.
    function, lock = interpreter.InterpretedFunction, threading.Lock()
    rewrite, patch = function.rewrite, interpreter._patch_lang
    places = [(module, name) for name, modules in EXCHANGE.items() for module in modules]
    originals = {(module, name): getattr(module, name) for module, name in places}

    def call(self, *args, **kwargs):
        count = 1
        for extent in self.grid:
            count *= extent
        body, self.fn = self.fn, None
        self.fn = _Programs(body, count)
        try:
            return original_call(self, *args, **kwargs)
        finally:
            self.fn = body

    def delayed(module, name):
        def operation(*args, **kwargs):
            delay(name, builder.grid_idx)
            return originals[module, name](*args, **kwargs)

        return operation

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # 3 to 4 times faster than the default 5 ms: a spinning poll yields sooner
    index = builder.__dict__.pop("grid_idx", None)
    builder.__class__ = _ThreadLocalGrid
    if delay is not None:
        for module, name in places:
            setattr(module, name, delayed(module, name))
    executor.__call__ = call
    function.rewrite, interpreter._patch_lang = _locked(rewrite, lock), _locked(patch, lock)
    try:
        yield
    finally:
        executor.__call__ = original_call
        function.rewrite, interpreter._patch_lang = rewrite, patch
        builder.__class__ = original_class
        builder.grid_idx = index
        sys.setswitchinterval(switch)
        for (module, name), function in originals.items():
            setattr(module, name, function)
