"""What must hold under load on a real GPU, beyond the tests: shapes drawn at random, neighbours on the device, and the
sanitizer. Each item raises where something is wrong and else says what it saw."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import persistrnn
from bench.race.engine import Race
from bench.report.results import Case
from persistrnn.kernels import launch

SECONDS = 90.0
SANITIZED = """
import torch, persistrnn
for cell, hidden in ((persistrnn.LSTM, 64), (persistrnn.GRU, 256)):
    layer = cell(32, hidden, device="cuda", dtype=torch.bfloat16, backend="persistent")
    layer(torch.randn(3, 4, 32, device="cuda", dtype=torch.bfloat16))[0].sum().backward()
torch.cuda.synchronize()
persistrnn.check()
"""


def drawn(generator: random.Random, largest: int, longest: int) -> Case:
    """A shape that nobody chose: small and large, odd and round, one row and many."""
    hidden = min(
        largest, generator.choice((generator.randint(1, 64), generator.randint(1, 2048), 2 ** generator.randint(4, 11)))
    )
    batch = generator.choice((1, generator.randint(1, 40), generator.randint(1, 200)))
    steps = generator.randint(1, longest)
    return Case(
        "stress", "drawn", generator.choice(("lstm", "gru")), generator.randint(1, 64), hidden,
        generator.choice((1, 1, 2)), generator.random() < 0.4, min(batch, largest), steps,
        generator.choice(("fp16", "bf16", "tf32", "fp32")), "training",
    )  # fmt: skip


def random_shapes(device: torch.device, seconds: float, largest: int = 2048, longest: int = 48, seed: int = 0) -> str:
    """The bound of the tests on shapes drawn until the time is over, with a loud neighbour on another stream."""
    generator = random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    disturb = neighbour(device)
    while time.monotonic() < end or count == 0:
        case = drawn(generator, largest, longest)
        race = Race(case, device)
        disturb()
        check = race.check("persistrnn", race.runner("persistrnn"))
        if not check.ok:
            raise AssertionError(f"{case.key}: {check.message}")
        count += 1
    return f"{count} shapes, outputs and all gradients within the bound"


def neighbour(device: torch.device) -> Callable[[], None]:
    """Queues products on another stream that take multiprocessors from whoever wants all of them."""
    if device.type != "cuda":
        return lambda: None
    stream = torch.cuda.Stream(device)
    matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def work() -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                matrix @ matrix

    return work


def many_streams(device: torch.device, seconds: float) -> str:
    """Layers on several streams at once: launches that cannot be resident together take turns, and none hangs."""
    if device.type != "cuda":
        return "not run: no CUDA device"
    layers = [
        persistrnn.LSTM(64, h, device=device, dtype=torch.bfloat16, backend="persistent") for h in (256, 512, 1024)
    ]
    streams = [torch.cuda.Stream(device) for _ in layers]
    x = torch.randn(32, 16, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [layer(x)[0] for layer in layers]
        torch.cuda.synchronize()
        end, count = time.monotonic() + seconds / 4, 0  # a round is a few milliseconds: thousands of them
        while time.monotonic() < end:
            found = []
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x)[0])
            torch.cuda.synchronize()
            launch.check()
            for ours, right in zip(found, expected, strict=True):
                if not torch.equal(ours, right):
                    raise AssertionError(f"another result on a side stream, after {count} rounds")
            count += 1
    return f"{count} rounds of {len(layers)} layers on as many streams, equal bits"


def sanitizer(tool: str) -> Callable[[torch.device, float], str]:
    """compute-sanitizer on a small layer of each kind; where it may not run, what it said instead."""

    def run(device: torch.device, seconds: float) -> str:
        program = shutil.which("compute-sanitizer")
        if program is None:
            return "not run: there is no compute-sanitizer on this machine"
        command = [program, "--tool", tool, "--error-exitcode", "66", sys.executable, "-c", SANITIZED]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            return f"not finished: {tool} was stopped after {2 * seconds:.0f} s"
        output = done.stdout + done.stderr
        summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        if done.returncode == 66 or "Traceback (most recent call last)" in output:
            raise AssertionError(f"{tool}: {' '.join(summary)} {output[-1500:]}")
        if done.returncode != 0 or not summary:
            return f"refused: {' '.join(output.split())[-300:]}"
        return f"{tool}: {summary[-1].strip('= ')}"

    return run


ITEMS: dict[str, Callable[[torch.device, float], str]] = {
    "random shapes": random_shapes,
    "many streams": many_streams,
    "compute-sanitizer memcheck": sanitizer("memcheck"),
    "compute-sanitizer racecheck": sanitizer("racecheck"),
    "compute-sanitizer synccheck": sanitizer("synccheck"),
}
