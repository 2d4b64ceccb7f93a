"""Compile the kernels of the first run beforehand, on all cores and without a GPU, into Triton's cache.

    python -m bench.gpu.compile_first      for an H200, into TRITON_CACHE_DIR or Triton's own folder

The code that will launch the kernels runs here on small CPU tensors: Triton's JIT specialises, compiles and keeps them
under the very keys that it will ask for, and only the launch is left out. A cache of another machine serves where
Triton's library is the same file: its hash is in the keys, and differs between the wheels for two Pythons.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from bench.gpu import micro, smoke
from bench.race import arms, suites
from bench.race.correctness import run as outputs_and_gradients
from persistrnn import decide
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.inspect.audit import target_of
from persistrnn.kernels.planner import hardware as devices
from persistrnn.kernels.planner.hardware import Hardware
from persistrnn.kernels.planner.pipeline import Pipeline

STEPS = 2  # that are run here; no kernel depends on how many there will be


class Driver:
    """What Triton's JIT asks of a GPU's driver before it launches."""

    def __init__(self, hardware: Hardware) -> None:
        self.target = target_of(hardware.arch)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# A case with its exchange; or the key of a measurement.
Work = smoke.Smoke | tuple[str, int, int]


def tasks(hardware: Hardware) -> list[Work]:
    """In the order in which the first run needs them, equal ones once."""
    cases = [*smoke.SMOKE, *(smoke.Smoke(case.key, case) for case in suites.first())]
    once = {(one.case, one.protocol): one for one in reversed(cases)}
    items = micro.items(Compiler(hardware))
    return [*reversed(once.values()), *(item.key for item in items if item.name not in ("clock", "memory"))]


class Compiler(micro.Machine):
    """A machine on which the microbenchmarks' kernels are compiled and nothing is measured."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(torch.device("cpu"), micro.Scale(exchanges=STEPS, copied=micro.KIB))
        self.hardware, self.cuda, self.multiprocessors = hardware, True, hardware.multiprocessors

    def error_word(self) -> torch.Tensor:
        return self.new(1)

    def free(self) -> int:
        return 1 << 40

    def time(self, prepare: Callable[[], object], work: Callable[[], object]) -> float:
        self.spin(self.new(1, dtype=torch.int64), 1)
        work()
        return 1.0


@contextlib.contextmanager
def compiling(hardware: Hardware, protocol: str, steps: int) -> Iterator[list[float]]:
    """Inside, launches on CPU tensors compile their kernels for a device and launch nothing.

    Yields the seconds (of a core that does nothing else) of each compilation; what is in the cache takes none.
    steps: T of the run that this is for; whether a stack is a pipeline is theirs.
    """
    seconds: list[float] = []
    missed: list[bool] = []
    run, faster = JITFunction.run, Pipeline.faster

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = sum(os.times()[:4])  # this process and those that it has waited for, such as ptxas
        run(self, *args, grid=grid, warmup=True, **kwargs)
        if any(missed):
            seconds.append(sum(os.times()[:4]) - start)
        missed.clear()

    def listen(*, cache_hit: bool, **_: Any) -> None:
        missed.append(not cache_hit)

    driver, knobs = triton.runtime.driver, triton.knobs.compilation
    before = driver._active
    driver.set_active(Driver(hardware))
    try:
        with (
            mock.patch.object(knobs, "listener", listen),
            mock.patch.object(JITFunction, "run", compiled),
            mock.patch.object(launch, "hardware", return_value=hardware),
            mock.patch.object(launch, "exchange_for", return_value=Exchange(protocol=protocol, poll="ptx")),
            mock.patch.object(decide, "unsupported", return_value=None),
            mock.patch.object(Pipeline, "faster", lambda self, _, backward: faster(self, steps, backward)),
            mock.patch.object(micro, "_verify"),
        ):
            yield seconds
    finally:
        driver._active = before


def compile_task(work: Work, hardware: Hardware) -> list[float]:
    """Seconds of each kernel that this compiled."""
    torch.set_num_threads(1)
    if not isinstance(work, smoke.Smoke):
        (item,) = (item for item in micro.items(Compiler(hardware)) if item.key == work)
        with compiling(hardware, "counter", 1) as seconds, contextlib.suppress(ZeroDivisionError):
            item.start()()  # of a rate, nothing in no cycles
        return seconds
    case = replace(work.case, steps=STEPS)
    with compiling(hardware, work.protocol, work.case.steps) as seconds:
        runner = arms.persistent(case, arms.source(case), torch.device("cpu"))
        x = torch.zeros(arms.input_shape(case))
        dy = torch.zeros(case.steps, case.batch, case.hidden * (2 if case.bidirectional else 1))
        outputs_and_gradients(runner, case, x, dy)
    return seconds


def title(work: Work) -> str:
    return work.name if isinstance(work, smoke.Smoke) else micro.title(*work)


def fill(hardware: Hardware, chosen: Sequence[Work]) -> tuple[str, list[str]]:
    """Compile in processes of their own, as many as there are cores.

    Returns:
        How long it took, and what went wrong.
    """
    start, jobs = time.monotonic(), len(os.sched_getaffinity(0))
    seconds: list[float] = []
    wrong = []
    # Fresh processes: a fork of one that has threads, or a GPU, may hang.
    with ProcessPoolExecutor(min(jobs, len(chosen)), get_context("spawn")) as pool:
        pending = {pool.submit(compile_task, work, hardware): title(work) for work in chosen}
        for done in as_completed(pending):
            try:
                took = done.result()
            except BrokenProcessPool as error:
                wrong.append(f"the compiler died: {error}")
                break
            except Exception as error:  # of this kernel; the step that needs it will say so too
                wrong.append(f"{pending[done]}: {type(error).__name__}: {error}"[:500])
                continue
            seconds += took
            if took:
                print(f"{pending[done]}: {sum(took):.1f} s", flush=True)
    wall = f"{time.monotonic() - start:.0f} s"
    if not seconds:
        return f"all in the cache, {wall}", wrong
    each = f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.1f} s"
    return f"{len(seconds)} kernels in {wall} on {jobs} cores: {sum(seconds):.0f} s of one core, {each}", wrong


def main() -> int:
    if launch.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET=1 compiles nothing: unset it")
    hardware = devices.named("h200")
    message, wrong = fill(hardware, tasks(hardware))
    print("\n".join([f"{message}; in {triton.knobs.cache.dir}", *(f"WRONG: {text}" for text in wrong)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
