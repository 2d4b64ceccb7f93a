"""A plan to look at: what one multiprocessor holds, and a drawing of the chip. No torch, no Triton."""

from __future__ import annotations

import math
from html import escape

from ..planner import occupancy
from ..planner.hardware import Hardware
from ..planner.plan import Pass, Plan

PASSES = ("forward", "backward")


def running(part: Pass, hardware: Hardware) -> int:
    """Programs that are on the device at the same time, in one round."""
    places = hardware.multiprocessors * part.choice.blocks // part.tiling.slices
    return part.tiling.slices * min(part.groups, places)


def crowd(part: Pass, hardware: Hardware) -> int:
    """Programs on the fullest multiprocessor: a second one shares only when every multiprocessor has its first."""
    return min(part.choice.blocks, -(-running(part, hardware) // hardware.multiprocessors))


def idle(part: Pass, hardware: Hardware) -> int:
    """Multiprocessors without a program."""
    return max(0, hardware.multiprocessors - running(part, hardware))


def budgets(part: Pass, hardware: Hardware) -> dict[str, dict[str, int]]:
    """By memory of the fullest multiprocessor ("shared memory", "registers"): who has how many bytes of all."""
    programs = crowd(part, hardware)
    reserved = 1024 * programs if part.choice.blocks > 1 else 0
    threads = 32 * part.choice.warps * programs
    usable = 4 * threads * occupancy.register_limit(part.choice)
    used = min(4 * threads * part.registers, usable)  # a thread that needs more spills
    return {
        "shared memory": {
            "weights": programs * part.in_shared,
            "staging": programs * (part.shared - part.in_shared),
            "reserved": reserved,
            "free": hardware.shared - programs * part.shared - reserved,
        },
        "registers": {
            "weights": programs * part.in_registers,
            "working": used - programs * part.in_registers,
            "free": usable - used,
            "out of reach": 4 * hardware.registers - usable,
        },
    }


def resident(part: Pass) -> str:
    """As a percentage; 100% if nothing at all is streamed, and only then."""
    return "100%" if not part.shares.streamed else f"{math.floor(1000 * part.shares.resident) / 10:.1f}%"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def describe(part: Pass, hardware: Hardware) -> str:
    """Slices, split, groups and rounds in one line."""
    t = part.tiling
    at_once = running(part, hardware) // t.slices
    groups = f"{count(part.groups, 'group')}{f', {at_once:,}' if at_once < part.groups else ''} at a time"
    split = f" ({t.unit_groups} unit groups x {t.k_parts} parts of K)" if t.k_parts > 1 else ""
    tiles = f"{t.batch_tile} rows" + (f" x {t.subtiles}" if t.subtiles > 1 else "")
    return (
        f"{count(t.slices, 'slice')} x {count(t.units, 'unit')}{split}, batch tile {tiles}, "
        f"{count(part.choice.warps, 'warp')}; {groups}, {count(part.rounds, 'round')}"
    )


# The drawing. Lengths are in points, y downward.

# Paul Tol's "light" scheme, safe for the colour-blind and light enough for labels on it.
GROUPS = ("#77aadd", "#ee8866", "#eedd88", "#44bb99", "#ffaabb", "#bbcc33", "#99ddff", "#aaaa00")
REGISTERS, SHARED, STREAMED, BUSY, BEYOND, IDLE, FREE = (
    "#222255", "#aa3377", "url(#streamed)", "#8c8c8c", "#d5d5d5", "#e9e9e9", "#fff",
)  # fmt: skip
KEY = {
    "weights in registers": REGISTERS,
    "weights in shared memory": SHARED,
    "weights streamed each step": STREAMED,
    "working registers, staging": BUSY,
    "out of reach": BEYOND,
    "free": FREE,
}
COLOURS = {"staging": BUSY, "working": BUSY, "reserved": BEYOND, "out of reach": BEYOND, "free": FREE}
MARGIN, GUTTER, PANEL, TOP = 29, 36, 490, 143  # of the sheet, between the panels, of a panel; of the multiprocessors
LARGEST_CELL = 58
DIGIT = 0.64  # width of a digit over the size of its font
HEAD = """<style>text{font-family:'DejaVu Sans',Verdana,sans-serif;fill:#1a1a1a}rect{stroke:#1a1a1a;stroke-width:.4}\
.bold{font-weight:bold}.mid{text-anchor:middle}.end{text-anchor:end}</style>
<defs><pattern id="streamed" width="4" height="4" patternUnits="userSpaceOnUse"><path d="M0 4L4 0M-1 1L1 -1M3 5L5 3" \
stroke="#1a1a1a" stroke-width=".6"/></pattern></defs>
<rect width="100%" height="100%" fill="#fff"/>"""


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}" fill="{fill}"/>'


def _text(x: float, y: float, text: str, size: float, kind: str = "") -> str:
    """With the middle of its letters at y."""
    place = f'x="{x:.5g}" y="{y + 0.36 * size:.5g}" font-size="{size:.3g}"' + f' class="{kind}"' * bool(kind)
    return f"<text {place}>{escape(text, quote=False)}</text>"


def _bar(x: float, y: float, width: float, parts: list[tuple[int, str]]) -> list[str]:
    """Bytes and their colours, as long as they are many."""
    whole, drawn = sum(n for n, _ in parts), []
    for n, colour in parts:
        if n:
            drawn.append(_box(x, y, width * n / whole, 12, colour))
        x += width * n / whole
    return drawn


def _programs(part: Pass, hardware: Hardware, left: float) -> tuple[list[str], float]:
    """Every multiprocessor in a grid, with its programs: group and, where there are several, slice. And where it
    ends."""
    multiprocessors, slots, slices = hardware.multiprocessors, crowd(part, hardware), part.tiling.slices
    columns = math.ceil(math.sqrt(multiprocessors))
    width = min(PANEL / columns, LARGEST_CELL)
    height, own = min(0.95 * width, 36), 0.94 * width / slots
    left += (PANEL - columns * width) / 2
    drawn = []
    for program in range(multiprocessors * slots):
        slot, place = divmod(program, multiprocessors)
        x, y = left + place % columns * width + slot * own, TOP + place // columns * height
        if program >= running(part, hardware):
            drawn.append(_box(x, y, own, 0.94 * height, IDLE))
            continue
        group, slice_ = divmod(program, slices)
        label = f"{group}.{slice_}" if slices > 1 else f"{group}"
        size = min(9.0, 0.5 * height, 0.9 * own / (DIGIT * len(label)))  # as large as fits
        drawn.append(_box(x, y, own, 0.94 * height, GROUPS[group % len(GROUPS)]))
        drawn.append(_text(x + own / 2, y + 0.47 * height, label, size, "mid"))
    return drawn, TOP + -(-multiprocessors // columns) * height


def _panel(plan: Plan, name: str, left: float) -> tuple[list[str], float]:
    """One pass, and where its drawing ends."""
    part, hardware, shares = getattr(plan, name), plan.hardware, getattr(plan, name).shares
    homes = {"registers": shares.registers, "shared memory": shares.shared, "streamed": shares.streamed}
    sentence = f"{' + '.join(f'{n:,} {home}' for home, n in homes.items())} = {sum(homes.values()):,}"
    about = f"{resident(part)} resident, predicted {part.predicted:.2f} us per time step"
    drawn = [
        _text(left, 56, name, 11, "bold"),
        _text(left + PANEL, 56, about, 9, "end"),
        _text(left, 70, describe(part, hardware), 8),
        *_bar(left, 81, PANEL, list(zip(homes.values(), (REGISTERS, SHARED, STREAMED), strict=True))),
        _text(left, 102, f"W_hh of one direction, bytes: {sentence}", 7.5),
    ]
    for n, (memory, weights) in enumerate({"registers": REGISTERS, "shared memory": SHARED}.items()):
        x = left + n * PANEL / 2
        parts = [(bytes_, COLOURS.get(who, weights)) for who, bytes_ in budgets(part, hardware)[memory].items()]
        drawn += [_text(x, 120, memory, 7.5), *_bar(x + 68, 114, PANEL / 2 - 79, parts)]
    programs, end = _programs(part, hardware, left)
    tile = min(plan.batch, part.tiling.batch_tile * part.tiling.subtiles)
    sentence = f"{count(tile, 'row')} of the batch and one direction at a time for each group (colour)"
    without = f"{idle(part, hardware)} of {hardware.multiprocessors} multiprocessors idle"
    return [*drawn, f'<g id="{name}">', *programs, "</g>", _text(left, end + 9, f"{sentence}; {without}", 7.5)], end + 9


def svg(plan: Plan) -> str:
    """The chip in the forward and in the backward pass, every multiprocessor of it."""
    width, hardware = 2 * MARGIN + 2 * PANEL + GUTTER, plan.hardware
    times = " and ".join(f"{getattr(plan, name).predicted:.2f} us {name}" for name in plan.passes)
    title = (
        f"{plan.cell.upper()} H={plan.hidden} B={plan.batch} D={plan.directions} {plan.dtype_in_words} on "
        f"{hardware.name}: predicted {times} per time step"
    )
    panels = [_panel(plan, name, MARGIN + n * (PANEL + GUTTER)) for n, name in enumerate(plan.passes)]
    drawn = [_text(MARGIN, 26, title, min(14, (width - 2 * MARGIN) / (0.7 * len(title))), "bold")]
    drawn += [line for panel, _ in panels for line in panel]
    x, top = float(MARGIN), max(end for _, end in panels) + 18
    for what, colour in KEY.items():
        drawn += [_box(x, top, 19, 10, colour), _text(x + 24, top + 5.5, what, 8)]
        x += 24 + 4.9 * len(what) + 22
    drawn.append(_text(
        MARGIN, top + 23,
        f"The bars: W_hh by its homes; a multiprocessor's {4 * hardware.registers:,} bytes of registers and "
        f"{hardware.shared:,} of shared memory. A rectangle is a multiprocessor with its program's group.slice. "
        "Which program is where is the device's choice: drawn in order.", 7.5,
    ))  # fmt: skip
    size = f'width="{width}pt" height="{top + 44:.0f}pt" viewBox="0 0 {width} {top + 44:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', HEAD, *drawn, "</svg>", ""])
