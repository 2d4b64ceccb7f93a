"""The steps of the first run, each in a process of its own: what there is to do, one item after the other.

    python -m bench.gpu.first_steps STEP --journal FILE --until TIME       what `bench.gpu.first` starts

Every outcome is a line of the journal as soon as there is one. The item that is running stands in JOURNAL.running, and
those that are left below it, so that whoever has to kill this process knows where it hung.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton

from bench.gpu import compile_first, micro, micro_kernels, smoke
from bench.race import arms, suites, timing
from bench.race import engine as race
from bench.report import provenance, results
from bench.report.results import Case, Entry, Stress
from persistrnn.kernels import launch
from persistrnn.kernels.planner import hardware as devices
from persistrnn.kernels.tensors import Kept

LOST = 3  # exit status of a process that can do nothing more on the device
RACED = ("persistrnn", "torch")
PER_STEP = 5  # rows of the race


@dataclass(frozen=True)
class Job:
    """What a step's process is told."""

    journal: Path
    device: torch.device
    hardware: devices.Hardware | None  # of a rehearsal
    red: str  # the smoke case whose variants are run
    inject: dict[str, str]

    def add(self, entry: Entry) -> None:
        """In one write, so that a kill cuts a line and never mixes two."""
        with self.journal.open("ab", buffering=0) as file:
            file.write(results.line(entry).encode())


Item = tuple[str, Callable[[], str]]


# ---- the machine --------------------------------------------------------------------------------------------------


def machine(job: Job) -> Iterator[Item]:
    cuda = job.device.type == "cuda"

    def facts() -> str:
        now = provenance.provenance(job.device)
        told = [now.device, now.arch, f"driver {now.driver}", f"CUDA {now.cuda}", f"cuDNN {now.cudnn}"]
        told += [f"torch {now.torch}", f"Triton {now.triton}", f"Python {now.python}", f"{os.cpu_count()} cores"]
        if cuda:
            found = launch.hardware(job.device)
            free, total = torch.cuda.mem_get_info(job.device)
            told += [f"{found.multiprocessors} multiprocessors", f"L2 {found.l2:,} bytes"]
            told += [f"shared memory {found.shared:,} bytes", f"registers {found.registers:,}"]
            told += [f"memory {free >> 20:,} of {total >> 20:,} MiB free", f"clock {now.clocks_before} MHz"]
            told += [f"planned for as {found.name!r}"]
            told += [provenance.state()]
        return "; ".join(told)

    def touched(cooperative: bool) -> str:
        here = micro.Machine(job.device, micro.REHEARSAL)
        count = here.new(here.multiprocessors)
        for _ in range(2):
            micro_kernels.touch[(len(count),)](count, **here.options(4, cooperative))
        if not bool((count == 2).all()):
            raise AssertionError(f"two launches counted {count.tolist()}")
        return f"{len(count)} programs"

    def pinned() -> str:
        word = micro.Machine(job.device, micro.REHEARSAL).error_word()
        micro_kernels.touch[(1,)](word, num_warps=1)
        smoke.synchronize(job.device)
        if int(word) != 1:
            raise AssertionError(f"a kernel added 1 to a word in host memory, and the host reads {int(word)}")
        return "a kernel writes to pinned host memory, and the host reads it"

    yield "facts", facts
    yield "plain launch", lambda: touched(False)
    yield "cooperative launch", lambda: touched(True)
    yield "pinned memory", pinned


def compile_step(job: Job) -> Iterator[Item]:
    """A rehearsal compiles the first kernel only."""
    hardware = job.hardware or launch.hardware(job.device)
    jobs = len(os.sched_getaffinity(0))

    def compiled() -> str:
        start = time.monotonic()
        chosen = compile_first.tasks(hardware)[: 1 if job.hardware else None]
        seconds, wrong = compile_first.fill(hardware, jobs, say, chosen)
        if wrong:
            raise RuntimeError("; ".join(wrong))
        return compile_first.summary(seconds, time.monotonic() - start, jobs)

    yield "kernels", compiled


# ---- is it right --------------------------------------------------------------------------------------------------


def smoke_step(job: Job) -> Iterator[Item]:
    for one in smoke.SMOKE:
        small = replace(one, case=suites.miniatures([one.case])[0]) if job.hardware else one
        yield one.name, lambda one=small: smoke.run(one, job.device)  # type: ignore[misc]


def causes(job: Job) -> Iterator[Item]:
    (red,) = (one for one in smoke.SMOKE if one.name == job.red)
    if job.hardware:
        red = replace(red, case=suites.miniatures([red.case])[0])
    for name in smoke.VARIANTS:
        yield f"{red.name}: {name}", lambda name=name: smoke.vary(name, red, job.device)  # type: ignore[misc]


# ---- what it costs ------------------------------------------------------------------------------------------------


def measured(job: Job, wanted: Callable[[str], bool]) -> Iterator[Item]:
    # In the interpreter programs run one after the other: one that waits for another waits for ever.
    scale = replace(micro.REHEARSAL, programs=(1,)) if job.hardware else compile_first.EXCHANGE
    here = micro.Machine(job.device, scale)

    def take(item: micro.Item) -> str:
        if item.skip:
            return f"skipped: {item.skip}"
        found = micro.measured(here, item)
        if job.hardware is None:
            job.add(found)
        return race.REHEARSED if job.hardware else f"{found.value:.4g} {found.unit}"

    for item in micro.items(here):
        if wanted(item.name):
            yield str(item), lambda item=item: take(item)  # type: ignore[misc]


def exchange(job: Job) -> Iterator[Item]:
    return measured(job, lambda name: name.startswith("exchange"))


def constants(job: Job) -> Iterator[Item]:
    return measured(job, lambda name: not name.startswith("exchange"))


# ---- the race -----------------------------------------------------------------------------------------------------


def raced(job: Job, number: int) -> Iterator[Item]:
    """Each arm checked, then timed, on rows of the race."""
    kept: list[race.Race] = []  # of the present row

    def take(case: Case, arm: str) -> str:
        if not kept or kept[0].case != case:
            kept.clear()  # its memory first
            kept.append(race.Race(case, job.device))
        try:
            runner = kept[0].runner(arm)
        except arms.Skip as reason:
            job.add(race.skipped(case, arm, str(reason), job.hardware or job.device))
            return f"skipped: {reason}"
        check = kept[0].check(arm, runner)
        job.add(check)
        if not check.ok:
            job.add(race.skipped(case, arm, f"wrong: {check.message}", job.hardware or job.device))
            raise AssertionError(check.message)
        found = kept[0].time(arm, runner, timed)
        smoke.synchronize(job.device)
        launch.check()  # no wait ran out while it was timed
        job.add(race.skipped(case, arm, race.REHEARSED, job.hardware) if job.hardware else found)
        return race.REHEARSED if job.hardware else f"{found.per_step:.3f} us per step; {found.plan or found.dtype}"

    rows = suites.miniatures(suites.first()) if job.hardware else suites.first()
    for case in rows[PER_STEP * number :][:PER_STEP]:
        for arm in RACED:
            yield f"{case.key}, {arm}", lambda case=case, arm=arm: take(case, arm)  # type: ignore[misc]


def timed(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
    clock = timing.EventClock()
    return [timing.seconds_of(call, clock, calls) for _ in range(rounds)]


STEPS: dict[str, Callable[[Job], Iterator[Item]]] = {
    "machine": machine,
    "compile": compile_step,
    "smoke": smoke_step,
    "causes": causes,
    "exchange": exchange,
    "constants": constants,
    "race-1": lambda job: raced(job, 0),
    "race-2": lambda job: raced(job, 1),
    "race-3": lambda job: raced(job, 2),
}


# ---- one after the other ------------------------------------------------------------------------------------------


def running(journal: Path) -> Path:
    """Where the item that is running stands, and below it those that are left."""
    return journal.with_suffix(".running")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}   {text}", flush=True)


@contextmanager
def injected(job: Job, how: str | None) -> Iterator[None]:
    """For rehearsals of what may go wrong."""
    if how == "hang":
        signal.pause()
    elif how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "cut":
        with job.journal.open("ab", buffering=0) as file:
            file.write(results.line(Stress("cut", True, 0.0, "")).encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "wrong":
        forward = launch.forward

        def off(*arguments: object, **options: object) -> Kept:
            kept = forward(*arguments, **options)  # type: ignore[arg-type]
            kept.states[0][:, 1:-1] *= 1.5
            return kept

        with mock.patch.object(launch, "forward", off):
            yield
        return
    yield


def work(step: str, job: Job, done: set[str], until: float) -> None:
    """All items that are not done, each with its outcome in the journal; none is begun when the time is over."""
    items = [item for item in STEPS[step](job) if f"{step}: {item[0]}" not in done]
    compiled: list[bool] = []  # what was not compiled beforehand
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    for i, (name, run) in enumerate(items):
        if time.monotonic() >= until:
            return  # what is left stays in the file
        at = running(job.journal)
        at.with_suffix(".tmp").write_text("\n".join(name for name, _ in items[i:]))
        os.replace(at.with_suffix(".tmp"), at)
        start = time.monotonic()
        try:
            with injected(job, job.inject.get(f"{step}: {name}")):
                message, ok = run(), True
        except Exception as error:  # whatever it is, the other items still have their turn
            where = traceback.extract_tb(error.__traceback__)[-1]
            message, ok = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:2000], False
        message += f" [compiled here: {sum(compiled)}]" if any(compiled) else ""
        compiled.clear()
        job.add(Stress(f"{step}: {name}", ok, time.monotonic() - start, message))
        say(f"{step}: {name}: {'ok' if ok else 'WRONG'}: {message}")
        at.with_suffix(".tmp").write_text("\n".join(["", *(name for name, _ in items[i + 1 :])]))
        os.replace(at.with_suffix(".tmp"), at)
        if not ok and not usable(job.device):
            raise SystemExit(LOST)
    running(job.journal).unlink(missing_ok=True)


def usable(device: torch.device) -> bool:
    """Whether the next item has a chance in this process: after an illegal access, say, every call of CUDA's fails."""
    try:
        smoke.synchronize(device)
    except RuntimeError as error:
        say(f"this process has lost the device: {error}")
        return False
    for word in launch._errors.values():
        word.zero_()  # not the next item's fault
    return True


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu.first_steps", description=__doc__.split("\n")[0])
    p.add_argument("step", choices=list(STEPS))
    p.add_argument("--journal", type=Path, required=True, help="a file of lines, one per outcome")
    p.add_argument("--until", type=float, required=True, help="begin nothing then, by time.monotonic()")
    p.add_argument("--done", type=Path, help="names of what is not run again, one a line")
    p.add_argument("--red", default="", help="the smoke case whose variants are run")
    p.add_argument("--rehearse", choices=sorted(devices.DEVICES), help="on the CPU, in Triton's interpreter")
    p.add_argument("--inject", nargs="*", default=[], help=argparse.SUPPRESS)
    given = p.parse_args(argv)
    faulthandler.enable()
    device = torch.device("cpu") if given.rehearse else torch.device("cuda", torch.cuda.current_device())
    hardware = devices.named(given.rehearse) if given.rehearse else None
    inject = dict(text.rsplit("=", 1) for text in given.inject)
    done = set(given.done.read_text().splitlines()) if given.done else set()
    work(given.step, Job(given.journal, device, hardware, given.red, inject), done, given.until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
