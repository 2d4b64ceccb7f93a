"""Plots of a profile."""

from __future__ import annotations

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
STAGE = {"forward": "#44AA99", "loss": "#DDCC77", "backward": "#CC6677", "optimizer": "#7777CC"}
DARK = ("#4477AA", "#228833", "#AA3377", "#332288")  # white is read on them, black on the others
BLACK = "#1a1a1b"  # not the ink, which turns light on a dark page


def draw(profile: Profile) -> list[Part]:
    """Every plot there is something for. Raises ImportError without matplotlib."""
    with drawing.style():
        found = (kind(profile) for kind in (against_steps, breakdown, timeline, batches))
        return [part for part in found if part is not None]


def _origin(profile: Profile) -> str:
    return f"{profile.machine.name}, {where(profile.machine)}; {profile.subject}"


def against_steps(profile: Profile) -> Part | None:
    """Time and memory against T."""
    arms = [arm for arm in profile.arms if profile.of(arm)]
    if not arms:
        return None
    figure = drawing.figure(8, 3.1)
    whole, step, memory = figure.subplots(1, 3)
    for arm in arms:
        points = profile.of(arm)
        colour, marker = COLOURS.get(arm.removesuffix(".nn"), COLOURS["torchrl"])
        # The first arm is wide and hollow: a later one that runs over it does not hide it.
        below = arm == profile.arms[0] and len(profile.arms) > 1
        line = {"color": colour, "linewidth": 3.2 if below else 1.1, "alpha": 0.65 if below else 1.0}
        dots = {"marker": marker, "markersize": 7.5 if below else 4, "markerfacecolor": "none" if below else colour}
        for axes, factor in ((whole, lambda point: 1e3), (step, lambda point: 1e6 / point.steps)):
            middle = [point.seconds * factor(point) for point in points]
            low = [(point.seconds - point.low) * factor(point) for point in points]
            high = [(point.high - point.seconds) * factor(point) for point in points]
            steps = [point.steps for point in points]
            axes.errorbar(steps, middle, yerr=[low, high], capsize=2, elinewidth=0.8, label=arm, **line, **dots)
        known = [(point.steps, point.total / MIB) for point in points if point.peak]
        if known:
            memory.plot(*zip(*known, strict=True), label=arm, **line, **dots)
        if known and profile.longest(arm) > known[-1][0]:
            end = profile.longest(arm), profile.machine.memory / MIB
            memory.plot(*zip(known[-1], end, strict=True), linestyle=":", label=f"{arm}, extrapolated", **line)
    memory.axhline(profile.machine.memory / MIB, color=FAINT, linewidth=0.8)
    memory.annotate(
        "all memory of this machine" if profile.machine.kind == "cpu" else "all memory of the device",
        (0.02, profile.machine.memory / MIB), xycoords=("axes fraction", "data"), xytext=(0, -9),
        textcoords="offset points", fontsize=7, color=FAINT,
    )  # fmt: skip
    titles = (whole, "time of an iteration", "ms"), (step, "time per step", "us"), (memory, "memory", "MiB")
    for axes, title, unit in titles:
        axes.set_title(title)
        axes.set(xlabel="time steps T (log)", ylabel=unit if axes is step else f"{unit} (log)")
        drawing.log(axes, "x", base=2)
        if axes is step:
            axes.set_ylim(bottom=0)
        else:
            drawing.log(axes, "y")
    drawing.legend(figure)
    longest = [f"{arm} {number(profile.of(arm)[-1].seconds * 1e3)} ms" for arm in arms]
    alt = f"Time and memory against T; at the longest: {', '.join(longest)}"
    plot = drawing.finish(figure, "profile-steps", alt, [_origin(profile)])
    caption = "One iteration: forward, loss, backward, optimizer. Points are medians, whiskers quartiles. Memory is "
    caption += (
        "the most that is allocated at once; the dotted line goes on by the two longest T, up to all memory there is."
    )
    return Part("Time and memory against T", [caption], plots=[plot])


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
        widths = [point.phases.get(name, trace.Phase()).seconds / point.steps * 1e6 for point in points]
        if not any(widths):
            continue
        bars = axes.barh(names, widths, left=left, height=0.62, color=PHASES[name], label=name)
        shares = [width / point.per_step for width, point in zip(widths, points, strict=True)]
        shown = [f"{share:.0%}" if share > 0.08 else "" for share in shares]
        colour = "white" if PHASES[name] in DARK else BLACK
        axes.bar_label(bars, shown, label_type="center", fontsize=7, color=colour)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    drawing.rows(axes)
    axes.set_xlabel("us per time step")
    drawing.legend(figure)
    last = points[-1].phases
    top = max(last, key=lambda name: last[name].seconds)
    alt = f"Phases of an iteration in microseconds per step; of {names[-1]} the largest is {top}"
    plot = drawing.finish(figure, "profile-phases", alt, [_origin(profile)])
    what = "the CPU's own time in each phase, scaled to the iteration without the profiler"
    if profile.machine.kind == "cuda":
        what = "those of the kernels; the rest of the iteration the device is idle"
    caption = f"From one more iteration under torch.profiler. Times are {what}. Within torch's own layers the products "
    caption += "and the scan are one kernel or one loop, and not separable."
    return Part("Where the time goes", [caption], plots=[plot])


def timeline(profile: Profile) -> Part | None:
    """One iteration of each arm at its longest T."""
    points = [known[-1] for arm in profile.arms if (known := traced(profile, arm))]
    if not points:
        return None
    tracks = [list(dict.fromkeys(span.track for span in point.spans)) for point in points]
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
    caption += " and the kernels on the device" * (profile.machine.kind == "cuda")
    caption += ". The Chrome trace beside this page has every operator."
    return Part("Timeline of one iteration", [caption], plots=[plot])


def _bars(axes: Axes, point: Point, track: str, row: int) -> None:
    """The spans of one track, by name and so by colour."""
    colours = STAGE if track == "stages" else PHASES
    pieces: dict[str, list[tuple[float, float]]] = {}
    for span in point.spans:
        if span.track == track:
            pieces.setdefault(span.name, []).append((span.start * 1e3, span.seconds * 1e3))
    for name, own in pieces.items():
        label = f"{name} (stage)" if track == "stages" else name
        axes.broken_barh(own, (row - 0.38, 0.76), facecolors=colours.get(name, FAINT), label=label, linewidth=0)
        begin, width = own[0]
        if track == "stages" and width > 80 * point.profiled:  # a twelfth of the whole
            axes.text(begin + width / 2, row, name, ha="center", va="center", fontsize=7, color=BLACK)


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
        bars = axes.barh(names, widths, left=left, height=0.62, label=part, **look)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    per_row = [total / rows * found.batch / found.total for rows, total in zip(found.batches, left, strict=True)]
    words = [f"{total:.3g} us, {ratio:.0%} of the time per row" for total, ratio in zip(left, per_row, strict=True)]
    axes.bar_label(bars, words, padding=5, fontsize=7, color=INK)
    axes.set_xlim(0, 1.3 * max(left))
    drawing.rows(axes)
    axes.set_xlabel(f"us per time step, forward and backward, predicted for {found.device}")
    drawing.legend(figure)
    each = ", ".join(f"{total:.3g} us at batch {rows}" for rows, total in zip(found.batches, left, strict=True))
    alt = f"Predicted step on {found.device} by its parts, {found.dtype}: {each}"
    origin = f"predicted for {found.device}, nothing of it measured; {found.dtype}, the largest recurrent stack"
    plot = drawing.finish(figure, "profile-batches", alt, [origin])
    caption = "By the plan's cost model. State is reading it; synchronisation, barriers and exchange between slices."
    return Part("Predicted: the step at larger batches", [caption], plots=[plot])


assert set(PHASES) == set(trace.ORDER)
assert set(STAGE) == set(trace.STAGES)
