"""Plots of a profile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import drawing, trace
from .drawing import COLOURS, FAINT, INK
from .page import MIB, Part, number
from .record import Point, Profile
from .tables import traced, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# After Paul Tol's schemes, as in `drawing`: forward in greens and blues, backward in reds, what is neither in greys.
PHASES = {
    trace.INPUT_GEMM: "#4477AA",
    trace.SCAN_FORWARD: "#228833",
    trace.TORCH_FORWARD: "#44AA99",
    trace.REST["forward"]: "#88CCEE",
    "loss": "#DDCC77",
    trace.RECOMPUTE: "#999933",
    trace.SCAN_BACKWARD: "#AA3377",
    trace.WEIGHT_GEMMS: "#EE8866",
    trace.TORCH_BACKWARD: "#CC6677",
    trace.REST["backward"]: "#DDAABB",
    "optimizer": "#332288",
    trace.OTHER: "#8C8C8C",
    trace.IDLE: "#D8D8D8",
}
PARTS = {
    "compute": "#4477AA",
    "weights": "#44AA99",
    "state": "#DDCC77",
    "synchronisation": "#CC6677",
    "pointwise": "#8C8C8C",
}
STAGE = {"forward": "#44AA99", "loss": "#DDCC77", "backward": "#CC6677", "optimizer": "#332288"}
DARK = "#1a1a1b"  # not the ink, which turns light on a dark page


def draw(profile: Profile) -> list[Part]:
    """Every plot there is something for. Raises MissingMatplotlib."""
    with drawing.style():
        found = (kind(profile) for kind in (against_steps, breakdown, timeline, batches))
        return [part for part in found if part is not None]


def _origin(profile: Profile) -> str:
    return f"{profile.machine.name}, {where(profile.machine)}; {profile.subject}"


def _style(arm: str) -> tuple[str, str]:
    return COLOURS.get(arm.removesuffix(".nn"), COLOURS["torchrl"])


def against_steps(profile: Profile) -> Part | None:
    """Time and memory against T."""
    if not any(profile.of(arm) for arm in profile.arms):
        return None
    figure = drawing.figure(8, 3.1)
    whole, step, memory = figure.subplots(1, 3)
    for n, arm in enumerate(profile.arms):
        points = profile.of(arm)
        if not points:
            continue
        colour, marker = _style(arm)
        # The first arm is wide and hollow: a later one that runs over it does not hide it.
        width, size, face = (3.2, 7.5, "none") if n == 0 and len(profile.arms) > 1 else (1.1, 4, colour)
        line = {"color": colour, "marker": marker, "markersize": size, "linewidth": width, "label": arm}
        line |= {"markerfacecolor": face, "alpha": 0.65 if n == 0 and len(profile.arms) > 1 else 1.0}
        steps = [point.steps for point in points]
        for axes, factor in ((whole, lambda point: 1e3), (step, lambda point: 1e6 / point.steps)):
            middle = [point.seconds * factor(point) for point in points]
            low = [(point.seconds - point.low) * factor(point) for point in points]
            high = [(point.high - point.seconds) * factor(point) for point in points]
            axes.errorbar(steps, middle, yerr=[low, high], capsize=2, elinewidth=0.8, **line)
        known = [point for point in points if point.peak]
        memory.plot([point.steps for point in known], [(point.held + point.peak) / MIB for point in known], **line)
        most = profile.longest(arm)
        if known and most > known[-1].steps:
            last = known[-1]
            memory.plot(
                [last.steps, most], [(last.held + last.peak) / MIB, profile.machine.memory / MIB], color=colour,
                linestyle=":", linewidth=line["linewidth"], alpha=line["alpha"], label=f"{arm}, extrapolated",
            )  # fmt: skip
    memory.axhline(profile.machine.memory / MIB, color=FAINT, linewidth=0.8)
    memory.annotate(
        "all memory of this machine" if profile.machine.kind == "cpu" else "all memory of the device",
        (0.02, profile.machine.memory / MIB), xycoords=("axes fraction", "data"), xytext=(0, -9),
        textcoords="offset points", fontsize=7, color=FAINT,
    )  # fmt: skip
    for axes, title, unit in (
        (whole, "time of an iteration", "ms"),
        (step, "time per step", "us"),
        (memory, "memory", "MiB"),
    ):
        axes.set_title(title)
        axes.set(xlabel="time steps T (log)", ylabel=unit if axes is step else f"{unit} (log)")
        drawing.log(axes, "x", base=2)
        if axes is step:
            axes.set_ylim(bottom=0)
        else:
            drawing.log(axes, "y")
    _sparse(memory)
    drawing.legend(figure)
    longest = [
        f"{point.arm} {number(point.seconds * 1e3)} ms" for arm in profile.arms for point in profile.of(arm)[-1:]
    ]
    alt = f"Time and memory against T; at the longest: {', '.join(longest)}"
    plot = drawing.finish(figure, "profile-steps", alt, [_origin(profile)])
    caption = "One iteration: forward, loss, backward, optimizer. Points are medians, whiskers quartiles. Memory is "
    caption += (
        "the most that is allocated at once; the dotted line goes on by the two longest T, up to all memory there is."
    )
    return Part("Time and memory against T", [caption], plots=[plot])


def _sparse(axes: Axes) -> None:
    """Few marks on logarithmic axes of many decades; 65536 is 64k."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axes.get_xlim()
    octaves = math.log2(high / low)
    axes.xaxis.set_major_locator(LogLocator(2 ** max(1, round(octaves / 5))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary(value)))
    axes.yaxis.set_major_locator(LogLocator(10))


def _binary(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1024:
            return f"{value:g}{unit}"
        value /= 1024
    return f"{value:g}G"


def breakdown(profile: Profile) -> Part | None:
    """Stacked bars of the phases."""
    points = [point for arm in profile.arms for point in traced(profile, arm)]
    if not points:
        return None
    figure = drawing.figure(8, 1.25 + 0.3 * len(points))
    axes = figure.subplots()
    names = [f"{point.arm}, T = {point.steps:,}" for point in points]
    left = [0.0] * len(points)
    for name in trace.ORDER:
        widths = [_micro(point, name) for point in points]
        if any(widths):
            axes.barh(names, widths, left=left, height=0.62, color=PHASES[name], label=name)
            for row, (begin, width) in enumerate(zip(left, widths, strict=True)):
                share = width / points[row].per_step
                if share > 0.08:
                    dark = PHASES[name] in ("#332288", "#228833", "#AA3377", "#4477AA")
                    axes.text(
                        begin + width / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=7,
                        color="white" if dark else DARK,
                    )  # fmt: skip
            left = [begin + width for begin, width in zip(left, widths, strict=True)]
    drawing.rows(axes)
    axes.set_xlabel("us per time step")
    drawing.legend(figure)
    last = points[-1]
    top = max(points[-1].phases, key=lambda name: last.phases[name].seconds)
    alt = f"Phases of an iteration in microseconds per step; of {names[-1]} the largest is {top}"
    plot = drawing.finish(figure, "profile-phases", alt, [_origin(profile)])
    what = "the CPU's own time in each phase, scaled to the iteration without the profiler"
    if profile.machine.kind == "cuda":
        what = "those of the kernels; the rest of the iteration the device is idle"
    caption = f"From one more iteration under torch.profiler. Times are {what}. Within torch's own layers the products "
    caption += "and the scan are one kernel or one loop, and not separable."
    return Part("Where the time goes", [caption], plots=[plot])


def _micro(point: Point, name: str) -> float:
    return point.phases[name].seconds / point.steps * 1e6 if name in point.phases else 0.0


def timeline(profile: Profile) -> Part | None:
    """One iteration of each arm at its longest T."""
    points = [known[-1] for arm in profile.arms if (known := traced(profile, arm))]
    if not points:
        return None
    tracks = [
        [track for track in ("stages", "host", "device") if any(s.track == track for s in p.spans)] for p in points
    ]
    figure = drawing.figure(8, 1.2 + sum(0.35 + 0.27 * len(own) for own in tracks))
    grid = figure.subplots(len(points), 1, sharex=True, squeeze=False, height_ratios=[len(own) for own in tracks])
    for axes, point, own in zip(grid.flat, points, tracks, strict=True):
        for row, track in enumerate(own):
            _bars(axes, point, track, row)
        axes.set_yticks(range(len(own)), own)
        axes.set_title(f"{point.arm}, T = {point.steps:,}, under the profiler", loc="left")
        drawing.rows(axes)
    grid.flat[-1].set_xlabel("ms from the start of the iteration")
    drawing.legend(figure)
    alt = f"Timeline of one iteration: {', '.join(f'{p.arm} {number(p.profiled * 1e3)} ms' for p in points)}"
    plot = drawing.finish(figure, "profile-timeline", alt, [_origin(profile)])
    caption = "Stages of the training step, and within them what the recurrent layers do on the host"
    caption += " and the kernels on the device" if profile.machine.kind == "cuda" else ""
    caption += ". The Chrome trace beside this page has every operator."
    return Part("Timeline of one iteration", [caption], plots=[plot])


def _bars(axes: Axes, point: Point, track: str, row: int) -> None:
    """The spans of one track, by name and so by colour."""
    colours = STAGE if track == "stages" else PHASES
    spans = [span for span in point.spans if span.track == track]
    for name in dict.fromkeys(span.name for span in spans):
        pieces = [(span.start * 1e3, span.seconds * 1e3) for span in spans if span.name == name]
        label = f"{name} (stage)" if track == "stages" else name
        axes.broken_barh(pieces, (row - 0.38, 0.76), facecolors=colours.get(name, FAINT), label=label, linewidth=0)
        whole = sum(seconds for _, seconds in pieces)
        if track == "stages" and len(pieces) == 1 and whole > 0.08 * point.profiled * 1e3:
            axes.text(pieces[0][0] + whole / 2, row, name, ha="center", va="center", fontsize=7, color=DARK)


def batches(profile: Profile) -> Part | None:
    """The predicted step at larger batches."""
    found = profile.outlook
    if found is None:
        return None
    figure = drawing.figure(8, 1.25 + 0.3 * len(found.batches))
    axes = figure.subplots()
    names = [f"batch {rows:,}" for rows in found.batches]
    left = [0.0] * len(names)
    for part, colour in PARTS.items():
        widths = [split[part] for split in found.batches.values()]
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "hatch": "/////", "linewidth": 1}
        axes.barh(names, widths, left=left, height=0.62, label=part, **look)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, (rows, total) in enumerate(zip(found.batches, left, strict=True)):
        told = f"{total:.3g} us, {total / rows * found.batch / left[0]:.0%} of the time per row"
        axes.annotate(told, (total, row), (5, 0), textcoords="offset points", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, 1.3 * max(left))
    drawing.rows(axes)
    axes.set_xlabel(f"us per time step, forward and backward, predicted for {found.device}")
    drawing.legend(figure)
    alt = f"Predicted step on {found.device} by its parts, {found.dtype}: " + ", ".join(
        f"{total:.3g} us at batch {rows}" for rows, total in zip(found.batches, left, strict=True)
    )
    origin = f"predicted for {found.device}, nothing of it measured; {found.dtype}, the largest recurrent stack"
    plot = drawing.finish(figure, "profile-batches", alt, [origin])
    caption = "By the plan's cost model. State is reading it; synchronisation, barriers and exchange between slices."
    return Part("Predicted: the step at larger batches", [caption], plots=[plot])


assert set(PHASES) == set(trace.ORDER)
assert set(STAGE) == set(trace.STAGES)
