"""The steps of the GPU command: what each is for, how long it may take, and what there is to do in it, one item after
the other. ``FIRST`` are those of the first run, ``PARTS`` those of all that follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.gpu import compile_first, micro, micro_kernels, smoke, stress, tune
from bench.gpu.journal import Task
from bench.race import arms, suites
from bench.race import engine as race
from bench.report import provenance, results
from bench.report.results import Arm, Case, Entry
from persistrnn.kernels import launch

ROOT = Path(__file__).resolve().parents[2]  # bench may be a link
TESTS = tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_gpu*.py")))
REST = 3600  # seconds of a step that takes all that there are
ROWS = 5  # of the race, in a step of the first run

Item = tuple[str, Callable[[], str]]


@dataclass(frozen=True)
class Step:
    """seconds: of the whole step, at most; item: of one of its items, at most.

    items: what there is to do, or None for the GPU tests, which run under pytest.
    """

    name: str
    seconds: int
    item: int
    what: str
    items: Callable[[Task], Iterable[Item]] | None


def kept(task: Task, entry: Entry, message: str) -> str:
    """Keep what was found and say so; a rehearsal measures nothing."""
    if task.hardware:
        return race.REHEARSED
    task.add(entry)
    return message


# ---- the machine --------------------------------------------------------------------------------------------------


def machine(task: Task) -> Iterator[Item]:
    def facts() -> str:
        found: dict[str, object] = asdict(provenance.provenance(task.device)) | {"cores": os.cpu_count()}
        if task.device.type == "cuda":
            here, (free, total) = launch.hardware(task.device), torch.cuda.mem_get_info(task.device)
            found |= {name: getattr(here, name) for name in ("multiprocessors", "l2", "shared", "registers")}
            found |= {"planned for as": here.name, "MiB free": f"{free >> 20} of {total >> 20}"}
            found |= {"state": provenance.state()}
        return "; ".join(f"{name} {value}" for name, value in found.items())

    def touched(cooperative: bool) -> str:
        here = micro.Machine(task.device, micro.REHEARSAL)
        count = here.new(here.multiprocessors)
        for _ in range(2):
            micro_kernels.touch[(len(count),)](count, **here.options(4, cooperative))
        if not bool((count == 2).all()):
            raise AssertionError(f"two launches counted {count.tolist()}")
        return f"{len(count)} programs"

    def pinned() -> str:
        word = micro.Machine(task.device, micro.REHEARSAL).error_word()
        micro_kernels.touch[(1,)](word, num_warps=1)
        smoke.synchronize(task.device)
        if int(word) != 1:
            raise AssertionError(f"a kernel added 1 to a word in host memory, and the host reads {int(word)}")
        return "a kernel writes to pinned host memory, and the host reads it"

    yield "facts", facts
    yield "plain launch", lambda: touched(False)
    yield "cooperative launch", lambda: touched(True)
    yield "pinned memory", pinned


def compiled(task: Task) -> Iterator[Item]:
    """A rehearsal compiles the first kernel only."""
    hardware = task.hardware or launch.hardware(task.device)

    def run() -> str:
        os.environ.pop("TRITON_INTERPRET", None)  # which compiles nothing
        chosen = compile_first.tasks(hardware)[: 1 if task.hardware else None]
        message, wrong = compile_first.fill(hardware, chosen)
        if wrong:
            raise RuntimeError("; ".join(wrong))
        return message

    yield "kernels", run


# ---- is it right --------------------------------------------------------------------------------------------------


def _small(one: smoke.Smoke, task: Task) -> smoke.Smoke:
    """In a rehearsal, its miniature."""
    return replace(one, case=suites.miniatures([one.case])[0]) if task.hardware else one


def smoked(task: Task) -> Iterator[Item]:
    for one in smoke.SMOKE:
        yield one.name, partial(smoke.run, _small(one, task), task.device)


def causes(task: Task) -> Iterator[Item]:
    (red,) = (_small(one, task) for one in smoke.SMOKE if one.name == task.red)
    for name in smoke.VARIANTS:
        yield f"{red.name}: {name}", partial(smoke.vary, name, red, task.device)


def stressed(task: Task) -> Iterator[Item]:
    """A rehearsal draws small shapes for two seconds, and nothing more."""
    seconds = min(stress.SECONDS, 60 * task.minutes / len(stress.ITEMS))
    for name, item in stress.ITEMS.items():
        if task.hardware is None:
            yield name, partial(item, task.device, seconds)
        elif item is stress.random_shapes:
            yield name, partial(item, task.device, 2.0, largest=20, longest=4)


# ---- what it costs ------------------------------------------------------------------------------------------------


def measured(task: Task, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Item]:
    # In the interpreter programs run one after the other: one that waits for another waits for ever.
    here = micro.Machine(task.device, replace(micro.REHEARSAL, programs=(1,)) if task.hardware else micro.Scale())

    def take(item: micro.Item) -> str:
        if item.skip:
            return f"skipped: {item.skip}"
        found = micro.measured(here, item)
        return kept(task, found, f"{found.value:.4g} {found.unit}")

    for item in micro.items(here):
        if wanted(item.name):
            yield str(item), partial(take, item)


def exchange(task: Task) -> Iterator[Item]:
    return measured(task, lambda name: name.startswith("exchange"))


def constants(task: Task) -> Iterator[Item]:
    return measured(task, lambda name: not name.startswith("exchange"))


def micros(task: Task) -> Iterator[Item]:
    def first_call() -> str:
        if task.hardware:
            return race.REHEARSED
        found = micro.first_call()
        return kept(task, found, f"forward and backward of an LSTM, H=1024, compiling included: {found.value:.1f} s")

    yield micro.title("first call", 1, 0), first_call
    yield from measured(task)


def tuned(task: Task) -> Iterator[Item]:
    def run(take: Callable[[], results.Tuning]) -> str:
        found = take()
        return kept(task, found, f"{found.microseconds:.2f} us per step, {found.predicted:.2f} predicted")

    if task.hardware is None:
        yield from ((name, partial(run, take)) for name, take in tune.items(task.device))
        return
    for case in tune.cases():
        yield case.key, partial(tune.counted, case, task.hardware)


# ---- the race -----------------------------------------------------------------------------------------------------


def contest(task: Task, cases: list[Case], chosen: Iterable[Arm]) -> Iterator[Item]:
    """Each arm checked, then timed, on every case; in a rehearsal on miniatures of them."""
    present: list[race.Race] = []

    def take(case: Case, arm: Arm) -> str:
        if not present or present[0].case != case:
            present.clear()  # its memory first
            present.append(race.Race(case, task.device))
        try:
            runner = present[0].runner(arm)
        except arms.Skip as reason:
            return kept(task, race.skipped(case, arm, str(reason), task.device), f"skipped: {reason}")
        check = present[0].check(arm, runner)
        kept(task, check, "")
        if not check.ok:
            kept(task, race.skipped(case, arm, f"wrong: {check.message}", task.device), "")
            raise AssertionError(check.message)
        found = present[0].time(arm, runner)
        smoke.synchronize(task.device)
        launch.check()  # no wait ran out while it was timed
        return kept(task, found, f"{found.per_step:.3f} us per step; {found.plan or found.dtype}")

    for case in suites.miniatures(cases) if task.hardware else cases:
        for arm in chosen:
            yield f"{case.key}, {arm}", partial(take, case, arm)


def rows(number: int) -> Callable[[Task], Iterator[Item]]:
    return lambda task: contest(task, suites.first()[ROWS * number :][:ROWS], ("persistrnn", "torch"))


def raced(task: Task) -> Iterator[Item]:
    """A rehearsal keeps what is predicted of every case."""
    cases, hardware = suites.cases(task.suites, task.dtypes), task.hardware
    if hardware is not None:
        for case in cases:
            if task.name(f"{case.key}, persistrnn") not in task.done:
                task.add(race.skipped(case, "persistrnn", race.REHEARSED, hardware))
    yield from contest(task, cases, task.arms)


# ---- all of them --------------------------------------------------------------------------------------------------

CORRECTNESS = "every test that needs a GPU, the most telling first"
FIRST = (
    Step("machine", 30, 15, "device, versions, clocks; cooperative launch, pinned memory", machine),
    Step("compile", 60, 60, "all kernels that follow, on all cores", compiled),
    Step("smoke", 60, 20, f"{len(smoke.SMOKE)} cases against float64, from the simplest up", smoked),
    Step("exchange", 40, 10, "both protocols among 4, 16, 64 and 128 programs", exchange),
    Step("constants", 20, 10, "clock, L2, shared memory, barrier, launch, memory", constants),
    Step("race-1", 60, 25, "persistrnn and torch, checked, then timed: fp16 and bf16", rows(0)),
    Step("race-2", 60, 25, "layers, directions, small batches", rows(1)),
    Step("race-3", 60, 25, "one step, fp32, resets, lengths", rows(2)),
    Step("correctness", REST, 60, CORRECTNESS, None),
)
CAUSES = Step("causes", 60, 15, "only where smoke is red: what the first red case depends on", causes)
PARTS = (
    Step("correctness", REST, 240, CORRECTNESS, None),
    Step("stress", REST, 240, "random shapes beside a busy neighbour, several streams, compute-sanitizer", stressed),
    Step("micro", REST, 60, "exchange and constants, and the first call in a process", micros),
    Step("race", REST, 120, "every suite by every arm, checked, then timed", raced),
    Step("tune", REST, 120, "the choices that the planner ranks highest, against each other", tuned),
)
STEPS = {step.name: step for step in (*FIRST, CAUSES, *PARTS)}
