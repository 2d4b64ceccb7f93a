"""Runs steps, each in a process of its own, into one results file.

What a step finds is in the file at once. A process that hangs, dies or is too slow is killed with all that it has
started and leaves a line that says so; the item that did it is left out, and the others go on in another process. What
was begun when the time was nearly over is not wrong, and its turn comes with the next run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu import micro, smoke
from bench.gpu.journal import Task, outcomes
from bench.gpu.steps import CAUSES, REST, ROOT, STEPS, TESTS, Step
from bench.gpu.worker import LOST
from bench.report import provenance, results
from bench.report.results import Results, Stress

START = 15  # seconds: this program's own imports, the driver, the end
LEAST = 15  # below so many seconds a step is not begun
CACHE = Path("runs") / "first-cache"
NOT_RUN = "not run: "


def printed(steps: Sequence[Step], minutes: float) -> str:
    """The plan; what a step does not need goes to those that follow."""
    lines = [f"{START:5d} s  start and end"]
    for step in steps:
        seconds = "what is left" if step.seconds == REST else f"{step.seconds:5d} s"
        lines.append(f"{seconds}  {step.name}: {step.what}")
    lines.append(f"in place of what follows, {CAUSES.seconds} s  {CAUSES.name}: {CAUSES.what}")
    return "\n".join([*lines, f"{60 * minutes:5.0f} s at most: what comes last is cut first"])


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Child:
    """A step's process."""

    def __init__(self, step: Step, task: Task, command: list[str], until: float) -> None:
        self.step, self.task, self.until = step, task, until
        self.item, self.since = "", time.monotonic()
        self.how = ""  # how it was ended, or ended badly
        self.cut = False  # the time of the whole step was over
        task.save()
        task.running.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("TRITON_CACHE_DIR", str(ROOT / CACHE))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=self.errors)

    def state(self) -> list[str]:
        """The item that is running ("": none), and those that are left; empty: none is."""
        try:
            return self.task.running.read_text().split("\n")
        except FileNotFoundError:
            return []

    def over(self) -> bool:
        """Whether it has ended; one that takes too long is ended here."""
        status = self.process.poll()
        if status is not None:
            self.kill()
            if status != 0:
                self.how = f"died by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            return True
        now, item = time.monotonic(), (self.state() or [""])[0]
        if item != self.item:
            self.item, self.since = item, now
        slow = bool(item) and now - self.since >= self.step.item
        if now < self.until and not slow:
            return False
        self.cut = now - self.since < self.step.item / 2
        self.how = f"was killed after {now - self.since:.0f} s: it hung, or was too slow"
        self.kill()
        return True

    def kill(self) -> None:
        """End it with all that it has started; of one that has ended, what it had started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # stuck in the driver of the device
            self.how += "; not even a kill ends it"

    def stderr(self) -> str:
        """Once, after its end: the end of what it wrote there, which is shown here as well."""
        with self.errors as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("Extension modules:"))
        if text:
            print(text, file=sys.stderr)
        return text.strip()[-1000:]


class Run:
    """Steps into one results file. options: those of the command."""

    def __init__(self, path: Path, found: Results, options: Namespace) -> None:
        self.path, self.results, self.options = path.resolve(), found, options
        found.stress[:] = [entry for entry in found.stress if not entry.name.startswith(NOT_RUN)]
        self.tried: set[str] = set()
        self.end = 0.0  # of the present group of steps
        self.results.save(path)

    # -- what is found

    def note(self, name: str, ok: bool, seconds: float, message: str) -> None:
        self.results.add(Stress(name, ok, seconds, message))
        self.results.save(self.path)
        self.tried.add(name)
        if not ok:
            say(f"{name}: {'' if name.startswith(NOT_RUN) else 'WRONG: '}{message}")

    def journal(self, step: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{step}.journal")

    def fold(self, step: str, start: int, ended: bool) -> int:
        """Take what a journal has from ``start`` on into the results; where the next reading starts."""
        journal = self.journal(step)
        try:
            content = journal.read_bytes()[start:]
        except FileNotFoundError:
            return start
        whole, _, rest = content.rpartition(b"\n")
        for text in whole.splitlines():
            try:
                entry = results.entry(text.decode())
                self.results.add(entry)
            except ValueError as error:  # a speed without its check, say
                self.note(f"{step}: an entry", False, 0.0, str(error))
                continue
            if isinstance(entry, Stress):
                self.tried.add(entry.name)
        if whole:
            self.results.save(self.path)
        if ended:
            if rest:
                self.note(f"{step}: journal", False, 0.0, f"cut short by a kill; its last line is {rest!r}")
            journal.unlink()
        return start + len(content) - len(rest)

    def done(self, step: str) -> set[str]:
        """What is not run: all that was tried in this run, and what was green, raced or measured in an earlier one.
        Kernels are compiled again: this machine may be another one."""
        before = {name for name, ok in outcomes(self.results).items() if ok or name.startswith("race")}
        found = {f"{timing.case.key}, {timing.arm}" for timing in self.results.timings}
        found |= {micro.title(one.name, one.programs, one.payload) for one in self.results.micro}
        kept = {name for name in before if not name.startswith("compile:")}
        return self.tried | kept | {f"{step}: {name}" for name in found}

    # -- processes

    def command(self, step: Step, task: Task) -> list[str]:
        if step.items is not None:
            return [sys.executable, "-m", "bench.gpu.worker", str(task.file)]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *TESTS, "-q", "--tb=line"]
        rehearsal = ["--collect-only", "-q"] if task.rehearse else []
        return [*command, *rehearsal, "-p", "bench.gpu.recorder", "--task", str(task.file)]

    def begin(self, step: Step, until: float, red: str) -> Child:
        given = self.options
        task = Task(
            step.name, str(self.journal(step.name)), until - 2, frozenset(self.done(step.name)), red,
            given.rehearse or "", given.minutes, given.suite, given.dtype, given.arm,
        )  # fmt: skip
        return Child(step, task, self.command(step, task), until)

    def watch(self, step: Step, seconds: float, red: str = "") -> None:
        """Run a step, again without the item that ended it, until it is through. red: as in ``Task``."""
        until = time.monotonic() + seconds
        again = True
        while again:
            child, read, over = self.begin(step, until, red), 0, False
            try:
                while not over:
                    time.sleep(0.05)
                    over = child.over()
                    read = self.fold(step.name, read, over)
            except BaseException:
                child.kill()
                raise
            again = self.ended(child)

    def ended(self, child: Child) -> bool:
        """Note how a process ended; whether there are items left for another one."""
        errors, name = child.stderr(), child.step.name
        item, *left = child.state() or [""]
        for file in (child.task.running, child.task.file):
            file.unlink(missing_ok=True)
        if child.cut:
            left = [item or "all of it", *left]
        # A lost device is in the outcome of its item.
        elif child.how and child.process.returncode != LOST:
            self.note(item or name, False, time.monotonic() - child.since, f"{child.how}. {errors}".strip())
        again = bool(child.how and left) and child.until - time.monotonic() >= LEAST
        if left and not again:
            self.note(NOT_RUN + name, False, 0.0, f"its time was over: {'; '.join(left)}"[:2000])
        return again

    # -- all of it

    def all(self, groups: Sequence[Sequence[Step]]) -> bool:
        """Run groups of steps, each within the minutes that were given; whether all that was run is right."""
        for step in STEPS:  # of a run that was killed
            self.fold(step, 0, True)
        for group in groups:
            self.end = time.monotonic() + 60 * self.options.minutes - START
            self.group(group)
        self.results.provenance = replace(self.results.provenance, clocks_after=provenance.clock())
        self.results.save(self.path)
        chosen = {step.name for group in groups for step in group} | {CAUSES.name}
        found = {name: ok for name, ok in outcomes(self.results).items() if name.partition(":")[0] in chosen}
        say(self.summary(found))
        return all(found.values())

    def group(self, steps: Sequence[Step]) -> None:
        stopped = ""
        for step in steps:
            start = time.monotonic()
            seconds = min(step.seconds, self.end - start)
            if stopped or seconds < LEAST:
                self.note(NOT_RUN + step.name, False, 0.0, stopped or "no time was left")
                continue
            self.watch(step, seconds)
            say(f"== {step.name}: {time.monotonic() - start:.0f} s")
            if step.name == "smoke":
                stopped = self.after_smoke()

    def after_smoke(self) -> str:
        """Run the variants of the first red case, if any; why all else had better not be run, or ""."""
        found = outcomes(self.results)
        red = [one.name for one in smoke.SMOKE if found.get(f"smoke: {one.name}") is False]
        if not red:
            return ""
        seconds = min(CAUSES.seconds, self.end - time.monotonic())
        if seconds >= LEAST:
            self.watch(CAUSES, seconds, red[0])
        return f"the simplest cases are wrong: {red[0]}" if red[0] in smoke.FIRST else ""

    def summary(self, found: dict[str, bool]) -> str:
        """What whoever has the GPU must know at once. found: the outcomes of the steps of this run."""
        lines = []
        for step in STEPS:
            some = [ok for name, ok in found.items() if name.startswith(f"{step}:")]
            if some:
                lines.append(f"{step}: {sum(some)} of {len(some)} ok")
        measured = [one for one in self.results.timings if not one.skipped]
        lines += [f"{one.case.key}, {one.arm}: {one.per_step:.3f} us per step" for one in measured[:50]]
        lines += [f"{one.name}: {one.message[:300]}" for one in self.results.stress if not one.ok]
        return "\n".join([f"what was found, in {self.path}:", *lines])
