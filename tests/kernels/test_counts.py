"""What the compiled kernels do per step: the file is what a fresh run counts, and the page is made of the file."""

from dataclasses import asdict
from pathlib import Path

import counted
import pytest
import triton
from emulator.ptx import Kernel

from persistrnn.kernels.inspect.audit import compile_pass, planned

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
    assert counted.table([row for row in counted.read() if row["B"] == "16"]) in page, "make counts prints it"
    # None of these sizes streams: executed as read from the code.
    assert {(row["executed_weights"], row["audit_streamed"]) for row in counted.read()} == {("0", "0")}
