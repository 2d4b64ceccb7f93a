"""What the compiled scans do per program and time step, counted while the emulator executes them, beside what the audit
reads from the same code.

`persistrnn audit --run` runs this file: it writes bench/results/counts.csv, from which the table in bench/README.md is
made. Facts of the code, not times: no GPU is needed for them, and none is there.
"""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import triton
from emulator import Report, emulate
from emulator.ptx import Kernel

from persistrnn.kernels.inspect.audit import Case, audit

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "counts.csv"
STEPS = 4
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}


@dataclass(frozen=True)
class Row:
    """executed_instructions: PTX, each once for all warps of a program, none of polls that repeat; executed_other: of
    those, neither memory nor tensor cores nor barriers. executed_weights: bytes of W_hh read in the loop over time, 0
    where it stays on the chip. Bytes are of all threads of a program; copies of one number count each. What the audit
    found is of the whole kernel, in SASS, and its bytes of W_hh are those of a program."""

    kernel: str
    dtype: str
    H: int
    B: int
    arch: str
    triton: str
    slices: int
    executed_instructions: int
    executed_other: int
    executed_tensor: int
    executed_barriers: int
    executed_shared_read: int
    executed_shared_written: int
    executed_global_read: int
    executed_global_written: int
    executed_weights: int
    audit_instructions: int
    audit_barriers: int
    audit_registers: int
    audit_spills: int
    audit_in_registers: int
    audit_in_shared: int
    audit_streamed: int


CELLS = ("lstm", "gru")
SHAPES = [
    *((cell, "bf16", hidden, 16) for cell in CELLS for hidden in (256, 512, 1024)),
    *((cell, "bf16", 512, batch) for cell in CELLS for batch in (1, 64)),
    *((cell, "tf32", 512, 16) for cell in CELLS),
]


AUDITED = [f.name for f in fields(Row) if f.name.startswith("audit_")]


def row(report: Report, case: Case) -> Row:
    executed, moved = report.executed(STEPS), report.moved(STEPS)

    def total(*names: str) -> int:
        return round(sum(count for i, count in executed if i.name in names))

    def bytes_of(way: str, of: str | None = None) -> int:
        return round(sum(n for (where, w), n in moved.items() if w == way and (where == "shared") == (of == "shared")))

    every = round(sum(count for _, count in executed))
    tensor, barriers = total("mma", "wgmma"), total("bar")
    memory = total("ld", "st", "red", "atom", "ldmatrix", "stmatrix")
    static = audit(case)
    return Row(
        *(static.kernel, case.dtype, case.hidden, case.batch, case.arch, triton.__version__, report.slices),
        *(every, every - tensor - barriers - memory, tensor, barriers),
        *(bytes_of("read", "shared"), bytes_of("written", "shared"), bytes_of("read"), bytes_of("written")),
        round(moved["weight", "read"]),
        *(getattr(static, name.removeprefix("audit_")) for name in AUDITED),
    )


def count(cell: str, dtype: str, hidden: int, batch: int, arch: str = "sm_90") -> list[tuple[Row, Case, Kernel]]:
    """Of the forward and the backward as planned for the architecture, each with what the audit compiled and what was
    executed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICE", "cpu")
        patch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
        session = emulate(patch, arch, units="rows")
        gpu.outputs_and_gradients(cell, *gpu.operands(cell, hidden, batch, STEPS, 1, DTYPES[dtype]))
    firsts = {report.kernel.name: report for report in reversed(session.reports)}  # of the launches of a pass
    cases = {f"scan_{w}": Case(cell, w == "backward", dtype, hidden, arch, batch) for w in ("forward", "backward")}
    return [(row(firsts[name], case), case, firsts[name].kernel) for name, case in cases.items()]


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown, of the rows of a file."""
    names = [name for name in rows[0] if name not in ("arch", "triton")]
    heads = [n.replace("executed_", "executed: ").replace("audit_", "audit: ").replace("_", " ") for n in names]
    lines = [heads, ["---"] * len(names)]
    lines += [[f"{int(r[n]):,}" if r[n].isdigit() else r[n] for n in names] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(results: Path = RESULTS) -> list[dict[str, str]]:
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, Any]], results: Path = RESULTS) -> None:
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    rows = []
    for shape in SHAPES:
        print("counting", *shape, flush=True)
        rows += [asdict(row) for row, _, _ in count(*shape)]
    write(rows)
    print(table([row for row in read() if row["B"] == "16"]))


if __name__ == "__main__":
    main()
