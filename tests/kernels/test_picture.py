"""Budgets that add up, programs where the launch puts them, and a drawing that shows both. No GPU, nothing compiled."""

import ast
import csv
import dataclasses
import inspect
import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import picture
from persistrnn.kernels.inspect.picture import (
    Budget,
    Job,
    MissingMatplotlib,
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


# Text


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


# Programs and jobs


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


def test_grids_of_known_chips_are_full() -> None:
    assert grid(named("h200").multiprocessors) == (12, 11)
    assert grid(named("mi300x").multiprocessors) == (19, 16)


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


def identifiers(svg: str) -> list[str]:
    return [name for element in ElementTree.fromstring(svg).iter() if (name := element.get("id"))]


def test_drawing_has_every_multiprocessor_and_every_program_once(drawn: tuple[Plan, str]) -> None:
    found, svg = drawn
    names = identifiers(svg)
    assert len(names) == len(set(names)), "an id is given once"
    for name, part in passes(found):
        count = found.hardware.multiprocessors
        assert [n for n in names if n.startswith(f"{name}-multiprocessor-")] == [
            f"{name}-multiprocessor-{i}" for i in range(count)
        ]
        programs = {n for n in names if n.startswith(f"{name}-program-")}
        assert programs == {f"{name}-program-{i}" for i in range(running(part, found.hardware))}


def test_idle_multiprocessors_are_counted_and_grey(drawn: tuple[Plan, str]) -> None:
    found, _ = drawn
    figure = picture.figure(found)
    told = [text.get_text() for text in figure.texts if text.get_text().endswith("idle")]
    boxes = {patch.get_gid(): patch.get_bbox() for patch in figure.patches + figure.artists if patch.get_gid()}
    for (name, part), sentence in zip(passes(found), told, strict=True):
        places = [box for gid, box in boxes.items() if gid.startswith(f"{name}-multiprocessor-")]
        programs = [box for gid, box in boxes.items() if gid.startswith(f"{name}-program-")]
        owners = Counter(
            next(i for i, place in enumerate(places) if place.contains((p.x0 + p.x1) / 2, (p.y0 + p.y1) / 2))
            for p in programs
        )
        assert sentence == f"{len(places) - len(owners)} of {found.hardware.multiprocessors} multiprocessors idle"
        assert max(owners.values()) == crowd(part, found.hardware)


def test_texts_stay_on_the_sheet_and_off_each_other(drawn: tuple[Plan, str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found, _ = drawn
    figure = picture.figure(found)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_window_extent(renderer), text.get_text()) for text in figure.texts]
    left = figure.dpi * picture.MARGIN
    right = left + figure.dpi * (2 * picture.PANEL + picture.GUTTER)
    for box, text in boxes:
        assert left <= box.x0 + 1 <= box.x1 <= right + 1, text
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), f"{first!r} lies over {second!r}"


def test_entries_of_the_legend_fit_their_column() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found = shared_in_two(planned("lstm", 256, 8192, 2))
    parts = [found.forward, dataclasses.replace(found.forward, groups=8, rounds=12)]
    parts += [dataclasses.replace(found.forward, groups=4096, rounds=1)]
    for part in parts:
        sheet = picture._Sheet(9, 9)
        for n, (_, text) in enumerate(picture._group_entries(found, part)):
            sheet.text(0.28, 0.5 * n, text, 7.5)
        renderer = FigureCanvasAgg(sheet.figure).get_renderer()
        widest = max(text.get_window_extent(renderer).x1 for text in sheet.figure.texts)
        assert widest < sheet.figure.dpi * (picture.PANEL / 2 - 0.08)


def test_drawing_names_the_plan(drawn: tuple[Plan, str]) -> None:
    found, _ = drawn
    texts = [text.get_text() for text in picture.figure(found).texts]
    title = texts[0]
    for word in (found.cell.upper(), f"H={found.hidden}", f"B={found.batch}", found.dtype, found.hardware.name):
        assert word in title
    for name, part in passes(found):
        assert f"predicted {found.forward.predicted:.2f} us forward" in title
        assert f"{part.predicted:.2f} us {name}" in title
    for home in ("weights in registers", "weights in shared memory", "weights streamed each step"):
        assert home in texts
    homes = [text for text in texts if text.startswith("W_hh")]
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
    found, _ = drawn
    texts = Counter(text.get_text() for text in picture.figure(found).texts)
    labels = Counter(picture._label(part, n) for _, part in passes(found) for n in range(running(part, found.hardware)))
    assert labels == {text: n for text, n in texts.items() if text in labels}


def test_drawing_is_the_same_every_time_and_whatever_the_style() -> None:
    import matplotlib

    found = planned("gru", 64, 512)
    first = picture.svg(found)
    with matplotlib.rc_context(
        {"font.size": 30, "svg.hashsalt": "other", "hatch.linewidth": 9, "font.family": "serif"}
    ):
        assert picture.svg(found) == first
        assert matplotlib.rcParams["svg.hashsalt"] == "other", "the caller's style is left alone"
    assert "dc:date" not in first


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingMatplotlib, match=re.escape("pip install 'persistrnn[draw]'")):
        picture.svg(planned("gru", 64, 16))


def test_matplotlib_is_imported_by_drawing_only() -> None:
    tree = ast.parse(inspect.getsource(picture))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in top if name.split(".")[0] in ("matplotlib", "numpy", "torch", "triton")}
