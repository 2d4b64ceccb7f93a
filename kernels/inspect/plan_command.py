"""``persistrnn plan``: what the plan for one layer on one device is, in words, in numbers and as a drawing.

Everything is predicted, nothing is run: it needs no GPU, and none of the device that it plans for.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cells import CELLS, Cell
from ..planner import cost, forecast, memory, occupancy
from ..planner import hardware as devices
from ..planner.hardware import DEVICES, Hardware
from ..planner.plan import DTYPES, Pass, Plan, PlanError, plan_layer
from ..planner.problem import Problem
from ..planner.tiling import Tiling
from . import picture

FALLBACK = "h200"
LARGEST = 2**31 - 1
# Steps of compiled kernels by the clock of a checkout's tests; an installation does not have them.
CLOCK = Path(__file__).resolve().parents[2] / "bench" / "results" / "clock.csv"
APART = 0.2  # of clock and model: from here on it is told where to read why
NAMES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}  # torch's


def _dtype(given: str) -> str:
    name = given.lower().removeprefix("torch.")
    return NAMES.get(name, name)


def _count(given: str) -> int:
    # isascii: int() takes digits of any script.
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 11 else 0
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{given!r} given, allowed: an integer from 1 to {LARGEST}")
    return number


def _drawing(given: str) -> Path:
    if not given.endswith(".svg"):
        raise argparse.ArgumentTypeError(
            f"{given!r} given, allowed: a file whose name ends in .svg; the drawing is an SVG, convert it afterwards"
        )
    return Path(given)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="persistrnn plan",
        description="The plan for one recurrent layer: who owns what of W_hh, where it lives, and what a time step is "
        "predicted to take. All times are predicted, none is measured.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--cell", type=str.lower, choices=list(CELLS), required=True, help="of the layer")
    add("--hidden", type=_count, required=True, metavar="H", help="hidden_size")
    add("--heads", type=_count, default=1, metavar="N", help="blocks of a block-diagonal W_hh (1: it is whole)")
    add("--batch", type=_count, default=16, metavar="B", help="sequences side by side (default: 16)")
    text = "time steps, on which the memory of training depends (default: 1024)"
    add("--steps", type=_count, default=1024, metavar="T", help=text)
    add("--directions", type=int, choices=(1, 2), default=1, help="2 is a bidirectional layer (default: 1)")
    add("--dtype", type=_dtype, choices=list(DTYPES), default="bf16", help="default: bf16")
    text = f"default: the GPU at hand; without one, {FALLBACK}"
    add("--device", type=str.lower, choices=list(DEVICES), help=text)
    add("--draw", type=_drawing, metavar="FILE.svg", help="also draw the chip")
    add("--json", action="store_true", help="print one JSON object with everything instead of text")
    return result


def device_of(name: str | None) -> tuple[Hardware, str]:
    """The device to plan for, and where it comes from in words."""
    if name is not None:
        return devices.named(name), "named by --device"
    import torch

    if not torch.cuda.is_available():
        return devices.named(FALLBACK), f"no GPU here: planned for {FALLBACK}; --device names another"
    from .. import launch

    found = launch.hardware(torch.device("cuda", torch.cuda.current_device()))
    return found, "the GPU at hand"


def torch_steps(found: Plan, cell: Cell) -> dict[str, float]:
    """Predicted microseconds per time step of torch's own path, per pass."""
    problem = problem_of(found, cell)
    return {name: cost.torch_step(problem, name == "backward") for name in picture.PASSES}


def clocked(found: Plan, name: str) -> dict[str, Any] | None:
    """What the clock predicts for a pass, where its table has this very plan: us per time step, and the largest shares
    of it by source line."""
    if found.directions * found.heads != 1 or not CLOCK.exists():
        return None
    of = {"device": found.hardware.name, "dtype": found.dtype, "cell": found.cell, "hidden": found.hidden,
          "batch": found.batch, "pass": name, "model_us": f"{getattr(found, name).predicted:.2f}"}  # fmt: skip
    with CLOCK.open(newline="") as file:
        for row in csv.DictReader(file):
            if all(row[key] == str(value) for key, value in of.items()):
                shares = {row[f"line_{n}"]: float(row[f"share_{n}"]) for n in range(1, 4)}
                return {"us": float(row["clock_us"]), "shares": shares}
    return None


def sourced(hardware: Hardware, kind: str) -> list[str]:
    """The numbers of the record whose source is of that kind ("assumed", "measured")."""
    return [name for name, source in hardware.sources if source.startswith(f"{kind}:")]


def as_json(found: Plan, cell: Cell, steps: int, origin: str) -> dict[str, Any]:
    """Everything: the fields of the plan, and what is worked out from them."""
    result: dict[str, Any] = dataclasses.asdict(found)
    if found.heads == 1:
        del result["heads"]
    for name in picture.PASSES:
        part: Pass = getattr(found, name)
        tiling = result[name]["tiling"]
        result[name]["tiling"] = {
            k: v for k, v in tiling.items() if k not in Tiling.OF_SOME_CELLS or v != getattr(Tiling, k)
        }
        shared, registers = picture.budgets(part, found.hardware)
        result[name]["shares"] |= {"sum": picture.whole_of(found, part), "resident": part.shares.resident}
        result[name]["cost"]["total"] = part.cost.total
        result[name]["multiprocessor"] = {
            "programs": picture.crowd(part, found.hardware),
            "shared_memory": {"whole": shared.whole, **dict(shared.parts)},
            "registers": {"whole": registers.whole, **dict(registers.parts)},
        }
    return result | {
        "device_from": origin,
        "predicted_us": {name: getattr(found, name).predicted for name in picture.PASSES},
        "floor_us": found.floor,
        "torch_us": torch_steps(found, cell),
        "clock": {name: clocked(found, name) for name in picture.PASSES},
        "auto": {name: dataclasses.asdict(one) | {"path": one.path} for name, one in expected(found, cell).items()},
        "memory_bytes": {"steps": steps} | bytes_of(found, cell, steps),
        "assumed": sourced(found.hardware, "assumed"),
        "measured": sourced(found.hardware, "measured"),
        "times": "predicted",
    }


def expected(found: Plan, cell: Cell) -> dict[str, forecast.Forecast]:
    """What ``backend="auto"`` compares, without gradients and with them."""
    problem = problem_of(found, cell)
    return {name: forecast.forecast(problem, name == "training") for name in ("inference", "training")}


def problem_of(found: Plan, cell: Cell) -> Problem:
    """What the plan answers."""
    sizes = found.hidden, found.batch, found.directions
    return Problem(cell, *sizes, found.dtype, found.hardware, found.heads)


def bytes_of(found: Plan, cell: Cell, steps: int) -> dict[str, dict[str, float]]:
    """Predicted bytes of a training step by ``save`` mode, without the input and the gradients of input and output."""
    size = DTYPES[found.dtype]
    recurrences = found.directions * found.heads
    of = memory.Layers(cell, found.hidden, found.hidden, 1, recurrences, size, size, False)
    result = {}
    for mode in memory.MODES:
        chunk = memory.chunk_steps(mode, cell.inputs, found.hidden, found.batch, recurrences, size, steps)
        result[mode] = {
            "kept_per_step_and_row": memory.kept(mode, of, chunk),
            "chunk_steps": min(steps, chunk),
            "needed": memory.needed(mode, of, found.batch, steps, chunk),
        }
    return result


def as_text(found: Plan, cell: Cell, steps: int, origin: str) -> str:
    hardware = found.hardware
    torch_us = torch_steps(found, cell)
    lines = [
        f"{found.cell} {found.size_in_words} B={found.batch} D={found.directions} {found.dtype} on {hardware.name} "
        f"({hardware.arch}, {hardware.multiprocessors} multiprocessors; {origin})"
    ]
    for name in picture.PASSES:
        lines += ["", name, *(f"  {line}" for line in _pass(found, getattr(found, name), name, torch_us[name]))]
    lines.append("")
    for name, one in expected(found, cell).items():
        how = "corrected by measurements" if one.measured else "predicted"
        lines.append(
            f'backend="auto" takes {one.path} in {name}: {one.persistent:.2f} us per step on the kernels, '
            f"{one.torch:.2f} on torch's own path ({how})"
        )
    lines += ["", f"memory of one layer in training at T = {steps:,}, by what is kept for its backward"]
    for mode, need in bytes_of(found, cell, steps).items():
        lines.append(
            f"  {mode}: {need['kept_per_step_and_row']:,.0f} bytes per step and row, and {need['needed']:,.0f} at most "
            f"with the work on {need['chunk_steps']:,} steps"
        )
    assumed, measured = sourced(hardware, "assumed"), sourced(hardware, "measured")
    lines += [
        "",
        "All times are predicted by the cost model, none is measured; so are the bytes.",
        f"Assumed in the record of {hardware.name}: {', '.join(assumed) or 'nothing'}.",
    ]
    if measured:
        lines.append(f"Measured, in the record of {hardware.name}: {', '.join(measured)}.")
    ratios = sorted(e.ratio for e in forecast.errors(cell, hardware))
    if ratios:
        lines.append(
            f"Against {len(ratios)} measured steps of the {cell.name} on {hardware.name}, measured over predicted is "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, in the middle {ratios[len(ratios) // 2]:.2f}."
        )
    return "\n".join(lines)


def _pass(found: Plan, part: Pass, name: str, torch_us: float) -> list[str]:
    """Plan, homes, budget and predicted time of one pass."""
    hardware, t = found.hardware, part.tiling
    programs, crowd = picture.running(part, hardware), picture.crowd(part, hardware)
    idle = hardware.multiprocessors - min(programs, hardware.multiprocessors)
    if t.slices == 1:
        exchange = "no exchange"
    elif t.rows == 1:
        exchange = "an exchange each step"
    else:
        exchange = "two exchanges each step"
    shares, total = part.shares, picture.whole_of(found, part)
    size = DTYPES[found.dtype]
    jobs = t.jobs(found.batch)
    last = picture.job(part, found.batch, jobs - 1)
    rows = "1 row" if found.batch == 1 else f"rows 0 to {last.last}"
    lines = [
        picture.describe(part, hardware),
        f"{picture.count(jobs, 'job')} ({rows}{', 2 directions' if found.directions == 2 else ''}); "
        f"{picture.count(programs, 'program')} run at once, {crowd} per multiprocessor, "
        f"{picture.count(idle, 'multiprocessor')} idle; {exchange}",
        f"W_hh of one direction: {shares.registers:,} bytes in registers + {shares.shared:,} in shared memory + "
        f"{shares.streamed:,} streamed each step",
        f"  = {total:,}, all {t.gates} x {found.hidden} x {found.hidden} x {size} bytes of it; "
        f"{picture.resident(part)} resident",
        "one multiprocessor:",
    ]
    limit = occupancy.register_limit(part.choice)
    if part.registers > limit:
        lines.insert(-1, f"spills: about {part.registers} registers per thread are needed, and there are {limit}")
    for budget in picture.budgets(part, hardware):
        lines += [f"  {line}" for line in picture.bar(budget)]
    split = " + ".join(f"{field.name} {getattr(part.cost, field.name):.2f}" for field in dataclasses.fields(part.cost))
    lines += [
        f"predicted us per step: {split} = {part.cost.total:.2f}, x {picture.count(part.rounds, 'round')} "
        f"= {part.predicted:.2f}",
        f"predicted floor of any plan {found.floor:.2f} us; torch's own path {torch_us:.2f} us {name}",
    ]
    if clock := clocked(found, name):
        apart = clock["us"] / part.predicted - 1
        why = "; bench/NOTES.md says what the model does not count" if abs(apart) > APART else ""
        waits = ", ".join(f"{line} {share:.0%}" for line, share in clock["shares"].items())
        lines.append(
            f"predicted by the clock of emulated code {clock['us']:.2f} us, {apart:+.0%}; most in {waits}{why}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    hardware, origin = device_of(given.device)
    cell = CELLS[given.cell]
    if given.hidden % given.heads:
        options.error(
            f"argument --heads: {given.heads} given, which does not divide --hidden {given.hidden}; "
            "allowed: its divisors"
        )
    sizes = given.hidden // given.heads, given.batch, given.directions
    try:
        found = plan_layer(Problem(cell, *sizes, given.dtype, hardware, given.heads))
    except PlanError as error:
        print(f"persistrnn plan: {error}", file=sys.stderr)
        return 1
    if given.draw is not None:
        # Before anything is printed: a drawing that cannot be written leaves no half of an answer.
        try:
            given.draw.write_text(picture.svg(found), encoding="utf-8")
        except OSError as error:
            options.error(
                f"argument --draw: {str(given.draw)!r} given, and it cannot be written ({error.strerror}); allowed: a "
                "file that you may write, in a folder that exists"
            )
    if given.json:
        answer = json.dumps(as_json(found, cell, given.steps, origin), indent=2, allow_nan=False)
    else:
        answer = as_text(found, cell, given.steps, origin)
    try:
        print(answer, flush=True)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
