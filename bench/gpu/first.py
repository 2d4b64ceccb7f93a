"""The first minutes on a GPU: does it run, is it right, what does an exchange cost, how fast is it beside torch.

    make gpu ARGS=first                          at most 8 minutes, by this program's own clock
    make gpu ARGS="first --minutes 4"            the same order, cut where the time is over
    make rehearse ARGS=first                     every line of it on a CPU

Each step is a process of its own (`bench.gpu.first_steps`, the tests under pytest). What it finds is in the results
file at once; one that hangs, dies or is too slow is killed with its process group, leaves a line that says so, and the
next one begins. Within a step the item that did it is left out, and the others go on in another process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import first_steps, recorder, smoke
from bench.report import provenance, results
from bench.report.results import Stress, Timing

if TYPE_CHECKING:
    from bench.gpu.command import Run

START = 15  # seconds: this program's own imports, the driver, the end
LEAST = 15  # below so many seconds a step is not begun
CACHE = Path("runs") / "first-cache"
NOT_RUN = "not run: "
# What the names of the most telling tests contain, the first of them first.
TELLING = (
    "test_results_do_not_change", "test_many_slices", "test_a_wait_that_runs_out", "test_nan_and_inf",
    "test_two_dimensions", "test_stacks_keep", "test_cuts_keep", "test_the_host_never_waits", "test_two_streams",
    "test_only_a_new_class", "test_resets_cost", "test_streamed",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """seconds: of the whole step, at most; item: of one of its items, at most. beside: runs beside the next one."""

    name: str
    seconds: int
    item: int
    what: str
    beside: bool = False


STEPS = (
    Step("machine", 30, 15, "device, versions, clocks; cooperative launch, pinned memory", beside=True),
    Step("compile", 60, 60, "all kernels that follow, on all cores"),
    Step("smoke", 60, 20, f"{len(smoke.SMOKE)} cases against float64, from the simplest up"),
    Step("exchange", 40, 10, "both protocols among 4, 16, 64 and 128 programs"),
    Step("constants", 20, 10, "clock, L2, shared memory, barrier, launch, memory"),
    Step("race-1", 60, 25, "persistrnn and torch, checked, then timed: fp16 and bf16"),
    Step("race-2", 60, 25, "layers, directions, small batches"),
    Step("race-3", 60, 25, "one step, fp32, resets, lengths"),
    Step("tests", 60, 60, "the GPU tests, the most telling first, until the time is over"),
)
CAUSES = Step("causes", 60, 15, "only where smoke is red: what the first red case depends on")


def plan(minutes: float) -> list[tuple[Step, float]]:
    """Each step and its seconds, 0 where none are left: what comes last is cut first, and the tests take the rest."""
    left, found = 60 * minutes - START, []
    for step in STEPS:
        seconds = left if step.name == "tests" else min(step.seconds, left)
        seconds = seconds if seconds >= LEAST else 0.0
        found.append((step, seconds))
        left -= 0 if step.beside else seconds
    return found


def printed(minutes: float) -> str:
    """The plan; what a step does not need goes to those that follow."""
    lines = [f"{START:5.0f} s  start and end"]
    for step, seconds in plan(minutes):
        time_of = "beside the next" if step.beside else f"{seconds:5.0f} s"
        lines.append(f"{time_of if seconds else 'only if time is left'}  {step.name}: {step.what}")
    lines.append(f"in place of what follows, {CAUSES.seconds} s  {CAUSES.name}: {CAUSES.what}")
    total = START + sum(seconds for step, seconds in plan(minutes) if not step.beside)
    return "\n".join([*lines, f"{total:5.0f} s at most"])


class Child:
    """A step's process, with the journal that it writes."""

    def __init__(self, step: Step, command: list[str], until: float, journal: Path, running: Path) -> None:
        self.step, self.until, self.journal, self.running = step, until, journal, running
        self.read, self.started = 0, time.monotonic()
        self.item, self.since = "", self.started
        self.how = ""  # how it was ended, or ended badly
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("TRITON_CACHE_DIR", str(provenance.ROOT / CACHE))
        if step.name == "compile":
            environment.pop("TRITON_INTERPRET", None)  # which compiles nothing
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            command, cwd=provenance.ROOT, env=environment, start_new_session=True, stderr=self.errors
        )

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
        late = now >= self.until
        if late or (item and now - self.since >= self.step.item):
            seconds = now - (self.since if item else self.started)
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

    def said(self) -> str:
        """Once, after its end: the end of what it wrote to stderr, which is shown here as well."""
        with self.errors as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("Extension modules:"))
        if text:
            print(text, file=sys.stderr)
        return text.strip()[-1000:]


def journal_of(results_file: Path, step: str) -> Path:
    return results_file.with_name(f"{results_file.stem}-{step}.journal")


def set_aside(path: Path) -> str:
    """Move a file away that a kill has cut short; what to say about it, "" if it is whole, or not there."""
    try:
        results.load(path)
    except FileNotFoundError:
        return ""
    except ValueError as error:
        broken = path.with_suffix(".broken")
        os.replace(path, broken)
        return f"{broken.name} is what was there, and no results file: {error}"
    return ""


class First:
    """One run of all steps."""

    def __init__(self, run: Run, tests: tuple[str, ...]) -> None:
        self.run, self.tests = run, tests
        self.end = time.monotonic() + 60 * run.arguments.minutes - START
        stress = run.results.stress
        stress[:] = [entry for entry in stress if not entry.name.startswith(NOT_RUN)]
        self.tried: set[str] = set()
        self.left: list[str] = []  # tests without an outcome

    # -- what is found

    def note(self, name: str, ok: bool, seconds: float, message: str) -> None:
        self.run.add(Stress(name, ok, seconds, message))
        self.tried.add(name)
        if not ok:
            say(f"{name}: {'' if name.startswith(NOT_RUN) else 'WRONG: '}{message}")

    def fold(self, journal: Path, start: int, ended: bool) -> int:
        """Take what a journal has from ``start`` on into the results; where the next reading starts."""
        try:
            content = journal.read_bytes()[start:]
        except FileNotFoundError:
            return start
        whole, _, rest = content.rpartition(b"\n")
        for text in whole.splitlines():
            try:
                entry = results.entry(text.decode())
                self.run.results.add(entry)
            except ValueError as error:  # a speed without its check, say
                self.note(f"{journal.stem}: an entry", False, 0.0, str(error))
                continue
            if isinstance(entry, Stress):
                self.tried.add(entry.name)
        if whole:
            self.run.save()
        if ended:
            if rest:
                self.note(f"{journal.stem}: journal", False, 0.0, f"cut short by a kill; its last line is {rest!r}")
            journal.unlink()
        return start + len(content) - len(rest)

    def done(self) -> set[str]:
        """What is not run: all that was tried in this run, and what was green, or raced, in an earlier one. Kernels are
        compiled again: this machine may be another one."""
        before = recorder.outcomes(self.run.results)
        kept = {name for name, ok in before.items() if ok or name.startswith("race-")}
        return self.tried | {name for name in kept if not name.startswith("compile:")}

    # -- processes

    def command(self, step: Step, until: float, red: str) -> list[str]:
        path, options = self.run.path, self.run.arguments
        names = path.with_name(f"{path.stem}.done")
        names.write_text("\n".join(sorted(self.done())))
        command = [
            sys.executable,
            "-m",
            "bench.gpu.first_steps",
            step.name,
            "--journal",
            str(journal_of(path, step.name)),
        ]
        command += ["--until", str(until - 2), "--done", str(names), "--red", red]
        command += ["--rehearse", options.rehearse] if options.rehearse else []
        return command + (["--inject", *options.inject] if options.inject else [])

    def begin(self, step: Step, until: float, red: str = "") -> Child:
        journal = journal_of(self.run.path, step.name)
        first_steps.running(journal).unlink(missing_ok=True)
        return Child(step, self.command(step, until, red), until, journal, first_steps.running(journal))

    def watch(self, steps: list[tuple[Step, float]], red: str = "") -> None:
        """Run steps beside each other, each again without the item that ended it, until they are through."""
        limits = {step.name: time.monotonic() + seconds for step, seconds in steps}
        children = [self.begin(step, limits[step.name], red) for step, _ in steps]
        try:
            while children:
                time.sleep(0.05)
                for child in list(children):
                    over = child.over()
                    child.read = self.fold(child.journal, child.read, over)
                    if not over:
                        continue
                    children.remove(child)
                    if self.ended(child) and child.until - time.monotonic() >= LEAST:
                        children.append(self.begin(child.step, child.until, red))
        finally:
            for child in children:  # on the way out by an exception
                child.kill()
                child.said()

    def ended(self, child: Child) -> bool:
        """Note how a process ended; whether there are items left for another one."""
        said = child.said()
        item, *left = child.state() or [""]
        child.running.unlink(missing_ok=True)
        # Of a lost device the item has told already.
        if child.how and child.process.returncode != first_steps.LOST:
            name = f"{child.step.name}: {item}" if item else child.step.name
            self.note(name, False, time.monotonic() - child.since, f"{child.how}. {said}".strip())
        again = bool(child.how and left and child.until - time.monotonic() >= LEAST)
        if left and not again:
            self.note(NOT_RUN + child.step.name, False, 0.0, f"its time was over: {'; '.join(left)}"[:2000])
        return again

    def pytest(self, until: float) -> bool:
        """The GPU tests until then, or until one hangs or dies; whether some are left."""
        run, path = self.run, self.run.path
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *self.tests]
        collected = path.with_name(f"{path.stem}.collected")
        if run.hardware is not None:
            command += ["--collect-only", "-qq"]
        else:
            minutes = str(max(until - time.monotonic() - 10, 1) / 60)
            command += ["-p", "bench.gpu.recorder", "--outcomes", str(path.resolve()), "--within", minutes, "--tb=line"]
            command += ["-q", "--collected", str(collected), "--telling", *TELLING]
        run.save()
        recorder.running(path).unlink(missing_ok=True)
        child = Child(STEPS[-1], command, until, path, recorder.running(path))
        while not child.over():
            time.sleep(0.05)
        said, (item, *_) = child.said(), child.state() or [""]
        child.running.unlink(missing_ok=True)
        broken = set_aside(path)
        if broken:
            run.save()  # what was known before
            self.note("tests: results", False, 0.0, broken)
        run.reload()
        # 1: some are red, which stands in the file; 5: none are left.
        if child.how and child.process.returncode not in (1, 5):
            seconds = time.monotonic() - child.since
            cut = time.monotonic() >= until and item and seconds < child.step.item / 2
            if not cut:  # no fault of a test that was begun late
                self.note(item or "tests", False, seconds, f"{child.how}. {said}".strip())
        names = collected.read_text().splitlines() if collected.exists() else []
        self.left = [name for name in names if name not in recorder.outcomes(run.results)]
        return bool(self.left and item)

    # -- all of it

    def all(self, broken: str = "") -> bool:
        """Whether all that was run is right. broken: what was found in place of the results file."""
        options = self.run.arguments
        if broken:
            self.note("results", False, 0.0, broken)
        for journal in self.run.path.parent.glob(f"{self.run.path.stem}-*.journal"):  # of a run that was killed
            self.fold(journal, 0, True)
        say(f"the plan:\n{printed(options.minutes)}")
        stopped, waiting = "", []
        for step in STEPS:
            if options.steps and step.name not in options.steps:
                continue
            seconds = min(step.seconds, self.end - time.monotonic())
            if stopped or seconds < LEAST:
                self.note(NOT_RUN + step.name, False, 0.0, stopped or "no time was left")
                continue
            if step.beside:
                waiting.append((step, seconds))
                continue
            start = time.monotonic()
            if step.name == "tests":
                while self.pytest(self.end) and self.end - time.monotonic() >= LEAST:
                    pass
            else:
                self.watch([*waiting, (step, seconds)])
                waiting = []
            say(f"== {step.name}: {time.monotonic() - start:.0f} s")
            if step.name == "smoke":
                stopped = self.after_smoke()
        if waiting:  # beside nothing
            self.watch(waiting)
        files = Counter(name.partition("::")[0] for name in self.left)
        for file, count in files.items():
            self.note(f"{NOT_RUN}{file}", False, 0.0, f"{count} tests: no time was left, or they were skipped")
        for suffix in ("done", "collected"):
            self.run.path.with_name(f"{self.run.path.stem}.{suffix}").unlink(missing_ok=True)
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
            self.watch([(CAUSES, seconds)], red[0])
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
