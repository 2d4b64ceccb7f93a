"""The one GPU command: correctness, stress, microbenchmarks, race and tuning into one results file.

    make gpu                                     every part, each within nine minutes
    make gpu ARGS="race --dtype bf16"            one part; what the file already has is not repeated
    make gpu ARGS=first                          before all else: what eight minutes can tell (`bench.gpu.first`)
    make rehearse                                no GPU: every path but the launch, predictions, no speeds

A part that ends early, or is killed, goes on where it stopped when it is called again with the same file. The exit
status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import UsageError
from bench.gpu import first, micro, recorder, stress, tune
from bench.race import engine as race
from bench.race import suites
from bench.report import provenance, results
from bench.report.results import ARMS, DTYPES, Micro, Results, Stress
from persistrnn.kernels import launch
from persistrnn.kernels.planner import hardware as devices

ROOT = Path(__file__).resolve().parents[2]  # bench may be a link
TESTS = tuple(f"tests/kernels/test_gpu{name}.py" for name in ("", "_pipeline", "_cuts", "_memory", "_gsan"))
PARTS = ("correctness", "stress", "micro", "race", "tune")
# A part is stopped so many minutes after it should have ended.
GRACE = 1.0
# Appended to the path: the checkout's persistrnn lacks the kernels, the one that runs this has them.
RACE = ("bench/race/test_race.py", "--import-mode=append", "--benchmark-only")
FIRST_CALL = """
import time, torch, persistrnn
layer = persistrnn.LSTM(1024, 1024, device="cuda", dtype=torch.bfloat16, backend="persistent")
x = torch.randn(64, 16, 1024, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
before = time.perf_counter()
layer(x)[0].sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - before)
"""


class Run:
    """One results file, and the clock of the present part."""

    def __init__(self, path: Path, device: torch.device, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
        self.path, self.device, self.arguments = path, device, arguments
        self.hardware = devices.named(arguments.rehearse) if arguments.rehearse else None
        now = provenance.provenance(device, ["python", "-m", "bench.gpu", *argv], arguments.commit)
        self.results = results.load(path) if path.exists() else Results(now)
        provenance.refuse_another(path, self.results.provenance, now)
        self.save()

    def save(self) -> None:
        self.results.save(self.path)

    def reload(self) -> None:
        """What a process of our own has added."""
        self.results = results.load(self.path)

    def add(self, entry: Micro | Stress | results.Tuning | results.Timing) -> None:
        self.results.add(entry)
        self.save()

    def deadline(self) -> float:
        return time.monotonic() + 60 * self.arguments.minutes

    def pytest(self, name: str, *arguments: str) -> bool:
        """A suite in a process of its own, stopped if it hangs; whether all of it passed."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *arguments]
        self.save()
        recorder.running(self.path).unlink(missing_ok=True)
        limit = 60 * (self.arguments.minutes + GRACE)
        start, status = time.monotonic(), -1
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
            how = f"died with status {status}"
        except subprocess.TimeoutExpired:
            how = f"was killed after {limit:.0f} s: it hung, or was too slow"
        self.reload()
        at = recorder.running(self.path)
        if status < 0 or at.exists():
            where = at.read_text() if at.exists() else name
            self.add(Stress(where, False, time.monotonic() - start, f"{name} {how}"))
        return status == 0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def correctness(run: Run) -> bool:
    """Every test that needs a GPU."""
    if run.hardware is not None:
        return run.pytest("tests", *TESTS, "--collect-only", "-q")
    minutes = str(run.arguments.minutes)
    names = ("-p", "bench.gpu.recorder", "--outcomes", str(run.path.resolve()), "--within", minutes)
    return run.pytest("tests", *TESTS, *names, "-v", "--tb=short")


def stress_part(run: Run) -> bool:
    """Random shapes, neighbours and the sanitizer."""
    green, deadline = True, run.deadline()
    seconds = min(stress.SECONDS, 60 * run.arguments.minutes / len(stress.ITEMS))
    if run.hardware is not None:
        say(f"random shapes: {stress.random_shapes(run.device, 2.0, largest=20, longest=4)}; nothing kept")
        return True
    before = recorder.outcomes(run.results)
    for name, item in stress.ITEMS.items():
        if before.get(name):
            continue
        if time.monotonic() >= deadline:
            say(f"stress: out of time before {name}")
            continue
        start = time.monotonic()
        try:
            message, ok = item(run.device, seconds), True
        except Exception as error:  # whatever it is, the other items still have their turn
            message, ok = _words(error), False
        run.add(Stress(name, ok, time.monotonic() - start, message))
        say(f"{name}: {'ok' if ok else 'WRONG'}: {message}")
        green &= ok
    return green


def micro_part(run: Run) -> bool:
    """What the plan's constants are, and the first call in a process."""
    if run.hardware is not None:
        say(f"micro: {race.REHEARSED}; tests/bench/gpu/test_micro.py runs its kernels in the interpreter")
        return True
    done = {(entry.name, entry.programs, entry.payload) for entry in run.results.micro}
    if ("first call", 1, 0) not in done:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-c", FIRST_CALL]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if found.returncode != 0:
            raise RuntimeError(f"the first call failed with status {found.returncode}: {found.stderr[-1500:]}")
        seconds = float(found.stdout.split()[-1])
        run.add(Micro("first call", 1, 0, seconds, seconds, seconds, "s", 1))
        say(f"first forward and backward in a process, LSTM H=1024, compiling included: {seconds:.1f} s")
    left = micro.measure(run.add, done, run.device, say, run.deadline())
    if left:
        say(f"micro: out of time before {', '.join(left)}")
    return True


def race_part(run: Run) -> bool:
    """The suites: every arm on every case. What was found wrong before stays wrong: it is not run again."""
    options = run.arguments
    if run.hardware is not None:
        cases = suites.cases(options.suite, options.dtype)
        for case in cases:
            if run.results.timing(case, "persistrnn") is None:
                run.results.add(race.skipped(case, "persistrnn", race.REHEARSED, run.hardware))
        run.save()
        say(f"race: {len(cases)} cases predicted for {run.hardware.name}; some in miniature:")
        with tempfile.TemporaryDirectory() as folder:
            small = ("--rehearse", "--output", f"{folder}/rehearsal.json", "--suite", "models", "--dtype", "fp16")
            # Quiet: the interpreter's times are not anyone's.
            return run.pytest("race", *RACE, "--benchmark-quiet", "-q", "-rN", *small)
    names = ("--output", str(run.path.resolve()), "--minutes", str(options.minutes), "-v")
    chosen = ("--suite", *options.suite, "--dtype", *options.dtype, "--arm", *options.arm)
    passed = run.pytest("race", *RACE, *names, *chosen, "--benchmark-columns=median,iqr,rounds")
    return passed and all(check.ok for check in run.results.checks)


def tune_part(run: Run) -> bool:
    """The planner's best choices against each other."""
    if run.hardware is not None:
        for case in tune.cases():
            count = [len(tune.ranked(case, backward, run.hardware)) for backward in (False, True)]
            say(f"tune: {case.key}: {count[0]} choices forward, {count[1]} backward")
        return True
    done = {(entry.case.key, entry.backward, entry.choice) for entry in run.results.tuning}
    left = tune.tune(run.add, done, run.device, say, run.deadline())
    if left:
        say(f"tune: out of time before {len(left)} choices")
    return True


DO: dict[str, Callable[[Run], bool]] = dict(
    zip(PARTS, (correctness, stress_part, micro_part, race_part, tune_part), strict=True)
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all); or first")
    p.add_argument("--output", type=Path, help="the file (default: bench/results/DEVICE-COMMIT.json)")
    p.add_argument("--minutes", type=float, default=8.0, help="per part, of first in all (default: 8)")
    p.add_argument("--suite", nargs="+", choices=list(suites.SUITES), default=list(suites.SUITES))
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp16", "tf32", "fp32"])
    p.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    p.add_argument("--commit", default="", help="what is checked out, where git cannot say")
    p.add_argument("--steps", nargs="+", choices=[step.name for step in first.STEPS], help="of first, only these")
    p.add_argument("--inject", nargs="+", default=[], help=argparse.SUPPRESS)  # "step: item=hang", die, wrong or cut
    p.add_argument("--rehearse", choices=sorted(devices.DEVICES), help="no GPU: predict for this one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    argv = sys.argv[1:] if argv is None else argv
    arguments = p.parse_args(argv)
    alone = arguments.parts == ["first"]
    for part in () if alone else arguments.parts:
        if part not in PARTS:
            p.error(f"PART must be of {', '.join(PARTS)}, or first alone, got {part!r}")
    if (arguments.steps or arguments.inject) and not alone:
        p.error("--steps is of first alone")
    if not 0 < arguments.minutes <= 60:
        p.error(f"--minutes must be above 0 and at most 60, got {arguments.minutes}")
    if arguments.rehearse is None and not torch.cuda.is_available():
        p.error("torch sees no CUDA device; run this on a machine with one, or --rehearse h200 without")
    if arguments.rehearse is not None and not launch.INTERPRETED:
        p.error("--rehearse runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1 (make rehearse does)")
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    path = arguments.output
    if path is None:
        name = provenance.provenance(device, [], arguments.commit)
        what = f"rehearsal-{arguments.rehearse}" if arguments.rehearse else name.device
        path = ROOT / "bench" / "results" / f"{'-'.join(what.lower().split())}-{name.commit[:8]}.json"
    broken = first.set_aside(path) if alone else ""
    try:
        run = Run(path, device, arguments, argv)
    except (UsageError, ValueError, OSError) as error:
        p.error(str(error))
    say(f"{run.results.provenance.device}, results in {path}")
    if alone:
        return 0 if first.First(run, TESTS).all(broken) else 1
    green = True
    for part in arguments.parts or PARTS:
        start = time.monotonic()
        try:
            ok = DO[part](run)
        except Exception as error:  # the other parts still have their turn
            ok = False
            run.add(Stress(part, False, time.monotonic() - start, _words(error)))
            traceback.print_exc()
        say(f"== {part}: {'ok' if ok else 'NOT OK'}, {time.monotonic() - start:.0f} s")
        green &= ok
    run.results.provenance = replace(run.results.provenance, clocks_after=provenance.clock())
    run.save()
    say(f"{path}: {len(run.results.timings)} timings, {len(run.results.stress)} outcomes; bench.report draws it")
    return 0 if green else 1
