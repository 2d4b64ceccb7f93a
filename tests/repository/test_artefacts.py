"""What is committed and derived is what today's code makes of it: all of it where that is quick, else a sample.

The counts and the clock's table have their own: test_counts.py and test_clock.py.
"""

import csv
import re
from pathlib import Path

import pytest
import triton

from bench.race import engine
from bench.report import results
from persistrnn.kernels.inspect import audit, plan_command
from persistrnn.kernels.planner.hardware import named

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
AUDITS = ("audit-newest.csv", "audit-oldest.csv")


def audited(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def case_of(row: dict[str, str]) -> audit.Case:
    cell, way = row["kernel"].split()
    sizes = {name: int(row[column]) for name, column in (("hidden", "H"), ("batch", "B"), ("directions", "D"))}
    return audit.Case(cell, way == "backward", row["dtype"], arch=row["arch"], **sizes)


# Of the tables that are there: planned otherwise since. None is left when `make audit` has made them anew.
STALE = {("lstm forward", "tf32", "1024", "64", "1", "sm_90")}


def where(row: dict[str, str], homes: list[int], slices: int, resident: float) -> tuple[object, ...]:
    """AMD's backend leaves more of W_hh in registers than is asked."""
    registers, shared, streamed = homes
    on_chip = (registers, shared) if row["arch"].startswith("sm_") else (registers + shared,)
    return slices, resident, *on_chip, streamed


@pytest.mark.parametrize("name", AUDITS)
def test_audit_tables_are_of_today_s_plans(name):
    """Of every row: how many slices, and where W_hh is."""
    other = set()
    for row in audited(name):
        assert not row["failures"] + row["refused"], row
        part = audit.planned(case_of(row))
        homes = [int(row[column]) for column in ("in_registers", "in_shared", "streamed")]
        expected = [part.in_registers, part.in_shared, part.streamed]
        planned = where(row, expected, part.tiling.slices, round(100 * part.shares.resident, 1))
        if where(row, homes, int(row["slices"]), float(row["resident"])) != planned:
            other.add(tuple(row[column] for column in ("kernel", "dtype", "H", "B", "D", "arch")))
    assert other <= STALE


@pytest.mark.audit
@pytest.mark.parametrize("number", [101, 557, 1201])
def test_rows_of_the_audit_are_compiled_anew(number):
    """Where the weights are in the compiled kernel, and that nothing spills. Instructions and barriers belong to the
    kernels of the day of the table."""
    tables = [rows for rows in map(audited, AUDITS) if rows[0]["triton"] == triton.__version__]
    if not tables:
        pytest.skip(f"there is no table of Triton {triton.__version__}")
    of_nvidia = [row for row in tables[0] if row["arch"].startswith("sm_") and int(row["H"]) <= 512]
    row = of_nvidia[number % len(of_nvidia)]
    fresh = audit.audit(case_of(row))
    names = ("slices", "resident", "in_registers", "in_shared", "streamed", "spills", "failures", "refused")
    assert {name: str(getattr(fresh, name)) for name in names} == {name: row[name] for name in names}


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
