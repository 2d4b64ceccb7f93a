"""Two trainings next to each other."""

from __future__ import annotations

from collections.abc import Sequence


def table(names: tuple[str, str], curves: tuple[Sequence[float], Sequence[float]], unit: str, rows: int = 16) -> str:
    """Up to `rows` evenly spaced steps, first and last among them, of two training curves in `unit`."""
    steps = len(curves[0])
    shown = sorted({round(row * (steps - 1) / max(1, rows - 1)) for row in range(rows)})
    differences = [ours - theirs for ours, theirs in zip(*curves, strict=True)]
    widths = [max(len(name), 10) for name in names]
    header = f"{'step':>8}  {names[0]:>{widths[0]}}  {names[1]:>{widths[1]}}  difference"
    lines = [f"{header}   ({unit})"]
    for step in shown:
        ours, theirs = (curve[step] for curve in curves)
        lines.append(f"{step + 1:>8,}  {ours:>{widths[0]}.5f}  {theirs:>{widths[1]}.5f}  {differences[step]:>+10.1e}")
    largest = max(range(steps), key=lambda step: abs(differences[step]))
    mean = sum(map(abs, differences)) / steps
    lines.append(
        f"largest difference {abs(differences[largest]):.1e} {unit}, at step {largest + 1:,}; on average {mean:.1e}"
    )
    return "\n".join(lines)


def side_by_side(names: tuple[str, str], rows: Sequence[tuple[str, str, str]]) -> str:
    """A table of texts: what, the one's, the other's."""
    cells = [("", *names), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in cells)
