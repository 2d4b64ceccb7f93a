"""The runner that the training programs of bench/ share: loop, progress, checkpoints, resume, comparison, DDP.

A program is a `Workload` (bench/train/workload.py explains what it gives) and one line:

    if __name__ == "__main__":
        sys.exit(runner.main(MyWorkload))

Its settings are a frozen dataclass, a subclass of `bench.train.options.Settings` whose every field is an option:

    @dataclass(frozen=True, kw_only=True)
    class MySettings(Settings):
        hidden: int = 64                                                    # another default
        pairs: int = option(10_000, "pairs to train on", type=number(int, 1), metavar="N")

        def check(self) -> None: ...                                        # raises UsageError on a bad combination

Help for a workload: `bench.train.layers` (layers by settings, padded rows on either backend), `bench.train.buckets`
(batches of similar length), `bench.train.decoding` (temperature, top-k, beam search), `bench.train.progress` (bars).
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from bench import UsageError
from bench.train import checkpoint, curves, form, layers, ranks
from bench.train.folder import held
from bench.train.memory import PeakMemory
from bench.train.options import OUT, SAVE_SECONDS, Settings, flag, given_own, parser, split
from bench.train.progress import bar
from bench.train.ranks import say
from bench.train.training import Run
from bench.train.workload import Workload

BASELINE = "torch.nn"  # the folder, within that of the run, of what a comparison trains beside persistrnn
INTERPRETED = {"hidden": 32, "batch": 4, "steps": 15}  # at most, of a comparison in the interpreter


def train(run: Run, folder: Path, save_seconds: float) -> None:
    """Takes the run to its last step, with a checkpoint every `save_seconds`, at the end and on a signal."""
    workload, steps = run.workload, run.settings.steps
    if run.finished:
        return
    memory, before = PeakMemory(run.device), run.memory
    run.connect()
    progress = bar(
        total=steps,
        initial=run.step,
        delay=0,
        leave=True,
        bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} steps {elapsed}<{remaining}{postfix}",
        disable=ranks.rank() > 0,
    )
    first, counted = run.step, run.count
    begin = saved = time.monotonic()
    with checkpoint.Signals() as signals, progress:
        received = 0.0
        while not run.finished and not received:
            with run.within_memory():
                run.train_step()
            now = time.monotonic()
            run.speed = (run.count - counted) / (now - begin)
            if run.step == first + 1:  # this step compiled the kernels: the speed is that of the others
                counted, begin = run.count, now
            run.memory = memory.added if math.isnan(before) else max(memory.added, before)
            recent = run.losses[-20:]
            progress.set_postfix_str(
                f"{sum(recent) / len(recent):.3f} {workload.loss_unit}, {run.speed:,.0f} {workload.unit}/s, "
                f"{memory.total:.2f} GiB, path {layers.path(run.model)}",
                refresh=False,
            )
            progress.update()
            # A signal or the hour that one rank has seen holds for all: they stop after the same step.
            everyone = ranks.share([signals.received, now - saved >= save_seconds])
            received, due = (max(values) for values in zip(*everyone, strict=True))
            if due and not received and not run.finished:
                run.save(folder)
                saved = time.monotonic()
        run.save(folder)
    if received:
        raise checkpoint.Stopped(int(received), run.step, folder)


def wanted(program: type[Workload], job: Namespace) -> str | None:
    """The option that needs a checkpoint, if one is given."""
    return program.model_option(job) or ("--resume" if job.resume else None)


def missing(option: str, folder: Path) -> UsageError:
    remedy = f"leave --resume out, or name {OUT}" if option == "--resume" else f"train first, or name {OUT}"
    return UsageError(f"{option} given, but {folder} holds no checkpoint: {remedy}")


def look(folder: Path, job: Namespace, program: type[Workload]) -> dict[str, Any] | None:
    """The checkpoint to resume, or None for a new run that nothing unfinished stands in the way of."""
    if job.overwrite:  # whatever it is
        return None
    content: dict[str, Any] | None = ranks.by_first(lambda: checkpoint.load(folder))
    needed = wanted(program, job)
    if content is None:
        if needed:
            raise missing(needed, folder)
        return None
    if content.get("workload") != program.name:
        made = content.get("workload", "an earlier version of this program")
        raise UsageError(
            f"{folder} holds a run of {made}, this is {program.name}: name another folder with {OUT}, or set it aside "
            "with --overwrite"
        )
    form.check(content, form.RUN)
    if needed:
        return content
    done, steps = len(content["losses"]), content["settings"].get("steps")
    if not isinstance(steps, int) or done < steps:
        raise UsageError(
            f"{folder} holds an unfinished run ({done:,} of {steps} steps): continue it with --resume, set it "
            f"aside with --overwrite, or choose another folder with {OUT}"
        )
    return None


def chosen(program: type[Workload], content: dict[str, Any] | None, given: dict[str, Any]) -> Settings:
    """The settings of a checkpoint, with which the given ones must agree, or those of a new run."""
    kind = program.settings_type
    return kind.resumed(content["settings"], given) if content else kind.complete(given)


def start(program: type[Workload], content: dict[str, Any] | None, settings: Settings, folder: Path) -> Run:
    """The run of a checkpoint continued, or a new one."""
    run = Run(program(settings))
    run.probe()
    if content:
        run.load(content)
        say(f"{folder}: {run.step:,} of {settings.steps:,} steps are done.")
    return run


def make_room(folder: Path) -> None:
    """Sets the checkpoint of an earlier run aside, and that of torch.nn which it was compared with: first, so that no
    later comparison takes it for its own, even if this process ends in between."""
    for each in (folder / BASELINE, folder):
        if ranks.rank() == 0 and (kept := checkpoint.set_aside(each)):
            say(f"The run that was in {each} is kept as {kept}.")


def results(run: Run) -> str:
    """The metrics in words."""
    assert run.quality is not None
    return ", ".join(
        f"{value:.4f} {metric.name}" for value, metric in zip(run.quality, run.workload.metrics, strict=True)
    )


def single(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Trains, gives the finishing touches, measures on held-out data."""
    content = look(job.out, job, program)
    run = start(program, content, chosen(program, content, given), job.out)
    if run.quality is not None:
        say(f"This run is finished: {results(run)}.")
        say("Leave --resume out to begin a new one.")
        return
    if content is None:
        make_room(job.out)
    say(run.workload.describe())
    say(run.explanation())
    train(run, job.out, job.save_seconds)
    if ranks.rank():
        return
    with run.using() as model:
        run.workload.finish(model, job, job.out)
    run.measure(job.out)
    say(
        f"{run.step:,} steps, {run.speed:,.0f} {run.workload.unit}/s, {run.memory * 1024:,.0f} MiB, "
        f"path {layers.path(run.model)}: {results(run)}. The checkpoint is in {job.out}."
    )


def use(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """What a program does with its trained model."""
    content = look(job.out, job, program)
    assert content is not None
    if ranks.rank():
        return
    run = Run(program(program.settings_type.resumed(content["settings"], given)))
    run.load(content, to_train=False)
    with run.using() as model:
        run.workload.use(model, job)


class Arm(NamedTuple):
    """One side of a comparison, trained."""

    name: str
    path: str
    losses: list[float]
    quality: list[float] | None  # known to rank 0, and not in the interpreter, where it would take hours
    speed: float  # terms of the loss per second
    memory: float  # GiB


def compare(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Trains persistrnn, then torch.nn from the same weights; prints both curves, the quality and the cost."""
    interpreted = job.compare == "interpreted"
    folders = {"persistrnn": job.out, "torch.nn": job.out / BASELINE}
    # Interrupted before the second began, there is none of it to resume.
    there = ranks.by_first(lambda: checkpoint.exists(folders["torch.nn"]))
    second = Namespace(**{**vars(job), "resume": job.resume and there})
    contents = {name: look(folders[name], how, program) for name, how in zip(folders, (job, second), strict=True)}
    arms: list[Arm] = []
    for name, folder in folders.items():
        content = contents.pop(name)
        settings = chosen(program, content, given)
        if not arms:
            check_comparable(settings)
        run = start(program, content, settings, folder)
        if not arms and content is None:
            make_room(folder)
        say(run.explanation())
        train(run, folder, job.save_seconds)
        if run.quality is None and not interpreted:
            ranks.by_first(lambda run=run, folder=folder: run.measure(folder))
        arms.append(Arm(name, layers.path(run.model), run.losses, run.quality, run.speed, run.memory))
        given = asdict(replace(settings, backend="torch.nn", save="gates"))
        workload = run.workload
        del run, content  # its memory shall not count as the other's
    ours, theirs = arms
    say(curves.table((ours.name, theirs.name), (ours.losses, theirs.losses), workload.loss_unit))
    if not interpreted:  # whose time and memory say nothing
        say(verdict(workload, ours, theirs))


def check_comparable(settings: Settings) -> None:
    """Raises UsageError where torch.nn beside it would show nothing."""
    if settings.backend == "torch.nn":
        raise UsageError(
            "--backend torch.nn given with --compare, which trains it anyway: allowed is another --backend"
        )
    if settings.dropout:
        raise UsageError(
            f"--dropout {settings.dropout} given with --compare: each path drops other units, so their curves "
            "differ anyway; allowed is --dropout 0"
        )


def verdict(workload: Workload, ours: Arm, theirs: Arm) -> str:
    """Quality and cost, side by side."""
    device = workload.settings.device
    where, most = ("CPU", "resident at most, above that before") if device == "cpu" else (device, "allocated at most")
    rows = [("path", ours.path, theirs.path)]
    for metric, a, b in zip(workload.metrics, ours.quality or [], theirs.quality or [], strict=False):
        rows.append((f"{metric.name} ({metric.better} is better)", f"{a:.4f}", f"{b:.4f}"))
    rows.append((f"{workload.unit}/s ({where})", f"{ours.speed:,.0f}", f"{theirs.speed:,.0f}"))
    one, other = ("not measured" if math.isnan(arm.memory) else f"{arm.memory * 1024:,.0f}" for arm in (ours, theirs))
    rows.append((f"MiB {most} ({where})", one, other))
    text = curves.side_by_side((ours.name, theirs.name), rows)
    if ours.path == "torch":
        text += (
            f"\nHere (--device {device}) persistrnn took path torch: both curves are torch's own layers'. "
            "--compare interpreted trains a small model on the kernels, in Triton's interpreter."
        )
    return text


def compare_interpreted(program: type[Workload], job: Namespace, given: dict[str, Any]) -> NoReturn:
    """Becomes a process that compares a small model, its kernels run by Triton's interpreter on the CPU."""
    if ranks.world() > 1:
        raise UsageError(f"--compare interpreted given to {ranks.world()} processes: allowed is one, without torchrun")
    for name, allowed in (("device", ["cpu"]), ("backend", ["persistent", "auto"])):
        if given.get(name, allowed[0]) not in allowed:
            raise UsageError(
                f"{flag(name)} {given[name]} given with --compare interpreted, which runs our kernels on the CPU: "
                f"allowed is {flag(name)} {allowed[0]}, or leave it out"
            )
    settings = program.settings_type.complete({"device": "cpu", **given})
    check_comparable(settings)
    limits = INTERPRETED | program.small
    small = {name: min(getattr(settings, name), limit) for name, limit in limits.items()}
    small = asdict(replace(settings, **small, warmup=0, device="cpu", backend="persistent"))
    sizes = " ".join(f"{flag(name)} {small[name]}" for name in (*limits, "warmup"))
    print(
        f"A small model ({sizes}) on the interpreted kernels, beside torch.nn from the same weights (slow: no speed is "
        "meant)."
    )
    command = [sys.executable, "-m", f"bench.train.{program.name}", "--compare", "interpreted", "--overwrite"]
    command += [OUT, str(job.out / "interpreted")]
    for field in fields(settings):
        value = small[field.name]
        if field.type in ("bool", bool):
            command += [flag(field.name)] if value else []
        else:
            command.append(f"{flag(field.name)}={value}")
    sys.stdout.flush()
    # Triton reads the variable when it is imported, so this process is too late for it.
    os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def check_used(program: type[Workload], job: Namespace, own: dict[str, Any]) -> None:
    """Raises UsageError where an option would be without effect; `own` are the given ones that the program adds."""
    using = program.model_option(job)
    if using and (job.resume or job.overwrite or job.compare):
        raise UsageError(
            f"{using} given with --resume, --overwrite or --compare: it trains nothing; leave one of them out"
        )
    if job.compare and own:
        names = ", ".join(map(flag, own))
        raise UsageError(
            f"{names} given with --compare, which shows curves, quality and cost, and nothing that these act on: leave "
            "one of them out"
        )
    if job.compare == "interpreted" and (job.resume or job.save_seconds != SAVE_SECONDS):
        raise UsageError(
            f"{'--resume' if job.resume else '--save-seconds'} given with --compare interpreted, which always begins "
            "anew: leave it out"
        )


def unfinished(program: type[Workload], job: Namespace) -> bool:
    """Whether --resume would go on with what is in the run's folder."""
    if program.model_option(job) or job.compare == "interpreted":
        return False
    folders = [job.out, *([job.out / BASELINE] if job.compare else [])]
    try:
        contents = [checkpoint.load(folder) for folder in folders]
    except UsageError:  # it would say so itself
        return False
    if contents[0] is None or contents[0].get("workload") != program.name:
        return False
    return any(content is None or content.get("quality") is None for content in contents)


def check_before(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Raises UsageError for what can be known before the run's folder is made and held."""
    if job.resume:
        if not ranks.by_first(lambda: checkpoint.exists(job.out)):
            raise missing("--resume", job.out)
        return
    settings = program.settings_type.complete(given)
    if job.compare:
        check_comparable(settings)


def command_line(program: type[Workload], options: str) -> str:
    """The command to type, with these options."""
    if ranks.world() > 1:
        return f"torchrun --nproc-per-node {ranks.world()} -m bench.{program.name} {options}"
    return program.command.format(name=program.name, options=options)


def main(program: type[Workload], arguments: Sequence[str] | None = None) -> int:
    """Runs a training program. Returns the exit status: 0, or 128 plus the number of the signal that stopped it (2:
    bad usage). Under torchrun each process trains on its rows of every batch, and rank 0 shows and writes."""
    options, group = parser(
        program.settings_type, command_line(program, "{options}"), program.description, Path("runs") / program.name
    )
    program.add_options(group)
    job, given = split(program.settings_type, options.parse_args(arguments))
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    try:
        check_used(program, job, given_own(options, job))
        program.check_options(job)
        with ranks.connected():
            if program.model_option(job):
                use(program, job, given)
            elif job.compare == "interpreted" and not interpreting:
                compare_interpreted(program, job, given)
            else:
                check_before(program, job, given)
                with held(job.out):
                    (compare if job.compare else single)(program, job, given)
    except UsageError as error:
        options.error(str(error))
    except (checkpoint.Stopped, KeyboardInterrupt) as stop:  # outside the training loop Ctrl-C stops at once
        say(str(stop) or "SIGINT; nothing is lost.")
        if ranks.rank() == 0 and unfinished(program, job):
            compared = f" --compare {job.compare}" if job.compare else ""
            say(f"Continue with: {command_line(program, f'--resume {OUT} {shlex.quote(str(job.out))}{compared}')}")
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0
