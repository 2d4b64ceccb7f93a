"""GSan without a GPU: why it is not there, and that it has something to watch in the exchange."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gsan_runs
import pytest
import torch
import triton

from bench.gpu import smoke
from bench.gpu.compile_first import Driver, JITFunction, compiling
from bench.race import arms
from bench.race.correctness import run
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner.hardware import DEVICES

pytestmark = pytest.mark.audit


def test_an_older_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gsan_runs.missing() == f"Triton {triton.__version__} has no GSan (triton.experimental.gsan, from 3.9 on)"


@pytest.mark.skipif(gsan_runs.missing() is not None, reason=str(gsan_runs.missing()))
def test_the_exchange_is_instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the polling in Triton's own loop; of inline assembly it would see nothing."""
    found: list[Any] = []
    inner, hardware = JITFunction.run, DEVICES["h200"]
    shared = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": hardware.shared})
    monkeypatch.setattr(Driver, "utils", shared, raising=False)
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "gsan")
    monkeypatch.setattr(JITFunction, "run", lambda *a, **options: found.append(inner(*a, **options)))
    case = replace(next(one.case for one in smoke.SMOKE if one.wanted == "several slices"), steps=2)
    with compiling(hardware, "counter", 2):
        monkeypatch.setattr(launch, "exchange_for", lambda device: Exchange(poll="atomic"))
        runner = arms.persistent(case, arms.source(case), torch.device("cpu"))
        run(runner, case, torch.zeros(arms.input_shape(case)), torch.zeros(2, case.batch, case.hidden))
    (kernel,) = found
    assert "Read after write race detected" in kernel.asm["llir"]
    assert "ld.acquire" not in kernel.asm["ttgir"], "no inline assembly"
    assert "acquire" in kernel.asm["ttgir"]
