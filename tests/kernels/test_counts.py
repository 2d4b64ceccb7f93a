"""What the compiled kernels do per step: the file is what a fresh run counts, and the page is made of the file."""

from dataclasses import asdict
from pathlib import Path

import counted
import pytest
import triton
from emulator.ptx import Kernel

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import audit_command
from persistrnn.kernels.inspect.audit import Case, compile_pass, planned
from persistrnn.kernels.planner.tiling import reduction

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [("lstm", "bf16", 256, 16), ("gru", "tf32", 512, 16)], ids=str)
def test_counts_are_those_of_a_fresh_run(shape):
    if triton.__version__ not in {row["triton"] for row in counted.read()}:
        pytest.skip(f"the file is of another Triton than {triton.__version__}")
    kept = {(r["kernel"], r["dtype"], int(r["H"]), int(r["B"])): r for r in counted.read()}
    for row, case, executed in counted.count(*shape):
        assert {name: str(value) for name, value in asdict(row).items()} == kept[row.kernel, row.dtype, row.H, row.B]
        read = compile_pass(case, planned(case))
        assert Kernel(read.asm["ptx"], read.metadata.shared).code == executed.code, "the audit read another kernel"


def test_the_page_is_made_of_the_file():
    page = (ROOT / "bench" / "README.md").read_text()
    assert len(counted.read()) == 2 * len(counted.SHAPES)
    assert counted.table([row for row in counted.read() if row["B"] == "16"]) in page, (
        "persistrnn audit --run prints it"
    )
    # None of these sizes streams: executed as read from the code.
    assert {(row["executed_weights"], row["audit_streamed"]) for row in counted.read()} == {("0", "0")}


@pytest.mark.parametrize("row", [r for r in counted.read() if r["B"] == "16" and r["dtype"] == "bf16"], ids=str)
def test_each_thread_stores_and_sums_what_it_holds_and_no_more(row):
    cell, _, way = row["kernel"].partition(" ")
    case = Case(cell, way == "backward", row["dtype"], int(row["H"]), row["arch"], int(row["B"]))
    part = planned(case)
    t, shape = part.tiling, CELLS[cell]
    holders = max(1, 32 * part.choice.warps // (t.units * t.batch_tile))  # threads that hold an element
    tiles = shape.gates * (1 + shape.recurrent_gradient) if case.backward else shape.states + shape.saved
    stored = 2 * tiles * t.units * t.batch_tile * holders + 4  # and an announcement
    if t.k_parts > 1:
        stored += 4 * t.units_formed * t.batch_tile + 4
    assert int(row["executed_global_written"]) == stored
    # What each warp has is written once, and read once by each of them.
    summed = reduction(t.packs, t.splits // t.chains, t.k_parts, t.units, t.batch_tile)
    assert int(row["executed_shared_written"]) == summed
    if row["audit_in_shared"] == "0":
        assert int(row["executed_shared_read"]) == summed * (1 if t.k_parts > 1 else holders)


def test_counting_needs_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(audit_command, "COUNTS", tmp_path / "counted.py")
    with pytest.raises(SystemExit):
        audit_command.main(["--run"])
    assert "needs a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["", "counted.py", "counted_rivals.py"])
def test_the_command_runs_both_counts(monkeypatch, tmp_path, fails):
    """From the checkout, of which both import what is in no package."""
    for name in ("counted.py", "counted_rivals.py"):
        script = "import os, sys\nimport bench\nassert 'TRITON_INTERPRET' not in os.environ\n"
        (tmp_path / name).write_text(f"{script}sys.exit({name == fails})\n")
    monkeypatch.setattr(audit_command, "COUNTS", tmp_path / "counted.py")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert audit_command.main(["--run"]) == bool(fails)
