"""Stands in for Triton's CUDA driver: its JIT and this project's ``launch`` run unchanged, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from persistrnn import decide
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner import hardware

from .counts import Report
from .grid import Grid
from .memory import Memory
from .ptx import EmulatorError, Kernel, width

DEVICES = {80: "a100", 90: "h200", 100: "b200"}
_MADE: dict[tuple[str, int], Kernel] = {}  # each PTX is parsed and translated once


@dataclass
class Session:
    """Launches while a test runs. options: of every ``Grid``; mutate: changes the PTX of a kernel before it runs;
    tolerate: what the detectors find is reported, and no error."""

    target: GPUTarget
    options: dict[str, Any]
    mutate: Callable[[str], str] | None
    tolerate: bool
    reports: list[Report] = field(default_factory=list)

    def launch(self, ptx: str, shared: int, shape: tuple[int, int, int], arguments: list[tuple[str, Any, str]]) -> None:
        """arguments: (type, value, name)."""
        ptx = self.mutate(ptx) if self.mutate else ptx
        if (ptx, shared) not in _MADE:
            _MADE[ptx, shared] = Kernel(ptx, shared)
        kernel = _MADE[ptx, shared]
        memory, values = Memory(), []
        for kind, value, name in arguments:
            if kind.startswith("*"):
                size = value.element_size()
                memory.add(name, value.data_ptr(), value.numel() * size, size, fresh=name == "sync[2]")
                values.append((value.data_ptr(), 8))
            elif kind == "fp32":
                values.append((int(torch.tensor(value).view(torch.int32)), 4))
            else:
                size = 1 if kind == "i1" else width(kind)
                values.append((int(value) & (2 ** (8 * size) - 1), size))
        values += [(0, 8)] * (len(kernel.parameters) - len(values))  # scratch memory, which no kernel here uses
        if [size for _, size in values] != [width(kind) for kind, _ in kernel.parameters]:
            raise EmulatorError(f"arguments of {[s for _, s in values]} bytes for parameters {kernel.parameters}")
        report = Grid(kernel, shape, values, memory, **self.options).run()
        self.reports.append(report)
        if (found := report.races + report.unwritten) and not self.tolerate:
            raise EmulatorError("\n".join(found))


class _Driver(DriverBase):
    """The current device is numbered as its architecture, so that the JIT keeps the kernels of each apart."""

    def __init__(self, session: Session, shared: int):
        self.session, self.launcher_cls = session, _Launcher
        properties = {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32}
        loaded = (None, 0, 0, 0, 1024)  # module (none to unload), function, registers, spills, most threads
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties, load_binary=lambda *_: loaded)
        self.loading: _Launcher | None = None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> GPUTarget:
        return self.session.target

    def get_current_device(self) -> int:
        return self.session.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError


class _Launcher:
    """Flattens the arguments of a launch, tuples among them. A compiled kernel keeps it, whatever the session."""

    def __init__(self, source: Any, metadata: Any):
        self.shared, self.signature, self.ptx = metadata.shared, source.signature, ""
        triton.runtime.driver.active.loading = self

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, enter: Any,
                 leave: Any, *arguments: Any) -> None:  # fmt: skip
        flat: list[tuple[str, Any, str]] = []
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            flat += _flattened(kind, value, name)
        triton.runtime.driver.active.session.launch(self.ptx, self.shared, (x, y, z), flat)


def _flattened(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    if isinstance(kind, tuple):
        for n, (k, v) in enumerate(zip(kind, value, strict=True)):
            yield from _flattened(k, v, f"{name}[{n}]")
    elif kind != "constexpr":
        yield kind, value, name


def _loaded(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
    """Triton has loaded a kernel: its launcher, made just before, gets the PTX."""
    triton.runtime.driver.active.loading.ptx = Path(next(p for n, p in files.items() if n.endswith(".ptx"))).read_text()


def emulate(monkeypatch: pytest.MonkeyPatch, arch: str, mutate: Callable[[str], str] | None = None,
            tolerate: bool = False, **options: Any) -> Session:  # fmt: skip
    """From here on, persistrnn runs compiled kernels of ``arch`` on tensors of the CPU. options: of every ``Grid``."""
    device = hardware.named(DEVICES[int(arch[3:])])
    session = Session(GPUTarget("cuda", int(arch[3:]), 32), options, mutate, tolerate)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(session, device.shared))
    monkeypatch.setattr(knobs.runtime, "kernel_load_start_hook", _loaded)
    monkeypatch.setattr(launch, "hardware", lambda _: device)
    monkeypatch.setattr(launch, "exchange_for", lambda _: Exchange())
    monkeypatch.setattr(decide, "unsupported", lambda *_: None)
    return session
