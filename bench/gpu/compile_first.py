"""Compile the kernels of the first run beforehand, on all cores and without a GPU, into Triton's cache.

    python -m bench.gpu.compile_first [--jobs N]      for an H200, into TRITON_CACHE_DIR or Triton's own folder

The code that will launch the kernels runs here on small CPU tensors: Triton's JIT specialises, compiles and keeps them
under the very keys that it will ask for, and only the launch is left out. A cache of another machine serves where
Triton's library is the same file: its hash is in the keys, and differs between the wheels for two Pythons.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from bench.gpu import micro, smoke
from bench.race import arms, suites
from bench.race.correctness import run as outputs_and_gradients
from bench.report.results import Case
from persistrnn import decide
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.inspect.audit import target_of
from persistrnn.kernels.planner import hardware as devices
from persistrnn.kernels.planner.hardware import Hardware
from persistrnn.kernels.planner.pipeline import Pipeline

# What is measured of the exchange, and all else that the plan takes for granted.
EXCHANGE = micro.Scale(programs=(4, 16, 64, 128), payloads=(0, 4 * micro.KIB, 64 * micro.KIB))
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


@dataclass(frozen=True)
class Task:
    """A case and the kernel of it that is compiled; or the measurement of that name, with all of its kernels."""

    work: Case | tuple[str, int, int]
    kernel: str = ""
    protocol: str = "counter"

    def __str__(self) -> str:
        what = self.work.key if isinstance(self.work, Case) else " ".join(map(str, self.work))
        return " ".join(word for word in (what, self.kernel, self.protocol * bool(self.kernel)) if word)


def tasks(hardware: Hardware) -> list[Task]:
    """In the order in which the first run needs them, equal ones once."""
    found: list[Task] = []
    for case, protocol in [*((s.case, s.protocol) for s in smoke.SMOKE), *((c, "counter") for c in suites.first())]:
        kernels = ("scan_forward", "scan_backward")[: 2 if case.mode == "training" else 1]
        found += [Task(case, kernel, protocol) for kernel in kernels]
    machine = Compiler(hardware)
    found += [Task(item.key) for item in micro.items(machine) if item.name not in ("clock", "memory")]
    return list(dict.fromkeys(found))


class Compiler(micro.Machine):
    """A machine on which the microbenchmarks' kernels are compiled and nothing is measured."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(torch.device("cpu"), replace(EXCHANGE, exchanges=STEPS, copied=micro.KIB))
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
def compiling(hardware: Hardware, kernel: str, protocol: str, steps: int) -> Iterator[list[float]]:
    """Inside, launches on CPU tensors compile ``kernel`` ("": all) for a device and launch nothing.

    Yields the seconds (of a core that does nothing else) of each compilation; what is in the cache takes none.
    steps: T of the run that this is for; whether a stack is a wave is theirs.
    """
    seconds: list[float] = []
    missed: list[bool] = []
    run, faster = JITFunction.run, Pipeline.faster

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel in ("", self.__name__):
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


def compile_task(task: Task, hardware: Hardware) -> list[float]:
    """Seconds of each kernel that this compiled."""
    torch.set_num_threads(1)
    if not isinstance(task.work, Case):
        machine = Compiler(hardware)
        (item,) = (item for item in micro.items(machine) if item.key == task.work)
        with compiling(hardware, "", "counter", 1) as seconds, contextlib.suppress(ZeroDivisionError):
            item.start()()  # of a rate, nothing in no cycles
        return seconds
    case = replace(task.work, steps=STEPS)
    device = torch.device("cpu")
    with compiling(hardware, task.kernel, task.protocol, task.work.steps) as seconds:
        runner = arms.persistent(case, arms.source(case), device)
        x = torch.zeros(arms.input_shape(case))
        dy = torch.zeros(case.steps, case.batch, case.hidden * (2 if case.bidirectional else 1))
        outputs_and_gradients(runner, case, x, dy)
    return seconds


def fill(
    hardware: Hardware, jobs: int, say: Callable[[str], None], chosen: Sequence[Task] | None = None
) -> tuple[list[float], list[str]]:
    """Compile all tasks (or the chosen ones) in processes of their own.

    Returns:
        The seconds of each kernel that was compiled, and what went wrong.
    """
    chosen = tasks(hardware) if chosen is None else chosen
    seconds: list[float] = []
    wrong = []
    # Fresh processes: a fork of one that has threads, or a GPU, may hang.
    with ProcessPoolExecutor(min(jobs, len(chosen)), get_context("spawn")) as pool:
        pending = {pool.submit(compile_task, task, hardware): task for task in chosen}
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
                say(f"{pending[done]}: {sum(took):.1f} s")
    return seconds, wrong


def summary(seconds: list[float], wall: float, jobs: int) -> str:
    if not seconds:
        return f"all in the cache, {wall:.0f} s"
    each = sorted(seconds)
    return (
        f"{len(each)} kernels in {wall:.0f} s on {jobs} cores: {sum(each):.0f} s of one core, median "
        f"{each[len(each) // 2]:.2f} s, longest {each[-1]:.1f} s"
    )


def folder() -> Path:
    return Path(triton.knobs.cache.dir)


def size(path: Path) -> float:
    """MiB of all files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu.compile_first", description=__doc__.split("\n")[0])
    p.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    jobs = p.parse_args(argv).jobs
    if jobs < 1:
        p.error(f"--jobs must be at least 1, got {jobs}")
    if launch.INTERPRETED:
        p.error("TRITON_INTERPRET=1 compiles nothing: unset it")
    start = time.monotonic()
    seconds, wrong = fill(devices.named("h200"), jobs, lambda text: print(text, flush=True))
    print(f"{summary(seconds, time.monotonic() - start, jobs)}; {size(folder()):.1f} MiB in {folder()}")
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
