"""Proof from compiled code, without a GPU: where the scan kernels keep W_hh, and what they cost.

Each row compiles one kernel as the plan would launch it and reads TTGIR, PTX and SASS:

* homes: every tile of W_hh is followed through TTGIR from its load to the product that uses it. It is in registers if
  what the product takes was made before the loop over time, in shared memory if it is read from there in the loop, and
  streamed if the load itself is in the loop. The bytes of all three must be those that the plan says;
* spills: local-memory loads and stores in SASS;
* shared memory: what the kernel asks for against the device's limit (the compiler does not check it) and against
  the plan's bound;
* tensor instruction: which, wherever the dtype has one;
* the exchange: an acquire load and a release add at gpu scope in PTX where there is more than one slice.

For AMD there is no such disassembly: a row says that the kernel compiles, what it streams, and that it fits.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..cells import CELLS, derived
from ..device.exchange import Exchange, exchange_on, fitting
from ..device.scan import scan_backward, scan_forward
from ..device.staged_scan import staged_backward, staged_forward
from ..launch import options
from ..planner import hardware as devices
from ..planner import plan as planning
from ..planner.pipeline import plan_pipeline
from ..planner.problem import WEIGHTS, Problem

DTYPES = {"fp16": "*fp16", "bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
OF_8_BITS = dict(zip(WEIGHTS, ("*i8", "*u8"), strict=True))
DEVICE_OF_ARCH = {
    "sm_80": "a100",
    "sm_89": "rtx4090",
    "sm_90": "h200",
    "sm_100": "b200",
    "sm_120": "rtx5090",
    "gfx942": "mi300x",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """What to compile: one kernel for one shape on one architecture; layers > 1: of a stack as a pipeline; marks: with
    rows that begin anew or skip a step, gradients to the reset states and from every c; chunked: for a chunk of time,
    with c and the gradients of the states in float32; weight_dtype: as in ``Problem``, of a forward that keeps
    nothing."""

    cell: str
    backward: bool
    dtype: str
    hidden: int
    arch: str
    batch: int = 16
    directions: int = 1
    layers: int = 1
    marks: bool = False
    chunked: bool = False
    weight_dtype: str = ""


@dataclass(frozen=True)
class Homes:
    """Bytes of W_hh per program, by where they are found in the compiled kernel; streamed ones per time step."""

    registers: int
    shared: int
    streamed: int


@dataclass(frozen=True)
class Row:
    """What was found. ``failures`` is empty if the row is green; ``refused`` holds the plan's refusal.

    resident: percent of W_hh that stays on chip; in_registers, in_shared, streamed: bytes per program as found.
    """

    kernel: str
    dtype: str
    H: int
    B: int
    D: int
    arch: str
    triton: str
    slices: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    resident: float = 0.0
    in_registers: int = 0
    in_shared: int = 0
    streamed: int = 0
    tensor: str = ""
    barriers: int = 0
    instructions: int = 0
    failures: str = ""
    refused: str = ""


def planned(case: Case) -> planning.Pass:
    """The pass that the plan has for a case."""
    hardware = devices.named(DEVICE_OF_ARCH[case.arch])
    sizes = case.hidden, case.batch, case.directions
    problem = Problem(CELLS[case.cell], *sizes, case.dtype, hardware, weight_dtype=case.weight_dtype)
    if case.layers > 1:
        found = plan_pipeline(problem, case.layers)
        if found is None:
            raise planning.PlanError(f"{case.layers} layers of hidden_size={case.hidden} do not fit {hardware.name}")
        return found.backward if case.backward else found.forward
    plan = planning.plan_layer(problem)
    return plan.backward if case.backward else plan.forward


def key(case: Case, part: planning.Pass) -> str:
    """Of what is compiled: two cases with the same key are the same kernel."""
    kernels = Path(__file__).parents[1]
    sources = [path.read_bytes() for path in (kernels / "launch.py", *sorted((kernels / "device").glob("*.py")))]
    choice = part.choice.warps, part.choice.blocks
    sources.append(derived(case.cell).source.encode())
    kind = case.cell, case.backward, case.dtype, case.arch, case.marks, case.chunked
    what = *kind, case.weight_dtype, part.tiling, *choice
    return hashlib.sha256(b"".join(sources) + f"{triton.__version__} {what}".encode()).hexdigest()[:16]


# Protocol -> what it is made of, in PTX.
EXCHANGED = {
    "counter": {
        "acquire load": r"ld\.acquire\.gpu",
        "release add": r"(atom|red)\.global\.(gpu\.)?release|(atom|red)\.release\.gpu|(atom|red)[\w.]*\.gpu\.release",
    },
    "flags": {
        "volatile load of words": r"ld\.volatile\.global(\.v[24])?\.b32",
        "relaxed load of words": r"ld\.relaxed\.gpu\.global(\.v[24])?\.b32",
        "relaxed store of words": r"st\.relaxed\.gpu\.global\.b32",
    },
}

UNFENCED = re.compile(r"cp\.async\.wait_group(?:(?!fence\.proxy\.async)[\s\S])*?wgmma\.mma_async")


def exchange_of(case: Case) -> Exchange:
    return fitting(exchange_on(case.arch), case.hidden * (4 if DTYPES[case.dtype] == "*fp32" else 2))


def compile_pass(case: Case, part: planning.Pass) -> Any:
    """The compiled kernel of a pass."""
    cell = CELLS[case.cell]
    pointer = DTYPES[case.dtype]
    states = (pointer,) * cell.states
    signature: dict[str, str | tuple[str, ...]] = {
        "first_job": "i32",
        "T": "i32",
        "B": "i32",
        "sync": ("*i32", "*i32", "*fp32"),
        "states": states,
        "weight": pointer,
        "saved": pointer if cell.saved else "constexpr",
        "step_data": (
            "*u8" if case.marks else "constexpr",
            pointer if cell.params else "constexpr",
            "*u8" if cell.extras else "constexpr",
        ),
    }
    constants: dict[str, Any] = {"tiling": part.tiling, "exchange": exchange_of(case)}
    if not cell.saved:
        constants["saved"] = None
    if case.backward:
        kernel = staged_backward if cell.staged else scan_backward
        outputs = states if case.marks else (pointer,)
        d_states = (("*fp32",) * cell.states if case.chunked else states) * (3 if case.marks else 2)
        signature |= {"d_outputs": outputs, "d_gates": (pointer, pointer), "d_states": d_states}
        constants |= {"cell": derived(cell.name).backward}
    else:
        kernel = staged_forward if cell.staged else scan_forward
        bias = "constexpr" if cell.normalised else pointer
        signature |= {"x_gates": pointer, "gate_data": (bias, "*fp32" if case.weight_dtype else "constexpr")}
        if case.chunked:
            states = pointer, *("*fp32",) * (cell.states - 1)
        signature["states"] = states * 2
        constants |= {"cell": derived(cell.name).forward, "KEEP": not case.weight_dtype}
        if case.weight_dtype:
            signature |= {"weight": OF_8_BITS[case.weight_dtype], "saved": "constexpr"}
            constants["saved"] = None
    source = source_of(kernel, signature, constants)
    return triton.compile(source, target=target_of(case.arch), options=options(part, case.arch))


def source_of(kernel: Any, signature: dict[str, str | tuple[str, ...]], constants: dict[str, Any]) -> ASTSource:
    """What to compile. What is constant, is None in a tuple; every pointer is aligned."""
    names = kernel.arg_names
    values: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in constants.items()}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, kind in signature.items():
        i = names.index(name)
        parts = {(i,): kind} if isinstance(kind, str) else {(i, j): k for j, k in enumerate(kind)}
        aligned |= {at: ALIGNED for at, k in parts.items() if k.startswith("*")}
        values |= {at: None for at, k in parts.items() if k == "constexpr" and len(at) > 1}
    return ASTSource(kernel, {name: signature.get(name, "constexpr") for name in names}, values, aligned)


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_POINTERS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<(\w+)>")
_DOTS = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b")
_LOADS = re.compile(r"\b(tt\.(load|gather|descriptor_load)|ttg\.async_copy_global_to_local|amdg\.buffer_load)\b")
_BITS = {"i8": 8, "f16": 16, "bf16": 16, "f32": 32}


def _number(value: str, products: dict[str, int]) -> int:
    """Of a constant, or of its product with a 1."""
    constant = re.fullmatch(r"%c(\d+)_i32(?:_\d+)?", value)
    return int(constant.group(1)) if constant else products.get(value, 1)


def homes(ttgir: str) -> Homes:
    """Follow ``%weight`` through TTGIR.

    The loop over time is an ``scf.while`` inside another; weights are streamed in an ``scf.for`` of constant trip count
    inside it, or directly.
    """
    pointers = {"%weight"}
    tiles: dict[str, tuple[str, int]] = {}  # value -> (the load it comes from, depth at which it was made)
    bytes_of: dict[str, int] = {}
    found: dict[str, str] = {}
    streamed = 0
    products: dict[str, int] = {}  # by the 1 that the compiler cannot know
    regions: list[tuple[str, int]] = []  # (kind, trips)
    for line in ttgir.splitlines():
        text = re.sub(r" loc\(.*?\)", "", line.strip())
        if text.startswith("}"):
            closed = regions.pop()
            if text.startswith("} do"):
                regions.append(closed)
                continue
        depth = sum(kind == "while" for kind, _ in regions)
        if text.endswith("{"):
            kind = next((k for k in ("while", "for") if f"scf.{k} " in text), "other")
            trips = re.search(r"= %c0_i32(?:_\d+)? to (%[\w.$#-]+)", text)
            regions.append((kind, _number(trips.group(1), products) if trips else 1))
        for argument, initial in re.findall(r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)[,)]", text):
            if initial in pointers:
                pointers.add(argument)
        result, equals, operation = text.partition(" = ")
        if not equals or not result.startswith("%"):
            result, operation = "", text
        if "scf." in operation:
            continue
        if operation.startswith("arith.muli"):
            products[result] = max((_number(value, {}) for value in _VALUE.findall(operation)), default=1)
        result = result.split(":")[0].split(",")[0]
        used = _VALUE.findall(operation)
        if _LOADS.search(operation):
            if not pointers & set(used):
                continue
            shape = _POINTERS.search(operation)
            if shape is None:
                raise ValueError(f"a load of the weights in a form that the audit does not know: {line.strip()}")
            size = math.prod(map(int, shape.group(1).split("x"))) * _BITS[shape.group(2)] // 8
            if depth >= 2:
                turns = [trips for kind, trips in regions if kind == "for"]
                # Asynchronous copies in front of their loop are the first ones of its, whose last turns copy nothing.
                if turns or "async_copy" not in operation:
                    streamed += size * math.prod(turns)
            else:
                tiles[result] = result, depth
                bytes_of[result] = size
        elif _DOTS.search(operation):
            # A pipeline forms its first product before the loop over time: its weights are not at home yet.
            for value in used[:2]:
                if value in tiles and depth >= 2:
                    load, made = tiles[value]
                    memory = operation.count("!ttg.memdesc") and value == used[0]
                    home = "shared" if made >= 2 or memory else "registers"
                    if found.setdefault(load, home) != home:
                        raise ValueError(f"a tile of the weights has two homes: {line.strip()}")
        elif result:
            if pointers & set(used):
                pointers.add(result)
            source = next((value for value in used if value in tiles), None)
            if source is not None:
                # What is selected of a tile (``device/widen``) is where the tile was.
                tiles[result] = tiles[source][0], tiles[source][1] if operation == "arith.select" else depth
    total = {home: sum(bytes_of[load] for load in found if found[load] == home) for home in ("registers", "shared")}
    return Homes(total["registers"], total["shared"], streamed)


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


def row_of(case: Case, **found: Any) -> Row:
    """A row that says what was compiled, and what of it was found."""
    words = case.cell, "backward" if case.backward else "forward", "marks" * case.marks, "chunked" * case.chunked
    kernel = " ".join(filter(None, words)) + (f" of {case.layers} layers" if case.layers > 1 else "")
    dtype = f"{case.dtype} x {case.weight_dtype}" if case.weight_dtype else case.dtype
    shape = dtype, case.hidden, case.batch, case.directions, case.arch
    return Row(kernel, *shape, str(triton.__version__), **found)


def audit(case: Case) -> Row:
    """Compile one case and read it."""
    try:
        part = planned(case)
    except planning.PlanError as error:
        return row_of(case, refused=str(error))
    compiled = compile_pass(case, part)
    where = homes(compiled.asm["ttgir"])
    limit = devices.named(DEVICE_OF_ARCH[case.arch]).shared
    failures = []
    nvidia = case.arch.startswith("sm_")
    expected = Homes(part.in_registers, part.in_shared, part.streamed)
    # Triton's AMD backend leaves what is read before the loop there: more of it is in registers than was asked for.
    resident = where.registers + where.shared == expected.registers + expected.shared
    if where != expected and (nvidia or not resident or where.streamed != expected.streamed):
        failures.append(f"weights are in {where}, the plan says {expected}")
    shared = compiled.metadata.shared
    if shared < where.shared:
        failures.append(f"{shared} bytes of shared memory do not hold the {where.shared} of weights said to be there")
    if shared > limit:
        failures.append(f"{shared} bytes of shared memory, limit {limit}")
    if shared > part.shared and nvidia:
        failures.append(f"{shared} bytes of shared memory, the plan's bound is {part.shared}")
    found: dict[str, Any] = {
        "slices": part.tiling.slices,
        "shared": shared,
        "resident": round(100 * part.shares.resident, 1),
        "in_registers": where.registers,
        "in_shared": where.shared,
        "streamed": where.streamed,
    }
    if nvidia:
        sass_found, sass_failures = read_machine_code(compiled, case, part)
        found |= sass_found
        failures += sass_failures
    return row_of(case, **found, failures="; ".join(failures))


def read_machine_code(compiled: Any, case: Case, part: planning.Pass) -> tuple[dict[str, Any], list[str]]:
    """What PTX and SASS show, and what is wrong in it."""
    registers, sass = disassemble(compiled.asm["cubin"])

    def count(*prefixes: str) -> int:
        return sum(n for instruction, n in sass.items() if instruction.split(".")[0] in prefixes)

    tensor = sorted(i for i in sass if i.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA"))
    spills = count("LDL", "STL")
    failures = []
    if spills:
        failures.append(f"{spills} spill instructions")
    if not tensor and case.dtype != "fp32":
        failures.append("no tensor-core instruction")
    if "cp.async.ca" in compiled.asm["ptx"]:
        failures.append("an asynchronous copy through L1, which may hold what was there before")
    if part.tiling.fenced and UNFENCED.search(compiled.asm["ptx"]):
        failures.append("no proxy fence between asynchronous copies and wgmma")
    if part.tiling.slices > 1:
        for what, pattern in EXCHANGED[exchange_of(case).protocol].items():
            if not re.search(pattern, compiled.asm["ptx"]):
                failures.append(f"no {what}")
    found = {
        "registers": registers,
        "spills": spills,
        "tensor": tensor[0] if tensor else "none",
        "barriers": count("BAR"),
        "instructions": sum(sass.values()),
    }
    return found, failures
