"""Weights read per step and launches of any scan in Triton: a stand-in of which both are known; the committed table."""

from pathlib import Path

import counted
import counted_rivals
import pytest
import torch
import triton
import triton.language as tl

from bench.race import arms

pytestmark = pytest.mark.emulator
PAGE = Path(__file__).resolve().parents[2] / "bench" / "README.md"


@triton.autotune([triton.Config({"BLOCK_B": rows}) for rows in (4, 16, 8)], key=["H"])
@triton.jit
def _scan(w_ptr, y_ptr, T, H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Each program reads W, H x H, once for each of T steps."""
    at = tl.arange(0, H)
    total = tl.zeros([H], tl.float32)
    for t in range(T):
        total += tl.sum(tl.load(w_ptr + t * 0 + at[:, None] * H + at[None, :], volatile=True).to(tl.float32), 0)
    tl.store(y_ptr + tl.program_id(0) * H + at, total)


class StandIn(torch.autograd.Function):
    """A launch for each step; backward one for all. W is of [H, H] in bfloat16, and no batch is above 64."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.shape = x.shape
        ctx.save_for_backward(weight)
        for _ in range(len(x)):
            StandIn.launch(weight, x.shape[1], 1)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        StandIn.launch(ctx.saved_tensors[0], ctx.shape[1], ctx.shape[0])
        return dy * 2, None

    @staticmethod
    def launch(weight, batch, steps):
        H = len(weight)
        _scan[lambda meta: (triton.cdiv(batch, meta["BLOCK_B"]),)](
            weight, torch.empty(64, H), steps, H=H, enable_fp_fusion=True
        )


def test_weights_and_launches_are_those_of_a_step(monkeypatch):
    def stand_in(case, parameters, device):
        weight = torch.zeros(case.hidden, case.hidden, dtype=torch.bfloat16)
        return lambda x: StandIn.apply(x.requires_grad_(), weight)

    monkeypatch.setitem(counted_rivals.FORWARDS, "json", stand_in)  # of a library that is there
    row = counted_rivals.count("json", "gru", "bf16", 32, 40)
    programs, weight = 3, 32 * 32 * 2  # of 16 rows: the most rows that autotuning may choose
    assert row.skipped == ""
    assert (row.forward_read, row.forward_launches) == (programs * weight, "1 per step")
    assert (row.backward_read, row.backward_launches) == (programs * weight, "1")
    assert row.weight == 3 * weight


@triton.jit
def _accumulate(x_ptr, y_ptr, INSTRUCTION: tl.constexpr):
    at = tl.arange(0, 512)
    x = tl.load(x_ptr + at)
    tl.atomic_add(y_ptr + at, tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, is_pure=True, pack=1))


@pytest.mark.parametrize(("instruction", "function"), [("tanh", torch.tanh), ("rcp", torch.reciprocal)])
def test_what_only_other_scans_use(emulated, instruction, function):
    """And an atomic of a vector is one of each element."""
    session = emulated("sm_90")
    x, y = torch.randn(512), torch.randn(512)
    expected = y + function(x)
    _accumulate[(1,)](x, y, f"{instruction}.approx.f32 $0, $1;", enable_fp_fusion=True)
    (code,) = [report.kernel.code for report in session.reports]
    assert any(i.name == "atom" and "v4" in i.modifiers for i in code)
    torch.testing.assert_close(y, expected)


@triton.jit
def _widen(x_ptr, y_ptr):
    at = tl.arange(0, 32)
    text: tl.constexpr = "{ .reg .b64 w; cvt.s64.s32 w, $1; add.s64 w, w, 0x700000000; cvt.s64.s32 $0, w; }"
    y = tl.inline_asm_elementwise(text, "=l,r", [tl.load(x_ptr + at)], tl.int64, is_pure=True, pack=1)
    tl.store(y_ptr + at, y)


def test_a_conversion_takes_the_lower_bits(emulated):
    emulated("sm_80")
    x, y = torch.arange(-16, 16, dtype=torch.int32), torch.zeros(32, dtype=torch.int64)
    _widen[(1,)](x, y, enable_fp_fusion=True)
    assert torch.equal(x.long(), y)


def test_ours_are_those_of_a_fresh_run():
    kept = {tuple(map(row.get, ("library", "cell", "H"))): row for row in counted.read(counted_rivals.RESULTS)}
    kept = kept["persistrnn", "gru", "256"]
    if triton.__version__ != kept["triton"]:
        pytest.skip(f"the file is of another Triton than {triton.__version__}")
    row = counted_rivals.count("persistrnn", "gru", "bf16", 256, 16)
    assert (row.forward_read, row.forward_launches, row.backward_read, row.backward_launches) == (0, "1", 0, "1")
    assert {name: str(value) for name, value in vars(row).items()} == kept


def test_why_nothing_was_executed(monkeypatch):
    monkeypatch.setitem(counted_rivals.FORWARDS, "json", counted_rivals.flag_gems)
    assert counted_rivals.count("json", "lstm", "bf16", 256, 16).skipped == "FlagGems has no LSTM and no GRU"
    assert counted_rivals.count("nobodys", "lstm", "bf16", 256, 16).skipped == "nobodys is not installed"
    with pytest.raises(arms.Skip, match="XMA has no LSTM"):
        counted_rivals.xma(arms.Case("", "", "lstm", 8, 8, 1, False, 1, 1, "fp32", "training"), {}, None)


def test_rows_of_what_is_not_installed_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(counted_rivals, "RESULTS", tmp_path / "rivals.csv")
    cases = [("nobodys", "lstm", "bf16", 256, 16), ("others", "gru", "bf16", 8, 1)]
    monkeypatch.setattr(counted_rivals, "CASES", cases)
    row = dict.fromkeys(vars(counted_rivals.count(*cases[0])), "0")
    row |= {"library": "nobodys", "version": "1.2", "cell": "lstm", "dtype": "bf16", "H": "256", "B": "16"}
    counted.write([row], counted_rivals.RESULTS)
    counted_rivals.main()
    assert counted.read(counted_rivals.RESULTS)[0] == row
    assert counted.read(counted_rivals.RESULTS)[1]["skipped"] == "others is not installed"


def test_the_page_is_made_of_the_file():
    rows = counted.read(counted_rivals.RESULTS)
    assert [(row["library"], row["cell"], row["dtype"], int(row["H"]), int(row["B"])) for row in rows] == (
        counted_rivals.CASES
    )
    assert counted.table(rows) in PAGE.read_text(), "audit --run prints it"
