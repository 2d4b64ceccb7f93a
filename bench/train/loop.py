"""The training loop: a run begins anew or where its checkpoint stands, takes its steps, saves, stops on a signal."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import UsageError
from bench.train import checkpoint, layers, ranks
from bench.train.checkpoint import ANEW
from bench.train.progress import PeakMemory, bar
from bench.train.ranks import say
from bench.train.run import Run
from bench.train.workload import Workload

BASELINE = "torch.nn"  # the folder, within that of the run, of what a comparison trains beside persistrnn


def look(program: type[Workload], folder: Path, resume: bool, overwrite: bool = False) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run that nothing unfinished stands in the way of."""
    if overwrite:  # whatever it is
        return None
    content: dict[str, Any] | None = ranks.by_first(lambda: checkpoint.load(folder))
    if content is None:
        return None
    if content.get("workload") != program.name:
        raise UsageError(
            f"{folder} holds a run of {content.get('workload', 'another program')}, this is {program.name}: {ANEW}"
        )
    if resume:
        return content
    done, steps = len(content["losses"]), content["settings"]["steps"]
    if done < steps:
        raise UsageError(
            f"{folder} holds an unfinished run ({done:,} of {steps} steps): continue it with --resume, set it "
            "aside with --overwrite, or choose another folder with --output"
        )
    return None


def begin(program: type[Workload], content: dict[str, Any] | None, given: dict[str, Any], folder: Path) -> Run:
    """The run of a checkpoint continued, or a new one: then what was in the folder is set aside, with that of torch.nn
    which it was compared with, so that no later comparison takes it for its own."""
    kind = program.settings_type
    run = Run(program(kind.resumed(content["settings"], given) if content else kind.complete(given)))
    run.probe()
    if content:
        run.load(content)
        say(f"{folder}: {run.step:,} of {run.settings.steps:,} steps are done.")
        return run
    for each in (folder / BASELINE, folder):
        if kept := ranks.by_first(lambda each=each: checkpoint.set_aside(each)):
            say(f"The run that was in {each} is kept as {kept}.")
    return run


def train(run: Run, folder: Path, save_seconds: float) -> None:
    """Takes the run to its last step, with a checkpoint every `save_seconds`, at the end and on a signal.

    Raises:
        Stopped: SIGINT or SIGTERM arrived; the step that it met is finished and saved
    """
    if run.finished:
        return
    run.connect()
    memory, before, first = PeakMemory(run.device), run.memory, run.step
    begun = saved = time.monotonic()
    counted = run.count
    progress = bar(
        total=run.settings.steps,
        initial=run.step,
        delay=0,
        leave=True,
        bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} steps {elapsed}<{remaining}{postfix}",
        disable=ranks.rank() > 0,
    )
    stopped_by = 0
    with checkpoint.Signals() as signals, progress:
        while not run.finished and not stopped_by:
            run.train_step()

            now = time.monotonic()
            run.speed = (run.count - counted) / (now - begun)
            if run.step == first + 1:  # this step compiled the kernels: the speed is that of the others
                counted, begun = run.count, now
            run.memory = memory.added if math.isnan(before) else max(memory.added, before)
            show(progress, run)

            # A signal or the hour that one rank has seen holds for all: they stop after the same step.
            seen = ranks.of_all((signals.received, now - saved >= save_seconds))
            stopped_by, due = (max(values) for values in zip(*seen, strict=True))
            if due and not stopped_by and not run.finished:
                run.save(folder)
                saved = time.monotonic()
        run.save(folder)
    if stopped_by:
        raise checkpoint.Stopped(stopped_by, run.step, folder)


def show(progress: tqdm[Any], run: Run) -> None:
    recent = run.losses[-20:]
    progress.set_postfix_str(
        f"{sum(recent) / len(recent):.3f} {run.workload.loss_unit}, {run.speed:,.0f} {run.workload.unit}/s, "
        f"{run.memory:.2f} GiB, path {layers.path(run.model)}",
        refresh=False,
    )
    progress.update()


def measure(run: Run, folder: Path) -> None:
    """Takes the metrics on held-out data into the checkpoint."""
    run.quality = ranks.by_first(run.evaluate)
    run.save(folder)
