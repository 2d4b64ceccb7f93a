"""The audit: a sample of the compiled kernels is green, and the audit finds what it is there to find.

`make audit` does the whole table; here is a sample of it that takes a minute or two.
"""

import dataclasses
import itertools
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import triton
from own_cells import cell_of

from persistrnn.kernels import marks
from persistrnn.kernels.cells import BUILT_IN, CELLS, derived
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.device.marks import gather_before, make_marks
from persistrnn.kernels.device.recompute import BLOCK, activate
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.inspect.audit import Case, Homes
from persistrnn.kernels.planner import hardware

pytestmark = pytest.mark.audit

# Every cell and pass, every dtype of each, all architectures; one slice and many, both splits, several batch tiles,
# every home, full chunks and ragged ones.
SAMPLE = [
    # cell, backward, dtype, hidden, arch, batch, directions
    Case("lstm", False, "bf16", 64, "sm_90", 512),
    Case("lstm", False, "fp16", 320, "sm_80", 16),
    Case("lstm", False, "bf16", 2048, "sm_90", 16),
    Case("lstm", False, "tf32", 1536, "sm_90", 16),
    Case("lstm", False, "fp32", 256, "sm_80", 16),
    Case("lstm", False, "bf16", 4096, "sm_100", 64),
    Case("lstm", True, "fp16", 128, "sm_80", 16),
    Case("lstm", True, "bf16", 640, "sm_80", 64, 2),
    Case("lstm", True, "bf16", 2048, "sm_90", 64),
    Case("lstm", True, "tf32", 1024, "sm_80", 16),
    Case("lstm", True, "tf32", 1024, "sm_90", 1),  # 8 rows of weights would take as many registers as 16
    Case("lstm", True, "fp32", 320, "sm_90", 16),
    Case("gru", False, "bf16", 512, "sm_80", 64),
    Case("gru", False, "fp16", 2816, "sm_90", 32),
    Case("gru", False, "tf32", 512, "sm_100", 16),
    Case("gru", False, "fp32", 768, "sm_90", 16),
    Case("gru", False, "bf16", 512, "gfx942", 16),
    Case("gru", True, "bf16", 64, "sm_80", 16),
    Case("gru", True, "fp16", 640, "sm_80", 16, 2),
    Case("gru", True, "bf16", 2560, "sm_80", 1),
    Case("gru", True, "tf32", 768, "sm_90", 16),
    Case("gru", False, "tf32", 1536, "sm_90", 32),  # so much in shared memory that what is not put there at once spills
    Case("gru", True, "fp32", 512, "sm_80", 16),
    Case("lstm", True, "bf16", 1024, "gfx942", 16),
    # Rows that begin anew or end, gradients of the reset states and of every c: more tiles alive, and no spill.
    Case("lstm", False, "bf16", 1024, "sm_90", 64, marks=True),
    Case("lstm", True, "bf16", 1024, "sm_90", 16, 2, marks=True),
    Case("gru", False, "fp16", 320, "sm_80", 16, 2, marks=True),
    Case("gru", True, "bf16", 512, "sm_100", 64, marks=True),
    # Chunks of time: c and the gradients of the states in float32.
    Case("lstm", False, "bf16", 2048, "sm_90", 64, chunked=True),
    Case("lstm", True, "fp16", 320, "sm_80", 16, 2, chunked=True),
    Case("gru", True, "bf16", 1150, "sm_90", 80, chunked=True),
    # The further cells: the most registers that a plan leaves beside parameters, states and saved tiles; nothing saved.
    Case("peephole", False, "bf16", 1024, "sm_90", 16),
    Case("peephole", True, "bf16", 512, "sm_80", 16),
    Case("slstm", False, "bf16", 512, "sm_90", 16),
    Case("slstm", True, "bf16", 512, "sm_90", 64, marks=True),
    Case("rnn_tanh", True, "bf16", 1024, "sm_90", 16),
    Case("mgu", True, "bf16", 512, "sm_80", 16),
    Case("janet", False, "bf16", 512, "sm_80", 16),
    Case("rnn_relu", True, "fp16", 512, "sm_100", 16, marks=True),
    Case("coupled", True, "bf16", 256, "sm_90", 16),
    Case("slstm", True, "bf16", 512, "sm_100", 16),
    # What a recipe makes of a cell.
    Case(cell_of("lstm_noise").name, True, "bf16", 256, "sm_80", 16),
]


def test_no_cell_is_left_out():
    assert {case.cell for case in SAMPLE} >= set(BUILT_IN)


SMALL = Case("gru", False, "bf16", 32, "sm_90")  # one slice, and quick to compile
SHARED = Case("gru", False, "bf16", 256, "sm_90")  # many slices


def identity(case: Case) -> str:
    name = f"{case.cell}-{'backward' if case.backward else 'forward'}-{case.dtype}-{case.hidden}-B{case.batch}"
    return f"{name}-D{case.directions}-{case.arch}{'-marks' * case.marks}{'-chunked' * case.chunked}"


@pytest.mark.parametrize("case", SAMPLE, ids=identity)
def test_kernel_keeps_its_weights_where_the_plan_says(case):
    row, part = audit.audit(case), audit.planned(case)
    assert (row.failures, row.refused, row.spills) == ("", "", 0)
    assert row.streamed == part.streamed
    assert row.in_registers + row.in_shared == part.in_registers + part.in_shared
    assert row.in_registers + row.in_shared + row.streamed > 0
    assert 0 < row.shared <= hardware.named(audit.DEVICE_OF_ARCH[case.arch]).shared
    if case.arch.startswith("gfx"):
        return
    assert row.in_registers == part.in_registers
    if case.dtype == "fp32":
        assert row.tensor == "none", "full float32 has no tensor instruction"
    else:
        assert row.tensor.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA")


# ---- following the weights through TTGIR ---------------------------------------------------------------------------

# What Triton 3.6 and 3.9 print, shortened: %turn is the loop around the tiles in shared memory, %step that over time.
TTGIR = """
#loc = loc("scan.py":1:0)
module attributes {{"ttg.num-warps" = 4 : i32}} {{
  tt.func public @scan(%x: !tt.ptr<f16>, %weight: !tt.ptr<f16> {{tt.divisibility = 16 : i32}} loc(#loc), %T: i32) {{
    %zero = arith.constant 0 : i32 loc(#loc)
    %others = tt.splat %x : !tt.ptr<f16> -> tensor<16x32x!tt.ptr<f16>, #blocked> loc(#loc)
    %corner = tt.addptr %weight, %zero : !tt.ptr<f16>, i32 loc(#loc)
    %splat = tt.splat %corner : !tt.ptr<f16> -> tensor<16x32x!tt.ptr<f16>, #blocked> loc(#loc)
    %pointers = tt.addptr %splat, %zero : tensor<16x32x!tt.ptr<f16>, #blocked>, tensor<16x32xi32, #blocked> loc(#loc)
    {before}
    %turn:2 = scf.while (%a = %zero, %moving = {carried}) : (i32, tensor<16x32xf16, #blocked>) -> (i32) {{
      %more = arith.cmpi slt, %a, %once : i32 loc(#loc)
      scf.condition(%more) %a, %moving : i32, tensor<16x32xf16, #blocked> loc(#loc)
    }} do {{
    ^bb0(%a: i32 loc("turn"), %moving: tensor<16x32xf16, #blocked> loc("ahead")):
      {between}
      %step = scf.while (%b = %zero) : (i32) -> i32 {{
        scf.condition(%more) %b : i32 loc(#loc)
      }} do {{
      ^bb0(%b: i32 loc("step")):
        {body}
        scf.yield %b : i32 loc(#loc)
      }} loc(#loc)
      scf.yield %a, %moving : i32, tensor<16x32xf16, #blocked> loc(#loc)
    }} loc(#loc)
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""

TILE = 16 * 32 * 2  # bytes
LOAD = "%w{n} = tt.load {p} : tensor<16x32x!tt.ptr<f16>, #blocked> loc(#loc)\n"
ALLOC = "%s{n} = ttg.local_alloc %w{n} : (tensor<16x32xf16, #blocked>) -> !ttg.memdesc<16x32xf16, #shared> loc(#loc)\n"
READ = "%d{n} = ttg.local_load %s{n} : !ttg.memdesc<16x32xf16, #shared> -> tensor<16x32xf16, #dot> loc(#loc)\n"
CONVERT = "%d{n} = ttg.convert_layout %w{n} : tensor<16x32xf16, #blocked> -> tensor<16x32xf16, #dot> loc(#loc)\n"
DOT = (
    "%r{n} = tt.dot %d{n}, %h, %acc : tensor<16x32xf16, #dot> * tensor<32x8xf16, #dot> -> tensor<16x8xf32> loc(#loc)\n"
)
IN_SHARED = "!ttg.memdesc<16x32xf16> * tensor<32x8xf16>\n"
FOR = "%o{n} = scf.for %i = %c0_i32 to %c{trips}_i32 step %c1_i32 iter_args(%acc = %z) -> (f32) : i32 {{\n{inside}}}\n"


def ttgir(before="", between="", body="", carried="%others"):
    return TTGIR.format(before=before, between=between, body=body, carried=carried)


def op(*templates: str, n: int = 1, p: str = "%pointers") -> str:
    return "".join(template.format(n=n, p=p) for template in templates)


def loop(inside: str, trips: int, n: int = 1) -> str:
    return FOR.format(n=n, trips=trips, inside=inside)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ttgir(), Homes(0, 0, 0)),
        # made before the loop over time, used in it
        (ttgir(before=op(LOAD, ALLOC, READ), body=op(DOT)), Homes(TILE, 0, 0)),
        (ttgir(before=op(LOAD, CONVERT), body=op(DOT)), Homes(TILE, 0, 0)),
        (ttgir(between=op(LOAD, ALLOC, READ), body=op(DOT)), Homes(TILE, 0, 0)),
        # read from shared memory in each step
        (ttgir(between=op(LOAD, ALLOC), body=op(READ, DOT)), Homes(0, TILE, 0)),
        (ttgir(before=op(LOAD, ALLOC), body=loop(op(READ, DOT), 1)), Homes(0, TILE, 0)),
        # a warp-group product reads it itself, as does that of the fifth generation, which has no result
        (
            ttgir(before=op(LOAD, ALLOC), body=f"%r = ttng.warp_group_dot %s1, %h, %acc : {IN_SHARED}"),
            Homes(0, TILE, 0),
        ),
        (ttgir(before=op(LOAD, ALLOC), body=f"ttng.tc_gen5_mma %s1, %h, %acc[], %t : {IN_SHARED}"), Homes(0, TILE, 0)),
        # loaded in each step, once or more often
        (ttgir(body=op(LOAD, ALLOC, READ, DOT)), Homes(0, 0, TILE)),
        (ttgir(body=loop(op(LOAD, ALLOC, READ, DOT), 7)), Homes(0, 0, 7 * TILE)),
        (ttgir(body=loop(loop(op(LOAD), 3), 5)), Homes(0, 0, 15 * TILE)),
        (ttgir(body=op(LOAD, p="%splat")), Homes(0, 0, TILE)),
        # one ahead: the first one, loaded before, is no resident tile
        (ttgir(between=op(LOAD), body=loop(op(LOAD, n=2), 4)), Homes(0, 0, 4 * TILE)),
        # others' loads do not count
        (ttgir(body=op(LOAD, p="%others")), Homes(0, 0, 0)),
        (ttgir(before=op(LOAD, ALLOC, READ, p="%others"), body=op(DOT)), Homes(0, 0, 0)),
        # all at once
        (
            ttgir(
                before=op(LOAD, ALLOC, READ),
                between=op(LOAD, ALLOC, n=2),
                body=op(DOT) + loop(op(READ, DOT, n=2), 1) + loop(op(LOAD, n=3), 2),
            ),
            Homes(TILE, TILE, 2 * TILE),
        ),
    ],
)
def test_weights_are_found_where_they_are(text, expected):
    assert audit.homes(text) == expected


def test_two_homes_of_one_tile_are_an_error():
    text = ttgir(before=op(LOAD, ALLOC, READ), body=op(DOT) + op(READ, DOT))
    with pytest.raises(ValueError, match="two homes"):
        audit.homes(text)


def test_a_load_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="does not know"):
        audit.homes(ttgir(body="%w = tt.load %corner : !tt.ptr<f16> loc(#loc)\n"))


@pytest.mark.parametrize("field", ["in_registers", "in_shared", "streamed"])
def test_a_plan_that_says_otherwise_is_caught(monkeypatch, field):
    part = audit.planned(SHARED)
    lie = dataclasses.replace(part, **{field: getattr(part, field) + 4096})
    monkeypatch.setattr(audit, "planned", lambda case: lie)
    failures = audit.audit(SHARED).failures
    assert failures.startswith("weights are in Homes(")
    assert f"the plan says {Homes(lie.in_registers, lie.in_shared, lie.streamed)}" in failures


def test_a_kernel_that_streams_what_the_plan_keeps_is_caught(monkeypatch):
    """The kernel of another choice, really compiled, beside the plan's numbers."""
    part = audit.planned(SHARED)
    t = dataclasses.replace(
        part.tiling, k_blocks=(), in_registers=0, bursts=(), stream_start=0, streamed_k_block=128, streamed=2
    )
    streaming = audit.compile_pass(SHARED, dataclasses.replace(part, tiling=t))
    assert audit.homes(streaming.asm["ttgir"]) == Homes(0, 0, part.tiling.m * 256 * 2)
    monkeypatch.setattr(audit, "compile_pass", lambda case, part: streaming)
    assert "weights are in Homes(registers=0, shared=0" in audit.audit(SHARED).failures


def test_a_kernel_whose_weights_are_lost_is_caught(monkeypatch):
    """Where the trail is lost, nothing found proves nothing."""
    compiled = audit.compile_pass(SMALL, audit.planned(SMALL))
    asm = dict(compiled.asm) | {"ttgir": compiled.asm["ttgir"].replace("%weight", "%mislaid")}
    replaced = SimpleNamespace(asm=asm, metadata=compiled.metadata)
    monkeypatch.setattr(audit, "compile_pass", lambda case, part: replaced)
    assert "weights are in Homes(registers=0, shared=0, streamed=0)" in audit.audit(SMALL).failures


# ---- the other findings --------------------------------------------------------------------------------------------


def test_real_spills_are_found(monkeypatch):
    """The same kernel with 40 registers per thread (ptxas refuses fewer than 34)."""
    original = audit.options
    assert audit.audit(SMALL).spills == 0
    monkeypatch.setattr(audit, "options", lambda part, arch: original(part, arch) | {"maxnreg": 40})
    row = audit.audit(SMALL)
    assert row.registers <= 40
    assert row.spills > 0
    assert row.failures == f"{row.spills} spill instructions"


def test_instructions_are_counted_by_name(monkeypatch):
    found = Counter(
        {"LDL.64": 2, "STL": 1, "LDL": 4, "LDG.E.128": 8, "HMMA.16816.F32.BF16": 3, "STS": 5, "BAR.SYNC": 2}
    )
    monkeypatch.setattr(audit, "disassemble", lambda cubin: (99, found))
    row = audit.audit(SMALL)
    assert (row.spills, row.registers, row.barriers, row.instructions) == (7, 99, 2, 25)
    assert row.tensor == "HMMA.16816.F32.BF16"
    assert row.failures == "7 spill instructions"
    monkeypatch.setattr(audit, "disassemble", lambda cubin: (99, Counter({"FFMA": 1000})))
    assert audit.audit(SMALL).failures == "no tensor-core instruction"
    full = dataclasses.replace(SMALL, dtype="fp32")
    assert audit.audit(full).failures == "", "full float32 needs none"


def test_too_much_shared_memory_is_found(monkeypatch):
    """By the device's limit, which the compiler does not check, and by the plan's bound."""
    part = audit.planned(SMALL)
    compiled = audit.compile_pass(SMALL, part)
    used = compiled.metadata.shared
    assert 0 < used <= part.shared
    monkeypatch.setattr(audit, "planned", lambda case: dataclasses.replace(part, shared=used - 1))
    row = audit.audit(SMALL)
    assert row.shared == used
    assert row.failures == f"{used} bytes of shared memory, the plan's bound is {used - 1}"

    monkeypatch.setattr(audit, "planned", lambda case: part)
    small = dataclasses.replace(hardware.DEVICES["h200"], shared=used - 1)
    monkeypatch.setattr(audit.devices, "named", lambda name: small)
    assert audit.audit(SMALL).failures == f"{used} bytes of shared memory, limit {used - 1}"
    monkeypatch.setattr(audit.devices, "named", lambda name: dataclasses.replace(small, shared=used))
    assert audit.audit(SMALL).failures == ""


@pytest.mark.parametrize(
    ("protocol", "pattern", "replacement", "finding"),
    [
        ("counter", "ld.acquire.gpu", "ld.relaxed.gpu", "no acquire load"),
        ("counter", ".release", ".relaxed", "no release add"),
        ("flags", "ld.volatile", "ld", "no volatile load of words"),
        ("flags", "st.relaxed.gpu", "st", "no relaxed store of words"),
        ("flags", "ld.relaxed.gpu", "ld", "no relaxed load of words"),
    ],
)
def test_a_lost_memory_order_is_found(monkeypatch, protocol, pattern, replacement, finding):
    monkeypatch.setattr(audit, "exchange_on", lambda arch: Exchange(protocol))
    part = audit.planned(SHARED)
    compiled = audit.compile_pass(SHARED, part)
    assert part.tiling.slices > 1
    asm = {name: compiled.asm[name] for name in ("ttgir", "cubin")}
    asm["ptx"] = compiled.asm["ptx"].replace(pattern, replacement)
    assert asm["ptx"] != compiled.asm["ptx"]
    replaced = SimpleNamespace(asm=asm, metadata=compiled.metadata)
    monkeypatch.setattr(audit, "compile_pass", lambda case, part: replaced)
    assert audit.audit(SHARED).failures == finding


def test_a_lost_proxy_fence_is_found(monkeypatch):
    wide = Case("lstm", False, "bf16", 4096, "sm_90", 128)
    part = audit.planned(wide)
    compiled = audit.compile_pass(wide, part)
    assert part.tiling.fenced
    assert audit.audit(wide).failures == ""
    asm = {name: compiled.asm[name] for name in ("ttgir", "cubin")}
    asm["ptx"] = compiled.asm["ptx"].replace("fence.proxy.async", "// fence")
    monkeypatch.setattr(audit, "compile_pass", lambda case, part: SimpleNamespace(asm=asm, metadata=compiled.metadata))
    assert audit.audit(wide).failures == "no proxy fence between asynchronous copies and wgmma"


def test_a_refused_size_is_a_row_that_says_so():
    row = audit.audit(Case("lstm", True, "fp32", 40_000, "sm_80"))
    assert "hidden_size=40000" in row.refused
    assert (row.failures, row.slices, row.registers) == ("", 0, 0)


def test_key_follows_what_is_compiled(monkeypatch, tmp_path):
    """A finished row is not compiled again while its key is the same: so the key must see all that decides."""
    part = audit.planned(SHARED)
    before = audit.key(SHARED, part)
    assert audit.key(dataclasses.replace(SHARED, batch=12), part) == before, "the batch is no part of a kernel"
    other_kernels = {"cell": "lstm"}, {"backward": True}, {"dtype": "fp16"}, {"arch": "sm_80"}, {"chunked": True}
    for changed in other_kernels:
        assert audit.key(dataclasses.replace(SHARED, **changed), part) != before
    other = dataclasses.replace(part, choice=dataclasses.replace(part.choice, warps=2))
    assert audit.key(SHARED, other) != before
    other = dataclasses.replace(part, tiling=dataclasses.replace(part.tiling, subtiles=2))
    assert audit.key(SHARED, other) != before
    folder = audit.Path(audit.__file__).parents[1]
    shutil.copytree(folder, tmp_path / "kernels")
    monkeypatch.setattr(audit, "__file__", str(tmp_path / "kernels" / "inspect" / "audit.py"))
    assert audit.key(SHARED, part) == before
    jitted = "scan", "loads", "product", "tiles", "program", "tile_tuples", "marks", "pointwise", "exchange"
    for name in (*jitted, "../launch"):
        path = tmp_path / "kernels" / "device" / f"{name}.py"
        content = path.read_text()
        path.write_text(content + "\n# changed\n")
        assert audit.key(SHARED, part) != before, name
        path.write_text(content)
    assert audit.key(SHARED, part) == before


ARCHITECTURES = itertools.cycle(("sm_80", "sm_90", "sm_100", "gfx942"))


@pytest.mark.parametrize(("name", "arch"), [*zip(BUILT_IN, ARCHITECTURES, strict=False)])
def test_gates_are_formed_again_without_a_spill(name, arch):
    cell = CELLS[name]
    signature = {"x_gates": "*bf16", "r_gates": "*fp32", "bias": "*bf16", "saved": "*bf16", "T": "i32", "B": "i32"}
    signature |= {"states": ("*bf16",) * cell.states}
    signature |= {"step_data": ("constexpr", "*bf16" if cell.params else "constexpr", "constexpr")}
    constants = {"cell": derived(name).forward, "of": cell, "D": 2, "H": 1000, "heads": 1, "interpreted": False}
    source = audit.source_of(activate, signature, constants | {"BLOCK": BLOCK})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=audit.target_of(arch), options=options)
    assert compiled.metadata.shared == 0, "elementwise"
    if arch != "gfx942":
        registers, sass = audit.disassemble(compiled.asm["cubin"])
        assert registers < 128
        assert not [name for name in sass if name.split(".")[0] in ("LDL", "STL")]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_kernels_of_marks(arch):
    """With all that cuts a batch, and with lengths alone: no spill."""
    sizes = dict.fromkeys(("T", "B", "stride_t", "stride_b", "reset_t", "reset_b"), "i32")
    found = dict.fromkeys(("marks", "runs"), "*u8") | {"out_of_range": "*i32"}
    block = {"BLOCK": marks.BLOCK}
    lengths = found | sizes | {"lengths": "*i64"}
    states = {"states": "*bf16", "marks": "*u8", "found": "*bf16", "T": "i32", "B": "i32"}
    for kernel, signature, constants in (
        (make_marks, lengths, {"active": None, "resets": None, "D": 1}),
        (make_marks, lengths | {"active": "*u8", "resets": "*u8"}, {"D": 2}),
        (gather_before, states, {"D": 2, "heads": 1, "H": 1000}),
    ):
        source = audit.source_of(kernel, signature, constants | block)
        compiled = triton.compile(source, target=audit.target_of(arch), options={"enable_fp_fusion": True})
        if arch != "gfx942":
            _, sass = audit.disassemble(compiled.asm["cubin"])
            assert not [name for name in sass if name.split(".")[0] in ("LDL", "STL")]


@pytest.mark.parametrize(
    ("case", "barriers"),
    [
        (Case("lstm", False, "bf16", 256, "sm_90", 16), 2),
        (Case("gru", False, "fp16", 512, "sm_90", 1), 2),  # both packs of gates at once
        (Case("gru", False, "bf16", 512, "sm_90", 64), 2),
        (Case("lstm", True, "fp16", 256, "sm_80", 1), 2),
        (Case("gru", True, "bf16", 512, "sm_90", 16), 3),
        (Case("lstm", False, "tf32", 512, "sm_80", 16), 3),
        (Case("lstm", True, "bf16", 1024, "sm_90", 64), 6),
    ],
    ids=str,
)
def test_what_the_slices_hand_over_passes_no_shared_memory(case, barriers):
    """The moving operand is loaded as the tensor core takes it, and a thread stores what it holds: of a step's barriers
    one is for each announcement and one for each sum over the parts of K. (Each batch tile has its own.)"""
    part = audit.planned(case)
    assert part.tiling.splits > 1
    compiled = audit.compile_pass(case, part)
    loop = compiled.asm["ttgir"].split("scf.while")[2]
    assert "tt.dot" in loop
    assert "local_alloc" not in loop
    code = compiled.asm["ptx"]
    step = code[code.index("ld.acquire.gpu") : code.rindex("red.release.gpu")]
    assert step.count("bar.sync") <= barriers
