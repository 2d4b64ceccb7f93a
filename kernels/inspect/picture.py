"""A plan to look at: text bars of what one multiprocessor holds, and a drawing of the chip. No torch, no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from ..planner import occupancy
from ..planner import plan as planning
from ..planner.hardware import Hardware
from ..planner.plan import Pass, Plan

PASSES = ("forward", "backward")


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


# The drawing. Lengths are in points, y downward.

# Paul Tol's "light" scheme, safe for the colour-blind and light enough for labels on it.
GROUPS = ("#77aadd", "#ee8866", "#eedd88", "#44bb99", "#ffaabb", "#bbcc33", "#99ddff", "#aaaa00")
REGISTERS, SHARED, STREAMED, BUSY, FREE, BEYOND, IDLE = (
    "#222255", "#aa3377", "url(#streamed)", "#8c8c8c", "#ffffff", "#d5d5d5", "#e9e9e9",
)  # fmt: skip
COLOURS = {
    "registers": {"weights": REGISTERS, "working": BUSY, "out of reach": BEYOND},
    "shared memory": {"weights": SHARED, "staging": BUSY, "reserved": BEYOND},
}
MARGIN, GUTTER, PANEL = 29, 36, 490
LARGEST_CELL = 58
DIGIT = 0.64  # width of a digit over the size of its font
HEAD = """<style>text{font-family:'DejaVu Sans',Verdana,sans-serif;fill:#1a1a1a}rect{stroke:#1a1a1a;stroke-width:.4}\
.idle{stroke:#c8c8c8}.plain{stroke:none}.bold{font-weight:bold}.faint{fill:#777}.mid{text-anchor:middle}\
.end{text-anchor:end}</style>
<defs><pattern id="streamed" width="4" height="4" patternUnits="userSpaceOnUse"><path d="M0 4L4 0M-1 1L1 -1M3 5L5 3" \
stroke="#1a1a1a" stroke-width=".6"/></pattern></defs>
<rect width="100%" height="100%" fill="#fff" class="plain"/>"""


def _tenth(points: float) -> str:
    return f"{round(points, 1):g}"


class _Sheet:
    """What is drawn, in order."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, kind: str = "", name: str = "") -> None:
        place = f'x="{_tenth(x)}" y="{_tenth(y)}" width="{_tenth(width)}" height="{_tenth(height)}"'
        more = f' class="{kind}"' * bool(kind) + f' id="{name}"' * bool(name)
        self.drawn.append(f'<rect {place} fill="{fill}"{more}/>')

    def text(self, x: float, y: float, text: str, size: float, kind: str = "") -> None:
        """With the middle of its letters at y."""
        more = f' class="{kind}"' * bool(kind)
        place = f'x="{_tenth(x)}" y="{_tenth(y + 0.36 * size)}" font-size="{size:.3g}"'
        self.drawn.append(f"<text {place}{more}>{escape(text, quote=False)}</text>")


def grid(count: int) -> tuple[int, int]:
    """(columns, rows) of a grid a little wider than high, with few places left over."""

    def badness(columns: int) -> float:
        rows = -(-count // columns)
        return 6 * (columns * rows - count) / count + abs(math.log(columns / rows / 1.25))

    columns = min(range(1, count + 1), key=badness)
    return columns, -(-count // columns)


def _cell(hardware: Hardware) -> tuple[float, float]:
    """Width and height of a multiprocessor."""
    width = min(PANEL / grid(hardware.multiprocessors)[0], LARGEST_CELL)
    return width, min(0.95 * width, 36)


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
    width, height = _cell(hardware)
    left += (PANEL - columns * width) / 2
    gap = 0.06 * width
    slots, programs = crowd(part, hardware), running(part, hardware)
    for i in range(hardware.multiprocessors):
        x, y = left + i % columns * width, top + i // columns * height
        w, h = width - gap, height - gap
        sheet.drawn.append(f'<g id="{name}-multiprocessor-{i}">')
        if i + (slots - 1) * hardware.multiprocessors >= programs:  # else they cover it
            sheet.box(x, y, w, h, IDLE, "idle")
        for slot in range(slots):
            program = slot * hardware.multiprocessors + i
            if program >= programs:
                continue
            colour = GROUPS[program // part.tiling.slices % len(GROUPS)]
            own, at = w / slots, x + slot * w / slots
            sheet.box(at, y, own, h, colour, name=f"{name}-program-{program}")
            label = _label(part, program)
            size = min(9.0, 0.5 * h, 0.9 * own / (DIGIT * len(label)))  # as large as fits
            sheet.text(at + own / 2, y + 0.5 * h, label, size, "mid")
        sheet.drawn.append("</g>")
    return top + rows * height


def _homes(sheet: _Sheet, plan: Plan, part: Pass, left: float, top: float) -> float:
    """W_hh as one bar, cut by where its bytes are."""
    total = whole_of(plan, part)
    homes = {
        "registers": (part.shares.registers, REGISTERS),
        "shared memory": (part.shares.shared, SHARED),
        "streamed": (part.shares.streamed, STREAMED),
    }
    at = left
    for n, colour in homes.values():
        if n:
            sheet.box(at, top, PANEL * n / total, 12, colour)
        at += PANEL * n / total
    told = " + ".join(f"{n:,} {name}" for name, (n, _) in homes.items())
    sheet.text(left, top + 21, f"W_hh of one direction, bytes: {told} = {total:,}", 7.5)
    return top + 33


def _one(sheet: _Sheet, part: Pass, hardware: Hardware, left: float, top: float) -> float:
    """What one multiprocessor's memories hold: all with a program are alike."""
    for n, budget in enumerate(reversed(budgets(part, hardware))):
        x, width = left + n * PANEL / 2 + 68, PANEL / 2 - 79
        sheet.text(x - 68, top + 6, budget.name, 7.5)
        sheet.box(x, top, width, 12, FREE)
        for name, bytes_ in budget.parts:
            length = width * bytes_ / budget.whole
            if bytes_ and name != "free":
                sheet.box(x, top, length, 12, COLOURS[budget.name][name], "plain")
            x += length
    return top + 18


def _name_of(found: Job, directions: int) -> str:
    rows = f"batch row {found.first}" if found.first == found.last else f"batch rows {found.first} to {found.last}"
    return rows if directions == 1 else f"direction {found.direction}{' (reverse)' * found.direction}, {rows}"


def _group_entries(plan: Plan, part: Pass) -> list[tuple[str, str]]:
    """(colour, what it stands for) of the groups of the first round, and remarks without a colour."""
    hardware, slices = plan.hardware, part.tiling.slices
    at_once = running(part, hardware) // slices
    shown = range(at_once) if at_once <= len(GROUPS) else (0, 1, at_once - 1)
    entries = [
        (GROUPS[n % len(GROUPS)], f"group {n}: {_name_of(job(part, plan.batch, n), plan.directions)}") for n in shown
    ]
    if at_once > len(GROUPS):
        entries.append(("", f"{at_once} groups in order; their colours repeat"))
    if part.groups > at_once:
        entries.append(("", f"{part.groups - at_once} more groups take the places of those that end"))
    if part.rounds > 1:
        entries.append(("", f"round 1 of {part.rounds}; the next take the other jobs"))
    idle = hardware.multiprocessors - min(running(part, hardware), hardware.multiprocessors)
    return [*entries, (IDLE, f"{idle} of {hardware.multiprocessors} multiprocessors idle")]


def _legend(sheet: _Sheet, entries: list[tuple[str, str]], left: float, top: float) -> None:
    """Two columns, filled row by row."""
    for n, (colour, text) in enumerate(entries):
        x, y = left + n % 2 * PANEL / 2, top + n // 2 * 14
        if colour:
            sheet.box(x, y + 1.5, 14, 9.5, colour)
        sheet.text(x + 20, y + 6.5, text, 7.5)


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
    entries = {
        "weights in registers": REGISTERS,
        "weights in shared memory": SHARED,
        "weights streamed each step": STREAMED,
        "working registers, staging": BUSY,
        "free": FREE,
    } | ({"registers beyond a thread's limit": BEYOND} if beyond else {})
    x = float(MARGIN)
    for text, colour in entries.items():
        sheet.box(x, top, 19, 10, colour)
        sheet.text(x + 24, top + 5.5, text, 8)
        x += 24 + 4.9 * len(text) + 22
    registers, shared = 4 * plan.hardware.registers, plan.hardware.shared
    sheet.text(
        MARGIN,
        top + 23,
        f"The bars: W_hh by its homes; a multiprocessor's {registers:,} bytes of registers and {shared:,} of shared "
        "memory. A rectangle is a multiprocessor with its program's slice (s), column and row (c, r) or group (g). "
        "Which program is where is the device's choice: drawn in order.",
        7.5,
        "faint",
    )


def svg(plan: Plan) -> str:
    """The chip in the forward and in the backward pass, every multiprocessor of it."""
    parts = [(name, getattr(plan, name)) for name in PASSES]
    sheet, width = _Sheet(), 2 * MARGIN + 2 * PANEL + GUTTER
    times = " and ".join(f"{part.predicted:.2f} us {name}" for name, part in parts)
    title = (
        f"{plan.cell.upper()} H={plan.hidden} B={plan.batch} D={plan.directions} {plan.dtype} on "
        f"{plan.hardware.name}: predicted {times} per time step"
    )
    size = min(14, (2 * PANEL + GUTTER) / (0.7 * len(title)))
    sheet.text(MARGIN, 26, title, size, "bold")
    ends = []
    for n, (name, part) in enumerate(parts):
        left = MARGIN + n * (PANEL + GUTTER)
        sheet.text(left, 56, name, 11, "bold")
        told = f"{resident(part)} resident, predicted {part.predicted:.2f} us per time step"
        sheet.text(left + PANEL, 56, told, 9, "end")
        sheet.text(left, 70, describe(part, plan.hardware), 8)
        top = _one(sheet, part, plan.hardware, left, _homes(sheet, plan, part, left, 81))
        top = _multiprocessors(sheet, plan, name, part, left, top + 6) + 7
        entries = _group_entries(plan, part)
        _legend(sheet, entries, left, top)
        ends.append(top + -(-len(entries) // 2) * 14)
    _key(sheet, plan, max(ends) + 18)
    height = max(ends) + 62
    size_of = f'width="{width}pt" height="{height:.0f}pt" viewBox="0 0 {width} {height:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size_of}>', HEAD, *sheet.drawn, "</svg>", ""])
