"""A plan to look at: text bars of what one multiprocessor holds, and a drawing of the chip. No torch, no Triton.

matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..planner import occupancy
from ..planner import plan as planning
from ..planner.hardware import Hardware
from ..planner.plan import Pass, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASSES = ("forward", "backward")


class MissingMatplotlib(RuntimeError):
    """There is nothing to draw with."""


# What programs there are, and where.


def running(part: Pass, hardware: Hardware) -> int:
    """Programs that are on the device at the same time, in one round."""
    places = hardware.multiprocessors * part.choice.blocks // part.tiling.slices
    return part.tiling.slices * min(part.groups, places)


def crowd(part: Pass, hardware: Hardware) -> int:
    """Programs on the fullest multiprocessor: a second one shares only when every multiprocessor has its first."""
    return min(part.choice.blocks, -(-running(part, hardware) // hardware.multiprocessors))


@dataclass(frozen=True)
class Job:
    """What one group works on: batch rows ``first`` to ``last``, both included, in one direction."""

    direction: int
    first: int
    last: int


def job(part: Pass, batch: int, number: int) -> Job:
    """The number-th job, in the kernels' order: all batch rows of the first direction, then those of the second."""
    rows = part.tiling.batch_tile * part.tiling.subtiles
    direction, tile = divmod(number, -(-batch // rows))
    return Job(direction, tile * rows, min(batch, (tile + 1) * rows) - 1)


# What one multiprocessor holds.


@dataclass(frozen=True)
class Budget:
    """``whole`` bytes of one memory of one multiprocessor, and who has them: the parts add up to the whole."""

    name: str
    whole: int
    parts: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if sum(n for _, n in self.parts) != self.whole or min(n for _, n in self.parts) < 0:
            raise AssertionError(f"the parts of {self.name} do not add up to {self.whole} bytes: {self.parts}")


def budgets(part: Pass, hardware: Hardware) -> tuple[Budget, Budget]:
    """(shared memory, registers) of the fullest multiprocessor."""
    programs = crowd(part, hardware)
    shared = {
        "weights": programs * part.in_shared,
        "staging": programs * (part.shared - part.in_shared),
        "reserved": 1024 * programs if part.choice.blocks > 1 else 0,
    }
    threads = 32 * part.choice.warps * programs
    usable = 4 * threads * occupancy.register_limit(part.choice)
    used = min(4 * threads * part.registers, usable)  # a thread that needs more spills
    registers = {
        "weights": programs * part.in_registers,
        "working": used - programs * part.in_registers,
        "free": usable - used,
    }
    whole = 4 * hardware.registers
    return (
        Budget("shared memory", hardware.shared, _filled(shared, "free", hardware.shared)),
        Budget("registers", whole, _filled(registers, "out of reach", whole)),
    )


def _filled(parts: dict[str, int], rest: str, whole: int) -> tuple[tuple[str, int], ...]:
    """The parts, and ``rest`` for what they leave of the whole."""
    return (*parts.items(), (rest, whole - sum(parts.values())))


def whole_of(plan: Plan, part: Pass) -> int:
    """Bytes of W_hh of one direction, which the shares of a pass must add up to."""
    total = part.tiling.gates * plan.hidden**2 * planning.DTYPES[plan.dtype]
    found = part.shares.registers + part.shares.shared + part.shares.streamed
    if found != total:
        raise AssertionError(f"{part.shares} add up to {found} bytes, and W_hh has {total}")
    return total


def resident(part: Pass) -> str:
    """As a percentage; 100% if nothing at all is streamed, and only then."""
    return "100%" if not part.shares.streamed else f"{math.floor(1000 * part.shares.resident) / 10:.1f}%"


# Text.

GLYPHS = {"weights": "#", "staging": "=", "working": "=", "reserved": "r", "free": ".", "out of reach": "x"}


def apportion(parts: list[int], width: int) -> list[int]:
    """Whole numbers that add up to ``width``, as near to the parts' proportions as they can be; none of a part that is
    not 0 is 0, if the width allows it."""
    whole = sum(parts)
    result = [max(width * n // whole, min(n, 1)) for n in parts]
    while sum(result) != width:
        step = 1 if sum(result) < width else -1
        # The part that is furthest from its share, and that can give if one must.
        candidates = [i for i, n in enumerate(result) if parts[i] and (step > 0 or n > 1)] or [
            i for i, n in enumerate(result) if n
        ]
        result[max(candidates, key=lambda i: step * (width * parts[i] - result[i] * whole))] += step
    return result


def bar(budget: Budget, width: int = 64) -> list[str]:
    """Two lines: the bar, and what its signs stand for in bytes."""
    lengths = apportion([n for _, n in budget.parts], width)
    drawn = "".join(GLYPHS[name] * n for (name, _), n in zip(budget.parts, lengths, strict=True))
    told = ["weights", "staging", "working", "free"]  # even if there is nothing of it
    key = "   ".join(f"{GLYPHS[name]} {name} {n:,}" for name, n in budget.parts if n or name in told)
    return [f"{budget.name:13} [{drawn}] {budget.whole:,} bytes", f"{'':13}  {key}"]


# The drawing. Lengths are in inches, y downward.

# Paul Tol's "light" scheme, safe for the colour-blind and light enough for labels on it.
GROUPS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00")
REGISTERS, SHARED, BUSY, FREE, BEYOND, IDLE, INK, FAINT = (
    "#222255", "#AA3377", "#8C8C8C", "#FFFFFF", "#D5D5D5", "#E9E9E9", "#1A1A1A", "#777777",
)  # fmt: skip
COLOURS = {
    "registers": {"weights": REGISTERS, "working": BUSY, "free": FREE, "out of reach": BEYOND},
    "shared memory": {"weights": SHARED, "staging": BUSY, "reserved": BEYOND, "free": FREE},
}
MARGIN, GUTTER, PANEL = 0.4, 0.5, 6.8
LARGEST_CELL = 0.8


class _Sheet:
    """A figure on which one draws in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.height = height

    def box(
        self, x: float, y: float, width: float, height: float, face: str, edge: str = "none", line: float = 0.5,
        name: str | None = None, hatch: str | None = None,
    ) -> None:  # fmt: skip
        from matplotlib.patches import Rectangle

        patch = Rectangle(
            (x, self.height - y - height),
            width,
            height,
            facecolor=face,
            edgecolor=edge,
            linewidth=line,
            hatch=hatch,
            transform=self.figure.dpi_scale_trans,
            gid=name,
        )
        self.figure.add_artist(patch)

    def text(self, x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
        style = {"va": "center", "ha": "left"} | style
        self.figure.text(
            x, self.height - y, text, fontsize=size, color=colour, transform=self.figure.dpi_scale_trans, **style
        )


def grid(count: int) -> tuple[int, int]:
    """(columns, rows) of a grid a little wider than high, with few places left over."""

    def badness(columns: int) -> float:
        rows = -(-count // columns)
        return 6 * (columns * rows - count) / count + abs(math.log(columns / rows / 1.25))

    columns = min(range(1, count + 1), key=badness)
    return columns, -(-count // columns)


def cell_height(width: float) -> float:
    return min(0.95 * width, 0.5)


def _gauge(sheet: _Sheet, budget: Budget, x: float, y: float, width: float, height: float) -> None:
    sheet.box(x, y, width, height, FREE, INK, 0.4)
    left = x
    for name, n in budget.parts:
        length = width * n / budget.whole
        if n and name != "free":
            sheet.box(left, y, length, height, COLOURS[budget.name][name])
        left += length


def _label(part: Pass, program: int) -> str:
    """Of one program: slice or, with a two-dimensional split, its column and row; with many groups, the group too."""
    group, slice_ = divmod(program, part.tiling.slices)
    column, row = divmod(slice_, part.tiling.rows)
    if part.tiling.slices == 1:
        return f"g{group}"
    name = f"c{column} r{row}" if part.tiling.rows > 1 else f"s{slice_}"
    return f"g{group} {name}" if part.groups > len(GROUPS) else name


def _multiprocessors(sheet: _Sheet, plan: Plan, name: str, part: Pass, left: float, top: float) -> float:
    """All of them in a grid; returns where it ends."""
    hardware = plan.hardware
    columns, rows = grid(hardware.multiprocessors)
    width = min(PANEL / columns, LARGEST_CELL)
    height = cell_height(width)
    left += (PANEL - columns * width) / 2
    gap = 0.06 * width
    slots, programs = crowd(part, hardware), running(part, hardware)
    for i in range(hardware.multiprocessors):
        x, y = left + i % columns * width, top + i // columns * height
        w, h = width - gap, height - gap
        sheet.box(x, y, w, h, IDLE, "#C8C8C8", 0.4, name=f"{name}-multiprocessor-{i}")
        for slot in range(slots):
            program = slot * hardware.multiprocessors + i
            if program >= programs:
                continue
            colour = GROUPS[program // part.tiling.slices % len(GROUPS)]
            own, at = w / slots, x + slot * w / slots
            sheet.box(at, y, own, h, colour, INK, 0.4, name=f"{name}-program-{program}")
            label = _label(part, program)
            # As large as fits: a digit is about 0.64 of the font's size wide.
            size = min(9.0, 72 * 0.5 * h, 72 * 0.9 * own / (0.64 * len(label)))
            sheet.text(at + own / 2, y + 0.5 * h, label, size, ha="center")
    return top + rows * height


def _homes(sheet: _Sheet, plan: Plan, part: Pass, left: float, top: float) -> float:
    """W_hh as one bar, cut by where its bytes are."""
    total = whole_of(plan, part)
    homes = (
        ("registers", part.shares.registers, REGISTERS, None),
        ("shared memory", part.shares.shared, SHARED, None),
        ("streamed", part.shares.streamed, FREE, "//////"),
    )
    at = left
    for _, n, colour, hatch in homes:
        if n:
            sheet.box(at, top, PANEL * n / total, 0.17, colour, INK, 0.4, hatch=hatch)
        at += PANEL * n / total
    told = "  +  ".join(f"{n:,} {name}" for name, n, _, _ in homes)
    sheet.text(left, top + 0.29, f"W_hh of one direction, bytes:  {told}  =  {total:,}", 7.5)
    return top + 0.46


def _one(sheet: _Sheet, part: Pass, hardware: Hardware, left: float, top: float) -> float:
    """What one multiprocessor's memories hold: all with a program are alike."""
    half = PANEL / 2
    for n, budget in enumerate(reversed(budgets(part, hardware))):
        x = left + n * half
        sheet.text(x, top + 0.08, budget.name, 7.5)
        _gauge(sheet, budget, x + 0.95, top, half - 1.1, 0.16)
    return top + 0.24


def _name_of(found: Job, directions: int) -> str:
    rows = f"batch row {found.first}" if found.first == found.last else f"batch rows {found.first} to {found.last}"
    return rows if directions == 1 else f"direction {found.direction}{' (reverse)' * found.direction}, {rows}"


def _group_entries(plan: Plan, part: Pass) -> list[tuple[str | None, str]]:
    """(colour, what it stands for) of the groups of the first round, and remarks without a colour."""
    hardware = plan.hardware
    at_once = running(part, hardware) // part.tiling.slices
    jobs = [job(part, plan.batch, n) for n in range(min(at_once, len(GROUPS)))]
    entries: list[tuple[str | None, str]] = []
    if at_once <= len(GROUPS):
        entries += [(GROUPS[n], f"group {n}: {_name_of(found, plan.directions)}") for n, found in enumerate(jobs)]
    else:
        last = job(part, plan.batch, at_once - 1)
        entries += [(GROUPS[0], f"group 0: {_name_of(jobs[0], plan.directions)}")]
        entries += [(GROUPS[1], f"group 1: {_name_of(jobs[1], plan.directions)}")]
        entries += [(GROUPS[(at_once - 1) % len(GROUPS)], f"group {at_once - 1}: {_name_of(last, plan.directions)}")]
        entries += [(None, f"{at_once} groups in order; their colours repeat")]
    if part.groups > at_once:
        entries += [(None, f"{part.groups - at_once} more groups take the places of those that end")]
    if part.rounds > 1:
        entries += [(None, f"round 1 of {part.rounds}; the next take the other jobs")]
    free = hardware.multiprocessors - min(running(part, hardware), hardware.multiprocessors)
    entries += [(IDLE, f"{free} of {hardware.multiprocessors} multiprocessors idle")]
    return entries


def _legend(sheet: _Sheet, entries: list[tuple[str | None, str]], left: float, top: float) -> float:
    """Two columns, filled row by row."""
    for n, (colour, text) in enumerate(entries):
        x, y = left + n % 2 * PANEL / 2, top + n // 2 * 0.19
        if colour:
            sheet.box(x, y + 0.02, 0.2, 0.13, colour, INK, 0.4)
        sheet.text(x + 0.28, y + 0.09, text, 7.5)
    return top + -(-len(entries) // 2) * 0.19


def describe(part: Pass, hardware: Hardware) -> str:
    """Slices, split, groups and rounds in one line."""
    t = part.tiling
    at_once = running(part, hardware) // t.slices
    groups = f"{count(part.groups, 'group')}{f', {at_once:,}' if at_once < part.groups else ''} at a time"
    split = f" ({t.columns} columns x {t.rows} blocks of K)" if t.rows > 1 else ""
    tiles = f"{t.batch_tile} rows" + (f" x {t.subtiles}" if t.subtiles > 1 else "")
    return (
        f"{count(t.slices, 'slice')} x {count(t.units, 'unit')}{split}, batch tile {tiles}, "
        f"{count(part.choice.warps, 'warp')}; {groups}, {count(part.rounds, 'round')}"
    )


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def _key(sheet: _Sheet, plan: Plan, top: float) -> None:
    """What the bars' colours stand for, once for both panels."""
    found = [budget for name in PASSES for budget in budgets(getattr(plan, name), plan.hardware)]
    beyond = any(n > budget.whole // 100 for budget in found for name, n in budget.parts if name == "out of reach")
    entries: list[tuple[str, str | None, str]] = [
        (REGISTERS, None, "weights in registers"),
        (SHARED, None, "weights in shared memory"),
        (FREE, "//////", "weights streamed each step"),
        (BUSY, None, "working registers, staging"),
        (FREE, None, "free"),
    ]
    if beyond:
        entries += [(BEYOND, None, "registers beyond a thread's limit")]
    x = MARGIN
    for colour, hatch, text in entries:
        sheet.box(x, top, 0.26, 0.14, colour, INK, 0.4, hatch=hatch)
        sheet.text(x + 0.33, top + 0.075, text, 8)
        x += 0.33 + 0.068 * len(text) + 0.3
    registers, shared = 4 * plan.hardware.registers, plan.hardware.shared
    sheet.text(
        MARGIN,
        top + 0.32,
        f"The bars: W_hh by its homes; a multiprocessor's {registers:,} bytes of registers and {shared:,} of shared "
        "memory. A rectangle is a multiprocessor with its program's slice (s), column and row (c, r) or group (g). "
        "Which program is where is the device's choice: drawn in order.",
        7.5,
        FAINT,
    )


def figure(plan: Plan) -> Figure:
    """The chip in the forward and in the backward pass, every multiprocessor of it."""
    parts = [(name, getattr(plan, name)) for name in PASSES]
    columns, rows = grid(plan.hardware.multiprocessors)
    body = 2.03 + rows * cell_height(min(PANEL / columns, LARGEST_CELL))
    legends = max(-(-len(_group_entries(plan, part)) // 2) * 0.19 for _, part in parts)
    sheet = _Sheet(2 * MARGIN + 2 * PANEL + GUTTER, body + legends + 0.85)
    times = " and ".join(f"{part.predicted:.2f} us {name}" for name, part in parts)
    title = (
        f"{plan.cell.upper()}  H={plan.hidden}  B={plan.batch}  D={plan.directions}  {plan.dtype} on "
        f"{plan.hardware.name}: predicted {times} per time step"
    )
    size = min(14, 72 * (2 * PANEL + GUTTER) / (0.67 * len(title)))
    sheet.text(MARGIN, 0.36, title, size, weight="bold")
    for n, (name, part) in enumerate(parts):
        left = MARGIN + n * (PANEL + GUTTER)
        sheet.text(left, 0.78, name, 11, weight="bold")
        told = f"{resident(part)} resident, predicted {part.predicted:.2f} us per time step"
        sheet.text(left + PANEL, 0.78, told, 9, ha="right")
        sheet.text(left, 0.98, describe(part, plan.hardware), 8)
        top = _homes(sheet, plan, part, left, 1.13)
        top = _one(sheet, part, plan.hardware, left, top)
        top = _multiprocessors(sheet, plan, name, part, left, top + 0.08)
        _legend(sheet, _group_entries(plan, part), left, top + 0.1)
    _key(sheet, plan, body + legends + 0.25)
    return sheet.figure


def svg(plan: Plan) -> str:
    """The drawing as text, the same for the same plan.

    Raises:
        MissingMatplotlib: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingMatplotlib(
            f"drawing a plan needs matplotlib, which cannot be imported ({error}): pip install 'persistrnn[draw]'"
        ) from error
    target = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own style shall not change the drawing
        matplotlib.rcParams.update({"svg.hashsalt": "persistrnn", "svg.fonttype": "none", "hatch.linewidth": 0.6})
        figure(plan).savefig(target, format="svg", metadata={"Date": None, "Creator": "persistrnn"})
    return _compact(target.getvalue())


_RECTANGLE = re.compile(
    r'<path d="M (\S+) (\S+) \nL (\S+) \2 \nL \3 (\S+) \nL \1 \4 \nz\n" style="([^"]*)"/>|style="([^"]*)"'
)


def _tenth(points: float | str) -> str:
    return f"{round(float(points), 1):g}"


def _compact(svg: str) -> str:
    """The same drawing in a fourth of the bytes: most of it are rectangles and styles, of which there are few."""
    classes: dict[str, str] = {}

    def name(style: str) -> str:
        return f'class="{classes.setdefault(style, f"s{len(classes)}")}"'

    def shorter(found: re.Match[str]) -> str:
        left, bottom, right, top, style, other = found.groups()
        if style is None:
            return name(other)
        wide, high = float(right) - float(left), float(top) - float(bottom)
        return (
            f'<path {name(style)} d="M{_tenth(left)} {_tenth(bottom)}h{_tenth(wide)}v{_tenth(high)}h{_tenth(-wide)}z"/>'
        )

    svg = _RECTANGLE.sub(shorter, svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = re.sub(
        r' +<g id="([a-z]+-(?:multiprocessor|program)-\d+)">\s*<path ([^>]*)/>\s*</g>', r'<path id="\1" \2/>', svg
    )
    # A program that has all of a multiprocessor covers its rectangle.
    svg = re.sub(r'<path (id="\S+") class="\S+" (d="[^"]*")/>\n(<path \S+ \S+ \2/>)', r"<g \1>\3</g>", svg)
    svg = re.sub(r' *<g id="text_\d+">\s*(?:<!--.*?-->\s*)?(<text .*?</text>)\s*</g>', r"\1", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<text [^>]*?x=")([\d.]+)(" y=")([\d.]+)"', lambda m: f'{m[1]}{_tenth(m[2])}{m[3]}{_tenth(m[4])}"', svg
    )
    styles = "".join(f".{short}{{{style}}}" for style, short in classes.items())
    return svg.replace("<defs>", f"<defs>\n<style>{styles}</style>", 1)
