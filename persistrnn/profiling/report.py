"""What ``persistrnn profile`` leaves in its folder: a page, the same as text and as JSON, and the traces."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from . import page, plots, tables
from .advice import advice
from .measure import trace_name
from .page import MIB, Card, Part, number
from .record import Point, Profile
from .subject import OURS, TORCH

PAGE, TEXT, DATA = "profile.html", "profile.txt", "profile.json"
TRACES = (trace_name(OURS), trace_name(TORCH))


def _at(point: Point) -> str:
    return f"{point.arm}, T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{point.steps:,}"


def cards(profile: Profile) -> list[Card]:
    """The numbers that one looks for first: those of the first arm at its longest T."""
    points = profile.of(profile.arms[0])
    if not points:
        return []
    last = points[-1]
    found = [
        Card(_at(last), "iteration", number(last.seconds * 1e3), "ms"),
        Card(_at(last), "per time step", number(last.per_step), "us"),
        Card(_at(last), "throughput", number(last.tokens_per_second), "tokens/s"),
    ]
    for peak in [point for point in points if point.peak][-1:]:
        found.append(Card(_at(peak), "peak memory", number(peak.total / MIB), "MiB"))
        longest = f"{profile.longest(last.arm):,}"
        found.append(Card(f"{peak.arm}, extrapolated", "longest T that fits", longest, "steps"))
    if profile.outlook:
        device = f"{profile.outlook.device}, {profile.outlook.dtype}, predicted"
        found.append(Card(device, "per time step", number(profile.outlook.total), "us", True))
    return found


def html(profile: Profile) -> str:
    """The page. Raises ImportError without matplotlib."""
    machine, plan = profile.machine, Part("The plan", tables=tables.predicted(profile))
    if profile.outlook:
        plan.sentences.append(
            f"Predicted for {profile.outlook.device}: how the persistent kernels would run the largest recurrent stack "
            "of it, and what a step would take."
        )
        plan.text = profile.outlook.text
    else:
        plan.sentences.append(f"There is no plan: {profile.no_outlook}.")
    traced = [tables.traced(profile, arm) for arm in profile.arms]
    phases = [tables.phases(profile, p, p is not own[-1]) for own in traced for p in reversed(own)]
    parts = [Part("What the numbers say", points=advice(profile) or ["Nothing stands out."]), *plots.draw(profile)]
    parts += [Part("The numbers", tables=[tables.summary(profile), *phases]), plan]
    below = f"{tables.origin(machine)}, Python {machine.python}, {machine.date}, threads of torch: {machine.threads}"
    title = f"{profile.subject} on {machine.name}"
    return page.render(title, profile.subject, below, tables.banners(profile), parts, cards(profile))


def data(profile: Profile) -> str:
    """Everything that was measured and predicted, as JSON; seconds and bytes, predicted times in microseconds."""
    content = dataclasses.asdict(profile)
    for point in content["points"]:
        point["spans"] = [span._asdict() for span in point["spans"]]
    content["longest"] = {arm: profile.longest(arm) for arm in profile.arms}
    content["banners"] = [banner.text for banner in tables.banners(profile)]
    content["advice"] = advice(profile)
    return json.dumps(content, indent=2, allow_nan=False)


def folder(given: str | Path) -> Path:
    """A folder to write a profile into, as in ``page.folder``."""
    return page.folder(given, PAGE, TEXT, DATA, *TRACES)


def write(profile: Profile, path: Path, traces: Path) -> None:
    """Write the page, the text and the data into a folder that exists, and move the traces there. All is made before
    anything is written, and the page comes first and whole: it bears the mark by which the next run knows the folder.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the folder cannot be written.
    """
    made = {PAGE: html(profile), TEXT: tables.report(profile, advice(profile)), DATA: data(profile)}
    for name, content in made.items():
        page.write(path / name, content + "\n")
    for name in TRACES:
        (path / name).unlink(missing_ok=True)
    for trace in traces.iterdir():
        shutil.move(trace, path / trace.name)
