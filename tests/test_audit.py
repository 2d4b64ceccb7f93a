"""The audit: a sample of the compiled kernels is green, and the audit finds what it is there to find.

`python -m persistrnn audit` does the whole table; here is a sample of it that takes a minute or two.
"""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from persistrnn.kernels import audit
from persistrnn.kernels import plan as planning
from persistrnn.kernels.audit import Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.audit

# Every cell and pass, every dtype of each, both architectures, one slice and many, full chunks and ragged ones.
SAMPLE = [
    # cell, backward, dtype, hidden, arch
    Case("lstm", False, "bf16", 64, 90),
    Case("lstm", False, "fp16", 320, 80),
    Case("lstm", False, "bf16", 1024, 90),
    Case("lstm", False, "fp16", 1000, 90),
    Case("lstm", False, "tf32", 768, 90),
    Case("lstm", False, "fp32", 256, 80),
    Case("lstm", True, "fp16", 128, 80),
    Case("lstm", True, "bf16", 640, 80),
    Case("lstm", True, "bf16", 1024, 90),
    Case("lstm", True, "fp16", 200, 90),
    Case("lstm", True, "tf32", 512, 80),
    Case("lstm", True, "fp32", 320, 90),
    Case("gru", False, "fp16", 100, 90),
    Case("gru", False, "bf16", 512, 80),
    Case("gru", False, "fp16", 1024, 90),
    Case("gru", False, "tf32", 64, 80),
    Case("gru", False, "tf32", 512, 80),
    Case("gru", False, "fp32", 768, 90),
    Case("gru", True, "bf16", 64, 80),
    Case("gru", True, "fp16", 640, 80),
    Case("gru", True, "bf16", 1024, 90),
    Case("gru", True, "bf16", 500, 90),
    Case("gru", True, "tf32", 768, 90),
    Case("gru", True, "fp32", 512, 80),
]

SMALL = Case("gru", False, "bf16", 64, 90)  # one slice, and quick to compile
SHARED = Case("gru", False, "bf16", 256, 90)  # many slices


def identity(case: Case) -> str:
    return f"{case.cell}-{'backward' if case.backward else 'forward'}-{case.dtype}-{case.hidden}-sm_{case.arch}"


@pytest.mark.parametrize("case", SAMPLE, ids=identity)
def test_kernel_keeps_its_weights_on_chip(case):
    row = audit.audit(case)
    assert row.failures == ""
    assert row.refused == ""
    assert row.loads_in_loop == 0
    assert row.spills == 0
    assert 0 < row.resident <= row.shared or row.slices == 1
    if case.dtype == "fp32":
        assert row.tensor == "none", "full float32 has no tensor instruction"
    else:
        assert row.tensor.split(".")[0] in ("HMMA", "HGMMA")


def test_sample_is_spread():
    assert {(c.cell, c.backward, c.dtype) for c in SAMPLE} == {
        (cell, backward, dtype) for cell in ("lstm", "gru") for backward in (False, True) for dtype in audit.DTYPES
    }
    assert {c.arch for c in SAMPLE} == set(audit.DEVICE_OF_ARCH)


# ---- following the weights through TTGIR ---------------------------------------------------------------------------

# What Triton 3.6 and 3.9 print, shortened: %body is inside the loop over time.
TTGIR = """
#loc = loc("scan.py":1:0)
module attributes {{"ttg.num-warps" = 4 : i32}} {{
  tt.func public @scan(%x: !tt.ptr<f16>, %weight: !tt.ptr<f16> {{tt.divisibility = 16 : i32}} loc(#loc), %T: i32) {{
    %zero = arith.constant 0 : i32 loc(#loc)
    %one = arith.constant 1 : i32 loc(#loc)
    %index = tt.make_range {{end = 16 : i32, start = 0 : i32}} : tensor<16xi32, #blocked> loc(#loc)
    %corner = tt.addptr %weight, %zero : !tt.ptr<f16>, i32 loc(#loc)
    %splat = tt.splat %corner : !tt.ptr<f16> -> tensor<16x!tt.ptr<f16>, #blocked> loc(#loc)
    %pointers = tt.addptr %splat, %index : tensor<16x!tt.ptr<f16>, #blocked>, tensor<16xi32, #blocked> loc(#loc)
    %others = tt.splat %x : !tt.ptr<f16> -> tensor<16x!tt.ptr<f16>, #blocked> loc(#loc)
    {before}
    %results:2 = scf.for %t = %zero to %T step %one iter_args(%acc = %index, %moving = {carried}) -> ({types})  : i32 {{
      {body}
      %loaded = tt.load %others : tensor<16x!tt.ptr<f16>, #blocked> loc(#loc)
      scf.yield %acc, %moving : {types} loc(#loc)
    }} loc(#loc)
    {after}
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""

LOAD = "%w = tt.load {} : tensor<16x!tt.ptr<f16>, #blocked> loc(#loc)"
ASYNC = "%w = ttg.async_copy_global_to_local {}, %view : tensor<16x!tt.ptr<f16>, #blocked> -> <16xf16> loc(#loc)"


def ttgir(before="", body="", after="", carried="%others"):
    types = "tensor<16xi32, #blocked>, tensor<16x!tt.ptr<f16>, #blocked>"
    return TTGIR.format(before=before, body=body, after=after, carried=carried, types=types)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ttgir(), (0, 0)),
        (ttgir(before=LOAD.format("%pointers")), (1, 0)),
        (ttgir(before=LOAD.format("%others")), (0, 0)),
        (ttgir(after=LOAD.format("%pointers")), (1, 0)),
        (ttgir(before=ASYNC.format("%pointers")), (1, 0)),
        (ttgir(body=LOAD.format("%others")), (0, 0)),
        # through addptr and splat
        (ttgir(body=LOAD.format("%weight")), (0, 1)),
        (ttgir(body=LOAD.format("%corner")), (0, 1)),
        (ttgir(body=LOAD.format("%pointers")), (0, 1)),
        (ttgir(body=LOAD.format("%pointers, %mask, %other cacheModifier = cg")), (0, 1)),
        (ttgir(body=ASYNC.format("%pointers")), (0, 1)),
        (ttgir(before=LOAD.format("%pointers"), body=LOAD.format("%pointers")), (1, 1)),
        (ttgir(body=LOAD.format("%pointers") + "\n      " + LOAD.format("%corner")), (0, 2)),
        (
            ttgir(
                body="%near = tt.addptr %pointers, %acc : tensor<16x!tt.ptr<f16>, #blocked>, tensor<16xi32, #blocked>"
                "\n      %cast = ttg.convert_layout %near : tensor<16x!tt.ptr<f16>> -> tensor<16x!tt.ptr<f16>>"
                "\n      " + LOAD.format("%cast")
            ),
            (0, 1),
        ),
        # through an argument that the loop carries
        (ttgir(body=LOAD.format("%moving"), carried="%pointers"), (0, 1)),
        (ttgir(body=LOAD.format("%moving"), carried="%others"), (0, 0)),
        (ttgir(body=LOAD.format("%acc"), carried="%pointers"), (0, 0)),
        # inside what is inside the loop
        (ttgir(body=f"scf.if %c {{\n {LOAD.format('%pointers')}\n }} else {{\n }}"), (0, 1)),
        (ttgir(body=f"scf.for %i = %zero to %T step %one : i32 {{\n {LOAD.format('%pointers')}\n }}"), (0, 1)),
        (ttgir(before=f"scf.if %c {{\n {LOAD.format('%pointers')}\n }}"), (1, 0)),
        # what the weights became is not a pointer to them
        (ttgir(before=LOAD.format("%pointers"), body="%kept = ttg.local_load %w : !ttg.memdesc<16xf16>"), (1, 0)),
    ],
)
def test_weight_loads_are_counted_where_they_are(text, expected):
    assert audit.weight_loads(text) == expected


@triton.jit
def streaming(out, weight, x, T, SIZE: tl.constexpr, OUTSIDE: tl.constexpr):
    """A scan that reads its weights again at every step (or, OUTSIDE, once)."""
    index = tl.arange(0, SIZE)
    pointers = weight + index[:, None] * SIZE + index[None, :]
    kept = tl.load(pointers)
    for job in range(tl.program_id(0), T, tl.num_programs(0)):
        state = tl.load(x + job * SIZE * SIZE + index[:, None] * SIZE + index[None, :])
        for _ in range(T):
            if not OUTSIDE:
                kept = tl.load(pointers, cache_modifier=".cg")
            state = tl.dot(kept, state).to(tl.bfloat16)
        tl.store(out + index[:, None] * SIZE + index[None, :], state)


def compile_streaming(outside: bool):
    signature = {
        "out": "*bf16",
        "weight": "*bf16",
        "x": "*bf16",
        "T": "i32",
        "SIZE": "constexpr",
        "OUTSIDE": "constexpr",
    }
    source = ASTSource(streaming, signature, {(4,): 64, (5,): outside}, {})
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_a_kernel_that_streams_its_weights_is_caught(monkeypatch):
    assert audit.weight_loads(compile_streaming(outside=True).asm["ttgir"]) == (1, 0)
    compiled = compile_streaming(outside=False)
    _, inside = audit.weight_loads(compiled.asm["ttgir"])
    assert inside >= 1
    _, part = audit.compile_case(SMALL)
    monkeypatch.setattr(audit, "compile_case", lambda case: (compiled, part))
    row = audit.audit(SMALL)
    assert row.loads_in_loop == inside
    assert f"{inside} weight loads in the loop" in row.failures


def test_a_kernel_that_never_loads_its_weights_is_caught(monkeypatch):
    """Where the trail is lost, 0 loads in the loop prove nothing."""
    compiled, part = audit.compile_case(SMALL)
    renamed = compiled.asm["ttgir"].replace("%weight", "%mislaid")
    asm = {name: compiled.asm[name] for name in ("ptx", "cubin")} | {"ttgir": renamed}
    monkeypatch.setattr(
        audit, "compile_case", lambda case: (SimpleNamespace(asm=asm, metadata=compiled.metadata), part)
    )
    row = audit.audit(SMALL)
    assert row.loads_in_loop == 0
    assert "0 weight loads in the loop, 0 before it" in row.failures


# ---- the other findings --------------------------------------------------------------------------------------------


def test_real_spills_are_found(monkeypatch):
    """The same kernel with 40 registers per thread (ptxas refuses fewer than 34)."""
    original = audit.options
    assert audit.audit(SMALL).spills == 0
    monkeypatch.setattr(audit, "options", lambda part: original(part) | {"maxnreg": 40})
    row = audit.audit(SMALL)
    assert row.registers <= 40
    assert row.spills > 0
    assert row.failures == f"{row.spills} spill instructions"


def test_spills_are_counted_by_instruction(monkeypatch):
    found = Counter(
        {"LDL.64": 2, "STL": 1, "LDL": 4, "LDG.E.128": 8, "HMMA.16816.F32.BF16": 3, "STS": 5, "BAR.SYNC": 2}
    )
    monkeypatch.setattr(audit, "disassemble", lambda cubin: (99, found))
    row = audit.audit(SMALL)
    assert (row.spills, row.registers, row.barriers, row.instructions) == (7, 99, 2, 25)
    assert row.tensor == "HMMA.16816.F32.BF16"
    assert row.failures == "7 spill instructions"


def test_a_product_off_the_tensor_cores_is_found(monkeypatch):
    monkeypatch.setattr(audit, "disassemble", lambda cubin: (99, Counter({"FFMA": 1000})))
    row = audit.audit(SMALL)
    assert row.tensor == "none"
    assert row.failures == "no tensor-core instruction"
    full = dataclasses.replace(SMALL, dtype="fp32")
    assert audit.audit(full).failures == "", "full float32 needs none"


def test_too_much_shared_memory_is_found(monkeypatch):
    """By the device's limit, which the compiler does not check, and by the plan's bound."""
    compiled, part = audit.compile_case(SMALL)
    used = compiled.metadata.shared
    assert 0 < used <= part.shared
    monkeypatch.setattr(audit, "compile_case", lambda case: (compiled, dataclasses.replace(part, shared=used - 1)))
    row = audit.audit(SMALL)
    assert row.shared == used
    assert row.failures == f"{used} bytes of shared memory, the plan's bound is {used - 1}"

    monkeypatch.setattr(audit, "compile_case", lambda case: (compiled, part))
    small = dataclasses.replace(planning.DEVICES["h200"], shared=used - 1)
    monkeypatch.setitem(planning.DEVICES, "h200", small)
    assert audit.audit(SMALL).failures == f"{used} bytes of shared memory, limit {used - 1}"
    monkeypatch.setitem(planning.DEVICES, "h200", dataclasses.replace(small, shared=used))
    assert audit.audit(SMALL).failures == ""


@pytest.mark.parametrize(
    ("pattern", "replacement", "finding"),
    [("ld.acquire.gpu", "ld.relaxed.gpu", "no acquire load"), (".release", ".relaxed", "no release add")],
)
def test_a_lost_memory_order_is_found(monkeypatch, pattern, replacement, finding):
    compiled, part = audit.compile_case(SHARED)
    assert part.tiling.slices > 1
    asm = {name: compiled.asm[name] for name in ("ttgir", "cubin")}
    asm["ptx"] = compiled.asm["ptx"].replace(pattern, replacement)
    assert asm["ptx"] != compiled.asm["ptx"]
    monkeypatch.setattr(
        audit, "compile_case", lambda case: (SimpleNamespace(asm=asm, metadata=compiled.metadata), part)
    )
    assert audit.audit(SHARED).failures == finding


def test_a_refused_size_is_a_row_that_says_so():
    row = audit.audit(Case("lstm", True, "fp32", 4096, 80))
    assert "hidden_size=4096 in fp32 does not fit on a100" in row.refused
    assert (row.failures, row.slices, row.registers) == ("", 0, 0)
    line = audit.table([row]).splitlines()[-1]
    assert line.endswith("refused by the plan")
    assert line.split()[:5] == ["lstm", "backward", "fp32", "4096", "sm_80"]


def test_table_shows_failures():
    rows = [
        audit.Row("gru forward", "bf16", 64, "sm_90", "3.9.0", failures=text) for text in ("", "7 spill instructions")
    ]
    head, good, bad = audit.table(rows).splitlines()
    assert head.split()[0] == "kernel"
    assert head.split()[-1] == "result"
    assert good.endswith("ok")
    assert bad.endswith("FAILED: 7 spill instructions")


# ---- the command ---------------------------------------------------------------------------------------------------


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "persistrnn", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_command_prints_the_table_and_resumes(tmp_path):
    output = tmp_path / "runs" / "audit.jsonl"
    line = (
        "audit",
        "--cells",
        "gru",
        "--hidden",
        64,
        "--dtypes",
        "bf16",
        "--arch",
        90,
        "--jobs",
        1,
        "--output",
        output,
    )
    first = command(*line, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    head, *rows, total = first.stdout.splitlines()
    assert head.split()[:5] == ["kernel", "dtype", "H", "arch", "triton"]
    assert [row.split()[:5] for row in rows] == [["gru", p, "bf16", "64", "sm_90"] for p in ("forward", "backward")]
    assert all(row.endswith("ok") for row in rows)
    assert total == "2 ok, 0 refused by the plan, 0 failed"
    entries = output.read_text()
    assert len(entries.splitlines()) == 2

    # A second run compiles nothing: it shows the rows of the file, also where they are not what a compiler would say.
    changed = [json.loads(entry) for entry in entries.splitlines()]
    for entry in changed:
        entry["row"]["registers"] = 12_345
    output.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    second = command(*line, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("12345") == 2
    assert len(output.read_text().splitlines()) == 2, "nothing was added"

    # Rows that another source made are not believed, and a failure is the exit status.
    changed[0]["digest"] = "other"
    changed[1]["row"]["failures"] = "7 spill instructions"
    output.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    third = command(*line, cwd=tmp_path)
    assert third.returncode == 1, third.stderr
    assert third.stdout.count("12345") == 1
    assert "FAILED: 7 spill instructions" in third.stdout
    assert third.stdout.splitlines()[-1] == "1 ok, 0 refused by the plan, 1 failed"
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "rnn"], "'rnn' (choose from"),
        (["--dtypes", "fp8"], "'fp8' (choose from"),
        (["--arch", "70"], "70 (choose from"),
        (["--hidden", "many"], "invalid int value: 'many'"),
        (["--hidden", "64", "0"], "--hidden must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--size", "64"], "unrecognized arguments: --size 64"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["persistrnn", *arguments])
    with pytest.raises(SystemExit) as stopped:
        audit.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "usage: persistrnn audit" in err


@pytest.mark.parametrize(("given", "said"), [([], "got nothing"), (["train"], "got 'train'")])
def test_an_unknown_command_is_refused(given, said, tmp_path):
    done = command(*given, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert "COMMAND must be one of: audit" in done.stderr


def test_digest_follows_the_source(monkeypatch, tmp_path):
    """A row of another source is compiled again: so the digest must see every file that decides what is compiled."""
    before = audit.source_digest()
    folder = Path(audit.__file__).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(audit, "__file__", str(tmp_path / "audit.py"))
    assert audit.source_digest() == before
    for name in ("scan", "tiles", "cells", "exchange", "plan", "launch"):
        path = tmp_path / f"{name}.py"
        content = path.read_text()
        path.write_text(content + "\n# changed\n")
        assert audit.source_digest() != before, name
        path.write_text(content)
    assert audit.source_digest() == before


def test_audit_needs_no_gpu():
    code = """
        import torch
        torch.cuda.init = torch.cuda._lazy_init = None  # a call of either would fail
        from persistrnn.kernels import audit
        print(audit.audit(audit.Case("lstm", False, "fp16", 64, 80)).failures or "ok")
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "ok", done.stderr
