"""The first minutes on a GPU: does it run, is it right, what does an exchange cost, how fast is it beside torch.

    make gpu ARGS=first                          at most 8 minutes, by this program's own clock
    make gpu ARGS="first --minutes 4"            the same order, cut where the time is over
    make rehearse ARGS=first                     every line of it on a CPU

Each step is a process of its own (`bench.gpu.first_steps`, the tests under pytest), which puts what it finds into the
results file at once. One that hangs, dies or is too slow is killed with its process group, leaves a line that says so,
and the next one begins. Within a step the item that did it is left out, and the others go on in another process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import first_steps, recorder, smoke
from bench.report import provenance
from bench.report.results import Stress, Timing

if TYPE_CHECKING:
    from bench.gpu.command import Run

START = 15  # seconds: this program's own imports, the driver, the end
LEAST = 15  # below so many seconds a step is not begun
NOT_RUN = "not run: "
# What the names of the most telling tests contain, the first of them first.
TELLING = (
    "test_results_do_not_change", "test_many_slices", "test_a_wait_that_runs_out", "test_nan_and_inf",
    "test_two_dimensions", "test_stacks_keep", "test_cuts_keep", "test_the_host_never_waits", "test_two_streams",
    "test_only_a_new_class", "test_resets_cost", "test_streamed",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """seconds: of the whole step, at most; item: of one of its items, at most. told: exit statuses that say no more
    than the results."""

    name: str
    seconds: int
    item: int
    what: str
    told: tuple[int, ...] = (first_steps.LOST,)


STEPS = (
    Step("machine", 30, 15, "device, versions, clocks; cooperative launch, pinned memory"),
    Step("smoke", 90, 20, f"{len(smoke.SMOKE)} cases against float64, from the simplest up"),
    Step("exchange", 50, 10, "both protocols among 4, 16, 64 and 128 programs"),
    Step("constants", 30, 10, "clock, L2, shared memory, barrier, launch, memory"),
    Step("race-1", 60, 25, "persistrnn and torch, checked, then timed: fp16 and bf16"),
    Step("race-2", 60, 25, "layers, directions, small batches"),
    Step("race-3", 60, 25, "one step, fp32, resets, lengths"),
    Step("tests", 60, 60, "the GPU tests, the most telling first, until the time is over", (1, 5)),
)
CAUSES = Step("causes", 60, 15, "only where smoke is red: what the first red case depends on")


def plan(minutes: float) -> list[tuple[Step, float]]:
    """Each step and its seconds, 0 where none are left: what comes last is cut first, and the tests take the rest."""
    left, found = 60 * minutes - START, []
    for step in STEPS:
        seconds = left if step.name == "tests" else min(step.seconds, left)
        seconds = seconds if seconds >= LEAST else 0.0
        found.append((step, seconds))
        left -= seconds
    return found


def printed(minutes: float) -> str:
    """The plan; what a step does not need goes to those that follow."""
    lines = [f"{START:5.0f} s  start and end"]
    for step, seconds in plan(minutes):
        time_of = f"{seconds:5.0f} s" if seconds else "only if time is left"
        lines.append(f"{time_of}  {step.name}: {step.what}")
    lines.append(f"in place of what follows, {CAUSES.seconds} s  {CAUSES.name}: {CAUSES.what}")
    total = START + sum(seconds for _, seconds in plan(minutes))
    return "\n".join([*lines, f"{total:5.0f} s at most"])


class Child:
    """A step's process. running: the file in which it says what it is at."""

    def __init__(self, step: Step, command: list[str], until: float, running: Path) -> None:
        self.step, self.until, self.running = step, until, running
        self.started = time.monotonic()
        self.item, self.since = "", self.started
        self.how = ""  # how it was ended, or ended badly
        self.late = False  # whether its item was begun too late, and is not to blame
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        running.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            command, cwd=provenance.ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
            stderr=self.errors,
        )  # fmt: skip

    def state(self) -> list[str]:
        """The item that is running ("": none), and those that are left."""
        try:
            return self.running.read_text().split("\n")
        except FileNotFoundError:
            return []

    def over(self) -> bool:
        """Whether it has ended; one that takes too long is ended here."""
        status = self.process.poll()
        if status is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # what it had started
            if status != 0:
                self.how = f"died by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            return True
        now, item = time.monotonic(), (self.state() or [""])[0]
        if item != self.item:
            self.item, self.since = item, now
        seconds = now - (self.since if item else self.started)
        if now >= self.until or (item and seconds >= self.step.item):
            self.late = bool(item) and seconds < self.step.item / 2
            self.how = f"was killed after {seconds:.0f} s: it hung, or was too slow"
            self.kill()
            return True
        return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # stuck in the driver of the device
            self.how += "; not even a kill ends it"

    def wait(self) -> None:
        try:
            while not self.over():
                time.sleep(0.05)
        except BaseException:  # an interrupt, say
            self.kill()
            raise

    def said(self) -> str:
        """Once, after its end: the end of what it wrote to stderr, which is shown here as well."""
        with self.errors as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("Extension modules:"))
        if text:
            print(text, file=sys.stderr)
        return text.strip()[-1000:]


class First:
    """One run of all steps."""

    def __init__(self, run: Run, tests: tuple[str, ...]) -> None:
        self.run, self.tests = run, tests
        self.end = time.monotonic() + 60 * run.arguments.minutes - START
        stress = run.results.stress
        stress[:] = [entry for entry in stress if not entry.name.startswith(NOT_RUN)]
        run.save()
        self.tried: set[str] = set()

    # -- what is found

    def note(self, name: str, ok: bool, seconds: float, message: str) -> None:
        self.run.add(Stress(name, ok, seconds, message))
        self.tried.add(name)
        if not ok:
            say(f"{name}: {'' if name.startswith(NOT_RUN) else 'WRONG: '}{message}")

    def done(self) -> set[str]:
        """What is not run: all that was tried in this run, and what was green, or raced, in an earlier one."""
        before = recorder.outcomes(self.run.results)
        return self.tried | {name for name, ok in before.items() if ok or name.startswith("race-")}

    # -- processes

    def command(self, step: Step, until: float, red: str) -> list[str]:
        path, options = self.run.path, self.run.arguments
        if step.name == "tests":
            command = [sys.executable, "-m", "pytest", "-m", "gpu", *self.tests]
            if self.run.hardware is not None:
                return [*command, "--collect-only", "-qq"]
            minutes = str(max(until - time.monotonic() - 10, 1) / 60)
            command += ["-p", "bench.gpu.recorder", "--outcomes", str(path.resolve()), "--within", minutes]
            command += [f"--deselect={name}" for name in sorted(self.tried) if "::" in name]
            return [*command, "-q", "--tb=line", "--telling", *TELLING]
        names = path.with_name(f"{path.stem}.done")
        names.write_text("\n".join(sorted(self.done())))
        command = [sys.executable, "-m", "bench.gpu.first_steps", step.name, "--output", str(path)]
        command += ["--until", str(until - 2), "--done", str(names), "--red", red]
        command += ["--rehearse", options.rehearse] if options.rehearse else []
        return command + (["--inject", *options.inject] if options.inject else [])

    def watch(self, step: Step, seconds: float, red: str = "") -> None:
        """Run a step, and again without the item that ended it, until it is through."""
        until, again = time.monotonic() + seconds, True
        while again:
            child = Child(step, self.command(step, until, red), until, recorder.running(self.run.path))
            child.wait()
            again = self.ended(child)

    def ended(self, child: Child) -> bool:
        """Take what a process found, and note how it ended; whether there are items left for another one."""
        said, count = child.said(), len(self.run.results.stress)
        self.run.reload()
        self.tried |= {entry.name for entry in self.run.results.stress[count:]}
        item, *left = child.state() or [""]
        child.running.unlink(missing_ok=True)
        if child.late:
            item, left = "", [item, *left]
        elif child.how and child.process.returncode not in child.step.told:
            name = f"{child.step.name}: {item}" if item and "::" not in item else item or child.step.name
            self.note(name, False, time.monotonic() - child.since, f"{child.how}. {said}".strip())
        again = bool(child.how and left and child.until - time.monotonic() >= LEAST)
        if left and not again:
            self.note(NOT_RUN + child.step.name, False, 0.0, f"its time was over: {'; '.join(left)}"[:2000])
        return again

    # -- all of it

    def all(self) -> bool:
        """Whether all that was run is right."""
        options = self.run.arguments
        say(f"the plan:\n{printed(options.minutes)}")
        stopped = ""
        for step in STEPS:
            if options.steps and step.name not in options.steps:
                continue
            left = self.end - time.monotonic()
            seconds = left if step.name == "tests" else min(step.seconds, left)
            if stopped or seconds < LEAST:
                self.note(NOT_RUN + step.name, False, 0.0, stopped or "no time was left")
                continue
            start = time.monotonic()
            self.watch(step, seconds)
            say(f"== {step.name}: {time.monotonic() - start:.0f} s")
            if step.name == "smoke":
                stopped = self.after_smoke()
        self.run.path.with_name(f"{self.run.path.stem}.done").unlink(missing_ok=True)
        self.run.results.provenance = replace(self.run.results.provenance, clocks_after=provenance.clock())
        self.run.save()
        say(self.summary())
        return not any(name in self.tried or "::" in name for name, ok in self.outcomes().items() if not ok)

    def outcomes(self) -> dict[str, bool]:
        found = recorder.outcomes(self.run.results)
        return {name: ok for name, ok in found.items() if not name.startswith(NOT_RUN)}

    def after_smoke(self) -> str:
        """Run the variants of the first red case, if any; why all else had better not be run, or ""."""
        found = self.outcomes()
        red = [one.name for one in smoke.SMOKE if found.get(f"smoke: {one.name}") is False]
        if not red:
            return ""
        seconds = min(CAUSES.seconds, self.end - time.monotonic())
        if seconds >= LEAST:
            self.watch(CAUSES, seconds, red[0])
        return f"the simplest cases are wrong: {red[0]}" if red[0] in smoke.FIRST else ""

    def summary(self) -> str:
        """What whoever has the GPU must know at once."""
        found, lines = self.outcomes(), []
        messages = {entry.name: entry.message for entry in self.run.results.stress if not entry.ok}
        for step in (*STEPS, CAUSES):
            some = [ok for name, ok in found.items() if name.startswith(f"{step.name}:")]
            if some:
                lines.append(f"{step.name}: {sum(some)} of {len(some)} ok")
        tests = [ok for name, ok in found.items() if "::" in name]
        lines += [f"tests: {sum(tests)} of {len(tests)} ok"] if tests else []
        lines += [f"{t.case.key}, {t.arm}: {t.per_step:.3f} us per step" for t in measured(self.run.results.timings)]
        lines += [f"{name}: {message[:300]}" for name, message in messages.items()]
        return "\n".join(["what was found:", *lines])


def measured(timings: list[Timing]) -> list[Timing]:
    return [timing for timing in timings if not timing.skipped]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
