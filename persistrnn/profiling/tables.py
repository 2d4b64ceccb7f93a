"""The tables of a profile, for the page and as text. Measured and predicted numbers never share a column."""

from __future__ import annotations

from .measure import LEAST
from .page import MIB, Banner, Line, Table, number, numbers, table, words
from .record import GIB, Machine, Point, Profile


def where(machine: Machine) -> str:
    """What stands over measured numbers."""
    if machine.interpreted:
        return "measured in Triton's interpreter, CPU"
    return "measured on this CPU" if machine.kind == "cpu" else "measured"


def origin(machine: Machine) -> str:
    return f"{machine.name}, {machine.memory / GIB:.1f} GiB, torch {machine.torch}, Triton {machine.triton}"


def banners(profile: Profile) -> list[Banner]:
    """What is to be known before any number is read."""
    found = []
    if profile.machine.interpreted:
        found.append(Banner("Triton's interpreter, which is for tests: no time here says anything about a GPU."))
    elif profile.machine.kind == "cpu":
        paths = {call.path for point in profile.points for call in point.calls}
        ran = ": torch's own kernels ran, and the persistent ones did not" * bool(paths and "persistent" not in paths)
        apart = "No time here says anything about a GPU; what one would do is predicted, and stands apart."
        found.append(Banner(f"Measured on a CPU{ran}. {apart}", False))
    failed = [f"{point.arm} at T = {point.steps:,}: {point.failed}" for point in profile.points if point.failed]
    return found + [Banner(text) for text in failed]


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
            peak = [number(point.total / MIB), number(point.bytes_per_token / 1024)]
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
    columns = words("phase")
    columns += numbers("ms", "share", "us per step", "TFLOP/s", "GB/s", band=where(profile.machine))
    if cuda:
        columns += [*numbers("floor, us per step", band="predicted"), *numbers("floor over time", band="ratio")]
    lines = []
    for name, own in point.phases.items():
        cells = [name, number(own.seconds * 1e3), f"{own.seconds / point.seconds:.1%}"]
        cells.append(number(own.seconds / point.steps * 1e6))
        rates = own.flops / 1e12, own.bytes / 1e9
        cells += [number(rate / own.seconds) if rate and own.seconds else "" for rate in rates]
        floor = ["", ""]
        if own.floor and own.seconds:
            floor = [number(own.floor / point.steps * 1e6), f"{own.floor / own.seconds:.1%}"]
        lines.append(Line(cells + floor * cuda))
    caption = f"{point.arm} at T = {point.steps:,}: {'time of kernels' if cuda else 'time of this CPU'} by phase"
    return table(caption, columns, lines, folded)


def predicted(profile: Profile) -> list[Table]:
    """The plan's step, and the step at other batches; none without a plan."""
    found = profile.outlook
    if found is None:
        return []
    parts = list(found.passes["forward"].parts)
    band = f"predicted for {found.device}, us per step"
    columns = [*words("pass"), *numbers(*parts, "all", "floor", "torch's own path", band=band)]
    lines = [
        Line([name, *map(number, (*(one.parts[part] for part in parts), one.total, one.floor, one.torch))])
        for name, one in found.passes.items()
    ]
    caption = "One time step of the largest recurrent stack on the kernels, its parts and what no plan can beat"
    step = table(caption, columns, lines, False)
    columns = [*numbers("batch"), *numbers(*parts, "all", "over this batch", "per row over this one's", band=band)]
    lines = []
    for rows, split in found.batches.items():
        total = sum(split.values())
        ratio = total / found.total
        cells = [f"{rows:,}", *(number(split[part]) for part in parts), number(total)]
        lines.append(Line([*cells, f"{ratio:.2f}x", f"{ratio * found.batch / rows:.0%}"]))
    return [step, table("The same, both passes, at other batches", columns, lines, False)]


def report(profile: Profile, advice: list[str]) -> str:
    """All of it as text."""
    lines = [profile.subject, origin(profile.machine), *(banner.text for banner in banners(profile))]
    shown = [summary(profile)]
    shown += [phases(profile, points[-1], False) for arm in profile.arms if (points := traced(profile, arm))]
    for one in shown + predicted(profile):
        lines += ["", str(one)]
    lines += ["", profile.outlook.text if profile.outlook else f"No plan: {profile.no_outlook}."]
    return "\n".join([*lines, "", *(f"* {words}" for words in advice)])
