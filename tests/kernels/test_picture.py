"""Budgets that add up, programs where the launch puts them, and a drawing that shows both. No GPU, nothing compiled."""

import csv
import dataclasses
import itertools
import random
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
from persistrnn.kernels.inspect.picture import (
    Budget,
    Job,
    apportion,
    bar,
    budgets,
    crowd,
    grid,
    running,
)
from persistrnn.kernels.planner.hardware import DEVICES, live, named
from persistrnn.kernels.planner.plan import DTYPES, Pass, Plan, PlanError, plan_layer, register_limit
from persistrnn.kernels.planner.problem import Problem

WORKLOADS = Path(__file__).resolve().parents[2] / "bench" / "workloads"
PASSES = ("forward", "backward")
SVG = "{http://www.w3.org/2000/svg}"


def planned(cell: str, hidden: int, batch: int, directions: int = 1, dtype: str = "bf16", device: str = "h200") -> Plan:
    return plan_layer(Problem(CELLS[cell], hidden, batch, directions, dtype, named(device)))


def workload_plans() -> Iterator[Plan]:
    """Every LSTM and GRU of DeepBench, on a device of each kind and in each size of element."""
    with open(WORKLOADS / "deepbench.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cell"] in CELLS]
    assert Counter(row["cell"] for row in rows) == {"gru": 73, "lstm": 38}
    for row, device, dtype in itertools.product(rows, ("a100", "h200", "mi300x"), ("bf16", "fp32")):
        try:
            yield planned(row["cell"], int(row["hidden"]), int(row["batch"]), 1, dtype, device)
        except PlanError:
            assert (device, dtype) != ("h200", "bf16")


def passes(found: Plan) -> list[tuple[str, Pass]]:
    return [(name, getattr(found, name)) for name in PASSES]


def shared_in_two(found: Plan) -> Plan:
    """The same plan with two programs per multiprocessor, which no plan of today has."""
    part = found.forward
    part = dataclasses.replace(
        part,
        choice=dataclasses.replace(part.choice, blocks=2, warps=8),
        groups=2 * found.hardware.multiprocessors // part.tiling.slices,
        in_registers=8192,
        in_shared=4096,
        shared=20_480,
        registers=110,
    )
    return dataclasses.replace(found, forward=part)


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\w,])[\d,]*\d(?![\w,])", text)]


# Budgets


def test_budgets_of_one_multiprocessor_add_up() -> None:
    seen = 0
    for found in workload_plans():
        for _, part in passes(found):
            shared, registers = budgets(part, found.hardware)
            assert shared.whole == found.hardware.shared
            assert registers.whole == 4 * found.hardware.registers
            for budget in (shared, registers):
                assert sum(n for _, n in budget.parts) == budget.whole
            assert dict(shared.parts)["weights"] == part.in_shared
            assert dict(shared.parts)["weights"] + dict(shared.parts)["staging"] == part.shared
            threads = 32 * part.choice.warps
            held = dict(registers.parts)
            assert held["weights"] == part.in_registers
            assert held["weights"] + held["working"] == 4 * threads * part.registers
            assert held["weights"] + held["working"] + held["free"] == 4 * threads * register_limit(part.choice)
            seen += 1
    assert seen > 1000


def test_two_programs_hold_twice_as_much_of_a_multiprocessor() -> None:
    found = shared_in_two(planned("lstm", 256, 8192, 2))
    part = found.forward
    assert crowd(part, found.hardware) == 2
    shared, registers = (dict(budget.parts) for budget in budgets(part, found.hardware))
    assert shared["weights"] == 2 * 4096
    assert shared["staging"] == 2 * 16_384
    assert shared["reserved"] == 2 * 1024
    assert registers["weights"] == 2 * 8192
    assert registers["working"] == 2 * (4 * 256 * 110 - 8192)


def test_second_program_shares_only_when_all_have_one() -> None:
    found = planned("lstm", 256, 8192, 2)
    part = dataclasses.replace(shared_in_two(found).forward, groups=132 // found.forward.tiling.slices)
    assert running(part, found.hardware) <= 132
    assert crowd(part, found.hardware) == 1


@pytest.mark.parametrize("parts", [(("a", 3), ("b", 4)), (("a", 9), ("b", -1)), (("a", 7),)])
def test_budget_that_does_not_add_up_is_refused(parts: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(AssertionError, match="add up to 8 bytes"):
        Budget("memory", 8, parts)


def test_shares_that_do_not_add_up_are_refused() -> None:
    found = planned("gru", 96, 4)
    assert picture.whole_of(found, found.forward) == 3 * 96 * 96 * 2
    wrong = dataclasses.replace(found.forward.shares, streamed=2)
    with pytest.raises(AssertionError, match=rf"W_hh has {3 * 96 * 96 * 2}"):
        picture.whole_of(found, dataclasses.replace(found.forward, shares=wrong))


# Text


def test_shares_of_all_workloads_are_all_of_the_weights() -> None:
    for found in workload_plans():
        gates = {"lstm": 4, "gru": 3}[found.cell]
        for _, part in passes(found):
            assert picture.whole_of(found, part) == gates * found.hidden**2 * DTYPES[found.dtype]


def test_resident_says_100_percent_only_if_nothing_is_streamed() -> None:
    part = planned("lstm", 1024, 64).forward
    assert picture.resident(part) == "100%"
    nearly = dataclasses.replace(part.shares, registers=10**6, shared=0, streamed=1)
    assert picture.resident(dataclasses.replace(part, shares=nearly)) == "99.9%"


def test_apportioned_lengths_add_up_and_follow_the_parts() -> None:
    source = random.Random(0)
    for _ in range(2000):
        parts = [source.choice((0, 1, 7, source.randrange(1, 10**6))) for _ in range(source.randrange(1, 6))]
        if not sum(parts):
            continue
        found = apportion(parts, 64)
        assert sum(found) == 64
        for part, length in zip(parts, found, strict=True):
            assert (length == 0) == (part == 0)
            assert abs(length - 64 * part / sum(parts)) < len(parts)


def test_bar_and_key_tell_the_same_bytes() -> None:
    budget = Budget("shared memory", 1600, (("weights", 800), ("staging", 400), ("reserved", 0), ("free", 400)))
    assert bar(budget, 16) == [
        "shared memory [########====....] 1,600 bytes",
        "               # weights 800   = staging 400   . free 400",
    ]


# Programs and jobs


def test_bars_of_all_workloads_add_up() -> None:
    for found in workload_plans():
        for _, part in passes(found):
            for budget in budgets(part, found.hardware):
                drawn, key = bar(budget)
                signs = Counter(drawn[drawn.index("[") + 1 : drawn.index("]")])
                assert signs.total() == 64
                assert numbers(drawn.partition("]")[2]) == [budget.whole]
                told = {key_part.split()[0]: numbers(key_part)[0] for key_part in key.strip().split("   ")}
                assert sum(told.values()) == budget.whole
                assert signs.keys() == {sign for sign, n in told.items() if n}
                for sign, n in told.items():
                    assert abs(signs[sign] - 64 * n / budget.whole) < 2


def test_jobs_are_in_the_kernels_order() -> None:
    part = planned("lstm", 512, 40, 2).forward
    rows = part.tiling.batch_tile * part.tiling.subtiles
    jobs = [picture.job(part, 40, n) for n in range(part.tiling.jobs(40))]
    assert jobs[0] == Job(0, 0, min(rows, 40) - 1)
    covered = [(job.direction, row) for job in jobs for row in range(job.first, job.last + 1)]
    assert covered == [(direction, row) for direction in (0, 1) for row in range(40)]


def test_single_slices_wait_for_a_place() -> None:
    found = planned("gru", 16, 2**16)
    part = found.forward
    assert part.tiling.slices == 1
    places = found.hardware.multiprocessors * part.choice.blocks
    assert running(part, found.hardware) == places < part.groups
    assert f"{part.groups:,} groups, {places} at a time" in picture.describe(part, found.hardware)


@pytest.mark.parametrize("count", [1, 2, 7, 16, *(d.multiprocessors for d in DEVICES.values())])
def test_grid_holds_every_multiprocessor_and_no_empty_row(count: int) -> None:
    columns, rows = grid(count)
    assert columns * (rows - 1) < count <= columns * rows
    assert 0.5 <= columns / rows <= 4 or count < 8


# The drawing

DRAWN = {
    "resident": ("lstm", 1024, 64, 1, "bf16", "h200"),
    "streamed": ("lstm", 4096, 64, 1, "bf16", "h200"),
    "many groups": ("gru", 64, 512, 1, "bf16", "h200"),
    "two directions": ("lstm", 512, 16, 2, "bf16", "h200"),
    "large chip": ("lstm", 2048, 64, 1, "bf16", "mi300x"),
    "streamed in two directions": ("lstm", 4096, 128, 2, "bf16", "b200"),
}


def to_draw(name: str) -> Plan:
    if name == "two in one":
        return shared_in_two(planned("lstm", 256, 8192, 2))
    if name == "small chip":
        part_of_a_device = live("NVIDIA GeForce RTX 5090 D Laptop GPU", "sm_120", 7, 101_376, 65_536, 1 << 20)
        return plan_layer(Problem(CELLS["gru"], 100, 5, 1, "fp16", part_of_a_device))
    return planned(*DRAWN[name])


@pytest.fixture(scope="module", params=[*DRAWN, "two in one", "small chip"])
def drawn(request: pytest.FixtureRequest) -> tuple[Plan, str]:
    found = to_draw(request.param)
    return found, picture.svg(found)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def boxes(svg: str, prefix: str) -> dict[str, Box]:
    """The rectangles of that name."""
    found = {}
    for element in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if (element.get("id") or "").startswith(prefix):
            x, y, width, height = (float(element.get(name)) for name in ("x", "y", "width", "height"))
            found[element.get("id")] = x, y, x + width, y + height
    return found


def texts(svg: str) -> list[tuple[str, Box]]:
    """Every text and where it is, by the widths of the font's letters."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        size, kind, text = float(element.get("font-size")), element.get("class"), element.text
        font = FontProperties(size=size, weight="bold" if kind == "bold" else "normal")
        width = TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
        left = float(element.get("x")) - width * {"mid": 0.5, "end": 1}.get(kind, 0)
        base = float(element.get("y"))
        found.append((text, (left, base - 0.75 * size, left + width, base)))
    return found


def test_drawing_has_every_multiprocessor_and_every_program_once(drawn: tuple[Plan, str]) -> None:
    """Each in its place: the programs of a multiprocessor share its group, and what is idle is counted and grey."""
    found, svg = drawn
    root = ElementTree.fromstring(svg)
    names = [name for element in root.iter() if (name := element.get("id"))]
    assert len(names) == len(set(names)), "an id is given once"
    idle = [text for text, _ in texts(svg) if text.endswith("idle")]
    for (name, part), sentence in zip(passes(found), idle, strict=True):
        count = found.hardware.multiprocessors
        groups = [g for g in root.iter(f"{SVG}g") if g.get("id", "").startswith(f"{name}-multiprocessor-")]
        assert [g.get("id") for g in groups] == [f"{name}-multiprocessor-{i}" for i in range(count)]
        expected = {f"{name}-program-{i}" for i in range(running(part, found.hardware))}
        assert boxes(svg, f"{name}-program-").keys() == expected
        inside = [[r.get("id") for r in g.iter(f"{SVG}rect") if r.get("id")] for g in groups]
        for i, own in enumerate(inside):
            assert {int(program.rpartition("-")[2]) % count for program in own} <= {i}
        assert max(map(len, inside)) == crowd(part, found.hardware)
        assert sentence == f"{inside.count([])} of {count} multiprocessors idle"
        for g, own in zip(groups, inside, strict=True):
            grey = [r for r in g.iter(f"{SVG}rect") if r.get("class") == "idle"]
            assert len(grey) == (len(own) < crowd(part, found.hardware))


def test_rectangles_do_not_overlap(drawn: tuple[Plan, str]) -> None:
    found, svg = drawn
    for name, _ in passes(found):
        places = sorted(boxes(svg, f"{name}-program-").values(), key=lambda box: (round(box[1]), box[0]))
        for one, other in itertools.pairwise(places):
            assert other[0] >= one[2] - 0.11 or other[1] >= one[3] - 0.11


def test_texts_stay_on_the_sheet_and_off_each_other(drawn: tuple[Plan, str]) -> None:
    _, svg = drawn
    width, height = (float(n) for n in ElementTree.fromstring(svg).get("viewBox").split()[2:])
    found = texts(svg)
    for text, (left, top, right, bottom) in found:
        assert picture.MARGIN - 1 <= left <= right <= width - picture.MARGIN + 1, text
        assert 0 <= top <= bottom <= height, text
    for (first, one), (second, other) in itertools.combinations(found, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{first!r} lies over {second!r}"


def test_drawing_names_the_plan(drawn: tuple[Plan, str]) -> None:
    found, svg = drawn
    told = [text for text, _ in texts(svg)]
    title = told[0]
    for word in (found.cell.upper(), f"H={found.hidden}", f"B={found.batch}", found.dtype, found.hardware.name):
        assert word in title
    for name, part in passes(found):
        assert f"predicted {found.forward.predicted:.2f} us forward" in title
        assert f"{part.predicted:.2f} us {name}" in title
    for home in ("weights in registers", "weights in shared memory", "weights streamed each step"):
        assert home in told
    homes = [text for text in told if text.startswith("W_hh")]
    for (_, part), line in zip(passes(found), homes, strict=True):
        shares = part.shares
        assert numbers(line) == [shares.registers, shares.shared, shares.streamed, picture.whole_of(found, part)]


@pytest.mark.parametrize(
    ("slices", "rows", "groups", "program", "label"),
    [
        (1, 1, 40, 31, "g31"),
        (12, 1, 2, 17, "s5"),
        (12, 1, 9, 29, "g2 s5"),
        (12, 4, 2, 17, "c1 r1"),
        (12, 4, 2, 23, "c2 r3"),
    ],
)
def test_labels_are_slices_or_columns_and_rows(slices: int, rows: int, groups: int, program: int, label: str) -> None:
    part = planned("lstm", 512, 64).forward
    tiling = dataclasses.replace(part.tiling, slices=slices, rows=rows)
    assert picture._label(dataclasses.replace(part, tiling=tiling, groups=groups), program) == label


def test_every_program_has_its_label(drawn: tuple[Plan, str]) -> None:
    found, svg = drawn
    told = Counter(text for text, _ in texts(svg))
    labels = Counter(picture._label(part, n) for _, part in passes(found) for n in range(running(part, found.hardware)))
    assert labels == {text: n for text, n in told.items() if text in labels}
