"""GSan without a GPU: why it is not there, and that it has something to watch in the exchange."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gsan_runs
import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from bench.gpu import smoke
from bench.race import arms
from bench.race.correctness import run
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.inspect import reasons
from persistrnn.kernels.inspect.audit import target_of
from persistrnn.kernels.planner.hardware import DEVICES, Hardware

pytestmark = pytest.mark.audit


def test_an_older_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gsan_runs.missing() == f"Triton {triton.__version__} has no GSan (triton.experimental.gsan, from 3.9 on)"


class Driver:
    """What Triton's JIT asks of a GPU's driver before it launches."""

    def __init__(self, hardware: Hardware) -> None:
        self.target = target_of(hardware.arch)
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": hardware.shared})

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.skipif(gsan_runs.missing() is not None, reason=str(gsan_runs.missing()))
def test_the_exchange_is_instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the polling in Triton's own loop; of inline assembly it would see nothing. Launched on CPU tensors the forward
    is compiled for an H200, and the launch is left out."""
    found: list[Any] = []
    inner, hardware, driver = JITFunction.run, DEVICES["h200"], triton.runtime.driver

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.__name__ == "scan_forward":
            found.append(inner(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(driver, "_active", Driver(hardware))
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "gsan")
    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(launch, "hardware", lambda device: hardware)
    monkeypatch.setattr(launch, "exchange_for", lambda device: Exchange(poll="atomic"))
    monkeypatch.setattr(reasons, "unsupported", lambda *_: None)
    case = replace(next(one.case for one in smoke.SMOKE if one.wanted == "several slices"), steps=2)
    runner = arms.persistent(case, arms.source(case), torch.device("cpu"))
    run(runner, case, torch.zeros(arms.input_shape(case)), torch.zeros(2, case.batch, case.hidden))
    (kernel,) = found
    assert "Read after write race detected" in kernel.asm["llir"]
    assert "ld.acquire" not in kernel.asm["ttgir"], "no inline assembly"
    assert "acquire" in kernel.asm["ttgir"]
