"""What is predicted beside a profile: the plan's own numbers, and floors where the device is the measured one."""

import dataclasses
from types import SimpleNamespace

import pytest

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import prediction
from persistrnn.kernels.planner import hardware
from persistrnn.kernels.planner.pipeline import plan_pipeline
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem
from persistrnn.profiling import predicted, report, tables
from persistrnn.profiling.record import Machine, Point, Profile, Settings
from persistrnn.profiling.subject import Call
from persistrnn.profiling.trace import IDLE, Phase, Span

GPU = Machine("cuda", "NVIDIA H200", 140 << 30, 8, False, "2.13", "3.9.0", "3.11", "2026-01-31")
CALL = Call("gru", 512, 1024, 1, 2, 2048, 32, "bf16", "persistent")


def synthetic(*calls: Call, machine: Machine = GPU) -> Profile:
    phases = {
        "input GEMM": Phase(2e-3, 4e11, 1e9),
        "scan forward": Phase(9e-3, 8e11, 2e9),
        "scan backward": Phase(12e-3, 8e11, 2e9),
        "weight GEMMs": Phase(4e-3, 1.2e12, 9e9),
        "optimizer": Phase(1e-3),
        IDLE: Phase(2e-3),
    }
    spans = [Span("stages", "forward", 0, 1e-2), Span("device", "scan forward", 1e-3, 9e-3)]
    point = Point(
        "persistrnn", 2048, tokens=2048 * 32, seconds=30e-3, low=29e-3, high=31e-3, iterations=5, held=1 << 28,
        peak=1 << 30, profiled=40e-3, phases=phases, spans=spans, calls=list(calls),
    )  # fmt: skip
    return Profile("gru", machine, Settings("adam", 5, 2, 20.0), [point])


@pytest.fixture
def on_h200(monkeypatch):
    """As on a live H200."""
    device_of = prediction.device_of
    monkeypatch.setattr(prediction, "device_of", lambda name: device_of(name or "h200"))
    monkeypatch.setattr(prediction.torch.cuda, "is_available", lambda: True)


def test_one_layer_is_the_plans():
    found = prediction.predict_stack("gru", 1024, 1, 32, 2, 2048, "bf16", "h200")
    shape = CELLS["gru"]
    expected = plan_layer(Problem(shape, 1024, 32, 2, "bf16", hardware.named("h200")))
    for name, part in (("forward", expected.forward), ("backward", expected.backward)):
        assert found.passes[name].total == pytest.approx(part.predicted)
        assert found.passes[name].floor == expected.floor
        assert found.passes[name].total >= found.passes[name].floor
    assert found.total == pytest.approx(sum(found.batches[32].values()))
    assert (found.live, found.together, found.text) == (False, False, str(expected))
    assert list(found.batches) == [32, 64, 128, 256, 512]
    assert found.dtypes == {"bf16": pytest.approx(found.total)}
    assert found.rate == hardware.named("h200").rate("bf16")


def test_a_stack_is_a_pipeline_where_that_is_faster():
    found = prediction.predict_stack("lstm", 256, 3, 8, 1, 100, "bf16", "h200")
    together = plan_pipeline(Problem(CELLS["lstm"], 256, 8, 1, "bf16", hardware.named("h200")), 3)
    assert together is not None
    assert found.together
    assert found.total * 100 == pytest.approx(together.microseconds(100, True))
    assert str(together) in found.text
    both = prediction.predict_stack("lstm", 256, 3, 8, 2, 100, "bf16", "h200")
    assert not both.together, "a second direction needs the layer below to be whole"
    one = prediction.predict_stack("lstm", 256, 1, 8, 2, 100, "bf16", "h200")
    assert both.total == pytest.approx(3 * one.total)


def test_heads_are_planned_as_heads():
    """Each a recurrence of its own, never a pipeline; and torch's loop over steps is not oneDNN's kernel."""
    heads = dataclasses.replace(CALL, cell="lstm", heads=8, layers=2, directions=1, path="stepwise")
    profile = synthetic(heads)
    predicted.add(profile, "h200")
    expected = plan_layer(Problem(CELLS["lstm"], 1024 // 8, 32, 1, "bf16", hardware.named("h200"), 8))
    assert "H=1024 in 8 heads" in profile.outlook.text
    for name, part in (("forward", expected.forward), ("backward", expected.backward)):
        assert profile.outlook.passes[name].total == pytest.approx(2 * part.predicted)
        assert profile.outlook.passes[name].floor == 2 * expected.floor
    whole = dataclasses.replace(heads, heads=1)
    weights = 4 * 1024 * 1024
    assert whole.flops - heads.flops == 2 * 2048 * 32 * 2 * weights * 7 // 8
    for backward in (False, True):
        assert whole.scan_bytes(backward) - heads.scan_bytes(backward) == 2 * weights * 2 * 7 // 8
    assert heads.needed("gates") == dataclasses.replace(heads, cell="peephole").needed("gates") != whole.needed("gates")


def test_float32_has_bf16_beside_it():
    found = prediction.predict_stack("lstm", 256, 1, 8, 1, 100, "fp32", "h200")
    assert list(found.dtypes) == ["bf16", "fp32"]
    assert found.dtypes["fp32"] == pytest.approx(found.total) != found.dtypes["bf16"]


def test_where_there_is_no_plan_the_page_says_why(monkeypatch):
    monkeypatch.setattr("persistrnn.profiling.plots.draw", lambda profile: [])
    nothing = Profile("lstm", GPU, Settings("adam", 5, 2, 20.0), [Point("persistrnn", 8, "out of memory")])
    for profile, words in (
        (synthetic(dataclasses.replace(CALL, hidden=200_000)), "hidden_size=200000"),
        (synthetic(dataclasses.replace(CALL, dtype="float64")), "dtype must be one of"),
        (nothing, "nothing was measured"),
    ):
        predicted.add(profile, "h200")
        assert profile.outlook is None
        assert words in profile.no_outlook
        assert "There is no plan: " in report.html(profile)
    assert "persistrnn at T = 8: out of memory" in report.html(nothing)


def test_floors_on_the_live_device(on_h200):
    """The scans' is the plan's of every call; that of products is arithmetic or memory, whichever takes longer."""
    small = dataclasses.replace(CALL, hidden=256, steps=512)
    profile = synthetic(small, CALL)
    predicted.add(profile, None)
    (point,) = profile.points
    record = hardware.named("h200")
    shape = CELLS["gru"]
    floors = [plan_layer(Problem(shape, call.hidden, 32, 2, "bf16", record)).floor * call.steps for call in point.calls]
    assert point.phases["scan forward"].floor == pytest.approx(sum(floors) / 1e6)
    assert point.phases["scan backward"].floor == point.phases["scan forward"].floor
    assert point.phases["input GEMM"].floor == pytest.approx(4e11 / (record.rate("bf16") * 1e12)), "arithmetic"
    assert point.phases["weight GEMMs"].floor == pytest.approx(9e9 / (record.memory_rate * 1e9)), "memory"
    assert point.phases["optimizer"].floor == 0
    assert profile.outlook.passes["forward"].floor == plan_layer(Problem(shape, 1024, 32, 2, "bf16", record)).floor, (
        "of the largest"
    )

    table = tables.phases(profile, point, False)
    assert [column.name for column in table.columns][-2:] == ["floor, us per step", "floor over time"]
    assert {column.band for column in table.columns} == {"", "measured", "predicted", "ratio"}
    line = table.rows[1].cells
    assert line[0] == "scan forward"
    assert line[1:4] == ["9.000", "30.0%", "4.395"]
    assert line[4:6] == ["88.89", "222.2"]
    assert line[-1] == f"{sum(floors) / 1e6 / 9e-3:.1%}"
    assert table.rows[4].cells[4:] == ["", "", "", ""], "what is not known is not there"


def test_each_scan_has_the_floor_of_its_pass(monkeypatch):
    passes = {"forward": SimpleNamespace(floor=1.0), "backward": SimpleNamespace(floor=2.0)}
    found = SimpleNamespace(live=True, passes=passes, rate=1.0, memory_rate=1.0)
    monkeypatch.setattr(predicted, "_of", lambda call, device: found)
    profile = synthetic(CALL)
    predicted.add(profile, None)
    floors = [profile.points[0].phases[name].floor for name in ("scan forward", "scan backward")]
    assert floors == [2048 * 1e-6, 2048 * 2e-6]


def test_page_of_a_gpu(on_h200):
    """Kernels on a track of their own; nothing calls itself a CPU; a number is one in the table and on its card."""
    profile = synthetic(CALL)
    predicted.add(profile, None)
    page = report.html(profile)
    assert "Measured on a CPU" not in page
    assert "those of the kernels; the rest of the iteration the device is idle" in page
    assert "device idle" in page
    assert ">device<" in page
    card = next(card for card in report.cards(profile) if card.what == "peak memory")
    table = tables.summary(profile)
    row = dict(zip((column.name for column in table.columns), table.rows[-1].cells, strict=True))
    assert (card.value, row["peak MiB"], row["of it held MiB"]) == ("1,280", "1,280", "256.0")


def test_no_floors_for_another_device():
    """A plan for a device that is not there has no share of what was measured here."""
    profile = synthetic(dataclasses.replace(CALL, hidden=256), CALL)
    predicted.add(profile, "a100")
    assert "gru H=1024 B=32 D=2 bf16 on a100" in profile.outlook.text, "of the largest"
    assert all(phase.floor == 0 for phase in profile.points[0].phases.values())
    cpu = synthetic(CALL, machine=dataclasses.replace(GPU, kind="cpu"))
    predicted.add(cpu, None)
    assert all(phase.floor == 0 for phase in cpu.points[0].phases.values())


def test_work_of_a_scan():
    """Bytes: the gates' input half, W_hh, and y; with c and what the cell saves where that is kept."""
    tokens, size = 2048 * 32, 2
    weights = 2 * 3 * 1024 * 1024 * size
    per_row = 2 * 1024 * size * tokens
    assert CALL.scan_bytes(False) == weights + per_row * (3 + 1 + 4)
    assert CALL.scan_bytes(True) == weights + per_row * (4 + 1 + 1 + 2 * 3)
    assert dataclasses.replace(CALL, save="state").scan_bytes(False) == weights + per_row * (3 + 1)
    lstm = dataclasses.replace(CALL, cell="lstm")
    assert lstm.scan_bytes(True) == weights // 3 * 4 + per_row * (4 + 2 + 1 + 4)
