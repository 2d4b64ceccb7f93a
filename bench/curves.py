"""Two training curves next to each other."""

from __future__ import annotations

from collections.abc import Sequence


def table(names: tuple[str, str], curves: tuple[Sequence[float], Sequence[float]], rows: int = 16) -> str:
    """Up to `rows` evenly spaced steps, first and last among them, of two curves in bits per character."""
    steps = len(curves[0])
    shown = sorted({round(row * (steps - 1) / max(1, rows - 1)) for row in range(rows)})
    differences = [ours - theirs for ours, theirs in zip(*curves, strict=True)]
    widths = [max(len(name), 10) for name in names]
    header = f"{'step':>8}  {names[0]:>{widths[0]}}  {names[1]:>{widths[1]}}  difference"
    lines = [f"{header}   (bits per character)"]
    for step in shown:
        ours, theirs = (curve[step] for curve in curves)
        lines.append(f"{step + 1:>8,}  {ours:>{widths[0]}.5f}  {theirs:>{widths[1]}.5f}  {differences[step]:>+10.1e}")
    largest = max(range(steps), key=lambda step: abs(differences[step]))
    mean = sum(map(abs, differences)) / steps
    lines.append(
        f"largest difference {abs(differences[largest]):.1e} bits, at step {largest + 1:,}; on average {mean:.1e}"
    )
    return "\n".join(lines)
