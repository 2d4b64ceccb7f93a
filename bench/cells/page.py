"""The comparison of the cells as a table in Markdown, a drawing, and a page with both."""

from __future__ import annotations

from bench.cells.results import Comparison, Row
from persistrnn.profiling import drawing
from persistrnn.profiling.page import Banner, Line, Part, Plot, Table, numbers, render, table, words

TABLE, DRAWING, PAGE = "table.md", "cells.svg", "cells.html"
# Cells of one colour have another line.
COLOURS = [colour for colour, _ in drawing.COLOURS.values()]
LINES = ("-", "--", ":")
GUESSING = 8  # bits per byte without knowing anything: what is above is not drawn
NO_SPEED = (
    "Nothing here is a speed: on a CPU the kernels do not run. LSTM, GRU and RNN are torch's own kernels there, all "
    "other cells a loop over torch's operations."
)


def protocol(found: Comparison) -> str:
    """What was done, in a few sentences."""
    of, done = found.provenance, found.protocol
    shown = done.steps * done.batch * done.sequence
    seen = "no byte of them twice" if shown <= done.trained else f"{shown / done.trained:.1f} times"
    layers = "1 layer" if done.layers == 1 else f"{done.layers} layers"
    return (
        f"Each model has about {done.parameters:,} parameters (embedding of {done.embedding} and output included): the "
        f"hidden size that comes nearest, {layers}, float32. {done.steps:,} steps of AdamW with {done.batch} streams "
        f"of {done.sequence} bytes ({shown:,} of {done.trained:,} bytes of Python source, {seen}; sha256 "
        f"{done.text[:12]}); "
        f"learning rate {done.learning_rate:g}, falling to 0, the same for all cells and tuned for none, torch's "
        f"initial weights, one seed ({done.seed}): it shows which cell learns fast at this size, not which is best "
        f"after a long training. Held out are {done.held_out:,} bytes of other files. "
        f"{of.device}, Python {of.python}, torch {of.torch}, {of.date[:10]}, commit {of.commit[:10]}"
        f"{' with uncommitted changes' * of.dirty}, `{of.command}`."
    )


def summary(found: Comparison) -> Table:
    columns = [*words("cell"), *numbers("hidden size", "parameters", "bits per byte, held out")]
    columns += [*numbers("in training, last tenth"), *words("path")]
    lines = [
        Line([row.name, f"{row.hidden:,}", f"{row.parameters:,}", f"{row.quality:.3f}", f"{late(row):.3f}", row.path])
        for row in found.best_first
    ]
    return table("The best first", columns, lines, False)


def late(row: Row) -> float:
    """The mean of the last tenth of a training curve."""
    last = row.losses[-max(1, len(row.losses) // 10) :]
    return sum(last) / len(last)


def markdown(found: Comparison) -> str:
    """The table, without a line break at the end."""
    of = summary(found)
    lines = [[column.name for column in of.columns], ["---:" if c.number else "---" for c in of.columns]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *(line.cells for line in of.rows)])


def draw(found: Comparison) -> Plot:
    """Bits per byte against the step, and held out at the end; within `drawing.style`."""
    ordered = found.best_first
    figure = drawing.figure(8, 1.6 + 0.24 * max(len(ordered), 6))
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for n, row in enumerate(ordered):
        how = {"color": COLOURS[n % len(COLOURS)], "linestyle": LINES[n // len(COLOURS) % len(LINES)]}
        curves.plot(*row.curve, linewidth=1.2, label=row.name, **how)
        bars.barh([n], [row.quality], height=0.6, color=how["color"], alpha=0.8)
        bars.text(row.quality, n, f" {row.quality:.3f}", va="center", fontsize=7)
    lowest = min(min(row.losses) for row in ordered)
    curves.set(
        xlabel="step", ylabel="bits per byte in training", title="While it learns", ylim=(0.9 * lowest, GUESSING)
    )
    bars.set_yticks(range(len(ordered)), [f"{row.name}, H={row.hidden}" for row in ordered])
    bars.set(xlabel="bits per byte, held out", title="In the end", xlim=(0, 1.2 * ordered[-1].quality))
    drawing.rows(bars)
    drawing.legend(figure)
    of, done = found.provenance, found.protocol
    best, worst = ordered[0], ordered[-1]
    title = f"Language model, {done.parameters:,} parameters with each cell, {done.steps:,} steps"
    alt = (
        f"{title}: {len(ordered)} cells, from {best.quality:.3f} bits per byte ({best.name}) to {worst.quality:.3f} "
        f"({worst.name})"
    )
    where = f"{of.device}, torch {of.torch}, {of.date[:10]}, commit {of.commit[:10]}; lower is better, no speeds"
    return drawing.finish(figure, "cells", alt, [title, where])


def html(found: Comparison, drawn: Plot) -> str:
    of = found.provenance
    part = Part("Bits per byte", [protocol(found)], plots=[drawn], tables=[summary(found)])
    below = f"{of.device}, {of.date}, commit {of.commit}"
    heading = "Every cell at equal parameters"
    return render(heading, heading, below, [Banner(NO_SPEED, False)], [part])


def alone(drawn: Plot) -> str:
    """A drawing as a file of its own, on white."""
    return drawn.svg.replace("<svg ", '<svg style="background: #fff" ', 1) + "\n"
