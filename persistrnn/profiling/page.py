"""What ``persistrnn profile`` leaves in its folder: a page, the same as text and as JSON, and the traces."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import jinja2

from .. import plots
from ..tables import number
from . import plots as profile_plots
from . import tables
from .advice import advice
from .measure import trace_name
from .record import Point, Profile
from .subject import OURS, TORCH

PAGE, TEXT, DATA = "profile.html", "profile.txt", "profile.json"
TEMPLATE = Path(__file__).with_name("profile.html.jinja")


class Card(NamedTuple):
    """whose: the arm and T that were measured, or what was predicted for which device."""

    whose: str
    what: str
    value: str
    unit: str
    predicted: bool = False


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
        size = number((peak.held + peak.peak) / tables.MIB)
        found.append(Card(_at(peak), "peak memory", size, "MiB"))
        found.append(
            Card(f"{peak.arm}, extrapolated", "longest T that fits", f"{profile.longest(last.arm):,}", "steps")
        )
    if profile.outlook:
        device = f"{profile.outlook.device}, {profile.outlook.dtype}, predicted"
        found.append(Card(device, "per time step", number(profile.outlook.total), "us", True))
    return found


def banners(profile: Profile) -> list[tuple[str, bool]]:
    """(words, whether they are an alarm)."""
    found = []
    if profile.machine.interpreted:
        found.append(("Triton's interpreter: no time on this page says anything about a GPU.", True))
    elif profile.machine.kind == "cpu":
        found.append(("Measured on a CPU. What a GPU would do is predicted, and marked as such.", False))
    failed = [f"{point.arm} at T = {point.steps:,}: {point.failed}" for point in profile.points if point.failed]
    return found + [(text, True) for text in failed]


def page(profile: Profile) -> str:
    """Raises MissingMatplotlib if that is not installed."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    traced = [tables.traced(profile, arm) for arm in profile.arms]
    return template.render(
        mark=plots.MARK,
        subject=profile.subject,
        machine=profile.machine,
        banners=banners(profile),
        cards=cards(profile),
        advice=advice(profile),
        plots=profile_plots.draw(profile),
        summary=tables.summary(profile),
        phases=[tables.phases(profile, p, p is not own[-1]) for own in traced for p in reversed(own)],
        predicted=tables.predicted(profile),
        plan=profile.outlook.text if profile.outlook else "",
        device=profile.outlook.device if profile.outlook else "",
        no_plan=profile.no_outlook,
    )


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
    page = path / PAGE
    ours = page.is_file() and plots.MARK.encode() in page.read_bytes()[:2048]
    for name in (PAGE, TEXT, DATA, trace_name(OURS), trace_name(TORCH)):
        if os.path.lexists(path / name) and not ours:
            raise FileExistsError(f"{path / name} is there, and no profile wrote it: move it, or name another folder")
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
