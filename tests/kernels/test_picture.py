"""Budgets that add up, programs where the launch puts them, and a drawing that shows both. No GPU, nothing compiled."""

import csv
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import picture
from persistrnn.kernels.inspect.picture import PASSES, budgets, crowd, running
from persistrnn.kernels.inspect.plan_command import bar
from persistrnn.kernels.planner.hardware import live, named
from persistrnn.kernels.planner.plan import DTYPES, Pass, Plan, PlanError, plan_layer, register_limit
from persistrnn.kernels.planner.problem import Problem

WORKLOADS = Path(__file__).resolve().parents[2] / "bench" / "workloads"
SVG = "{http://www.w3.org/2000/svg}"


def planned(cell: str, hidden: int, batch: int, directions: int = 1, dtype: str = "bf16", device: str = "h200") -> Plan:
    return plan_layer(Problem(CELLS[cell], hidden, batch, directions, dtype, named(device)))


def workload_passes() -> Iterator[tuple[Plan, Pass]]:
    """Every layer of DeepBench, in turn on a device of each kind and in each size of element."""
    with open(WORKLOADS / "deepbench.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cell"] in CELLS]
    assert Counter(row["cell"] for row in rows) == {"gru": 73, "lstm": 38, "rnn_relu": 14}
    kinds = itertools.cycle(itertools.product(("a100", "h200", "mi300x"), ("bf16", "fp32")))
    for row, (device, dtype) in zip(
        itertools.chain(rows, rows), kinds, strict=False
    ):  # 125 rows: other kinds each time
        try:
            found = planned(row["cell"], int(row["hidden"]), int(row["batch"]), 1, dtype, device)
        except PlanError:
            assert (device, dtype) != ("h200", "bf16")
            continue
        yield found, found.forward
        yield found, found.backward


def shared_in_two(found: Plan) -> Plan:
    """The same plan with two programs per multiprocessor in the forward."""
    part = dataclasses.replace(
        found.forward,
        choice=dataclasses.replace(found.forward.choice, blocks=2, warps=8),
        groups=2 * found.hardware.multiprocessors // found.forward.tiling.slices,
        in_registers=8192,
        in_shared=4096,
        shared=20_480,
        registers=110,
    )
    return dataclasses.replace(found, forward=part)


def test_what_every_workload_holds_adds_up() -> None:
    """Budgets of the memories, the bars of both, and the shares of W_hh."""
    seen = 0
    for found, part in workload_passes():
        held = budgets(part, found.hardware)
        assert sum(held["shared memory"].values()) == found.hardware.shared
        assert sum(held["registers"].values()) == 4 * found.hardware.registers
        assert min(n for parts in held.values() for n in parts.values()) >= 0
        assert (held["shared memory"]["weights"], held["registers"]["weights"]) == (part.in_shared, part.in_registers)
        assert held["shared memory"]["staging"] == part.shared - part.in_shared
        threads = 32 * part.choice.warps
        assert part.in_registers + held["registers"]["working"] == 4 * threads * part.registers
        assert held["registers"]["out of reach"] == 4 * (
            found.hardware.registers - threads * register_limit(part.choice)
        )
        for where, parts in held.items():
            drawn, key = bar(where, parts)
            whole = sum(parts.values())
            signs = Counter(drawn[drawn.index("[") + 1 : drawn.index("]")])
            assert signs.total() == 64
            assert drawn.endswith(f" {whole:,} bytes")
            shown = {text.split()[0]: int(text.split()[-1].replace(",", "")) for text in key.strip().split("   ")}
            assert sum(shown.values()) == whole
            assert all(abs(signs[sign] - 64 * n / whole) <= 1 for sign, n in shown.items())
        gates, shares = {"lstm": 4, "gru": 3, "rnn_relu": 1}[found.cell], dataclasses.astuple(part.shares)
        assert sum(shares) == gates * found.hidden**2 * DTYPES[found.dtype]
        seen += 1
    assert seen > 400


def test_two_programs_hold_twice_as_much_of_a_multiprocessor() -> None:
    found = shared_in_two(planned("lstm", 256, 8192, 2))
    assert crowd(found.forward, found.hardware) == 2
    held = budgets(found.forward, found.hardware)
    assert list(held["shared memory"].values())[:3] == [2 * 4096, 2 * 16_384, 2 * 1024]
    assert list(held["registers"].values())[:2] == [2 * 8192, 2 * (4 * 256 * 110 - 8192)]
    alone = dataclasses.replace(found.forward, groups=132 // found.forward.tiling.slices)
    assert running(alone, found.hardware) <= 132
    assert crowd(alone, found.hardware) == 1, "a second one shares only when all have one"


def test_resident_says_100_percent_only_if_nothing_is_streamed() -> None:
    part = planned("lstm", 1024, 64).forward
    assert picture.resident(part) == "100%"
    nearly = dataclasses.replace(part.shares, registers=10**6, shared=0, streamed=1)
    assert picture.resident(dataclasses.replace(part, shares=nearly)) == "99.9%"


def test_single_slices_wait_for_a_place() -> None:
    found = planned("gru", 16, 2**16)
    part = found.forward
    assert part.tiling.slices == 1
    places = found.hardware.multiprocessors * part.choice.blocks
    assert running(part, found.hardware) == places < part.groups
    assert f"{part.groups:,} groups, {places} at a time" in picture.describe(part, found.hardware)


DRAWN = {
    "resident": lambda: planned("lstm", 1024, 64),
    "streamed in two directions": lambda: planned("lstm", 4096, 128, 2, "bf16", "b200"),
    "many groups": lambda: planned("gru", 64, 512),
    "large chip": lambda: planned("lstm", 2048, 64, 1, "bf16", "mi300x"),
    "two in one": lambda: shared_in_two(planned("lstm", 256, 8192, 2)),
    "small chip": lambda: plan_layer(Problem(CELLS["gru"], 100, 5, 1, "fp16", live(
        "NVIDIA GeForce RTX 5090 D Laptop GPU", "sm_120", 7, 101_376, 65_536, 1 << 20))),
}  # fmt: skip


@pytest.fixture(scope="module", params=DRAWN)
def drawn(request: pytest.FixtureRequest) -> tuple[Plan, ElementTree.Element]:
    found = DRAWN[request.param]()
    return found, ElementTree.fromstring(picture.svg(found))


Box = tuple[float, float, float, float]  # left, top, right, bottom


def texts(root: ElementTree.Element) -> list[tuple[str, Box]]:
    """Every text and where it is, by the widths of the font's letters."""
    found = []
    for element in root.iter(f"{SVG}text"):
        size, kind, text = float(element.get("font-size")), element.get("class"), element.text
        font = FontProperties(size=size, weight="bold" if kind == "bold" else "normal")
        width = TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
        left = float(element.get("x")) - width * {"mid": 0.5, "end": 1}.get(kind, 0)
        base = float(element.get("y"))
        found.append((text, (left, base - 0.75 * size, left + width, base)))
    return found


def test_every_program_is_drawn_once_and_what_is_idle_is_grey(drawn: tuple[Plan, ElementTree.Element]) -> None:
    found, root = drawn
    count = found.hardware.multiprocessors
    for name in PASSES:
        part = getattr(found, name)
        (group,) = (g for g in root.iter(f"{SVG}g") if g.get("id") == name)
        programs, slots = running(part, found.hardware), crowd(part, found.hardware)
        rectangles = list(group.iter(f"{SVG}rect"))
        fills = [r.get("fill") for r in rectangles]
        assert len(fills) == count * slots
        assert fills[programs:] == [picture.IDLE] * (count * slots - programs)
        slices = part.tiling.slices
        assert fills[:programs] == [picture.GROUPS[n // slices % len(picture.GROUPS)] for n in range(programs)]
        labels = [f"{n // slices}.{n % slices}" if slices > 1 else str(n) for n in range(programs)]
        assert [text.text for text in group.iter(f"{SVG}text")] == labels
        boxes = [[float(r.get(key)) for key in ("x", "y", "width", "height")] for r in rectangles]
        boxes.sort(key=lambda box: (round(box[1]), box[0]))
        for one, other in itertools.pairwise(boxes):
            assert other[0] >= one[0] + one[2] - 0.11 or other[1] >= one[1] + one[3] - 0.11, "they overlap"


def test_texts_stay_on_the_sheet_and_off_each_other(drawn: tuple[Plan, ElementTree.Element]) -> None:
    _, root = drawn
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    found = texts(root)
    for text, (left, top, right, bottom) in found:
        assert picture.MARGIN - 1 <= left <= right <= width - picture.MARGIN + 1, text
        assert 0 <= top <= bottom <= height, text
    for (first, one), (second, other) in itertools.combinations(found, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{first!r} lies over {second!r}"


def test_drawing_has_the_numbers_of_the_plan(drawn: tuple[Plan, ElementTree.Element]) -> None:
    found, root = drawn
    title, *others = [text for text, _ in texts(root)]
    for word in (found.cell.upper(), f"H={found.hidden}", f"B={found.batch}", found.dtype, found.hardware.name):
        assert word in title
    homes = [text for text in others if text.startswith("W_hh")]
    for name, line in zip(PASSES, homes, strict=True):
        part = getattr(found, name)
        assert f"{part.predicted:.2f} us {name}" in title
        shares = dataclasses.astuple(part.shares)
        assert [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", line)] == [*shares, sum(shares)]
        left = picture.MARGIN + PASSES.index(name) * (picture.PANEL + picture.GUTTER)
        bar = [
            r for r in root.iter(f"{SVG}rect") if r.get("y") == "81" and 0 <= float(r.get("x")) - left < picture.PANEL
        ]
        lengths = [picture.PANEL * n / sum(shares) for n in shares if n]
        assert [float(r.get("width")) for r in bar] == pytest.approx(lengths, abs=0.1)
        idle = max(0, found.hardware.multiprocessors - running(part, found.hardware))
        assert any(
            text.endswith(f" {idle} of {found.hardware.multiprocessors} multiprocessors idle") for text in others
        )
