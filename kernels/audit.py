"""Proof from compiled code, without a GPU: what the scan kernels keep on chip, and what they cost.

Each row compiles one kernel as the plan would launch it and reads TTGIR, PTX and SASS:

* weight loads: the weight argument is followed through TTGIR to every global load made from it; loads inside the
  loop over time must be 0, and loads before it at least 1 (so that a lost trail cannot pass);
* spills: local-memory loads and stores in SASS;
* shared memory: what the kernel asks for against the device's limit (the compiler does not check it) and against
  the plan's bound;
* tensor instruction: which, wherever the dtype has one;
* the exchange: an acquire load and a release add at gpu scope in PTX where there is more than one slice.

Run as ``python -m persistrnn audit``; the exit status is 1 if any row fails. Finished rows are kept in ``--output``
and not compiled again while the kernels' source is the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import plan as planning
from .cells import CELLS
from .exchange import Exchange
from .launch import options, shape_of
from .scan import scan_backward, scan_forward

DTYPES = {"fp16": "*fp16", "bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
DEVICE_OF_ARCH = {80: "a100", 90: "h200"}
HIDDEN = (64, 128, 256, 320, 512, 768, 1024)
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """What to compile: one kernel for one shape on one architecture."""

    cell: str
    backward: bool
    dtype: str
    hidden: int
    arch: int
    batch: int = 16
    directions: int = 1


@dataclass(frozen=True)
class Row:
    """What was found. ``failures`` is empty if the row is green; ``refused`` holds the plan's refusal."""

    kernel: str
    dtype: str
    H: int
    arch: str
    triton: str
    slices: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    resident: int = 0
    loads_in_loop: int = 0
    tensor: str = ""
    barriers: int = 0
    instructions: int = 0
    failures: str = ""
    refused: str = ""


def compile_case(case: Case) -> tuple[Any, planning.Pass]:
    """The compiled kernel and the plan's pass that it was compiled for."""
    cell = CELLS[case.cell]
    hardware = planning.DEVICES[DEVICE_OF_ARCH[case.arch]]
    plan = planning.plan(shape_of(cell), case.hidden, case.batch, case.directions, case.dtype, hardware)
    part = plan.backward if case.backward else plan.forward
    pointer = DTYPES[case.dtype]
    states = (pointer,) * cell.states
    signature: dict[str, str | tuple[str, ...]] = {
        "first_job": "i32",
        "T": "i32",
        "B": "i32",
        "sync": ("*i32", "*i32"),
        "states": states,
        "weight": pointer,
        "saved": pointer,
    }
    constants = {"tiling": part.tiling, "exchange": Exchange()}
    if case.backward:
        kernel = scan_backward
        signature |= {"dy": pointer, "d_gates": (pointer, pointer), "d_final": states, "d_initial": states}
        constants |= {"cell": cell.backward}
    else:
        kernel = scan_forward
        signature |= {"x_gates": pointer, "bias": pointer}
        constants |= {"cell": cell.forward, "SAVE": True}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        kind = signature.get(name, "constexpr")
        if isinstance(kind, tuple):
            aligned |= {(i, j): ALIGNED for j in range(len(kind))}
        elif kind.startswith("*"):
            aligned[(i,)] = ALIGNED
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options(part))
    return compiled, part


def weight_loads(ttgir: str) -> tuple[int, int]:
    """(outside, inside the loop over time) global loads from pointers that derive from ``%weight``.

    The loop over time is the only ``scf.for`` of a scan kernel; a load inside any loop counts.
    """
    derived = {"%weight"}
    outside = inside = 0
    regions: list[str] = []
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("}"):
            regions.pop()
        if text.endswith("{"):
            regions.append("for" if "scf.for" in text else "other")
        text = text.split(" loc(")[0]
        names = re.findall(r"%[\w.$-]+(?:#\d+)?", text)
        for argument, initial in re.findall(r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)", text.partition("iter_args")[2]):
            if initial in derived:
                derived.add(argument)
        result, equals, operation = text.partition(" = ")
        if not equals or not result.startswith("%") or "scf.for" in operation:
            continue
        used = set(names[1:]) & derived
        if not used:
            continue
        if re.search(r"\b(tt\.(load|gather|descriptor_load)|ttg\.async_copy_global_to_local)\b", operation):
            if "for" in regions:
                inside += 1
            else:
                outside += 1
        else:
            derived.add(result.split(":")[0].split(",")[0])
    return outside, inside


def disassemble(cubin: bytes) -> tuple[int, Counter[str]]:
    """(registers, how often each SASS instruction occurs, with its full name)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"no register count in what {tool} printed: {usage[:500]}")
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return int(registers.group(1)), Counter(found)


def audit(case: Case) -> Row:
    """Compile one case and read it."""
    name = f"{case.cell} {'backward' if case.backward else 'forward'}"
    identity = {
        "kernel": name,
        "dtype": case.dtype,
        "H": case.hidden,
        "arch": f"sm_{case.arch}",
        "triton": triton.__version__,
    }
    try:
        compiled, part = compile_case(case)
    except planning.PlanError as error:
        return Row(**identity, refused=str(error))
    outside, inside = weight_loads(compiled.asm["ttgir"])
    registers, sass = disassemble(compiled.asm["cubin"])

    def count(*prefixes: str) -> int:
        return sum(n for instruction, n in sass.items() if instruction.split(".")[0] in prefixes)

    tensor = sorted(i for i in sass if i.split(".")[0] in ("HMMA", "HGMMA"))
    limit = planning.DEVICES[DEVICE_OF_ARCH[case.arch]].shared
    failures = []
    if inside or not outside:
        failures.append(f"{inside} weight loads in the loop, {outside} before it")
    if count("LDL", "STL"):
        failures.append(f"{count('LDL', 'STL')} spill instructions")
    if compiled.metadata.shared > limit:
        failures.append(f"{compiled.metadata.shared} bytes of shared memory, limit {limit}")
    if compiled.metadata.shared > part.shared:
        failures.append(f"{compiled.metadata.shared} bytes of shared memory, the plan's bound is {part.shared}")
    if not tensor and case.dtype != "fp32":
        failures.append("no tensor-core instruction")
    if part.tiling.slices > 1:
        ptx = compiled.asm["ptx"]
        if "ld.acquire.gpu" not in ptx:
            failures.append("no acquire load")
        if not re.search(
            r"(atom|red)\.global\.(gpu\.)?release|(atom|red)\.release\.gpu|(atom|red)[\w.]*\.gpu\.release", ptx
        ):
            failures.append("no release add")
    return Row(
        **identity,
        slices=part.tiling.slices,
        registers=registers,
        spills=count("LDL", "STL"),
        shared=compiled.metadata.shared,
        resident=part.resident,
        loads_in_loop=inside,
        tensor=tensor[0] if tensor else "none",
        barriers=count("BAR"),
        instructions=sum(sass.values()),
        failures="; ".join(failures),
    )


def source_digest() -> str:
    """Of everything that decides what is compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(cases: list[Case], jobs: int, output: Path | None = None) -> list[Row]:
    """Audit the cases on ``jobs`` processes, with progress, reusing finished rows from ``output``."""
    digest = source_digest()
    done: dict[str, Row] = {}
    if output is not None and output.exists():
        for line in output.read_text().splitlines():
            entry = json.loads(line)
            if entry["digest"] == digest:
                done[entry["case"]] = Row(**entry["row"])
    keys = {case: f"{triton.__version__} {json.dumps(asdict(case))}" for case in cases}
    missing = [case for case in cases if keys[case] not in done]
    # Threads of a forked parent are not copied: start each worker afresh.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(audit, case): case for case in missing}
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            case, row = futures[future], future.result()
            done[keys[case]] = row
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                with output.open("a") as file:
                    file.write(json.dumps({"digest": digest, "case": keys[case], "row": asdict(row)}) + "\n")
            if sys.stderr.isatty():
                print(f"\r{n}/{len(missing)} kernels compiled", end="", file=sys.stderr, flush=True)
    if missing and sys.stderr.isatty():
        print(file=sys.stderr)
    return [done[keys[case]] for case in cases]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    columns = [f.name for f in fields(Row) if f.name not in ("failures", "refused")]
    lines = [columns + ["result"]]
    for row in rows:
        if row.refused:
            lines.append(
                [str(getattr(row, c)) for c in columns[:5]] + ["-"] * (len(columns) - 5) + ["refused by the plan"]
            )
        else:
            lines.append(
                [str(getattr(row, c)) for c in columns] + [f"FAILED: {row.failures}" if row.failures else "ok"]
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join([cell.ljust(w) for cell, w in zip(line, widths, strict=False)] + [line[-1]]) for line in lines
    )


def table_cases(cells: list[str], dtypes: list[str], hidden: list[int], archs: list[int]) -> list[Case]:
    return [
        Case(cell, backward, dtype, h, arch)
        for arch in archs
        for cell in cells
        for backward in (False, True)
        for dtype in dtypes
        for h in hidden
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="persistrnn audit", description="Prove from compiled code that the kernels keep W_hh on chip."
    )
    parser.add_argument("--cells", nargs="+", choices=sorted(CELLS), default=sorted(CELLS, reverse=True))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=list(DTYPES))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN), help="hidden sizes, each at least 1")
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(DEVICE_OF_ARCH), default=sorted(DEVICE_OF_ARCH))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--output", type=Path, help="JSON lines file that keeps finished rows, to resume")
    arguments = parser.parse_args()
    for name, values in (("--hidden", arguments.hidden), ("--jobs", [arguments.jobs])):
        if min(values) < 1:
            parser.error(f"{name} must be at least 1, got {min(values)}")
    cases = table_cases(arguments.cells, arguments.dtypes, arguments.hidden, arguments.arch)
    rows = run(cases, arguments.jobs, arguments.output)
    print(table(rows))
    failed = [row for row in rows if row.failures]
    refused = [row for row in rows if row.refused]
    print(f"{len(rows) - len(failed) - len(refused)} ok, {len(refused)} refused by the plan, {len(failed)} failed")
    return 1 if failed else 0
