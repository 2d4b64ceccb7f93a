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

from ..cells import CELLS
from ..planner import cost, forecast, memory, occupancy
from ..planner.hardware import DEVICES, Hardware
from ..planner.plan import DTYPES, Pass, PlanError, plan_layer
from ..planner.problem import WEIGHTS, Problem
from ..planner.tiling import Tiling
from . import picture
from .prediction import FALLBACK, device_of

LARGEST = 2**31 - 1
NAMES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}  # torch's
# Steps of compiled kernels by the clock of a checkout's tests; an installation does not have them.
CLOCK = Path(__file__).resolve().parents[2] / "bench" / "results" / "clock.csv"
APART = 0.2  # of clock and model: from here on the text says where to read why
GLYPHS = {"weights": "#", "staging": "=", "working": "=", "reserved": "r", "free": ".", "out of reach": "x"}


def _dtype(given: str) -> str:
    name = given.lower().removeprefix("torch.")
    return NAMES.get(name, name)


def positive(given: str) -> int:
    """An argparse type."""
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
    add("--hidden", type=positive, required=True, metavar="H", help="hidden_size")
    add("--heads", type=positive, default=1, metavar="N", help="blocks of a block-diagonal W_hh (1: it is whole)")
    add("--batch", type=positive, default=16, metavar="B", help="sequences side by side (default: 16)")
    text = "time steps, on which the memory of training depends (default: 1024)"
    add("--steps", type=positive, default=1024, metavar="T", help=text)
    add("--directions", type=int, choices=(1, 2), default=1, help="2 is a bidirectional layer (default: 1)")
    add("--dtype", type=_dtype, choices=list(DTYPES), default="bf16", help="default: bf16")
    add("--weights", choices=WEIGHTS, default="", help="W_hh in 8 bits, for inference (default: in dtype)")
    text = f"default: the GPU at hand; without one, {FALLBACK}"
    add("--device", type=str.lower, choices=list(DEVICES), help=text)
    add("--draw", type=_drawing, metavar="FILE.svg", help="also draw the chip")
    add("--json", action="store_true", help="print one JSON object with everything instead of text")
    return result


def clocked(problem: Problem, name: str) -> dict[str, Any] | None:
    """What the clock predicts for a pass, where its table has this very plan: us per time step, and the largest shares
    of it by source line."""
    if problem.directions * problem.heads != 1 or problem.weight_dtype or not CLOCK.exists():
        return None
    model = f"{getattr(plan_layer(problem), name).predicted:.2f}"
    of = {"device": problem.hardware.name, "dtype": problem.dtype, "cell": problem.cell.name, "model_us": model,
          "hidden": str(problem.hidden), "batch": str(problem.batch), "pass": name}  # fmt: skip
    with CLOCK.open(newline="") as file:
        for row in csv.DictReader(file):
            if of.items() <= row.items():
                shares = {row[f"line_{n}"]: float(row[f"share_{n}"]) for n in range(1, 4)}
                return {"us": float(row["clock_us"]), "shares": shares}
    return None


def sourced(hardware: Hardware, kind: str) -> list[str]:
    """The numbers of the record whose source is of that kind ("assumed", "measured")."""
    return [name for name, source in hardware.sources if source.startswith(f"{kind}:")]


def expected(problem: Problem) -> dict[str, forecast.Forecast]:
    """What ``backend="auto"`` compares, without gradients and with them."""
    names = ("inference",) if problem.weight_dtype else ("inference", "training")
    return {name: forecast.forecast(problem, name == "training") for name in names}


def bytes_of(problem: Problem, steps: int) -> dict[str, dict[str, float]]:
    """Predicted bytes of a training step by ``save`` mode, without the input and the gradients of input and output;
    empty where there is none."""
    if problem.weight_dtype:
        return {}
    cell, hidden, batch, recurrences, size = (
        problem.cell, problem.hidden, problem.batch, problem.recurrences, problem.size,
    )  # fmt: skip
    of = memory.Layers(cell, hidden, hidden, 1, recurrences, size, size, False)
    result = {}
    for mode in memory.MODES:
        chunk = memory.chunk_steps(mode, cell.inputs, hidden, batch, recurrences, size, steps)
        result[mode] = {
            "kept_per_step_and_row": memory.kept(mode, of, chunk),
            "chunk_steps": min(steps, chunk),
            "needed": memory.needed(mode, of, batch, steps, chunk),
        }
    return result


def as_json(problem: Problem, steps: int, origin: str) -> dict[str, Any]:
    """Everything: the fields of the plan, and what is worked out from them."""
    found, hardware = plan_layer(problem), problem.hardware
    result: dict[str, Any] = dataclasses.asdict(found)
    if found.heads == 1:
        del result["heads"]
    if problem.weight_dtype:
        del result["backward"]
    for name in found.passes:
        part: Pass = getattr(found, name)
        tiling = result[name]["tiling"]
        result[name]["tiling"] = {
            k: v for k, v in tiling.items() if k not in Tiling.OF_SOME_CELLS or v != getattr(Tiling, k)
        }
        result[name]["shares"] |= {"sum": problem.weight_bytes, "resident": part.shares.resident}
        result[name]["cost"]["total"] = part.cost.total
        budgets = picture.budgets(part, hardware).items()
        memories = {where.replace(" ", "_"): {"whole": sum(parts.values()), **parts} for where, parts in budgets}
        result[name]["multiprocessor"] = {"programs": picture.crowd(part, hardware), **memories}
    return result | {
        "device_from": origin,
        "predicted_us": {name: getattr(found, name).predicted for name in found.passes},
        "floor_us": found.floor,
        "torch_us": {name: cost.torch_step(problem, name == "backward") for name in found.passes},
        "clock": {name: clocked(problem, name) for name in found.passes},
        "auto": {name: dataclasses.asdict(one) | {"path": one.path} for name, one in expected(problem).items()},
        "memory_bytes": {"steps": steps} | bytes_of(problem, steps),
        "assumed": sourced(hardware, "assumed"),
        "measured": sourced(hardware, "measured"),
        "times": "predicted",
    }


def as_text(problem: Problem, steps: int, origin: str) -> str:
    """The same in words."""
    found, hardware, facts = plan_layer(problem), problem.hardware, as_json(problem, steps, origin)
    lines = [
        f"{found.cell} {found.size_in_words} B={found.batch} D={found.directions} {found.dtype_in_words} on "
        f"{hardware.name} ({hardware.arch}, {hardware.multiprocessors} multiprocessors; {origin})"
    ]
    for name in found.passes:
        lines += ["", name, *(f"  {line}" for line in _pass(problem, name, facts))]
    lines.append("")
    for name, one in facts["auto"].items():
        how = "corrected by measurements" if one["measured"] else "predicted"
        lines.append(
            f'backend="auto" takes {one["path"]} in {name}: {one["persistent"]:.2f} us per step on the kernels, '
            f"{one['torch']:.2f} on torch's own path ({how})"
        )
    if not problem.weight_dtype:
        lines += ["", f"memory of one layer in training at T = {steps:,}, by what is kept for its backward"]
    for mode in memory.MODES if not problem.weight_dtype else ():
        need = facts["memory_bytes"][mode]
        lines.append(
            f"  {mode}: {need['kept_per_step_and_row']:,.0f} bytes per step and row, and {need['needed']:,.0f} at most "
            f"with the work on {need['chunk_steps']:,} steps"
        )
    lines += [
        "",
        "All times are predicted by the cost model, none is measured; so are the bytes.",
        f"Assumed in the record of {hardware.name}: {', '.join(facts['assumed']) or 'nothing'}.",
    ]
    if facts["measured"]:
        lines.append(f"Measured, in the record of {hardware.name}: {', '.join(facts['measured'])}.")
    if ratios := sorted(e.ratio for e in forecast.errors(problem.cell, hardware)):
        lines.append(
            f"Against {len(ratios)} measured steps of the {found.cell} on {hardware.name}, measured over predicted is "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, in the middle {ratios[len(ratios) // 2]:.2f}."
        )
    return "\n".join(lines)


def _pass(problem: Problem, name: str, facts: dict[str, Any]) -> list[str]:
    """Plan, homes, budget and predicted time of one pass."""
    hardware, count = problem.hardware, picture.count
    part: Pass = getattr(plan_layer(problem), name)
    t, shares = part.tiling, part.shares
    exchange = (
        "two exchanges each step" if t.k_parts > 1 else "an exchange each step" if t.slices > 1 else "no exchange"
    )
    rows = "1 row" if problem.batch == 1 else f"rows 0 to {problem.batch - 1}"
    shared_out = ", 2 directions" * (problem.directions - 1) + f", {problem.heads} heads" * (problem.heads > 1)
    one = "direction" if problem.heads == 1 else "head"
    lines = [
        picture.describe(part, hardware),
        f"{count(t.jobs(problem.batch), 'job')} ({rows}{shared_out}); "
        f"{count(picture.running(part, hardware), 'program')} run at once, {picture.crowd(part, hardware)} per "
        f"multiprocessor, {count(picture.idle(part, hardware), 'multiprocessor')} idle; {exchange}",
        f"W_hh of one {one}: {shares.registers:,} bytes in registers + {shares.shared:,} in shared memory + "
        f"{shares.streamed:,} streamed each step",
        f"  = {problem.weight_bytes:,}, all {t.gates} x {problem.hidden} x {problem.hidden} x {problem.stored} bytes "
        f"of it; {picture.resident(part)} resident",
    ]
    if part.registers > (limit := occupancy.register_limit(part.choice)):
        lines.append(f"spills: about {part.registers} registers per thread are needed, and there are {limit}")
    lines.append("one multiprocessor:")
    for where, parts in picture.budgets(part, hardware).items():
        lines += [f"  {line}" for line in bar(where, parts)]
    split = " + ".join(f"{field} {us:.2f}" for field, us in dataclasses.asdict(part.cost).items())
    lines += [
        f"predicted us per step: {split} = {part.cost.total:.2f}, x {count(part.rounds, 'round')} "
        f"= {part.predicted:.2f}",
        f"predicted floor of any plan {facts['floor_us']:.2f} us; torch's own path {facts['torch_us'][name]:.2f} us "
        f"{name}",
    ]
    if clock := facts["clock"][name]:
        apart = clock["us"] / part.predicted - 1
        why = "; bench/NOTES.md says what the model does not count" if abs(apart) > APART else ""
        waits = ", ".join(f"{line} {share:.0%}" for line, share in clock["shares"].items())
        lines.append(
            f"predicted by the clock of emulated code {clock['us']:.2f} us, {apart:+.0%}; most in {waits}{why}"
        )
    return lines


def bar(where: str, parts: dict[str, int], width: int = 64) -> list[str]:
    """Two lines: a memory's bytes as a bar, and what its signs stand for."""
    whole, ends, key = sum(parts.values()), [0], []
    for name, n in parts.items():
        ends.append(ends[-1] + n)
        if n or name not in ("reserved", "out of reach"):
            key.append(f"{GLYPHS[name]} {name} {n:,}")
    at = [round(width * end / whole) for end in ends]
    drawn = "".join(GLYPHS[name] * (at[i + 1] - at[i]) for i, name in enumerate(parts))
    return [f"{where:13} [{drawn}] {whole:,} bytes", f"{'':13}  {'   '.join(key)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    hardware, origin = device_of(given.device)
    if given.hidden % given.heads:
        options.error(
            f"argument --heads: {given.heads} given, which does not divide --hidden {given.hidden}; "
            "allowed: its divisors"
        )
    sizes = given.hidden // given.heads, given.batch, given.directions
    try:
        problem = Problem(CELLS[given.cell], *sizes, given.dtype, hardware, given.heads, given.weights)
    except ValueError as error:
        options.error(f"argument --weights: {error}")
    try:
        found = plan_layer(problem)
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
        answer = json.dumps(as_json(problem, given.steps, origin), indent=2, allow_nan=False)
    else:
        answer = as_text(problem, given.steps, origin)
    try:
        print(answer, flush=True)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
