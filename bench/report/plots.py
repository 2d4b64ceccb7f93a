"""Plots of one run, for its page.

What is measured is drawn with filled markers, what the plan predicts with lines or hollow markers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bench.report.results import ARMS, DTYPES, MODES, Provenance, Results
from bench.report.rows import BASELINES, OURS, Row, groups, label, rows
from persistrnn.profiling import drawing
from persistrnn.profiling.drawing import COLOURS, FAINT, INK
from persistrnn.profiling.page import MIB, Part, Plot, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

REHEARSAL = "Rehearsal, no GPU: nothing here was measured on one."
CASES, PANELS = 50, 15  # in one figure of speed-ups, of times
CYCLE = (*COLOURS.values(), ("#8C510A", "X"), ("#6B6B6B", "<"))  # of suites


def draw(results: Results) -> list[Part]:
    """Every plot of a run, the same for the same run; within ``drawing.style``."""
    found = rows(results)
    return [kind(found, results.provenance) for kind in (speedups, times, floors, memory)]


def _finish(figure: Figure, name: str, title: str, alt: str, provenance: Provenance) -> Plot:
    lines = [printable(title, 90), f"{provenance.device}, {provenance.date[:10]}, commit {provenance.commit[:10]}"]
    lines += [REHEARSAL] if provenance.rehearsal else []
    drawing.legend(figure)
    return drawing.finish(figure, name, alt, lines, provenance.rehearsal)


def _figures(items: Sequence[T], largest: int) -> list[tuple[Sequence[T], str]]:
    """As few as can be, of about equal length, each with its number where there are several."""
    count = -(-len(items) // largest)
    size = -(-len(items) // max(count, 1))
    return [(items[n * size : (n + 1) * size], f" ({n + 1} of {count})" * (count > 1)) for n in range(count)]


def speedups(found: Sequence[Row], provenance: Provenance) -> Part:
    section = Part(
        "Speed-up per case",
        [
            "Time of the other over time of persistrnn, whole call, median; left of the line at 1 persistrnn loses. "
            "Sorted by the speed-up over torch; cases of one suite, dtype and mode share their scale."
        ],
    )
    absent = 0
    for (suite, dtype, mode), members in groups(found).items():
        values = {row: {arm: value for arm in BASELINES if (value := row.speedup(arm))} for row in members}
        shown = sorted((row for row in members if values[row]), key=lambda row: -next(iter(values[row].values())))
        absent += len(members) - len(shown)
        over = [value for row in shown for value in values[row].values()]
        left, right = min([0.5, *over]) / 1.08, max([2, *over]) * 1.08
        for part, which in _figures(shown, CASES):
            figure = drawing.figure(8, 1.45 + 0.155 * len(part))
            axes = figure.subplots()
            for arm in BASELINES:
                points = [(values[row][arm], -n) for n, row in enumerate(part) if arm in values[row]]
                if points:
                    drawing.dots(axes, points, COLOURS[arm], f"over {arm}")
            axes.axvspan(left, 1, color=FAINT, alpha=0.1, linewidth=0)
            axes.axvline(1, color=INK, linewidth=1)
            axes.set_yticks([-n for n in range(len(part))], [label(row.case) for row in part], fontsize=7)
            axes.tick_params(axis="y", length=0)
            xlabel = "speed-up of persistrnn, times (log scale)"
            axes.set(xlim=(left, right), ylim=(0.7 - len(part), 0.7), xlabel=xlabel)
            drawing.log(axes, "x", unit="x")
            title = f"Speed-up of persistrnn: {printable(suite, 30)}, {dtype}, {mode}{which}"
            lost = sum(min(values[row].values()) < 1 for row in part)
            over = [value for row in part for value in values[row].values()]
            alt = f"{title}; {len(part)} cases, from {min(over):.3g} to {max(over):.3g} times, {lost} with a loss"
            section.plots.append(_finish(figure, f"speedup-{len(section.plots)}", title, alt, provenance))
    if absent or not found:
        section.sentences.append(f"{absent} of {len(found)} cases have no speed-up: not yet measured, or skipped.")
    return section


class _Panel(NamedTuple):
    """What the points of one panel share. both: directions; bare: without the input's product."""

    cell: str
    layers: int
    both: bool
    bare: bool
    batch: int


def times(found: Sequence[Row], provenance: Provenance) -> Part:
    section = Part(
        "Time per step",
        [
            "Microseconds per step of the whole stack against the hidden size; a panel has one cell and batch (and "
            "layers L, directions D; I=0: without the product of the input). Measured times are whole calls over T, "
            "with that product where a case has one; predicted times and the floor are the plan's, without it."
        ],
    )
    alone = 0
    for dtype, mode in itertools.product(DTYPES, MODES):
        members = [row for row in found if (row.case.dtype, row.case.mode) == (dtype, mode)]
        members = [row for row in members if row.case.hidden and (row.floor or any(map(row.measured, ARMS)))]
        panels: dict[_Panel, list[Row]] = {}
        for row in members:
            case = row.case
            panel = _Panel(case.cell, case.layers, case.bidirectional, not case.input, case.batch)
            panels.setdefault(panel, []).append(row)
        # Fewer sizes are no curve; their times are in the tables.
        curves = {key: panels[key] for key in sorted(panels) if len({row.case.hidden for row in panels[key]}) > 2}
        curves = curves or dict(sorted(panels.items()))
        alone += len(members) - sum(map(len, curves.values()))
        for part, which in _figures(list(curves.items()), PANELS):
            measured = sum(bool(row.measured(arm)) for _, own in part for row in own for arm in ARMS)
            title = f"Time per step: {dtype}, {mode}{which}" + "; predicted; not yet measured" * (not measured)
            alt = (
                f"{title}; {len(part)} panels by cell and batch, {measured} measured points, predicted times and floor"
            )
            section.plots.append(_finish(_panels(part), f"step-{len(section.plots)}", title, alt, provenance))
    if alone:
        section.sentences.append(
            f"{alone} cases whose cell and batch have fewer than three hidden sizes are in the tables, not here."
        )
    if not section.plots:
        section.sentences.append("Nothing is drawn: no case has a measured time or a floor.")
    return section


def _panels(curves: Sequence[tuple[_Panel, Sequence[Row]]]) -> Figure:
    """Times against H, all on the same scales."""
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = drawing.figure(8 if columns > 1 else 5, 1.5 + 1.75 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for n, (panel, members) in enumerate(curves):
        axes = grid.flat[n]
        for of, name, style in (
            (lambda row: row.floor, "floor, predicted", {"color": FAINT, "linestyle": "-"}),
            (lambda row: row.predicted, "persistrnn, predicted", {"color": COLOURS[OURS][0], "linestyle": "--"}),
        ):
            line = _curve(members, of)
            if line:
                axes.plot(*zip(*line, strict=True), marker="_", markersize=6, linewidth=1.1, label=name, **style)
        for arm in ARMS:
            points = [(float(row.case.hidden), t.per_step) for row in members if (t := row.measured(arm))]
            if points:
                drawing.dots(axes, points, COLOURS[arm], f"{arm}, measured")
        more = f" L={panel.layers}" * (panel.layers > 1) + " D=2" * panel.both + " I=0" * panel.bare
        axes.set_title(f"{printable(panel.cell, 12)} B={panel.batch}{more}")
        drawing.log(axes, "x", base=2)
        drawing.log(axes, "y")
        if n + columns >= len(curves):  # the lowest of its column
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_xlabel("hidden size H")
        if n % columns == 0:
            axes.set_ylabel("us per step")
    return figure


def _curve(members: Sequence[Row], of: Callable[[Row], float]) -> list[tuple[int, float]]:
    """(H, the middle one of its values), by H; unknown values are left out."""
    found: dict[int, list[float]] = {}
    for row in members:
        if of(row):
            found.setdefault(row.case.hidden, []).append(of(row))
    return [(hidden, median(found[hidden])) for hidden in sorted(found)]


def _suites(found: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each."""
    return dict(zip(dict.fromkeys(row.case.suite for row in found), itertools.cycle(CYCLE), strict=False))


def floors(found: Sequence[Row], provenance: Provenance) -> Part:
    section = Part(
        "Share of the floor",
        [
            "Time per step over the floor, the least that any plan can take; 1 is the floor. Filled: measured over "
            "floor (whole call, with the product of the input where a case has one). Hollow: predicted over floor, of "
            "cases that are not measured."
        ],
    )
    members = [row for row in found if row.floor and row.case.hidden]
    if not members:
        section.sentences.append("Nothing is drawn: no case has a floor.")
        return section
    dtypes = [dtype for dtype in DTYPES if any(row.case.dtype == dtype for row in members)]
    modes = [mode for mode in MODES if any(row.case.mode == mode for row in members)]
    figure = drawing.figure(8 if len(modes) > 1 else 5, 1.6 + 2.6 * len(dtypes))
    grid = figure.subplots(len(dtypes), len(modes), sharex=True, sharey=True, squeeze=False)
    for axes, (dtype, mode) in zip(grid.flat, itertools.product(dtypes, modes), strict=True):
        axes.axhline(1, color=INK, linewidth=1)
        for suite, style in _suites(members).items():
            own = [row for row in members if (row.case.suite, row.case.dtype, row.case.mode) == (suite, dtype, mode)]
            open_ = [row for row in own if row.predicted and not row.over_floor]
            predicted = [(float(row.case.hidden), row.predicted / row.floor) for row in open_]
            measured = [(float(row.case.hidden), value) for row in own if (value := row.over_floor)]
            for points, kind in ((predicted, "predicted"), (measured, "measured")):
                if points:
                    drawing.dots(axes, points, style, f"{printable(suite, 20)}, {kind}", kind == "measured")
        axes.set_title(f"{dtype}, {mode}")
        drawing.log(axes, "x", base=2)
        drawing.log(axes, "y", unit="x")
    for axes in grid[:, 0]:
        axes.set_ylabel("time over floor (log scale)")
    for axes in grid[-1]:
        axes.set_xlabel("hidden size H")
    over = [value for row in members if (value := row.over_floor)]
    title = "Time over floor" if over else "Time over floor: predicted; not yet measured"
    seen = f"measured is {min(over):.3g} to {max(over):.3g} times the floor" if over else "nothing is measured"
    alt = f"{title}, against the hidden size; {len(members)} cases, {seen}"
    section.plots.append(_finish(figure, "floor", title, alt, provenance))
    return section


def memory(found: Sequence[Row], provenance: Provenance) -> Part:
    section = Part(
        "Peak memory",
        [
            "Device memory above what was allocated before the call, persistrnn against torch; below the line "
            "persistrnn needs less."
        ],
    )
    both = [(row, row.measured("torch"), row.measured(OURS)) for row in found]
    known = [(row, x.peak / MIB, y.peak / MIB) for row, x, y in both if x and y and x.peak and y.peak]
    if len(known) < len(found) or not found:
        section.sentences.append(f"{len(found) - len(known)} of {len(found)} cases have no peak memory of both.")
    if not known:
        return section
    modes = [mode for mode in MODES if any(row.case.mode == mode for row, _, _ in known)]
    values = [value for _, x, y in known for value in (x, y)]
    limits = min(values) / 1.3, max(values) * 1.3
    figure = drawing.figure(8 if len(modes) > 1 else 4.6, 4.9)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False).flat, modes, strict=True):
        axes.plot(limits, limits, color=INK, linewidth=1, label="equal")
        for suite, style in _suites(row for row, _, _ in known).items():
            own = [(x, y) for row, x, y in known if (row.case.suite, row.case.mode) == (suite, mode)]
            if own:
                drawing.dots(axes, own, style, printable(suite, 20))
        axes.set(xlim=limits, ylim=limits, aspect="equal", title=mode, xlabel="torch, MiB (log scale)")
        axes.set_ylabel("persistrnn, MiB (log scale)")
        drawing.log(axes, "x")
        drawing.log(axes, "y")
        axes.tick_params(axis="x", rotation=45)
    less = sum(y < x for _, x, y in known)
    alt = f"Peak memory of persistrnn against torch, {len(known)} cases; persistrnn needs less in {less} of them"
    section.plots.append(_finish(figure, "memory", "Peak memory, persistrnn against torch", alt, provenance))
    return section
