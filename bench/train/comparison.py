"""What a command shows in the end: quality and cost, and of a comparison with torch.nn both training curves."""

from collections.abc import Sequence

import torch

from bench import UsageError
from bench.train.layers import recurrent
from bench.train.loop import Run
from bench.train.options import Settings

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
    with torch.device("meta"):
        recurrent(settings, "torch.nn", 1)  # which raises before anything is trained


def curves(losses: Sequence[Sequence[float]], unit: str, rows: int = 16) -> str:
    """Up to `rows` evenly spaced steps, first and last among them, of two training curves in `unit`."""
    steps = len(losses[0])
    differences = [ours - theirs for ours, theirs in zip(*losses, strict=True)]
    lines = [f"{'step':>8}  {NAMES[0]:>10}  {NAMES[1]:>10}  difference   ({unit})"]
    for step in sorted({round(row * (steps - 1) / max(1, rows - 1)) for row in range(rows)}):
        ours, theirs = (curve[step] for curve in losses)
        lines.append(f"{step + 1:>8,}  {ours:>10.5f}  {theirs:>10.5f}  {differences[step]:>+10.1e}")
    largest = max(range(steps), key=lambda step: abs(differences[step]))
    mean = sum(map(abs, differences)) / steps
    lines.append(
        f"largest difference {abs(differences[largest]):.1e} {unit}, at step {largest + 1:,}; on average {mean:.1e}"
    )
    return "\n".join(lines)


def summary(runs: Sequence[Run], paths: Sequence[str]) -> str:
    """Path, quality as far as it was measured, and cost: of one run, or of two side by side."""
    workload, device = runs[0].workload, runs[0].settings.device
    most = "resident at most, above that before" if device == "cpu" else "allocated at most"
    rows: list[tuple[str, ...]] = [("", *NAMES)] if len(runs) > 1 else []
    rows.append(("path", *paths))
    for metric, *values in zip(workload.metrics, *(run.quality or [] for run in runs), strict=False):
        rows.append((metric, *(f"{value:.4f}" for value in values)))
    rows.append((f"{workload.unit}/s ({device})", *(f"{run.speed:,.0f}" for run in runs)))
    rows.append((f"MiB {most} ({device})", *(f"{run.memory * 1024:,.0f}" for run in runs)))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    text = "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)
    if len(runs) > 1 and paths[0] == "torch":
        text += (
            f"\nHere (--device {device}) persistrnn took path torch: both curves are torch's own layers'. With "
            "TRITON_INTERPRET=1 and --backend persistent the kernels run on a CPU, slowly: take a small model."
        )
    return text
