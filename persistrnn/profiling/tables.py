"""The tables of a profile, for the page and as text. Measured and predicted numbers never share a column."""

from __future__ import annotations

from .measure import LEAST
from .page import MIB, Line, Table, known, number, numbers, table, words
from .record import GIB, Machine, Point, Profile
from .trace import Phase


def where(machine: Machine) -> str:
    """What stands over measured numbers."""
    if machine.interpreted:
        return "measured in Triton's interpreter, CPU"
    return "measured on this CPU" if machine.kind == "cpu" else "measured"


def summary(profile: Profile) -> Table:
    """One row per arm and T."""
    measured = where(profile.machine)
    columns = [*words("arm"), *numbers("T"), *words("path", band=measured)]
    columns += numbers("ms per iteration", "quartiles", "us per step", "tokens/s", band=measured)
    columns += numbers("peak MiB", "of it held MiB", "KiB per token", band=measured)
    columns += numbers("longest T", band="extrapolated")
    lines = []
    for point in profile.points:
        start = [point.arm, f"{point.steps:,}"]
        if point.failed:
            lines.append(Line([*start, point.failed, *[""] * 8], True))
            continue
        cells = [point.path, number(point.seconds * 1e3), f"{number(point.low * 1e3)} to {number(point.high * 1e3)}"]
        cells += [number(point.per_step), number(point.tokens_per_second)]
        peak = [point.untraced, ""]
        if point.peak:
            peak = [number((point.held + point.peak) / MIB), number(point.bytes_per_token / 1024)]
        cells += [peak[0], number(point.held / MIB), peak[1]]
        lines.append(Line([*start, *cells, f"{profile.longest(point.arm):,}"]))
    caption = "Iterations (forward, loss, backward, optimizer); median and quartiles"
    if any(not point.failed and point.iterations < profile.settings.iterations for point in profile.points):
        caption += f", of {LEAST} where they are long"
    caption += ". Peak is the most allocated at once, with what is held between iterations; per token is without that"
    return table(caption, columns, lines, False)


def traced(profile: Profile, arm: str) -> list[Point]:
    """The points of an arm whose phases are known."""
    return [point for point in profile.of(arm) if point.phases]


def phases(profile: Profile, point: Point, folded: bool) -> Table:
    """Where the time of one point goes."""
    cuda = profile.machine.kind == "cuda"
    measured = where(profile.machine)
    columns = words("phase")
    columns += numbers("ms", "share", "us per step", "TFLOP/s", "GB/s", band=measured)
    columns += (
        numbers("floor, us per step", band="predicted") + numbers("floor over time", band="ratio") if cuda else []
    )
    lines = [Line(_phase(point, name, phase, cuda)) for name, phase in point.phases.items()]
    caption = f"{point.arm} at T = {point.steps:,}: {'time of kernels' if cuda else 'time of this CPU'} by phase"
    return table(caption, columns, lines, folded)


def _phase(point: Point, name: str, phase: Phase, cuda: bool) -> list[str]:
    step = phase.seconds / point.steps * 1e6
    cells = [name, number(phase.seconds * 1e3), f"{phase.seconds / point.seconds:.1%}", number(step)]
    for work, unit in ((phase.flops, 1e12), (phase.bytes, 1e9)):
        cells.append(number(work / phase.seconds / unit) if work and phase.seconds else "")
    if cuda:
        cells.append(known(phase.floor / point.steps * 1e6) if phase.floor else "")
        cells.append(f"{phase.floor / phase.seconds:.1%}" if phase.floor and phase.seconds else "")
    return cells


def predicted(profile: Profile) -> list[Table]:
    """The plan's step, and the step at other batches; none without a plan."""
    found = profile.outlook
    if found is None:
        return []
    parts = list(found.passes["forward"].parts)
    band = f"predicted for {found.device}, us per step"
    columns = [*words("pass"), *numbers(*parts, "all", "floor", "torch's own path", band=band)]
    lines = []
    for name, one in found.passes.items():
        lines.append(
            Line([name, *(number(one.parts[part]) for part in parts), *map(number, (one.total, one.floor, one.torch))])
        )
    step = table(
        "One time step of the largest recurrent stack on the kernels, its parts and what no plan can beat",
        columns,
        lines,
        False,
    )
    columns = [*numbers("batch"), *numbers(*parts, "all", "all over this batch", band=band)]
    lines = []
    for rows, split in found.batches.items():
        total = sum(split.values())
        cells = [f"{rows:,}", *(number(split[part]) for part in parts), number(total), f"{total / found.total:.2f}x"]
        lines.append(Line(cells))
    return [step, table("The same, both passes, at other batches", columns, lines, False)]


def report(profile: Profile, advice: list[str]) -> str:
    """All of it as text."""
    machine = profile.machine
    lines = [
        f"{profile.subject}",
        f"{machine.name}, {machine.memory / GIB:.1f} GiB, torch {machine.torch}, Triton {machine.triton}",
        "",
        str(summary(profile)),
    ]
    for arm in profile.arms:
        if points := traced(profile, arm):
            lines += ["", str(phases(profile, points[-1], False))]
    for one in predicted(profile):
        lines += ["", str(one)]
    lines += ["", profile.outlook.text if profile.outlook else f"No plan: {profile.no_outlook}."]
    return "\n".join([*lines, "", *(f"* {words}" for words in advice)])
