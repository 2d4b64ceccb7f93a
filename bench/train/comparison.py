"""--compare: trains persistrnn, then torch.nn from the same weights; both curves, the quality and the cost."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from bench import UsageError
from bench.train import checkpoint, layers, ranks
from bench.train.loop import BASELINE, Run, begin, look, measure, train
from bench.train.options import Settings
from bench.train.ranks import say
from bench.train.workload import Workload

NAMES = ("persistrnn", "torch.nn")


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


def compare(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Into job.output and, of torch.nn, into a folder there. In Triton's interpreter neither quality nor speed is
    measured, which would take hours."""
    interpreted, kind = os.environ.get("TRITON_INTERPRET") == "1", program.settings_type
    folders = (job.output, job.output / BASELINE)
    # Interrupted before the second began, there is none of it to resume.
    resume = (job.resume, job.resume and ranks.by_first(lambda: checkpoint.exists(folders[1])))
    found = [look(program, *each, job.overwrite) for each in zip(folders, resume, strict=True)]
    check(kind.resumed(found[0]["settings"], given) if found[0] else kind.complete(given))
    runs: list[Run] = []
    paths = []
    for folder in folders:
        run = begin(program, found.pop(0), given, folder)
        say(run.explanation())
        train(run, folder, job.save_seconds)
        if run.quality is None and not interpreted:
            measure(run, folder)
        runs.append(run)
        paths.append(layers.path(run.model))
        given = asdict(replace(run.settings, backend="torch.nn", save="gates"))
        del run.model, run.network, run.optimizer  # their memory shall not count as the other's
    say(table([run.losses for run in runs], runs[0].workload.loss_unit))
    if not interpreted:
        say(verdict(paths, runs))


def table(curves: Sequence[Sequence[float]], unit: str, rows: int = 16) -> str:
    """Up to `rows` evenly spaced steps, first and last among them, of two training curves in `unit`."""
    steps = len(curves[0])
    differences = [ours - theirs for ours, theirs in zip(*curves, strict=True)]
    lines = [f"{'step':>8}  {NAMES[0]:>10}  {NAMES[1]:>10}  difference   ({unit})"]
    for step in sorted({round(row * (steps - 1) / max(1, rows - 1)) for row in range(rows)}):
        ours, theirs = (curve[step] for curve in curves)
        lines.append(f"{step + 1:>8,}  {ours:>10.5f}  {theirs:>10.5f}  {differences[step]:>+10.1e}")
    largest = max(range(steps), key=lambda step: abs(differences[step]))
    mean = sum(map(abs, differences)) / steps
    lines.append(
        f"largest difference {abs(differences[largest]):.1e} {unit}, at step {largest + 1:,}; on average {mean:.1e}"
    )
    return "\n".join(lines)


def verdict(paths: Sequence[str], runs: Sequence[Run]) -> str:
    """Quality and cost, side by side."""
    workload, device = runs[0].workload, runs[0].settings.device
    most = "resident at most, above that before" if device == "cpu" else "allocated at most"
    rows = [("", *NAMES), ("path", *paths)]
    for metric, *values in zip(workload.metrics, *(run.quality or [] for run in runs), strict=True):
        rows.append((metric, *(f"{value:.4f}" for value in values)))
    rows.append((f"{workload.unit}/s ({device})", *(f"{run.speed:,.0f}" for run in runs)))
    rows.append((f"MiB {most} ({device})", *(f"{run.memory * 1024:,.0f}" for run in runs)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)
    if paths[0] == "torch":
        text += (
            f"\nHere (--device {device}) persistrnn took path torch: both curves are torch's own layers'. With "
            "TRITON_INTERPRET=1 and --backend persistent the kernels run on a CPU, slowly: take a small model."
        )
    return text
