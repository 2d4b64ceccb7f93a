"""What is committed and derived is what today's code makes of it: all of it where that is quick, else a sample.

The counts and the clock's table have their own: test_counts.py and test_clock.py.
"""

import csv
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

from bench.race import engine
from bench.report import results
from persistrnn.kernels.cells import STAGED
from persistrnn.kernels.inspect import audit, audit_command, plan_command
from persistrnn.kernels.planner.hardware import named

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
AUDITS = ("audit-newest.csv", "audit-oldest.csv")


IDENTITY = ("kernel", "dtype", "H", "B", "D", "arch")


HOW = ("bf16", "fp16", "tf32", "fp32", "marks", "chunked", "pipeline", "staged bf16", "staged tf32")
KINDS = [*(f"{way} {how}" for how in HOW for way in ("forward", "backward")), "forward int8", "forward fp8"]


def audited(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in IDENTITY)


@cache
def wanted() -> dict[tuple[str, ...], audit.Case]:
    """What `make audit` compiles, by the columns that name a row."""
    command = re.search(r"^AUDIT := -m persistrnn audit (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    paths = {word: sorted(map(str, ROOT.glob(word))) for word in command.split() if word.startswith("bench/")}
    given = audit_command.parser().parse_args([part for word in command.split() for part in paths.get(word, [word])])
    cases = audit_command.cases(audit_command.asked(given)).values()
    return {identity(asdict(audit.row_of(case))): case for case in cases}


def where(arch: str, slices: int, resident: float, registers: int, shared: int, streamed: int) -> tuple[object, ...]:
    """AMD's backend leaves more of W_hh in registers than is asked."""
    return slices, resident, *((registers, shared) if arch.startswith("sm_") else (registers + shared,)), streamed


@pytest.mark.parametrize("table", AUDITS)
def test_audit_tables_are_of_today_s_plans(table):
    """Every kernel that `make audit` compiles, and no other: how many slices, and where W_hh is."""
    rows = {identity(row): row for row in audited(table)}
    assert rows.keys() == wanted().keys(), "run `make audit`"
    for name, case in wanted().items():
        row, part = rows[name], audit.planned(case)
        assert not row["failures"] + row["refused"], row
        homes = [int(row[column]) for column in ("in_registers", "in_shared", "streamed")]
        found = where(case.arch, int(row["slices"]), float(row["resident"]), *homes)
        homes = part.in_registers, part.in_shared, part.streamed
        assert found == where(case.arch, part.tiling.slices, round(100 * part.shares.resident, 1), *homes), row


def kinds() -> dict[str, tuple[str, ...]]:
    """The smallest row of each kind of kernel, of NVIDIA's: they compile in two seconds or so each."""
    found: dict[str, tuple[str, ...]] = {}
    for name, case in sorted(wanted().items(), key=lambda entry: entry[1].hidden):
        how = "pipeline" * (case.layers > 1) + "marks" * case.marks + "chunked" * case.chunked + case.weight_dtype
        kind = "backward" if case.backward else "forward", "staged" * (case.cell in STAGED), how or case.dtype
        if case.arch.startswith("sm_"):
            found.setdefault(" ".join(filter(None, kind)), name)
    return found


@pytest.mark.audit
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_audit_are_compiled_anew(kind):
    """A row of each kind is what today's code makes, to the last instruction."""
    tables = [rows for rows in map(audited, AUDITS) if rows[0]["triton"] == triton.__version__]
    if not tables:
        pytest.skip(f"there is no table of Triton {triton.__version__}")
    assert kinds().keys() == {*KINDS}
    name = kinds()[kind]
    fresh = {column: str(value) for column, value in asdict(audit.audit(wanted()[name])).items()}
    assert [row for row in tables[0] if identity(row) == name] == [fresh], "run `make audit`"


def test_the_rehearsal_has_today_s_predictions():
    rehearsals = [found for found in map(results.load, RESULTS.glob("*.json")) if found.provenance.rehearsal]
    assert rehearsals
    for found in rehearsals:
        device = named(re.search(r"--rehearse (\w+)", found.provenance.command)[1])
        ours = [one for one in found.timings if one.arm == "persistrnn"]
        assert ours
        for one in ours:
            predicted, floor, plan = engine.expectation(one.case, device)
            assert (one.predicted, one.floor) == pytest.approx((predicted, floor)), one.case
            assert one.plan == plan, one.case


def test_the_picture_is_the_one_that_its_command_draws(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"`persistrnn plan (--cell .*?)`", readme)[1].split()
    (kept,) = RESULTS.glob("plan-*.svg")
    assert f"(bench/results/{kept.name})" in readme
    monkeypatch.setattr("sys.argv", ["plan", *command, "--draw", str(tmp_path / "plan.svg")])
    plan_command.main()
    assert kept.read_bytes() == (tmp_path / "plan.svg").read_bytes()
