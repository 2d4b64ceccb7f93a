"""--compare: trains persistrnn, then torch.nn from the same weights; both curves, the quality and the cost."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

from bench import UsageError
from bench.train import checkpoint, layers, ranks
from bench.train.loop import BASELINE, begin, look, measure, train
from bench.train.options import Settings, flag
from bench.train.ranks import say
from bench.train.run import Run
from bench.train.workload import Workload

SMALL = {"hidden": 32, "batch": 4, "steps": 15}  # at most, of a comparison in the interpreter


def compare(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Into job.output and, of torch.nn, into a folder there. In the interpreter neither speed nor quality is measured,
    which would take hours."""
    interpreted = job.compare == "interpreted"
    folders = {"persistrnn": job.output, "torch.nn": job.output / BASELINE}
    # Interrupted before the second began, there is none of it to resume.
    there = ranks.by_first(lambda: checkpoint.exists(folders["torch.nn"]))
    contents = {
        name: look(program, folder, job.resume and (name == "persistrnn" or there), job.overwrite)
        for name, folder in folders.items()
    }
    kind = program.settings_type
    check(kind.resumed(first["settings"], given) if (first := contents["persistrnn"]) else kind.complete(given))
    arms: dict[str, Run] = {}
    paths, names = [], list(folders)
    for name, folder in folders.items():
        run = begin(program, contents.pop(name), given, folder)
        say(run.explanation())
        train(run, folder, job.save_seconds)
        if run.quality is None and not interpreted:
            measure(run, folder)
        paths.append(layers.path(run.model))
        given = asdict(replace(run.settings, backend="torch.nn", save="gates"))
        del run.model, run.network, run.optimizer  # their memory shall not count as the other's
        arms[name] = run
    ours, theirs = arms.values()
    say(table(names, (ours.losses, theirs.losses), ours.workload.loss_unit))
    if not interpreted:
        say(verdict(names, paths, ours, theirs))


def check(settings: Settings) -> None:
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


def table(names: Sequence[str], curves: tuple[Sequence[float], Sequence[float]], unit: str, rows: int = 16) -> str:
    """Up to `rows` evenly spaced steps, first and last among them, of two training curves in `unit`."""
    steps = len(curves[0])
    differences = [ours - theirs for ours, theirs in zip(*curves, strict=True)]
    lines = [f"{'step':>8}  {names[0]:>10}  {names[1]:>10}  difference   ({unit})"]
    for step in sorted({round(row * (steps - 1) / max(1, rows - 1)) for row in range(rows)}):
        ours, theirs = (curve[step] for curve in curves)
        lines.append(f"{step + 1:>8,}  {ours:>10.5f}  {theirs:>10.5f}  {differences[step]:>+10.1e}")
    largest = max(range(steps), key=lambda step: abs(differences[step]))
    mean = sum(map(abs, differences)) / steps
    lines.append(
        f"largest difference {abs(differences[largest]):.1e} {unit}, at step {largest + 1:,}; on average {mean:.1e}"
    )
    return "\n".join(lines)


def verdict(names: Sequence[str], paths: Sequence[str], ours: Run, theirs: Run) -> str:
    """Quality and cost, side by side."""
    workload, device = ours.workload, ours.settings.device
    where, most = ("CPU", "resident at most, above that before") if device == "cpu" else (device, "allocated at most")
    rows = [("", *names), ("path", *paths)]
    for metric, *values in zip(workload.metrics, ours.quality or [], theirs.quality or [], strict=True):
        rows.append((f"{metric.name} ({metric.better} is better)", *(f"{value:.4f}" for value in values)))
    rows.append((f"{workload.unit}/s ({where})", *(f"{run.speed:,.0f}" for run in (ours, theirs))))
    rows.append((f"MiB {most} ({where})", *(f"{run.memory * 1024:,.0f}" for run in (ours, theirs))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)
    if paths[0] == "torch":
        text += (
            f"\nHere (--device {device}) persistrnn took path torch: both curves are torch's own layers'. "
            "--compare interpreted trains a small model on the kernels, in Triton's interpreter."
        )
    return text


def become_interpreted(program: type[Workload], arguments: Sequence[str]) -> NoReturn:
    """Becomes a process that has interpreted kernels: Triton reads the variable when it is imported."""
    sys.stdout.flush()
    command = [sys.executable, "-m", f"bench.train.{program.name}", *arguments]
    os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def compare_interpreted(program: type[Workload], job: Namespace, given: dict[str, Any], arguments: list[str]) -> None:
    """Compares a small model, its kernels run by Triton's interpreter on the CPU."""
    for name, allowed in (("device", "cpu"), ("backend", "persistent")):
        if given.get(name, allowed) != allowed:
            raise UsageError(
                f"{flag(name)} {given[name]} given with --compare interpreted, which runs our kernels on the CPU: "
                f"leave {flag(name)} out"
            )
    if job.resume or ranks.world() > 1:
        raise UsageError(
            "--compare interpreted given with --resume or to several processes: it always begins anew, in one; leave "
            "--resume and torchrun out"
        )
    settings = program.settings_type.complete({**given, "device": "cpu", "backend": "persistent"})
    check(settings)
    if os.environ.get("TRITON_INTERPRET") != "1":
        become_interpreted(program, arguments)
    small = {name: min(getattr(settings, name), limit) for name, limit in {**SMALL, **program.small}.items()}
    sizes = " ".join(f"{flag(name)} {value}" for name, value in small.items())
    say(f"A small model ({sizes}) on the interpreted kernels, beside torch.nn (slow: no speed is meant).")
    anew = Namespace(**{**vars(job), "overwrite": True, "output": job.output / "interpreted"})
    with checkpoint.held(anew.output):
        compare(program, anew, asdict(replace(settings, **small, warmup=0)))
