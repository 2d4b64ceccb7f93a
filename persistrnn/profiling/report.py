"""What ``persistrnn profile`` leaves in its folder: a page, the same as text and as JSON, and the traces."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from . import plots, tables
from .advice import advice
from .measure import trace_name
from .page import MIB, Banner, Card, Part, number, ours, refuse_others, render
from .record import Point, Profile
from .subject import OURS, TORCH

PAGE, TEXT, DATA = "profile.html", "profile.txt", "profile.json"


def _at(point: Point) -> str:
    return f"{point.arm}, T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{point.steps:,}"


def cards(profile: Profile) -> list[Card]:
    """The numbers that one looks for first: those of the first arm at its longest T."""
    points = profile.of(profile.arms[0])
    if not points:
        return []
    last: Point = points[-1]
    whose = _at(last)
    found = [
        Card(whose, "iteration", number(last.seconds * 1e3), "ms"),
        Card(whose, "per time step", number(last.per_step), "us"),
        Card(whose, "throughput", number(last.tokens_per_second), "tokens/s"),
    ]
    for peak in [point for point in points if point.peak][-1:]:
        size = number((peak.held + peak.peak) / MIB)
        found.append(Card(_at(peak), "peak memory", size, "MiB"))
        found.append(
            Card(f"{peak.arm}, extrapolated", "longest T that fits", f"{profile.longest(last.arm):,}", "steps")
        )
    if profile.outlook:
        device = f"{profile.outlook.device}, {profile.outlook.dtype}, predicted"
        found.append(Card(device, "per time step", number(profile.outlook.total), "us", True))
    return found


def banners(profile: Profile) -> list[Banner]:
    found = []
    if profile.machine.interpreted:
        found.append(Banner("Triton's interpreter: no time on this page says anything about a GPU."))
    elif profile.machine.kind == "cpu":
        found.append(Banner("Measured on a CPU. What a GPU would do is predicted, and marked as such.", False))
    failed = [f"{point.arm} at T = {point.steps:,}: {point.failed}" for point in profile.points if point.failed]
    return found + [Banner(text) for text in failed]


def page(profile: Profile) -> str:
    """Raises MissingMatplotlib if that is not installed."""
    machine, plan = profile.machine, Part("The plan", tables=tables.predicted(profile))
    if profile.outlook:
        plan.sentences.append(
            f"Predicted for {profile.outlook.device}: how the persistent kernels would run the largest recurrent stack "
            "of it, and what a step would take."
        )
        plan.text = profile.outlook.text
    else:
        plan.missing = f"There is no plan: {profile.no_outlook}."
    traced = [tables.traced(profile, arm) for arm in profile.arms]
    phases = [tables.phases(profile, p, p is not own[-1]) for own in traced for p in reversed(own)]
    parts = [Part("What the numbers say", points=advice(profile) or ["Nothing stands out."]), *plots.draw(profile)]
    parts += [Part("The numbers", tables=[tables.summary(profile), *phases]), plan]
    below = f"{machine.name}, {machine.date}, torch {machine.torch}, Triton {machine.triton}, Python {machine.python}, "
    below += f"threads of torch: {machine.threads}"
    title = f"{profile.subject} on {machine.name}"
    return render(title, profile.subject, below, banners(profile), parts, cards(profile))


def data(profile: Profile) -> str:
    """Everything that was measured and predicted, as JSON; seconds and bytes, predicted times in microseconds."""
    content = dataclasses.asdict(profile)
    for given, point in zip(content["points"], profile.points, strict=True):
        given["spans"] = [span._asdict() for span in point.spans]
    content["longest"] = {arm: profile.longest(arm) for arm in profile.arms}
    content["advice"] = advice(profile)
    return json.dumps(content, indent=2, allow_nan=False)


def folder(given: str | Path) -> Path:
    """A folder to write a profile into; it is made, and what is in it of an earlier profile will be replaced.

    Raises:
        OSError: it cannot be made or written, or has a file of such a name that no profile wrote.
    """
    path = Path(given)
    path.mkdir(parents=True, exist_ok=True)
    if not ours(path / PAGE):
        refuse_others(path / name for name in (PAGE, TEXT, DATA, trace_name(OURS), trace_name(TORCH)))
    with tempfile.TemporaryFile(dir=path):  # raises where the folder cannot be written
        pass
    return path


def files(profile: Profile, given: str | Path) -> list[Path]:
    """What a profile has written there."""
    every = (Path(given) / name for name in (PAGE, TEXT, DATA, *map(trace_name, profile.arms)))
    return [path for path in every if path.exists()]


def write(profile: Profile, path: Path, traces: Path) -> None:
    """Write the page, the text and the data into a folder that exists, and move the traces there. All is made before
    anything is written, and the page comes first and whole: it bears the mark by which the next run knows the folder.

    Raises:
        MissingMatplotlib: it is not installed.
        OSError: the folder cannot be written.
    """
    made = {
        PAGE: page(profile),
        TEXT: tables.report(profile, advice(profile)) + "\n",
        DATA: data(profile) + "\n",
    }
    for name, content in made.items():
        part = path / f"{name}.part"
        try:
            part.write_text(content, encoding="utf-8")
            part.replace(path / name)
        finally:
            part.unlink(missing_ok=True)
    for arm in (OURS, TORCH):
        (path / trace_name(arm)).unlink(missing_ok=True)
    for trace in traces.iterdir():
        shutil.move(trace, path / trace.name)
