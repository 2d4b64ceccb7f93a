"""Which path is expected to be faster: the model's word, and a measurement's over the model's. No GPU, no Triton."""

import json
from dataclasses import fields

import pytest
import torch
from asked import asked

import persistrnn
from persistrnn import decide
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import forecast as forecasting
from persistrnn.kernels.planner import measurements as files
from persistrnn.kernels.planner.cost import torch_step
from persistrnn.kernels.planner.forecast import Forecast, forecast
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem

LSTM = CELLS["lstm"]
H200 = DEVICES["h200"]


@pytest.fixture(autouse=True)
def fresh():
    yield
    forecast.cache_clear()
    forecasting.errors.cache_clear()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(step, ...): the data file of the H200 holds these steps."""

    def write(*steps):
        provenance = dict.fromkeys((field.name for field in fields(files.Provenance)), "a test")
        content = {"provenance": provenance, "constants": {}, "steps": list(steps)}
        (tmp_path / "h200.json").write_text(json.dumps(content))
        found = files.measurements("h200", tmp_path)
        monkeypatch.setattr(forecasting, "measurements", lambda name: found if name == "h200" else None)
        forecast.cache_clear()
        forecasting.errors.cache_clear()

    return write


def step(microseconds, path="persistent", hidden=1024, batch=16, dtype="bf16", backward=False, cell="lstm"):
    return {
        "cell": cell, "hidden": hidden, "batch": batch, "directions": 1, "dtype": dtype,
        "backward": backward, "path": path, "microseconds": microseconds,
    }  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
def test_without_measurements_it_is_the_models_prediction(backward):
    found = forecast(Problem(LSTM, 1024, 16, 1, "bf16", H200), backward)
    p = plan_layer(Problem(LSTM, 1024, 16, 1, "bf16", H200))
    passes = (False, True) if backward else (False,)
    assert found.persistent == pytest.approx(sum((p.backward if b else p.forward).predicted for b in passes))
    assert found.torch == pytest.approx(sum(torch_step(Problem(LSTM, 1024, 16, 1, "bf16", H200), b) for b in passes))
    assert not found.measured


def test_a_measured_shape_is_what_was_measured(measured):
    measured(step(7.5), step(3.25, "torch"))
    assert forecast(Problem(LSTM, 1024, 16, 1, "bf16", H200), False) == Forecast(
        pytest.approx(7.5), pytest.approx(3.25), measured=True
    )
    assert {e.step.path: round(e.ratio * e.predicted, 6) for e in forecasting.errors(LSTM, H200)} == {
        "persistent": 7.5,
        "torch": 3.25,
    }


def test_shapes_nearby_take_its_ratio_and_others_do_not(measured):
    alone = {h: forecast(Problem(LSTM, h, 16, 1, "bf16", H200), False).persistent for h in (512, 768, 1024, 2560)}
    measured(step(2 * alone[1024]), step(5 * alone[512], hidden=512))
    with_ratio = {h: forecast(Problem(LSTM, h, 16, 1, "bf16", H200), False).persistent / alone[h] for h in alone}
    assert with_ratio == {
        512: pytest.approx(5),
        768: pytest.approx(2),  # 1024 is nearer than 512 by ratio
        1024: pytest.approx(2),
        2560: pytest.approx(1),
    }


@pytest.mark.parametrize(
    "other", [{"cell": "gru"}, {"dtype": "fp16"}, {"backward": True}, {"batch": 64}, {"path": "torch"}]
)
def test_a_measurement_of_something_else_corrects_nothing(measured, other):
    alone = forecast(Problem(LSTM, 1024, 16, 1, "bf16", H200), False).persistent
    measured(step(100.0, **other))
    assert forecast(Problem(LSTM, 1024, 16, 1, "bf16", H200), False).persistent == alone


# ---- the choice of a path ------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """A device that could run the kernels, and a forecast in our hands: a_gpu(persistent, torch, measured)."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(decide, "unsupported", lambda _: None)
    compared = []

    def expect(persistent, on_torch, measured=False):
        def compare(call, backward):
            compared.append((call.batch, call.steps, backward))
            return Forecast(persistent, on_torch, measured)

        monkeypatch.setattr(decide, "compare", compare)
        return device, compared

    return expect


def obstacle(backend, device, **changed):
    return decide.obstacle(asked(backend=backend, device=device, dtype=torch.bfloat16, **changed))


def test_auto_takes_the_faster_path_and_says_both_numbers(a_gpu):
    device, compared = a_gpu(2.0, 3.0)
    assert obstacle("auto", device) is None
    device, _ = a_gpu(3.0, 3.0)
    assert obstacle("auto", device) is None, "equal: the kernels"
    device, _ = a_gpu(4.0, 3.0)
    text = obstacle("auto", device)
    assert "3.00 us per time step against 4.00 (predicted, not measured)" in text
    assert "backend='persistent'" in text
    device, _ = a_gpu(4.0, 3.0, measured=True)
    assert "(measured on this device)" in obstacle("auto", device)
    assert compared[0] == (16, 64, True)
    obstacle("auto", device, backward=False)
    assert compared[-1][-1] is False, "without a backward only the forward counts"


def test_persistent_always_runs_the_kernels(a_gpu):
    device, compared = a_gpu(100.0, 1.0)
    assert obstacle("persistent", device) is None
    assert not compared


def test_what_cannot_run_is_not_compared(a_gpu, monkeypatch):
    device, compared = a_gpu(1.0, 100.0)
    monkeypatch.setattr(decide, "unsupported", lambda _: "no.")
    assert obstacle("auto", device) == "no."
    assert not compared


def test_a_compiled_graph_is_not_decided_by_its_batch(a_gpu, monkeypatch):
    device, compared = a_gpu(2.0, 3.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for batch in (1, 500):
        obstacle("auto", device, batch=batch)
    assert len(set(compared)) == 1


def test_explain_says_both_numbers(a_gpu, monkeypatch):
    a_gpu(4.0, 3.0)
    layer = persistrnn.LSTM(8, 512, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0), raising=False)
    text = persistrnn.explain(layer, batch=16, steps=10)
    assert "path: torch" in text
    assert text.count("4.00 us per time step on the kernels, 3.00 on torch's own path (predicted)") == 2
